//! Every bound has its own error, and the pod goes on.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::StreamExt as _;
use kalamdb_test_support::pod::{Home, Pod, eventually};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::{BINARY, declare, refusal, refused, returns, rows, user_table};

fn manifests() -> String {
    declare(&[user_table("t", &["id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()", "body, type: TEXT"])])
}

async fn start(flags: &[&str]) -> anyhow::Result<(Home, Pod)> {
    let mut home = Home::new(BINARY, &manifests())?;
    home.flags = flags.iter().map(|flag| (*flag).to_owned()).collect();
    let pod = home.start().await?;
    Ok((home, pod))
}

async fn still_answers(pod: &Pod, rows: u64) -> anyhow::Result<()> {
    returns(pod, "alice", "SELECT count(*) FROM app.t", json!([[rows.to_string()]])).await
}

#[tokio::test]
async fn sizes_are_bounded_and_each_error_names_its_bound() -> anyhow::Result<()> {
    let (_home, pod) = start(&[
        "--body-bytes-max=60000",
        "--statement-bytes-max=20000",
        "--params-max=10",
        "--insert-rows-max=100",
        "--row-bytes-max=5000",
        "--answer-bytes-max=20000",
    ])
    .await?;
    let text = |bytes: usize| "x".repeat(bytes);
    let values = |rows: usize| format!("INSERT INTO app.t (body) VALUES {}", vec!["('x')"; rows].join(","));
    let sized = |bytes: usize| format!("SELECT '{}' = ''", text(bytes - "SELECT '' = ''".len()));
    #[rustfmt::skip]
    let over: Vec<(String, Value, &str, &str)> = vec![
        (sized(60_000), json!([]), "REQUEST_TOO_LARGE", "60000 bytes"),
        (sized(20_001), json!([]), "STATEMENT_TOO_LARGE", "20001 bytes, at most 20000"),
        ("SELECT 1".to_owned(), json!((0..11).collect::<Vec<_>>()), "TOO_MANY_PARAMETERS", "11 parameters were sent, at most 10"),
        (values(101), json!([]), "TOO_MANY_ROWS", "101 rows, at most 100"),
        (format!("INSERT INTO app.t (body) VALUES ('a'), ('{}')", text(5_001)), json!([]), "ROW_TOO_LARGE", "row 2 has"),
        ("INSERT INTO app.t (body) VALUES ($1)".to_owned(), json!([text(5_001)]), "ROW_TOO_LARGE", "at most 5000"),
        ("SELECT value FROM generate_series(1, 3000)".to_owned(), json!([]), "ANSWER_TOO_LARGE", "20000 bytes"),
        ("SELECT repeat('x', 20001)".to_owned(), json!([]), "ANSWER_TOO_LARGE", "20000 bytes"),
    ];
    for (sql, params, code, says) in over {
        let message = refused(&pod, &sql, params, 413, code).await?;
        ensure!(message.contains(says), "{message}");
        still_answers(&pod, 0).await?;
    }
    returns(&pod, "alice", &sized(20_000), json!([[false]])).await?;
    ensure!(pod.run("alice", &values(100), json!([])).await? == 100);
    ensure!(pod.run("alice", "INSERT INTO app.t (body) VALUES ($1)", json!([text(4_900)])).await? == 1);
    let ten = json!((0..10).collect::<Vec<_>>());
    ensure!(pod.sql("alice", "SELECT $1, $2, $3, $4, $5, $6, $7, $8, $9, $10", ten).await?.status == 200);
    still_answers(&pod, 101).await?;
    // A body without an end is cut off at the bound, not kept.
    let endless = futures::stream::repeat_with(|| Ok::<_, std::io::Error>(vec![b' '; 8_192])).take(10_000);
    let authorization = format!("Bearer {}", pod.token("alice", "user")?);
    if let Ok(answer) = pod.send(Some(&authorization), reqwest::Body::wrap_stream(endless)).await {
        refusal("an endless body", &answer, 413, "REQUEST_TOO_LARGE")?;
    }
    still_answers(&pod, 101).await
}

/// Runs for ever, and can be stopped at any time.
const ENDLESS: &str = "SELECT count(*) FROM generate_series(1, 1000000000000) WHERE value % 7 = 8";

/// Runs for seconds, in which it cannot be stopped.
const STUBBORN: &str =
    "SELECT count(*) FROM generate_series(1, 60000) a, generate_series(1, 60000) b WHERE a.value * b.value < 0";

#[tokio::test]
async fn time_and_number_of_queries_are_bounded() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-timeout-secs=3", "--queries-max=2"]).await?;
    let started = Instant::now();
    let endless = async |user| pod.sql(user, ENDLESS, json!([])).await;
    let third = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        pod.sql("bob", "SELECT 1", json!([])).await
    };
    let (first, second, third) = tokio::join!(endless("alice"), endless("carol"), third);
    ensure!(started.elapsed() < Duration::from_secs(6), "it took {:?}", started.elapsed());
    for answer in [first?, second?] {
        let message = refusal(ENDLESS, &answer, 503, "QUERY_TIMEOUT")?;
        ensure!(message.contains("3 s"), "{message}");
    }
    let message = refusal("a third query", &third?, 429, "TOO_MANY_QUERIES")?;
    ensure!(message.contains("2 queries"), "{message}");
    still_answers(&pod, 0).await
}

#[tokio::test]
async fn one_user_cannot_take_every_query() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--queries-max=4"]).await?;
    let endless = async || pod.sql("alice", ENDLESS, json!([])).await;
    let others = async {
        // Until both of alice's queries run.
        eventually("a third query of one user is refused", async || {
            let answer = pod.sql("alice", "SELECT 1", json!([])).await?;
            if answer.status == 200 {
                return Ok(false);
            }
            let message = refusal("a third query of one user", &answer, 429, "TOO_MANY_QUERIES")?;
            Ok(message.contains("at most 2 queries of one user"))
        })
        .await?;
        returns(&pod, "bob", "SELECT 1", json!([["1"]])).await
    };
    let both = async { tokio::join!(endless(), endless()) };
    tokio::select! {
        ended = both => anyhow::bail!("queries without an end ended: {ended:?}"),
        done = others => done?,
    }
    eventually("alice's queries end with their connections", async || {
        Ok(pod.sql("alice", "SELECT 1", json!([])).await?.status == 200)
    })
    .await
}

#[tokio::test]
async fn one_user_cannot_take_every_request() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--requests-max=4", "--requests-per-user-max=2"]).await?;
    let body = json!({"sql": "SELECT 1"}).to_string();
    let mut begun = vec![pod.begin("alice", body.len()).await?, pod.begin("alice", body.len()).await?];
    let message = refused(&pod, "SELECT 1", json!([]), 429, "TOO_MANY_REQUESTS").await?;
    ensure!(message.contains("at most 2 requests of one user"), "{message}");
    begun.extend([pod.begin("bob", body.len()).await?, pod.begin("bob", body.len()).await?]);
    let answer = pod.sql("carol", "SELECT 1", json!([])).await?;
    let message = refusal("a fifth request", &answer, 429, "TOO_MANY_REQUESTS")?;
    ensure!(message.contains("4 requests are under way"), "{message}");
    for mut connection in begun {
        let mut answer = String::new();
        connection.write_all(body.as_bytes()).await?;
        connection.read_to_string(&mut answer).await?;
        ensure!(answer.contains(r#""rows":[["1"]]"#), "{answer}");
    }
    still_answers(&pod, 0).await
}

/// 24 MB, most of which no system buffers between two processes.
const LARGE: &str = "SELECT repeat('x', 1000000) FROM generate_series(1, 24)";

/// Asks for a large answer and takes the first bytes of it only.
async fn unread(pod: &Pod, user: &str) -> anyhow::Result<TcpStream> {
    let mut connection = pod.send_unread(user, LARGE).await?;
    let mut first = [0; 15];
    connection.read_exact(&mut first).await?;
    ensure!(&first == b"HTTP/1.1 200 OK", "{}", String::from_utf8_lossy(&first));
    Ok(connection)
}

#[tokio::test]
async fn an_answer_that_is_not_read_is_a_request_under_way() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--requests-per-user-max=1"]).await?;
    let connection = unread(&pod, "alice").await?;
    let message = refused(&pod, "SELECT 1", json!([]), 429, "TOO_MANY_REQUESTS").await?;
    ensure!(message.contains("at most 1 requests of one user"), "{message}");
    returns(&pod, "bob", "SELECT 1", json!([["1"]])).await?;
    drop(connection);
    eventually("the request ends with its connection", async || {
        Ok(pod.sql("alice", "SELECT 1", json!([])).await?.status == 200)
    })
    .await
}

#[tokio::test]
async fn answers_that_are_not_read_are_bounded_for_a_user_and_for_all() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--answer-bytes-max=25000000", "--answers-bytes-max=50000000"]).await?;
    let alice = unread(&pod, "alice").await?;
    let message = refused(&pod, LARGE, json!([]), 429, "ANSWERS_BUSY").await?;
    ensure!(message.contains("answers of one user may hold 25000000 bytes"), "{message}");
    // What is small is answered all the same.
    still_answers(&pod, 0).await?;
    let bob = unread(&pod, "bob").await?;
    let answer = pod.sql("carol", LARGE, json!([])).await?;
    let message = refusal(LARGE, &answer, 429, "ANSWERS_BUSY")?;
    ensure!(message.contains("answers of all users may hold 50000000 bytes"), "{message}");
    drop((alice, bob));
    eventually(
        "the room of answers is free again",
        async || Ok(pod.sql("alice", LARGE, json!([])).await?.status == 200),
    )
    .await
}

#[tokio::test]
async fn limits_that_contradict_each_other_are_told_at_the_start() -> anyhow::Result<()> {
    let mut home = Home::new(BINARY, &manifests())?;
    home.flags = vec!["--answer-bytes-max=1000".to_owned(), "--answers-bytes-max=1999".to_owned()];
    let Err(error) = home.start().await else { anyhow::bail!("it started") };
    let said = error.to_string();
    ensure!(said.contains("must be at least twice --answer-bytes-max, which is 1000"), "{said}");
    Ok(())
}

#[tokio::test]
async fn metrics_and_log_name_no_user_no_value_and_no_path_of_a_user() -> anyhow::Result<()> {
    const USER: &str = "zora.quill@example";
    const VALUE: &str = "plumbago-7741";
    let (home, pod) = start(&["--answer-bytes-max=100000", "--query-timeout-secs=2"]).await?;
    let insert = format!("INSERT INTO app.t (id, body) VALUES (774100123, '{VALUE}')");
    ensure!(pod.run(USER, &insert, json!([])).await? == 1);
    let statements = [
        (insert.clone(), 409),
        ("STORAGE FLUSH TABLE app.t".to_owned(), 200),
        (insert.clone(), 409),
        (format!("SELECT * FROM app.t WHERE body = '{VALUE}'"), 200),
        (format!("SELECT CURRENT_USER(), '{VALUE}'"), 200),
        (format!("SELEKT '{VALUE}'"), 400),
        (format!("SELECT '{VALUE}' FROM app.{VALUE}"), 400),
        (format!("SELECT * FROM app.\"{VALUE}\""), 404),
        (format!("SELECT CAST(body AS INT) FROM app.t WHERE body = '{VALUE}'"), 400),
        (format!("SELECT 1 / (id - id), '{VALUE}' FROM app.t"), 400),
        (format!("INSERT INTO app.t (id) VALUES ('{VALUE}')"), 400),
        (format!("SELECT repeat('{VALUE}', 100000)"), 413),
        (format!("{ENDLESS} AND '{VALUE}' = '{VALUE}'"), 503),
    ];
    for (sql, status) in statements {
        let answer = pod.sql(USER, &sql, json!([])).await?;
        ensure!(answer.status == status, "{sql}: {}", answer.text);
    }
    drop(pod.send_unread(USER, &format!("{ENDLESS} AND '{VALUE}' = '{VALUE}'")).await?);
    let token = pod.token(USER, "user")?;
    let (status, metrics) = pod.get("/metrics").await?;
    ensure!(status == 200 && metrics.contains("kalamdb_rows_written_total 1\n"), "{metrics}");
    let log = home.log();
    ensure!(log.contains("flushed an instance"), "{log}");
    // A user's folder is named after him, with what a file name does not take written otherwise.
    for secret in [VALUE, "774100123", "zora", "quill", "users/", token.as_str()] {
        ensure!(!metrics.contains(secret), "`{secret}` in the metrics:\n{metrics}");
        ensure!(!log.contains(secret), "`{secret}` in the log:\n{log}");
    }
    Ok(())
}

#[tokio::test]
async fn the_memory_of_a_query_is_bounded() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-memory-bytes=8000000"]).await?;
    for sql in [
        "SELECT count(*) FROM (SELECT value * 7919 % 3000017 AS g, count(*) FROM generate_series(1, 3000000) GROUP BY g) x",
        "SELECT value FROM generate_series(1, 3000000) ORDER BY value % 1000 LIMIT 10 OFFSET 2999990",
        "SELECT count(*) FROM generate_series(1, 2000000) a JOIN generate_series(1, 2000000) b ON a.value = b.value",
    ] {
        let message = refused(&pod, sql, json!([]), 413, "QUERY_MEMORY_EXCEEDED").await?;
        ensure!(message.contains("8000000 bytes"), "{message}");
        still_answers(&pod, 0).await?;
    }
    Ok(())
}

/// The one file that alice's part of `app.big` consists of: its entry, and how many rows its row groups have.
fn only_file(home: &Home) -> anyhow::Result<(Value, Vec<i64>)> {
    let files = home.data_dir().join("files");
    let manifest = std::fs::read(files.join("users/alice/app/big/_manifest.json"))?;
    let manifest: Value = serde_json::from_slice(&manifest)?;
    let [entry] = manifest["files"].as_array().context("files")?.as_slice() else { anyhow::bail!("{manifest}") };
    let file = std::fs::File::open(files.join(entry["path"].as_str().context("its path")?))?;
    let footer = ParquetRecordBatchReaderBuilder::try_new(file)?;
    let groups = footer.metadata().row_groups().iter().map(|group| group.num_rows()).collect();
    Ok((entry.clone(), groups))
}

#[tokio::test]
async fn rows_of_a_megabyte_are_read_changed_and_compacted_a_few_at_a_time() -> anyhow::Result<()> {
    let columns = ["id, type: BIGINT, primaryKey: true", "s, type: TEXT"];
    let home = Home::new(BINARY, &declare(&[user_table("big", &columns)]))?;
    let pod = home.start().await?;
    for first in [0, 50] {
        let rows = format!("SELECT value + {first}, repeat('x', 1000000) FROM generate_series(1, 50)");
        ensure!(pod.run("alice", &format!("INSERT INTO app.big {rows}"), json!([])).await? == 50);
        pod.run("alice", "STORAGE FLUSH TABLE app.big", json!([])).await?;
    }
    ensure!(pod.run("alice", "STORAGE COMPACT TABLE app.big", json!([])).await? == 2);
    // Next to nothing on disk, and 100 MB in memory: read in parts all the same.
    let (entry, groups) = only_file(&home)?;
    ensure!(entry["bytes"].as_u64() < Some(1 << 20) && entry["rawBytes"].as_u64() > Some(100_000_000), "{entry}");
    ensure!(groups == [67, 33], "{groups:?}");
    let sum = "SELECT count(*), sum(length(s)) FROM app.big";
    returns(&pod, "alice", sum, json!([["100", "100000000"]])).await?;
    // What a filter leaves is not glued together again.
    let explain = "EXPLAIN ANALYZE SELECT id FROM app.big WHERE s <> ''";
    let analyzed = rows(&pod, "alice", explain, json!([])).await?.to_string();
    let (_, filter) = analyzed.rsplit_once("FilterExec").context("a filter of files")?;
    let (_, batches) = filter.split_once("output_batches=").context("its batches")?;
    let batches: u64 = batches.chars().take_while(char::is_ascii_digit).collect::<String>().parse()?;
    ensure!(batches >= 3, "{batches} batches of 32 MiB: {analyzed}");
    ensure!(pod.run("alice", "UPDATE app.big SET s = s || 'y' WHERE id <= 20", json!([])).await? == 20);
    returns(&pod, "alice", sum, json!([["100", "100000020"]])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.big", json!([])).await?;
    ensure!(pod.run("alice", "STORAGE COMPACT TABLE app.big", json!([])).await? == 2);
    returns(&pod, "alice", sum, json!([["100", "100000020"]])).await
}

#[tokio::test]
async fn queries_that_do_not_pause_hold_up_no_write_and_no_probe() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-timeout-secs=1"]).await?;
    let stubborn = async || -> anyhow::Result<Duration> {
        let started = Instant::now();
        let answer = pod.sql("alice", STUBBORN, json!([])).await?;
        ensure!(answer.status == 200 || answer.code() == "QUERY_TIMEOUT", "{}", answer.text);
        Ok(started.elapsed())
    };
    let others = async {
        let started = Instant::now();
        tokio::time::sleep(Duration::from_millis(200)).await;
        for _ in 0..10 {
            ensure!(pod.run("bob", "INSERT INTO app.t (body) VALUES ('x')", json!([])).await? == 1);
            ensure!(pod.get("/readyz").await?.0 == 200);
        }
        Ok(started.elapsed())
    };
    let (a, b, c, others) = tokio::try_join!(stubborn(), stubborn(), stubborn(), others)?;
    ensure!(others < Duration::from_millis(1_500), "ten inserts took {others:?}");
    for elapsed in [a, b, c] {
        ensure!(elapsed < Duration::from_secs(3), "the timeout of a second was kept after {elapsed:?}");
    }
    Ok(())
}

#[tokio::test]
async fn deep_and_long_statements_are_answered_and_never_end_the_pod() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-timeout-secs=5"]).await?;
    let times = |n: usize, text: &str| text.repeat(n);
    let nested =
        |n: usize, open: &str, inner: &str, close: &str| format!("SELECT {}{inner}{}", open.repeat(n), close.repeat(n));
    let chain = |n: usize, item: &str, by: &str| vec![item; n].join(by);
    let mut statements = Vec::new();
    for n in [10, 40, 70, 1_000, 20_000] {
        statements.extend([
            nested(n, "(", "1", ")"),
            nested(n, "(SELECT ", "1", ")"),
            nested(n, "abs(", "1", ")"),
            nested(n, "NOT ", "true", ""),
            nested(n, "- ", "1", ""),
            nested(n, "[", "1", "]"),
            nested(n, "CASE WHEN true THEN ", "1", " END"),
            nested(n, "CAST(", "1", " AS INT)"),
            nested(n, "1 + (", "1", ")"),
            nested(n, "EXISTS (SELECT 1 WHERE ", "true", ")"),
            format!("SELECT * FROM {}app.t{}", times(n, "(SELECT * FROM "), times(n, ") x")),
            format!("SELECT * FROM {}app.t{}", times(n, "("), times(n, ")")),
            format!("SELECT 1 {}", times(n, "/* ")),
            format!("SELECT 1{}", times(n, "::int")),
            format!("SELECT a{}", times(n, "[1]")),
            format!("SELECT a{}", times(n, ".b")),
            format!("SELECT '{{}}'{}", times(n, "->'a'")),
            format!("INSERT INTO app.t (body) VALUES ({}'x'{})", times(n, "upper("), times(n, ")")),
            format!("INSERT INTO app.t (body) VALUES ({}'x')", times(n, "'y' || ")),
            format!("EXPLAIN {}SELECT 1", times(n, "EXPLAIN ")),
            format!("SELECT * FROM {}app.t a JOIN app.t b ON true{}", times(n, "("), times(n, ")")),
        ]);
    }
    for n in [100, 900, 1_100, 20_000] {
        statements.extend([
            format!("SELECT {}", chain(n, "1", " + ")),
            format!("SELECT {}", chain(n, "'a'", " || ")),
            format!("SELECT 1 FROM app.t WHERE {}", chain(n, "id = 1", " OR ")),
            format!("SELECT 1 FROM app.t WHERE {}", chain(n, "id = 1", " AND ")),
            format!("SELECT 1 FROM app.t WHERE id IN ({})", chain(n, "1", ",")),
            format!("SELECT {}", chain(n, "1", ",")),
            chain(n, "SELECT 1", " UNION ALL "),
            chain(n, "SELECT 1", " UNION "),
            format!("VALUES {}", chain(n, "(1)", ",")),
            format!("SELECT CASE {} END", chain(n, "WHEN 1 = 2 THEN 3", " ")),
            format!("SELECT 1 FROM {}", chain(n.min(1_100), "app.t", ",")),
            format!("SELECT coalesce({})", chain(n, "NULL", ",")),
            format!("SELECT '{}'", times(n, "x")),
            format!("SELECT 1{}", times(n, ";")),
        ]);
    }
    // Each of them once more with an error at its innermost: whatever the parser tries next, it tries on each level.
    for at in 0..statements.len() {
        statements.push(statements[at].replacen("1", "1 1 +", 1).replacen("app.t", "app.t t t", 1));
    }
    let ctes = |n: usize| (1..n).map(|i| format!(", c{i} AS (SELECT * FROM c{})", i - 1)).collect::<String>();
    let joins = |n: usize| (1..n).map(|i| format!(" JOIN app.t t{i} ON t{i}.id = t0.id")).collect::<String>();
    for n in [20, 60, 150] {
        statements.push(format!("WITH c0 AS (SELECT * FROM app.t){} SELECT * FROM c{}", ctes(n), n - 1));
        statements.push(format!("SELECT 1 FROM app.t t0{}", joins(n.min(60))));
    }
    let doubling: String =
        (1..40).map(|i| format!(", c{i} AS (SELECT * FROM c{0} UNION ALL SELECT * FROM c{0})", i - 1)).collect();
    statements.push(format!("WITH c0 AS (SELECT 1 AS x){doubling} SELECT count(*) FROM c39"));
    let computed: String = (1..40).map(|i| format!(", c{i} AS (SELECT x + x AS x FROM c{})", i - 1)).collect();
    statements.push(format!("WITH c0 AS (SELECT id AS x FROM app.t){computed} SELECT * FROM c39 WHERE x > 1"));
    let crossed: String = (1..40).map(|i| format!(", c{i} AS (SELECT a.x FROM c{0} a, c{0} b)", i - 1)).collect();
    statements.push(format!("WITH c0 AS (SELECT 1 AS x){crossed} SELECT count(*) FROM c39 WHERE x = $1"));
    statements.push(format!("SELECT 1 FROM app.t GROUP BY CUBE({})", chain(30, "id", ",")));
    statements.push(format!("SELECT 1 FROM app.t GROUP BY {}", chain(12, "ROLLUP(id, body)", ",")));
    for sql in &statements {
        let started = Instant::now();
        let shown: String = sql.chars().take(80).collect();
        let answer = pod
            .sql("alice", sql, json!([]))
            .await
            .map_err(|error| error.context(format!("{shown}… ({} bytes)", sql.len())))?;
        ensure!(
            [200, 400, 404, 413, 503].contains(&answer.status),
            "{shown}… ({} bytes): {}",
            sql.len(),
            &answer.text[..answer.text.len().min(400)]
        );
        ensure!(started.elapsed() < Duration::from_secs(10), "{shown}… took {:?}", started.elapsed());
        ensure!(answer.text.len() < 2_000 || answer.status == 200, "{shown}…: {}", answer.text);
    }
    ensure!(pod.sql("alice", "SELECT 1", json!([])).await?.status == 200);
    Ok(())
}

#[tokio::test]
async fn a_function_that_makes_much_of_little_is_refused() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-timeout-secs=5"]).await?;
    for expression in [
        "repeat('x', 2000000000)",
        "repeat(repeat('x', 100000), 100000)",
        "lpad('x', 2000000000)",
        "rpad('x', 2000000000, 'yz')",
        "array_repeat(1, 10000000000)",
        "array_repeat(repeat('x', 1000000), 1000000)",
        "array_resize([1], 10000000000, 2)",
        "range(10000000000)",
        "generate_series(1, 10000000000)",
        "generate_series(TIMESTAMP '1970-01-01', TIMESTAMP '2970-01-01', INTERVAL '1 microsecond')",
    ] {
        for sql in [
            format!("SELECT {expression}"),
            format!("SELECT count(*) FROM (VALUES (1), (2)) v(x) WHERE {expression} IS NULL"),
            format!("INSERT INTO app.t (body) VALUES (CAST({expression} AS TEXT))"),
        ] {
            let answer = pod.sql("alice", &sql, json!([])).await?;
            ensure!([400, 413].contains(&answer.status), "{sql}: {}", &answer.text[..answer.text.len().min(400)]);
        }
    }
    still_answers(&pod, 0).await?;
    for (expression, expected) in [
        ("length(repeat('ab', 1000))", json!([[2_000]])),
        ("length(lpad('x', 1000))", json!([[1_000]])),
        ("array_repeat(1, 3)", json!([[["1", "1", "1"]]])),
        ("generate_series(1, 3)", json!([[["1", "2", "3"]]])),
        ("range(0, 10, 4)", json!([[["0", "4", "8"]]])),
        ("array_resize([1], 3, 2)", json!([[["1", "2", "2"]]])),
    ] {
        returns(&pod, "alice", &format!("SELECT {expression}"), expected).await?;
    }
    Ok(())
}

#[tokio::test]
async fn what_is_put_together_is_bounded_like_what_is_repeated() -> anyhow::Result<()> {
    let (_home, pod) = start(&["--query-memory-bytes=20000000", "--query-timeout-secs=10"]).await?;
    let many = |item: &str, by: &str| vec![item; 30].join(by);
    let constant = "(SELECT repeat('x', 1000000) AS s) q";
    let computed = "(SELECT repeat('x', 1000000) || CAST(value AS TEXT) AS s FROM generate_series(1, 2)) q";
    for expression in [
        format!("concat({})", many("s", ",")),
        format!("concat_ws('', {})", many("s", ",")),
        format!("concat_ws(s, {})", many("''", ",")),
        many("s", " || "),
        many("CAST(s AS BYTEA)", " || "),
        format!("[{}]", many("s", ",")),
        format!("make_array({})", many("s", ",")),
        many("[s]", " || "),
        format!("[s] || {}", many("s", " || ")),
        format!("array_concat({})", many("[s]", ",")),
        "array_to_string(range(0, 1000), s)".to_owned(),
        "array_to_string(array_repeat(CAST(NULL AS INT), 1000), '', s)".to_owned(),
        "regexp_replace(repeat('a', 100000), '', s, 'g')".to_owned(),
        "regexp_replace(s, '(.*)', repeat('\\1', 100))".to_owned(),
        "array_replace_all(array_repeat('', 1000), '', s)".to_owned(),
        "arrays_zip(range(0, 500000), [s], [1], [1], [1], [1])".to_owned(),
    ] {
        for rows in [constant, computed] {
            let sql = format!("SELECT {expression} FROM {rows}");
            let message = refused(&pod, &sql, json!([]), 413, "QUERY_MEMORY_EXCEEDED").await?;
            ensure!(message.contains("20000000 bytes"), "{message}");
        }
    }
    // A constant beside rows is made for each of them.
    let sql = "SELECT concat(repeat('x', 1000000), value) FROM generate_series(1, 30)";
    refused(&pod, sql, json!([]), 413, "QUERY_MEMORY_EXCEEDED").await?;
    // Constants are there all at once.
    let sql = "SELECT length(repeat('x', 9000000)), length(repeat('y', 9000000)), length(repeat('z', 9000000))";
    refused(&pod, sql, json!([]), 413, "QUERY_MEMORY_EXCEEDED").await?;
    let insert = format!("INSERT INTO app.t (body) VALUES ({})", many("repeat('x', 1000000)", " || "));
    let message = refused(&pod, &insert, json!([]), 400, "INVALID_VALUE").await?;
    ensure!(message.contains("would make about"), "{message}");
    let sql = "SELECT string_agg(CAST(value AS TEXT), repeat('-', 65) ORDER BY value) FROM generate_series(1, 2)";
    let message = refused(&pod, sql, json!([]), 400, "INVALID_SQL").await?;
    ensure!(message == "the delimiter of `string_agg` has 65 bytes, at most 64 are taken", "{message}");
    still_answers(&pod, 0).await
}

#[tokio::test]
async fn what_is_put_together_within_the_bounds_is_as_it_should_be() -> anyhow::Result<()> {
    let (_home, pod) = start(&[]).await?;
    for (expression, expected) in [
        ("'a' || 1 || true", json!("a1true")),
        ("1 || 'a'", json!("1a")),
        ("1.50 || 'a' || 1.5e0", json!("1.50a1.5")),
        ("'a' || DATE '2024-01-01' || TIME '12:00'", json!("a2024-01-0112:00:00")),
        ("NULL || 'a'", json!(null)),
        ("'a' || NULL || 'b'", json!(null)),
        ("'a' || (NULL || 'b')", json!(null)),
        ("'a' || ('b' || 'c') || ''", json!("abc")),
        ("X'00' || X'01'", json!("AAE=")),
        ("'a' || X'31'", json!("a1")),
        ("substr('abc', 2) || left('abc', 1)", json!("bca")),
        ("arrow_cast('a', 'Utf8View') || arrow_cast('b', 'LargeUtf8') || 'c'", json!("abc")),
        ("concat('a', NULL, 1)", json!("a1")),
        ("concat(NULL)", json!("")),
        ("concat_ws(',', 'a', NULL, 2)", json!("a,2")),
        ("concat_ws(NULL, 'a')", json!(null)),
        ("[1] || 2", json!(["1", "2"])),
        ("1 || [2]", json!(["1", "2"])),
        ("[1] || [2, NULL] || [3]", json!(["1", "2", null, "3"])),
        ("[1] || NULL", json!(["1", null])),
        ("make_array()", json!([])),
        ("array_to_string([1, 2, NULL], ',', '-')", json!("1,2,-")),
        ("array_to_string([[1, 2], [3]], ',')", json!("1,2,3")),
        ("regexp_replace('foobar', 'o+', '[\\0]', 'g')", json!("f[oo]bar")),
        ("array_replace_all([1, 2, 1], 1, 3)", json!(["3", "2", "3"])),
    ] {
        returns(&pod, "alice", &format!("SELECT {expression}"), json!([[expected]])).await?;
    }
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'a' || 'b'), (2, NULL), (3, NULL || 'b')", json!([])).await?;
    let sql =
        "SELECT body || ':' || id, id || body, concat(body, id), body || NULL, [body] || 'x' FROM app.t ORDER BY id";
    let expected = json!([
        ["ab:1", "1ab", "ab1", null, ["ab", "x"]],
        [null, null, "2", null, [null, "x"]],
        [null, null, "3", null, [null, "x"]]
    ]);
    returns(&pod, "alice", sql, expected).await?;
    let sql = "SELECT body || '!', count(*) FROM app.t GROUP BY body || '!' HAVING max(body || '!') <> '' ORDER BY 1";
    returns(&pod, "alice", sql, json!([["ab!", "1"]])).await?;
    returns(&pod, "alice", "SELECT id FROM app.t WHERE body || id = 'ab' || 1", json!([["1"]])).await?;
    returns(
        &pod,
        "alice",
        "SELECT string_agg(body || id, ', ' ORDER BY id), string_agg(DISTINCT body, ''), string_agg(body, '-') FROM app.t",
        json!([["ab1", "ab", "ab"]]),
    )
    .await?;
    let answer = pod.sql("alice", "SELECT body || ':' || id, [body] || 'x' FROM app.t", json!([])).await?;
    for name in [r#""name":"app.t.body || Utf8(\":\") || app.t.id""#, r#""name":"array_append(make_array(app.t.body),"#]
    {
        ensure!(answer.text.contains(name), "{name} in {}", answer.text);
    }
    Ok(())
}

#[tokio::test]
async fn a_primary_key_is_bounded_and_the_error_names_column_and_bound() -> anyhow::Result<()> {
    let key = ["name, type: TEXT, primaryKey: true", "at, type: BIGINT, primaryKey: true"];
    let home = Home::new(BINARY, &declare(&[user_table("t", &key)]))?;
    let pod = home.start().await?;
    let sql = "INSERT INTO app.t (name, at) VALUES ('a', 1), ($1, 2)";
    // Beside the text lie its end and the number: ten bytes.
    let fits = "x".repeat((8 << 10) - 10);
    let message = refused(&pod, sql, json!([format!("{fits}x")]), 413, "KEY_TOO_LARGE").await?;
    ensure!(message == "row 2: its primary key (`name`, `at`) has 8193 bytes, at most 8192 are taken", "{message}");
    returns(&pod, "alice", "SELECT count(*) FROM app.t", json!([["0"]])).await?;
    ensure!(pod.run("alice", sql, json!([fits])).await? == 2);
    Ok(())
}
