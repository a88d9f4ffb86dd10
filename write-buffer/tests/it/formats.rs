//! A stored buffer of format 1 must open for ever. It is never rewritten; a new format gets a folder of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kalamdb_model::Generation;
use kalamdb_write_buffer::{Options, Record, WriteBuffer};

use crate::support::{Stored, instance, message, open, options, scan};

/// When all of it was written.
const NOW_US: i64 = 1_732_000_000_000_000;
const MANIFEST: &[u8] = br#"{"format":1,"lastSeq":1732000000000002,"files":[]}"#;
const STATE: [(&str, &str); 2] =
    [("volume", "01jarz3ndektsv4rrffq69g5fa"), ("stream/local.1/01jarz3ndektsv4rrffq69g5fb", "7")];
const USERS: [&str; 2] = ["alice", "é/🙂"];

fn sample() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/buffer-format-1")
}

/// Copies a database, but what RocksDB makes anew.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name != "LOCK" && !name.starts_with("LOG") && !name.starts_with("OPTIONS") {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

fn stored(generation: u32, after: i64, body: &str) -> Stored {
    Stored { generation: Generation(generation), seq: NOW_US + after, body: body.to_owned() }
}

#[tokio::test]
async fn a_stored_buffer_opens_with_the_same_rows_records_and_state() {
    let directory = tempfile::tempdir().unwrap();
    copy(&sample(), &directory.path().join("db"));
    let buffer = open(directory.path());
    let (alice, other) = (instance(USERS[0]), instance(USERS[1]));
    let record =
        Record { flushed: Generation(1), active: Generation(3), last_seq: NOW_US + 4, manifest: MANIFEST.to_vec() };
    assert_eq!(buffer.record(&alice).unwrap(), Some(record));
    let rows = BTreeMap::from([(2, stored(2, 3, "in a table")), (4, stored(3, 5, "in the log"))]);
    assert_eq!(scan(&buffer, &alice, Generation(1)), rows);
    let rows = BTreeMap::from([(1, stored(1, 0, "in the log"))]);
    assert_eq!(scan(&buffer, &other, Generation(0)), rows);
    for (key, value) in STATE {
        assert_eq!(buffer.state_get(key).unwrap().as_deref(), Some(value.as_bytes()), "{key}");
    }
    // It goes on from there.
    assert_eq!(buffer.freeze(alice.clone()).await.unwrap(), Some(Generation(2)));
    let committed = buffer.commit(alice, vec![message(5, "new")]).await.unwrap();
    assert!(committed.generation == Generation(3) && committed.first_seq > NOW_US + 5, "{committed:?}");
}

/// Writes the sample if it is missing; one that is there stays as it is.
#[tokio::test]
#[ignore = "run by hand when a new kind of sample is added"]
async fn write_missing_samples() {
    if sample().exists() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let options = || Options { clock: Arc::new(|| NOW_US), ..options() };
    let (alice, other) = (instance(USERS[0]), instance(USERS[1]));
    // The next opening puts it into a table of the database.
    let buffer = WriteBuffer::open(directory.path(), options()).unwrap();
    buffer.commit(alice.clone(), (1..4).map(|id| message(id, "flushed")).collect()).await.unwrap();
    let flushed = buffer.freeze(alice.clone()).await.unwrap().unwrap();
    buffer.publish(&alice, flushed, MANIFEST).unwrap();
    buffer.reclaim(&alice, flushed).unwrap();
    buffer.commit(alice.clone(), vec![message(2, "in a table"), message(4, "in a table")]).await.unwrap();
    for (key, value) in STATE {
        buffer.state_put(key, value.as_bytes()).unwrap();
    }
    drop(buffer);
    let buffer = WriteBuffer::open(directory.path(), options()).unwrap();
    buffer.freeze(alice.clone()).await.unwrap();
    buffer.commit(alice.clone(), vec![message(4, "in the log")]).await.unwrap();
    buffer.commit(other, vec![message(1, "in the log")]).await.unwrap();
    drop(buffer);
    copy(&directory.path().join("db"), &sample());
}
