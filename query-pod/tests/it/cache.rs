//! What is kept of data files: how often the storage is asked, and that no state of the cache changes an answer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use kalamdb_parquet_cache::{CHUNK_BYTES, Cache};
use kalamdb_test_support::fault_store::{FaultStore, Rates};
use kalamdb_test_support::pod::{Home, MANIFESTS, Pod, eventually, files_below};
use object_store::memory::InMemory;
use object_store::{ObjectStore as _, ObjectStoreExt as _};
use serde_json::{Value, json};

use crate::{BINARY, returns, rows, user_table};

/// The value of a metric, with its labels; 0 while it is not there.
async fn metric(pod: &Pod, name: &str) -> anyhow::Result<u64> {
    let (_, text) = pod.get("/metrics").await?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(Ok(0), |value| value.parse().with_context(|| format!("{name} is {value}")))
}

async fn requests(pod: &Pod, kind: &str) -> anyhow::Result<u64> {
    metric(pod, &format!("kalamdb_storage_requests_total{{kind=\"{kind}\"}}")).await
}

/// Runs a statement, and returns its rows and the GETs that it took. Nothing on its way may list.
async fn counted(pod: &Pod, sql: &str, params: Value) -> anyhow::Result<(Value, u64)> {
    let before = (requests(pod, "get").await?, requests(pod, "list").await?, requests(pod, "head").await?);
    let found = rows(pod, "alice", sql, params).await?;
    let after = (requests(pod, "get").await?, requests(pod, "list").await?, requests(pod, "head").await?);
    ensure!((after.1, after.2) == (before.1, before.2), "{sql} listed or looked at objects");
    Ok((found, after.0 - before.0))
}

/// Text of `length` characters that does not compress well.
fn text(seed: u64, length: usize) -> String {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut text = String::with_capacity(length + 16);
    while text.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(&format!("{state:016x}"));
    }
    text.truncate(length);
    text
}

/// Ids of the table `texts` are texts, so that its files have Bloom filters.
fn key(table: &str, id: u64) -> Value {
    if table == "texts" { json!(format!("{id:08}")) } else { json!(id) }
}

async fn insert(pod: &Pod, table: &str, ids: std::ops::Range<u64>, length: usize) -> anyhow::Result<()> {
    for start in ids.clone().step_by(1_000) {
        let values: Vec<String> = (start..ids.end.min(start + 1_000))
            .map(|id| format!("({}, '{}')", key(table, id), text(id, length)).replace('"', "'"))
            .collect();
        pod.run("alice", &format!("INSERT INTO app.{table} (id, body) VALUES {}", values.join(",")), json!([])).await?;
    }
    Ok(())
}

async fn flush(pod: &Pod, table: &str) -> anyhow::Result<()> {
    pod.run("alice", &format!("STORAGE FLUSH TABLE app.{table}"), json!([])).await.map(|_| ())
}

#[tokio::test]
async fn the_footer_of_a_file_is_decoded_once_for_look_ups_and_queries_alike() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = home.start().await?;
    insert(&pod, "messages", 0..2_000, 50).await?;
    flush(&pod, "messages").await?;
    returns(&pod, "alice", "SELECT count(id) FROM app.messages WHERE id > 10 AND body <> 'x'", json!([["1989"]]))
        .await?;
    ensure!(metric(&pod, "kalamdb_footer_misses_total").await? == 1);
    pod.run("alice", "UPDATE app.messages SET body = 'new' WHERE id = 7", json!([])).await?;
    returns(&pod, "alice", "SELECT body FROM app.messages WHERE id = 7", json!([["new"]])).await?;
    ensure!(metric(&pod, "kalamdb_footer_misses_total").await? == 1);
    ensure!(metric(&pod, "kalamdb_footer_hits_total").await? >= 2);
    ensure!(metric(&pod, "kalamdb_footer_bytes").await? > 0);
    // The kernel keeps the files of this machine already.
    ensure!(metric(&pod, "kalamdb_cache_memory_bytes").await? == 0);
    ensure!(files_below(&home.data_dir().join("cache"))?.len() > 1);
    Ok(())
}

#[tokio::test]
async fn a_body_that_ends_early_is_an_error_and_nothing_of_it_is_kept() -> anyhow::Result<()> {
    let (truth, path) = (Arc::new(InMemory::new()), object_store::path::Path::from("a.parquet"));
    let chunk = usize::try_from(CHUNK_BYTES)?;
    let file = text(1, 3 * chunk - 100);
    truth.put(&path, file.clone().into()).await?;
    let (faults, cache, root) = (FaultStore::healthy(truth), Cache::in_memory(64 << 20).await, "root".into());
    let end = file.len() as u64;
    let read = async || cache.layer(&root, Arc::new(faults.clone())).get_ranges(&path, &[10..30, end - 30..end]).await;
    for rates in [Rates { short: 1.0, ..Rates::default() }, Rates { broken: 1.0, ..Rates::default() }] {
        faults.set_rates(rates);
        for cut in [0, 20, chunk, 2 * chunk + 1, file.len() - 1] {
            faults.cut_at(cut);
            ensure!(read().await.is_err(), "after {cut} bytes");
            ensure!(cache.counts().memory_bytes == 0, "something is kept of {cut} bytes");
        }
    }
    faults.heal();
    let (first, last) = (&file.as_bytes()[10..30], &file.as_bytes()[file.len() - 30..]);
    ensure!(read().await? == [first, last]);
    ensure!(cache.counts().memory_bytes > 0);
    Ok(())
}

#[tokio::test]
async fn without_memory_nothing_is_kept_and_every_answer_is_the_same() -> anyhow::Result<()> {
    let mut home = Home::new(BINARY, MANIFESTS)?;
    home.flags = vec!["--cache-memory-bytes".to_owned(), "0".to_owned()];
    let pod = home.start().await?;
    insert(&pod, "messages", 0..100, 50).await?;
    flush(&pod, "messages").await?;
    for _ in 0..2 {
        returns(&pod, "alice", "SELECT body FROM app.messages WHERE id = 7", json!([[text(7, 50)]])).await?;
    }
    ensure!(metric(&pod, "kalamdb_footer_hits_total").await? == 0);
    ensure!(!home.data_dir().join("cache").exists());
    Ok(())
}

mod s3 {
    //! In a storage elsewhere; each test has a folder of its own in the bucket of the S3 server, if there is one.

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::S3;

    /// A pod's folder whose storage is the S3 server; `None` without one.
    fn home(tables: &[&str]) -> anyhow::Result<Option<Home>> {
        let Some(S3 { endpoint, bucket, access_key, secret_key }) = S3::find()? else { return Ok(None) };
        let prefix = format!("pod/{:016x}", rand::random::<u64>());
        let storage = format!(
            "apiVersion: v1\nkind: Secret\nmetadata: {{name: s3}}\n\
             stringData: {{accessKeyId: {access_key}, secretAccessKey: {secret_key}}}\n\
             ---\napiVersion: kalamdb.org/v1alpha1\nkind: Storage\nmetadata: {{name: local}}\nspec:\n  type: S3\n  s3:\n    \
             bucket: {bucket}\n    prefix: {prefix}\n    region: us-east-1\n    endpoint: {endpoint}\n    \
             pathStyle: true\n    allowHttp: true\n    credentialsSecret: {{name: s3}}\n  \
             userTablesTemplate: users/{{userId}}/{{namespace}}/{{tableName}}\n  \
             sharedTablesTemplate: shared/{{namespace}}/{{tableName}}\n---\napiVersion: kalamdb.org/v1alpha1\n\
             kind: Namespace\nmetadata: {{name: app}}\nspec: {{defaultStorage: local}}\n"
        );
        let declared = |name: &&str| {
            let id = if *name == "texts" {
                "id, type: TEXT, primaryKey: true"
            } else {
                "id, type: BIGINT, primaryKey: true"
            };
            user_table(name, &[id, "body, type: TEXT"])
        };
        let tables: Vec<String> = tables.iter().map(declared).collect();
        Ok(Some(Home::new(BINARY, &format!("{storage}{}", tables.concat()))?))
    }

    /// Starts the pod anew after `between` has seen its cache's folder.
    async fn again(
        home: &Home,
        pod: &mut Pod,
        between: impl FnOnce(&Path) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        pod.stop().await?;
        between(&home.data_dir().join("cache"))?;
        *pod = home.start().await?;
        settled(pod).await
    }

    /// Waits until the process has written the checkpoint with which it begins: that lists.
    async fn settled(pod: &Pod) -> anyhow::Result<()> {
        let written = async || Ok(pod.get("/metrics").await?.1.contains("kalamdb_checkpoints_total 1\n"));
        eventually("the first checkpoint is written", written).await
    }

    fn emptied(cache: &Path) -> anyhow::Result<()> {
        Ok(std::fs::remove_dir_all(cache)?)
    }

    #[tokio::test]
    async fn a_cold_row_takes_two_requests_at_most_and_a_warm_one_none() -> anyhow::Result<()> {
        let Some(home) = home(&["small", "large", "texts"])? else { return Ok(()) };
        let mut pod = home.start().await?;
        // Of one chunk, and of two row groups.
        let tables = [("small", 1_000, 100, 1), ("large", 40_000, 300, 2), ("texts", 40_000, 300, 2)];
        for (table, rows, length, _) in tables {
            insert(&pod, table, 0..rows, length).await?;
            flush(&pod, table).await?;
            settled(&pod).await?;
            // What was uploaded is there already.
            let select = format!("SELECT body FROM app.{table} WHERE id = $1");
            let (found, gets) = counted(&pod, &select, json!([key(table, 500)])).await?;
            ensure!(found == json!([[text(500, length)]]), "{table}: {found}");
            ensure!(gets == 0, "{gets} requests for a row of {table} that was just flushed");
        }
        for (table, _, length, most) in tables {
            again(&home, &mut pod, emptied).await?;
            let select = format!("SELECT body FROM app.{table} WHERE id = $1");
            let (found, gets) = counted(&pod, &select, json!([key(table, 777)])).await?;
            ensure!(found == json!([[text(777, length)]]), "{table}: {found}");
            println!("{gets} requests for a cold row of {table}");
            ensure!((1..=most).contains(&gets), "{gets} requests for a cold row of {table}");
            let (again, gets) = counted(&pod, &select, json!([key(table, 777)])).await?;
            ensure!(again == found && gets == 0, "{gets} requests for a warm row of {table}");
            // The whole statement, not only its look-up.
            let update = format!("UPDATE app.{table} SET body = $1 WHERE id = $2");
            let (_, gets) = counted(&pod, &update, json!(["new", key(table, 777)])).await?;
            println!("{gets} requests for the change of a warm row of {table}");
            ensure!(gets < most, "{gets} requests for the change of a warm row of {table}");
        }
        for (table, _, _, most) in tables {
            again(&home, &mut pod, emptied).await?;
            let update = format!("UPDATE app.{table} SET body = $1 WHERE id = $2");
            let (_, gets) = counted(&pod, &update, json!(["newer", key(table, 555)])).await?;
            println!("{gets} requests for the change of a cold row of {table}");
            ensure!((1..=most + 1).contains(&gets), "{gets} requests for the change of a cold row of {table}");
            let select = format!("SELECT body FROM app.{table} WHERE id IN ($1, $2) ORDER BY id");
            let (found, _) = counted(&pod, &select, json!([key(table, 554), key(table, 555)])).await?;
            ensure!(found[1] == json!(["newer"]), "{found}");
        }
        // A restart that leaves the folder alone asks for nothing that is in it.
        let select = "SELECT body FROM app.small WHERE id = 1";
        counted(&pod, select, json!([])).await?;
        again(&home, &mut pod, |_| Ok(())).await?;
        let (found, gets) = counted(&pod, select, json!([])).await?;
        ensure!(found == json!([[text(1, 100)]]) && gets == 0, "{gets} requests after a restart");
        Ok(())
    }

    fn blocks(cache: &Path) -> anyhow::Result<Vec<PathBuf>> {
        Ok(files_below(cache)?.into_iter().filter(|name| name != "FORMAT").map(|name| cache.join(name)).collect())
    }

    /// Bytes for every file of the cache.
    fn garbage(cache: &Path) -> anyhow::Result<()> {
        for (seed, block) in (0..).zip(blocks(cache)?) {
            std::fs::write(block, text(seed, 1 << 20))?;
        }
        Ok(())
    }

    /// One bit in every fifth page of all that is written.
    fn flipped(cache: &Path) -> anyhow::Result<()> {
        for block in blocks(cache)? {
            let mut bytes = std::fs::read(&block)?;
            bytes.iter_mut().step_by(5 * 4_096 + 1).for_each(|byte| *byte ^= 4);
            std::fs::write(block, bytes)?;
        }
        Ok(())
    }

    fn of_another_format(cache: &Path) -> anyhow::Result<()> {
        Ok(std::fs::write(cache.join("FORMAT"), "kalamdb parquet cache 0\n")?)
    }

    fn unusable(cache: &Path) -> anyhow::Result<()> {
        emptied(cache)?;
        Ok(std::fs::write(cache, "no folder")?)
    }

    #[tokio::test]
    async fn whatever_is_in_the_folder_of_the_cache_the_answers_are_the_same() -> anyhow::Result<()> {
        let Some(mut home) = home(&["notes"])? else { return Ok(()) };
        // Little memory, so that the disk is asked; and small blocks, so that damage reaches all.
        home.flags = ["--cache-memory-bytes", "65536", "--cache-disk-bytes", "67108864"].map(str::to_owned).to_vec();
        let mut pod = home.start().await?;
        for part in 0..4 {
            insert(&pod, "notes", part * 1_000..(part + 1) * 1_000, 300).await?;
            flush(&pod, "notes").await?;
        }
        let queries = [
            "SELECT count(*), min(body), max(body), sum(length(body)) FROM app.notes WHERE body <> ''",
            "SELECT id, body FROM app.notes WHERE id IN (5, 1005, 2005, 3999) ORDER BY id",
            "SELECT body FROM app.notes ORDER BY id DESC LIMIT 7",
        ];
        let answers = async |pod: &Pod| {
            let mut all = Vec::new();
            for query in queries {
                all.push(rows(pod, "alice", query, json!([])).await?);
            }
            anyhow::Ok(all)
        };
        let expected = answers(&pod).await?;
        let states: [fn(&Path) -> anyhow::Result<()>; 6] =
            [|_| Ok(()), emptied, garbage, flipped, of_another_format, unusable];
        for damage in states {
            for _ in 0..2 {
                ensure!(answers(&pod).await? == expected);
            }
            again(&home, &mut pod, damage).await?;
            ensure!(answers(&pod).await? == expected);
            let cache = home.data_dir().join("cache").metadata()?;
            ensure!(!cache.is_dir() || cache.permissions().mode() & 0o777 == 0o700);
        }
        Ok(())
    }
}
