//! Other processes: killed ones, second ones, and ones whose disk fails. Children are this test program again.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use kalamdb_model::Generation;
use kalamdb_write_buffer::{CommitError, OpenError, WriteBuffer};

use crate::support::{Stored, instance, message, open, options, pk, scan, scan_generation};

/// Names the directory for a child; without it the children's tests do nothing.
const DIRECTORY: &str = "KALAMDB_TEST_DIRECTORY";
/// In which a child starts to count.
const FIRST: &str = "KALAMDB_TEST_FIRST";
const NONE: Generation = Generation(0);
const STATEMENT_ROWS: i64 = 3;
const WRITERS: i64 = 8;

fn child_directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY).map(PathBuf::from)
}

fn spawn(program: &mut Command, test: &str, directory: &Path, first: i64) -> (Child, BufReader<ChildStdout>) {
    let mut child = program
        .args([&format!("crash::{test}"), "--exact", "--nocapture", "--test-threads=1"])
        .env(DIRECTORY, directory)
        .env(FIRST, first.to_string())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

fn this_program() -> Command {
    Command::new(std::env::current_exe().unwrap())
}

/// Tells the parent, in one write, so that no line is torn by the kill.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("\n{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

fn statement(of: i64) -> Vec<kalamdb_write_buffer::EncodedRow> {
    (0..STATEMENT_ROWS).map(|part| message(of * STATEMENT_ROWS + part, &of.to_string())).collect()
}

fn first_statement() -> i64 {
    std::env::var(FIRST).unwrap().parse().unwrap()
}

/// Child: statements of eight writers without end, each said when acknowledged, and flushes in between.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn child_writes_and_flushes_until_it_is_killed() {
    let Some(directory) = child_directory() else { return };
    let buffer = open(&directory);
    for writer in 0..WRITERS {
        let buffer = buffer.clone();
        tokio::spawn(async move {
            for count in 0.. {
                let of = first_statement() + count * WRITERS + writer;
                buffer.commit(instance("alice"), statement(of)).await.unwrap();
                say(&format!("stored {of}"));
            }
        });
    }
    loop {
        flush(&buffer, &directory).await;
    }
}

/// As a query pod does it: file, fsync, publication (its manifest: how many files), removal.
async fn flush(buffer: &WriteBuffer, directory: &Path) {
    let alice = instance("alice");
    let Some(frozen) = buffer.freeze(alice.clone()).await.unwrap() else { return };
    let rows = scan_generation(buffer, &alice, frozen);
    let mut file = File::create(file_of(directory, frozen)).unwrap();
    for (id, stored) in &rows {
        writeln!(file, "{id} {} {}", stored.seq, stored.body).unwrap();
    }
    file.sync_all().unwrap();
    buffer.publish(&alice, frozen, &frozen.0.to_le_bytes()).unwrap();
    buffer.reclaim(&alice, frozen).unwrap();
}

fn file_of(directory: &Path, generation: Generation) -> PathBuf {
    directory.join(format!("file-{}", generation.0))
}

/// All rows of files that are published; a row in two of them fails.
fn filed(buffer: &WriteBuffer, directory: &Path) -> (Generation, BTreeMap<i64, Stored>) {
    let Some(record) = buffer.record(&instance("alice")).unwrap() else { return (NONE, BTreeMap::new()) };
    let mut rows = BTreeMap::new();
    for generation in (1..=record.flushed.0).map(Generation) {
        for line in std::fs::read_to_string(file_of(directory, generation)).unwrap().lines() {
            let [id, seq, body] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line}") };
            let stored = Stored { generation, seq: seq.parse().unwrap(), body: body.into() };
            assert_eq!(rows.insert(id.parse().unwrap(), stored), None, "row {id} is in two files");
        }
    }
    (record.flushed, rows)
}

/// Every acknowledged statement whole, exactly once, every other whole or absent, no `_seq` twice. Returns the rows.
fn check(directory: &Path, acknowledged: &BTreeSet<i64>) -> usize {
    let buffer = open(directory);
    let (flushed, mut rows) = filed(&buffer, directory);
    for (id, stored) in scan(&buffer, &instance("alice"), flushed) {
        assert_eq!(rows.insert(id, stored), None, "row {id} is in a file and in the buffer");
    }
    for of in acknowledged {
        assert!(rows.contains_key(&(of * STATEMENT_ROWS)), "acknowledged statement {of} is lost");
    }
    for (id, stored) in &rows {
        let first = id - id % STATEMENT_ROWS;
        assert_eq!(stored.body, (id / STATEMENT_ROWS).to_string());
        let whole = (first..first + STATEMENT_ROWS).map(|part| rows.get(&part).map(|row| row.generation));
        assert!(
            whole.clone().all(|of| of == Some(stored.generation)),
            "half of {first}: {:?}",
            whole.collect::<Vec<_>>()
        );
    }
    let seqs: BTreeSet<i64> = rows.values().map(|stored| stored.seq).collect();
    assert_eq!(seqs.len(), rows.len(), "a `_seq` was given twice");
    rows.len()
}

fn stored_in(line: &str) -> Option<i64> {
    line.strip_prefix("stored ")?.parse().ok()
}

#[test]
fn after_kill_9_every_acknowledged_row_is_there_exactly_once_and_nothing_half() {
    let directory = tempfile::tempdir().unwrap();
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let mut acknowledged = BTreeSet::new();
    let mut random = u64::from(seed) | 1;
    for round in 0..8 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let kill_after = usize::try_from(random >> 33).unwrap() % 400 + 1;
        let first = round * 10_000_000;
        let test = "child_writes_and_flushes_until_it_is_killed";
        let (mut child, output) = spawn(&mut this_program(), test, directory.path(), first);
        let mut lines = output.lines().map_while(Result::ok).filter_map(|line| stored_in(&line));
        acknowledged.extend(lines.by_ref().take(kill_after));
        child.kill().unwrap();
        child.wait().unwrap();
        // What it said before it died counts, too.
        acknowledged.extend(lines);
        let rows = check(directory.path(), &acknowledged);
        println!("round {round}: killed after {kill_after}, {} acknowledged, {rows} rows", acknowledged.len());
    }
    assert!(acknowledged.len() > 8);
}

/// Child: opens, says so, and waits to be killed.
#[test]
fn child_holds_the_directory() {
    let Some(directory) = child_directory() else { return };
    let _buffer = open(&directory);
    say("open");
    std::thread::sleep(std::time::Duration::from_secs(600));
}

#[test]
fn a_second_process_is_refused_and_told_the_pid_of_the_first() {
    let directory = tempfile::tempdir().unwrap();
    let (mut child, output) = spawn(&mut this_program(), "child_holds_the_directory", directory.path(), 0);
    assert!(output.lines().map_while(Result::ok).any(|line| line == "open"));
    let error = WriteBuffer::open(directory.path(), options()).expect_err("in use");
    assert!(matches!(error, OpenError::Locked { pid: Some(pid), .. } if pid == child.id()), "{error}");
    assert!(error.to_string().contains(&format!("pid {}", child.id())), "{error}");
    child.kill().unwrap();
    child.wait().unwrap();
    drop(open(directory.path()));
}

#[test]
fn a_second_opening_in_the_same_process_is_refused_too() {
    let directory = tempfile::tempdir().unwrap();
    let first = open(directory.path());
    let error = WriteBuffer::open(directory.path(), options()).expect_err("in use");
    assert!(matches!(error, OpenError::Locked { pid: Some(pid), .. } if pid == std::process::id()), "{error}");
    drop(first);
    drop(open(directory.path()));
}

/// Child: statements until the disk fails, and some after; then its counters must be those of what it acknowledged.
#[tokio::test]
async fn child_writes_until_its_disk_fails() {
    let Some(directory) = child_directory() else { return };
    let buffer = open(&directory);
    let mut stored: u64 = 0;
    let mut failures = 0;
    for of in 0.. {
        let mut rows = statement(of);
        rows[0] = message(of * STATEMENT_ROWS, &of.to_string());
        rows.push(message(-1 - of, &"x".repeat(100_000)));
        match buffer.commit(instance("alice"), rows[..3].to_vec()).await {
            Ok(_) => {
                stored += 3;
                say(&format!("stored {of}"));
            }
            Err(CommitError::Write { source }) => {
                failures += 1;
                say(&format!("failed {of} {source}"));
            }
            Err(other) => panic!("{other}"),
        }
        // Fills the disk.
        let _ballast = buffer.commit(instance("ballast"), rows[3..].to_vec()).await;
        if failures == 5 {
            break;
        }
    }
    assert_eq!(buffer.counters(&instance("alice")).unwrap().rows, stored);
    assert_eq!(u64::try_from(scan(&buffer, &instance("alice"), NONE).len()).unwrap(), stored);
    say("right");
}

/// A limit on file sizes makes the write-ahead log fail, as a full disk does.
#[test]
fn when_the_disk_fails_statements_fail_with_the_cause_and_nothing_acknowledged_is_lost() {
    let directory = tempfile::tempdir().unwrap();
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 8192; exec \"$0\" \"$@\""]).arg(std::env::current_exe().unwrap());
    let (mut child, output) = spawn(&mut limited, "child_writes_until_its_disk_fails", directory.path(), 0);
    let lines: Vec<String> = output.lines().map_while(Result::ok).collect();
    let _status = child.wait().unwrap();
    let acknowledged: BTreeSet<i64> = lines.iter().filter_map(|line| stored_in(line)).collect();
    let failed: Vec<&String> = lines.iter().filter(|line| line.starts_with("failed ")).collect();
    assert_eq!(failed.len(), 5, "{lines:?}");
    assert!(lines.iter().any(|line| line == "right"), "the counters of the failing process were wrong: {lines:?}");
    let rows = check(directory.path(), &acknowledged);
    println!("{} acknowledged, {rows} rows; {failed:?}", acknowledged.len());
    let buffer = open(directory.path());
    assert!(buffer.get(&instance("alice"), NONE, &pk(0)).unwrap().is_some());
}
