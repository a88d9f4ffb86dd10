//! Where figures were measured; without it they say nothing.

use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use anyhow::Context as _;

/// Synced writes that are timed.
const SYNCS: usize = 200;

/// Prints cores, processor, memory, kernel and build profile.
pub fn print() {
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZeroUsize::get);
    let processor = first_value("/proc/cpuinfo", "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let memory_kb =
        first_value("/proc/meminfo", "MemTotal").and_then(|text| text.split(' ').next()?.parse::<u64>().ok());
    let kernel =
        std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_else(|_| std::env::consts::OS.to_owned());
    println!("machine: {cores} cores, {processor}, {} GiB, kernel {}", memory_kb.unwrap_or(0) >> 20, kernel.trim());
    println!("build:   {} profile of the workspace, version {}", profile(), env!("CARGO_PKG_VERSION"));
}

/// The profile of this program, and so of the server that is built beside it.
const fn profile() -> &'static str {
    if cfg!(debug_assertions) { "dev" } else { "release" }
}

fn first_value(path: &str, key: &str) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    let values = text.lines().filter_map(|line| line.split_once(':'));
    values.into_iter().find(|(name, _)| name.trim() == key).map(|(_, value)| value.trim().to_owned())
}

/// Median of a 4 KiB append with `fdatasync` in `folder`, milliseconds: no durable commit can be faster.
///
/// # Errors
/// If the folder cannot be written.
pub fn sync_millis(folder: &Path) -> anyhow::Result<f64> {
    let mut file =
        tempfile::tempfile_in(folder).with_context(|| format!("failed to write in `{}`", folder.display()))?;
    let mut times = Vec::with_capacity(SYNCS);
    for _ in 0..SYNCS {
        let started = Instant::now();
        file.write_all(&[7; 4_096])?;
        file.sync_data()?;
        times.push(started.elapsed().as_secs_f64() * 1_000.0);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[SYNCS / 2])
}
