//! Named points at which a test may end the process, as `kill -9` would.

/// Aborts the process if `KALAMDB_CRASH_AT` names this point. Only in builds with debug assertions: a release build
/// reads nothing.
pub fn point(name: &'static str) {
    #[cfg(debug_assertions)]
    if std::env::var_os("KALAMDB_CRASH_AT").is_some_and(|wanted| wanted == name) {
        tracing::warn!(point = name, "crashing on request");
        std::process::abort();
    }
    #[cfg(not(debug_assertions))]
    let _ = name;
}

/// All points of a statement's commit. With `durability: local` it passes the first, else the others: its rows are
/// committed by the object that brings edits of flushes, too.
pub const COMMIT_POINTS: [&str; 3] = ["commit.buffered", "flush.committed", "commit.applied"];

/// All points, in the order in which a flush passes them.
pub const FLUSH_POINTS: [&str; 6] =
    ["flush.frozen", "flush.encoded", "flush.uploaded", "flush.committed", "flush.published", "flush.reclaimed"];

/// All points of a compaction, in order. Its commit is that of a flush.
pub const COMPACTION_POINTS: [&str; 4] = ["compact.merged", "compact.uploaded", "flush.committed", "compact.published"];

/// All points of the first use of a storage, in order.
pub const HOLD_POINTS: [&str; 2] = ["hold.noted", "hold.held"];

/// All points of the beginning of a stream that has predecessors, in order.
pub const BEGIN_POINTS: [&str; 5] =
    ["begin.noted", "begin.taken", "begin.fenced", "begin.published", "begin.forgotten"];

/// All points of a checkpoint, in order. The first is passed after each part, the last after each former stream.
pub const CHECKPOINT_POINTS: [&str; 4] =
    ["checkpoint.part", "checkpoint.complete", "checkpoint.trimmed", "checkpoint.former"];

/// All points on the way of a volume that takes over from a lost one, in order. `rebuild.restored` is passed after each
/// object.
pub const REBUILD_POINTS: [&str; 7] = [
    "rebuild.claimed",
    "rebuild.expected",
    "rebuild.planned",
    "rebuild.ended",
    "rebuild.adopted",
    "rebuild.restored",
    "rebuild.done",
];

/// All points of a move between storages, in order. The commit of one that has nothing to flush is the first of its process.
pub const MOVE_POINTS: [&str; 5] = ["move.copied", "move.noted", "flush.committed", "move.arrived", "move.left"];

/// All points on the way of a replaced file, in order; each file passes them.
pub const GARBAGE_POINTS: [&str; 3] = ["garbage.noted", "garbage.due", "garbage.removed"];

/// All points of a change of a user, in order.
pub const USER_POINTS: [&str; 3] = ["user.logged", "user.kept", "user.noted"];

/// All points of a change of the catalog, in order.
pub const CATALOG_POINTS: [&str; 2] = ["catalog.saved", "catalog.noted"];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use super::*;

    const LISTS: [(&str, &[&str]); 11] = [
        ("COMMIT_POINTS", &COMMIT_POINTS),
        ("FLUSH_POINTS", &FLUSH_POINTS),
        ("COMPACTION_POINTS", &COMPACTION_POINTS),
        ("HOLD_POINTS", &HOLD_POINTS),
        ("BEGIN_POINTS", &BEGIN_POINTS),
        ("CHECKPOINT_POINTS", &CHECKPOINT_POINTS),
        ("REBUILD_POINTS", &REBUILD_POINTS),
        ("MOVE_POINTS", &MOVE_POINTS),
        ("GARBAGE_POINTS", &GARBAGE_POINTS),
        ("USER_POINTS", &USER_POINTS),
        ("CATALOG_POINTS", &CATALOG_POINTS),
    ];

    /// The text of all Rust files below `folder` of this crate.
    fn code(folder: &Path) -> String {
        let mut text = String::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                text.push_str(&code(&path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text.push_str(&std::fs::read_to_string(&path).unwrap());
            }
        }
        text
    }

    #[test]
    fn every_point_is_in_a_list_and_every_list_is_visited_by_a_test() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
        let engine = code(&folder.join("src"));
        let calls = engine.split("crash::point(\"").skip(1);
        let called: BTreeSet<&str> = calls.filter_map(|rest| rest.split('"').next()).collect();
        let listed: BTreeSet<&str> = LISTS.iter().flat_map(|(_, points)| points.iter().copied()).collect();
        assert_eq!(called, listed);
        let tests = code(&folder.join("tests/it"));
        for (name, _) in LISTS {
            // Imported, and used.
            assert!(tests.matches(name).count() > 1, "no test visits `{name}`");
        }
    }
}
