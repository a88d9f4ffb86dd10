//! The commit stream as durability: what a storage has comes back on an empty disk, and nothing else is ever shown.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use arrow::array::{AsArray as _, RecordBatch};
use arrow::datatypes::Int64Type;
use futures::TryStreamExt as _;
use kalamdb_model::{Owner, TableEntry};
use kalamdb_query_pod::engine::{Disowned, Engine, ReadError, WriteError};
use kalamdb_table_store::paths;
use kalamdb_table_store::stream::{self, Body};
use kalamdb_test_support::fault_store::{Fault, Rates};
use kalamdb_test_support::pod::{Home, MANIFESTS, eventually};
use object_store::ObjectStore;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use crate::BINARY;
use crate::world::{PATIENCE, World, contents, insert, message, serve, user};

/// [`MANIFESTS`] with a storage that is not on the pod's own disk.
fn remote() -> String {
    MANIFESTS.replace("path: ./files", "path: /remote")
}

fn stored_first() -> String {
    remote().replace("flushPolicy", "durability: objectStore\n  flushPolicy")
}

const USERS: [&str; 3] = ["alice", "bob", "é/🙂"];

type Model = Vec<BTreeMap<i64, String>>;

/// A few statements of each user; what was acknowledged is in `model`.
async fn work(
    random: &mut StdRng,
    engine: &Arc<Engine>,
    table: &Arc<TableEntry>,
    model: &mut Model,
) -> anyhow::Result<()> {
    for (name, rows) in USERS.iter().zip(model) {
        let owner = user(name)?;
        for _ in 0..random.random_range(1..6) {
            let ids: std::collections::BTreeSet<i64> =
                (0..random.random_range(1..5)).map(|_| random.random_range(0..30)).collect();
            let (mut put, mut delete, mut after) = (Vec::new(), Vec::new(), rows.clone());
            for id in ids {
                match rows.get(&id) {
                    Some(body) if random.random_bool(0.4) => {
                        delete.push(message(table, id, body));
                        after.remove(&id);
                    }
                    _ => {
                        let body = format!("{name} {id} {}", random.random::<u32>());
                        put.push(message(table, id, &body));
                        after.insert(id, body);
                    }
                }
            }
            // A look-up over a failing store may fail the statement; then it has not happened.
            if let Ok(writing) = engine.write(table, &owner).await
                && writing.commit(put, delete).await.is_ok()
            {
                *rows = after;
            }
        }
        if random.random_bool(0.5) {
            let id = Engine::instance_id(table, &owner);
            let _ = tokio::time::timeout(Duration::from_secs(3), engine.flush(&id)).await;
        }
        if random.random_bool(0.2) {
            let _ = tokio::time::timeout(Duration::from_secs(3), engine.compact_matching(|_| true)).await;
        }
    }
    Ok(())
}

async fn agrees(
    what: &str,
    world: &World,
    engine: &Arc<Engine>,
    table: &Arc<TableEntry>,
    model: &Model,
) -> anyhow::Result<()> {
    for (name, rows) in USERS.iter().zip(model) {
        let mut found = contents(world, engine, table, &user(name)?).await;
        // A read over a failing store may fail; it is never short.
        for _ in 0..50 {
            if found.is_ok() {
                break;
            }
            found = contents(world, engine, table, &user(name)?).await;
        }
        let found = found?;
        ensure!(found == *rows, "{what}: {name} sees {found:?}, expected {rows:?}");
    }
    Ok(())
}

async fn shipped(engine: &Arc<Engine>) -> anyhow::Result<()> {
    eventually("all rows are in the stream", async || Ok(engine.unshipped_bytes() == 0)).await
}

/// Volumes are lost and processes restarted in turns, over a store that fails in between.
async fn lose_volumes(manifests: &str, rates: Rates, seed: u64, turns: u32) -> anyhow::Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut world = World::new(seed, rates)?;
    let mut model: Model = vec![BTreeMap::new(); USERS.len()];
    for turn in 0..turns {
        let what = format!("seed {seed}, turn {turn}");
        let (engine, table) = world.open_with(manifests)?;
        agrees(&format!("{what}, at the start"), &world, &engine, &table, &model).await?;
        // Now and then a process writes nothing at all.
        for _ in 0..random.random_range(0..4) {
            work(&mut random, &engine, &table, &mut model).await?;
            agrees(&what, &world, &engine, &table, &model).await?;
        }
        let lost = random.random_bool(0.6);
        if lost {
            shipped(&engine).await?;
        }
        engine.close(Duration::from_millis(if lost { 8_000 } else { 50 })).await;
        drop(engine);
        if lost { drop(world.lose_volume()?) } else { world.keep_volume() }
    }
    Ok(())
}

fn seed() -> u64 {
    let seed = std::env::var("KALAMDB_SEED").ok().map_or(20_261_121, |text| text.parse().unwrap());
    println!("seed {seed} (set KALAMDB_SEED to repeat another)");
    seed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_shipped_comes_back_on_an_empty_disk() -> anyhow::Result<()> {
    for seed in seed()..seed() + 3 {
        lose_volumes(&remote(), Rates::default(), seed, 8).await?;
        lose_volumes(&stored_first(), Rates::default(), seed, 8).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_comes_back_over_a_store_that_fails_before_and_after_success() -> anyhow::Result<()> {
    let rates = Rates { before: 0.1, after: 0.1, other: 0.03, ..Rates::default() };
    lose_volumes(&remote(), rates, seed(), 3).await?;
    lose_volumes(&stored_first(), rates, seed() + 1, 3).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_are_stored_first_are_visible_and_acknowledged_only_then() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&stored_first())?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    let puts = world.faults.puts();
    world.faults.set_down(true);
    let waiting = tokio::spawn({
        let (engine, table, owner) = (Arc::clone(&engine), Arc::clone(&table), owner.clone());
        async move { insert(&engine, &table, &owner, 2).await }
    });
    eventually("the store was asked", async || Ok(world.faults.puts() > puts + 1)).await?;
    ensure!(!waiting.is_finished(), "a row was acknowledged that is not stored");
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1, "a row is visible that is not stored");
    world.faults.set_down(false);
    waiting.await??;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 2);
    // The volume is lost at this very moment: the old process still runs.
    world.lose_volume()?;
    let (successor, table) = world.open_with(&stored_first())?;
    ensure!(contents(&world, &successor, &table, &owner).await?.len() == 2, "an acknowledged row is gone");
    ensure!(insert(&engine, &table, &owner, 3).await.is_err(), "a process that was succeeded acknowledged a row");
    ensure!(engine.disowned() == Some(&Disowned::Fenced));
    ensure!(contents(&world, &successor, &table, &owner).await?.len() == 2);
    engine.close(Duration::from_secs(5)).await;
    successor.close(Duration::from_secs(5)).await;
    Ok(())
}

/// A process that stored one row and ended.
async fn leave_one_row(world: &World, owner: &Owner) -> anyhow::Result<()> {
    let (engine, table) = world.open_with(&remote())?;
    insert(&engine, &table, owner, 1).await?;
    shipped(&engine).await?;
    engine.close(Duration::from_secs(8)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_idle_process_took_over_is_there_after_the_loss_of_its_volume() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    leave_one_row(&world, &owner).await?;
    // It writes nothing, and so has nothing but a checkpoint, which took the place of its predecessor's stream.
    let (idle, table) = world.open_with(&remote())?;
    idle.open_known_streams(PATIENCE).await?;
    eventually("its checkpoint has replaced the former stream", async || {
        let streams = listed(world.truth.as_ref(), "_cluster/stream").await?.len();
        Ok(streams + listed(world.truth.as_ref(), "_cluster/checkpoint").await?.len() == 4)
    })
    .await?;
    let _of_the_idle_one = world.lose_volume()?;
    let (engine, _) = world.open_with(&remote())?;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1);
    // The idle one lives, and can store nothing more.
    let row = message(&table, 2, "late");
    let told = idle.write(&table, &owner).await?.insert(vec![row]).await;
    let knows = eventually("it knows that it was succeeded", async || Ok(idle.disowned() == Some(&Disowned::Fenced)));
    knows.await.with_context(|| format!("{told:?}, {:?}", idle.disowned()))?;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1);
    idle.close(Duration::from_secs(5)).await;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_rows_at_once_that_are_stored_first_are_applied_in_their_order() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    let (engine, table) = world.open_with(&stored_first())?;
    let mut inserts = tokio::task::JoinSet::new();
    for id in 0..400 {
        let (engine, table, owner) = (Arc::clone(&engine), Arc::clone(&table), owner.clone());
        inserts.spawn(async move {
            let row = message(&table, id, "generated");
            let stamps = engine.append(&table, &owner).await?.insert(vec![row]).await?;
            anyhow::Ok((id, stamps.context("it was written")?.first_seq))
        });
    }
    let mut told = BTreeMap::new();
    while let Some(inserted) = inserts.join_next().await {
        let (id, seq) = inserted??;
        told.insert(id, seq);
    }
    let rows = engine.read(&table, &owner, vec![0, 2], None).await?;
    let column = |at: usize| {
        let values = |batch: &RecordBatch| batch.column(at).as_primitive::<Int64Type>().values().to_vec();
        rows.buffered.iter().flat_map(values).collect::<Vec<i64>>()
    };
    ensure!(column(0).into_iter().zip(column(1)).eq(told), "a `_seq` is not the one that was told");
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 400);
    world.lose_volume()?;
    let (successor, table) = world.open_with(&stored_first())?;
    ensure!(contents(&world, &successor, &table, &owner).await?.len() == 400);
    engine.close(Duration::from_secs(1)).await;
    successor.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_is_not_read_back_yet_answers_with_an_error_and_never_short() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&remote())?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    shipped(&engine).await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    world.lose_volume()?;
    world.faults.set_down(true);
    let (engine, table) = world.open_with(&remote())?;
    ensure!(matches!(engine.read(&table, &owner, vec![0], None).await, Err(ReadError::Rebuilding(_))));
    ensure!(matches!(engine.write(&table, &owner).await.map(drop), Err(WriteError::Rebuilding(_))));
    // A restart in between knows as well.
    engine.close(Duration::from_secs(1)).await;
    drop(engine);
    world.keep_volume();
    let (engine, table) = world.open_with(&remote())?;
    engine.open_known_streams(Duration::from_millis(1)).await?;
    ensure!(matches!(engine.read(&table, &owner, vec![0], None).await, Err(ReadError::Rebuilding(_))));
    world.faults.set_down(false);
    eventually("the storage is read back", async || Ok(engine.read(&table, &owner, vec![0], None).await.is_ok()))
        .await?;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_the_folder_that_lacks_shipped_rows_is_refused() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&remote())?;
    let owner = user("alice")?;
    insert(&engine, &table, &owner, 1).await?;
    shipped(&engine).await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let copy = tempfile::tempdir()?;
    let from = world.dir.path().to_string_lossy().into_owned() + "/.";
    ensure!(std::process::Command::new("cp").args(["-a", &from]).arg(copy.path()).status()?.success());
    let (engine, table) = world.open_with(&remote())?;
    insert(&engine, &table, &owner, 2).await?;
    shipped(&engine).await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    world.dir = copy;
    let (engine, table) = world.open_with(&remote())?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(matches!(engine.disowned(), Some(Disowned::OlderCopy { .. })), "{:?}", engine.disowned());
    ensure!(engine.read(&table, &owner, vec![0], None).await.is_err(), "a row is missing, and nobody says so");
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

/// Paths below `prefix`.
async fn listed(store: &dyn ObjectStore, prefix: &str) -> anyhow::Result<Vec<String>> {
    let prefix = object_store::path::Path::from(prefix);
    Ok(store.list(Some(&prefix)).map_ok(|meta| meta.location.to_string()).try_collect().await?)
}

/// Which checkpoints of a stream are complete.
async fn attempts(store: &dyn ObjectStore, incarnation: &str) -> anyhow::Result<Vec<String>> {
    let listed = listed(store, paths::checkpoints_prefix(incarnation).as_ref()).await?;
    let names = listed.iter().filter_map(|path| paths::checkpoint_name(&object_store::path::Path::from(path.as_str())));
    let mut attempts: Vec<String> = names.map(|(_, attempt)| attempt).collect();
    attempts.sort_unstable();
    Ok(attempts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_takes_the_place_of_all_that_came_before() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    for start in 0..4 {
        let (engine, table) = world.open_with(&remote())?;
        for id in 0..5 {
            insert(&engine, &table, &owner, start * 10 + id).await?;
            shipped(&engine).await?;
        }
        engine.flush(&Engine::instance_id(&table, &owner)).await?;
        engine.close(Duration::from_secs(8)).await;
        drop(engine);
    }
    let (engine, table) = world.open_with(&remote())?;
    insert(&engine, &table, &owner, 99).await?;
    let former = async || {
        let mut left = Vec::new();
        let incarnations = stream::incarnations(world.truth.as_ref()).await?;
        for incarnation in &incarnations[..incarnations.len() - 1] {
            left.extend(listed(world.truth.as_ref(), paths::stream_prefix(incarnation).as_ref()).await?);
        }
        anyhow::Ok((incarnations.len(), left))
    };
    eventually("only fences are left of former streams", async || {
        let (count, left) = former().await?;
        Ok(count == 5 && left.len() == 4)
    })
    .await?;
    for path in former().await?.1 {
        let (incarnation, seq) = path.rsplit_once('/').context("a path")?;
        let incarnation = incarnation.rsplit('/').next().context("a stream")?;
        let seq: u64 = seq.trim_end_matches(".log").parse()?;
        let object = stream::read(world.truth.as_ref(), incarnation, seq).await?.context("the fence")?;
        ensure!(matches!(object.body, Body::Fence { .. }), "{path}");
    }
    eventually("one checkpoint is left", async || {
        Ok(listed(world.truth.as_ref(), "_cluster/checkpoint").await?.len() == 2)
    })
    .await?;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_checkpoint_that_fails_is_written_again_and_nothing_is_deleted_for_half_of_one() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    leave_one_row(&world, &owner).await?;
    // The first object and the fence pass, the part of the checkpoint does not.
    world.faults.script([None, None, Some(Fault::Garbled)]);
    let (engine, _) = world.open_with(&remote())?;
    engine.open_known_streams(PATIENCE).await?;
    let own = stream::incarnations(world.truth.as_ref()).await?.pop().context("its stream")?;
    eventually("its checkpoint is complete, at the second attempt", async || {
        Ok(attempts(world.truth.as_ref(), &own).await? == ["0000000002"])
    })
    .await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    world.lose_volume()?;
    let (engine, table) = world.open_with(&remote())?;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_wrote_nothing_but_its_checkpoint_twice_is_no_older_copy() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    leave_one_row(&world, &owner).await?;
    // The first object and the fence pass, the part of the checkpoint does not.
    world.faults.script([None, None, Some(Fault::Garbled)]);
    let (engine, _) = world.open_with(&remote())?;
    engine.open_known_streams(PATIENCE).await?;
    let own = stream::incarnations(world.truth.as_ref()).await?.pop().context("its stream")?;
    eventually("the second attempt has shortened its stream", async || {
        Ok(stream::read(world.truth.as_ref(), &own, 1).await?.is_none())
    })
    .await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let (engine, table) = world.open_with(&remote())?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(engine.disowned().is_none(), "{:?}", engine.disowned());
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 1);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_on_the_pods_own_disk_carries_no_rows_and_does_not_grow_for_ever() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    let (engine, table) = world.open()?;
    for id in 0..230 {
        insert(&engine, &table, &owner, id).await?;
        engine.flush(&Engine::instance_id(&table, &owner)).await?;
    }
    eventually(
        "old objects are gone",
        async || Ok(listed(world.truth.as_ref(), "_cluster/stream").await?.len() <= 130),
    )
    .await?;
    ensure!(listed(world.truth.as_ref(), "_cluster/checkpoint").await?.is_empty());
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let (engine, table) = world.open()?;
    engine.open_known_streams(PATIENCE).await?;
    ensure!(engine.disowned().is_none());
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 230);
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_object_of_a_storage_holds_a_value_of_a_user_whose_data_lies_in_another() -> anyhow::Result<()> {
    let (here, there) = (tempfile::tempdir()?, tempfile::tempdir()?);
    let storage = |name: &str, path: &std::path::Path| {
        format!(
            "---\napiVersion: kalamdb.org/v1alpha1\nkind: Storage\nmetadata: {{name: {name}}}\nspec:\n  type: Filesystem\n  \
             filesystem: {{path: {}}}\n  userTablesTemplate: users/{{userId}}/{{namespace}}/{{tableName}}\n  \
             sharedTablesTemplate: shared/{{namespace}}/{{tableName}}\n",
            path.display()
        )
    };
    let table = |name: &str, storage: &str, durability: &str| {
        format!(
            "---\napiVersion: kalamdb.org/v1alpha1\nkind: UserTable\nmetadata: {{name: app.{name}}}\nspec:\n  namespaceRef: app\n  \
             tableName: {name}\n  storageRef: {storage}\n  durability: {durability}\n  columns:\n    \
             - {{name: id, type: BIGINT, primaryKey: true}}\n    - {{name: body, type: TEXT}}\n  \
             flushPolicy: {{rows: 100000, interval: 24h}}\n"
        )
    };
    let namespace =
        "---\napiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {name: app}\nspec: {defaultStorage: here}\n";
    let manifests = [
        storage("here", here.path()),
        storage("there", there.path()),
        namespace.to_owned(),
        table("near", "here", "local"),
        table("first", "here", "objectStore"),
        table("far", "there", "local"),
    ];
    let home = Home::new(BINARY, &manifests.concat())?;
    let mut pod = home.start().await?;
    for (table, canary) in [("near", "canary-near"), ("first", "canary-near"), ("far", "canary-far")] {
        for (at, user) in ["alice", "bob"].into_iter().enumerate() {
            let insert = format!("INSERT INTO app.{table} VALUES ($1, $2)");
            pod.run(user, &insert, json!([at, format!("{canary}-{user}")])).await?;
        }
        pod.run("bob", &format!("STORAGE FLUSH TABLE app.{table}"), json!([])).await?;
    }
    let unshipped = async || Ok(pod.get("/metrics").await?.1.contains("kalamdb_unshipped_bytes 0\n"));
    eventually("all rows are shipped", unshipped).await?;
    pod.stop().await?;
    // With the rows of a checkpoint, too.
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.far VALUES (9, 'canary-far-alice')", json!([])).await?;
    eventually("all rows are shipped", async || {
        Ok(pod.get("/metrics").await?.1.contains("kalamdb_checkpoints_total 2\n"))
    })
    .await?;
    let holds = |root: &std::path::Path, text: &str| {
        let found = std::process::Command::new("grep").args(["-rlaF", text]).arg(root).output()?;
        anyhow::Ok(String::from_utf8(found.stdout)?.lines().map(str::to_owned).collect::<Vec<_>>())
    };
    ensure!(
        !holds(here.path(), "canary-near-alice")?.is_empty(),
        "unflushed rows are not in the stream of their storage"
    );
    ensure!(!holds(there.path(), "canary-far-alice")?.is_empty());
    ensure!(holds(here.path(), "canary-far")?.is_empty() && holds(there.path(), "canary-near")?.is_empty());
    // A flushed file is compressed, and lies below its user's prefix; everything else is the cluster's.
    for path in holds(here.path(), "canary-near-bob")? {
        ensure!(path.contains("/users/bob/") || path.contains("/_cluster/"), "{path}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_wait_for_a_storage_stay_bounded_and_all_of_them_arrive() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&remote())?;
    let owners: Vec<Owner> = ["a", "b", "c"].into_iter().map(user).collect::<Result<_, _>>()?;
    insert(&engine, &table, &owners[0], 0).await?;
    shipped(&engine).await?;
    world.faults.set_down(true);
    let body = "x".repeat(1 << 20);
    for owner in &owners {
        for id in 1..30 {
            engine.write(&table, owner).await?.insert(vec![message(&table, id, &body)]).await?;
        }
    }
    ensure!(engine.unshipped_bytes() <= 64 << 20, "{} bytes wait", engine.unshipped_bytes());
    world.faults.set_down(false);
    shipped(&engine).await?;
    let own = stream::incarnations(world.truth.as_ref()).await?.pop().context("its stream")?;
    eventually("what was left out is in a second checkpoint", async || {
        Ok(attempts(world.truth.as_ref(), &own).await?.last().is_some_and(|attempt| attempt != "0000000001"))
    })
    .await?;
    engine.close(Duration::from_secs(8)).await;
    drop(engine);
    world.lose_volume()?;
    let (engine, table) = world.open_with(&remote())?;
    for (at, owner) in owners.iter().enumerate() {
        let found = contents(&world, &engine, &table, owner).await?;
        ensure!(found.len() == 29 + usize::from(at == 0), "{} rows of user {at}", found.len());
    }
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

/// [`stored_first`] in a bucket that is reached at `endpoint`.
fn in_bucket(endpoint: &str) -> String {
    let bucket = format!("type: S3\n  s3: {{bucket: bucket, endpoint: '{endpoint}', allowHttp: true}}");
    stored_first().replace("type: Filesystem\n  filesystem: {path: /remote}", &bucket)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endpoint_that_is_edited_is_the_same_storage_and_the_same_stream() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    let (engine, table) = world.open_with(&in_bucket("http://a:1"))?;
    for (id, endpoint) in (1..).zip(["http://b:1", "http://c:1", "http://a:1"]) {
        insert(&engine, &table, &owner, id).await?;
        serve(&engine, &in_bucket(endpoint))?;
        engine.flush(&Engine::instance_id(&table, &owner)).await?;
    }
    insert(&engine, &table, &owner, 4).await?;
    ensure!(contents(&world, &engine, &table, &owner).await?.len() == 4);
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    let (engine, table) = world.open_with(&in_bucket("http://a:1"))?;
    insert(&engine, &table, &owner, 5).await?;
    world.lose_volume()?;
    let (successor, table) = world.open_with(&in_bucket("http://d:1"))?;
    ensure!(contents(&world, &successor, &table, &owner).await?.len() == 5);
    engine.close(Duration::from_secs(1)).await;
    successor.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_in_which_a_stranger_is_at_work_is_not_used() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let owner = user("alice")?;
    let (engine, table) = world.open_with(&stored_first())?;
    insert(&engine, &table, &owner, 1).await?;
    // A folder that was copied before the storage was used: same catalog, no rows, no streams.
    world.dir = tempfile::tempdir()?;
    let (copy, of_copy) = world.open_with(&stored_first())?;
    let late = tokio::time::timeout(Duration::from_secs(3), insert(&copy, &of_copy, &owner, 2)).await;
    ensure!(!matches!(late, Ok(Ok(()))), "a row of the copy is acknowledged");
    ensure!(stream::incarnations(world.truth.as_ref()).await?.len() == 1, "the copy has begun a stream");
    insert(&engine, &table, &owner, 3).await?;
    engine.close(Duration::from_secs(5)).await;
    copy.close(Duration::from_secs(1)).await;
    drop((engine, copy));
    world.lose_volume()?;
    let (engine, table) = world.open_with(&stored_first())?;
    ensure!(contents(&world, &engine, &table, &owner).await?.into_keys().eq([1, 3]));
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn statements_that_never_stop_do_not_keep_the_stream_from_being_shortened() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&stored_first())?;
    let owner = user("alice")?;
    let mut inserts = tokio::task::JoinSet::new();
    for task in 0..8 {
        let (engine, table, owner) = (Arc::clone(&engine), Arc::clone(&table), owner.clone());
        inserts.spawn(async move {
            for id in 0.. {
                let row = message(&table, task * 1_000_000 + id, "generated");
                engine.append(&table, &owner).await?.insert(vec![row]).await?;
            }
            anyhow::Ok(())
        });
    }
    let own = engine_incarnation(&world).await?;
    eventually("a later checkpoint is complete", async || {
        Ok(attempts(world.truth.as_ref(), &own).await?.iter().any(|attempt| attempt != "0000000001"))
    })
    .await?;
    ensure!(inserts.try_join_next().is_none(), "the load has stopped");
    inserts.shutdown().await;
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

/// The process whose stream is there, as soon as it is.
async fn engine_incarnation(world: &World) -> anyhow::Result<String> {
    eventually("its stream is begun", async || Ok(!stream::incarnations(world.truth.as_ref()).await?.is_empty()))
        .await?;
    stream::incarnations(world.truth.as_ref()).await?.pop().context("its stream")
}
