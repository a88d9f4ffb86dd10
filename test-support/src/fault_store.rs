//! An object store that fails on purpose, in the ways in which stores do: an error before a call or after it, no answer
//! for long, a put that lands later than its error, a conflict with nobody, a body or a listing that ends early.
//!
//! Owns: which calls fail, from a seed or from a script, so that a failing run can be repeated. Does not own: the
//! objects; those lie in the store below, which the test looks at directly for the truth.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, RenameOptions, Result, UploadPart,
};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// What is asked of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Call {
    /// A put of an object that must not be there.
    Create,
    /// Any other put.
    Overwrite,
    /// A step of an upload in parts.
    Upload,
    /// An object, or one range of it.
    Get,
    /// Ranges of an object.
    Ranges,
    /// What there is to know of an object.
    Head,
    /// A deletion.
    Delete,
    /// A listing.
    List,
    /// A copy or a renaming.
    Copy,
}

/// How a call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Nothing happens, and the answer is an error.
    Before,
    /// It happens, and the answer is an error all the same.
    After,
    /// It happens, and there is no answer for long; then an error.
    Hang,
    /// It happens, after a while; a body comes in pieces.
    Slow,
    /// Of a put: other bytes are stored, and the answer is an error.
    Garbled,
    /// Of a put: nothing is stored yet, and the answer is an error. [`FaultStore::land_late_puts`] stores it; if it is
    /// late by chance, that is done soon.
    Late,
    /// Of a put that creates: nothing is stored, and the answer is that something is there.
    Conflict,
    /// Of a put that creates: it is stored, and the answer is that something is there: it was sent twice.
    MetItself,
    /// Of a body: it ends early, without an error.
    Short,
    /// Of a body or a listing: it ends early, with an error.
    Broken,
}

/// What [`Fault::Garbled`] stores.
pub const GARBLED: &str = "<!doctype html><title>Bad gateway</title>";

/// Probabilities per call, each 0.0 to 1.0. A call fails in one way at most, so those that go with it add up.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    /// Of [`Fault::Before`], for puts.
    pub before: f64,
    /// Of [`Fault::After`], for puts.
    pub after: f64,
    /// Of [`Fault::Late`], for puts that create.
    pub late: f64,
    /// Of [`Fault::Conflict`] and [`Fault::MetItself`] together, for puts that create.
    pub conflict: f64,
    /// Of [`Fault::Before`] and [`Fault::After`] together, for everything else.
    pub other: f64,
    /// Of [`Fault::Slow`], for every call.
    pub slow: f64,
    /// Of [`Fault::Hang`], for every call.
    pub hang: f64,
    /// Of [`Fault::Short`], for bodies.
    pub short: f64,
    /// Of [`Fault::Broken`], for bodies and listings.
    pub broken: f64,
}

impl Rates {
    /// What may happen to a call, and how often.
    fn of(&self, call: Call) -> Vec<(Fault, f64)> {
        let mut rates = match call {
            Call::Create => vec![
                (Fault::Before, self.before),
                (Fault::After, self.after),
                (Fault::Late, self.late),
                (Fault::Conflict, self.conflict / 2.0),
                (Fault::MetItself, self.conflict / 2.0),
            ],
            Call::Overwrite => vec![(Fault::Before, self.before), (Fault::After, self.after)],
            _ => vec![(Fault::Before, self.other / 2.0), (Fault::After, self.other / 2.0)],
        };
        rates.extend([(Fault::Slow, self.slow), (Fault::Hang, self.hang)]);
        match call {
            Call::Get | Call::Ranges => rates.extend([(Fault::Short, self.short), (Fault::Broken, self.broken)]),
            Call::List => rates.push((Fault::Broken, self.broken)),
            _ => {}
        }
        rates
    }
}

/// How long a call hangs, unless a test says otherwise: then its client gives up.
const HANG: Duration = Duration::from_millis(300);

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
    kept: HashSet<Path>,
    cut_at: Option<usize>,
    hang: Duration,
    down: bool,
    puts: u64,
    tally: BTreeMap<(Call, Fault), u64>,
}

impl FaultStore {
    /// Fails by chance, the same way for the same seed and order of calls.
    #[must_use]
    pub fn seeded(inner: Arc<dyn ObjectStore>, seed: u64, rates: Rates) -> Self {
        let state = State {
            random: StdRng::seed_from_u64(seed),
            rates,
            script: VecDeque::new(),
            late: Vec::new(),
            kept: HashSet::new(),
            cut_at: None,
            hang: HANG,
            down: false,
            puts: 0,
            tally: BTreeMap::new(),
        };
        Self { inner, state: Arc::new(Mutex::new(state)) }
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

    /// How it fails by chance from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.state().rates = rates;
    }

    /// No failures by chance or by script any more.
    pub fn heal(&self) {
        let mut state = self.state();
        state.rates = Rates::default();
        state.script.clear();
    }

    /// From now on this object cannot be deleted.
    #[allow(dead_code, reason = "this file is a part of two crates, and one has no use for it")]
    pub fn keep(&self, path: Path) {
        self.state().kept.insert(path);
    }

    /// After how many bytes a body ends that ends early. Chance decides if nothing is said.
    pub fn cut_at(&self, bytes: usize) {
        self.state().cut_at = Some(bytes);
    }

    /// How long a call hangs.
    pub fn set_hang(&self, hang: Duration) {
        self.state().hang = hang;
    }

    /// Puts that were tried.
    #[must_use]
    pub fn puts(&self) -> u64 {
        self.state().puts
    }

    /// Calls that failed on purpose, those that were only slow among them.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.state().tally.values().sum()
    }

    /// How many of them were which, and failed how.
    #[must_use]
    pub fn tally(&self) -> BTreeMap<(Call, Fault), u64> {
        self.state().tally.clone()
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

    /// Runs a call, as chance has it.
    async fn call<T>(&self, call: Call, work: impl Future<Output = Result<T>>) -> Result<T> {
        let fault = self.state().draw(call);
        self.with(fault, work).await
    }

    /// Runs a call that has this fault, but for what comes of its body.
    async fn with<T>(&self, fault: Option<Fault>, work: impl Future<Output = Result<T>>) -> Result<T> {
        match fault {
            Some(Fault::Before) => Err(self.failure()),
            Some(Fault::After) => {
                work.await?;
                Err(self.failure())
            }
            Some(Fault::Hang) => {
                drop(work.await);
                let hang = self.state().hang;
                tokio::time::sleep(hang).await;
                Err(self.failure())
            }
            Some(Fault::Slow) => {
                let pause = self.state().pause();
                tokio::time::sleep(pause).await;
                work.await
            }
            _ => work.await,
        }
    }

    fn put_late(&self, location: &Path, payload: PutPayload, opts: PutOptions) {
        let mut state = self.state();
        state.late.push((location.clone(), payload, opts));
        let (by_chance, pause) = (state.rates.late > 0.0, 10 * state.pause());
        drop(state);
        if by_chance {
            let store = self.clone();
            tokio::spawn(async move {
                tokio::time::sleep(pause).await;
                store.land_late_puts().await
            });
        }
    }

    /// The same answer, with a body that has this fault.
    async fn with_body(&self, found: GetResult, fault: Fault) -> Result<GetResult> {
        let GetResult { payload, meta, range, attributes } = found;
        let body = GetResult { payload, meta: meta.clone(), range: range.clone(), attributes: attributes.clone() };
        let bytes = body.bytes().await?;
        let (cut, pause) = {
            let mut state = self.state();
            (state.cut(bytes.len()), state.pause())
        };
        let kept = if fault == Fault::Slow { bytes } else { bytes.slice(..cut) };
        let pieces = kept.chunks(kept.len() / 3 + 1).map(|piece| Ok(Bytes::copy_from_slice(piece)));
        let mut pieces: Vec<Result<Bytes>> = pieces.collect();
        if fault == Fault::Broken {
            pieces.push(Err(self.failure()));
        }
        let pieces = stream::iter(pieces);
        let pieces = if fault == Fault::Slow {
            let slowly = move |piece| async move {
                tokio::time::sleep(pause).await;
                piece
            };
            pieces.then(slowly).boxed()
        } else {
            pieces.boxed()
        };
        Ok(GetResult { payload: GetResultPayload::Stream(pieces), meta, range, attributes })
    }

    /// An error that tells nothing about the object.
    fn failure(&self) -> Error {
        const SAID: [&str; 3] =
            ["503 Slow Down, on purpose", "429 Too Many Requests, on purpose", "timeout, on purpose"];
        let said = SAID[self.state().random.random_range(0..SAID.len())];
        Error::Generic { store: "fault", source: said.into() }
    }

    /// One that tells that the object is there.
    fn refusal(&self, location: &Path) -> Error {
        let is_412: bool = self.state().random.random();
        let path = location.to_string();
        if is_412 {
            Error::Precondition { path, source: "412, on purpose".into() }
        } else {
            Error::AlreadyExists { path, source: "409, on purpose".into() }
        }
    }
}

impl State {
    /// What happens to a call: what the script says, if it is a put, else as chance has it.
    fn draw(&mut self, call: Call) -> Option<Fault> {
        let is_put = matches!(call, Call::Create | Call::Overwrite);
        let mut chance: f64 = self.random.random();
        let drawn = self.rates.of(call).into_iter().find(|(_, rate)| {
            chance -= rate;
            chance < 0.0
        });
        let scripted = if is_put { self.script.pop_front() } else { None };
        let fault = match scripted {
            _ if self.down => Some(Fault::Before),
            Some(scripted) => scripted,
            None => drawn.map(|(fault, _)| fault),
        };
        self.puts += u64::from(is_put);
        if let Some(fault) = fault {
            *self.tally.entry((call, fault)).or_default() += 1;
        }
        fault
    }

    fn pause(&mut self) -> Duration {
        Duration::from_millis(self.random.random_range(1..30))
    }

    /// How much is left of so many bytes that end early.
    fn cut(&mut self, bytes: usize) -> usize {
        match self.cut_at {
            Some(at) => at.min(bytes),
            None if bytes == 0 => 0,
            None => self.random.random_range(0..bytes),
        }
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
        let call = if opts.mode == PutMode::Create { Call::Create } else { Call::Overwrite };
        let fault = self.state().draw(call);
        match fault {
            Some(Fault::Garbled) => {
                self.inner.put_opts(location, GARBLED.into(), opts).await?;
                Err(self.failure())
            }
            Some(Fault::Late) => {
                self.put_late(location, payload, opts);
                Err(self.failure())
            }
            Some(Fault::Conflict) => Err(self.refusal(location)),
            Some(Fault::MetItself) => {
                self.inner.put_opts(location, payload, opts).await?;
                Err(self.refusal(location))
            }
            fault => self.with(fault, self.inner.put_opts(location, payload, opts)).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let inner = self.call(Call::Upload, self.inner.put_multipart_opts(location, opts)).await?;
        Ok(Box::new(Upload { store: self.clone(), inner }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let call = if options.head { Call::Head } else { Call::Get };
        let fault = self.state().draw(call);
        let found = self.with(fault, self.inner.get_opts(location, options)).await?;
        match fault {
            Some(fault) if call == Call::Get => self.with_body(found, fault).await,
            _ => Ok(found),
        }
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let fault = self.state().draw(Call::Ranges);
        let mut found = self.with(fault, self.inner.get_ranges(location, ranges)).await?;
        match fault {
            Some(Fault::Broken) => return Err(self.failure()),
            Some(Fault::Short) => {
                let mut state = self.state();
                found.iter_mut().for_each(|bytes| bytes.truncate(state.cut(bytes.len())));
            }
            _ => {}
        }
        Ok(found)
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        let deleted = locations.then(move |location| {
            let store = store.clone();
            async move {
                let location = location?;
                if store.state().kept.contains(&location) {
                    return Err(store.failure());
                }
                let deleted = store.call(Call::Delete, store.inner.delete(&location)).await;
                deleted.map(|()| location)
            }
        });
        deleted.boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let fault = self.state().draw(Call::List);
        let listing = self.inner.list(prefix);
        let Some(fault) = fault else { return listing };
        let (shown, pause, hang) = {
            let mut state = self.state();
            (state.random.random_range(0..4), state.pause(), state.hang)
        };
        let pause = if fault == Fault::Hang { hang } else { pause };
        let error = self.failure();
        match fault {
            Fault::Slow => async move {
                tokio::time::sleep(pause).await;
                listing
            }
            .flatten_stream()
            .boxed(),
            Fault::Broken => listing.take(shown).chain(stream::once(async move { Err(error) })).boxed(),
            Fault::Hang => {
                let end = async move {
                    tokio::time::sleep(pause).await;
                    Err(error)
                };
                listing.take(shown).chain(stream::once(end)).boxed()
            }
            _ => stream::once(async move { Err(error) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let fault = self.state().draw(Call::List);
        let found = self.with(fault, self.inner.list_with_delimiter(prefix)).await?;
        if fault == Some(Fault::Broken) { Err(self.failure()) } else { Ok(found) }
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.call(Call::Copy, self.inner.copy_opts(from, to, options)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        self.call(Call::Copy, self.inner.rename_opts(from, to, options)).await
    }
}

/// An upload in parts, of which each step may fail.
#[derive(Debug)]
struct Upload {
    store: FaultStore,
    inner: Box<dyn MultipartUpload>,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let (store, part) = (self.store.clone(), self.inner.put_part(data));
        async move { store.call(Call::Upload, part).await }.boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        self.store.call(Call::Upload, self.inner.complete()).await
    }

    async fn abort(&mut self) -> Result<()> {
        self.store.call(Call::Upload, self.inner.abort()).await
    }
}
