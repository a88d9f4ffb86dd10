//! Fetches under way: of all that miss a chunk at one time, one asks the store.
//!
//! A fetch runs in a task of its own, so that it ends well for the others when whoever began it is gone. Its error goes
//! to all who wait and is kept nowhere. However the task ends, its chunks can be fetched again.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ops::RangeInclusive;
use std::sync::Arc;

use object_store::path::Path;
use object_store::{Error, GetOptions, GetRange, ObjectStore, Result};
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::Inner;
use crate::chunk::{CHUNK_BYTES, Chunk, Key};

/// Chunks between two missing ones that are fetched with them. 1 MiB takes less time than a request, as
/// `object_store` has it.
const GAP_CHUNKS: u32 = 2;
/// Chunks of one request: 16 MiB. More are several requests at once.
const RUN_CHUNKS: u32 = 32;

/// A fetch that ended: chunks by number, or why there are none.
type Landed = Result<BTreeMap<u32, Chunk>, Arc<Error>>;
type Flight = watch::Receiver<Option<Arc<Landed>>>;

/// Which chunks are being fetched.
#[derive(Debug, Default)]
pub(crate) struct Flights(Mutex<HashMap<Key, Flight>>);

#[cfg(test)]
impl Flights {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}

/// The chunks of one file.
pub(crate) struct Source<'a> {
    pub(crate) root: &'a Arc<str>,
    pub(crate) path: &'a Arc<str>,
    pub(crate) location: &'a Path,
    pub(crate) store: &'a Arc<dyn ObjectStore>,
}

impl Source<'_> {
    pub(crate) fn key(&self, chunk: u32) -> Key {
        Key { root: Arc::clone(self.root), path: Arc::clone(self.path), chunk }
    }
}

/// Frees the keys of a flight however it ends.
struct Departed {
    cache: Arc<Inner>,
    keys: Vec<Key>,
}

impl Drop for Departed {
    fn drop(&mut self) {
        let mut flights = self.cache.flights.0.lock();
        for key in &self.keys {
            flights.remove(key);
        }
    }
}

/// Fetches `missing` chunks of a file, which rise, or waits for those who do, and caches them. Chunks past the end of the
/// file are not in the result.
pub(crate) async fn fetch(cache: &Arc<Inner>, source: &Source<'_>, missing: &[u32]) -> Result<BTreeMap<u32, Chunk>> {
    let (mut found, flights) = board(cache, source, missing);
    for mut flight in flights {
        let landed = match flight.wait_for(Option::is_some).await {
            Ok(landed) => landed.clone(),
            // Its task is gone without a word: a panic, or the process ends.
            Err(_) => None,
        };
        match landed.as_deref() {
            Some(Ok(chunks)) => {
                let wanted = chunks.iter().filter(|(number, _)| missing.binary_search(number).is_ok());
                found.extend(wanted.map(|(number, chunk)| (*number, chunk.clone())));
            }
            Some(Err(error)) => return Err(again(error)),
            None => return Err(generic("the fetch was interrupted")),
        }
    }
    Ok(found)
}

/// Joins flights that have some of `missing`, and starts others for the rest.
fn board(cache: &Arc<Inner>, source: &Source<'_>, missing: &[u32]) -> (BTreeMap<u32, Chunk>, Vec<Flight>) {
    let (mut found, mut joined, mut rest) = (BTreeMap::new(), Vec::new(), Vec::new());
    let mut flights = cache.flights.0.lock();
    for number in missing {
        let key = source.key(*number);
        if let Some(flight) = flights.get(&key) {
            joined.push(flight.clone());
        } else if let Some(chunk) = cache.in_memory(&key) {
            // It landed since we looked: a flight caches its chunks before it frees their keys.
            found.insert(*number, chunk);
        } else {
            rest.push(*number);
        }
    }
    for run in runs(&rest) {
        let (sender, flight) = watch::channel(None);
        let mut keys = Vec::new();
        for number in run.clone() {
            if let Entry::Vacant(free) = flights.entry(source.key(number)) {
                keys.push(free.key().clone());
                free.insert(flight.clone());
            }
        }
        joined.push(flight);
        let departed = Departed { cache: Arc::clone(cache), keys };
        let of = (Arc::clone(source.root), Arc::clone(source.path), source.location.clone(), Arc::clone(source.store));
        tokio::spawn(async move {
            let (root, path, location, store) = of;
            let source = Source { root: &root, path: &path, location: &location, store: &store };
            let landed = request(&source, run).await.map_err(Arc::new);
            for chunk in landed.iter().flat_map(BTreeMap::values) {
                departed.cache.insert(source.key(chunk.number), chunk.clone());
            }
            sender.send_replace(Some(Arc::new(landed)));
            drop(departed);
        });
    }
    (found, joined)
}

/// Which requests fetch chunks that rise: neighbours together.
fn runs(chunks: &[u32]) -> Vec<RangeInclusive<u32>> {
    let mut runs: Vec<RangeInclusive<u32>> = Vec::new();
    for chunk in chunks {
        match runs.last_mut() {
            Some(run) if chunk - run.end() <= 1 + GAP_CHUNKS && chunk - run.start() < RUN_CHUNKS => {
                *run = *run.start()..=*chunk;
            }
            _ => runs.push(*chunk..=*chunk),
        }
    }
    runs
}

async fn request(source: &Source<'_>, run: RangeInclusive<u32>) -> Result<BTreeMap<u32, Chunk>> {
    let wanted = u64::from(*run.start()) * CHUNK_BYTES..(u64::from(*run.end()) + 1) * CHUNK_BYTES;
    let options = GetOptions { range: Some(GetRange::Bounded(wanted.clone())), ..GetOptions::default() };
    let result = source.store.get_opts(source.location, options).await?;
    let (file_bytes, range) = (result.meta.size, result.range.clone());
    let bytes = result.bytes().await?;
    // What is cached now is believed for long: it has to be what was asked for, and all of it.
    if range != (wanted.start..wanted.end.min(file_bytes)) || bytes.len() as u64 != range.end - range.start {
        return Err(generic("the store answered with other bytes than were asked for"));
    }
    Ok(Chunk::split(&bytes, *run.start(), file_bytes).map(|chunk| (chunk.number, chunk)).collect())
}

/// One error for each who waits; its kind tells readers what to do, so that it stays.
fn again(error: &Arc<Error>) -> Error {
    let source = Arc::clone(error);
    match error.as_ref() {
        Error::NotFound { path, .. } => Error::NotFound { path: path.clone(), source: source.into() },
        Error::PermissionDenied { path, .. } => Error::PermissionDenied { path: path.clone(), source: source.into() },
        Error::Unauthenticated { path, .. } => Error::Unauthenticated { path: path.clone(), source: source.into() },
        _ => Error::Generic { store: "cache", source: source.into() },
    }
}

fn generic(why: &'static str) -> Error {
    Error::Generic { store: "cache", source: why.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_one_request_and_far_ones_several() {
        assert_eq!(runs(&[0, 1, 2]), [0..=2]);
        assert_eq!(runs(&[0, 3, 7]), [0..=3, 7..=7], "at most two between");
        assert_eq!(runs(&(0..40).collect::<Vec<_>>()), [0..=31, 32..=39]);
        assert!(runs(&[]).is_empty());
    }
}
