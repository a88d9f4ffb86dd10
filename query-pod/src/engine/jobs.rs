//! What the pod does in the background, for people who want to know: jobs that run, and the last ones that ended.
//!
//! Work of one kind on one table, for however many users, is one job: it gathers whoever comes within a minute of its
//! beginning, and ends with the last of them. In memory: what has to be done is known elsewhere, and is done after a restart without it.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kalamdb_model::{InstanceId, TableEntry, TableName};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

use super::now_us;
use crate::error::Chain;

/// Jobs that are remembered; the oldest that have ended go first.
const JOBS_MAX: usize = 1_000;
/// How long others may join a job.
const JOIN: Duration = Duration::from_secs(60);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// Buffered rows go into files.
    Flush,
    /// Files are rewritten.
    Compaction,
    /// Files are rewritten because the time of their deleted rows is over.
    Retention,
    /// Files that nobody needs any more are removed.
    Garbage,
    /// Rows of users go to the storages that these have now.
    StorageMove,
}

impl JobKind {
    /// As SQL shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Flush => "flush",
            Self::Compaction => "compaction",
            Self::Retention => "retention",
            Self::Garbage => "garbage",
            Self::StorageMove => "storage_move",
        }
    }
}

/// How far a job is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobState {
    /// Under way.
    Running,
    /// Done for everybody.
    Done,
    /// Not done for somebody.
    Failed,
    /// Stopped on request, for some at least.
    Cancelled,
}

impl JobState {
    /// As SQL shows it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// A job as it is now.
#[derive(Clone, Debug)]
pub struct Job {
    /// Random.
    pub id: String,
    /// What is done.
    pub kind: JobKind,
    /// On which table.
    pub table: TableName,
    /// For how many users; 1 for a shared table.
    pub users: u64,
    /// Rows that were moved, so far.
    pub rows: u64,
    /// Bytes of files that were written or removed, so far.
    pub bytes: u64,
    /// How far it is.
    pub state: JobState,
    /// The first failure.
    pub error: Option<String>,
    /// Microseconds since 1970.
    pub started_us: i64,
    /// Microseconds since 1970, once it has ended.
    pub ended_us: Option<i64>,
}

/// The jobs of this process. Clones share them.
#[derive(Clone, Default)]
pub struct Jobs(Arc<Mutex<VecDeque<Kept>>>);

struct Kept {
    job: Job,
    began: Instant,
    /// For whom, as long as others may join.
    joined: HashSet<InstanceId>,
    at_work: usize,
    cancel: CancellationToken,
}

impl Kept {
    fn is_open(&self) -> bool {
        self.began.elapsed() < JOIN && !self.cancel.is_cancelled()
    }
}

/// A part of a job. Dropped without an end, it has failed.
pub(super) struct Ticket {
    jobs: Jobs,
    id: String,
    /// Asks it to stop.
    pub(super) cancel: CancellationToken,
    ended: bool,
}

impl Jobs {
    /// Every job that is remembered, oldest first.
    #[must_use]
    pub fn all(&self) -> Vec<Job> {
        self.0.lock().iter().map(|kept| kept.job.clone()).collect()
    }

    /// Asks a job to stop where that is safe. `None`: there is no such job; `false`: it cannot be stopped, or has ended.
    #[must_use]
    pub fn cancel(&self, id: &str) -> Option<bool> {
        let kept = self.0.lock();
        let kept = kept.iter().find(|kept| kept.job.id == id)?;
        // A flush makes room for new rows, and garbage has to go sooner or later.
        let may = kept.at_work > 0 && !matches!(kept.job.kind, JobKind::Flush | JobKind::Garbage);
        if may {
            kept.cancel.cancel();
        }
        Some(may)
    }

    /// Begins work of `kind` for one user of `table`.
    pub(super) fn begin_for(&self, kind: JobKind, table: &TableEntry, instance: &InstanceId) -> Ticket {
        let ticket = self.begin(kind, table);
        ticket.count(instance);
        ticket
    }

    /// Begins work of `kind` on `table`, in the job of the last minute if there is one.
    pub(super) fn begin(&self, kind: JobKind, table: &TableEntry) -> Ticket {
        let mut all = self.0.lock();
        for kept in all.iter_mut().filter(|kept| !kept.is_open()) {
            kept.joined = HashSet::new();
        }
        let same = |kept: &&mut Kept| kept.job.kind == kind && kept.job.table == table.name && kept.is_open();
        if let Some(kept) = all.iter_mut().rev().find(same) {
            kept.at_work += 1;
            (kept.job.state, kept.job.ended_us) = (JobState::Running, None);
            return self.ticket(kept);
        }
        if all.len() >= JOBS_MAX
            && let Some(oldest) = all.iter().position(|kept| kept.at_work == 0)
        {
            all.remove(oldest);
        }
        let kept = Kept {
            job: Job {
                id: ulid::Ulid::generate().to_string().to_ascii_lowercase(),
                kind,
                table: table.name.clone(),
                users: 0,
                rows: 0,
                bytes: 0,
                state: JobState::Running,
                error: None,
                started_us: now_us(),
                ended_us: None,
            },
            began: Instant::now(),
            joined: HashSet::new(),
            at_work: 1,
            cancel: CancellationToken::new(),
        };
        let ticket = self.ticket(&kept);
        all.push_back(kept);
        ticket
    }

    fn ticket(&self, kept: &Kept) -> Ticket {
        Ticket { jobs: self.clone(), id: kept.job.id.clone(), cancel: kept.cancel.clone(), ended: false }
    }

    fn change(&self, id: &str, change: impl FnOnce(&mut Kept)) {
        // From the end: it is among the last.
        if let Some(kept) = self.0.lock().iter_mut().rev().find(|kept| kept.job.id == id) {
            change(kept);
        }
    }

    fn end(&self, id: &str) {
        self.change(id, |kept| {
            kept.at_work -= 1;
            if kept.at_work == 0 {
                kept.job.ended_us = Some(now_us());
                kept.job.state = match (kept.cancel.is_cancelled(), &kept.job.error) {
                    (true, _) => JobState::Cancelled,
                    (false, Some(_)) => JobState::Failed,
                    (false, None) => JobState::Done,
                };
            }
        });
    }
}

impl Ticket {
    /// Takes note of progress.
    pub(super) fn add(&self, rows: u64, bytes: u64) {
        self.jobs.change(&self.id, |kept| {
            kept.job.rows += rows;
            kept.job.bytes += bytes;
        });
    }

    /// Takes note of a user for whom something is done.
    pub(super) fn count(&self, instance: &InstanceId) {
        self.jobs.change(&self.id, |kept| kept.job.users += u64::from(kept.joined.insert(instance.clone())));
    }

    /// Takes note of a failure; the first one is shown.
    pub(super) fn fail(&self, error: &dyn std::error::Error) {
        self.jobs.change(&self.id, |kept| _ = kept.job.error.get_or_insert_with(|| Chain(error).to_string()));
    }

    /// Ends this part.
    pub(super) fn end<T, E: std::error::Error>(self, outcome: &Result<T, E>) {
        if let Err(error) = outcome {
            self.fail(error);
        }
        self.done();
    }

    /// Ends this part.
    pub(super) fn done(mut self) {
        self.ended = true;
        self.jobs.end(&self.id);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.ended {
            let interrupted = || "it was interrupted".to_owned();
            self.jobs.change(&self.id, |kept| _ = kept.job.error.get_or_insert_with(interrupted));
            self.jobs.end(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::declared::Spec;
    use kalamdb_model::{Catalog, OnRemoval, TableId, UserId, compile};

    use super::*;

    fn instance(user: &str) -> InstanceId {
        InstanceId::of_user(UserId::new(user).expect("valid"), TableId(1))
    }

    fn table() -> TableEntry {
        let manifests = kalamdb_test_support::pod::MANIFESTS.to_owned();
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), manifests)]);
        let is_table = |spec: &Spec| matches!(spec, Spec::Table(_));
        assert!(folder.declared.iter().any(|declared| declared.spec.as_ref().is_ok_and(is_table)));
        let (catalog, _) = compile(&Catalog::default(), &folder.declared, OnRemoval::Retain);
        catalog.tables.into_values().next().expect("a table")
    }

    #[test]
    fn who_comes_within_a_minute_is_counted_in_one_job_and_the_first_failure_stays() {
        let (jobs, table) = (Jobs::default(), table());
        let first = jobs.begin_for(JobKind::Flush, &table, &instance("a"));
        let second = jobs.begin_for(JobKind::Flush, &table, &instance("b"));
        let other = jobs.begin_for(JobKind::Compaction, &table, &instance("a"));
        first.add(3, 10);
        first.end(&Err::<(), _>(std::io::Error::other("disk")));
        assert_eq!(jobs.all()[0].state, JobState::Running);
        second.add(4, 20);
        second.end(&Ok::<_, std::io::Error>(()));
        jobs.begin_for(JobKind::Flush, &table, &instance("a")).done();
        drop(other);
        let all = jobs.all();
        let shown: Vec<_> = all.iter().map(|job| (job.kind, job.users, job.rows, job.bytes, job.state)).collect();
        assert_eq!(
            shown,
            [(JobKind::Flush, 2, 7, 30, JobState::Failed), (JobKind::Compaction, 1, 0, 0, JobState::Failed),]
        );
        let errors: Vec<_> = all.iter().map(|job| job.error.as_deref()).collect();
        assert_eq!(errors, [Some("disk"), Some("it was interrupted")]);
        assert!(all.iter().all(|job| job.ended_us.is_some()));
    }

    #[test]
    fn only_what_may_be_stopped_is_and_a_stopped_job_takes_nobody_in() {
        let (jobs, table) = (Jobs::default(), table());
        let flush = jobs.begin(JobKind::Flush, &table);
        let compaction = jobs.begin(JobKind::Compaction, &table);
        let ids: Vec<String> = jobs.all().into_iter().map(|job| job.id).collect();
        assert_eq!([jobs.cancel(&ids[0]), jobs.cancel(&ids[1]), jobs.cancel("x")], [Some(false), Some(true), None]);
        assert!(compaction.cancel.is_cancelled() && !flush.cancel.is_cancelled());
        let next = jobs.begin(JobKind::Compaction, &table);
        assert!(!next.cancel.is_cancelled());
        for ticket in [flush, compaction, next] {
            ticket.done();
        }
        let states: Vec<_> = jobs.all().iter().map(|job| job.state).collect();
        assert_eq!(states, [JobState::Done, JobState::Cancelled, JobState::Done]);
        assert_eq!(jobs.cancel(&ids[1]), Some(false), "it has ended");
    }

    #[test]
    fn the_oldest_that_has_ended_makes_room() {
        let (jobs, table) = (Jobs::default(), table());
        let running = jobs.begin(JobKind::Flush, &table);
        for _ in 0..JOBS_MAX + 5 {
            let ticket = jobs.begin(JobKind::Compaction, &table);
            ticket.cancel.cancel();
            ticket.done();
        }
        assert_eq!(jobs.all().len(), JOBS_MAX);
        assert_eq!(jobs.all()[0].kind, JobKind::Flush);
        running.done();
    }
}
