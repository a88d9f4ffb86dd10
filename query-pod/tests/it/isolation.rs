//! No row, value, path or count of another user, whatever is asked and whoever asks.

use anyhow::{Context as _, ensure};
use arrow::array::AsArray as _;
use arrow::datatypes::Int64Type;
use kalamdb_model::catalog::Location;
use kalamdb_model::{InstanceId, Owner, Role, StorageName, TableId, UserId};
use kalamdb_query_pod::auth::Tokens;
use kalamdb_table_store::paths;
use kalamdb_test_support::pod::{Answer, Home, Pod, files_below};
use kalamdb_write_buffer::{Options, WriteBuffer};
use object_store::path::Path;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

use super::{BINARY, declare, refusal, returns, table, user_table};

/// Ids that are to be mixed up: on disks that ignore case, by decoding twice, by normalizing, in SQL, in paths.
fn users() -> Vec<String> {
    let mut users: Vec<String> = [
        "a",
        "a/",
        "a%2F",
        "A",
        "a%2f",
        "alice",
        "é",
        "e\u{301}",
        "🙂",
        "' OR '1'='1",
        "\"a\"",
        "a' --",
        "a;b",
        "*",
        "%",
        "a ",
        "..a",
        "a=",
        "users/a/secrets",
        "../a",
        "a\\",
        "root",
    ]
    .map(str::to_owned)
    .to_vec();
    users.push("a".repeat(256));
    users.push("é".repeat(128));
    users
}

/// What only the user at `index` may see. All have one length, so none is part of another.
fn canary(index: usize) -> String {
    format!("canary{index:03}x")
}

fn secrets() -> String {
    declare(&[
        user_table("secrets", &["id, type: BIGINT, primaryKey: true", "body, type: TEXT", "num, type: INT"]),
        user_table("other", &["word, type: TEXT, primaryKey: true", "id, type: BIGINT"]),
        table("SharedTable", "board", &["id, type: BIGINT, primaryKey: true", "body, type: TEXT"], &["access: Public"]),
    ])
}

/// `index + 2` rows of everybody: the first two flushed, with the same keys for all.
async fn fill(pod: &Pod, users: &[String]) -> anyhow::Result<()> {
    for (index, user) in users.iter().enumerate() {
        let word = canary(index);
        let row = |id: usize| format!("({id}, '{word} {id}', {id})");
        pod.run(user, &format!("INSERT INTO app.secrets VALUES {}, {}", row(0), row(1)), json!([])).await?;
        pod.run(user, "INSERT INTO app.other VALUES ($1, 1)", json!([word])).await?;
        if index % 3 != 2 {
            pod.run(user, "STORAGE FLUSH TABLE app.secrets", json!([])).await?;
            pod.run(user, "STORAGE FLUSH TABLE app.other", json!([])).await?;
        }
        let more: Vec<String> = (2..index + 2).map(row).collect();
        if !more.is_empty() {
            pod.run(user, &format!("INSERT INTO app.secrets VALUES {}", more.join(",")), json!([])).await?;
        }
    }
    Ok(())
}

/// Statements of every shape; whatever they answer, it must be of the caller alone.
const SHAPES: &[&str] = &[
    "SELECT * FROM app.secrets",
    "SELECT *, _seq, _updated, _deleted FROM app.secrets ORDER BY id DESC",
    "SELECT a.body, b.body FROM app.secrets a JOIN app.secrets b ON a.id = b.id",
    "SELECT a.body, b.body FROM app.secrets a CROSS JOIN app.secrets b LIMIT 50",
    "SELECT * FROM app.secrets s FULL JOIN app.other o ON s.id = o.id",
    "SELECT * FROM app.secrets NATURAL JOIN app.other",
    "SELECT word FROM app.other UNION ALL SELECT body FROM app.secrets",
    "SELECT body FROM app.secrets EXCEPT SELECT word FROM app.other",
    "SELECT * FROM app.secrets WHERE id IN (SELECT id FROM app.other)",
    "SELECT * FROM app.secrets s WHERE EXISTS (SELECT 1 FROM app.other o WHERE o.id = s.id)",
    "SELECT (SELECT max(body) FROM app.secrets), (SELECT min(word) FROM app.other)",
    "WITH x AS (SELECT * FROM app.secrets), y AS (SELECT * FROM x) SELECT * FROM y",
    "WITH RECURSIVE r AS (SELECT id, body FROM app.secrets WHERE id = 0 UNION ALL SELECT s.id, s.body FROM app.secrets s JOIN r ON s.id = r.id + 1) SELECT * FROM r",
    "SELECT body, row_number() OVER (ORDER BY id), lag(body) OVER (ORDER BY id), count(*) OVER () FROM app.secrets",
    "SELECT string_agg(body, ','), array_agg(body), min(body), max(body), first_value(body) FROM app.secrets",
    "SELECT body, count(*) FROM app.secrets GROUP BY body HAVING count(*) > 0",
    "SELECT DISTINCT body FROM app.secrets WHERE body LIKE '%canary%'",
    "SELECT body FROM app.secrets WHERE body <> CURRENT_USER() OR CURRENT_USER() IS NULL",
    "SELECT * FROM app.secrets WHERE true OR body = 'x'",
    "SELECT CURRENT_USER(), count(*) FROM app.secrets",
    "SELECT * FROM app.secrets, LATERAL (SELECT word FROM app.other o WHERE o.id = app.secrets.id) l",
    "SELECT * FROM (VALUES (0), (1), (100)) v(id) LEFT JOIN app.secrets s ON s.id = v.id",
    "SELECT * FROM kalam.app.secrets",
    "SELECT approx_distinct(body), median(num), corr(num, id) FROM app.secrets",
    "EXPLAIN SELECT * FROM app.secrets WHERE id = 1",
    "EXPLAIN VERBOSE SELECT * FROM app.secrets s JOIN app.other o ON s.id = o.id",
    "EXPLAIN ANALYZE SELECT * FROM app.secrets WHERE body LIKE 'c%'",
    "EXPLAIN ANALYZE VERBOSE SELECT count(*) FROM app.secrets",
    "SELECT * FROM information_schema.tables",
    "SELECT * FROM information_schema.columns",
    "SELECT * FROM information_schema.schemata",
    "SELECT CAST(body AS INT) FROM app.secrets",
    "SELECT 1 / (num - num) FROM app.secrets",
    "SELECT CAST(body AS TIMESTAMP) FROM app.secrets WHERE id = 1",
    "SELECT arrow_cast(body, 'Decimal128(10, 2)') FROM app.secrets",
    "SELECT nope FROM app.secrets",
    "SELECT * FROM app.secret",
    "SELECT * FROM \"users/nobody/app/secrets\"",
    "INSERT INTO app.secrets VALUES (0, 'again', 1)",
    "INSERT INTO app.secrets VALUES (1, 'again', 1), (1000, 'x', 1)",
    "INSERT INTO app.other SELECT * FROM app.other",
    "UPDATE app.other SET id = 1 RETURNING *, _seq, (SELECT string_agg(body, ',') FROM app.secrets) AS bodies",
    "INSERT INTO app.other SELECT * FROM app.other ON CONFLICT (word) DO UPDATE SET id = (SELECT count(*) FROM app.other) \
     WHERE other.id IN (SELECT id FROM app.secrets) RETURNING (SELECT max(body) FROM app.secrets WHERE id = other.id) AS body",
    "STORAGE FLUSH TABLE app.board",
    "SELECT * FROM app.board",
];

fn only_his(users: &[String], index: usize, what: &str, answer: &Answer) -> anyhow::Result<()> {
    for other in (0..users.len()).filter(|other| *other != index) {
        let user = UserId::new(users[other].clone())?;
        let path = format!("users/{}/app", paths::encode_user(&user));
        for leak in [canary(other), path] {
            ensure!(
                !answer.text.contains(&leak),
                "`{}` asked `{what}` and saw `{leak}`: {}",
                users[index],
                answer.text
            );
        }
    }
    Ok(())
}

#[tokio::test]
async fn no_statement_of_any_shape_shows_another_users_rows_values_paths_or_counts() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &secrets())?;
    let mut pod = home.start().await?;
    let users = users();
    fill(&pod, &users).await?;
    for round in ["at first", "after a restart"] {
        for (index, user) in users.iter().enumerate() {
            let rows = index + 2;
            let word = canary(index);
            for shape in SHAPES {
                let answer = pod.sql(user, shape, json!([])).await?;
                ensure!(answer.status != 500, "{shape}: {}", answer.text);
                only_his(&users, index, shape, &answer)?;
            }
            let counts = "SELECT count(*), count(DISTINCT body), min(id), max(id), (SELECT count(*) FROM app.other) AS others, current_user FROM app.secrets";
            let expected = json!([[rows.to_string(), rows.to_string(), "0", (rows - 1).to_string(), "1", user]]);
            returns(&pod, user, counts, expected).await.context(round)?;
            let foreign = "SELECT count(*) FROM app.secrets WHERE body NOT LIKE $1";
            ensure!(pod.sql(user, foreign, json!([format!("{word} %")])).await?.rows()? == [json!(["0"])]);
            let duplicate = pod.sql(user, "INSERT INTO app.secrets VALUES (0, 'x', 0)", json!([])).await?;
            refusal("his own key", &duplicate, 409, "DUPLICATE_KEY")?;
            // The key that only the next user has is free here, and what somebody else has is not told.
            let words = format!("SELECT count(*) FROM app.other WHERE word = '{}'", canary((index + 1) % users.len()));
            returns(&pod, user, &words, json!([["0"]])).await?;
        }
        ensure!(pod.stop().await?.success());
        pod = home.start().await?;
    }
    // A key that others have is free.
    let user = &users[0];
    ensure!(pod.run(user, "INSERT INTO app.secrets VALUES (20, 'mine now', 0)", json!([])).await? == 1);
    Ok(())
}

#[tokio::test]
async fn every_file_lies_below_its_owners_prefix_and_holds_his_rows_alone() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &secrets())?;
    let pod = home.start().await?;
    let users = users();
    fill(&pod, &users).await?;
    ensure!(pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.secrets", json!([])).await?.status == 200);
    let root = home.data_dir().join("files");
    let location =
        Location { storage: StorageName::new("local")?, root: 0, template: "users/{userId}/app/secrets".to_owned() };
    let mut rows_of = vec![0; users.len()];
    let mut folded = std::collections::BTreeSet::new();
    for file in files_below(&root)? {
        if file.starts_with("_cluster/") {
            continue;
        }
        let (prefix, name) = file.rsplit_once('/').context("a file in a folder")?;
        ensure!(
            folded.insert(file.to_lowercase()) && file == file.to_lowercase(),
            "`{file}` differs from another by case alone"
        );
        ensure!(file.split('/').all(|part| part.len() <= 255 && part != ".." && part.is_ascii()), "{file}");
        if prefix.ends_with("/app/other") {
            continue;
        }
        if name == "_manifest.json" {
            let named: serde_json::Value = serde_json::from_slice(&std::fs::read(root.join(&file))?)?;
            let paths: Vec<_> = named["files"].as_array().context("files")?.iter().map(|file| &file["path"]).collect();
            let own =
                |path: &&serde_json::Value| path.as_str().is_some_and(|path| path.starts_with(&format!("{prefix}/")));
            ensure!(!paths.is_empty() && paths.iter().all(own), "{file} names {paths:?}");
            continue;
        }
        ensure!(name.ends_with(".parquet"), "{file}");
        let owner = paths::owner_of_prefix(&location, &Path::parse(prefix)?)
            .with_context(|| format!("`{file}` is nobody's"))?;
        let index = users
            .iter()
            .position(|user| owner == Owner::User(UserId::new(user.clone()).unwrap()))
            .context(file.clone())?;
        let reader = ParquetRecordBatchReaderBuilder::try_new(std::fs::File::open(root.join(&file))?)?.build()?;
        for batch in reader {
            let batch = batch?;
            let bodies = batch.column_by_name("body").context("body")?.as_string::<i32>();
            let ids = batch.column_by_name("id").context("id")?.as_primitive::<Int64Type>();
            for row in 0..batch.num_rows() {
                ensure!(
                    bodies.value(row) == format!("{} {}", canary(index), ids.value(row)),
                    "{file}: {}",
                    bodies.value(row)
                );
            }
            rows_of[index] += batch.num_rows();
        }
    }
    let expected: Vec<usize> = (0..users.len()).map(|index| index + 2).collect();
    ensure!(rows_of == expected, "{rows_of:?}");
    Ok(())
}

#[tokio::test]
async fn many_users_at_once_on_one_table_see_only_their_own() -> anyhow::Result<()> {
    let home = Home::new(
        BINARY,
        &declare(&[table(
            "UserTable",
            "secrets",
            &["id, type: BIGINT, primaryKey: true", "body, type: TEXT"],
            &["flushPolicy: {rows: 40, interval: 1s}"],
        )]),
    )?;
    let pod = home.start().await?;
    let users: Vec<String> = (0..20).map(|index| format!("user{index:02}")).collect();
    let work = users.iter().enumerate().map(|(index, user)| {
        let (pod, users) = (&pod, &users);
        async move {
            let mut expected = 0;
            for round in 0..12 {
                let values: Vec<String> =
                    (0..10).map(|n| format!("({}, '{}')", round * 10 + n, canary(index))).collect();
                expected +=
                    pod.run(user, &format!("INSERT INTO app.secrets VALUES {}", values.join(",")), json!([])).await?;
                let sql =
                    "SELECT count(*), min(body), max(body), CURRENT_USER(), count(DISTINCT id) FROM app.secrets a";
                let word = canary(index);
                returns(pod, user, sql, json!([[expected.to_string(), word, word, user, expected.to_string()]]))
                    .await?;
                for shape in [
                    "SELECT a.body, b.body FROM app.secrets a JOIN app.secrets b USING (id)",
                    "SELECT id, body, CURRENT_USER() FROM app.secrets",
                ] {
                    let answer = pod.sql(user, shape, json!([])).await?;
                    ensure!(answer.body["results"][0]["row_count"] == expected, "{user}: {}", answer.text);
                    only_his(users, index, shape, &answer)?;
                    ensure!(
                        !users.iter().any(|other| other != user && answer.text.contains(other.as_str())),
                        "{}",
                        answer.text
                    );
                }
                if round % 4 == index % 4 {
                    pod.run(user, "STORAGE FLUSH TABLE app.secrets", json!([])).await?;
                }
            }
            anyhow::Ok(())
        }
    });
    futures::future::try_join_all(work).await?;
    Ok(())
}

#[tokio::test]
async fn without_a_valid_token_nothing_is_told() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &secrets())?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.secrets VALUES (1, 'canary', 1)", json!([])).await?;
    let good = pod.token("alice", "user")?;
    let now = u64::try_from(chrono::Utc::now().timestamp())?;
    let alice = UserId::new("alice")?;
    let own = Tokens::of_data_dir(&home.data_dir())?;
    let foreign = Tokens::new(&[7; 32])?;
    let (head, rest) = good.split_once('.').context("a JWT")?;
    let (claims, signature) = rest.split_once('.').context("a JWT")?;
    use base64::Engine as _;
    let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    let forged = encode(&format!(r#"{{"sub":"alice","role":"system","exp":{}}}"#, now + 1_000));
    let wrong: Vec<(&str, Option<String>, &str)> = vec![
        ("none", None, "UNAUTHENTICATED"),
        ("empty", Some(String::new()), "UNAUTHENTICATED"),
        ("no scheme", Some(good.clone()), "UNAUTHENTICATED"),
        ("another scheme", Some(format!("Basic {good}")), "UNAUTHENTICATED"),
        ("no JWT", Some("Bearer abc".to_owned()), "INVALID_TOKEN"),
        ("another secret", Some(format!("Bearer {}", foreign.issue(&alice, Role::User, now, 60)?)), "INVALID_TOKEN"),
        ("other claims", Some(format!("Bearer {head}.{forged}.{signature}")), "INVALID_TOKEN"),
        ("no signature", Some(format!("Bearer {head}.{claims}.")), "INVALID_TOKEN"),
        ("alg none", Some(format!("Bearer {}.{claims}.", encode(r#"{"alg":"none"}"#))), "INVALID_TOKEN"),
        ("alg HS512", Some(format!("Bearer {}.{claims}.{signature}", encode(r#"{"alg":"HS512"}"#))), "INVALID_TOKEN"),
        ("expired", Some(format!("Bearer {}", own.issue(&alice, Role::System, now - 1_000, 60)?)), "TOKEN_EXPIRED"),
    ];
    for (what, authorization, code) in wrong {
        let mut messages = Vec::new();
        for sql in [
            "SELECT * FROM app.secrets",
            "SELECT * FROM app.nope",
            "SELEC",
            "INSERT INTO app.secrets VALUES (2, 'x', 1)",
            "STORAGE FLUSH TABLE app.secrets",
        ] {
            let answer = pod.send(authorization.as_deref(), json!({"sql": sql}).to_string()).await?;
            messages.push(refusal(what, &answer, 401, code)?);
        }
        messages.push(refusal(what, &pod.send(authorization.as_deref(), "no JSON").await?, 401, code)?);
        messages.dedup();
        ensure!(messages.len() == 1, "{what}: the answer depends on what was asked: {messages:?}");
        ensure!(
            !messages[0].contains("canary") && !messages[0].contains("secrets") && !messages[0].contains("alice"),
            "{messages:?}"
        );
    }
    ensure!(pod.sql("alice", "SELECT count(*) FROM app.secrets", json!([])).await?.rows()? == [json!(["1"])]);
    for user in ["", ".", "..", "a\nb", &"a".repeat(257)] {
        ensure!(pod.token(user, "user").is_err(), "a token for `{user}`");
    }
    let (status, metrics) = pod.get("/metrics").await?;
    ensure!(status == 200 && !metrics.contains("alice") && !metrics.contains("secrets"), "{metrics}");
    Ok(())
}

#[tokio::test]
async fn a_higher_role_sees_only_its_own_rows_of_user_tables() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &secrets())?;
    let pod = home.start().await?;
    let users = ["alice", "bob"].map(str::to_owned);
    fill(&pod, &users).await?;
    for role in ["service", "dba", "system"] {
        for shape in SHAPES.iter().filter(|shape| !shape.starts_with("INSERT") && !shape.starts_with("STORAGE")) {
            let answer = pod.sql_as("root", role, shape, json!([])).await?;
            ensure!(
                !answer.text.contains("canary0")
                    && !answer.text.contains("users/alice")
                    && !answer.text.contains("users/bob"),
                "{role}: {shape}: {}",
                answer.text
            );
        }
        ensure!(
            pod.sql_as("root", role, "SELECT count(*) FROM app.secrets", json!([])).await?.rows()? == [json!(["0"])]
        );
        let as_alice = pod.sql_as("alice", role, "SELECT count(*), CURRENT_USER() FROM app.secrets", json!([])).await?;
        ensure!(as_alice.rows()? == [json!(["2", "alice"])], "{}", as_alice.text);
    }
    Ok(())
}

#[tokio::test]
async fn a_manifest_that_names_another_users_file_is_refused() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &secrets())?;
    let mut pod = home.start().await?;
    let users = ["alice", "mallory"].map(str::to_owned);
    fill(&pod, &users).await?;
    pod.run("mallory", "STORAGE FLUSH TABLE app.secrets", json!([])).await?;
    ensure!(pod.stop().await?.success());

    let catalog: Value = serde_json::from_slice(&std::fs::read(home.data_dir().join("catalog.json"))?)?;
    let table = TableId(catalog["tables"]["app.secrets"]["id"].as_u64().context("the table's id")?.try_into()?);
    let id = |user: &str| InstanceId { owner: Owner::User(UserId::new(user).unwrap()), table };
    let buffer = WriteBuffer::open(&home.data_dir().join("buffer"), Options::default())?;
    let of_alice = buffer.record(&id("alice"))?.context("a record")?;
    let flushed = buffer.record(&id("mallory"))?.context("a record")?.flushed;
    buffer.publish(&id("mallory"), flushed, &of_alice.manifest)?;
    buffer.close().await;

    let pod = home.start().await?;
    for sql in [
        "SELECT * FROM app.secrets",
        "SELECT count(*) FROM app.secrets",
        "SELECT 1 FROM app.secrets LIMIT 1",
        "EXPLAIN SELECT * FROM app.secrets",
        "INSERT INTO app.secrets VALUES (0, 'does it exist?', 0)",
        "INSERT INTO app.secrets VALUES (1000, 'or this?', 0)",
    ] {
        let answer = pod.sql("mallory", sql, json!([])).await?;
        if !sql.starts_with("EXPLAIN") {
            refusal(sql, &answer, 500, "INTERNAL")?;
        }
        ensure!(!answer.text.contains("canary") && !answer.text.contains("alice"), "{sql}: {}", answer.text);
    }
    returns(&pod, "alice", "SELECT count(*) FROM app.secrets", json!([["2"]])).await
}
