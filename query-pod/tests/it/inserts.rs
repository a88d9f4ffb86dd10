//! What INSERT takes, what it refuses, and keys that exist already.

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::Home;
use serde_json::{Value, json};

use super::{BINARY, declare, refused, returns, rows, user_table};

fn notes() -> String {
    declare(&[
        user_table(
            "notes",
            &[
                "id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()",
                "body, type: TEXT, nullable: false",
                "at, type: TIMESTAMP, default: NOW()",
                "day, type: DATE, default: NOW()",
                "author, type: TEXT, default: CURRENT_USER()",
                "code, type: UUID, default: UUID_V7()",
                "ulid, type: TEXT, default: ULID()",
                "state, type: TEXT, default: \"'it''s new'\"",
                "count, type: INT, default: \"7\"",
                "price, type: \"DECIMAL(10,2)\", default: \"1.5\"",
                "extra, type: JSON",
            ],
        ),
        user_table("plain", &["body, type: TEXT", "m, type: BIGINT"]),
        user_table("with_id", &["name, type: TEXT", "id, type: BIGINT"]),
    ])
}

#[tokio::test]
async fn an_insert_takes_literals_parameters_defaults_and_computed_values_in_any_order() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &notes())?;
    let pod = home.start().await?;
    let alice = "alice";
    ensure!(pod.run(alice, "INSERT INTO app.notes (body) VALUES ('a'), ('b'), ($1)", json!(["c"])).await? == 3);
    let all = rows(
        &pod,
        alice,
        "SELECT id, at, day, author, code, ulid, state, count, price, extra FROM app.notes ORDER BY id",
        json!([]),
    )
    .await?;
    let all = all.as_array().unwrap();
    ensure!(all.len() == 3);
    for row in all {
        ensure!(row[0].as_str().unwrap().parse::<i64>()? > 0);
        let at = row[1].as_i64().context("a timestamp")?;
        ensure!((at / 86_400_000_000) == row[2].as_i64().context("a date")? && at > 1_700_000_000_000_000);
        ensure!(row[3] == "alice" && row[6] == "it's new" && row[7] == 7 && row[8] == "1.50" && row[9].is_null());
        ensure!(row[4].as_str().unwrap().len() == 36 && row[4].as_str().unwrap().as_bytes()[14] == b'7');
        ensure!(row[5].as_str().unwrap().len() == 26);
        ensure!(row[1] == all[0][1], "NOW() is the statement's time");
    }
    for column in [0, 4, 5] {
        ensure!(all[0][column] != all[1][column] && all[1][column] != all[2][column]);
    }

    let sql = "INSERT INTO app.notes (extra, count, body, id, state) VALUES ($2, DEFAULT, $1, 1, DEFAULT), \
               (NULL, 1 + 2 * 3, upper('x') || '-' || CURRENT_USER(), 2, CURRENT_USER), ('[1.10]', -(-4), $1, 1 + 2, NULL)";
    pod.run(alice, sql, json!(["p", {"a": [1, null]}])).await?;
    returns(
        &pod,
        alice,
        "SELECT id, body, count, state, extra FROM app.notes WHERE id < 10 ORDER BY id",
        json!([
            ["1", "p", 7, "it's new", {"a": [1, null]}],
            ["2", "X-alice", 7, "alice", null],
            ["3", "p", 4, null, [1.10]]
        ]),
    )
    .await?;
    pod.run(alice, "INSERT INTO app.notes (id, body, count, price) VALUES ($1, $2, $1, $1)", json!([9, "one value"]))
        .await?;
    returns(&pod, alice, "SELECT id, count, price FROM app.notes WHERE id = 9", json!([["9", 9, "9.00"]])).await?;
    let sql = "INSERT INTO app.notes (id, body, at, day, author, code, ulid) VALUES \
               (SNOWFLAKE_ID(), UUID_V7(), NOW(), now(), CURRENT_USER(), uuid_v7(), ULID()), \
               (10, 'later', NOW() + INTERVAL '1 day', CURRENT_DATE, concat('by ', CURRENT_USER()), \
                '6F9619FF-8B86-D011-B42D-00CF4FC964FF', $$dollars 'n' all$$)";
    ensure!(pod.run(alice, sql, json!([])).await? == 2);
    returns(
        &pod,
        alice,
        "SELECT author, code, ulid, at > now() + INTERVAL '23 hours', at < now() + INTERVAL '1 day', day = current_date \
         FROM app.notes WHERE id = 10",
        json!([["by alice", "6f9619ff-8b86-d011-b42d-00cf4fc964ff", "dollars 'n' all", true, true, true]]),
    )
    .await?;
    Ok(())
}

#[tokio::test]
async fn an_insert_that_is_wrong_says_where_and_writes_nothing() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &notes())?;
    let pod = home.start().await?;
    #[rustfmt::skip]
    let wrong: [(&str, Value, u16, &str, &str); 31] = [
        ("INSERT INTO app.notes (id) VALUES (1)", json!([]), 400, "NULL_VALUE", "row 1: column `body`"),
        ("INSERT INTO app.notes (body) VALUES ('a'), (NULL)", json!([]), 400, "NULL_VALUE", "row 2: column `body`"),
        ("INSERT INTO app.notes (body) VALUES ($1)", json!([null]), 400, "NULL_VALUE", "row 1: column `body`"),
        ("INSERT INTO app.notes (id, body) VALUES (NULL, 'a')", json!([]), 400, "NULL_VALUE", "column `id`"),
        ("INSERT INTO app.notes (body, nope) VALUES ('a', 1)", json!([]), 400, "COLUMN_NOT_FOUND", "`nope`; it has `id`, `body`"),
        ("INSERT INTO app.notes (body, body) VALUES ('a', 'b')", json!([]), 400, "INVALID_SQL", "`body` is named twice"),
        ("INSERT INTO app.notes (body) VALUES ('a', 'b')", json!([]), 400, "INVALID_SQL", "row 1 has 2 value(s) for 1 column(s)"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', 1), ('b')", json!([]), 400, "INVALID_SQL", "row 2 has 1 value(s)"),
        ("INSERT INTO app.notes VALUES ('a')", json!([]), 400, "INVALID_SQL", "for 11 column(s)"),
        ("INSERT INTO app.notes (body, _seq) VALUES ('a', 1)", json!([]), 400, "READ_ONLY_COLUMN", "`_seq`"),
        ("INSERT INTO app.notes (body, _UPDATED) VALUES ('a', 1)", json!([]), 400, "READ_ONLY_COLUMN", "`_updated`"),
        ("INSERT INTO app.notes (body, \"_deleted\") VALUES ('a', true)", json!([]), 400, "READ_ONLY_COLUMN", "`_deleted`"),
        ("INSERT INTO app.notes (id, body) VALUES (1, 'a'), (1, 'b')", json!([]), 409, "DUPLICATE_KEY", "row 2: the primary key (id = 1)"),
        ("INSERT INTO app.notes (body) VALUES ($1)", json!([]), 400, "INVALID_PARAMETER", "$1, and 0 parameter(s)"),
        ("INSERT INTO app.notes (body) VALUES ($1)", json!(["a", "b"]), 400, "INVALID_PARAMETER", "$2 was sent"),
        ("INSERT INTO app.notes (body) VALUES ($0)", json!(["a"]), 400, "INVALID_PARAMETER", "`$0` is no parameter"),
        ("INSERT INTO app.notes (body) VALUES ($x)", json!(["a"]), 400, "INVALID_PARAMETER", "`$x` is no parameter"),
        ("INSERT INTO app.notes (body) VALUES (?)", json!(["a"]), 400, "INVALID_PARAMETER", "`?` is no parameter"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', $1 + 1)", json!([1]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', 2.5 * 3)", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', 2147483647 + 1)", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, price) VALUES ('a', 0.001 + 0)", json!([]), 400, "INVALID_VALUE", "row 1, column `price`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', 1 / 0)", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', count + 1)", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', (SELECT 1))", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', count(*))", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', row_number() OVER ())", json!([]), 400, "INVALID_VALUE", "row 1, column `count`"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', NOW())", json!([]), 400, "INVALID_VALUE", "`NOW()` gives no INT"),
        ("INSERT INTO app.notes (body, count) VALUES ('a', upper('b'))", json!([]), 400, "INVALID_VALUE", "expected INT"),
        ("INSERT INTO app.nots (body) VALUES ('a')", json!([]), 404, "TABLE_NOT_FOUND", "did you mean `app.notes`"),
        ("INSERT INTO notes (body) VALUES ('a')", json!([]), 400, "INVALID_TABLE_NAME", "`notes` has no namespace"),
    ];
    for (sql, params, status, code, says) in wrong {
        let message = refused(&pod, sql, params, status, code).await?;
        ensure!(message.contains(says), "{sql}: {message}");
        ensure!(!message.contains("Internal error") && !message.contains("AggregateFunction"), "{sql}: {message}");
    }
    returns(&pod, "alice", "SELECT count(*) FROM app.notes", json!([["0"]])).await
}

#[tokio::test]
async fn a_key_is_found_again_in_buffer_and_files_whatever_its_types() -> anyhow::Result<()> {
    let columns = |keys: &[&str]| -> Vec<String> {
        let key = |(n, ty): (usize, &&str)| format!("k{n}, type: \"{ty}\", primaryKey: true");
        keys.iter().enumerate().map(key).chain(["v, type: TEXT".to_owned()]).collect()
    };
    #[rustfmt::skip]
    let tables: [(&str, &[&str], &[&str]); 10] = [
        ("k_text", &["TEXT"], &["'a'", "''", "'A'", "'é'", "'e\u{301}'", "'a '", "'🙂'"]),
        ("k_text_bigint", &["TEXT", "BIGINT"], &["'a', 1", "'a', -1", "'a1', 1", "'', 9223372036854775807", "'', -9223372036854775808"]),
        ("k_uuid", &["UUID"], &["'6F9619FF-8B86-D011-B42D-00CF4FC964FF'", "'00000000-0000-0000-0000-000000000000'"]),
        ("k_decimal", &["DECIMAL(38,4)"], &["0", "-0.0001", "1.5", "9999999999999999999999999999999999.9999", "-1.5"]),
        ("k_timestamp", &["TIMESTAMP"], &["'1969-12-31T23:59:59.999999Z'", "'9999-12-31T23:59:59.999999Z'", "0"]),
        ("k_boolean", &["BOOLEAN", "SMALLINT"], &["true, 1", "false, 1", "true, -32768"]),
        ("k_bytes", &["BYTES"], &["'\\x'", "'\\x00'", "'\\x0000'", "'\\xff'", "'/w=='"]),
        ("k_date", &["DATE", "TIME"], &["'1969-07-20', '20:17:40'", "'1970-01-01', '00:00'", "'9999-12-31', '23:59:59.999999'"]),
        ("k_int", &["INT"], &["0", "-1", "2147483647", "-2147483648"]),
        ("k_wide", &["TEXT", "BYTES", "UUID", "INT"], &["'a', '\\x00', '6F9619FF-8B86-D011-B42D-00CF4FC964FF', 0"]),
    ];
    let declared: Vec<String> = tables
        .iter()
        .map(|(name, keys, _)| user_table(name, &columns(keys).iter().map(String::as_str).collect::<Vec<_>>()))
        .collect();
    let home = Home::new(BINARY, &declare(&declared))?;
    let mut pod = home.start().await?;
    // `'\xff'` and base64 `'/w=='` are the same byte: the one value of the list that is a duplicate.
    let distinct =
        |values: &[&'static str]| -> Vec<&'static str> { values.iter().filter(|v| **v != "'/w=='").copied().collect() };
    for (name, _, values) in &tables {
        let inserted: Vec<String> = distinct(values).iter().map(|key| format!("({key}, 'first')")).collect();
        pod.run("alice", &format!("INSERT INTO app.{name} VALUES {}", inserted.join(",")), json!([])).await?;
    }
    for round in ["buffered", "flushed", "restarted", "killed"] {
        for (name, _, values) in &tables {
            for key in *values {
                let sql = format!("INSERT INTO app.{name} VALUES ({key}, 'second')");
                refused(&pod, &sql, json!([]), 409, "DUPLICATE_KEY").await.with_context(|| round)?;
                ensure!(
                    pod.sql("bob", &sql, json!([])).await?.status
                        == if round == "buffered" && *key != "'/w=='" { 200 } else { 409 }
                );
            }
            let count = distinct(values).len().to_string();
            let sql = format!("SELECT count(*), count(DISTINCT v), min(v) FROM app.{name}");
            returns(&pod, "alice", &sql, json!([[count, "1", "first"]])).await.with_context(|| round)?;
        }
        match round {
            "buffered" => {
                for (name, _, values) in &tables {
                    let flushed = pod.run("alice", &format!("STORAGE FLUSH TABLE app.{name}"), json!([])).await?;
                    ensure!(flushed == distinct(values).len() as u64);
                }
            }
            "flushed" => ensure!(pod.stop().await?.success()),
            _ => pod.kill()?,
        }
        if round != "buffered" {
            pod = home.start().await?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn a_table_without_a_key_gets_one() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &notes())?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.plain (body, m) VALUES ('a', 1), ('b', 2)", json!([])).await?;
    returns(&pod, "alice", "SELECT body, id > 0 FROM app.plain ORDER BY id", json!([["a", true], ["b", true]])).await?;
    refused(&pod, "INSERT INTO app.plain (id, body) VALUES (1, 'c'), (1, 'd')", json!([]), 409, "DUPLICATE_KEY")
        .await?;
    pod.run("alice", "INSERT INTO app.with_id (name) VALUES ('x')", json!([])).await?;
    pod.run("alice", "INSERT INTO app.with_id VALUES ('y', 5)", json!([])).await?;
    refused(&pod, "INSERT INTO app.with_id (id) VALUES (5)", json!([]), 409, "DUPLICATE_KEY").await?;
    let sql = "SELECT table_name, column_name, column_default, is_nullable, data_type FROM information_schema.columns \
               WHERE is_primary_key AND table_name IN ('plain', 'with_id') ORDER BY table_name";
    let expected =
        json!([["plain", "id", "SNOWFLAKE_ID()", "NO", "BIGINT"], ["with_id", "id", "SNOWFLAKE_ID()", "NO", "BIGINT"]]);
    returns(&pod, "alice", sql, expected).await
}

#[tokio::test]
async fn updates_and_upserts_store_what_they_say_or_nothing() -> anyhow::Result<()> {
    let columns = [
        "id, type: BIGINT, primaryKey: true",
        "num, type: INT",
        "tags, type: \"ARRAY<INT>\"",
        "price, type: \"DECIMAL(38,0)\"",
    ];
    let home = Home::new(BINARY, &declare(&[user_table("t", &columns)]))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 1, make_array(1, 2), 5), (2, 2, NULL, 5)", json!([])).await?;
    pod.run("bob", "INSERT INTO app.t VALUES (1, 7, NULL, 5)", json!([])).await?;
    let large = json!(["x".repeat(1_000_000), 1]);
    for (sql, params, status) in [
        ("UPDATE app.t SET tags = make_array(1.9, 2.5)", json!([]), 400),
        ("UPDATE app.t SET tags = make_array('1', '2')", json!([]), 400),
        ("UPDATE app.t SET num = 2147483648", json!([]), 400),
        ("UPDATE app.t SET num = num / 0", json!([]), 400),
        ("UPDATE app.t SET id = NULL", json!([]), 400),
        ("UPDATE app.t SET id = 2 WHERE id = 1", json!([]), 409),
        ("UPDATE app.t SET num = $2 WHERE $1 = 'x' AND $3 = 1", large, 400),
    ] {
        let answer = pod.sql("alice", sql, params).await?;
        ensure!(answer.status == status, "{sql}: {}", answer.text);
    }
    returns(&pod, "alice", "SELECT * FROM app.t ORDER BY id", json!([["1", 1, [1, 2], "5"], ["2", 2, null, "5"]]))
        .await?;
    // A parameter has the type of its own place, in whichever part of the statement that is.
    let big = json!([12_345_678_901_234_567_890_u64, 2]);
    pod.run("alice", "UPDATE app.t SET price = $1 WHERE id = $2", big).await?;
    pod.run("alice", "UPDATE app.t SET id = CASE id WHEN 1 THEN 2 ELSE 1 END", json!([])).await?;
    let upsert = "INSERT INTO app.t AS x VALUES (2, 9, make_array(7, 8), 1) ON CONFLICT (id) DO UPDATE \
                  SET num = excluded.tags[2] + x.tags[1] + num WHERE excluded.num > x.num RETURNING num, id";
    let found = crate::rows(
        &pod,
        "alice",
        &upsert.replace(" AS x", "").replace("x.tags", "t.tags").replace("x.num", "t.num"),
        json!([]),
    )
    .await?;
    ensure!(found == json!([[8 + 1 + 1, "2"]]), "{found}");
    returns(
        &pod,
        "alice",
        "SELECT id, num, price FROM app.t ORDER BY id",
        json!([["1", 2, "12345678901234567890"], ["2", 10, "5"]]),
    )
    .await?;
    returns(&pod, "bob", "SELECT * FROM app.t", json!([["1", 7, null, "5"]])).await
}
