//! Which object store a location means: one per storage and root, opened when first needed, opened anew when its
//! settings or credentials change. Data files are read through the caches, all else past them.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use kalamdb_model::declared::StorageRoot;
use kalamdb_model::{Location, StorageName};
use kalamdb_table_store::DataFiles;
use kalamdb_table_store::store::{self, Credentials, StoreError};
use object_store::ObjectStore;
use object_store::path::Path;
use parking_lot::{Mutex, RwLock};

use super::caches::Caches;
use super::counted::{Counted, Reach, Requests};
use crate::catalog::Snapshot;

/// A root of a storage.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
pub struct RootKey {
    /// The storage.
    pub storage: StorageName,
    /// Which of its roots.
    pub root: u32,
}

impl RootKey {
    /// The root that a location is pinned to.
    #[must_use]
    pub fn of(location: &Location) -> Self {
        Self { storage: location.storage.clone(), root: location.root }
    }

    /// What the home store knows it by while it lies where `identity` says: it may be declared anew elsewhere.
    pub(super) fn used_name(&self, identity: &str) -> String {
        format!("{self}/{identity}")
    }
}

impl std::fmt::Display for RootKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.storage, self.root)
    }
}

/// Credentials by the name of their secret, replaced as a whole when they rotate.
#[derive(Clone, Default)]
pub struct Secrets(Arc<RwLock<HashMap<String, Credentials>>>);

impl Secrets {
    /// Takes what is known now.
    pub fn replace(&self, secrets: HashMap<String, Credentials>) {
        *self.0.write() = secrets;
    }

    fn get(&self, name: &str) -> Option<Credentials> {
        self.0.read().get(name).cloned()
    }
}

/// A storage that cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoragesError {
    /// The catalog does not have it.
    #[error("storage `{0}` is not in the catalog")]
    Unknown(RootKey),
    /// Its secret is not known.
    #[error("the secret `{secret}` of storage `{storage}` is missing")]
    CredentialsMissing {
        /// The storage.
        storage: StorageName,
        /// The secret.
        secret: String,
    },
    /// Its settings do not open.
    #[error("storage `{storage}` does not open: {message}")]
    Open {
        /// The storage.
        storage: StorageName,
        /// Why; holds no secrets.
        message: String,
    },
}

/// Opened stores.
#[derive(Clone)]
pub struct Storages(Arc<Inner>);

/// Whether a root was used before. If so, a folder that is not there is never made anew: its disk may not be mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Nothing of ours is there.
    First,
    /// Streams and perhaps files of ours are there.
    Again,
}

/// Makes the store of a root. Tests put failing ones in its place.
pub type Open =
    dyn Fn(&StorageRoot, Option<&Credentials>, Use) -> Result<Arc<dyn ObjectStore>, StoreError> + Send + Sync;

struct Inner {
    open: Box<Open>,
    secrets: Secrets,
    opened: Mutex<HashMap<RootKey, Opened>>,
    requests: Requests,
    caches: OnceLock<Caches>,
}

#[derive(Clone)]
struct Opened {
    root: StorageRoot,
    credentials: Option<Credentials>,
    store: Arc<dyn ObjectStore>,
    /// Names the root in caches. Where it lies is part of that: a storage that is removed and declared anew may lie
    /// elsewhere.
    name: Arc<str>,
    reach: Reach,
}

impl Storages {
    /// Relative paths of file storages lie below `data_dir`.
    #[must_use]
    pub fn new(data_dir: PathBuf, secrets: Secrets) -> Self {
        let open = move |root: &StorageRoot, credentials: Option<&Credentials>, usage| match usage {
            Use::First => store::open_first(root, credentials, &data_dir),
            Use::Again => store::open(root, credentials, &data_dir),
        };
        Self::opened_by(Box::new(open), secrets)
    }

    /// Stores that `open` makes.
    #[must_use]
    pub fn opened_by(open: Box<Open>, secrets: Secrets) -> Self {
        Self(Arc::new(Inner {
            open,
            secrets,
            opened: Mutex::default(),
            requests: Requests::default(),
            caches: OnceLock::new(),
        }))
    }

    /// Reads data files through `caches` from now on. The first ones stay.
    pub fn set_caches(&self, caches: Caches) {
        let _ = self.0.caches.set(caches);
    }

    /// The caches, once they are open.
    #[must_use]
    pub fn caches(&self) -> Option<&Caches> {
        self.0.caches.get()
    }

    /// Requests to all stores so far.
    #[must_use]
    pub fn requests(&self) -> &Requests {
        &self.0.requests
    }

    /// The store of `key` as `snapshot` and the secrets describe it now, past all caches. It was used before.
    ///
    /// # Errors
    /// See [`StoragesError`].
    pub fn store(&self, snapshot: &Snapshot, key: &RootKey) -> Result<Arc<dyn ObjectStore>, StoragesError> {
        self.open(snapshot, key, Use::Again)
    }

    /// What names the place of `key`; `None` if it is not known.
    pub(super) fn place(&self, snapshot: &Snapshot, key: &RootKey) -> Option<Arc<str>> {
        let entry = snapshot.catalog.storages.get(&key.storage)?;
        let (holder, path) = entry.roots.get(&key.root)?.place();
        Some(format!("{holder}/{}", path.trim_end_matches('/')).into())
    }

    /// Whether both lie at one place.
    pub(super) fn share_place(&self, snapshot: &Snapshot, one: &RootKey, other: &RootKey) -> bool {
        one == other || self.place(snapshot, one).is_some_and(|place| self.place(snapshot, other) == Some(place))
    }

    /// What says that a store is another than before, however it is reached; `None` if it is not known.
    pub(super) fn identity(&self, snapshot: &Snapshot, key: &RootKey) -> Option<String> {
        Some(snapshot.catalog.storages.get(&key.storage)?.roots.get(&key.root)?.identity())
    }

    /// Whether the commit stream of `key` carries rows: not if it lies on the pod's own disk, with which they would be
    /// lost, too.
    pub(super) fn ships_rows(&self, snapshot: &Snapshot, key: &RootKey) -> bool {
        let root = snapshot.catalog.storages.get(&key.storage).and_then(|entry| entry.roots.get(&key.root));
        !matches!(root, Some(StorageRoot::Filesystem { path }) if std::path::Path::new(path).is_relative())
    }

    /// The data files of `key`, for one statement or merge: what it reads is cached up to its share.
    ///
    /// # Errors
    /// See [`StoragesError`].
    pub fn files(&self, snapshot: &Snapshot, key: &RootKey) -> Result<DataFiles, StoragesError> {
        let Opened { store, name, reach, .. } = self.opened(snapshot, key, Use::Again)?;
        let Some(caches) = self.caches() else { return Ok(DataFiles::new(store, name, Default::default())) };
        let store = match &caches.chunks {
            Some(chunks) if reach == Reach::Remote => chunks.layer(&name, store),
            // The kernel keeps the files of this machine in memory already.
            _ => store,
        };
        Ok(DataFiles::new(store, name, caches.footers.clone()))
    }

    /// Takes note of a data file that was just uploaded: whoever reads it next finds it here.
    pub(super) async fn fill(&self, snapshot: &Snapshot, key: &RootKey, path: Path, file: Bytes) {
        let Some(chunks) = self.caches().and_then(|caches| caches.chunks.clone()) else { return };
        let Ok(Opened { name, reach: Reach::Remote, .. }) = self.opened(snapshot, key, Use::Again) else { return };
        // Copies the file. If it is interrupted, the file is only read from the store.
        let _ = tokio::task::spawn_blocking(move || chunks.fill(&name, &path, &file)).await;
    }

    /// The store of `key`; what `usage` says counts when it is not open yet.
    pub(super) fn open(
        &self,
        snapshot: &Snapshot,
        key: &RootKey,
        usage: Use,
    ) -> Result<Arc<dyn ObjectStore>, StoragesError> {
        Ok(self.opened(snapshot, key, usage)?.store)
    }

    fn opened(&self, snapshot: &Snapshot, key: &RootKey, usage: Use) -> Result<Opened, StoragesError> {
        let unknown = || StoragesError::Unknown(key.clone());
        let entry = snapshot.catalog.storages.get(&key.storage).ok_or_else(unknown)?;
        let root = entry.roots.get(&key.root).ok_or_else(unknown)?;
        let credentials = match &entry.credentials_secret {
            Some(secret) => Some(self.0.secrets.get(secret).ok_or_else(|| StoragesError::CredentialsMissing {
                storage: key.storage.clone(),
                secret: secret.clone(),
            })?),
            None => None,
        };
        let mut opened = self.0.opened.lock();
        if let Some(known) = opened.get(key)
            && known.root == *root
            && known.credentials == credentials
        {
            return Ok(known.clone());
        }
        let opening = (self.0.open)(root, credentials.as_ref(), usage);
        let store = opening.map_err(|error: StoreError| StoragesError::Open {
            storage: key.storage.clone(),
            message: error.to_string(),
        })?;
        let reach = match root {
            StorageRoot::Filesystem { .. } => Reach::Local,
            StorageRoot::S3 { .. } | StorageRoot::Gcs { .. } | StorageRoot::Azure { .. } => Reach::Remote,
        };
        let store: Arc<dyn ObjectStore> = Arc::new(Counted::new(store, reach, self.0.requests.clone()));
        let (place, path) = root.place();
        let name = format!("{key} {place}/{path}").into();
        let known = Opened { root: root.clone(), credentials, store, name, reach };
        opened.insert(key.clone(), known.clone());
        Ok(known)
    }
}
