//! What is known in memory about instances with rows that are not in files: a cache of RocksDB, rebuilt at open.
//!
//! An instance without such rows is forgotten; its record says all that is needed.

use std::collections::HashMap;

use kalamdb_model::{Generation, InstanceId};
use parking_lot::{Mutex, MutexGuard};

use crate::record::Record;

/// What is buffered for an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counters {
    /// Rows of generations up to this are in files.
    pub flushed: Generation,
    /// Takes rows.
    pub active: Generation,
    /// The last `_seq` that was given and acknowledged; 0 = none.
    pub last_seq: i64,
    /// Rows in the active generation. A key that is written again counts once.
    pub rows: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
    /// Those of frozen generations, which are not in files yet.
    pub frozen_bytes: u64,
    /// `_updated` of the first row of the active generation; 0 without rows.
    pub oldest_us: i64,
}

impl Counters {
    /// Whether a generation is frozen and not published: a flush is under way, or was interrupted.
    #[must_use]
    pub const fn has_frozen(&self) -> bool {
        self.active.0 > self.flushed.0 + 1
    }
}

/// What one generation holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Filling {
    pub(crate) generation: Generation,
    pub(crate) rows: u64,
    pub(crate) bytes: u64,
    pub(crate) oldest_us: i64,
}

impl Filling {
    pub(crate) const fn new(generation: Generation) -> Self {
        Self { generation, rows: 0, bytes: 0, oldest_us: 0 }
    }

    /// Counts a row of `bytes`, which takes the place of one of `replaced` bytes.
    pub(crate) fn add(&mut self, bytes: usize, replaced: Option<usize>, updated_us: i64) {
        self.oldest_us = if self.rows == 0 { updated_us } else { self.oldest_us.min(updated_us) };
        self.bytes += to_u64(bytes);
        match replaced {
            Some(old) => self.bytes -= to_u64(old).min(self.bytes),
            None => self.rows += 1,
        }
    }
}

fn to_u64(bytes: usize) -> u64 {
    u64::try_from(bytes).expect("a usize has at most 64 bits")
}

/// One instance.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(crate) flushed: Generation,
    pub(crate) active: Generation,
    /// Acknowledged.
    pub(crate) last_seq: i64,
    /// Given, perhaps to a row whose write failed: never given again.
    pub(crate) used_seq: i64,
    /// Generations above `flushed` that hold rows, ascending.
    pub(crate) fillings: Vec<Filling>,
    /// Removal of generations up to this has begun: nobody may read them.
    pub(crate) reclaiming: Generation,
    /// Removal of generations up to this is complete.
    pub(crate) reclaimed: Generation,
    /// A round of the committer works on it: it must not be forgotten.
    pub(crate) pinned: bool,
}

impl State {
    /// An instance that has no rows in the buffer.
    pub(crate) const fn of_record(record: &Record) -> Self {
        Self {
            flushed: record.flushed,
            active: record.active,
            last_seq: record.last_seq,
            used_seq: record.last_seq,
            fillings: Vec::new(),
            reclaiming: record.flushed,
            reclaimed: record.flushed,
            pinned: false,
        }
    }

    pub(crate) fn active_filling(&self) -> Filling {
        let last = self.fillings.last().filter(|filling| filling.generation == self.active);
        last.copied().unwrap_or(Filling::new(self.active))
    }

    pub(crate) fn counters(&self) -> Counters {
        let Filling { rows, bytes, oldest_us, .. } = self.active_filling();
        let (flushed, active, last_seq) = (self.flushed, self.active, self.last_seq);
        Counters { flushed, active, last_seq, rows, bytes, frozen_bytes: self.frozen_bytes(), oldest_us }
    }

    /// Bytes of rows in frozen generations.
    pub(crate) fn frozen_bytes(&self) -> u64 {
        self.fillings.iter().filter(|filling| filling.generation < self.active).map(|filling| filling.bytes).sum()
    }

    /// Generations up to `flushed` are in files now.
    pub(crate) fn publish(&mut self, flushed: Generation) {
        self.flushed = self.flushed.max(flushed);
        self.fillings.retain(|filling| filling.generation > flushed);
    }

    /// Generations up to `flushed` are in files that another buffer wrote.
    pub(crate) fn adopt(&mut self, flushed: Generation, last_seq: i64) {
        self.publish(flushed);
        self.active = self.active.max(Generation(flushed.0.saturating_add(1)));
        self.last_seq = self.last_seq.max(last_seq);
        self.used_seq = self.used_seq.max(last_seq);
        self.reclaiming = self.reclaiming.max(flushed);
        self.reclaimed = self.reclaimed.max(flushed);
    }

    fn is_clean(&self) -> bool {
        !self.pinned && self.fillings.is_empty() && self.reclaimed >= self.flushed
    }
}

const STRIPES: usize = 64;

/// All states, in stripes so that readers of one instance seldom wait for another's.
#[derive(Debug)]
pub(crate) struct States {
    stripes: Vec<Stripe>,
}

#[derive(Debug, Default)]
struct Stripe {
    states: Mutex<HashMap<InstanceId, State>>,
    /// Held over the read, check and write of a publication. Never taken while `states` is held.
    publishing: Mutex<()>,
}

impl States {
    pub(crate) fn new() -> Self {
        Self { stripes: (0..STRIPES).map(|_| Stripe::default()).collect() }
    }

    fn stripe(&self, instance: &InstanceId) -> &Stripe {
        &self.stripes[usize::from(instance.shard().0) % STRIPES]
    }

    /// The states of the stripe that `instance` is in.
    pub(crate) fn of(&self, instance: &InstanceId) -> MutexGuard<'_, HashMap<InstanceId, State>> {
        self.stripe(instance).states.lock()
    }

    /// Lets one publication of `instance` at a time go on.
    pub(crate) fn publishing(&self, instance: &InstanceId) -> MutexGuard<'_, ()> {
        self.stripe(instance).publishing.lock()
    }

    /// Changes the state, if there is one, and forgets it if nothing is buffered any more.
    pub(crate) fn update(&self, instance: &InstanceId, change: impl FnOnce(&mut State)) {
        let mut states = self.of(instance);
        let Some(state) = states.get_mut(instance) else { return };
        change(state);
        if state.is_clean() {
            states.remove(instance);
        }
    }

    pub(crate) fn dirty(&self) -> Vec<(InstanceId, Counters)> {
        let mut dirty = Vec::new();
        for stripe in &self.stripes {
            let states = stripe.states.lock();
            let unflushed = states.iter().filter(|(_, state)| !state.fillings.is_empty());
            dirty.extend(unflushed.map(|(instance, state)| (instance.clone(), state.counters())));
        }
        dirty
    }
}
