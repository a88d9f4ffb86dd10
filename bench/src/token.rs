//! Bearer tokens, signed here with the server's own secret, because a demo speaks as hundreds of users.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use kalamdb_model::{Role, UserId};
use serde::Serialize;

/// How long a token lasts: longer than any run.
const VALID: Duration = Duration::from_secs(24 * 3_600);

/// Where the secret comes from.
#[derive(clap::Args, Debug, Clone)]
pub struct SecretArgs {
    /// Data folder of a standalone server on this machine, whose `jwt.key` signs; not needed when the secret is given.
    #[arg(long, env = "KALAMDB_DATA", default_value = ".kalamdb")]
    pub data_dir: PathBuf,
    /// Secret to sign with instead, as the server has it.
    #[arg(long, env = "KALAMDB_JWT_SECRET", hide_env_values = true)]
    pub jwt_secret: Option<String>,
}

impl SecretArgs {
    /// The signer that these arguments describe.
    ///
    /// # Errors
    /// If there is no secret.
    pub fn signer(&self) -> anyhow::Result<Signer> {
        match &self.jwt_secret {
            Some(secret) => Ok(Signer::new(secret.as_bytes())),
            None => Signer::of_data_dir(&self.data_dir),
        }
    }
}

/// Makes tokens that the server takes.
pub struct Signer(EncodingKey);

#[derive(Serialize)]
struct Claims<'a> {
    sub: &'a str,
    role: Role,
    exp: u64,
}

impl Signer {
    /// Signs with `secret`.
    pub fn new(secret: &[u8]) -> Self {
        Self(EncodingKey::from_secret(secret))
    }

    /// Signs with the secret of a standalone server's data folder.
    ///
    /// # Errors
    /// If the folder has none.
    pub fn of_data_dir(dir: &Path) -> anyhow::Result<Self> {
        let path = dir.join("jwt.key");
        let secret = std::fs::read(&path).with_context(|| {
            format!(
                "failed to read `{}`; name the data folder of a standalone server with --data-dir, or set \
                 KALAMDB_JWT_SECRET to the secret of the cluster",
                path.display()
            )
        })?;
        Ok(Self::new(&secret))
    }

    /// A token that proves `user`.
    ///
    /// # Errors
    /// If signing fails, which HS256 does not.
    pub fn token(&self, user: &UserId, role: Role) -> anyhow::Result<String> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).context("the clock is before 1970")?;
        let claims = Claims { sub: user.as_str(), role, exp: (now + VALID).as_secs() };
        jsonwebtoken::encode(&Header::new(Algorithm::HS256), &claims, &self.0).context("failed to sign a token")
    }
}
