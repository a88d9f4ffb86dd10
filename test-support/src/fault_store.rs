//! An object store that fails on purpose: before a call, after it, or by letting a put land later than its error.
//!
//! Owns: which calls fail, from a seed or from a script, so that a failing run can be repeated. Does not own: the objects;
//! those lie in the store below, which the test looks at directly for the truth.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// How a put fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is stored.
    Before,
    /// The object is stored, and the answer is an error all the same.
    After,
    /// Other bytes are stored, and the answer is an error.
    Garbled,
    /// Nothing is stored yet: [`FaultStore::land_late_puts`] does it.
    Late,
}

/// What [`Fault::Garbled`] stores.
pub const GARBLED: &str = "<!doctype html><title>Bad gateway</title>";

/// Probabilities per call, each 0.0 to 1.0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Of [`Fault::Before`], for puts.
    pub before: f64,
    /// Of [`Fault::After`], for puts.
    pub after: f64,
    /// Of an error instead of an answer, for everything else.
    pub other: f64,
}

/// The failing store. Clones share one state.
#[derive(Clone, Debug)]
pub struct FaultStore {
    inner: Arc<dyn ObjectStore>,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    random: StdRng,
    rates: Rates,
    script: VecDeque<Option<Fault>>,
    late: Vec<(Path, PutPayload, PutOptions)>,
    down: bool,
    puts: u64,
    faults: u64,
}

impl FaultStore {
    /// Fails by chance, the same way for the same seed and order of calls.
    #[must_use]
    pub fn seeded(inner: Arc<dyn ObjectStore>, seed: u64, rates: Rates) -> Self {
        let random = StdRng::seed_from_u64(seed);
        let (script, late, down) = (VecDeque::new(), Vec::new(), false);
        Self { inner, state: Arc::new(Mutex::new(State { random, rates, script, late, down, puts: 0, faults: 0 })) }
    }

    /// Never fails until told to.
    #[must_use]
    pub fn healthy(inner: Arc<dyn ObjectStore>) -> Self {
        Self::seeded(inner, 0, Rates::default())
    }

    /// What happens to the next puts, one by one; `None` lets one pass. Afterwards chance decides again.
    pub fn script(&self, faults: impl IntoIterator<Item = Option<Fault>>) {
        self.state().script.extend(faults);
    }

    /// Whether every call fails.
    pub fn set_down(&self, down: bool) {
        self.state().down = down;
    }

    /// No failures by chance any more.
    pub fn heal(&self) {
        self.state().rates = Rates::default();
    }

    /// Puts that were tried.
    #[must_use]
    pub fn puts(&self) -> u64 {
        self.state().puts
    }

    /// Calls that failed on purpose.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.state().faults
    }

    /// Stores what [`Fault::Late`] held back, in the order of the puts; their outcomes interest nobody any more.
    pub async fn land_late_puts(&self) -> Vec<Result<PutResult>> {
        let late = std::mem::take(&mut self.state().late);
        let mut outcomes = Vec::new();
        for (path, payload, options) in late {
            outcomes.push(self.inner.put_opts(&path, payload, options).await);
        }
        outcomes
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self) -> Result<()> {
        let mut state = self.state();
        let rate = state.rates.other;
        if state.down || state.random.random_bool(rate) {
            state.faults += 1;
            return Err(failure());
        }
        Ok(())
    }
}

impl State {
    fn next_put(&mut self) -> Option<Fault> {
        self.puts += 1;
        let chance: f64 = self.random.random();
        let fault = match self.script.pop_front() {
            _ if self.down => Some(Fault::Before),
            Some(scripted) => scripted,
            None if chance < self.rates.before => Some(Fault::Before),
            None if chance < self.rates.before + self.rates.after => Some(Fault::After),
            None => None,
        };
        self.faults += u64::from(fault.is_some());
        fault
    }
}

impl fmt::Display for FaultStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FaultStore({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for FaultStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let fault = self.state().next_put();
        match fault {
            None => self.inner.put_opts(location, payload, opts).await,
            Some(Fault::Before) => Err(failure()),
            Some(Fault::After) => self.inner.put_opts(location, payload, opts).await.and_then(|_| Err(failure())),
            Some(Fault::Garbled) => {
                self.inner.put_opts(location, GARBLED.into(), opts).await.and_then(|_| Err(failure()))
            }
            Some(Fault::Late) => {
                self.state().late.push((location.clone(), payload, opts));
                Err(failure())
            }
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.check()?;
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.check()?;
        self.inner.get_opts(location, options).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        self.check()?;
        self.inner.get_ranges(location, ranges).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let checked = locations.and_then(move |location| {
            let outcome = store.check().map(|()| location);
            async move { outcome }
        });
        self.inner.delete_stream(checked.boxed())
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.check() {
            Ok(()) => self.inner.list(prefix),
            Err(error) => stream::once(async move { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.check()?;
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.check()?;
        self.inner.copy_opts(from, to, options).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.check()?;
        self.inner.rename_opts(from, to, options).await
    }
}

fn failure() -> Error {
    Error::Generic { store: "fault", source: "503, on purpose".into() }
}
