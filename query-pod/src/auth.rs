//! Who is asking: bearer tokens (JWT, HS256) and the identity that they carry.

use std::path::Path;

use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use kalamdb_model::{Role, UserId};
use serde::{Deserialize, Serialize};

use crate::error::{ApiError, Kind};

/// An authenticated caller. Every scan and write reads it from here; nothing runs without one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user id, as `CURRENT_USER()` shows it.
    pub user: UserId,
    /// What he may do.
    pub role: Role,
}

#[derive(Serialize, Deserialize)]
struct Claims {
    sub: UserId,
    #[serde(default = "user_role")]
    role: Role,
    exp: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    iat: Option<u64>,
}

const fn user_role() -> Role {
    Role::User
}

/// Shortest secret that is taken, in bytes: the output size of the hash (RFC 7518, section 3.2).
const SECRET_BYTES_MIN: usize = 32;

/// Makes and checks tokens with one shared secret.
pub struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    validation: Validation,
}

/// Why there is no secret to check tokens with.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// Too short to be safe.
    #[error("the token secret has {0} bytes and needs at least {SECRET_BYTES_MIN}")]
    Short(usize),
    /// The key file cannot be read or written.
    #[error("failed to read or create `{path}`")]
    File {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
}

impl Tokens {
    /// Tokens under `secret`.
    ///
    /// # Errors
    /// If the secret is too short.
    pub fn new(secret: &[u8]) -> Result<Self, SecretError> {
        if secret.len() < SECRET_BYTES_MIN {
            return Err(SecretError::Short(secret.len()));
        }
        let mut validation = Validation::new(Algorithm::HS256);
        validation.set_required_spec_claims(&["exp", "sub"]);
        validation.validate_nbf = true;
        validation.validate_aud = false;
        validation.leeway = 5;
        Ok(Self { encoding: EncodingKey::from_secret(secret), decoding: DecodingKey::from_secret(secret), validation })
    }

    /// Tokens under the secret in `data_dir/jwt.key`, which the first start makes (mode 0600).
    ///
    /// # Errors
    /// If the file cannot be read or made.
    pub fn of_data_dir(data_dir: &Path) -> Result<Self, SecretError> {
        let path = data_dir.join("jwt.key");
        let file = |source| SecretError::File { path: path.display().to_string(), source };
        match std::fs::read(&path) {
            Ok(secret) => Self::new(&secret),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let secret = fresh_secret();
                write_private(&path, secret.as_bytes()).map_err(file)?;
                // Two first starts may meet here: what lies in the file is the secret.
                Self::new(&std::fs::read(&path).map_err(file)?)
            }
            Err(error) => Err(file(error)),
        }
    }

    /// A token for `user`, valid for `ttl_secs` seconds from `now_secs` (since 1970).
    ///
    /// # Errors
    /// If signing fails, which HS256 does not.
    pub fn issue(
        &self,
        user: &UserId,
        role: Role,
        now_secs: u64,
        ttl_secs: u64,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let claims = Claims { sub: user.clone(), role, exp: now_secs.saturating_add(ttl_secs), iat: Some(now_secs) };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.encoding)
    }

    /// The identity that an `Authorization` header proves.
    ///
    /// # Errors
    /// 401, saying whether the header is missing, malformed, expired or not ours.
    pub fn identify(&self, authorization: Option<&str>) -> Result<Identity, ApiError> {
        let refuse = |code, message: &str| Err(ApiError::new(Kind::Unauthenticated, code, message));
        let Some(header) = authorization else {
            return refuse("UNAUTHENTICATED", "send a token: `Authorization: Bearer <token>`");
        };
        let Some((scheme, token)) = header.split_once(' ') else {
            return refuse("UNAUTHENTICATED", "the Authorization header is not `Bearer <token>`");
        };
        if !scheme.eq_ignore_ascii_case("bearer") {
            return refuse("UNAUTHENTICATED", "the Authorization header is not `Bearer <token>`");
        }
        match jsonwebtoken::decode::<Claims>(token.trim(), &self.decoding, &self.validation) {
            Ok(data) => Ok(Identity { user: data.claims.sub, role: data.claims.role }),
            Err(error) if matches!(error.kind(), jsonwebtoken::errors::ErrorKind::ExpiredSignature) => {
                refuse("TOKEN_EXPIRED", "the token has expired; get a new one")
            }
            Err(error) if matches!(error.kind(), jsonwebtoken::errors::ErrorKind::ImmatureSignature) => {
                refuse("INVALID_TOKEN", "the token is not valid yet: its `nbf` is in the future")
            }
            Err(_) => refuse("INVALID_TOKEN", "the token is not valid here: wrong signature, algorithm or claims"),
        }
    }
}

fn fresh_secret() -> String {
    use base64::Engine as _;
    let bytes: [u8; 48] = rand::random();
    base64::engine::general_purpose::STANDARD_NO_PAD.encode(bytes)
}

/// Creates `path` with mode 0600; keeps what is there already.
fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    // Written beside and linked, so that nobody ever reads half a secret.
    let temporary = path.with_extension(format!("{}.tmp", std::process::id()));
    let mut file = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    match linked {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn tokens() -> Tokens {
        Tokens::new(&[7; 32]).expect("long enough")
    }

    fn now() -> u64 {
        u64::try_from(chrono::Utc::now().timestamp()).expect("after 1970")
    }

    #[test]
    fn a_token_proves_its_user_and_role() {
        let user = UserId::new("é/🙂").expect("valid");
        let token = tokens().issue(&user, Role::Service, now(), 60).expect("signed");
        let identity = tokens().identify(Some(&format!("bearer {token}"))).expect("valid");
        assert_eq!(identity, Identity { user, role: Role::Service });
    }

    #[test]
    fn what_is_no_valid_token_is_refused() {
        let user = UserId::new("a").expect("valid");
        let code = |header: Option<&str>| tokens().identify(header).expect_err("refused").code;
        assert_eq!(code(None), "UNAUTHENTICATED");
        assert_eq!(code(Some("Basic abc")), "UNAUTHENTICATED");
        assert_eq!(code(Some("Bearer abc")), "INVALID_TOKEN");
        let old = tokens().issue(&user, Role::User, now() - 1_000, 60).expect("signed");
        assert_eq!(code(Some(&format!("Bearer {old}"))), "TOKEN_EXPIRED");
        let foreign = Tokens::new(&[8; 32]).expect("long").issue(&user, Role::User, now(), 60).expect("signed");
        assert_eq!(code(Some(&format!("Bearer {foreign}"))), "INVALID_TOKEN");
        // `alg: none` with the claims of a valid token.
        assert_eq!(code(Some("Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIiwiZXhwIjo5OTk5OTk5OTk5fQ.")), "INVALID_TOKEN");
    }

    fn identify(claims: &serde_json::Value) -> Result<Identity, ApiError> {
        let token = jsonwebtoken::encode(&Header::new(Algorithm::HS256), claims, &tokens().encoding).expect("signed");
        tokens().identify(Some(&format!("Bearer {token}")))
    }

    #[test]
    fn a_token_is_refused_before_its_beginning() {
        let (now, later) = (now(), now() + 600);
        assert!(identify(&json!({"sub": "a", "exp": later, "nbf": now})).is_ok());
        let early = identify(&json!({"sub": "a", "exp": later + 600, "nbf": later})).expect_err("refused");
        assert_eq!(early.code, "INVALID_TOKEN");
        assert!(early.message.contains("`nbf`"), "{}", early.message);
        assert!(identify(&json!({"sub": "a", "exp": later, "nbf": "tomorrow"})).is_err());
    }

    #[test]
    fn a_token_without_an_end_or_a_user_is_refused() {
        let later = now() + 600;
        assert!(identify(&json!({"sub": "a", "exp": later})).is_ok());
        for claims in [
            json!({"sub": "a"}),
            json!({"sub": "a", "exp": null}),
            json!({"sub": "a", "exp": "never"}),
            json!({"sub": "a", "exp": -1}),
            json!({"exp": later}),
            json!({"sub": "", "exp": later}),
            json!({"sub": "a", "exp": later, "role": "root"}),
        ] {
            assert_eq!(identify(&claims).expect_err("refused").code, "INVALID_TOKEN", "{claims}");
        }
    }

    #[test]
    fn the_secret_of_a_folder_stays_and_is_private() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().expect("dir");
        let user = UserId::new("a").expect("valid");
        let token = Tokens::of_data_dir(dir.path()).expect("made").issue(&user, Role::User, now(), 60).expect("signed");
        let again = Tokens::of_data_dir(dir.path()).expect("read");
        assert!(again.identify(Some(&format!("Bearer {token}"))).is_ok());
        let mode = std::fs::metadata(dir.path().join("jwt.key")).expect("file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
