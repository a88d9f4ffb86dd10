//! What happens, made from a seed before anything runs: no statement depends on what an earlier one did, so that any
//! part of a list can be run.

use std::fmt;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::actions::{self, Asked};
use super::general::{self, General};
use super::tables::{STORAGES, TABLES, Table};

pub const USERS: [&str; 3] = ["alice", "bob", "é/🙂"];

#[derive(Clone)]
pub struct Op {
    /// Whose it is, by his number.
    pub user: usize,
    pub what: What,
}

#[derive(Clone)]
pub enum What {
    Asked(Asked),
    General(General),
    /// Moves the user's rows of a table into a file.
    Flush(&'static Table),
    Compact(&'static Table),
    /// Ends the process and begins another one, on the same volume.
    Restart,
    /// The same, on an empty volume.
    Lose,
    /// Gives the user another storage. His rows go there while other things happen.
    Move(&'static str),
    /// Waits until they are there.
    Settle,
}

/// The first `count` operations of a seed.
pub fn ops(seed: u64, count: usize) -> Vec<Op> {
    let mut rng = StdRng::seed_from_u64(seed);
    (0..count).map(|_| Op::random(&mut rng)).collect()
}

/// Every kind that there is.
pub fn kinds() -> impl Iterator<Item = &'static str> {
    const OTHERS: [&str; 6] = ["flush", "compact", "restart", "lose the volume", "move", "settle"];
    actions::KINDS.into_iter().chain(general::kinds()).chain(OTHERS)
}

impl Op {
    fn random(rng: &mut StdRng) -> Self {
        let user = rng.random_range(0..USERS.len());
        let table = &TABLES[rng.random_range(0..TABLES.len())];
        let what = match rng.random_range(0..10_000) {
            0..250 => What::Flush(table),
            250..300 => What::Compact(table),
            300..315 => What::Restart,
            315..318 => What::Lose,
            318..358 => What::Move(STORAGES[rng.random_range(0..STORAGES.len())]),
            358..378 => What::Settle,
            378..1_378 => What::General(General::random(rng)),
            _ => What::Asked(Asked::random(rng, table)),
        };
        Self { user, what }
    }

    pub fn kind(&self) -> &'static str {
        match &self.what {
            What::Asked(asked) => asked.kind(),
            What::General(general) => general.kind,
            What::Flush(_) => "flush",
            What::Compact(_) => "compact",
            What::Restart => "restart",
            What::Lose => "lose the volume",
            What::Move(_) => "move",
            What::Settle => "settle",
        }
    }

    /// Whether it is about `user`, or about all.
    pub fn concerns(&self, user: usize) -> bool {
        self.user == user || matches!(self.what, What::Restart | What::Lose)
    }
}

/// For `dba`.
pub fn send(user: usize, storage: &str) -> String {
    let to = if storage == STORAGES[0] {
        "storage_mode = 'table', storage_id = NULL".to_owned()
    } else {
        format!("storage_mode = 'region', storage_id = '{storage}'")
    };
    format!("UPDATE system.users SET {to} WHERE username = '{}'", USERS[user])
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = USERS[self.user];
        match &self.what {
            What::Asked(asked) if asked.parameters => write!(f, "{user}: {}; -- with parameters", asked.literal()),
            What::Asked(asked) => write!(f, "{user}: {};", asked.literal()),
            What::General(general) => write!(f, "{user}: {};", general.sql),
            What::Flush(table) => write!(f, "{user}: STORAGE FLUSH TABLE app.{};", table.name),
            What::Compact(table) => write!(f, "{user}: STORAGE COMPACT TABLE app.{};", table.name),
            What::Move(storage) => write!(f, "dba: {};", send(self.user, storage)),
            What::Settle => write!(f, "-- {user}'s rows are where they are to lie"),
            What::Restart | What::Lose => write!(f, "-- {}", self.kind()),
        }
    }
}

#[test]
fn a_longer_list_of_a_seed_begins_with_the_shorter_one() {
    let texts = |count| ops(7, count).iter().map(ToString::to_string).collect::<Vec<_>>();
    let longer = texts(500);
    assert_eq!(texts(300), longer[..300]);
    assert_ne!(longer, ops(8, 500).iter().map(ToString::to_string).collect::<Vec<_>>());
}
