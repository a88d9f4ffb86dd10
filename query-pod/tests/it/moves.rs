//! Users whose rows lie in storages of their own, and what happens when these change.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use kalamdb_model::{Owner, StorageName, TableEntry, UserId};
use kalamdb_query_pod::crash::{MOVE_POINTS, USER_POINTS};
use kalamdb_query_pod::engine::{Engine, JobKind, JobState};
use kalamdb_table_store::FilesystemStore;
use kalamdb_table_store::users::{StorageMode, User, Users};
use kalamdb_test_support::fault_store::Rates;
use kalamdb_test_support::pod::{Home, Pod, eventually, files_below};
use serde_json::json;

use crate::world::{World, contents, insert, message, user};
use crate::{BINARY, namespace, refusal, rows, storage};

/// A table in the storage `home`, whose users may have others, and two of these.
pub fn manifests() -> String {
    let table = "
---
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.messages}
spec:
  namespaceRef: app
  tableName: messages
  columns:
    - {name: id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()}
    - {name: body, type: TEXT, nullable: false}
  useUserStorage: true
  flushPolicy: {rows: 10000, interval: 1h}
";
    let storages = STORAGES.map(|name| storage(name, &format!("/{name}"))).concat();
    format!("{storages}{}{table}", namespace("home"))
}

fn stored_first() -> String {
    manifests().replace("flushPolicy", "durability: objectStore\n  flushPolicy")
}

const STORAGES: [&str; 3] = ["home", "eu", "us"];

pub async fn send(engine: &Arc<Engine>, name: &str, storage: Option<&str>) -> anyhow::Result<()> {
    let (storage_mode, storage_id) = match storage {
        Some(storage) => (StorageMode::Region, Some(StorageName::new(storage)?)),
        None => (StorageMode::Table, None),
    };
    Ok(engine.change_user(UserId::new(name)?, Some(storage_mode), Some(storage_id)).await?)
}

/// Where a reader of `owner`'s rows goes.
pub async fn place(engine: &Arc<Engine>, table: &Arc<TableEntry>, owner: &Owner) -> anyhow::Result<String> {
    Ok(engine.read(table, owner, vec![0], None).await?.root.storage.to_string())
}

pub async fn arrives(
    engine: &Arc<Engine>,
    table: &Arc<TableEntry>,
    owner: &Owner,
    storage: &str,
) -> anyhow::Result<()> {
    // A storage that fails may have to be asked more than once.
    let arrived = async || Ok(place(engine, table, owner).await.is_ok_and(|place| place == storage));
    eventually("the rows are in their new storage", arrived).await
}

/// Every object of the storage `name` with `text` in its path or bytes, footers of Parquet files included.
pub async fn holding(world: &World, name: &str, text: &str) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for (path, bytes) in world.objects(name).await? {
        if path.contains(text) || bytes.windows(text.len()).any(|window| window == text.as_bytes()) {
            found.push(path);
        }
    }
    Ok(found)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_lie_in_the_users_storage_from_the_first_one_on() -> anyhow::Result<()> {
    let mut world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&manifests())?;
    let (alice, bob, carol) = (user("alice")?, user("bob")?, user("carol")?);
    for name in ["alice", "carol"] {
        send(&engine, name, Some("eu")).await?;
    }
    for owner in [&alice, &bob, &carol] {
        insert(&engine, &table, owner, 1).await?;
    }
    // The first that is heard of her there may be her file.
    engine.flush(&Engine::instance_id(&table, &carol)).await?;
    ensure!(place(&engine, &table, &alice).await? == "eu" && place(&engine, &table, &bob).await? == "home");
    eventually("all is shipped", async || Ok(engine.unshipped_bytes() == 0)).await?;
    engine.close(Duration::from_secs(5)).await;
    drop(engine);
    // Of alice nothing is flushed: what tells where her rows lie is where they were shipped.
    world.lose_volume()?;
    let (engine, table) = world.open_with(&manifests())?;
    for owner in [&alice, &bob, &carol] {
        ensure!(contents(&world, &engine, &table, owner).await?.len() == 1);
    }
    ensure!(place(&engine, &table, &carol).await? == "eu");
    ensure!(place(&engine, &table, &alice).await? == "eu" && place(&engine, &table, &bob).await? == "home");
    for owner in [&alice, &bob] {
        engine.flush(&Engine::instance_id(&table, owner)).await?;
    }
    ensure!(holding(&world, "home", "alice").await?.is_empty(), "{:?}", holding(&world, "home", "alice").await?);
    ensure!(holding(&world, "eu", "bob").await?.is_empty());
    let files = holding(&world, "eu", "users/alice/app/messages/").await?;
    ensure!(files.iter().any(|path| path.ends_with(".parquet")), "{files:?}");
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_user_who_moves_takes_everything_along() -> anyhow::Result<()> {
    for manifests in [manifests(), stored_first()] {
        let world = World::new(1, Rates::default())?;
        let (engine, table) = world.open_with(&manifests)?;
        let (alice, bob) = (user("alice")?, user("bob")?);
        let id = Engine::instance_id(&table, &alice);
        for round in 0..4 {
            for owner in [&alice, &bob] {
                for row in 0..5 {
                    insert(&engine, &table, owner, round * 10 + row).await?;
                }
            }
            engine.flush(&id).await?;
        }
        // Old versions and deleted rows in files, others only in the buffer.
        let writing = engine.write(&table, &alice).await?;
        writing.commit(vec![message(&table, 0, "new")], vec![message(&table, 1, "body 1")]).await?;
        insert(&engine, &table, &alice, 99).await?;
        let before = contents(&world, &engine, &table, &alice).await?;
        send(&engine, "alice", Some("eu")).await?;
        arrives(&engine, &table, &alice, "eu").await?;
        ensure!(contents(&world, &engine, &table, &alice).await? == before);
        insert(&engine, &table, &alice, 100).await?;
        let writing = engine.write(&table, &alice).await?;
        writing.commit(vec![message(&table, 10, "newer")], vec![message(&table, 11, "body 11")]).await?;
        engine.flush(&id).await?;
        ensure!(contents(&world, &engine, &table, &alice).await?.len() == before.len());
        eventually("nothing of hers is left behind", async || Ok(holding(&world, "home", "alice").await?.is_empty()))
            .await?;
        ensure!(!holding(&world, "home", "bob").await?.is_empty());
        let job = engine.jobs().all().into_iter().find(|job| job.kind == JobKind::StorageMove).context("a job")?;
        ensure!(job.state == JobState::Done && job.users == 1 && job.rows == 23 && job.bytes > 0, "{job:?}");
        // And back, as often as she likes.
        for storage in [None, Some("us"), Some("eu"), None] {
            send(&engine, "alice", storage).await?;
            arrives(&engine, &table, &alice, storage.unwrap_or("home")).await?;
            insert(&engine, &table, &alice, 200 + i64::try_from(storage.map_or(0, str::len))?).await.ok();
        }
        let after = contents(&world, &engine, &table, &alice).await?;
        for other in ["eu", "us"] {
            let left = async || Ok(holding(&world, other, "alice").await?.is_empty());
            eventually("nothing is left in any storage that she was in", left).await?;
        }
        engine.close(Duration::from_secs(5)).await;
        drop(engine);
        let (engine, table) = world.open_with(&manifests)?;
        ensure!(contents(&world, &engine, &table, &alice).await? == after);
        engine.close(Duration::from_secs(5)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storage_that_is_down_holds_up_the_move_and_not_the_user() -> anyhow::Result<()> {
    let world = World::new(1, Rates::default())?;
    let (engine, table) = world.open_with(&manifests())?;
    let alice = user("alice")?;
    insert(&engine, &table, &alice, 1).await?;
    engine.flush(&Engine::instance_id(&table, &alice)).await?;
    world.set_down("eu", true);
    send(&engine, "alice", Some("eu")).await?;
    for id in 2..5 {
        insert(&engine, &table, &alice, id).await?;
        ensure!(contents(&world, &engine, &table, &alice).await?.len() == usize::try_from(id)?);
    }
    ensure!(place(&engine, &table, &alice).await? == "home");
    world.set_down("eu", false);
    arrives(&engine, &table, &alice, "eu").await?;
    ensure!(contents(&world, &engine, &table, &alice).await?.len() == 4);
    ensure!(send(&engine, "x", Some("nowhere")).await.is_err());
    engine.close(Duration::from_secs(5)).await;
    Ok(())
}

/// [`manifests`] with folders of the test's own.
fn in_folders(folders: &Path) -> String {
    STORAGES.iter().fold(manifests(), |text, name| {
        text.replace(&format!("path: /{name}}}"), &format!("path: {}}}", folders.join(name).display()))
    })
}

#[tokio::test]
async fn a_user_gets_his_storage_by_sql() -> anyhow::Result<()> {
    let folders = tempfile::tempdir()?;
    let home = Home::new(BINARY, &in_folders(folders.path()))?;
    let pod = home.start().await?;
    let of_alice = |storage: &str| files_below(&folders.path().join(storage).join("users/alice"));
    pod.run("alice", "INSERT INTO app.messages (id, body) VALUES (1, 'a')", json!([])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(of_alice("home")?.len() == 2);
    let as_dba = async |sql: &str, params: serde_json::Value| pod.sql_as("root", "dba", sql, params).await;
    let region = "UPDATE system.users SET storage_mode = 'region', storage_id = $1 WHERE username = 'alice'";
    #[rustfmt::skip]
    let refusals = [
        ("UPDATE system.users SET storage_mode = 'region' WHERE username = 'alice'", json!([]), 400, "INVALID_VALUE"),
        ("UPDATE system.users SET storage_mode = 'eu' WHERE username = 'alice'", json!([]), 400, "INVALID_VALUE"),
        ("UPDATE system.users SET role = 'dba' WHERE username = 'alice'", json!([]), 400, "INVALID_SQL"),
        ("UPDATE system.users SET storage_id = 'eu'", json!([]), 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE system.users SET storage_id = 'eu' WHERE username <> 'alice'", json!([]), 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE system.users SET storage_id = storage_mode WHERE username = 'alice'", json!([]), 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE system.users SET storage_id = 'eu' WHERE username = '..'", json!([]), 400, "INVALID_VALUE"),
        (region, json!(["nowhere"]), 404, "STORAGE_NOT_FOUND"),
        (region, json!(["No Name"]), 400, "INVALID_VALUE"),
        (region, json!([]), 400, "INVALID_PARAMETER"),
    ];
    for (sql, params, status, code) in refusals {
        refusal(sql, &as_dba(sql, params).await?, status, code)?;
    }
    for role in ["user", "service"] {
        refusal(region, &pod.sql_as("alice", role, region, json!(["eu"])).await?, 403, "PERMISSION_DENIED")?;
        let answer = pod.sql_as("alice", role, "SELECT * FROM system.users", json!([])).await?;
        refusal("SELECT", &answer, 403, "PERMISSION_DENIED")?;
    }
    ensure!(as_dba(region, json!(["eu"])).await?.body["results"][0]["row_count"] == 1);
    eventually("her files are in her storage", async || Ok(of_alice("eu")?.len() == 2)).await?;
    let shown = as_dba("SELECT username, storage_mode, storage_id FROM system.users", json!([])).await?;
    ensure!(json!(shown.rows()?) == json!([["alice", "region", "eu"]]), "{}", shown.text);
    let back = "UPDATE system.users SET storage_mode = 'table', storage_id = NULL WHERE 'alice' = username";
    ensure!(as_dba(back, json!([])).await?.status == 200);
    let moved = "SELECT users, rows, state FROM system.jobs WHERE kind = 'storage_move'";
    eventually("she has moved twice", async || {
        Ok(json!(as_dba(moved, json!([])).await?.rows()?) == json!([["1", "2", "done"]]))
    })
    .await?;
    ensure!(rows(&pod, "alice", "SELECT * FROM app.messages", json!([])).await? == json!([["1", "a"]]));
    Ok(())
}

/// How many rows he sees.
async fn ids(pod: &Pod, name: &str) -> anyhow::Result<usize> {
    Ok(rows(pod, name, "SELECT id FROM app.messages", json!([])).await?.as_array().context("rows")?.len())
}

/// Whether any object below `folder` has her name in its path or bytes.
fn holds_alice(folder: &Path) -> anyhow::Result<bool> {
    let found = std::process::Command::new("grep").args(["-rlaF", "alice"]).arg(folder).output()?;
    Ok(!found.stdout.is_empty() || files_below(folder)?.iter().any(|path| path.contains("alice")))
}

#[tokio::test]
async fn a_pod_killed_between_any_two_steps_of_a_move_loses_doubles_and_leaves_behind_nothing() -> anyhow::Result<()> {
    for point in MOVE_POINTS {
        let folders = tempfile::tempdir()?;
        let folder = |name: &str| folders.path().join(name);
        let mut home = Home::new(BINARY, &in_folders(folders.path()))?;
        home.flags = ["--garbage-after-secs", "0"].map(str::to_owned).to_vec();
        let pod = home.start().await?;
        for name in ["alice", "bob"] {
            let sql = "INSERT INTO app.messages (id, body) SELECT value, 'body' FROM generate_series(1, 20)";
            pod.run(name, sql, json!([])).await?;
            pod.run(name, "STORAGE FLUSH TABLE app.messages", json!([])).await?;
            pod.run(name, "DELETE FROM app.messages WHERE id = 7", json!([])).await?;
        }
        if point == "flush.committed" {
            // Then the first commit is the move.
            pod.run("alice", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        }
        drop(pod);
        let users = FilesystemStore::open(&home.data_dir().join("home"))?;
        let alice = User {
            id: UserId::new("alice")?,
            storage_mode: StorageMode::Region,
            storage_id: Some(StorageName::new("eu")?),
        };
        Users::default().put(&users, alice).await?;

        home.crash(point).await?;
        let mut pod = home.start().await?;
        ensure!((ids(&pod, "alice").await?, ids(&pod, "bob").await?) == (19, 19), "{point}");
        pod.run("alice", "INSERT INTO app.messages (id, body) VALUES (21, 'later')", json!([])).await?;
        pod.run("alice", "UPDATE app.messages SET body = 'later' WHERE id = 3", json!([])).await?;
        let has_left = async || Ok(!holds_alice(&folder("home"))?);
        eventually(&format!("{point}: nothing of hers is left behind"), has_left).await?;
        ensure!(
            ids(&pod, "alice").await? == 20 && files_below(&folder("eu").join("users/alice"))?.len() > 1,
            "{point}"
        );
        pod.kill()?;
        let pod = home.start().await?;
        ensure!((ids(&pod, "alice").await?, ids(&pod, "bob").await?) == (20, 19), "{point}");
        let body =
            rows(&pod, "alice", "SELECT body FROM app.messages WHERE id IN (3, 4) ORDER BY id", json!([])).await?;
        ensure!(body == json!([["later"], ["body"]]), "{point}: {body}");
    }
    Ok(())
}

#[tokio::test]
async fn a_pod_killed_while_it_changes_a_user_brings_his_rows_to_where_the_log_says() -> anyhow::Result<()> {
    for point in USER_POINTS {
        let folders = tempfile::tempdir()?;
        let folder = |name: &str| folders.path().join(name);
        let mut home = Home::new(BINARY, &in_folders(folders.path()))?;
        home.flags = ["--garbage-after-secs", "0"].map(str::to_owned).to_vec();
        let pod = home.start().await?;
        for name in ["alice", "bob"] {
            let sql = "INSERT INTO app.messages (id, body) SELECT value, 'body' FROM generate_series(1, 20)";
            pod.run(name, sql, json!([])).await?;
            pod.run(name, "STORAGE FLUSH TABLE app.messages", json!([])).await?;
            pod.run(name, "DELETE FROM app.messages WHERE id = 7", json!([])).await?;
        }
        drop(pod);

        home.env = Home::crash_at(point);
        let mut pod = home.start().await?;
        let sql = "UPDATE system.users SET storage_mode = 'region', storage_id = 'eu' WHERE username = 'alice'";
        let _ = pod.sql_as("root", "dba", sql, json!([])).await;
        ensure!(!pod.wait().await?.success(), "{point} was not reached");

        home.env.clear();
        let mut pod = home.start().await?;
        let has_left = async || Ok(!holds_alice(&folder("home"))?);
        eventually(&format!("{point}: nothing of hers is left behind"), has_left).await?;
        let users = "SELECT username, storage_mode, storage_id FROM system.users";
        let shown = pod.sql_as("root", "dba", users, json!([])).await?;
        ensure!(json!(shown.rows()?) == json!([["alice", "region", "eu"]]), "{point}: {}", shown.text);
        ensure!((ids(&pod, "alice").await?, ids(&pod, "bob").await?) == (19, 19), "{point}");
        ensure!(files_below(&folder("eu").join("users"))?.iter().all(|path| path.starts_with("alice/")), "{point}");
        pod.kill()?;
        let pod = home.start().await?;
        ensure!((ids(&pod, "alice").await?, ids(&pod, "bob").await?) == (19, 19), "{point}");
    }
    Ok(())
}
