//! Cluster mode: the catalog is tailed from the home store, credentials come from Kubernetes Secrets. Both are kept on
//! the pod's volume, so that a restart needs neither the API server nor the home store.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::Secret;
use kalamdb_table_store::catalog_log::{self, CatalogLog, LogError};
use kalamdb_table_store::owners::{self, ClaimError, Claimed};
use kalamdb_table_store::store::{self, Credentials};
use kube::Api;
use object_store::ObjectStore;
use tokio::sync::watch;

use crate::args::Serve;
use crate::auth::Tokens;
use crate::catalog::{CatalogHandle, write_durably};
use crate::crash;
use crate::engine::{Engine, Secrets};
use crate::error::Chain;
use crate::metrics::Metrics;
use crate::server::{self, Parts};

/// How often the catalog log is asked for its next entry.
const TAIL: Duration = Duration::from_secs(1);
/// How often Secrets are read again, besides at once when the catalog names a new one.
const ROTATION: Duration = Duration::from_secs(15);
const BACKOFF: Duration = Duration::from_secs(5);
/// Between two looks at a log of another history: people have to act.
const REFUSED: Duration = Duration::from_secs(15);

/// Runs a server in a cluster.
///
/// # Errors
/// If the data folder, the home store's URL, the token secret or the address cannot be used.
pub async fn run(args: &Serve) -> anyhow::Result<()> {
    let tokens = Tokens::new(args.jwt_secret.as_bytes()).context("KALAMDB_JWT_SECRET")?;
    let home = store::open_home(&args.home_url, |name| std::env::var(name).ok()).context("KALAMDB_HOME_URL")?;
    let parts = Parts::open(&args.server)?;
    own(home.as_ref(), &parts).await?;
    parts.engine.follow_users(Arc::clone(&home));
    let saved = args.server.data_dir.join("secrets.json");
    let credentials = CredentialsReader::open(saved, parts.secrets.clone(), args.kube_namespace.clone());
    let tailing = tokio::spawn(tail(home, Arc::clone(&parts.engine), parts.ready.clone(), Arc::clone(&parts.metrics)));
    let reading = tokio::spawn(credentials.run(parts.catalog.clone()));
    let served = server::serve(&args.server, parts, tokens).await;
    tailing.abort();
    reading.abort();
    served
}

/// Makes sure that this volume is the one that serves the instance. A volume that knows itself to be does not need the
/// home store for it; a new one waits until the store answers, and so does one that has still to read a storage back: it
/// would end the streams of whoever succeeded it meanwhile.
async fn own(home: &dyn ObjectStore, parts: &Parts) -> anyhow::Result<()> {
    let is_owner = parts.engine.is_owner()?;
    if is_owner && !parts.engine.is_rebuilding() {
        return Ok(());
    }
    let volume = parts.engine.volume()?;
    let pod = std::env::var("POD_NAME").unwrap_or_else(|_| format!("unnamed-{volume}"));
    loop {
        match claim(home, &volume, &pod).await {
            Ok((claimed, founder, used)) => {
                if claimed == Claimed::Succeeded && !is_owner {
                    tracing::warn!(
                        pod,
                        "this volume is new, and its instance is not: its storages are read back first"
                    );
                    crash::point("rebuild.claimed");
                    // Before the claim is taken for granted: a crash in between claims, and comes here, again.
                    parts.engine.expect_rebuild(used)?;
                    crash::point("rebuild.expected");
                }
                return Ok(parts.engine.set_owner(&founder)?);
            }
            Err(error @ (ClaimError::Unknown(_) | ClaimError::Read { .. } | ClaimError::List(_))) => {
                tracing::warn!(error = %Chain(&error), "the home store does not answer; waiting to claim the instance");
                tokio::time::sleep(BACKOFF).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Claims the instance; tells also which volume had it first, and which storage roots it uses.
async fn claim(
    home: &dyn ObjectStore,
    volume: &str,
    pod: &str,
) -> Result<(Claimed, String, BTreeSet<String>), ClaimError> {
    let claimed = owners::claim(home, volume, pod).await?;
    let founder = owners::founder(home).await?.unwrap_or_else(|| volume.to_owned());
    Ok((claimed, founder, owners::used(home).await?))
}

/// Follows the catalog log. The pod is ready with the saved catalog, or once the log was read. A log of another history
/// is not followed: by its ids, rows of one table could be read as another's.
async fn tail(home: Arc<dyn ObjectStore>, engine: Arc<Engine>, ready: watch::Sender<bool>, metrics: Arc<Metrics>) {
    let mut loaded = engine.catalog().current().catalog.version > 0;
    ready.send_replace(loaded);
    let mut log = catalog_log::Tail::default();
    loop {
        let current = engine.catalog().current();
        metrics.catalog_version.set(i64::try_from(current.catalog.version).unwrap_or(i64::MAX));
        let next = if loaded {
            log.next(home.as_ref(), &current.catalog).await
        } else {
            CatalogLog::load(home.as_ref()).await.map(Some)
        };
        match next {
            Ok(_) => _ = metrics.catalog_refused.set(0),
            Err(LogError::OtherHistory { .. }) => _ = metrics.catalog_refused.set(1),
            Err(_) => {}
        }
        match next {
            Ok(Some(next)) => {
                let version = next.version;
                if next.version > current.catalog.version {
                    match engine.serve_catalog(next) {
                        Ok(()) => tracing::info!(version, "serving a new catalog"),
                        Err(error) => {
                            tracing::error!(error = %Chain(&error), "cannot save the catalog");
                            tokio::time::sleep(BACKOFF).await;
                            continue;
                        }
                    }
                }
                if !loaded {
                    loaded = true;
                    ready.send_replace(true);
                }
            }
            Ok(None) => tokio::time::sleep(TAIL).await,
            Err(error @ LogError::OtherHistory { .. }) => {
                tracing::error!(error = %Chain(&error), "the catalog log is refused; serving what was served");
                tokio::time::sleep(REFUSED).await;
            }
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot read the catalog log; serving what was served");
                tokio::time::sleep(BACKOFF).await;
            }
        }
    }
}

type Saved = BTreeMap<String, BTreeMap<String, String>>;

/// Reads the Secrets that the catalog's storages name, and no others.
struct CredentialsReader {
    saved_as: PathBuf,
    known: Saved,
    secrets: Secrets,
    kube_namespace: Option<String>,
}

impl CredentialsReader {
    fn open(saved_as: PathBuf, secrets: Secrets, kube_namespace: Option<String>) -> Self {
        let known: Saved = match std::fs::read(&saved_as).map(|bytes| serde_json::from_slice(&bytes)) {
            Ok(Ok(known)) => known,
            Ok(Err(error)) => {
                tracing::warn!(error = %error, "the saved credentials are damaged; reading them anew");
                Saved::default()
            }
            Err(_) => Saved::default(),
        };
        let reader = Self { saved_as, known, secrets, kube_namespace };
        reader.publish();
        reader
    }

    fn publish(&self) {
        let all: HashMap<_, _> =
            self.known.iter().map(|(name, data)| (name.clone(), Credentials::new(data.clone()))).collect();
        self.secrets.replace(all);
    }

    async fn run(mut self, catalog: CatalogHandle) {
        let mut api = None;
        loop {
            let wanted: BTreeSet<String> = catalog
                .current()
                .catalog
                .storages
                .values()
                .filter_map(|entry| entry.credentials_secret.clone())
                .collect();
            if !wanted.is_empty() {
                if api.is_none() {
                    api = self.connect().await;
                }
                if let Some(api) = &api {
                    self.refresh(api, &wanted).await;
                }
            }
            let pause = if wanted.iter().all(|name| self.known.contains_key(name)) { ROTATION } else { TAIL };
            let deadline = tokio::time::Instant::now() + pause;
            // A storage that names a new secret must not wait for the next rotation.
            while tokio::time::Instant::now() < deadline {
                tokio::time::sleep(TAIL).await;
                let current = catalog.current();
                let mut names = current.catalog.storages.values().filter_map(|entry| entry.credentials_secret.as_ref());
                if names.any(|name| !wanted.contains(name)) {
                    break;
                }
            }
        }
    }

    async fn connect(&self) -> Option<Api<Secret>> {
        match kube::Client::try_default().await {
            Ok(client) => {
                let namespace = self.kube_namespace.clone().unwrap_or_else(|| client.default_namespace().to_owned());
                Some(Api::namespaced(client, &namespace))
            }
            Err(error) => {
                tracing::warn!(error = %Chain(&error), "cannot reach Kubernetes; using the saved credentials");
                None
            }
        }
    }

    async fn refresh(&mut self, api: &Api<Secret>, wanted: &BTreeSet<String>) {
        let mut next = self.known.clone();
        next.retain(|name, _| wanted.contains(name));
        for name in wanted {
            match api.get_opt(name).await {
                Ok(Some(secret)) => {
                    next.insert(name.clone(), texts(secret));
                }
                Ok(None) => tracing::warn!(secret = %name, "a secret that a storage names does not exist"),
                Err(error) => tracing::warn!(secret = %name, error = %Chain(&error), "cannot read a secret"),
            }
        }
        if next == self.known {
            return;
        }
        self.known = next;
        self.publish();
        let saved = serde_json::to_vec(&self.known).map_err(std::io::Error::other);
        if let Err(error) = saved.and_then(|bytes| write_durably(&self.saved_as, &bytes, 0o600)) {
            tracing::warn!(error = %error, "cannot save credentials; a restart will need Kubernetes");
        }
    }
}

fn texts(secret: Secret) -> BTreeMap<String, String> {
    let data = secret.data.unwrap_or_default();
    data.into_iter().filter_map(|(key, value)| Some((key, String::from_utf8(value.0).ok()?))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use std::path::Path;

    use clap::Parser as _;
    use kalamdb_crds::manifests;
    use kalamdb_model::{Catalog, OnRemoval, Owner, TableEntry, TableName, UserId, Value, compile, key};
    use kalamdb_table_store::catalog_log::Appended;
    use kalamdb_table_store::paths;
    use kalamdb_test_support::pod::{MANIFESTS, eventually};
    use kalamdb_write_buffer::row;
    use object_store::ObjectStoreExt as _;
    use object_store::memory::InMemory;

    use super::*;
    use crate::args::{Cli, Command};
    use crate::engine::NewRow;

    fn open(data_dir: &Path) -> anyhow::Result<Parts> {
        let secret = "0".repeat(32);
        let flags = ["--home-url", "memory:", "--disk-reserve-bytes", "0", "--jwt-secret", &secret, "--data-dir"];
        let all = ["kalamdb-query-pod", "serve"].into_iter().chain(flags).chain(data_dir.to_str());
        let Command::Serve(args) = Cli::try_parse_from(all)?.command else { panic!("another command") };
        Parts::open(&args.server)
    }

    async fn close(parts: Parts) {
        parts.engine.close(Duration::from_secs(5)).await;
    }

    /// What an operator makes of `text`.
    fn compiled(previous: &Catalog, text: &str) -> Catalog {
        let folder = manifests::folder(&[("all.yaml".to_owned(), text.to_owned())]);
        let (next, _) = compile(previous, &folder.declared, OnRemoval::FollowPolicy);
        Catalog { nonce: catalog_log::nonce(), ..next }
    }

    async fn append(home: &dyn ObjectStore, previous: &Catalog, text: &str) -> Catalog {
        let next = compiled(previous, text);
        assert_eq!(CatalogLog::append(home, previous, &next, "operator").await.unwrap(), Appended::Ours);
        next
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_log_of_another_history_is_refused_aloud_and_the_last_good_catalog_is_served_on() {
        let (home, dir): (Arc<dyn ObjectStore>, _) = (Arc::new(InMemory::new()), tempfile::tempdir().unwrap());
        let parts = open(dir.path()).unwrap();
        let first = append(home.as_ref(), &Catalog::default(), MANIFESTS).await;
        let (engine, metrics) = (Arc::clone(&parts.engine), Arc::clone(&parts.metrics));
        let tailing = tokio::spawn(tail(Arc::clone(&home), engine, parts.ready.clone(), metrics));
        let serves_first = async || Ok(parts.catalog.current().catalog == first);
        eventually("the log is read", serves_first).await.unwrap();
        // Brought back to what it was before; and another table gets the first one's id.
        home.delete(&paths::catalog_entry(1)).await.unwrap();
        let other = append(home.as_ref(), &Catalog::default(), &MANIFESTS.replace("messages", "notes")).await;
        append(home.as_ref(), &other, MANIFESTS).await;
        eventually("the log is refused", async || Ok(parts.metrics.catalog_refused.get() == 1)).await.unwrap();
        assert!(parts.metrics.text().contains("kalamdb_catalog_refused 1"));
        assert_eq!(parts.catalog.current().catalog, first);

        tailing.abort();
        assert!(tailing.await.unwrap_err().is_cancelled());
        close(parts).await;
        // Nor is it taken from a file, across a restart.
        let file = dir.path().join("catalog.json");
        std::fs::write(&file, serde_json::to_vec(&other).unwrap()).unwrap();
        let refused = open(dir.path()).map(drop).unwrap_err();
        assert!(format!("{refused:#}").contains("belongs to another catalog version 1"), "{refused:#}");
        std::fs::write(&file, serde_json::to_vec(&first).unwrap()).unwrap();
        close(open(dir.path()).unwrap()).await;
    }

    async fn insert(parts: &Parts, table: &Arc<TableEntry>, owner: &Owner, id: i64) {
        let values = [Value::BigInt(id), Value::Text(format!("body {id}"))];
        let row = NewRow { key: key::encode(&values[..1]), value: row::encode(table, &values) };
        parts.engine.write(table, owner).await.unwrap().insert(vec![row]).await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_table_that_is_created_again_after_deletion_with_its_files_never_shows_the_old_rows() {
        let dir = tempfile::tempdir().unwrap();
        let parts = open(dir.path()).unwrap();
        let doomed = format!("{MANIFESTS}  deletionPolicy: Delete\n");
        let without = &MANIFESTS[..MANIFESTS.rfind("---").unwrap()];
        let serve = |text: &str| {
            let next = compiled(&parts.catalog.current().catalog, text);
            parts.engine.serve_catalog(next).unwrap();
            parts.catalog.current().table(&TableName::parse("app.messages").unwrap()).cloned()
        };
        let owner = Owner::User(UserId::new("alice").unwrap());
        let holds = async |table: &Arc<TableEntry>| {
            let rows = parts.engine.read(table, &owner, vec![0], None).await.unwrap();
            let buffered: usize = rows.buffered.iter().map(|batch| batch.num_rows()).sum();
            (buffered, rows.view.manifest.files.len())
        };
        let old = serve(&doomed).unwrap();
        insert(&parts, &old, &owner, 1).await;
        parts.engine.flush(&Engine::instance_id(&old, &owner)).await.unwrap();
        insert(&parts, &old, &owner, 2).await;
        assert_eq!(holds(&old).await, (1, 1));
        assert!(serve(without).is_none());
        let new = serve(&doomed).unwrap();
        assert_ne!(new.id, old.id);
        assert_eq!(holds(&new).await, (0, 0));
        for id in [1, 2] {
            insert(&parts, &new, &owner, id).await;
        }
        parts.engine.flush(&Engine::instance_id(&new, &owner)).await.unwrap();
        assert_eq!(holds(&new).await, (0, 1));
        close(parts).await;
    }
}
