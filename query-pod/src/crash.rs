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

/// All points of a compaction, in order. Its commit is that of a flush.
pub const COMPACTION_POINTS: [&str; 4] = ["compact.merged", "compact.uploaded", "flush.committed", "compact.published"];

/// All points, in the order in which a flush passes them.
pub const FLUSH_POINTS: [&str; 6] =
    ["flush.frozen", "flush.encoded", "flush.uploaded", "flush.committed", "flush.published", "flush.reclaimed"];

/// All points of a move between storages, in order. The commit of one that has nothing to flush is the first of its process.
pub const MOVE_POINTS: [&str; 5] = ["move.copied", "move.noted", "flush.committed", "move.arrived", "move.left"];
