//! What is known of users: which of them have a storage of their own.
//!
//! The log in the home store counts; what was last read of it is kept on the volume, so that a start needs no home store.
//! Until it was read once, nothing is said of any user: rows must not go where they must not lie.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use kalamdb_model::{Location, Owner, StorageName, TableEntry, TableKind, TableName, UserId};
use kalamdb_table_store::users::{StorageMode, User, Users, UsersError};
use kalamdb_write_buffer::{ReadError, WriteBuffer};
use object_store::ObjectStore;
use parking_lot::RwLock;
use tokio::sync::watch;

use super::Engine;
use super::instance::Instance;
use super::ship::Backoff;
use crate::catalog::Snapshot;
use crate::crash;
use crate::error::Chain;

/// How long a statement waits for its user's storage to be known.
const WAIT: Duration = Duration::from_secs(5);

/// Users on the volume, each under his id.
const USERS: &str = "user/";
/// The version that they are of.
const VERSION: &str = "users";

/// What this pod knows of users.
pub(super) struct KnownUsers {
    buffer: WriteBuffer,
    /// `None` until the log was read once.
    known: RwLock<Option<Users>>,
    home: OnceLock<Arc<dyn ObjectStore>>,
    changing: tokio::sync::Mutex<()>,
    is_known: watch::Sender<bool>,
}

/// Nothing can be said of a user's storage yet.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PlaceError {
    /// The home store did not answer since this volume is there.
    #[error("it is not known yet which storages users have")]
    Unknown,
    /// He has a storage that is not declared.
    #[error("the user's storage `{0}` is not declared")]
    NoStorage(StorageName),
    /// Other files lie there.
    #[error("in the user's storage `{storage}`, the rows would lie where those of `{other}` lie")]
    Taken {
        /// The storage.
        storage: StorageName,
        /// Whose files.
        other: TableName,
    },
}

/// A change that did not happen, or of which it is not known.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// The storage is not there.
    #[error("storage `{0}` is not declared")]
    NoStorage(StorageName),
    /// He is to have a storage, and it is not said which.
    #[error("storage_mode = 'region' needs a storage_id")]
    NoId,
    /// The log of users is not there yet.
    #[error("the home store is not known yet")]
    NoHome,
    /// The log.
    #[error("failed to change the log of users")]
    Log(#[from] UsersError),
    /// The volume.
    #[error("failed to keep the users on the volume")]
    Buffer(#[from] ReadError),
}

impl KnownUsers {
    pub(super) fn open(buffer: WriteBuffer) -> Result<Self, ReadError> {
        let known = match buffer.state_get(VERSION)? {
            None => None,
            Some(version) => {
                let version = String::from_utf8_lossy(&version).parse().unwrap_or(0);
                let stored = buffer.state_scan(USERS)?;
                let users: Result<Vec<User>, _> = stored.iter().map(|(_, text)| serde_json::from_slice(text)).collect();
                // One that does not read is one without a storage: the log has to tell first.
                users.ok().map(|users| Users {
                    version,
                    users: users.into_iter().map(|user| (user.id.clone(), user)).collect(),
                })
            }
        };
        let is_known = watch::Sender::new(known.is_some());
        let (home, changing) = (OnceLock::new(), tokio::sync::Mutex::default());
        Ok(Self { buffer, known: RwLock::new(known), home, changing, is_known })
    }

    /// Waits a little until the log was read once.
    pub(super) async fn wait(&self) {
        let mut is_known = self.is_known.subscribe();
        let _known = tokio::time::timeout(WAIT, is_known.wait_for(|known| *known)).await;
    }

    /// Keeps `next`, on the volume first.
    fn keep(&self, next: Users) -> Result<(), ReadError> {
        let before = self.known.read().clone().unwrap_or_default();
        for (id, user) in &next.users {
            if before.users.get(id) != Some(user) {
                let text = serde_json::to_vec(user).expect("names always have a JSON form");
                self.buffer.state_put(&format!("{USERS}{id}"), &text)?;
                crash::point("user.kept");
            }
        }
        self.buffer.state_put(VERSION, next.version.to_string().as_bytes())?;
        *self.known.write() = Some(next);
        self.is_known.send_replace(true);
        Ok(())
    }

    /// The home store, once it is known.
    pub(super) fn home(&self) -> Option<&Arc<dyn ObjectStore>> {
        self.home.get()
    }

    /// Whether any user ever had a storage of his own. While that is not known: yes.
    pub(super) fn any(&self) -> bool {
        self.known.read().as_ref().is_none_or(|users| !users.users.is_empty())
    }
}

impl Engine {
    /// Reads the log of users in `home`, now and until it works once, and stores changes there.
    pub fn follow_users(self: &Arc<Self>, home: Arc<dyn ObjectStore>) {
        if self.users.home.set(Arc::clone(&home)).is_err() {
            return;
        }
        let engine = Arc::clone(self);
        self.spawn(async move {
            let mut backoff = Backoff::default();
            loop {
                let changing = engine.users.changing.lock().await;
                let mut users = engine.users.known.read().clone().unwrap_or_default();
                let followed = users.follow(home.as_ref()).await.map_err(UserError::from);
                let outcome = followed.and_then(|()| Ok(engine.users.keep(users)?));
                drop(changing);
                match outcome {
                    Ok(()) => return engine.moves.look_at_all(),
                    Err(error) => tracing::warn!(error = %Chain(&error), "cannot read the log of users yet"),
                }
                if engine.pause(&mut backoff).await.is_err() {
                    return;
                }
            }
        });
    }

    /// All of whom something is known; `None` while the log was not read yet.
    #[must_use]
    pub fn users(&self) -> Option<Vec<User>> {
        self.users.known.read().as_ref().map(|users| users.users.values().cloned().collect())
    }

    /// Changes what the log says now of a user, `None` leaving it; his rows begin to move to where they are to lie.
    ///
    /// # Errors
    /// See [`UserError`].
    pub async fn change_user(
        self: &Arc<Self>,
        id: UserId,
        storage_mode: Option<StorageMode>,
        storage_id: Option<Option<StorageName>>,
    ) -> Result<(), UserError> {
        let home = self.users.home.get().ok_or(UserError::NoHome)?;
        if let Some(Some(storage)) = &storage_id
            && !self.catalog.current().catalog.storages.contains_key(storage)
        {
            return Err(UserError::NoStorage(storage.clone()));
        }
        let _one_at_a_time = self.users.changing.lock().await;
        let mut users = self.users.known.read().clone().unwrap_or_default();
        users.follow(home.as_ref()).await?;
        let before = users.users.get(&id);
        let user = User {
            id: id.clone(),
            storage_mode: storage_mode.or(before.map(|user| user.storage_mode)).unwrap_or_default(),
            storage_id: storage_id.unwrap_or_else(|| before.and_then(|user| user.storage_id.clone())),
        };
        if user.storage_mode == StorageMode::Region && user.storage_id.is_none() {
            return Err(UserError::NoId);
        }
        users.put(home.as_ref(), user).await?;
        crash::point("user.logged");
        self.users.keep(users)?;
        crash::point("user.noted");
        self.moves.wake_user(&id);
        self.moves.look_at_user(&self.catalog.current(), &id);
        Ok(())
    }

    /// Whether an instance is in the storage that its user has, as far as is known. In haste: the place there is not asked.
    pub(super) fn is_in_its_storage(&self, table: &TableEntry, instance: &Instance) -> bool {
        let Owner::User(user) = &instance.id.owner else { return true };
        let known = self.users.known.read();
        let Some(user) = known.as_ref().and_then(|users| users.users.get(user)) else { return true };
        *user.region().unwrap_or(&table.location.storage) == instance.root(table).storage
    }

    /// Where `owner`'s rows of `table` are to lie. The one place that decides it.
    pub(super) fn wanted_place(
        &self,
        catalog: &Snapshot,
        table: &TableEntry,
        owner: &Owner,
    ) -> Result<Location, PlaceError> {
        let Owner::User(user) = owner else { return Ok(table.location.clone()) };
        if table.kind != TableKind::User || !table.use_user_storage {
            return Ok(table.location.clone());
        }
        let known = self.users.known.read();
        let users = known.as_ref().ok_or(PlaceError::Unknown)?;
        let Some(storage) = users.users.get(user).and_then(User::region) else { return Ok(table.location.clone()) };
        if *storage == table.location.storage {
            return Ok(table.location.clone());
        }
        let place = catalog.catalog.place_in(storage, table);
        let place = place.ok_or_else(|| PlaceError::NoStorage(storage.clone()))?;
        match catalog.catalog.in_the_way(table, &place) {
            Some(other) => Err(PlaceError::Taken { storage: storage.clone(), other: other.name.clone() }),
            None => Ok(place),
        }
    }
}
