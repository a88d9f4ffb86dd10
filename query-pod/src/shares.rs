//! Permits that are bounded for all, and for each user below that: whatever one user does, something is left for others.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kalamdb_model::UserId;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

/// Users who are remembered before the first look for idle ones.
const USERS_KEPT: usize = 64;

/// A number of permits, of which one user gets a part.
pub struct Shares {
    total: usize,
    each: usize,
    all: Arc<Semaphore>,
    users: Mutex<Users>,
}

/// The users who hold something or wait for it, and idle ones, who are forgotten now and then.
struct Users {
    known: HashMap<UserId, Weak<Semaphore>>,
    /// How many make it worth to look for idle ones.
    look_at: usize,
}

/// Permits of one user; given back when dropped.
#[derive(Debug)]
pub struct Share {
    _own: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

/// Which bound was in the way, and what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// The user has all that one user gets.
    User(usize),
    /// All users together have everything.
    All(usize),
}

impl Shares {
    /// `total` permits, at most `each` for one user.
    #[must_use]
    pub fn new(total: usize, each: usize) -> Self {
        let (total, each) = (total.min(Semaphore::MAX_PERMITS), each.min(Semaphore::MAX_PERMITS));
        let users = Users { known: HashMap::new(), look_at: USERS_KEPT };
        Self { total, each, all: Arc::new(Semaphore::new(total)), users: Mutex::new(users) }
    }

    /// `total` permits, at most half of them, rounded up, for one user.
    #[must_use]
    pub fn halves(total: usize) -> Self {
        Self::new(total, total.div_ceil(2))
    }

    /// `count` permits for `user`, within `wait`.
    ///
    /// # Errors
    /// The bound that they were over all the while.
    pub async fn take(&self, user: &UserId, count: u32, wait: Duration) -> Result<Share, Full> {
        let until = Instant::now() + wait;
        // His own part first: who waits for that does not stand before others in the queue of all.
        let Ok(Ok(own)) = timeout_at(until, self.of(user).acquire_many_owned(count)).await else {
            return Err(Full::User(self.each));
        };
        let Ok(Ok(all)) = timeout_at(until, Arc::clone(&self.all).acquire_many_owned(count)).await else {
            return Err(Full::All(self.total));
        };
        Ok(Share { _own: own, _all: all })
    }

    /// The user's part. It lives as long as somebody holds of it or waits for it.
    fn of(&self, user: &UserId) -> Arc<Semaphore> {
        let mut users = self.users.lock();
        if let Some(own) = users.known.get(user).and_then(Weak::upgrade) {
            return own;
        }
        // At twice as many as were busy the last time, a look costs each newcomer the same, however many there are.
        if users.known.len() >= users.look_at {
            users.known.retain(|_, own| own.strong_count() > 0);
            users.look_at = USERS_KEPT.max(users.known.len() * 2);
        }
        let own = Arc::new(Semaphore::new(self.each));
        users.known.insert(user.clone(), Arc::downgrade(&own));
        own
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::ZERO;

    fn user(name: &str) -> UserId {
        UserId::new(name).expect("valid")
    }

    #[tokio::test]
    async fn one_user_gets_his_part_and_leaves_the_rest() {
        let shares = Shares::halves(5);
        let (alice, bob) = (user("alice"), user("bob"));
        let first = shares.take(&alice, 1, NOW).await.expect("free");
        let _more = shares.take(&alice, 2, NOW).await.expect("free");
        assert_eq!(shares.take(&alice, 1, NOW).await.expect_err("his part"), Full::User(3));
        let _others = shares.take(&bob, 2, NOW).await.expect("left for others");
        assert_eq!(shares.take(&bob, 1, NOW).await.expect_err("all gone"), Full::All(5));
        drop(first);
        let _again = shares.take(&alice, 1, NOW).await.expect("given back");
    }

    #[tokio::test]
    async fn who_waits_is_served_when_something_is_given_back() {
        let shares = Shares::new(1, 1);
        let held = shares.take(&user("alice"), 1, NOW).await.expect("free");
        let minute = Duration::from_secs(60);
        let (alice, bob) = (user("alice"), user("bob"));
        let (own, others, ()) = tokio::join!(
            async { shares.take(&alice, 1, minute).await.map(drop) },
            async { shares.take(&bob, 1, minute).await.map(drop) },
            async {
                tokio::time::sleep(Duration::from_millis(50)).await;
                drop(held);
            }
        );
        assert_eq!((own, others), (Ok(()), Ok(())));
    }

    #[tokio::test]
    async fn who_waits_for_his_own_part_is_in_nobodys_way() {
        let shares = Shares::new(2, 1);
        let (alice, bob) = (user("alice"), user("bob"));
        let held = shares.take(&alice, 1, NOW).await.expect("free");
        let waiting = shares.take(&alice, 1, Duration::from_secs(60));
        let others = async {
            let taken = shares.take(&bob, 1, NOW).await.map(drop);
            drop(held);
            taken
        };
        let (own, others) = tokio::join!(waiting, others);
        assert!(own.is_ok());
        assert_eq!(others, Ok(()));
    }

    #[tokio::test]
    async fn idle_users_are_forgotten_and_busy_ones_are_not() {
        let shares = Shares::new(2, 1);
        let busy = user("busy");
        let _held = shares.take(&busy, 1, NOW).await.expect("free");
        for number in 0..USERS_KEPT * 100 {
            drop(shares.take(&user(&number.to_string()), 1, NOW).await.expect("free"));
        }
        assert!(shares.users.lock().known.len() <= USERS_KEPT, "{}", shares.users.lock().known.len());
        assert_eq!(shares.take(&busy, 1, NOW).await.expect_err("his part"), Full::User(1));
    }
}
