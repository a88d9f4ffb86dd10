//! The log of catalogs in the home store: numbered entries, a snapshot every 64, one writer at a time.
//!
//! Owns: the objects below `_catalog/objects/`, who won a number, trimming. Does not own: what a catalog is
//! ([`kalamdb_model::compile()`]) or who may try to write (the operator's lease).
//!
//! ```text
//! {version:020}.json           {"format":1,"version","nonce","previous","writer","atUs","delta"}
//! snapshot-{version:020}.json  {"format":1,"version","writer","atUs","catalog"}
//! ```
//! After a crash an entry is there or not. A snapshot that was not written is made up for by the next; nothing waits for
//! it. [`CatalogLog::trim`] removes only what the newest snapshot covers, and never that snapshot.
//!
//! **One history.** A home store that is brought back to an older state goes on with other entries under numbers that
//! readers have, and one id would come to mean two tables. Therefore a version has a nonce, an entry names that of the
//! version before it, and readers and writers who know another version under that number get
//! [`LogError::OtherHistory`]. A snapshot whose entries are trimmed away cannot be followed back; it is taken by a reader
//! only if it gives no id that the reader knows a second meaning.
//!
//! **A freed number.** Trimming frees numbers, which a writer that slept, or a put that was given up, could win again. A
//! writer looks before its put whether its predecessor is still the newest version, and counts as successful only after
//! it has seen, *after* its put, that no snapshot covers its number; else it removes its entry. What dies in between
//! leaves an entry that never counted. The snapshot that freed its number is older than it, so a reader takes an entry
//! only after it has seen, *after* reading it, that no other snapshot covers it.
//!
//! **A slow reader.** Its next entry may be trimmed away, which looks like "nothing new". Of the polls that find nothing,
//! the first and then every 32nd of a [`Tail`] therefore asks for a newer snapshot with one LIST that begins at the
//! reader's version, and whether that version is still in the log. Asking each time would cost as much as the polls
//! themselves (a LIST is priced like 12 GETs), and a HEAD of one snapshot does not do, because older snapshots are
//! trimmed too.

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use kalamdb_model::catalog::Catalog;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use crate::catalog_delta::{CatalogDelta, Changes, apply, contradiction, diff};
pub use crate::create::nonce;
use crate::create::{self, Create, CreateError, create_exact};
use crate::paths;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;
/// A snapshot follows every entry whose number is a multiple of this.
pub const SNAPSHOT_EVERY: u64 = 64;
/// Polls that find nothing between two looks for a newer snapshot.
const IDLE_POLLS_PER_LOOK: u32 = 32;
/// Attempts to read what a trim removes meanwhile.
const READS_MAX: usize = 5;

/// The catalog log of one home store; all state is in the store.
#[derive(Debug, Clone, Copy)]
pub struct CatalogLog;

/// Follows the log by polling, for as little as one GET.
#[derive(Debug, Default)]
pub struct Tail {
    idle_polls: u32,
}

/// What became of an append.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Appended {
    /// The entry is ours, and counts.
    Ours,
    /// Another writer has this number, or a later one: step down.
    Foreign {
        /// The version that is not ours.
        version: u64,
        /// Who wrote it.
        writer: String,
    },
}

/// Why the log cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The store does not answer.
    #[error("failed to read `{path}`")]
    Store {
        /// The object or folder.
        path: Path,
        /// What it said.
        source: object_store::Error,
    },
    /// An object that cannot be understood. It is never skipped: what follows it builds on it.
    #[error("`{path}` is damaged")]
    Corrupt {
        /// The object.
        path: Path,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// An object that says it is another.
    #[error("`{path}` says that it is version {says}")]
    Misplaced {
        /// The object.
        path: Path,
        /// The version in it.
        says: u64,
    },
    /// From a later version of KalamDB.
    #[error("`{path}` has format {format}, this version reads up to {FORMAT}; upgrade KalamDB")]
    Newer {
        /// The object.
        path: Path,
        /// Its format.
        format: u32,
    },
    /// The log is not the one that the caller's version came from.
    #[error(
        "the catalog log does not go on from version {version} as it is known here: {found}; if the home store was \
         restored, bring back its newest state"
    )]
    OtherHistory {
        /// The caller's version.
        version: u64,
        /// What contradicts it.
        found: String,
    },
    /// The catalogs to append do not follow one another, or the later one has no nonce of its own.
    #[error("version {next} does not follow version {previous}")]
    Order {
        /// Before.
        previous: u64,
        /// After.
        next: u64,
    },
    /// The catalog does not survive its own JSON; nothing was written.
    #[error("version {version} of the catalog cannot be stored without loss")]
    Unstorable {
        /// Of the catalog.
        version: u64,
    },
    /// The store does not say whether the entry is there. Append the same again.
    #[error("the outcome of a catalog change is unknown")]
    Unknown(#[source] CreateError),
}

/// One entry as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// [`FORMAT`].
    pub format: u32,
    /// Its number.
    pub version: u64,
    /// Random: that of the catalog after it.
    pub nonce: String,
    /// The nonce of the catalog before it; empty in the first entry.
    pub previous: String,
    /// Who wrote it; another string for each process start.
    pub writer: String,
    /// When, microseconds since 1970; for people.
    pub at_us: i64,
    /// What changed.
    pub delta: CatalogDelta,
}

/// A whole catalog as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// [`FORMAT`].
    pub format: u32,
    /// Its number.
    pub version: u64,
    /// Who wrote it.
    pub writer: String,
    /// When, microseconds since 1970; for people.
    pub at_us: i64,
    /// The catalog after that entry, with its nonce.
    pub catalog: Catalog,
}

/// What every object of the log says of itself.
#[derive(Deserialize)]
struct Preamble {
    format: u32,
    version: u64,
}

impl CatalogLog {
    /// The newest catalog: the newest snapshot and the entries after it. An empty log is version 0.
    ///
    /// # Errors
    /// If the store does not answer or an object is damaged; neither is ever taken for an empty log.
    pub async fn load(store: &dyn ObjectStore) -> Result<Catalog, LogError> {
        for _ in 0..READS_MAX {
            let mut catalog = newest_snapshot(store, 0).await?.map_or_else(Catalog::default, |found| found.catalog);
            let base = catalog.version;
            while let Some(next) = following(store, &catalog).await? {
                catalog = next;
            }
            // No number above `base` was ever freed, so every entry that was read counts.
            if newest_snapshot_version(store, base).await?.is_none() {
                return Ok(catalog);
            }
        }
        Err(trimmed_too_fast())
    }

    /// A catalog after `current`, if there is one: the next entry applied, or a newer snapshot. Without one, `current`
    /// is the newest version.
    ///
    /// # Errors
    /// As [`CatalogLog::load`]; and [`LogError::OtherHistory`], after which `current` is to be served on.
    pub async fn next(store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Catalog>, LogError> {
        match step(store, current).await? {
            Some(next) => Ok(Some(next)),
            None => leap(store, current).await,
        }
    }

    /// Appends `next`, whose version is one above that of `previous`, and which has a [`nonce`] of its own. After an
    /// error the same call may be repeated, with the same nonce: an entry that it had written counts as ours.
    ///
    /// # Errors
    /// [`LogError::OtherHistory`] if `previous` is not in the log; nothing was written then. [`LogError::Unknown`] when
    /// the store does not say; nothing else may be appended before that is resolved.
    pub async fn append(
        store: &dyn ObjectStore,
        previous: &Catalog,
        next: &Catalog,
        writer: &str,
    ) -> Result<Appended, LogError> {
        let entry = entry_between(previous, next, writer)?;
        if let Some(newer) = look(store, previous).await? {
            return Ok(newer.outcome_of(&entry));
        }
        let path = paths::catalog_entry(entry.version);
        let bytes = encode(&entry, &path)?;
        let created = create_exact(store, &path, bytes).await.map_err(LogError::Unknown)?;
        if let Create::Lost(found) = created {
            let found: Entry = decode(&found, &path, entry.version)?;
            if found.nonce != entry.nonce {
                return Ok(Appended::Foreign { version: entry.version, writer: found.writer });
            }
        }
        if let Some(covering) = newest_snapshot(store, previous.version).await? {
            return step_down(store, &path, &entry, covering).await;
        }
        if entry.version.is_multiple_of(SNAPSHOT_EVERY) {
            write_snapshot(store, next, writer).await;
        }
        Ok(Appended::Ours)
    }

    /// Deletes entries below `keep_from` that the newest snapshot covers, and older snapshots below `keep_from`; returns
    /// how many objects went. Safe to run twice, and beside writers and readers.
    ///
    /// # Errors
    /// If the store does not answer; what was deleted until then was not needed.
    pub async fn trim(store: &dyn ObjectStore, keep_from: u64) -> Result<usize, LogError> {
        let folder = paths::catalog_prefix();
        let failed = |source| LogError::Store { path: paths::catalog_prefix(), source };
        let listed: Vec<Path> =
            store.list(Some(&folder)).map_ok(|meta| meta.location).try_collect().await.map_err(failed)?;
        let Some(newest) = listed.iter().filter_map(paths::catalog_snapshot_version).max() else { return Ok(0) };
        let covered = |path: &Path| {
            paths::catalog_entry_version(path).is_some_and(|version| version <= newest && version < keep_from)
                || paths::catalog_snapshot_version(path).is_some_and(|version| version < newest && version < keep_from)
        };
        let gone: Vec<_> = listed.into_iter().filter(covered).map(Ok).collect();
        let mut outcomes = store.delete_stream(futures::stream::iter(gone).boxed());
        let mut count = 0;
        while let Some(outcome) = outcomes.next().await {
            match outcome {
                Ok(_) => count += 1,
                Err(Error::NotFound { .. }) => {}
                Err(source) => return Err(failed(source)),
            }
        }
        Ok(count)
    }
}

impl Tail {
    /// As [`CatalogLog::next`], but when there is no next entry, most calls do not look for more.
    ///
    /// # Errors
    /// As [`CatalogLog::next`].
    pub async fn next(&mut self, store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Catalog>, LogError> {
        if let Some(next) = step(store, current).await? {
            return Ok(Some(next));
        }
        let looks = self.idle_polls.is_multiple_of(IDLE_POLLS_PER_LOOK);
        self.idle_polls = self.idle_polls.wrapping_add(1);
        if !looks {
            return Ok(None);
        }
        let next = leap(store, current).await;
        if next.is_err() {
            // What is wrong stays wrong until a look says otherwise.
            self.idle_polls = 0;
        }
        next
    }
}

/// The entry, checked to give exactly `next` when a reader applies what is stored.
fn entry_between(previous: &Catalog, next: &Catalog, writer: &str) -> Result<Entry, LogError> {
    let own_nonce = !next.nonce.is_empty() && next.nonce != previous.nonce;
    if previous.version.checked_add(1) != Some(next.version) || !own_nonce {
        return Err(LogError::Order { previous: previous.version, next: next.version });
    }
    let entry = Entry {
        format: FORMAT,
        version: next.version,
        nonce: next.nonce.clone(),
        previous: previous.nonce.clone(),
        writer: writer.to_owned(),
        at_us: create::now_us(),
        delta: diff(previous, next),
    };
    let path = paths::catalog_entry(next.version);
    let stored: Entry = decode(&encode(&entry, &path)?, &path, next.version)?;
    if apply(previous, &stored.delta, next.version, &stored.nonce) == *next {
        Ok(entry)
    } else {
        Err(LogError::Unstorable { version: next.version })
    }
}

/// The number had been trimmed away when we won it: take our entry back, so that no slow reader applies it.
async fn step_down(
    store: &dyn ObjectStore,
    path: &Path,
    entry: &Entry,
    covering: Snapshot,
) -> Result<Appended, LogError> {
    let newest = covering.version;
    let outcome = covering.outcome_of(entry);
    if outcome == Appended::Ours {
        return Ok(outcome);
    }
    tracing::warn!(object_path = %path, newest, "won a catalog version that a snapshot covers");
    match store.delete(path).await {
        Ok(()) | Err(Error::NotFound { .. }) => Ok(outcome),
        Err(source) => Err(LogError::Store { path: path.clone(), source }),
    }
}

impl Snapshot {
    /// What became of an entry whose number this snapshot covers. Our own, of a call that is repeated, counts.
    fn outcome_of(self, entry: &Entry) -> Appended {
        if self.catalog.nonce == entry.nonce {
            Appended::Ours
        } else {
            Appended::Foreign { version: self.version, writer: self.writer }
        }
    }
}

/// A snapshot saves readers time and lets entries be trimmed; nothing depends on this one, so its failure is only told.
async fn write_snapshot(store: &dyn ObjectStore, catalog: &Catalog, writer: &str) {
    let (version, path) = (catalog.version, paths::catalog_snapshot(catalog.version));
    let (writer, at_us) = (writer.to_owned(), create::now_us());
    let snapshot = Snapshot { format: FORMAT, version, writer, at_us, catalog: catalog.clone() };
    let outcome = match encode(&snapshot, &path) {
        Ok(bytes) => create_exact(store, &path, bytes).await.map_err(LogError::Unknown),
        Err(error) => Err(error),
    };
    match outcome {
        Ok(Create::Ours) => {}
        Ok(Create::Lost(_)) => tracing::warn!(object_path = %path, "a snapshot of this catalog version exists"),
        Err(error) => tracing::warn!(object_path = %path, error = %error, "failed to write a catalog snapshot"),
    }
}

/// The entry after `current`, applied.
async fn following(store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Catalog>, LogError> {
    let version = current.version + 1;
    let path = paths::catalog_entry(version);
    let Some(entry) = get_as::<Entry>(store, &path, version).await? else { return Ok(None) };
    if entry.previous == current.nonce {
        Ok(Some(apply(current, &entry.delta, version, &entry.nonce)))
    } else {
        let found = format!("`{path}` follows another version {}", current.version);
        Err(LogError::OtherHistory { version: current.version, found })
    }
}

/// One version on; or to a snapshot, if that shows that the entry does not count or is not the newest.
async fn step(store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Catalog>, LogError> {
    let Some(next) = following(store, current).await? else { return Ok(None) };
    match newest_snapshot(store, current.version).await? {
        Some(found) if found.catalog.nonce != next.nonce => jump(current, found).map(Some),
        _ => Ok(Some(next)),
    }
}

/// To a snapshot, if there is one after `current`, which must be in the log otherwise.
async fn leap(store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Catalog>, LogError> {
    look(store, current).await?.map(|found| jump(current, found)).transpose()
}

/// Makes sure that `current` is in the log, or was before a snapshot covered it; returns the newest snapshot after it.
async fn look(store: &dyn ObjectStore, current: &Catalog) -> Result<Option<Snapshot>, LogError> {
    let newer = newest_snapshot(store, current.version).await?;
    if newer.is_some() || current.version == 0 {
        return Ok(newer);
    }
    let (version, nonce) = (current.version, &current.nonce);
    let (entry, snapshot) = (paths::catalog_entry(version), paths::catalog_snapshot(version));
    let is_entry = |found: Entry| found.nonce == *nonce;
    let is_snapshot = |found: Snapshot| found.catalog.nonce == *nonce;
    if get_as(store, &entry, version).await?.is_some_and(is_entry)
        || get_as(store, &snapshot, version).await?.is_some_and(is_snapshot)
    {
        return Ok(None);
    }
    Err(LogError::OtherHistory { version, found: format!("`{entry}` is missing or another one") })
}

/// From `current` to a snapshot, past entries that may be trimmed away.
fn jump(current: &Catalog, to: Snapshot) -> Result<Catalog, LogError> {
    match contradiction(current, &to.catalog) {
        None => Ok(to.catalog),
        Some(contradiction) => {
            let found = format!("in `{}`, {contradiction}", paths::catalog_snapshot(to.version));
            Err(LogError::OtherHistory { version: current.version, found })
        }
    }
}

/// The newest snapshot above version `above`.
async fn newest_snapshot(store: &dyn ObjectStore, above: u64) -> Result<Option<Snapshot>, LogError> {
    // A trim may remove the one that was listed, but only after a newer one is there: list again.
    for _ in 0..READS_MAX {
        let Some(version) = newest_snapshot_version(store, above).await? else { return Ok(None) };
        let path = paths::catalog_snapshot(version);
        if let Some(snapshot) = get_as::<Snapshot>(store, &path, version).await? {
            return match snapshot.catalog.version {
                says if says == version => Ok(Some(snapshot)),
                says => Err(LogError::Misplaced { path, says }),
            };
        }
    }
    Err(trimmed_too_fast())
}

fn trimmed_too_fast() -> LogError {
    let source =
        Error::Generic { store: "table-store", source: "the log is trimmed faster than it can be read".into() };
    LogError::Store { path: paths::catalog_prefix(), source }
}

/// Names sort by number, and snapshots after entries: the LIST begins behind everything that is of no interest.
async fn newest_snapshot_version(store: &dyn ObjectStore, above: u64) -> Result<Option<u64>, LogError> {
    let folder = paths::catalog_prefix();
    store
        .list_with_offset(Some(&folder), &paths::catalog_snapshot(above))
        .try_fold(None, |newest: Option<u64>, meta| async move {
            Ok(newest.max(paths::catalog_snapshot_version(&meta.location)))
        })
        .await
        .map(|newest| newest.filter(|version| *version > above))
        .map_err(|source| LogError::Store { path: folder, source })
}

/// The object of the log at `path`, if there is one.
async fn get_as<T: DeserializeOwned>(
    store: &dyn ObjectStore,
    path: &Path,
    version: u64,
) -> Result<Option<T>, LogError> {
    let found = create::read(store, path).await;
    let found = found.map_err(|source| LogError::Store { path: path.clone(), source })?;
    found.map(|bytes| decode(&bytes, path, version)).transpose()
}

fn encode(object: &impl Serialize, path: &Path) -> Result<Bytes, LogError> {
    let bytes = serde_json::to_vec(object).map_err(|source| LogError::Corrupt { path: path.clone(), source })?;
    Ok(bytes.into())
}

/// Reads an object of the log after checking that it is of a known format and the one that its path says.
fn decode<T: DeserializeOwned>(bytes: &[u8], path: &Path, version: u64) -> Result<T, LogError> {
    let corrupt = |source| LogError::Corrupt { path: path.clone(), source };
    let preamble: Preamble = serde_json::from_slice(bytes).map_err(corrupt)?;
    if preamble.format > FORMAT {
        return Err(LogError::Newer { path: path.clone(), format: preamble.format });
    }
    if preamble.version != version {
        return Err(LogError::Misplaced { path: path.clone(), says: preamble.version });
    }
    serde_json::from_slice(bytes).map_err(corrupt)
}
