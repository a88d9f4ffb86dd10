//! Opens the store that a storage's root names, with its credentials and with bounds on every request.
//!
//! Owns: which option of which client a declared root means. Does not own: where credentials come from (Secrets are the
//! query pod's and the operator's) or what is stored.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path as FsPath;
use std::sync::Arc;
use std::time::Duration;

use kalamdb_model::declared::StorageRoot;
use object_store::aws::{AmazonS3Builder, S3ConditionalPut};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::prefix::PrefixStore;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};

use crate::filesystem::FilesystemStore;
pub use crate::probe::{ProbeError, ProbeReason, probe};

/// Time to reach a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for one request with its body.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Retries of one call. The client's own 10 within 180 s would hide an outage from a committer for minutes.
const RETRIES_MAX: usize = 3;
/// No retry starts later than this after the first request.
const RETRY_WINDOW: Duration = Duration::from_secs(20);
/// Longest pause between retries.
const BACKOFF_MAX: Duration = Duration::from_secs(4);

/// Region for servers that have none.
const DEFAULT_REGION: &str = "us-east-1";

/// Variables that say who the pod is, for storages without credentials of their own. Not those that say *where*
/// (endpoint, region, plain HTTP): these belong to the home store alone.
const AWS_IDENTITY: [&str; 11] = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_ROLE_ARN",
    "AWS_ROLE_SESSION_NAME",
    "AWS_ENDPOINT_URL_STS",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE",
    "AWS_METADATA_ENDPOINT",
];
const AWS_PLACE: [&str; 8] = [
    "AWS_DEFAULT_REGION",
    "AWS_REGION",
    "AWS_ENDPOINT",
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ALLOW_HTTP",
    "AWS_VIRTUAL_HOSTED_STYLE_REQUEST",
    "AWS_SKIP_SIGNATURE",
];
const GOOGLE_IDENTITY: [&str; 4] = [
    "GOOGLE_SERVICE_ACCOUNT",
    "GOOGLE_SERVICE_ACCOUNT_PATH",
    "GOOGLE_SERVICE_ACCOUNT_KEY",
    "GOOGLE_APPLICATION_CREDENTIALS",
];
const AZURE_IDENTITY: [&str; 9] = [
    "AZURE_STORAGE_ACCOUNT_KEY",
    "AZURE_STORAGE_SAS_KEY",
    "AZURE_CLIENT_ID",
    "AZURE_CLIENT_SECRET",
    "AZURE_TENANT_ID",
    "AZURE_AUTHORITY_HOST",
    "AZURE_FEDERATED_TOKEN_FILE",
    "AZURE_MSI_ENDPOINT",
    "AZURE_STORAGE_TOKEN",
];
const AZURE_PLACE: [&str; 4] =
    ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ENDPOINT", "AZURE_STORAGE_USE_EMULATOR", "AZURE_ALLOW_HTTP"];

/// What a Secret holds for a storage, by key: `accessKeyId`, `secretAccessKey`, `sessionToken` (S3); `serviceAccountKey`
/// (GCS); `accountKey` or `sasToken` (Azure). `Debug` shows the keys and never a value.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Credentials(BTreeMap<String, String>);

impl Credentials {
    /// Wraps the Secret's data, decoded.
    #[must_use]
    pub const fn new(data: BTreeMap<String, String>) -> Self {
        Self(data)
    }

    /// The value of a key; surrounding white space is none of it, because Secrets made from files end in a newline.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(|value| value.trim()).filter(|value| !value.is_empty())
    }

    /// All of it, for keeping it on the pod's own volume.
    #[must_use]
    pub const fn as_map(&self) -> &BTreeMap<String, String> {
        &self.0
    }

    fn require(&self, key: &'static str) -> Result<&str, StoreError> {
        self.get(key).ok_or(StoreError::Credentials { missing: key })
    }
}

impl From<BTreeMap<String, String>> for Credentials {
    fn from(data: BTreeMap<String, String>) -> Self {
        Self(data)
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The Secret lacks a key.
    #[error("the credentials have no `{missing}`")]
    Credentials {
        /// The key.
        missing: &'static str,
    },
    /// The URL of the home store is of no known form.
    #[error(
        "`{url}` is no store; use s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, file:///folder or memory:"
    )]
    Url {
        /// The URL.
        url: String,
    },
    /// A prefix that no path can begin with.
    #[error("`{prefix}` cannot be a prefix of object names")]
    Prefix {
        /// The prefix.
        prefix: String,
        /// What is wrong.
        source: object_store::path::Error,
    },
    /// The folder was used before, and what was there is not there now.
    #[error("the folder `{path}` was used before, and is missing or empty now; mount its disk, or restore it")]
    NotMounted {
        /// The folder.
        path: String,
    },
    /// The client refuses the options, or the folder cannot be used.
    #[error("cannot open `{url}`")]
    Open {
        /// The root.
        url: String,
        /// What it says.
        source: object_store::Error,
    },
}

/// Opens the store at `root` for its first use: as [`open`], but a folder is made, and marked as used.
///
/// # Errors
/// As [`open`].
pub fn open_first(
    root: &StorageRoot,
    credentials: Option<&Credentials>,
    data_dir: &FsPath,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    match root {
        StorageRoot::Filesystem { path } => opened(FilesystemStore::open_first(&data_dir.join(path)), &root.url()),
        _ => open(root, credentials, data_dir),
    }
}

/// Opens the store at `root`, which was used before; paths are relative to it. No request is made yet: [`probe`] does
/// that. A folder must hold what its first use made there, else its disk may not be mounted.
///
/// Without `credentials`, S3, GCS and Azure use the identity of the process (its environment, IRSA and its like).
/// A relative folder is relative to `data_dir`.
///
/// # Errors
/// If the credentials lack a key, the options are wrong, or the folder is not there.
pub fn open(
    root: &StorageRoot,
    credentials: Option<&Credentials>,
    data_dir: &FsPath,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let env = |name: &str| std::env::var(name).ok();
    match root {
        StorageRoot::Filesystem { path } => {
            let folder = data_dir.join(path);
            match FilesystemStore::open_used(&folder) {
                Err(object_store::Error::NotFound { .. }) => {
                    Err(StoreError::NotMounted { path: folder.display().to_string() })
                }
                other => opened(other, &root.url()),
            }
        }
        StorageRoot::S3 { bucket, prefix, region, endpoint, path_style, allow_http } => {
            let mut builder = match credentials {
                None => s3_from(&env, &AWS_IDENTITY),
                Some(credentials) => s3_with(credentials)?,
            };
            builder = builder
                .with_region(region.as_deref().unwrap_or(DEFAULT_REGION))
                .with_virtual_hosted_style_request(!path_style)
                .with_allow_http(*allow_http);
            if let Some(endpoint) = endpoint {
                let host = if *path_style { endpoint.clone() } else { with_bucket_in_host(endpoint, bucket) };
                builder = builder.with_endpoint(host);
            }
            finish(root.url(), builder.with_bucket_name(bucket).build(), prefix)
        }
        StorageRoot::Gcs { bucket, prefix } => {
            let builder = match credentials {
                None => gcs_from(&env),
                Some(credentials) => gcs().with_service_account_key(credentials.require("serviceAccountKey")?),
            };
            finish(root.url(), builder.with_bucket_name(bucket).build(), prefix)
        }
        StorageRoot::Azure { account, container, prefix, endpoint } => {
            let mut builder = match credentials {
                None => azure_from(&env, &AZURE_IDENTITY),
                Some(credentials) => azure_with(credentials)?,
            };
            if let Some(endpoint) = endpoint {
                builder = builder.with_endpoint(endpoint.clone()).with_allow_http(endpoint.starts_with("http://"));
            }
            finish(root.url(), builder.with_account(account).with_container_name(container).build(), prefix)
        }
    }
}

/// Opens the home store at `url`: `s3://bucket/prefix`, `gs://…`, `az://container/…`, `file:///folder` or `memory:`,
/// with the usual variables of its client (`AWS_*`, `GOOGLE_*`, `AZURE_*`), which `env` answers.
///
/// # Errors
/// If the URL is of none of these forms or the variables do not fit.
pub fn open_home(url: &str, env: impl Fn(&str) -> Option<String>) -> Result<Arc<dyn ObjectStore>, StoreError> {
    if url == "memory:" {
        return Ok(Arc::new(InMemory::new()));
    }
    let unknown = || StoreError::Url { url: url.to_owned() };
    let (scheme, rest) = url.split_once("://").ok_or_else(unknown)?;
    if scheme == "file" && rest.starts_with('/') {
        return opened(FilesystemStore::open(FsPath::new(rest)), url);
    }
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    if bucket.is_empty() {
        return Err(unknown());
    }
    match scheme {
        "s3" => {
            let names: Vec<&str> = AWS_IDENTITY.into_iter().chain(AWS_PLACE).collect();
            finish(url.to_owned(), s3_from(&env, &names).with_bucket_name(bucket).build(), prefix)
        }
        "gs" => finish(url.to_owned(), gcs_from(&env).with_bucket_name(bucket).build(), prefix),
        "az" => {
            let names: Vec<&str> = AZURE_IDENTITY.into_iter().chain(AZURE_PLACE).collect();
            finish(url.to_owned(), azure_from(&env, &names).with_container_name(bucket).build(), prefix)
        }
        _ => Err(unknown()),
    }
}

fn opened(store: object_store::Result<FilesystemStore>, url: &str) -> Result<Arc<dyn ObjectStore>, StoreError> {
    match store {
        Ok(store) => Ok(Arc::new(store)),
        Err(source) => Err(StoreError::Open { url: url.to_owned(), source }),
    }
}

fn finish<T: ObjectStore>(
    url: String,
    store: object_store::Result<T>,
    prefix: &str,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    let store = store.map_err(|source| StoreError::Open { url, source })?;
    let prefix = Path::parse(prefix).map_err(|source| StoreError::Prefix { prefix: prefix.to_owned(), source })?;
    Ok(if prefix.is_root() { Arc::new(store) } else { Arc::new(PrefixStore::new(store, prefix)) })
}

fn client_options() -> ClientOptions {
    ClientOptions::new().with_connect_timeout(CONNECT_TIMEOUT).with_timeout(REQUEST_TIMEOUT)
}

fn retry() -> RetryConfig {
    let backoff = BackoffConfig { max_backoff: BACKOFF_MAX, ..BackoffConfig::default() };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: RETRY_WINDOW }
}

fn s3() -> AmazonS3Builder {
    // Client options come first: what is set later (plain HTTP, say) goes into them.
    AmazonS3Builder::new()
        .with_client_options(client_options())
        .with_retry(retry())
        .with_conditional_put(S3ConditionalPut::ETagMatch)
}

fn s3_with(credentials: &Credentials) -> Result<AmazonS3Builder, StoreError> {
    let builder = s3()
        .with_access_key_id(credentials.require("accessKeyId")?)
        .with_secret_access_key(credentials.require("secretAccessKey")?);
    Ok(match credentials.get("sessionToken") {
        Some(token) => builder.with_token(token),
        None => builder,
    })
}

fn s3_from(env: &impl Fn(&str) -> Option<String>, names: &[&str]) -> AmazonS3Builder {
    configured(env, names, s3(), |builder, key, value| builder.with_config(key, value))
}

fn gcs() -> GoogleCloudStorageBuilder {
    GoogleCloudStorageBuilder::new().with_client_options(client_options()).with_retry(retry())
}

fn gcs_from(env: &impl Fn(&str) -> Option<String>) -> GoogleCloudStorageBuilder {
    configured(env, &GOOGLE_IDENTITY, gcs(), |builder, key: GoogleConfigKey, value| builder.with_config(key, value))
}

fn azure() -> MicrosoftAzureBuilder {
    MicrosoftAzureBuilder::new().with_client_options(client_options()).with_retry(retry())
}

fn azure_with(credentials: &Credentials) -> Result<MicrosoftAzureBuilder, StoreError> {
    Ok(match (credentials.get("accountKey"), credentials.get("sasToken")) {
        (Some(key), _) => azure().with_access_key(key),
        (None, Some(token)) => azure().with_config(AzureConfigKey::SasKey, token),
        (None, None) => return Err(StoreError::Credentials { missing: "accountKey` or `sasToken" }),
    })
}

fn azure_from(env: &impl Fn(&str) -> Option<String>, names: &[&str]) -> MicrosoftAzureBuilder {
    configured(env, names, azure(), |builder, key, value| builder.with_config(key, value))
}

/// Hands each variable that is set to the builder, under the client's own name for it.
fn configured<B, K: std::str::FromStr>(
    env: &impl Fn(&str) -> Option<String>,
    names: &[&str],
    builder: B,
    set: impl Fn(B, K, String) -> B,
) -> B {
    names.iter().fold(builder, |builder, name| {
        let value = env(name).filter(|value| !value.is_empty());
        match (name.to_ascii_lowercase().parse(), value) {
            (Ok(key), Some(value)) => set(builder, key, value),
            _ => builder,
        }
    })
}

/// `https://host` → `https://bucket.host`: the client expects the bucket in the endpoint when it is part of the host.
fn with_bucket_in_host(endpoint: &str, bucket: &str) -> String {
    match endpoint.split_once("://") {
        Some((scheme, host)) => format!("{scheme}://{bucket}.{host}"),
        None => format!("{bucket}.{endpoint}"),
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;

    fn credentials(pairs: &[(&str, &str)]) -> Credentials {
        Credentials::new(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    fn s3_root(path_style: bool) -> StorageRoot {
        StorageRoot::S3 {
            bucket: "bucket".into(),
            prefix: "a/b".into(),
            region: None,
            endpoint: Some("http://127.0.0.1:9".into()),
            path_style,
            allow_http: true,
        }
    }

    #[test]
    fn credentials_never_show_a_value() {
        let secret = credentials(&[("accessKeyId", "AKIA123"), ("secretAccessKey", "hush\n")]);
        let shown = format!("{secret:?}");
        assert!(shown.contains("accessKeyId") && !shown.contains("AKIA123") && !shown.contains("hush"), "{shown}");
        assert_eq!(secret.get("secretAccessKey"), Some("hush"));
    }

    #[test]
    fn a_missing_key_is_named() {
        let error = |root: &StorageRoot, pairs: &[(&str, &str)]| {
            open(root, Some(&credentials(pairs)), FsPath::new("/")).expect_err("incomplete").to_string()
        };
        assert!(error(&s3_root(true), &[("accessKeyId", "x")]).contains("`secretAccessKey`"));
        let gcs = StorageRoot::Gcs { bucket: "b".into(), prefix: String::new() };
        assert!(error(&gcs, &[]).contains("`serviceAccountKey`"));
        let (account, container) = ("a".to_owned(), "c".to_owned());
        let azure = StorageRoot::Azure { account, container, prefix: String::new(), endpoint: None };
        assert!(error(&azure, &[("accountKey", " ")]).contains("`accountKey` or `sasToken`"));
    }

    #[test]
    fn options_reach_the_client() {
        let secret = credentials(&[("accessKeyId", "x"), ("secretAccessKey", "hush"), ("sessionToken", "hush2")]);
        let shown = format!("{:?}", open(&s3_root(true), Some(&secret), FsPath::new("/")).unwrap());
        assert!(shown.contains("http://127.0.0.1:9/bucket") && shown.contains("raw: \"a/b\""), "{shown}");
        let shown = format!("{:?}", open(&s3_root(false), Some(&secret), FsPath::new("/")).unwrap());
        assert!(shown.contains("http://bucket.127.0.0.1:9"), "{shown}");
        assert!(!shown.contains("hush"), "{shown}");
        let azure = StorageRoot::Azure {
            account: "acc".into(),
            container: "c".into(),
            prefix: String::new(),
            endpoint: Some("http://127.0.0.1:9/acc".into()),
        };
        assert!(open(&azure, Some(&credentials(&[("accountKey", "a2V5")])), FsPath::new("/")).is_ok());
    }

    #[test]
    fn home_urls_are_understood_or_refused() {
        let env = |name: &str| match name {
            "AWS_ENDPOINT" => Some("http://127.0.0.1:9".to_owned()),
            "AWS_ALLOW_HTTP" => Some("true".to_owned()),
            "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" => Some("x".to_owned()),
            "AZURE_STORAGE_ACCOUNT_NAME" => Some("account".to_owned()),
            _ => None,
        };
        let shown = format!("{:?}", open_home("s3://bucket/home/", env).unwrap());
        assert!(shown.contains("http://127.0.0.1:9/bucket") && shown.contains("raw: \"home\""), "{shown}");
        assert!(open_home("memory:", env).is_ok());
        assert!(open_home("az://container/home", env).is_ok());
        for bad in ["", "bucket", "s3://", "ftp://a/b", "file://relative", "memory"] {
            assert!(matches!(open_home(bad, env), Err(StoreError::Url { .. })), "{bad}");
        }
    }

    #[tokio::test]
    async fn a_relative_folder_lies_in_the_data_directory() {
        let data = tempfile::tempdir().unwrap();
        let root = StorageRoot::Filesystem { path: "./files".into() };
        assert!(matches!(open(&root, None, data.path()), Err(StoreError::NotMounted { .. })));
        open_first(&root, None, data.path()).unwrap();
        let store = open(&root, None, data.path()).unwrap();
        store.put(&Path::parse("a/b").unwrap(), "x".into()).await.unwrap();
        assert!(data.path().join("files/a/b").is_file());
        let home = open_home(&format!("file://{}/home", data.path().display()), |_| None).unwrap();
        store_is_usable(&*home).await;
    }

    async fn store_is_usable(store: &dyn ObjectStore) {
        probe(store).await.unwrap();
    }
}
