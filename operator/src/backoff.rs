//! When to try again: exponential pauses, one row of them per object, so that one object's trouble delays no other.
//!
//! Pure: the caller brings the time. An entry goes when its object succeeds or is gone, so the map is bounded by the
//! number of objects.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Pauses of one thing that fails: `first`, then twice as long each time, up to `longest`.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Backoff {
    /// No failure so far.
    #[must_use]
    pub const fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// Counts a failure and says how long to wait.
    pub fn failed(&mut self) -> Duration {
        let factor = 2_u32.saturating_pow(self.failures);
        self.failures = self.failures.saturating_add(1);
        self.first.saturating_mul(factor).min(self.longest)
    }

    /// Begins anew.
    pub const fn succeeded(&mut self) {
        self.failures = 0;
    }
}

/// Pauses of writes to objects: 1 s to 5 min.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(300);

/// One [`Backoff`] per object, by uid.
#[derive(Debug, Default)]
pub struct Backoffs(HashMap<String, (Backoff, Instant)>);

impl Backoffs {
    /// Whether the object may be written at `now`.
    #[must_use]
    pub fn may_try(&self, uid: &str, now: Instant) -> bool {
        self.0.get(uid).is_none_or(|(_, not_before)| *not_before <= now)
    }

    /// A write failed at `now`.
    pub fn failed(&mut self, uid: &str, now: Instant) {
        let (backoff, not_before) = self.0.entry(uid.to_owned()).or_insert_with(|| (Backoff::new(FIRST, LONGEST), now));
        *not_before = now + backoff.failed();
    }

    /// A write succeeded, or there is nothing left to write.
    pub fn succeeded(&mut self, uid: &str) {
        self.0.remove(uid);
    }

    /// Drops objects that are gone.
    pub fn keep(&mut self, exists: impl Fn(&str) -> bool) {
        self.0.retain(|uid, _| exists(uid));
    }

    /// Drops objects that might have been tried since `started` and were not: there is nothing left to try.
    pub fn forget_untried(&mut self, started: Instant) {
        self.0.retain(|_, (_, not_before)| *not_before > started);
    }

    /// When the first of the waiting objects may be tried again.
    #[must_use]
    pub fn next(&self) -> Option<Instant> {
        self.0.values().map(|(_, not_before)| *not_before).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest_and_begin_anew_after_success() {
        let mut backoff = Backoff::new(Duration::from_secs(5), Duration::from_secs(300));
        let pauses: Vec<u64> = (0..8).map(|_| backoff.failed().as_secs()).collect();
        assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300]);
        (0..100).for_each(|_| assert!(backoff.failed() <= Duration::from_secs(300)));
        backoff.succeeded();
        assert_eq!(backoff.failed().as_secs(), 5);
    }

    #[test]
    fn one_objects_failures_delay_no_other() {
        let (mut all, now) = (Backoffs::default(), Instant::now());
        all.failed("a", now);
        assert!(!all.may_try("a", now) && all.may_try("b", now));
        assert!(all.may_try("a", now + FIRST));
        assert_eq!(all.next(), Some(now + FIRST));
    }

    #[test]
    fn an_object_that_no_longer_needs_a_write_wakes_nobody() {
        let (mut all, now) = (Backoffs::default(), Instant::now());
        all.failed("a", now);
        all.forget_untried(now);
        assert!(all.next().is_some());
        all.forget_untried(now + FIRST);
        assert_eq!(all.next(), None);
    }

    #[test]
    fn success_and_deletion_leave_nothing_behind() {
        let (mut all, now) = (Backoffs::default(), Instant::now());
        all.failed("a", now);
        all.failed("b", now);
        all.succeeded("a");
        all.keep(|uid| uid == "a");
        assert!(all.next().is_none() && all.0.is_empty());
    }
}
