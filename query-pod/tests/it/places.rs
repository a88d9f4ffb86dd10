//! Storages: whose they are, where they lie, and what one that does not answer holds up.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use kalamdb_model::{Owner, TableEntry};
use kalamdb_query_pod::engine::{Engine, Job, JobKind, JobState, WriteError};
use kalamdb_table_store::{paths, stream};
use kalamdb_test_support::fault_store::{Fault, Rates};
use kalamdb_test_support::pod::{MANIFESTS, eventually};
use object_store::ObjectStoreExt as _;
use object_store::path::Path;
use object_store::prefix::PrefixStore;

use crate::moves::{arrives, holding, manifests, place, send};
use crate::world::{PATIENCE, World, contents, data_files, insert, message, user};

/// [`MANIFESTS`] with its storage in a region, and named like it.
fn in_eu() -> String {
    let named = MANIFESTS.replace("{name: local}", "{name: eu}").replace("defaultStorage: local", "defaultStorage: eu");
    named.replace("path: ./files", "path: /eu")
}

/// The storage and the namespace of `manifests`, and no table.
fn without_table(manifests: &str) -> &str {
    &manifests[..manifests.rfind("---").unwrap_or_default()]
}

/// Everything is in the stream of its storage; then the process ends.
async fn end(engine: Arc<Engine>) -> anyhow::Result<()> {
    eventually("all is shipped", async || Ok(engine.unshipped_bytes() == 0)).await?;
    engine.close(Duration::from_secs(8)).await;
    Ok(())
}

/// Waits until the first checkpoint of a region is complete: from then on nothing is put there unasked.
async fn is_quiet(world: &World, region: &str) -> anyhow::Result<()> {
    eventually("the checkpoint is complete", async || {
        let objects = world.objects(region).await?;
        Ok(objects.iter().any(|(path, _)| paths::checkpoint_name(&Path::from(path.as_str())).is_some()))
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_of_another_instance_is_neither_used_nor_read_back_nor_ended() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let alice = user("alice")?;
    world.founder = "stranger";
    let (stranger, of_stranger) = world.open_with(&in_eu())?;
    insert(&stranger, &of_stranger, &alice, 1).await?;
    stranger.flush(&Engine::instance_id(&of_stranger, &alice)).await?;
    insert(&stranger, &of_stranger, &alice, 2).await?;
    // Ours was declared to lie there, too, and then elsewhere.
    world.founder = "founder";
    let _of_stranger = std::mem::replace(&mut world.dir, tempfile::tempdir()?);
    let (eu, us) = (in_eu(), in_eu().replace("path: /eu", "path: /us"));
    let declared = [without_table(&eu), us.as_str()];
    let (engine, table) = world.open_after(&declared)?;
    ensure!((table.location.root, table.id) == (2, of_stranger.id), "{:?}", table.location);
    insert(&engine, &table, &alice, 7).await?;
    end(engine).await?;
    world.lose_volume()?;
    let (engine, table) = world.open_after(&declared)?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.into_keys().eq([7]));
    end(engine).await?;
    // Nor when a table of ours lies there.
    world.keep_volume();
    world.dir = tempfile::tempdir()?;
    let (engine, table) = world.open_with(&eu)?;
    insert(&engine, &table, &alice, 8).await?;
    let id = Engine::instance_id(&table, &alice);
    let flushing = engine.flush(&id);
    ensure!(tokio::time::timeout(Duration::from_secs(2), flushing).await.is_err(), "the storage is used");
    engine.close(Duration::from_secs(5)).await;

    insert(&stranger, &of_stranger, &alice, 3).await?;
    stranger.flush(&Engine::instance_id(&of_stranger, &alice)).await?;
    ensure!(stranger.disowned().is_none());
    let in_region = PrefixStore::new(Arc::clone(&world.truth), "eu");
    ensure!(stream::incarnations(&in_region).await?.len() == 1, "somebody else has a stream there");
    ensure!(contents(&world, &stranger, &of_stranger, &alice).await?.into_keys().eq([1, 2, 3]));
    stranger.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_the_home_store_has_forgotten_is_read_back_all_the_same() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let alice = user("alice")?;
    let (engine, table) = world.open_with(&in_eu())?;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    insert(&engine, &table, &alice, 2).await?;
    end(engine).await?;
    let note = paths::used_entry("eu.1/file://eu");
    world.home().head(&note).await.context("the note of the storage")?;
    world.home().delete(&note).await?;
    world.lose_volume()?;
    let (engine, table) = world.open_with(&in_eu())?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 2);
    end(engine).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_was_never_used_holds_nobody_up_after_the_loss_of_a_volume() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (alice, bob) = (user("alice")?, user("bob")?);
    world.set_down("us", true);
    let (engine, table) = world.open_with(&manifests())?;
    send(&engine, "alice", Some("eu")).await?;
    for owner in [&alice, &bob] {
        insert(&engine, &table, owner, 1).await?;
    }
    end(engine).await?;
    world.lose_volume()?;
    let (engine, table) = world.open_with(&manifests())?;
    for owner in [&alice, &bob] {
        ensure!(contents(&world, &engine, &table, owner).await?.len() == 1);
        insert(&engine, &table, owner, 2).await?;
    }
    ensure!(!engine.is_rebuilding());
    end(engine).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_place_in_other_words_is_the_trouble_of_its_second_storage_alone() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    // What is in no region lies in one store.
    let manifests = manifests().replace("path: /home", "path: /words").replace("path: /eu", "path: /other-words");
    let (alice, bob) = (user("alice")?, user("bob")?);
    for start in 0..3 {
        let (engine, table) = world.open_with(&manifests)?;
        engine.open_known_streams(Duration::from_secs(1)).await?;
        insert(&engine, &table, &bob, start).await?;
        if start == 0 {
            engine.flush(&Engine::instance_id(&table, &bob)).await?;
            send(&engine, "alice", Some("eu")).await?;
        }
        insert(&engine, &table, &alice, start).await?;
        tokio::time::sleep(Duration::from_secs(1)).await;
        ensure!(engine.disowned().is_none(), "{:?}", engine.disowned());
        for owner in [&alice, &bob] {
            let rows = engine.read(&table, owner, vec![0], None).await?;
            let buffered: usize = rows.buffered.iter().map(|batch| batch.num_rows()).sum();
            let in_files: u64 = rows.view.manifest.files.iter().map(|file| file.rows).sum();
            ensure!(buffered as u64 + in_files == u64::try_from(start)? + 1);
        }
        engine.close(Duration::from_secs(8)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_another_storage_reaches_too_are_no_orphans() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    // By its template, the first one has its files in the second one's folder.
    let inner = "path: /words}\n  userTablesTemplate: eu/users/{userId}/{namespace}/{tableName}";
    let manifests =
        manifests().replacen("path: /home}\n  userTablesTemplate: users/{userId}/{namespace}/{tableName}", inner, 1);
    ensure!(manifests.contains(inner), "{manifests}");
    let (engine, table) = world.open_with(&manifests)?;
    let (alice, bob) = (user("alice")?, user("bob")?);
    send(&engine, "bob", Some("eu")).await?;
    insert(&engine, &table, &bob, 1).await?;
    engine.flush(&Engine::instance_id(&table, &bob)).await?;
    // Later than the first use of the storage, by the clock of names.
    tokio::time::sleep(Duration::from_millis(5)).await;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    ensure!(place(&engine, &table, &alice).await? == "home");
    tokio::time::sleep(Duration::from_millis(5)).await;
    let orphan = paths::data_file(&"eu/users/bob/app/messages".into(), 1, 1, &ulid::Ulid::generate().to_string());
    world.truth.put(&orphan, "x".into()).await?;
    ensure!(engine.collect_orphans().await? == 1);
    ensure!(world.truth.head(&orphan).await.is_err());
    for owner in [&alice, &bob] {
        let rows = engine.read(&table, owner, vec![0], None).await?;
        let [file] = rows.view.manifest.files.as_slice() else { bail!("{:?}", rows.view.manifest) };
        let prefix = if *owner == bob { "eu/" } else { "" };
        world.truth.head(&Path::parse(format!("{prefix}{}", file.path))?).await?;
    }
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_cannot_be_removed_keeps_no_other_one() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let alice = user("alice")?;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    tokio::time::sleep(Duration::from_millis(5)).await;
    let prefix = paths::instance_prefix(&table.location, &user("bob")?)?;
    let orphan = |generation| paths::data_file(&prefix, 1, generation, &ulid::Ulid::generate().to_string());
    let orphans: Vec<Path> = (1..4).map(orphan).collect();
    for path in &orphans {
        world.truth.put(path, "x".into()).await?;
    }
    world.faults.keep(orphans[0].clone());
    ensure!(engine.collect_orphans().await? == 2);
    ensure!(data_files(&world, &prefix).await? == [orphans[0].to_string()]);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

/// A row of alice in `home`, in a file, and one of carol in `eu`, whose stream is quiet.
async fn begin(world: &World) -> anyhow::Result<(Arc<Engine>, Arc<TableEntry>)> {
    let (engine, table) = world.open_with(&manifests())?;
    let (alice, carol) = (user("alice")?, user("carol")?);
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    send(&engine, "carol", Some("eu")).await?;
    insert(&engine, &table, &carol, 1).await?;
    engine.flush(&Engine::instance_id(&table, &carol)).await?;
    eventually("all is shipped", async || Ok(engine.unshipped_bytes() == 0)).await?;
    is_quiet(world, "eu").await?;
    Ok((engine, table))
}

/// Moves alice to `eu`, which takes the copy of her file, and then nothing more.
async fn hang_in_the_commit(world: &World, engine: &Arc<Engine>) -> anyhow::Result<()> {
    let mut faults = vec![Some(Fault::Before); 400];
    faults[0] = None;
    world.script("eu", &faults);
    send(engine, "alice", Some("eu")).await?;
    eventually("her file is copied", async || Ok(!holding(world, "eu", "users/alice/").await?.is_empty())).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_whose_commit_is_not_answered_lets_the_user_go_and_is_settled_later() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = begin(&world).await?;
    let alice = user("alice")?;
    hang_in_the_commit(&world, &engine).await?;
    let started = std::time::Instant::now();
    let refused = loop {
        match engine.write(&table, &alice).await {
            // The move has not come so far yet.
            Ok(writing) => drop(writing),
            Err(error) => break error,
        }
        ensure!(started.elapsed() < Duration::from_secs(30), "nothing waits");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    // Not held up until the storage answers, and not let in either.
    ensure!(matches!(refused, WriteError::Settle(_)), "{refused:?}");
    ensure!(started.elapsed() < Duration::from_secs(25), "{:?}", started.elapsed());
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 1);
    world.heal();
    let written = async || Ok(insert(&engine, &table, &alice, 2).await.is_ok());
    eventually("she may write again", written).await?;
    arrives(&engine, &table, &alice, "eu").await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 2);
    eventually("nothing of hers is left behind", async || Ok(holding(&world, "home", "alice").await?.is_empty()))
        .await?;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_not_settled_holds_up_no_compaction_for_ever() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = begin(&world).await?;
    let alice = user("alice")?;
    hang_in_the_commit(&world, &engine).await?;
    let is_held =
        async || Ok(tokio::time::timeout(Duration::from_secs(1), engine.write(&table, &alice)).await.is_err());
    eventually("the commit is under way", is_held).await?;
    engine.close(Duration::from_secs(8)).await;
    drop(engine);
    world.set_down("eu", true);
    let (engine, table) = world.open_with(&manifests())?;
    let id = Engine::instance_id(&table, &alice);
    let compacting = tokio::time::timeout(Duration::from_secs(25), engine.compact_matching(|found| *found == id));
    ensure!(compacting.await.context("the compaction waits")?.is_err());
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 1);
    ensure!(place(&engine, &table, &alice).await? == "home");
    world.set_down("eu", false);
    world.heal();
    arrives(&engine, &table, &alice, "eu").await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 1);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_move_that_is_cancelled_rests_until_the_storage_of_the_user_is_set_again() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&manifests())?;
    let alice = user("alice")?;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    world.set_down("eu", true);
    send(&engine, "alice", Some("eu")).await?;
    let is_move = |job: &Job| job.kind == JobKind::StorageMove;
    let moves = || engine.jobs().all().into_iter().filter(is_move).collect::<Vec<_>>();
    eventually("the move waits for its storage", async || Ok(moves().len() == 1)).await?;
    ensure!(engine.jobs().cancel(&moves()[0].id) == Some(true));
    world.set_down("eu", false);
    eventually("it is over", async || Ok(moves()[0].state == JobState::Cancelled)).await?;
    for id in 2..5 {
        insert(&engine, &table, &alice, id).await?;
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    ensure!(moves().len() == 1 && place(&engine, &table, &alice).await? == "home", "it has begun again");
    // Nor does what was copied keep anything from being collected.
    tokio::time::sleep(Duration::from_millis(5)).await;
    let prefix = paths::instance_prefix(&table.location, &alice)?;
    let orphan = paths::data_file(&prefix, 1, 9, &ulid::Ulid::generate().to_string());
    PrefixStore::new(Arc::clone(&world.truth), "home").put(&orphan, "x".into()).await?;
    eventually("it is collected", async || Ok(engine.collect_orphans().await? == 1)).await?;
    send(&engine, "alice", Some("eu")).await?;
    arrives(&engine, &table, &alice, "eu").await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 4);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_does_not_wait_for_a_storage_that_is_down() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&manifests())?;
    send(&engine, "alice", Some("eu")).await?;
    let (alice, bob) = (user("alice")?, user("bob")?);
    for owner in [&alice, &bob] {
        for id in 0..10 {
            insert(&engine, &table, owner, id).await?;
        }
        let deleted = (0..3).map(|id| message(&table, id, "secret")).collect();
        engine.write(&table, owner).await?.commit(Vec::new(), deleted).await?;
        engine.flush(&Engine::instance_id(&table, owner)).await?;
    }
    end(engine).await?;
    world.set_down("eu", true);
    let dropped = manifests().replace("flushPolicy", "deletedRetentionHours: 0\n  flushPolicy");
    let (engine, table) = world.open_with(&dropped)?;
    tokio::time::timeout(Duration::from_secs(40), engine.sweep()).await.context("the sweep waits")??;
    let rows_in_files = async |owner: &Owner| {
        let rows = engine.read(&table, owner, vec![0], None).await?;
        anyhow::Ok(rows.view.manifest.files.iter().map(|file| file.rows).sum::<u64>())
    };
    ensure!((rows_in_files(&alice).await?, rows_in_files(&bob).await?) == (10, 7));
    let asked = tokio::time::timeout(Duration::from_secs(40), engine.compact_matching(|_| true));
    ensure!(asked.await.context("the compaction waits")?.is_err());
    world.set_down("eu", false);
    eventually("the storage answers", async || {
        engine.sweep().await?;
        Ok(rows_in_files(&alice).await? == 7)
    })
    .await?;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_for_a_storage_that_is_down_leave_room_for_those_of_others() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    world.buffered_bytes_max = 400_000;
    let (engine, table) = world.open_with(&manifests())?;
    send(&engine, "alice", Some("eu")).await?;
    world.set_down("eu", true);
    let body = "x".repeat(10_000);
    let put = async |owner: &Owner, id: i64| {
        engine.write(&table, owner).await?.insert(vec![message(&table, id, &body)]).await
    };
    let (alice, bob) = (user("alice")?, user("bob")?);
    let mut written = 0;
    let refused = loop {
        match put(&alice, written).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    ensure!(matches!(&refused, WriteError::StorageFull { root, limit: 200_000, .. } if root.storage.as_str() == "eu"));
    ensure!(refused.to_string().contains("`eu.1`") && (15..25).contains(&written), "{refused}, {written}");
    for id in 0..15 {
        put(&bob, id).await?;
    }
    world.set_down("eu", false);
    eventually("there is room again", async || Ok(put(&alice, written).await.is_ok())).await?;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_requested_flush_has_frozen_are_flushed_when_the_storage_is_back() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open()?;
    let alice = user("alice")?;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    insert(&engine, &table, &alice, 2).await?;
    world.faults.set_down(true);
    ensure!(engine.flush_matching(|_| true).await.is_err());
    world.faults.set_down(false);
    eventually("nothing is buffered", async || Ok(engine.buffered() == (0, 0))).await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 2);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}
