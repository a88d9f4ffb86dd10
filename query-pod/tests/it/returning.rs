//! RETURNING and ON CONFLICT DO UPDATE: what they tell and compute, wherever the rows are.

use std::collections::BTreeSet;

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod};
use serde_json::{Value, json};

use super::{BINARY, declare, refusal, returns, rows, user_table};

/// Where the rows of each are.
const USERS: [&str; 3] = ["hot", "half", "cold"];

fn tables() -> String {
    let id = "id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()";
    declare(&[
        user_table("t", &[id, "num, type: INT", "s, type: TEXT"]),
        user_table("u", &["name, type: TEXT, primaryKey: true", "num, type: INT"]),
        // What ON CONFLICT calls a row is a table, too.
        user_table("excluded", &["id, type: BIGINT, primaryKey: true", "num, type: INT"]),
    ])
}

async fn fill(pod: &Pod, user: &str) -> anyhow::Result<()> {
    pod.run(user, "INSERT INTO app.t VALUES (1, 10, 'a'), (2, 20, 'b')", json!([])).await?;
    pod.run(user, "INSERT INTO app.u VALUES ('a', 1), ('a!', 2), ('b', 3)", json!([])).await?;
    pod.run(user, "INSERT INTO app.excluded VALUES (1, 500)", json!([])).await?;
    if user != "hot" {
        pod.run(user, "STORAGE FLUSH TABLE app.t", json!([])).await?;
        pod.run(user, "STORAGE FLUSH TABLE app.u", json!([])).await?;
    }
    pod.run(user, "INSERT INTO app.t VALUES (3, 30, 'c')", json!([])).await?;
    if user == "cold" {
        pod.run(user, "STORAGE FLUSH TABLE app.t", json!([])).await?;
    }
    Ok(())
}

/// An UPDATE comes over its rows in any order.
fn sorted(rows: &Value) -> Vec<String> {
    let mut rows: Vec<String> = rows.as_array().into_iter().flatten().map(Value::to_string).collect();
    rows.sort();
    rows
}

/// Checks that the `_seq`s at `column` follow one another, above `last`; returns the largest.
fn rising(rows: &Value, column: usize, last: i64) -> anyhow::Result<i64> {
    let rows = rows.as_array().context("rows")?;
    let seq = |row: &Value| anyhow::Ok(row[column].as_str().context("a number")?.parse::<i64>()?);
    let seqs = rows.iter().map(seq).collect::<anyhow::Result<BTreeSet<i64>>>()?;
    let (Some(first), Some(largest)) = (seqs.first(), seqs.last()) else { return Ok(last) };
    ensure!(*first > last && seqs.len() == rows.len() && largest - first + 1 == rows.len() as i64, "{last}: {seqs:?}");
    Ok(*largest)
}

/// What every write changes.
async fn state(pod: &Pod, user: &str) -> anyhow::Result<Value> {
    rows(pod, user, "SELECT count(*), sum(num), max(_seq) FROM app.t", json!([])).await
}

#[tokio::test]
async fn returning_tells_rows_as_they_were_written_with_their_system_columns() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &tables())?;
    let pod = home.start().await?;
    #[rustfmt::skip]
    let writes: [(&str, Value, &str, usize); 9] = [
        ("INSERT INTO app.t VALUES (4, 40, 'd'), (5, $1, 'e')", json!([50]), "id IN (4, 5)", 2),
        ("INSERT INTO app.t (num) SELECT num + 1 FROM app.u WHERE num > $1", json!([1]), "s IS NULL", 2),
        ("INSERT INTO app.t VALUES (1, 0, 'x'), (6, 60, 'f') ON CONFLICT DO NOTHING", json!([]), "id = 6", 1),
        ("INSERT INTO app.t VALUES (2, 0, 'x'), (3, 31, 'y'), (7, 70, 'g') ON CONFLICT (id) DO UPDATE SET num = excluded.num \
          WHERE excluded.num > t.num", json!([]), "id IN (3, 7)", 2),
        ("UPDATE app.t SET num = num + $1 WHERE id < 4", json!([1]), "id < 4", 3),
        ("UPDATE app.t SET num = 0 WHERE id = $1", json!([2]), "id = 2", 1),
        ("UPDATE app.t SET id = id + 100 WHERE id IN (1, 4)", json!([]), "id IN (101, 104)", 2),
        ("UPDATE app.t SET id = CASE id WHEN 2 THEN 3 ELSE 2 END WHERE id IN (2, 3)", json!([]), "id IN (2, 3)", 2),
        ("UPDATE app.t SET num = 1 WHERE false", json!([]), "false", 0),
    ];
    for user in USERS {
        fill(&pod, user).await?;
        let mut last = rising(&rows(&pod, user, "SELECT max(_seq) FROM app.t", json!([])).await?, 0, 0)?;
        for (sql, params, which, count) in &writes {
            let items = "*, t._seq AS seq, _UPDATED, num + 1 AS more, \"_deleted\"";
            let told = pod.sql(user, &format!("{sql} RETURNING {items}"), params.clone()).await?;
            ensure!(told.status == 200, "{user}, {sql}: {}", told.text);
            let shown = pod.sql(user, &format!("SELECT {items} FROM app.t WHERE {which}"), json!([])).await?;
            let (told, shown) = (&told.body["results"][0], &shown.body["results"][0]);
            ensure!(told["schema"] == shown["schema"] && told["row_count"] == *count, "{sql}: {told}\n{shown}");
            ensure!(sorted(&told["rows"]) == sorted(&shown["rows"]), "{user}, {sql}: {told}\n{shown}");
            last = rising(&told["rows"], 3, last)?;
        }
        // What is deleted is told with its last values, and as deleted.
        let sql = "DELETE FROM app.t AS x WHERE id IN (101, 104) RETURNING X._Deleted, x.*, _seq, _updated";
        let newest = rows(&pod, user, "SELECT max(_updated) FROM app.t", json!([])).await?[0][0].as_i64();
        let told = rows(&pod, user, sql, json!([])).await?;
        last = rising(&told, 4, last)?;
        for row in told.as_array().context("rows")? {
            let expected = if row[1] == "101" { json!([true, "101", 11, "a"]) } else { json!([true, "104", 40, "d"]) };
            ensure!(json!(row.as_array().context("a row")?[..4]) == expected, "{user}: {told}");
            ensure!(row[5].as_i64() >= newest && row[5] == told[0][5], "{user}, {newest:?}: {told}");
        }
        let told = rows(&pod, user, "DELETE FROM app.t WHERE id = 5 RETURNING _seq, _deleted, num", json!([])).await?;
        last = rising(&told, 0, last)?;
        ensure!(json!(told[0].as_array().context("a row")?[1..]) == json!([true, 50]), "{user}: {told}");
        let again = rows(&pod, user, "DELETE FROM app.t WHERE id IN (5, 101) RETURNING _seq", json!([])).await?;
        ensure!(again == json!([]), "{user}: {again}");
        let sql = "INSERT INTO app.t VALUES (5, 0, '') RETURNING _seq, _deleted";
        let told = rows(&pod, user, sql, json!([])).await?;
        rising(&told, 0, last)?;
        ensure!(told[0][1] == false, "{user}: {told}");
    }
    let told = rows(&pod, "carol", "UPDATE app.t SET num = 1 RETURNING _seq, id", json!([])).await?;
    ensure!(told == json!([]), "{told}");
    Ok(())
}

#[tokio::test]
async fn rows_come_back_in_the_order_of_their_statement() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &tables())?;
    let pod = home.start().await?;
    // More than one batch of a query, and more than one piece of an answer.
    let ids: Vec<i64> = (0..9_000).rev().collect();
    let values: Vec<String> = ids.iter().map(|id| format!("({id}, {id}, 'x')")).collect();
    let sql = format!("INSERT INTO app.t VALUES {} RETURNING id, num * 2 AS twice, _seq", values.join(","));
    let told = rows(&pod, "alice", &sql, json!([])).await?;
    let first: i64 = told[0][2].as_str().context("a number")?.parse()?;
    let expected: Vec<Value> =
        (first..).zip(&ids).map(|(seq, id)| json!([id.to_string(), (id * 2).to_string(), seq.to_string()])).collect();
    let differs = told.as_array().context("rows")?.iter().zip(&expected).find(|(told, expected)| told != expected);
    ensure!(told == json!(expected), "the first that differs: {differs:?}");
    returns(&pod, "alice", "SELECT id, num * 2 AS twice, _seq FROM app.t ORDER BY _seq", told).await?;
    pod.run("alice", "INSERT INTO app.u VALUES ('a', 1), ('b', 2), ('c', 3)", json!([])).await?;
    let sql = "INSERT INTO app.t VALUES (9003, 0, 'c'), (9001, 0, 'x'), (9002, 0, 'a'), (9000, 0, 'b') \
               RETURNING id, (SELECT max(num) FROM app.u WHERE name = t.s) AS n";
    returns(&pod, "alice", sql, json!([["9003", 3], ["9001", null], ["9002", 1], ["9000", 2]])).await
}

#[tokio::test]
async fn what_fails_in_returning_writes_nothing() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &tables())?;
    let pod = home.start().await?;
    #[rustfmt::skip]
    let wrong: [(&str, &str, &str); 15] = [
        ("INSERT INTO app.t VALUES (9, 10, 'x') RETURNING _seq, 1 / (num - 10)", "DIVISION_BY_ZERO", "division"),
        ("INSERT INTO app.t VALUES (1, 7, 'x') ON CONFLICT (id) DO UPDATE SET num = 7 RETURNING _seq, 1 / (num - 7)", "DIVISION_BY_ZERO", ""),
        ("UPDATE app.t SET num = 0 WHERE id = 1 RETURNING 1 / num, _updated", "DIVISION_BY_ZERO", ""),
        ("UPDATE app.t SET num = num RETURNING _seq, CAST(s AS INT)", "", ""),
        ("DELETE FROM app.t RETURNING _seq, (9223372036854775807 - id) * 2", "", ""),
        ("DELETE FROM app.t RETURNING _deleted, nope", "INVALID_SQL", "nope"),
        ("DELETE FROM app.t RETURNING _seq, (SELECT num FROM app.u)", "", "more than one row"),
        ("DELETE FROM app.t RETURNING _seq, (SELECT max(1 / (num - num)) FROM app.u)", "DIVISION_BY_ZERO", ""),
        ("DELETE FROM app.t RETURNING (SELECT max(x.id) FROM app.t x WHERE x._seq = t._seq)", "INVALID_SQL", "_seq"),
        ("DELETE FROM app.t RETURNING count(*)", "INVALID_SQL", "`count` makes one of many"),
        ("UPDATE app.t SET num = 0 RETURNING 1 + Max(num)", "INVALID_SQL", "`max` makes one of many"),
        ("UPDATE app.t SET num = 0 RETURNING _seq + 1", "UNSUPPORTED_STATEMENT", "as in `RETURNING _seq AS s`"),
        ("DELETE FROM app.t RETURNING coalesce(t._updated, now())", "UNSUPPORTED_STATEMENT", "as in `RETURNING _seq AS s`"),
        ("DELETE FROM app.t RETURNING _deleted AND true", "UNSUPPORTED_STATEMENT", "as in `RETURNING _seq AS s`"),
        ("INSERT INTO app.t VALUES (9, 10, 'x') RETURNING u._seq", "UNSUPPORTED_STATEMENT", ""),
    ];
    for user in USERS {
        fill(&pod, user).await?;
        let before = state(&pod, user).await?;
        for (sql, code, says) in wrong {
            let answer = pod.sql(user, sql, json!([])).await?;
            let code = if code.is_empty() { answer.code() } else { code };
            let message = refusal(sql, &answer, 400, code)?;
            ensure!(message.contains(says) && code != "INTERNAL", "{user}, {sql}: {code}, {message}");
        }
        let missing = pod.sql(user, "DELETE FROM app.t RETURNING (SELECT max(num) FROM app.nope)", json!([])).await?;
        refusal("a table that is not there", &missing, 404, "TABLE_NOT_FOUND")?;
        let after = state(&pod, user).await?;
        ensure!(after == before, "{user}: {before} is now {after}");
    }
    Ok(())
}

#[tokio::test]
async fn subqueries_of_returning_see_what_was_before() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &tables())?;
    let pod = home.start().await?;
    for user in USERS {
        fill(&pod, user).await?;
        let check = async |sql: &str, params: Value, expected: Value| -> anyhow::Result<()> {
            let told = rows(&pod, user, sql, params).await?;
            ensure!(sorted(&told) == sorted(&expected), "{user}, {sql}\n returned {told}\n expected {expected}");
            Ok(())
        };
        let sql = "INSERT INTO app.t VALUES (7, 1, 'b') RETURNING id, (SELECT count(*) FROM app.t) AS n, \
                   (SELECT max(u.num) FROM app.u u WHERE u.name = t.s) AS of_s";
        check(sql, json!([]), json!([["7", "3", 3]])).await?;
        let sql = "UPDATE app.t AS x SET num = num + 1, s = s || '!' WHERE id <= $1 RETURNING id, num, $2 AS tag, \
                   (SELECT sum(num) FROM app.t WHERE id < 4) AS before, \
                   (SELECT max(num) FROM app.u WHERE name = x.s) AS of_s";
        check(sql, json!([2, "y"]), json!([["1", 11, "y", "60", 2], ["2", 21, "y", "60", null]])).await?;
        // A subquery may name the system columns of what it reads.
        let sql = "DELETE FROM app.t WHERE id = 3 RETURNING *, (SELECT count(*) FROM (SELECT * FROM app.t) y) AS n, \
                   (SELECT count(*) FROM app.t WHERE _seq > 0 AND NOT _deleted) AS m, _deleted";
        check(sql, json!([]), json!([["3", 30, "c", "4", "4", true]])).await?;
        let sql = "INSERT INTO app.t VALUES (1, 5, 'z'), (8, 8, 'z') ON CONFLICT (id) DO UPDATE SET num = excluded.num \
                   RETURNING num, (SELECT num FROM app.t WHERE id = $1) AS before, \
                   (SELECT num FROM app.excluded) AS other";
        check(sql, json!([1]), json!([[8, 11, 500], [5, 11, 500]])).await?;
        let all = "SELECT * FROM app.t ORDER BY id";
        returns(&pod, user, all, json!([["1", 5, "a!"], ["2", 21, "b!"], ["7", 1, "b"], ["8", 8, "z"]])).await?;
    }
    let sql = "INSERT INTO app.t VALUES (1, 0, 'a') \
               RETURNING (SELECT count(*) FROM app.t) AS n, (SELECT max(num) FROM app.u) AS m";
    returns(&pod, "carol", sql, json!([["0", null]])).await
}

#[tokio::test]
async fn upserts_compute_with_subqueries() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &tables())?;
    let pod = home.start().await?;
    for user in USERS {
        fill(&pod, user).await?;
        let check = async |sql: &str, params: Value, expected: Value| -> anyhow::Result<()> {
            let told = rows(&pod, user, sql, params).await?;
            ensure!(sorted(&told) == sorted(&expected), "{user}, {sql}\n returned {told}\n expected {expected}");
            Ok(())
        };
        // Of all rows as they were before; a bare column of a subquery is its own.
        let sql = "INSERT INTO app.t VALUES (1, 5, 'a'), (2, 6, 'b'), (9, 0, 'z') ON CONFLICT (id) DO UPDATE SET num = \
                   (SELECT sum(num) FROM app.t) + (SELECT max(num) FROM app.u WHERE name = excluded.s) + excluded.num \
                   RETURNING id, num";
        check(sql, json!([]), json!([["1", 60 + 1 + 5], ["2", 60 + 3 + 6], ["9", 0]])).await?;
        let sql = "INSERT INTO app.t VALUES (1, 7, 'a'), (2, 7, 'nope'), (3, 7, 'b') ON CONFLICT (id) DO UPDATE \
                   SET num = excluded.num WHERE EXISTS (SELECT 1 FROM app.u WHERE name = excluded.s) \
                   AND t.id IN (SELECT id FROM app.t WHERE num > $1) AND num < (SELECT max(num) FROM app.excluded) \
                   RETURNING id, num";
        check(sql, json!([60]), json!([["1", 7]])).await?;
        let sql = "INSERT INTO app.t VALUES (2, 0, '') ON CONFLICT (id) DO UPDATE \
                   SET num = (SELECT count(*) FROM (SELECT * FROM app.u WHERE _seq > 0) y), \
                   s = (SELECT name FROM app.u WHERE num = $1) RETURNING *";
        check(sql, json!([2]), json!([["2", 3, "a!"]])).await?;
        let before = state(&pod, user).await?;
        let shown = "SELECT * FROM app.t ORDER BY id";
        returns(&pod, user, shown, json!([["1", 7, "a"], ["2", 3, "a!"], ["3", 30, "c"], ["9", 0, "z"]])).await?;
        for (set, code) in [
            ("num = (SELECT num FROM app.u)", ""),
            ("num = (SELECT max(1 / (num - num)) FROM app.u)", "DIVISION_BY_ZERO"),
            ("num = (SELECT max(name) FROM app.u)", "INVALID_VALUE"),
            ("num = (SELECT max(num) + 2147483647 FROM app.u)", "INVALID_VALUE"),
            // Whose it is must be said.
            ("num = (SELECT max(num) FROM app.u WHERE name = s)", "INVALID_SQL"),
            ("num = (SELECT max(num) FROM app.nothing)", "TABLE_NOT_FOUND"),
            ("num = 0 WHERE t._seq > 0", "UNSUPPORTED_STATEMENT"),
        ] {
            let sql =
                format!("INSERT INTO app.t VALUES (20, 0, 'x'), (1, 0, 'x') ON CONFLICT (id) DO UPDATE SET {set}");
            let answer = pod.sql(user, &sql, json!([])).await?;
            let code = if code.is_empty() { answer.code() } else { code };
            refusal(&sql, &answer, if code == "TABLE_NOT_FOUND" { 404 } else { 400 }, code)?;
            ensure!(code != "INTERNAL", "{sql}: {}", answer.text);
        }
        let after = state(&pod, user).await?;
        ensure!(after == before, "{user}: {before} is now {after}");
    }
    pod.run("carol", "INSERT INTO app.t VALUES (1, 4, 'a')", json!([])).await?;
    let sql = "INSERT INTO app.t VALUES (1, 0, 'a') ON CONFLICT (id) DO UPDATE SET num = (SELECT sum(num) FROM app.t), \
               s = (SELECT max(name) FROM app.u) RETURNING num, s";
    returns(&pod, "carol", sql, json!([[4, null]])).await
}
