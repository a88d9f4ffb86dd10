//! Processes that end in the middle of something, as `kill -9` ends them, and those that come after them, on the same
//! volume or on an empty one: every acknowledged row is there once, in its newest version, and nothing is half there.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kalamdb_model::{Catalog, OnRemoval, compile};
use kalamdb_query_pod::catalog::CatalogHandle;
use kalamdb_query_pod::crash::{
    BEGIN_POINTS, CATALOG_POINTS, CHECKPOINT_POINTS, COMMIT_POINTS, GARBAGE_POINTS, HOLD_POINTS, REBUILD_POINTS,
};
use kalamdb_query_pod::engine::{Engine, EngineLimits, Secrets, Storages};
use kalamdb_query_pod::metrics::Metrics;
use kalamdb_table_store::FilesystemStore;
use kalamdb_table_store::catalog_log::{self, Appended, CatalogLog};
use kalamdb_test_support::pod::{Home, MANIFESTS, Pod, data_files_below, eventually};
use kalamdb_write_buffer::{Options, WriteBuffer};
use serde_json::{Value, json};

use crate::world::PATIENCE;
use crate::{BINARY, declare, returns, rows, table, user_table};

const COLUMNS: [&str; 2] = ["id, type: BIGINT, primaryKey: true", "body, type: TEXT, nullable: false"];

/// Two users, each with rows in a table with `durability: local` and in one with `objectStore`.
const INSTANCES: [(&str, &str); 4] = [("alice", "messages"), ("alice", "first"), ("bob", "messages"), ("bob", "first")];

/// Rows in a file and in the buffer, changed and deleted ones among them.
const WRITTEN: [&str; 6] = [
    "INSERT INTO app.{table} (id, body) SELECT value, 'filed {user}' FROM generate_series(0, 9)",
    "STORAGE FLUSH TABLE app.{table}",
    "UPDATE app.{table} SET body = 'changed {user}' WHERE id IN (1, 2)",
    "DELETE FROM app.{table} WHERE id IN (3, 4)",
    "INSERT INTO app.{table} (id, body) VALUES (4, 'again {user}'), (10, 'new {user}'), (11, 'new {user}')",
    "DELETE FROM app.{table} WHERE id = 11",
];

/// The same once more, on top of a deletion vector.
const CHANGED: [&str; 3] = [
    "STORAGE FLUSH TABLE app.{table}",
    "UPDATE app.{table} SET body = 'late {user}' WHERE id IN (2, 5)",
    "DELETE FROM app.{table} WHERE id IN (6, 10)",
];

/// What is there then.
const BEFORE: [(i64, &str); 8] =
    [(0, "filed"), (1, "changed"), (2, "late"), (4, "again"), (5, "late"), (7, "filed"), (8, "filed"), (9, "filed")];

/// What is done after a crash.
const LATER: [&str; 6] = [
    "UPDATE app.{table} SET body = 'later {user}' WHERE id IN (0, 2)",
    "DELETE FROM app.{table} WHERE id = 1",
    "INSERT INTO app.{table} (id, body) VALUES (3, 'back {user}'), (20, 'later {user}')",
    "STORAGE FLUSH TABLE app.{table}",
    "UPDATE app.{table} SET body = 'last {user}' WHERE id = 7",
    "STORAGE COMPACT TABLE app.{table}",
];

/// What is there then.
const AFTER: [(i64, &str); 9] = [
    (0, "later"),
    (2, "later"),
    (3, "back"),
    (4, "again"),
    (5, "late"),
    (7, "last"),
    (8, "filed"),
    (9, "filed"),
    (20, "later"),
];

/// Pods as in a cluster, with the tables of [`INSTANCES`] in a storage of its own.
async fn cluster() -> anyhow::Result<(Home, tempfile::TempDir)> {
    let folders = tempfile::tempdir()?;
    let (store, files) = (folders.path().join("home"), folders.path().join("files"));
    let more = ["durability: objectStore", "flushPolicy: {rows: 10000, interval: 1h}"];
    let first = table("UserTable", "first", &COLUMNS, &more);
    let manifests = MANIFESTS.replace("./files", &files.display().to_string()) + &first;
    let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), manifests)]);
    let (compiled, outcomes) = compile(&Catalog::default(), &folder.declared, OnRemoval::FollowPolicy);
    ensure!(outcomes.iter().all(|outcome| outcome.verdict.is_ok()), "{outcomes:?}");
    let catalog = Catalog { nonce: catalog_log::nonce(), ..compiled };
    let log = FilesystemStore::open(&store)?;
    let appended = CatalogLog::append(&log, &Catalog::default(), &catalog, "operator").await?;
    ensure!(appended == Appended::Ours, "{appended:?}");
    Ok((Home::in_cluster(BINARY, &format!("file://{}", store.display()))?, folders))
}

/// Processes that each do their statements and stop when all is stored. The first also writes more than one part of a
/// checkpoint holds, for the user who comes first in it.
async fn work(home: &Home, processes: &[&[&str]]) -> anyhow::Result<()> {
    for (at, statements) in processes.iter().enumerate() {
        let mut pod = home.start().await?;
        let (filler, body) = (if at == 0 { 9 } else { 0 }, "x".repeat(1 << 20));
        for id in 0..filler {
            let sql = "INSERT INTO app.messages (id, body) VALUES ($1, $2)";
            pod.run("aa", sql, json!([id, body])).await?;
        }
        on_each(&pod, statements).await?;
        let complete = async || Ok(pod.get("/metrics").await?.1.contains("kalamdb_checkpoints_total 1\n"));
        eventually("its checkpoint is complete", complete).await?;
        ensure!(pod.stop().await?.success());
    }
    Ok(())
}

async fn on_each(pod: &Pod, statements: &[&str]) -> anyhow::Result<()> {
    for (user, table) in INSTANCES {
        for sql in statements {
            pod.run(user, &sql.replace("{table}", table).replace("{user}", user), json!([])).await?;
        }
    }
    Ok(())
}

/// The pod's volume is lost.
fn lose(home: &Home) -> anyhow::Result<()> {
    Ok(std::fs::remove_dir_all(home.data_dir())?)
}

/// A pod that has read back what it has to.
async fn answering(home: &Home) -> anyhow::Result<Pod> {
    let pod = home.start().await?;
    let sql = "SELECT count(*) FROM app.messages";
    eventually("rows are shown", async || Ok(pod.sql("alice", sql, json!([])).await?.status == 200)).await?;
    Ok(pod)
}

/// Checks that everybody sees these rows below id 1,000 and no others, and that none of them can be inserted again.
async fn holds(pod: &Pod, expected: &[(i64, &str)]) -> anyhow::Result<()> {
    for (user, table) in INSTANCES {
        let row = |(id, body): &(i64, &str)| json!([id.to_string(), format!("{body} {user}")]);
        let sql = format!("SELECT id, body FROM app.{table} WHERE id < 1000 ORDER BY id");
        returns(pod, user, &sql, expected.iter().map(row).collect()).await.context(user)?;
        let sql = format!("INSERT INTO app.{table} (id, body) VALUES (9, 'twice')");
        let twice = pod.sql(user, &sql, json!([])).await?;
        ensure!(twice.status == 409, "{user}, {sql}: {}", twice.text);
    }
    returns(pod, "aa", "SELECT count(body) FROM app.messages", json!([["9"]])).await
}

/// Checks that a pod goes on from what was there before the crash, and one on an empty volume, which it returns, from
/// that.
async fn goes_on(home: &Home) -> anyhow::Result<Pod> {
    let mut pod = answering(home).await?;
    holds(&pod, &BEFORE).await?;
    on_each(&pod, &LATER).await?;
    holds(&pod, &AFTER).await?;
    ensure!(pod.stop().await?.success());
    lose(home)?;
    let pod = answering(home).await?;
    holds(&pod, &AFTER).await.context("on an empty volume")?;
    Ok(pod)
}

#[tokio::test]
async fn a_pod_killed_between_any_two_steps_of_a_commit_has_each_statement_whole_or_not() -> anyhow::Result<()> {
    for (point, lost) in COMMIT_POINTS.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let what = format!("{point}, volume lost: {lost}");
        let (mut home, _folders) = cluster().await?;
        work(&home, &[&WRITTEN, &CHANGED]).await?;
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let mut acknowledged = Vec::new();
        for table in ["messages", "first"] {
            let sql = format!("INSERT INTO app.{table} (id, body) SELECT value, 'x' FROM generate_series(1000, 1004)");
            if pod.sql("alice", &sql, json!([])).await.is_ok_and(|answer| answer.status == 200) {
                acknowledged.push(table);
            }
        }
        ensure!(!pod.wait().await?.success(), "{point} was not reached");
        home.env.clear();
        if lost {
            lose(&home)?;
        }
        let shown = async |pod: &Pod, table: &str| {
            rows(pod, "alice", &format!("SELECT count(*) FROM app.{table} WHERE id >= 1000"), json!([])).await
        };
        let mut pod = answering(&home).await?;
        let mut found = Vec::new();
        for table in ["messages", "first"] {
            let count = shown(&pod, table).await?;
            // What a table with `local` has acknowledged at last goes with the volume.
            let is_due = acknowledged.contains(&table) && (table == "first" || !lost);
            ensure!(count == json!([["5"]]) || (!is_due && count == json!([["0"]])), "{what}: {count} of `{table}`");
            found.push((table, count));
        }
        ensure!(pod.stop().await?.success());
        let pod = goes_on(&home).await.context(what.clone())?;
        for (table, count) in found {
            let later = shown(&pod, table).await?;
            ensure!(later == count, "{what}: {count} of `{table}` at first, {later} in the end");
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_uses_a_storage_for_the_first_time_is_no_stranger_there() -> anyhow::Result<()> {
    for (point, lost) in HOLD_POINTS.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let (mut home, _folders) = cluster().await?;
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let sql = "INSERT INTO app.first (id, body) VALUES (0, 'never')";
        let acknowledged = pod.sql("alice", sql, json!([])).await.is_ok_and(|answer| answer.status == 200);
        ensure!(!acknowledged && !pod.wait().await?.success(), "{point} was not reached");
        home.env.clear();
        if lost {
            lose(&home)?;
        }
        work(&home, &[&WRITTEN, &CHANGED]).await?;
        goes_on(&home).await.with_context(|| format!("{point}, volume lost: {lost}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_takes_up_what_a_killed_one_has_left_loses_and_doubles_nothing() -> anyhow::Result<()> {
    for (point, lost) in BEGIN_POINTS.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let (mut home, _folders) = cluster().await?;
        work(&home, &[&WRITTEN, &CHANGED]).await?;
        // What it has committed is published nowhere.
        home.env = Home::crash_at("flush.committed");
        let mut pod = home.start().await?;
        let _ = pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.messages", json!([])).await;
        ensure!(!pod.wait().await?.success(), "nothing was committed");
        home.env.clear();
        home.crash(point).await?;
        if lost {
            lose(&home)?;
        }
        goes_on(&home).await.with_context(|| format!("{point}, volume lost: {lost}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_between_any_two_steps_of_a_checkpoint_loses_and_doubles_nothing() -> anyhow::Result<()> {
    for (point, lost) in CHECKPOINT_POINTS.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let (mut home, _folders) = cluster().await?;
        work(&home, &[&[&WRITTEN[..], &CHANGED[..]].concat()]).await?;
        home.crash(point).await?;
        if lost {
            lose(&home)?;
        }
        goes_on(&home).await.with_context(|| format!("{point}, volume lost: {lost}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_reads_a_storage_back_is_no_reason_that_anything_is_missing() -> anyhow::Result<()> {
    for (point, lost) in REBUILD_POINTS.into_iter().flat_map(|point| [(point, false), (point, true)]) {
        let (mut home, _folders) = cluster().await?;
        // In a checkpoint, and in a stream behind it.
        work(&home, &[&WRITTEN, &CHANGED]).await?;
        lose(&home)?;
        home.crash(point).await?;
        if lost {
            lose(&home)?;
        }
        goes_on(&home).await.with_context(|| format!("{point}, volume lost again: {lost}"))?;
    }
    Ok(())
}

/// Files with rows of two users, of whom each has changed some since.
async fn filed(home: &Home) -> anyhow::Result<Value> {
    let pod = home.start().await?;
    for user in ["alice", "bob"] {
        for sql in [
            "INSERT INTO app.messages (id, body) SELECT value, 'filed' FROM generate_series(0, 9)",
            "STORAGE FLUSH TABLE app.messages",
            "INSERT INTO app.messages (id, body) SELECT value, 'filed' FROM generate_series(10, 19)",
            "STORAGE FLUSH TABLE app.messages",
            "UPDATE app.messages SET body = 'changed' WHERE id IN (1, 11)",
            "DELETE FROM app.messages WHERE id IN (2, 12)",
        ] {
            pod.run(user, sql, json!([])).await?;
        }
    }
    let body = |id: i64| if id == 1 || id == 11 { "changed" } else { "filed" };
    let ids = (0..20).filter(|id| *id != 2 && *id != 12);
    Ok(ids.map(|id| json!([id.to_string(), body(id)])).collect())
}

async fn both_see(pod: &Pod, expected: &Value, what: &str) -> anyhow::Result<()> {
    for user in ["alice", "bob"] {
        let sql = "SELECT id, body FROM app.messages ORDER BY id";
        returns(pod, user, sql, expected.clone()).await.with_context(|| format!("{what}, {user}"))?;
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_removes_replaced_files_has_them_removed_later_and_no_others() -> anyhow::Result<()> {
    for point in GARBAGE_POINTS {
        let mut home = Home::new(BINARY, MANIFESTS)?;
        // Not 0: a query that began before has to find them.
        home.flags = ["--garbage-after-secs", "1"].map(str::to_owned).to_vec();
        let expected = filed(&home).await?;
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let _ = pod.sql_as("root", "dba", "STORAGE COMPACT TABLE app.messages", json!([])).await;
        ensure!(!pod.wait().await?.success(), "{point} was not reached");
        home.env.clear();
        let mut pod = home.start().await?;
        both_see(&pod, &expected, point).await?;
        for sql in ["STORAGE COMPACT TABLE app.messages", "STORAGE FLUSH TABLE app.messages"] {
            pod.sql_as("root", "dba", sql, json!([])).await?.rows()?;
            both_see(&pod, &expected, point).await?;
        }
        pod.sql_as("root", "dba", "STORAGE COMPACT TABLE app.messages", json!([])).await?.rows()?;
        let files = home.data_dir().join("files/users");
        eventually(&format!("{point}: each has one file"), async || Ok(data_files_below(&files)?.len() == 2)).await?;
        both_see(&pod, &expected, point).await?;
        ensure!(pod.stop().await?.success());
        let buffer = WriteBuffer::open(&home.data_dir().join("buffer"), Options::default())?;
        let notes = buffer.state_scan("garbage/")?;
        ensure!(notes.is_empty(), "{point}: {} notes are left", notes.len());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_killed_pod_has_uploaded_for_nobody_is_removed_and_nothing_else() -> anyhow::Result<()> {
    for (point, command) in [("flush.uploaded", "FLUSH"), ("compact.uploaded", "COMPACT")] {
        let mut home = Home::new(BINARY, MANIFESTS)?;
        let expected = filed(&home).await?;
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let _ = pod.sql("alice", &format!("STORAGE {command} TABLE app.messages"), json!([])).await;
        ensure!(!pod.wait().await?.success(), "{point} was not reached");
        home.env.clear();
        let engine = open(&home)?;
        engine.open_known_streams(PATIENCE).await?;
        let mut removed = 0;
        eventually(&format!("{point}: the file is removed"), async || {
            removed += engine.collect_orphans().await?;
            Ok(removed > 0)
        })
        .await?;
        ensure!(removed == 1 && engine.collect_orphans().await? == 0, "{point}: {removed} files are removed");
        engine.close(Duration::from_secs(5)).await;
        drop(engine);
        both_see(&home.start().await?, &expected, point).await?;
    }
    Ok(())
}

/// The data plane of a pod that has ended, in this process. Files that nobody names need not be old.
fn open(home: &Home) -> anyhow::Result<Arc<Engine>> {
    let data_dir = home.data_dir();
    let limits = EngineLimits {
        instance_bytes_max: 64 << 20,
        disk_reserve_bytes: 0,
        buffered_bytes_max: 1 << 30,
        flushes_max: 4,
        garbage_after_secs: 3_600,
        orphans_after_secs: 0,
    };
    let storages = Storages::new(data_dir.clone(), Secrets::default());
    Ok(Engine::open(&data_dir, CatalogHandle::open(&data_dir)?, storages, limits, Arc::new(Metrics::default()))?)
}

#[tokio::test]
async fn a_pod_killed_while_it_takes_a_new_catalog_starts_with_one_that_fits_its_rows() -> anyhow::Result<()> {
    for point in CATALOG_POINTS {
        let mut home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
        let pod = home.start().await?;
        for sql in
            ["INSERT INTO app.t VALUES (1, 'a')", "STORAGE FLUSH TABLE app.t", "INSERT INTO app.t VALUES (2, 'b')"]
        {
            pod.run("alice", sql, json!([])).await?;
        }
        drop(pod);
        home.write_manifest("more.yaml", &user_table("later", &COLUMNS))?;
        home.crash(point).await?;
        let mut pod = home.start().await?;
        pod.run("alice", "INSERT INTO app.later VALUES (1, 'c')", json!([])).await.context(point)?;
        for restarted in [false, true] {
            if restarted {
                pod.kill()?;
                pod = home.start().await?;
            }
            returns(&pod, "alice", "SELECT * FROM app.t ORDER BY id", json!([["1", "a"], ["2", "b"]])).await?;
            returns(&pod, "alice", "SELECT * FROM app.later", json!([["1", "c"]])).await?;
        }
    }
    Ok(())
}
