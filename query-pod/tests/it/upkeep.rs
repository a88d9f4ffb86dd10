//! What the pod does by itself: it tells about it, and it comes to those, too, who do nothing.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use kalamdb_model::Owner;
use kalamdb_query_pod::engine::{Engine, JobKind, JobState, WriteError};
use kalamdb_table_store::paths;
use kalamdb_test_support::fault_store::Rates;
use kalamdb_test_support::pod::{Home, MANIFESTS, eventually};
use object_store::ObjectStoreExt as _;
use serde_json::json;

use crate::world::{World, contents, data_files, insert, message, user};
use crate::{BINARY, refusal, refused};

#[tokio::test]
async fn jobs_are_shown_to_those_who_run_the_pod_and_to_nobody_else() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = home.start().await?;
    for (name, rows) in [("alice", "(1, 'a'), (2, 'b')"), ("bob", "(1, 'c')")] {
        pod.run(name, &format!("INSERT INTO app.messages (id, body) VALUES {rows}"), json!([])).await?;
    }
    let before = pod.sql_as("root", "dba", "SELECT count(*) FROM system.jobs", json!([])).await?;
    ensure!(json!(before.rows()?) == json!([["0"]]), "{}", before.text);
    pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.messages", json!([])).await?.rows()?;
    let sql = "SELECT kind, table_name, users, rows, bytes > 0, state, error, ended_at >= started_at, job_id FROM system.jobs";
    let shown = pod.sql_as("root", "dba", sql, json!([])).await?;
    let job = shown.rows()?[0].clone();
    let id = job[8].as_str().context("its id")?.to_owned();
    ensure!(json!(job) == json!(["flush", "app.messages", "2", "3", true, "done", null, true, id]), "{}", shown.text);
    for role in ["user", "service"] {
        let answer = pod.sql_as("alice", role, sql, json!([])).await?;
        refusal(sql, &answer, 403, "PERMISSION_DENIED")?;
    }
    refused(&pod, "SELECT * FROM system.nothing", json!([]), 404, "TABLE_NOT_FOUND").await?;
    refused(&pod, &format!("CANCEL JOB '{id}'"), json!([]), 403, "PERMISSION_DENIED").await?;
    let ended = pod.sql_as("root", "dba", &format!("CANCEL JOB '{id}';"), json!([])).await?;
    refusal("CANCEL JOB", &ended, 409, "JOB_NOT_CANCELLABLE")?;
    let unknown = pod.sql_as("root", "dba", "cancel job 'x'", json!([])).await?;
    ensure!(refusal("cancel job", &unknown, 404, "JOB_NOT_FOUND")?.contains("`x`"), "{}", unknown.text);
    for sql in ["CANCEL", "CANCEL JOB", "CANCEL JOB x", "CANCEL JOB 'x' 'y'"] {
        refused(&pod, sql, json!([]), 400, "SYNTAX_ERROR").await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_fails_is_a_job_that_says_why() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    engine.flush(&Engine::instance_id(&table, &owner)).await?;
    world.faults.set_down(true);
    insert(&engine, &table, &owner, 2).await?;
    let flushing = engine.flush(&Engine::instance_id(&table, &owner)).await;
    ensure!(flushing.is_err());
    let failed = engine.jobs().all().pop().context("a job")?;
    ensure!(failed.state == JobState::Failed && failed.error.is_some_and(|error| error.contains("upload")));
    world.faults.set_down(false);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deleted_rows_whose_time_is_over_leave_the_files_of_idle_users_too() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let kept = MANIFESTS.to_owned();
    let dropped = MANIFESTS.replace("flushPolicy", "deletedRetentionHours: 0\n  flushPolicy");
    let (owner, idle) = (user("alice")?, user("bob")?);
    let (engine, table) = world.open_with(&kept)?;
    for owner in [&owner, &idle] {
        for id in 0..10 {
            insert(&engine, &table, owner, id).await?;
        }
        let deleted = (0..3).map(|id| message(&table, id, "secret")).collect();
        engine.write(&table, owner).await?.commit(Vec::new(), deleted).await?;
        engine.flush(&Engine::instance_id(&table, owner)).await?;
    }
    engine.sweep().await?;
    ensure!(engine.jobs().all().iter().all(|job| job.kind == JobKind::Flush), "deleted rows are kept for ever");
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let (engine, table) = world.open_with(&dropped)?;
    engine.sweep().await?;
    for owner in [&owner, &idle] {
        let rows = engine.read(&table, owner, vec![0], None).await?;
        let files = &rows.view.manifest.files;
        ensure!(files.len() == 1 && files[0].rows == 7 && files[0].tombstones.is_empty(), "{files:?}");
        ensure!(contents(&world, &engine, &table, owner).await?.len() == 7);
    }
    let jobs = engine.jobs().all();
    ensure!(jobs.iter().any(|job| job.kind == JobKind::Retention && job.users == 2 && job.rows == 14), "{jobs:?}");
    let prefix = paths::instance_prefix(&table.location, &idle)?;
    eventually("the files with deleted rows are gone", async || Ok(data_files(&world, &prefix).await?.len() == 1))
        .await?;
    ensure!(engine.jobs().all().iter().any(|job| job.kind == JobKind::Garbage && job.bytes > 0));
    let there = world.truth.head(&paths::outside_manifest(&prefix)).await;
    ensure!(there.is_ok(), "the manifest for outside readers stays");
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_nobody_names_are_removed_and_no_others() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    let before = ulid::Ulid::generate();
    // The first use of the storage comes later, by the clock of names too.
    tokio::time::sleep(Duration::from_millis(2)).await;
    for id in 0..3 {
        insert(&engine, &table, &owner, id).await?;
        engine.flush(&Engine::instance_id(&table, &owner)).await?;
    }
    let put = async |path: &object_store::path::Path| world.truth.put(path, "x".into()).await;
    let in_folder_of = |name: &str| anyhow::Ok(paths::instance_prefix(&table.location, &user(name)?)?);
    let name = || ulid::Ulid::generate().to_string();
    let (mut gone, mut kept) = (Vec::new(), Vec::new());
    for user in ["alice", "é/🙂", "nobody"] {
        gone.push(paths::data_file(&in_folder_of(user)?, 1, 1, &name()));
        kept.push(paths::data_file(&in_folder_of(user)?, 1, 1, &before.to_string()));
        kept.push(in_folder_of(user)?.join("mine.parquet"));
    }
    kept.push(paths::data_file(&"users/alice/app/other".into(), 1, 1, &name()));
    kept.push(paths::data_file(&"users/alice/app".into(), 1, 1, &name()));
    kept.push(paths::data_file(&"elsewhere".into(), 1, 1, &name()));
    for path in gone.iter().chain(&kept) {
        put(path).await?;
    }
    let live = engine.read(&table, &owner, vec![0], None).await?;
    ensure!(engine.collect_orphans().await? == gone.len() as u64);
    for path in &gone {
        ensure!(world.truth.head(path).await.is_err(), "{path} is there");
    }
    for path in &kept {
        ensure!(world.truth.head(path).await.is_ok(), "{path} is gone");
    }
    for file in &live.view.manifest.files {
        ensure!(world.truth.head(&file.path.as_str().into()).await.is_ok(), "{} is gone", file.path);
    }
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 3 && engine.collect_orphans().await? == 0);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_all_buffers_together_are_full_the_largest_go_first() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    world.buffered_bytes_max = 800_000;
    let (engine, table) = world.open()?;
    let put = async |owner: &Owner, id: i64, bytes: usize| {
        let row = message(&table, id, &"x".repeat(bytes));
        engine.write(&table, owner).await?.insert(vec![row]).await
    };
    let (small, large) = (user("small")?, user("large")?);
    for id in 0..4 {
        put(&small, id, 5_000).await?;
    }
    for id in 0..20 {
        put(&large, id, 10_000).await?;
    }
    eventually("the larger one is flushed", async || Ok(engine.buffered().1 == 1)).await?;
    ensure!(engine.read(&table, &small, vec![0], None).await?.view.manifest.files.is_empty(), "the small one stays");
    ensure!(engine.read(&table, &large, vec![0], None).await?.view.manifest.files.len() == 1);
    // While no storage takes anything, writes are refused beyond the limit, and nothing of them is there.
    world.faults.set_down(true);
    let mut written = 0;
    let refused = loop {
        match put(&large, 100 + written, 10_000).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    ensure!(matches!(refused, WriteError::PodFull { limit: 800_000, .. }) && written < 80, "{refused:?}, {written}");
    world.faults.set_down(false);
    eventually("there is room again", async || Ok(put(&large, 100 + written, 10_000).await.is_ok())).await?;
    ensure!(contents(&world, &engine, &table, &large).await?.len() == 21 + usize::try_from(written)?);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}
