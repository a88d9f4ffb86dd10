//! A statement sees one moment: however often it reads an instance, and whatever else it reads.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod, eventually};
use serde_json::json;
use tokio::task::JoinSet;

use super::differential::{Ours, Said, Volume};
use super::{BINARY, declare, refused, returns, user_table};

/// How long statements run beside each other.
const RACE: Duration = Duration::from_secs(5);

/// Statements of one user that run beside each other, each again and again.
struct Race {
    ours: Arc<Ours>,
    end: Instant,
    tasks: JoinSet<anyhow::Result<i64>>,
}

impl Race {
    /// While the rows of `tables` are flushed and compacted.
    fn over(ours: Ours, tables: &[&str]) -> Self {
        let mut race = Self { ours: Arc::new(ours), end: Instant::now() + RACE, tasks: JoinSet::new() };
        for table in tables {
            for verb in ["FLUSH", "COMPACT"] {
                let sql = format!("STORAGE {verb} TABLE app.{table}");
                race.run(move |_| vec![sql.clone()]);
            }
        }
        race
    }

    /// Runs what `statements` says for 0, 1, 2, …
    fn run(&mut self, statements: impl Fn(i64) -> Vec<String> + Send + 'static) {
        let (ours, end) = (Arc::clone(&self.ours), self.end);
        self.tasks.spawn(async move {
            let mut times = 0;
            while Instant::now() < end {
                for sql in statements(times) {
                    ours.run("alice", &sql).await.context(sql)?;
                }
                times += 1;
            }
            anyhow::Ok(times)
        });
    }

    /// Runs a statement that has to say `expected` each time.
    fn expect(&mut self, sql: &'static str, expected: Said) {
        let (ours, end) = (Arc::clone(&self.ours), self.end);
        self.tasks.spawn(async move {
            let mut times = 0;
            while Instant::now() < end {
                let found = ours.run("alice", sql).await.context(sql)?;
                ensure!(found == expected, "{sql}, after {times} times: {found:?}");
                times += 1;
            }
            anyhow::Ok(times)
        });
    }

    async fn finish(mut self) -> anyhow::Result<()> {
        while let Some(done) = self.tasks.join_next().await {
            let times = done??;
            ensure!(times > 2, "one ran {times} times, which proves little");
        }
        Ok(())
    }
}

/// Queries read files that are replaced meanwhile.
async fn open() -> anyhow::Result<Ours> {
    Ours::keeping_files_for(60).await
}

fn one(value: &str) -> Said {
    Said::Rows(vec![vec![Some(value.to_owned())]])
}

fn values(keys: std::ops::Range<i64>, row: impl Fn(i64) -> String) -> String {
    keys.map(row).collect::<Vec<_>>().join(", ")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn all_scans_of_one_table_see_the_same_rows() -> anyhow::Result<()> {
    const KEYS: i64 = 40;
    let ours = open().await?;
    let rows = values(0..KEYS, |id| format!("({id}, 0, 'x')"));
    ours.run("alice", &format!("INSERT INTO notes VALUES {rows}")).await?;
    let mut race = Race::over(ours, &["notes"]);
    for writer in 1..3 {
        race.run(move |step| {
            let id = writer * 1_000_000 + step;
            vec![
                format!("INSERT INTO notes VALUES ({id}, 1, 'y')"),
                format!("UPDATE notes SET num = num + 1 WHERE id = {}", (step * 7 + writer) % KEYS),
                format!("UPDATE notes SET num = num + 1 WHERE s = 'y' AND id % 2 = {}", step % 2),
                format!("DELETE FROM notes WHERE id = {}", id - 10),
            ]
        });
    }
    for sql in [
        "SELECT count(*) FROM notes WHERE NOT EXISTS (SELECT 1 FROM notes y WHERE y.id = notes.id)",
        "SELECT count(*) FROM notes x FULL JOIN notes y ON x.id = y.id AND x.num = y.num \
         WHERE x.id IS NULL OR y.id IS NULL",
        "SELECT (SELECT sum(num) FROM notes) - (SELECT sum(num) FROM notes WHERE id > -1)",
        "SELECT count(*) FROM (SELECT id, num FROM notes WHERE id > -1 EXCEPT SELECT id, num FROM notes) d",
    ] {
        race.expect(sql, one("0"));
    }
    race.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn what_was_written_after_something_else_is_never_seen_without_it() -> anyhow::Result<()> {
    let mut race = Race::over(open().await?, &["notes", "pairs"]);
    for writer in 1..4 {
        race.run(move |step| {
            let (id, old) = (writer * 1_000_000 + step, step - 10);
            vec![
                format!("INSERT INTO notes VALUES ({id}, 0, 'parent')"),
                format!("INSERT INTO pairs VALUES ({id}, '{writer}', {step})"),
                format!("DELETE FROM pairs WHERE a = '{writer}' AND b = {old}"),
                format!("DELETE FROM notes WHERE id = {}", id - 10),
            ]
        });
    }
    for sql in [
        "SELECT count(*) FROM pairs p WHERE NOT EXISTS (SELECT 1 FROM notes n WHERE n.id = p.v)",
        "SELECT count(*) FROM notes n RIGHT JOIN pairs p ON p.v = n.id WHERE n.id IS NULL",
        "SELECT count(*) FROM pairs WHERE v NOT IN (SELECT id FROM notes)",
    ] {
        race.expect(sql, one("0"));
    }
    let orphans = "INSERT INTO words SELECT p.a || CAST(p.b AS TEXT), p.v FROM pairs p LEFT JOIN notes n ON n.id = p.v \
                   WHERE n.id IS NULL";
    race.expect(orphans, Said::Changed(0));
    race.finish().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_rows_of_two_tables_replace_in_files_is_found_after_a_restart() -> anyhow::Result<()> {
    let mut ours = open().await?;
    for sql in [
        format!("INSERT INTO notes VALUES {}", values(1..51, |id| format!("({id}, 0, 'x')"))),
        format!("INSERT INTO pairs VALUES {}", values(1..51, |id| format!("(0, 'a', {id})"))),
        "STORAGE FLUSH TABLE app.notes".to_owned(),
        "STORAGE FLUSH TABLE app.pairs".to_owned(),
        "UPDATE notes SET num = num + 1".to_owned(),
        "UPDATE pairs SET v = v + 100 WHERE b <= 25".to_owned(),
    ] {
        ours.run("alice", &sql).await.context(sql)?;
    }
    ours.restart(Volume::Kept).await?;
    for _ in 0..2 {
        let sql = "SELECT count(*), sum(n.num), sum(p.v) FROM notes n JOIN pairs p ON p.b = n.id";
        let found = ours.run("alice", sql).await?;
        let expected = ["50", "50", "2500"].map(|text| Some(text.to_owned())).to_vec();
        ensure!(found == Said::Rows(vec![expected]), "{found:?}");
    }
    Ok(())
}

/// About two megabytes of rows, in memory too.
const MANY: &str = "INSERT INTO app.t (body) SELECT repeat('x', 1000) FROM generate_series(1, 2000)";

async fn starts_with_memory(home: &mut Home, bytes: usize) -> anyhow::Result<Pod> {
    home.flags = vec![format!("--query-memory-bytes={bytes}")];
    home.start().await
}

#[tokio::test]
async fn buffered_rows_take_of_the_querys_memory_once_for_all_scans() -> anyhow::Result<()> {
    let columns = ["id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()", "body, type: TEXT"];
    let mut home = Home::new(BINARY, &declare(&[user_table("t", &columns)]))?;
    let mut pod = starts_with_memory(&mut home, 16_000_000).await?;
    ensure!(pod.run("alice", MANY, json!([])).await? == 2_000);
    let sixty = vec!["SELECT max(body) AS m FROM app.t"; 60].join(" UNION ALL ");
    returns(&pod, "alice", &format!("SELECT count(m) FROM ({sixty}) x"), json!([["60"]])).await?;
    ensure!(pod.stop().await?.success());

    let mut pod = starts_with_memory(&mut home, 1_000_000).await?;
    for sql in ["SELECT max(body) FROM app.t", "UPDATE app.t SET body = 'y'"] {
        let message = refused(&pod, sql, json!([]), 413, "QUERY_MEMORY_EXCEEDED").await?;
        ensure!(message.contains("1000000 bytes"), "{message}");
    }
    // What does not need all of them does not take all.
    returns(&pod, "alice", "SELECT count(*) FROM app.t", json!([["2000"]])).await?;
    returns(&pod, "alice", "SELECT count(*) FROM app.t WHERE id > 0", json!([["2000"]])).await?;
    returns(&pod, "alice", "SELECT id FROM app.t WHERE body = 'y'", json!([])).await?;
    returns(&pod, "alice", "SELECT length(body) FROM app.t LIMIT 1", json!([[1_000]])).await?;
    eventually("the memory is given back", async || {
        let (_, metrics) = pod.get("/metrics").await?;
        Ok(metrics.lines().any(|line| line == "kalamdb_query_memory_bytes 0"))
    })
    .await?;
    ensure!(pod.stop().await?.success());
    Ok(())
}
