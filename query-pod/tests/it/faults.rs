//! The data plane over a store that fails before and after success: nothing lost, nothing doubled.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use arrow::array::AsArray as _;
use kalamdb_model::{Generation, OnRemoval, Value, compile, key};
use kalamdb_query_pod::engine::{Disowned, Engine, FlushError, NewRow, ReadError};
use kalamdb_table_store::Edit;
use kalamdb_table_store::stream::{self, Round, StreamWriter};
use kalamdb_test_support::fault_store::{Fault, Rates};
use kalamdb_test_support::pod::{MANIFESTS, eventually};
use kalamdb_write_buffer::{Options, WriteBuffer, row};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::world::{PATIENCE, World, insert, seen, user};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn flushes_over_a_failing_store_lose_and_double_nothing_across_restarts() -> anyhow::Result<()> {
    let seed: u64 = std::env::var("KALAMDB_SEED").ok().map_or(20_261_121, |text| text.parse().unwrap());
    println!("seed {seed} (set KALAMDB_SEED to repeat another)");
    for round in 0..4 {
        let rates = Rates { before: 0.2, after: 0.2, ..Rates::default() };
        let world = World::new(seed + round, rates)?;
        let mut expected: Vec<BTreeSet<i64>> = vec![BTreeSet::new(); 3];
        for start in 0..3_i64 {
            let (engine, table) = world.open()?;
            for step in 0..6_i64 {
                for (at, name) in ["alice", "bob", "é/🙂"].into_iter().enumerate() {
                    let owner = user(name)?;
                    for id in 0..3 {
                        let id = start * 1_000 + step * 10 + id;
                        // A lookup over the failing store may fail the write; then it has not happened.
                        if insert(&engine, &table, &owner, id).await.is_ok() {
                            expected[at].insert(id);
                        }
                    }
                    let _ = tokio::time::timeout(
                        Duration::from_millis(1_500),
                        engine.flush(&Engine::instance_id(&table, &owner)),
                    )
                    .await;
                    let now = seen(&world, &engine, &table, &owner).await?;
                    let wanted: Vec<i64> = expected[at].iter().copied().collect();
                    ensure!(now == wanted, "seed {}: {name} sees {now:?}, expected {wanted:?}", seed + round);
                }
            }
            engine.close(Duration::from_millis(100)).await;
        }
        ensure!(world.faults.faults() > 10, "the store did not fail, so nothing was tested");
        world.faults.heal();
        let (engine, table) = world.open()?;
        for (at, name) in ["alice", "bob", "é/🙂"].into_iter().enumerate() {
            let owner = user(name)?;
            engine.flush(&Engine::instance_id(&table, &owner)).await?;
            let now = seen(&world, &engine, &table, &owner).await?;
            ensure!(
                now == expected[at].iter().copied().collect::<Vec<_>>(),
                "seed {}: {name} after healing",
                seed + round
            );
            ensure!(
                engine.read(&table, &owner, vec![0], None).await?.buffered[0].num_rows() == 0,
                "everything is in files now"
            );
        }
        engine.close(Duration::from_secs(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_users_flush_does_not_wait_for_a_storage_that_is_down_and_recovers_by_itself() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    world.faults.set_down(true);
    let id = Engine::instance_id(&table, &owner);
    let refused = tokio::time::timeout(Duration::from_secs(20), engine.flush(&id)).await;
    ensure!(!matches!(refused, Ok(Ok(_))), "a flush to a storage that is down cannot succeed");
    insert(&engine, &table, &owner, 2).await?;
    ensure!(seen(&world, &engine, &table, &owner).await? == [1, 2]);
    world.faults.set_down(false);
    engine.flush(&id).await?;
    ensure!(seen(&world, &engine, &table, &owner).await? == [1, 2]);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_was_fenced_acknowledges_nothing_more() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    engine.flush(&Engine::instance_id(&table, &owner)).await?;
    // Another process ends our stream, as a takeover does.
    let incarnation = world.incarnation().await?;
    stream::fence(world.truth.as_ref(), &incarnation, 1, "other").await?;
    insert(&engine, &table, &owner, 2).await?;
    ensure!(engine.flush(&Engine::instance_id(&table, &owner)).await.is_err());
    ensure!(engine.disowned() == Some(&Disowned::Fenced));
    ensure!(insert(&engine, &table, &owner, 3).await.is_err(), "a fenced process acknowledged a row");
    // Whoever took over may have acknowledged rows that are not here.
    ensure!(matches!(engine.read(&table, &owner, vec![0], None).await, Err(ReadError::Disowned(_))));
    engine.close(Duration::from_secs(1)).await;
    drop(engine);
    let (engine, table) = world.open()?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(matches!(engine.disowned(), Some(Disowned::OlderCopy { .. })), "a restart has no more right to the data");
    ensure!(insert(&engine, &table, &owner, 4).await.is_err());
    engine.close(Duration::from_secs(1)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn buffered_rows_that_a_commit_does_not_hold_are_never_given_up_for_it() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    let id = Engine::instance_id(&table, &owner);
    insert(&engine, &table, &owner, 1).await?;
    engine.flush(&id).await?;
    insert(&engine, &table, &owner, 2).await?;
    world.faults.set_down(true);
    ensure!(engine.flush(&id).await.is_err());
    world.faults.set_down(false);
    engine.close(Duration::from_secs(5)).await;
    drop(engine);

    // The former stream has a commit of the second generation, from before the row of this folder was written.
    let incarnation = world.incarnation().await?;
    let edit = Edit {
        instance: id.clone(),
        generation: Generation(2),
        last_seq: 1,
        add: vec![],
        remove: vec![],
        replace: BTreeMap::new(),
        placed: None,
    };
    StreamWriter::new(Arc::clone(&world.truth), &incarnation, 2)
        .append(&Arc::new(Round { edits: vec![edit], rows: vec![] }))
        .await?;
    let (engine, _) = world.open()?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(matches!(engine.disowned(), Some(Disowned::OlderCopy { .. })), "{:?}", engine.disowned());
    ensure!(matches!(engine.flush(&id).await, Err(FlushError::Disowned(_))));
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let buffer = WriteBuffer::open(&world.dir.path().join("buffer"), Options::default())?;
    let mut rows = 0;
    buffer.scan(&id, Generation(1), &mut |_, _, _| {
        rows += 1;
        ControlFlow::Continue(())
    })?;
    ensure!(rows == 1, "the row that no file holds is gone");
    let last = stream::last(world.truth.as_ref(), &incarnation).await?.context("its objects")?;
    ensure!(
        !stream::is_fence(world.truth.as_ref(), &incarnation, last).await?,
        "an older copy locked the newest one out"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_the_store_garbled_is_written_again_under_another_name() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    let id = Engine::instance_id(&table, &owner);
    insert(&engine, &table, &owner, 1).await?;
    engine.flush(&id).await?;
    insert(&engine, &table, &owner, 2).await?;
    world.faults.script([Some(Fault::Garbled)]);
    let Err(FlushError::Garbled { path: garbled }) = engine.flush(&id).await else { bail!("the upload was taken") };
    ensure!(seen(&world, &engine, &table, &owner).await? == [1, 2]);
    ensure!(engine.flush(&id).await?.rows == 1);
    ensure!(seen(&world, &engine, &table, &owner).await? == [1, 2]);
    let rows = engine.read(&table, &owner, vec![0], None).await?;
    ensure!(rows.buffered[0].num_rows() == 0 && rows.view.manifest.files.len() == 2);
    ensure!(rows.view.manifest.files.iter().all(|file| file.path != garbled));
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flush_that_failed_is_tried_again_without_another_write() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&MANIFESTS.replace("interval: 1h", "interval: 1s"))?;
    let owner = user("alice")?;
    let buffered = async || anyhow::Ok(engine.read(&table, &owner, vec![0], None).await?.buffered[0].num_rows());
    insert(&engine, &table, &owner, 1).await?;
    eventually("the first row is flushed by its age", async || Ok(buffered().await? == 0)).await?;
    world.faults.set_down(true);
    let before = world.faults.faults();
    insert(&engine, &table, &owner, 2).await?;
    eventually("a flush has failed", async || Ok(world.faults.faults() > before + 3)).await?;
    world.faults.set_down(false);
    eventually("the second row is flushed by itself", async || Ok(buffered().await? == 0)).await?;
    ensure!(seen(&world, &engine, &table, &owner).await? == [1, 2]);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_column_that_is_added_while_a_flush_waits_keeps_its_values() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let owner = user("alice")?;
    let id = Engine::instance_id(&table, &owner);
    world.faults.set_down(true);
    insert(&engine, &table, &owner, 1).await?;
    let waiting = tokio::spawn({
        let (engine, id) = (Arc::clone(&engine), id.clone());
        async move { engine.flush(&id).await }
    });
    eventually("the flush waits for the storage", async || Ok(world.faults.faults() > 2)).await?;
    let wider = MANIFESTS.replace(
        "{name: body, type: TEXT, nullable: false}",
        "{name: body, type: TEXT, nullable: false}\n    - {name: note, type: TEXT}",
    );
    let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), wider)]);
    let (compiled, _) = compile(&engine.catalog().current().catalog, &folder.declared, OnRemoval::Retain);
    engine.serve_catalog(compiled)?;
    let table = engine.catalog().current().table(&table.name).context("the table")?.clone();
    let values = [Value::BigInt(2), Value::Text("b".into()), Value::Text("precious".into())];
    let row = NewRow { key: key::encode(&values[..1]), value: row::encode(&table, &values) };
    engine.write(&table, &owner).await?.insert(vec![row]).await?;
    world.faults.set_down(false);
    let _ = waiting.await?;
    engine.flush(&id).await?;
    let mut notes = Vec::new();
    for file in &engine.read(&table, &owner, vec![0], None).await?.view.manifest.files {
        let path = object_store::path::Path::parse(&file.path)?;
        let bytes = world.truth.get_opts(&path, object_store::GetOptions::default()).await?.bytes().await?;
        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            let batch = batch?;
            let column = batch.column_by_name("note").map(|column| column.as_string::<i32>().clone());
            notes.extend(column.iter().flatten().flatten().map(str::to_owned).collect::<Vec<_>>());
        }
    }
    ensure!(notes == ["precious"], "{notes:?}");
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}
