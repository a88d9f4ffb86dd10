//! What is promised when things fail: nothing acknowledged is lost, nothing is doubled, nothing is shown by halves.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, ensure};
use kalamdb_query_pod::crash::{COMPACTION_POINTS, FLUSH_POINTS};
use kalamdb_table_store::{FilesystemStore, stream};
use kalamdb_test_support::pod::{Home, MANIFESTS, Pod, data_files_below, eventually, files_below};
use serde_json::json;

const BINARY: &str = env!("CARGO_BIN_EXE_kalamdb-query-pod");

async fn insert(pod: &Pod, user: &str, ids: std::ops::Range<i64>) -> anyhow::Result<()> {
    let rows: Vec<String> = ids.clone().map(|id| format!("({id}, 'body {id} of {user}')")).collect();
    pod.run(user, &format!("INSERT INTO app.messages (id, body) VALUES {}", rows.join(", ")), json!([])).await?;
    Ok(())
}

/// Ids of `user`, in the order in which they came; each must be there once.
async fn ids(pod: &Pod, user: &str) -> anyhow::Result<Vec<i64>> {
    let rows = pod.rows(user, "SELECT id FROM app.messages ORDER BY id").await?;
    rows.iter().map(|row| Ok(row[0].as_str().context("a BIGINT is a string")?.parse()?)).collect()
}

#[tokio::test]
async fn a_pod_killed_between_any_two_steps_of_a_flush_loses_and_doubles_nothing() -> anyhow::Result<()> {
    for point in FLUSH_POINTS {
        let mut home = Home::new(BINARY, MANIFESTS)?;
        let pod = home.start().await?;
        insert(&pod, "alice", 0..20).await?;
        pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        drop(pod);

        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        insert(&pod, "alice", 20..50).await?;
        insert(&pod, "bob", 0..10).await?;
        let _ = pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.messages", json!([])).await;
        let ended = pod.wait().await?;
        ensure!(!ended.success(), "{point} was not reached");

        home.env.clear();
        let mut pod = home.start().await?;
        let check = async |pod: &Pod, upto: i64| -> anyhow::Result<()> {
            ensure!(ids(pod, "alice").await? == (0..upto).collect::<Vec<_>>(), "{point}: rows of alice");
            ensure!(ids(pod, "bob").await? == (0..10).collect::<Vec<_>>(), "{point}: rows of bob");
            Ok(())
        };
        check(&pod, 50).await?;
        insert(&pod, "alice", 50..60).await?;
        check(&pod, 60).await?;
        pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.messages", json!([])).await?.rows()?;
        check(&pod, 60).await?;
        let duplicate = pod.sql("alice", "INSERT INTO app.messages (id, body) VALUES (25, 'again')", json!([])).await?;
        ensure!(duplicate.status == 409, "{point}: {}", duplicate.body);
        pod.kill()?;
        let pod = home.start().await?;
        check(&pod, 60).await?;
    }
    Ok(())
}

/// What alice has: `id` and `body`, in order.
async fn bodies(pod: &Pod) -> anyhow::Result<serde_json::Value> {
    crate::rows(pod, "alice", "SELECT id, body FROM app.messages ORDER BY id", json!([])).await
}

/// Rows of alice that were changed and deleted in files and in the buffer, and what she has then.
async fn change(pod: &Pod) -> anyhow::Result<serde_json::Value> {
    insert(pod, "alice", 0..10).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    for sql in [
        "UPDATE app.messages SET body = 'changed' WHERE id IN (1, 2, 3)",
        "DELETE FROM app.messages WHERE id IN (4, 5)",
        "INSERT INTO app.messages (id, body) VALUES (20, 'new'), (21, 'new'), (22, 'new')",
        "UPDATE app.messages SET body = 'changed twice' WHERE id = 3 OR id = 21",
        "DELETE FROM app.messages WHERE id = 22",
        "INSERT INTO app.messages (id, body) VALUES (4, 'again')",
    ] {
        pod.run("alice", sql, json!([])).await?;
    }
    let body = |id: i64| match id {
        1 | 2 => "changed".to_owned(),
        3 | 21 => "changed twice".to_owned(),
        4 => "again".to_owned(),
        20 => "new".to_owned(),
        id => format!("body {id} of alice"),
    };
    let ids = [0, 1, 2, 3, 4, 6, 7, 8, 9, 20, 21];
    let expected = serde_json::Value::Array(ids.iter().map(|id| json!([id.to_string(), body(*id)])).collect());
    ensure!(bodies(pod).await? == expected, "before anything failed: {}", bodies(pod).await?);
    Ok(expected)
}

#[tokio::test]
async fn a_pod_killed_in_a_flush_or_a_compaction_brings_no_old_version_back() -> anyhow::Result<()> {
    let flush = FLUSH_POINTS.iter().map(|point| (*point, "STORAGE FLUSH TABLE app.messages"));
    let compaction = COMPACTION_POINTS.iter().map(|point| (*point, "STORAGE COMPACT TABLE app.messages"));
    for (point, command) in flush.chain(compaction) {
        let mut home = Home::new(BINARY, MANIFESTS)?;
        let pod = home.start().await?;
        let expected = change(&pod).await?;
        if command.contains("COMPACT") {
            pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        }
        drop(pod);
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let _ = pod.sql("alice", command, json!([])).await;
        ensure!(!pod.wait().await?.success(), "{command}: {point} was not reached");
        home.env.clear();
        let mut pod = home.start().await?;
        ensure!(bodies(&pod).await? == expected, "{command} at {point}: {}", bodies(&pod).await?);
        for again in ["STORAGE FLUSH TABLE app.messages", "STORAGE COMPACT TABLE app.messages"] {
            pod.run("alice", again, json!([])).await?;
            ensure!(bodies(&pod).await? == expected, "{command} at {point}, {again}: {}", bodies(&pod).await?);
        }
        let twice = pod.sql("alice", "INSERT INTO app.messages (id, body) VALUES (3, 'x')", json!([])).await?;
        ensure!(twice.status == 409, "{command} at {point}: {}", twice.text);
        pod.kill()?;
        let pod = home.start().await?;
        ensure!(bodies(&pod).await? == expected, "{command} at {point}, restarted: {}", bodies(&pod).await?);
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_drops_deleted_rows_brings_none_of_them_back() -> anyhow::Result<()> {
    let row = |id: i64, body: &str| json!([id.to_string(), body]);
    let kept: Vec<serde_json::Value> =
        (0..40).filter(|id| *id != 2).map(|id| row(id, if id == 1 { "changed" } else { "filed" })).collect();
    let mut later = kept.clone();
    later.insert(2, row(2, "anew"));
    later.push(row(50, "anew"));
    for point in COMPACTION_POINTS {
        let mut home = Home::new(BINARY, MANIFESTS)?;
        let pod = home.start().await?;
        for sql in [
            "INSERT INTO app.messages (id, body) SELECT value, 'filed' FROM generate_series(0, 39)",
            "STORAGE FLUSH TABLE app.messages",
            "UPDATE app.messages SET body = 'changed' WHERE id = 1",
            "DELETE FROM app.messages WHERE id = 2",
            "INSERT INTO app.messages (id, body) VALUES (50, 'short')",
            "DELETE FROM app.messages WHERE id = 50",
            "STORAGE FLUSH TABLE app.messages",
        ] {
            pod.run("alice", sql, json!([])).await?;
        }
        drop(pod);
        home.write_manifest("all.yaml", &MANIFESTS.replace("flushPolicy", "deletedRetentionHours: 0\n  flushPolicy"))?;
        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let _ = pod.sql("alice", "STORAGE COMPACT TABLE app.messages", json!([])).await;
        ensure!(!pod.wait().await?.success(), "{point} was not reached");
        home.env.clear();
        let mut pod = home.start().await?;
        ensure!(bodies(&pod).await? == json!(kept), "{point}: {}", bodies(&pod).await?);
        for sql in [
            "INSERT INTO app.messages (id, body) VALUES (2, 'anew'), (50, 'anew')",
            "STORAGE FLUSH TABLE app.messages",
            "STORAGE COMPACT TABLE app.messages",
        ] {
            pod.run("alice", sql, json!([])).await?;
            ensure!(bodies(&pod).await? == json!(later), "{point}, {sql}: {}", bodies(&pod).await?);
        }
        let described = home.data_dir().join("files/users/alice/app/messages/_manifest.json");
        let described = std::fs::read_to_string(described)?;
        ensure!(!described.contains("tombstones") && !described.contains("replaced"), "{point}: {described}");
        pod.kill()?;
        let pod = home.start().await?;
        ensure!(bodies(&pod).await? == json!(later), "{point}, restarted: {}", bodies(&pod).await?);
    }
    Ok(())
}

#[tokio::test]
async fn rows_written_while_generations_freeze_are_seen_once_at_every_moment() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = Arc::new(home.start().await?);
    pod.token("alice", "user")?;
    let (acknowledged, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let writer = {
        let (pod, acknowledged, stop) = (Arc::clone(&pod), Arc::clone(&acknowledged), Arc::clone(&stop));
        tokio::spawn(async move {
            for batch in 0..150 {
                insert(&pod, "alice", batch * 5..batch * 5 + 5).await?;
                acknowledged.store(u64::try_from(batch * 5 + 5)?, Ordering::SeqCst);
            }
            stop.store(true, Ordering::SeqCst);
            anyhow::Ok(())
        })
    };
    let flusher = {
        let (pod, stop) = (Arc::clone(&pod), Arc::clone(&stop));
        tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
            }
            anyhow::Ok(())
        })
    };
    while !stop.load(Ordering::SeqCst) && !writer.is_finished() {
        let at_least = acknowledged.load(Ordering::SeqCst);
        let seen = ids(&pod, "alice").await?;
        let expected: Vec<i64> = (0..i64::try_from(seen.len())?).collect();
        ensure!(seen == expected, "a row is missing or doubled: {seen:?}");
        ensure!(seen.len() % 5 == 0, "a statement is seen by halves: {} rows", seen.len());
        ensure!(seen.len() as u64 >= at_least, "{} rows after {at_least} were acknowledged", seen.len());
    }
    writer.await??;
    flusher.await??;
    ensure!(ids(&pod, "alice").await?.len() == 750);
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_many_users_write_keeps_every_acknowledged_row() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &MANIFESTS.replace("rows: 10000", "rows: 30"))?;
    let mut acknowledged: Vec<BTreeSet<i64>> = vec![BTreeSet::new(); 4];
    for round in 0..3_i64 {
        let mut pod = home.start().await?;
        let mut writers = Vec::new();
        for user in 0..4 {
            let token = pod.token(&format!("user{user}"), "user")?;
            let url = format!("{}/v1/api/sql", pod.url);
            writers.push(tokio::spawn(async move {
                let client = reqwest::Client::new();
                let mut done = Vec::new();
                for id in round * 100_000.. {
                    let body = json!({"sql": "INSERT INTO app.messages (id, body) VALUES ($1, 'x')", "params": [id]});
                    let sent = client.post(&url).bearer_auth(&token).json(&body).send().await;
                    match sent {
                        Ok(answer) if answer.status().is_success() => done.push(id),
                        _ => break,
                    }
                }
                done
            }));
        }
        tokio::time::sleep(std::time::Duration::from_millis(700)).await;
        pod.kill()?;
        for (user, writer) in writers.into_iter().enumerate() {
            acknowledged[user].extend(writer.await?);
        }
        let pod = home.start().await?;
        for (user, expected) in acknowledged.iter().enumerate() {
            let seen = ids(&pod, &format!("user{user}")).await?;
            let unique: BTreeSet<i64> = seen.iter().copied().collect();
            ensure!(unique.len() == seen.len(), "a row of user{user} is doubled");
            let lost: Vec<_> = expected.difference(&unique).collect();
            ensure!(lost.is_empty(), "rows of user{user} are lost: {lost:?}");
            // A statement that was cut off may have been written; at most the last one of each round.
            ensure!(unique.len() - expected.len() <= usize::try_from(round)? + 1, "rows of nobody");
        }
        ensure!(acknowledged.iter().all(|ids| ids.len() > 30), "nothing was written, so nothing was tested");
    }
    Ok(())
}

#[tokio::test]
async fn a_full_disk_refuses_writes_and_keeps_what_was_acknowledged() -> anyhow::Result<()> {
    // No file of the process may grow past 24 MiB, which is what the write buffer's log meets first.
    let folder = tempfile::tempdir()?;
    let mut home = Home::new(limited(folder.path(), 24 << 20)?, MANIFESTS)?;
    home.flags = vec!["--instance-bytes-max".to_owned(), (1_u64 << 30).to_string()];
    let mut pod = home.start().await?;
    let big = "x".repeat(1 << 20);
    let mut acknowledged = 0;
    let refused = loop {
        let sql = "INSERT INTO app.messages (id, body) VALUES ($1, $2)";
        let answer = pod.sql("alice", sql, json!([acknowledged, big])).await?;
        if answer.status != 200 {
            break answer;
        }
        acknowledged += 1;
        ensure!(acknowledged < 100, "the limit was never met");
    };
    ensure!(refused.status == 503 && refused.code() == "WRITE_FAILED", "{}", refused.body);
    ensure!(pod.get("/livez").await?.0 == 503, "only a restart helps, and Kubernetes must learn it");
    ensure!(ids(&pod, "alice").await?.len() as u64 == acknowledged, "reads go on");
    pod.kill()?;
    drop(pod);

    home.set_binary(BINARY);
    let pod = home.start().await?;
    let seen = ids(&pod, "alice").await?;
    ensure!(seen.len() as u64 == acknowledged || seen.len() as u64 == acknowledged + 1, "{seen:?}");
    ensure!(seen.iter().enumerate().all(|(index, id)| i64::try_from(index).is_ok_and(|index| index == *id)));
    Ok(())
}

/// The largest file is the write buffer's log, which grows to `limit` bytes at most in a pod started by this script.
fn limited(folder: &Path, limit: u64) -> anyhow::Result<PathBuf> {
    let script = folder.join("limited");
    let blocks = limit / 1_024;
    std::fs::write(&script, format!("#!/bin/bash\ntrap '' XFSZ\nulimit -f {blocks}\nexec '{BINARY}' \"$@\"\n"))?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

#[tokio::test]
async fn a_disk_that_fails_only_the_freeze_of_a_flush_is_told_to_kubernetes_too() -> anyhow::Result<()> {
    const LIMIT: u64 = 8 << 20;
    let folder = tempfile::tempdir()?;
    let home = Home::new(limited(folder.path(), LIMIT)?, MANIFESTS)?;
    let pod = home.start().await?;
    insert(&pod, "alice", 0..1).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    let left = || {
        let database = home.data_dir().join("buffer/db");
        let logs = files_below(&database)?.into_iter().filter(|name| name.ends_with(".log"));
        let sizes = logs.map(|name| std::fs::metadata(database.join(name)).map(|metadata| metadata.len()));
        anyhow::Ok(LIMIT - sizes.collect::<Result<Vec<u64>, _>>()?.into_iter().max().context("a log")?)
    };
    let mut next_id = 1;
    let mut fill = async |bytes: u64| -> anyhow::Result<u64> {
        let (before, body) = (left()?, "x".repeat(usize::try_from(bytes)?));
        pod.run("alice", "INSERT INTO app.messages (id, body) VALUES ($1, $2)", json!([next_id, body])).await?;
        next_id += 1;
        Ok(before - left()?)
    };
    // Up to 30 bytes below the limit: room for nothing. Within its last block the log takes as much for each row.
    while left()? > 1 << 20 {
        fill(900_000).await?;
    }
    fill(left()? - 8_192).await?;
    let overhead = fill(200).await? - 200;
    fill(left()? - 2 * overhead - 200 - 30).await?;
    fill(left()? - overhead - 30).await?;
    ensure!(left()? < 50, "{} bytes are left", left()?);
    let refused = pod.sql("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(refused.status == 503 && refused.code() == "WRITE_FAILED", "{}", refused.body);
    ensure!(pod.get("/livez").await?.0 == 503, "only a restart helps, and Kubernetes must learn it");
    Ok(())
}

#[tokio::test]
async fn a_disk_that_is_nearly_full_takes_no_writes_and_says_so() -> anyhow::Result<()> {
    let mut home = Home::new(BINARY, MANIFESTS)?;
    home.flags = vec!["--disk-reserve-bytes".to_owned(), (1_u64 << 60).to_string()];
    let pod = home.start().await?;
    let refused = pod.sql("alice", "INSERT INTO app.messages (body) VALUES ('x')", json!([])).await?;
    ensure!(refused.status == 503 && refused.code() == "DISK_FULL", "{}", refused.body);
    ensure!(pod.rows("alice", "SELECT * FROM app.messages").await?.is_empty());
    Ok(())
}

#[tokio::test]
async fn a_storage_that_does_not_answer_keeps_rows_buffered_until_it_does() -> anyhow::Result<()> {
    // A file where the storage's folder should be: nothing can be written there.
    let home = Home::new(BINARY, &MANIFESTS.replace("interval: 1h", "interval: 1s"))?;
    std::fs::create_dir_all(home.data_dir())?;
    std::fs::write(home.data_dir().join("files"), "in the way")?;
    let mut pod = home.start().await?;
    insert(&pod, "alice", 0..10).await?;
    let refused = pod.sql("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(refused.status == 503 && refused.code() == "STORAGE_UNAVAILABLE", "{}", refused.body);
    insert(&pod, "alice", 10..20).await?;
    ensure!(ids(&pod, "alice").await? == (0..20).collect::<Vec<_>>());
    pod.kill()?;
    std::fs::remove_file(home.data_dir().join("files"))?;
    let pod = home.start().await?;
    eventually("the rows are flushed by themselves", async || {
        Ok(!files_below(&home.data_dir().join("files/users"))?.is_empty())
    })
    .await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(ids(&pod, "alice").await? == (0..20).collect::<Vec<_>>());
    Ok(())
}

#[tokio::test]
async fn a_lost_file_is_an_error_and_never_fewer_rows() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = home.start().await?;
    insert(&pod, "alice", 0..10).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    insert(&pod, "alice", 10..12).await?;
    let folder = home.data_dir().join("files/users/alice/app/messages");
    let file = folder.join(data_files_below(&folder)?.first().context("a file")?);
    let bytes = std::fs::read(&file)?;
    for damage in [None, Some(&bytes[..bytes.len() / 2]), Some(&[0_u8; 64][..])] {
        std::fs::remove_file(&file)?;
        if let Some(damage) = damage {
            std::fs::write(&file, damage)?;
        }
        let answer = pod.sql("alice", "SELECT id FROM app.messages", json!([])).await?;
        ensure!(answer.status >= 500, "{}", answer.body);
        let count = pod.sql("alice", "SELECT count(body) FROM app.messages", json!([])).await?;
        ensure!(count.status >= 500, "{}", count.body);
        std::fs::write(&file, &bytes)?;
    }
    ensure!(ids(&pod, "alice").await?.len() == 12);
    Ok(())
}

#[tokio::test]
async fn a_file_of_other_rows_than_its_manifest_says_is_an_error_and_never_those_rows() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = home.start().await?;
    insert(&pod, "alice", 0..500).await?;
    insert(&pod, "bob", 0..10).await?;
    let flushed = async |user: &str| {
        pod.run(user, "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        let folder = home.data_dir().join("files/users").join(user).join("app/messages");
        anyhow::Ok(folder.join(data_files_below(&folder)?.first().context("a file")?))
    };
    let (file, other) = (flushed("alice").await?, std::fs::read(flushed("bob").await?)?);
    let bytes = std::fs::read(&file)?;
    // Parquet is read from its end: room between data and footer makes the file as long as the one that it replaces.
    let (length, _) = other.last_chunk::<8>().context("an end")?.split_first_chunk::<4>().context("a length")?;
    let footer = other.len() - 8 - usize::try_from(u32::from_le_bytes(*length))?;
    let room = vec![0_u8; bytes.len().checked_sub(other.len()).context("a longer file")?];
    std::fs::write(&file, [&other[..footer], room.as_slice(), &other[footer..]].concat())?;
    for sql in ["SELECT id FROM app.messages", "SELECT count(body) FROM app.messages"] {
        let answer = pod.sql("alice", sql, json!([])).await?;
        ensure!(answer.status >= 500, "{sql}: {}", answer.body);
    }
    ensure!(home.log().contains("has 10 rows, its manifest says 500"), "{}", home.log());
    std::fs::write(&file, &bytes)?;
    ensure!(ids(&pod, "alice").await?.len() == 500);
    Ok(())
}

#[tokio::test]
async fn a_storage_whose_folder_is_not_there_is_never_made_anew() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let mut pod = home.start().await?;
    insert(&pod, "alice", 0..10).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    let (files, away) = (home.data_dir().join("files"), home.data_dir().join("away"));
    // What lies under a disk that is not mounted: an empty folder, or none.
    for (round, mounted_on) in [(1, true), (2, false), (3, true)] {
        let unmount = || {
            std::fs::rename(&files, &away)?;
            if mounted_on { std::fs::create_dir(&files) } else { Ok(()) }
        };
        // While the pod runs, and before it starts.
        if round == 3 {
            unmount()?;
        } else {
            pod.kill()?;
            unmount()?;
            pod = home.start().await?;
        }
        let next = round * 10;
        insert(&pod, "alice", next..next + 10).await?;
        for sql in ["SELECT id FROM app.messages", "SELECT count(body) FROM app.messages"] {
            let answer = pod.sql("alice", sql, json!([])).await?;
            ensure!(answer.status >= 500, "{round}: {sql}: {}", answer.body);
        }
        if round == 3 {
            let flush = pod.sql("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
            ensure!(flush.status == 503 && flush.code() == "STORAGE_UNAVAILABLE", "{}", flush.body);
        } else {
            ensure!(home.log().contains("mount its disk"), "{round}: {}", home.log());
        }
        ensure!(files.exists() == mounted_on && files_below(&files)?.is_empty(), "{round}: the folder was made anew");

        if mounted_on {
            std::fs::remove_dir(&files)?;
        }
        std::fs::rename(&away, &files)?;
        eventually("the rows are flushed", async || {
            Ok(pod.sql("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?.status == 200)
        })
        .await?;
        ensure!(ids(&pod, "alice").await? == (0..next + 10).collect::<Vec<_>>());
    }
    Ok(())
}

/// Copies a data folder but for its files, as a backup of the volume does.
fn copy_folder(from: &Path, to: &Path) -> anyhow::Result<()> {
    for file in files_below(from)?.iter().filter(|file| !file.starts_with("files/")) {
        let copy = to.join(file);
        std::fs::create_dir_all(copy.parent().context("a file lies in a folder")?)?;
        std::fs::copy(from.join(file), copy)?;
    }
    Ok(())
}

/// Nothing is answered from the data, and Kubernetes and the operator are told why.
async fn is_disowned(pod: &Pod, because: &str) -> anyhow::Result<()> {
    for sql in [
        "SELECT id FROM app.messages",
        "SELECT count(*) FROM app.messages",
        "INSERT INTO app.messages (id, body) VALUES (100, 'x')",
        "STORAGE FLUSH TABLE app.messages",
    ] {
        let answer = pod.sql("alice", sql, json!([])).await?;
        ensure!(answer.status == 503 && answer.code() == "NOT_OWNER", "{sql}: {}", answer.body);
    }
    let (status, text) = pod.get("/readyz").await?;
    ensure!(status == 503 && text.contains(because), "{text}");
    ensure!(pod.get("/livez").await?.0 == 200, "a restart has no more right to the data");
    ensure!(pod.get("/metrics").await?.1.contains("kalamdb_disowned 1"));
    ensure!(pod.log().contains(because));
    Ok(())
}

#[tokio::test]
async fn an_older_copy_of_the_data_folder_is_not_served_and_the_newest_goes_on() -> anyhow::Result<()> {
    // What came after the copy: a flush of the same process, of rows that the copy has in part; a later process.
    for later in ["flush", "process"] {
        let home = Home::new(BINARY, MANIFESTS)?;
        let folder = tempfile::tempdir()?;
        let (older, newest) = (folder.path().join("older"), folder.path().join("newest"));
        let data = home.data_dir();
        let mut pod = home.start().await?;
        insert(&pod, "alice", 0..10).await?;
        pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        insert(&pod, "alice", 10..20).await?;
        copy_folder(&data, &older)?;
        if later == "process" {
            pod.kill()?;
            pod = home.start().await?;
        }
        insert(&pod, "alice", 20..30).await?;
        if later == "flush" {
            pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        }
        pod.kill()?;

        copy_folder(&data, &newest)?;
        std::fs::remove_dir_all(data.join("buffer"))?;
        copy_folder(&older, &data)?;
        let stored = files_below(&data.join("files"))?;
        for _ in 0..2 {
            let mut pod = home.start_listening().await?;
            is_disowned(&pod, "the data folder is an older copy").await.with_context(|| later.to_owned())?;
            pod.kill()?;
        }
        ensure!(files_below(&data.join("files"))? == stored, "{later}: the older copy wrote to the storage");

        std::fs::remove_dir_all(data.join("buffer"))?;
        copy_folder(&newest, &data)?;
        let pod = home.start().await?;
        ensure!(ids(&pod, "alice").await? == (0..30).collect::<Vec<_>>(), "{later}");
        pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        ensure!(ids(&pod, "alice").await? == (0..30).collect::<Vec<_>>(), "{later}");
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_that_was_fenced_is_not_ready_and_stays_alive_to_say_so() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let mut pod = home.start().await?;
    insert(&pod, "alice", 0..10).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    let root = home.data_dir().join("files");
    let streams = files_below(&root.join("_cluster/stream"))?;
    let incarnation = streams.first().and_then(|path| path.split('/').next()).context("a stream")?;
    stream::fence(&FilesystemStore::open_used(&root)?, incarnation, 1, "other").await?;
    insert(&pod, "alice", 10..20).await?;
    let flush = pod.sql("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(flush.status == 503 && flush.code() == "NOT_OWNER", "{}", flush.body);
    is_disowned(&pod, "another process has taken over").await?;
    pod.kill()?;
    let pod = home.start_listening().await?;
    is_disowned(&pod, "the data folder is an older copy").await
}
