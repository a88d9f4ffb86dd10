//! Makes a list that fails small: what can be left out is left out, from halves down to single items.

use std::time::{Duration, Instant};

/// How long is searched.
pub struct Patience {
    /// Parts that are tried.
    pub tries: usize,
    /// When no further one is begun.
    pub until: Instant,
}

/// A part of `list`, in its order, that fails as `list` does; unless the patience ends first, one of which no item can
/// be left out.
pub fn smallest<T: Clone>(mut list: Vec<T>, patience: &Patience, mut fails: impl FnMut(&[T]) -> bool) -> Vec<T> {
    let mut tries = 0;
    let mut size = list.len().div_ceil(2);
    while size > 0 {
        let before = list.len();
        let mut at = 0;
        while at < list.len() {
            if tries == patience.tries || Instant::now() >= patience.until {
                return list;
            }
            tries += 1;
            let end = list.len().min(at + size);
            let rest = [&list[..at], &list[end..]].concat();
            if fails(&rest) {
                list = rest;
            } else {
                at = end;
            }
        }
        size = match size {
            // What was left out may have been all that an earlier item was needed for.
            1 if list.len() == before => 0,
            size => size.div_ceil(2),
        };
    }
    list
}

fn patience(tries: usize) -> Patience {
    Patience { tries, until: Instant::now() + Duration::from_secs(60) }
}

#[test]
fn the_two_of_a_hundred_that_fail_together_are_found() {
    let mut tries = 0;
    let found = smallest((0..100).collect(), &patience(200), |part: &[u32]| {
        tries += 1;
        part.contains(&17) && part.contains(&83)
    });
    assert_eq!(found, [17, 83]);
    assert!(tries < 60, "{tries} tries");
}

#[test]
fn an_item_that_only_a_later_one_needed_goes_with_it() {
    // 9 fails alone; as long as 5 is there, it needs 2.
    let fails = |part: &[u32]| part.contains(&9) && (!part.contains(&5) || part.contains(&2));
    assert_eq!(smallest((0..10).collect(), &patience(200), fails), [9]);
}

#[test]
fn what_is_left_when_the_patience_ends_fails_still() {
    let fails = |part: &[u32]| part.contains(&17) && part.contains(&83);
    for tries in 0..30 {
        let found = smallest((0..100).collect(), &patience(tries), fails);
        assert!(fails(&found) && (tries < 4 || found.len() < 100), "{tries}: {found:?}");
    }
    let late = Patience { tries: 200, until: Instant::now() };
    assert_eq!(smallest((0..100).collect(), &late, fails).len(), 100);
}

#[test]
fn what_fails_always_becomes_nothing() {
    assert!(smallest(vec![1, 2, 3], &patience(200), |_| true).is_empty());
    assert!(smallest(Vec::<u32>::new(), &patience(200), |_| true).is_empty());
}
