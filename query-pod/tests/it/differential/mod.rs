//! Generated statements against SQLite and against a plain model: whatever is written, flushed, compacted, moved to
//! another storage, restarted or lost with its volume, all of them answer the same.
//!
//! A list of operations is made from a seed before anything runs; one that fails is made small, and printed.
//! `KALAMDB_STEPS` says how many there are, `KALAMDB_SEED` repeats a run.

mod actions;
mod general;
mod generate;
mod model;
mod ours;
mod run;
mod shrink;
mod sqlite;
mod tables;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use tokio::runtime::Runtime;

use generate::{Op, What};
pub use ours::{Ours, Volume, said, sql_limits};
use run::{Failure, attempt};
use shrink::{Patience, smallest};

/// Operations of all runs.
const STEPS: u64 = 200_000;
/// Operations of one run, which has a seed and databases of its own.
const RUN_STEPS: u64 = 10_000;
/// The seed of the first run; each has the next one.
const SEED: u64 = 20_261_121;
/// From here on every kind of operation has to come up.
const ALL_KINDS: u64 = 100_000;

const SHRINK_TRIES: usize = 400;
const SHRINK_TIME: Duration = Duration::from_secs(120);
/// Most operations of a failing list that are printed.
const PRINTED: usize = 200;

/// Cells as texts.
pub type Row = Vec<Option<String>>;

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    Rows(Vec<Row>),
    /// So many rows were written, or files.
    Changed(usize),
    /// A key exists; nothing was written.
    Duplicate,
}

impl Said {
    fn sorted(self) -> Self {
        match self {
            Self::Rows(mut rows) => {
                rows.sort_unstable();
                Self::Rows(rows)
            }
            other => other,
        }
    }

    fn effect(&self) -> Effect {
        match self {
            Self::Rows(rows) if rows.is_empty() => Effect::None,
            Self::Changed(0) => Effect::None,
            Self::Rows(_) | Self::Changed(_) => Effect::Some,
            Self::Duplicate => Effect::Refused,
        }
    }
}

/// Whether an operation came to anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Some,
    Refused,
}

/// How often each kind of operation happened.
#[derive(Default)]
pub struct Counts(BTreeMap<&'static str, Count>);

#[derive(Clone, Copy, Default)]
struct Count {
    all: u64,
    with_effect: u64,
    refused: u64,
}

impl Counts {
    fn add(&mut self, op: &Op, effect: Effect) {
        let mut add = |kind| {
            let count = self.0.entry(kind).or_default();
            count.all += 1;
            count.with_effect += u64::from(effect == Effect::Some);
            count.refused += u64::from(effect == Effect::Refused);
        };
        add(op.kind());
        if let What::Asked(asked) = &op.what {
            if asked.parameters {
                add("with parameters");
            }
            if asked.returning {
                add("returning");
            }
        }
    }

    fn add_all(&mut self, other: Self) {
        for (kind, count) in other.0 {
            let sum = self.0.entry(kind).or_default();
            sum.all += count.all;
            sum.with_effect += count.with_effect;
            sum.refused += count.refused;
        }
    }

    fn print(&self) {
        for (kind, Count { all, with_effect, refused }) in &self.0 {
            println!("{all:>8} {kind}, {with_effect} with an effect, {refused} refused");
        }
    }

    /// A test of what never happens, or never does anything, would prove nothing.
    fn check(&self) -> anyhow::Result<()> {
        for kind in generate::kinds() {
            let count = self.0.get(kind).copied().unwrap_or_default();
            ensure!(count.with_effect > 0, "`{kind}` happened {} times, and never with an effect", count.all);
        }
        ensure!(self.0.get("insert").is_some_and(|count| count.refused > 0), "no key was refused");
        Ok(())
    }
}

/// Runs one seed.
fn run_seed(runtime: &Runtime, seed: u64, steps: u64) -> anyhow::Result<Counts> {
    let ops = generate::ops(seed, usize::try_from(steps)?);
    let mut counts = Counts::default();
    match runtime.block_on(attempt(&ops, &mut counts)) {
        Ok(()) => Ok(counts),
        Err(failure) => bail!(explain(runtime, seed, ops, failure)),
    }
}

/// Makes a list that has failed small, and tells all that helps to find out why.
fn explain(runtime: &Runtime, seed: u64, mut ops: Vec<Op>, first: Failure) -> String {
    let patience = Patience { tries: SHRINK_TRIES, until: Instant::now() + SHRINK_TIME };
    let (repeat, before) = (ops.len().min(first.at + 1), format!("{:#}", first.error));
    eprintln!("seed {seed}, operation {}: {before}\nlooking for a smaller list that fails", first.at);
    let user = ops.get(first.at).map(|op| op.user);
    ops.truncate(repeat);
    let mut last = None;
    let mut fails = |part: &[Op]| match runtime.block_on(attempt(part, &mut Counts::default())) {
        Ok(()) => false,
        Err(failure) => {
            last = Some(failure.error);
            true
        }
    };
    // Users have nothing in common, most of the time.
    let alone: Vec<Op> = ops.iter().filter(|op| user.is_none_or(|user| op.concerns(user))).cloned().collect();
    if fails(&alone) {
        ops = alone;
    }
    let small = smallest(ops, &patience, fails);
    let (from, count) = (small.len().saturating_sub(PRINTED), small.len());
    let listed: Vec<String> = small[from..].iter().map(ToString::to_string).collect();
    let after = last.map_or_else(|| "no part of the list failed again".to_owned(), |error| format!("{error:#}"));
    format!(
        "seed {seed} failed:\n{before}\n\nThe smallest list that was found to fail has {count} operations, the last \
         {} are:\n{}\n\nwhich failed so:\n{after}\n\nto repeat the run:\nKALAMDB_SEED={seed} KALAMDB_STEPS={repeat} \
         cargo test --workspace --test it differential::generated -- --nocapture\n",
        listed.len(),
        listed.join("\n"),
    )
}

#[test]
fn generated_statements_answer_as_sqlite_and_a_plain_model_do() -> anyhow::Result<()> {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let given = number("KALAMDB_SEED");
    let seed = given.unwrap_or(SEED);
    let steps = number("KALAMDB_STEPS").unwrap_or(if given.is_some() { RUN_STEPS } else { STEPS });
    let runs = steps.div_ceil(RUN_STEPS);
    println!("{steps} operations in {runs} runs from seed {seed} (KALAMDB_SEED, KALAMDB_STEPS)");
    let (next, counts) = (AtomicU64::new(0), Mutex::new(Counts::default()));
    let work = || -> anyhow::Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= runs {
                return Ok(());
            }
            let done = run_seed(&runtime, seed + number, RUN_STEPS.min(steps - number * RUN_STEPS));
            // The others need not go on after a failure.
            let done = done.inspect_err(|_| _ = next.fetch_max(runs, Ordering::Relaxed))?;
            counts.lock().unwrap().add_all(done);
        }
    };
    // One more than there are processors: each waits for the disk now and then.
    let at_once = std::thread::available_parallelism()?.get() + 1;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..at_once).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap())
    })?;
    let counts = counts.into_inner().unwrap();
    counts.print();
    if steps >= ALL_KINDS { counts.check() } else { Ok(()) }
}

/// Rows go from the buffer to files and from file to file while they are changed and read: each is there exactly once, in
/// its newest version, at every moment.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn every_row_is_seen_once_and_newest_while_flushes_and_compactions_run() -> anyhow::Result<()> {
    const KEYS: i64 = 40;
    let ours = Arc::new(Ours::new().await?);
    let rows: Vec<String> = (0..KEYS).map(|id| format!("({id}, 0, 'x')")).collect();
    ours.run("alice", &format!("INSERT INTO notes VALUES {}", rows.join(", "))).await?;
    let stop = tokio_util::sync::CancellationToken::new();
    let mut background = tokio::task::JoinSet::new();
    for command in ["STORAGE FLUSH TABLE app.notes", "STORAGE COMPACT TABLE app.notes"] {
        let (ours, stop) = (Arc::clone(&ours), stop.clone());
        background.spawn(async move {
            let mut times = 0;
            while !stop.is_cancelled() {
                ours.run("alice", command).await?;
                times += 1;
            }
            anyhow::Ok(times)
        });
    }
    for _ in 0..2 {
        let (ours, stop) = (Arc::clone(&ours), stop.clone());
        background.spawn(async move {
            let (mut times, mut last) = (0, 0);
            while !stop.is_cancelled() {
                let sql = "SELECT count(*), count(distinct id), coalesce(sum(num), 0) FROM notes WHERE s = 'x'";
                let Said::Rows(rows) = ours.run("alice", sql).await? else { bail!("no rows") };
                let number = |at: usize| rows[0][at].as_ref().context("a number")?.parse::<i64>().context("a number");
                let (count, distinct, sum) = (number(0)?, number(1)?, number(2)?);
                ensure!(count == distinct, "{count} rows have {distinct} keys");
                ensure!(count == KEYS, "{count} rows of {KEYS}");
                ensure!(sum >= last, "the sum went from {last} to {sum}: an old version came back");
                last = sum;
                times += 1;
            }
            anyhow::Ok(times)
        });
    }
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..4_i64 {
        let ours = Arc::clone(&ours);
        writers.spawn(async move {
            for step in 0..60_i64 {
                let id = (step * 7 + writer * 10) % KEYS;
                // One statement that moves the newest version to the buffer, and one that deletes and inserts again what
                // nobody counts.
                ours.run("alice", &format!("UPDATE notes SET num = num + 1 WHERE id = {id}")).await?;
                let other = KEYS + writer;
                ours.run("alice", &format!("INSERT INTO notes VALUES ({other}, {step}, 'y')")).await?;
                ours.run("alice", &format!("DELETE FROM notes WHERE id = {other}")).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(done) = writers.join_next().await {
        done??;
    }
    stop.cancel();
    while let Some(done) = background.join_next().await {
        ensure!(done?? > 3, "it ran beside the writers");
    }
    let Said::Rows(rows) = ours.run("alice", "SELECT count(*), sum(num) FROM notes").await? else { bail!("no rows") };
    ensure!(rows == [[Some(KEYS.to_string()), Some("240".to_owned())]], "{rows:?}");
    Ok(())
}
