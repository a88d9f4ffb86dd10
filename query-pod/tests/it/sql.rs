//! What statements do: the same wherever the rows are, and an error wherever the answer would not be right.

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod, data_files_below, eventually};
use serde_json::{Value, json};

use super::{BINARY, declare, refusal, refused, returns, rows, table, user_table};

const FLUSH_ORDERS: &str = "STORAGE FLUSH TABLE app.orders";

fn shop() -> String {
    declare(&[
        user_table(
            "orders",
            &[
                "id, type: BIGINT, primaryKey: true",
                "customer, type: TEXT, nullable: false",
                "qty, type: INT",
                "price, type: \"DECIMAL(10,2)\"",
                "at, type: TIMESTAMP",
                "tags, type: ARRAY<TEXT>",
                "info, type: JSON",
                "weight, type: DOUBLE",
            ],
        ),
        user_table("customers", &["name, type: TEXT, primaryKey: true", "city, type: TEXT"]),
    ])
}

const CUSTOMERS: [(&str, &str); 5] =
    [("ann", "Bern"), ("bob", "Bonn"), ("cleo", "Bern"), ("dave", "Rome"), ("eve", "Oslo")];

/// 300 orders; the second half of them, and the last two customers, come after the first flush of `half`.
async fn fill(pod: &Pod, user: &str, part: usize) -> anyhow::Result<()> {
    let orders: Vec<String> = (part * 150..part * 150 + 150)
        .map(|n| {
            let customer = CUSTOMERS[n % 4].0;
            let qty = if n % 10 == 9 { "NULL".to_owned() } else { (n % 7).to_string() };
            let weight = if n == 299 { "'NaN'".to_owned() } else { format!("{}.5", n % 50) };
            let at = 1_700_000_000_000_000_i64 + n as i64 * 3_600_000_000;
            format!(
                "({n}, '{customer}', {qty}, {}.{:02}, {at}, '[\"t{}\",null]', '{{\"n\":{n}}}', {weight})",
                n,
                n % 100,
                n % 3
            )
        })
        .collect();
    pod.run(user, &format!("INSERT INTO app.orders VALUES {}", orders.join(",")), json!([])).await?;
    let customers: Vec<String> =
        CUSTOMERS[part * 3..part * 2 + 3].iter().map(|(n, c)| format!("('{n}','{c}')")).collect();
    pod.run(user, &format!("INSERT INTO app.customers VALUES {}", customers.join(",")), json!([])).await?;
    Ok(())
}

async fn flush(pod: &Pod, user: &str) -> anyhow::Result<()> {
    pod.run(user, FLUSH_ORDERS, json!([])).await?;
    pod.run(user, "STORAGE FLUSH TABLE app.customers", json!([])).await?;
    Ok(())
}

/// Queries with what they return, or `null` where it is enough that all agree.
#[rustfmt::skip]
fn queries() -> Vec<(&'static str, Value, Value)> {
    vec![
        ("SELECT count(*), sum(qty), min(price), max(at) FROM app.orders", json!([]),
            json!([["300", "806", "0.00", 1_701_076_400_000_000_i64]])),
        ("SELECT * FROM app.orders WHERE id = 7", json!([]),
            json!([["7", "dave", 0, "7.07", 1_700_025_200_000_000_i64, ["t1", null], {"n": 7}, 7.5]])),
        ("SELECT * FROM app.orders WHERE id = 207", json!([]),
            json!([["207", "dave", 4, "207.07", 1_700_745_200_000_000_i64, ["t0", null], {"n": 207}, 7.5]])),
        ("SELECT * FROM app.orders ORDER BY id", json!([]), json!(null)),
        ("SELECT id FROM app.orders WHERE qty IS NULL ORDER BY id DESC LIMIT 3", json!([]), json!([["299"], ["289"], ["279"]])),
        ("SELECT id FROM app.orders ORDER BY price DESC, id LIMIT 2 OFFSET 1", json!([]), json!([["298"], ["297"]])),
        ("SELECT id FROM app.orders ORDER BY at LIMIT $1 OFFSET $2", json!([2, "149"]), json!([["149"], ["150"]])),
        ("SELECT count(*) FROM app.orders WHERE customer IN ($1, $2)", json!(["ann", "bob"]), json!([["150"]])),
        ("SELECT count(*) FROM app.orders WHERE customer NOT IN ('ann') AND qty BETWEEN $1 AND $2", json!([1, 2]), json!(null)),
        ("SELECT count(*) FROM app.orders WHERE customer LIKE $1", json!(["_o%"]), json!([["75"]])),
        ("SELECT id FROM app.orders WHERE price = 120.20 OR price = $1 ORDER BY id", json!(["149.49"]), json!([["120"], ["149"]])),
        ("SELECT id FROM app.orders WHERE at >= $1 ORDER BY id LIMIT 1", json!(["2023-11-16T00:00:00Z"]), json!(null)),
        ("SELECT id FROM app.orders WHERE at < TIMESTAMP '2023-11-15 00:00:00' ORDER BY id DESC LIMIT 1", json!([]), json!(null)),
        ("SELECT id FROM app.orders WHERE tags[1] = 't2' ORDER BY id LIMIT 2", json!([]), json!([["2"], ["5"]])),
        ("SELECT customer, count(*) AS n, sum(price) FROM app.orders GROUP BY customer HAVING count(*) > 10 ORDER BY customer",
            json!([]), json!(null)),
        ("SELECT c.city, count(o.id) FROM app.customers c LEFT JOIN app.orders o ON o.customer = c.name GROUP BY c.city ORDER BY 1",
            json!([]), json!([["Bern", "150"], ["Bonn", "75"], ["Oslo", "0"], ["Rome", "75"]])),
        ("SELECT a.id, b.id FROM app.orders a JOIN app.orders b ON a.id + 150 = b.id WHERE a.id < 2 ORDER BY 1", json!([]),
            json!([["0", "150"], ["1", "151"]])),
        ("SELECT name FROM app.customers c WHERE NOT EXISTS (SELECT 1 FROM app.orders o WHERE o.customer = c.name)", json!([]),
            json!([["eve"]])),
        ("SELECT name FROM app.customers WHERE name IN (SELECT customer FROM app.orders WHERE id = 2)", json!([]), json!([["cleo"]])),
        ("SELECT id, (SELECT max(city) FROM app.customers c WHERE c.name = o.customer) FROM app.orders o WHERE id IN (1, 151) ORDER BY id",
            json!([]), json!([["1", "Bonn"], ["151", "Rome"]])),
        ("WITH big AS (SELECT * FROM app.orders WHERE price > 290), n AS (SELECT count(*) AS n FROM big) SELECT n FROM n",
            json!([]), json!([["10"]])),
        ("WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 4) SELECT count(*) FROM r JOIN app.orders o ON o.id = r.n",
            json!([]), json!([["4"]])),
        ("SELECT id, sum(qty) OVER (PARTITION BY customer ORDER BY id ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) FROM app.orders \
          ORDER BY id LIMIT 5", json!([]), json!([["0", "0"], ["1", "1"], ["2", "2"], ["3", "3"], ["4", "4"]])),
        ("SELECT id FROM (SELECT id, rank() OVER (PARTITION BY customer ORDER BY price DESC) AS r FROM app.orders) x WHERE r = 1 \
          ORDER BY id", json!([]), json!([["296"], ["297"], ["298"], ["299"]])),
        ("SELECT customer FROM app.orders UNION SELECT name FROM app.customers ORDER BY 1", json!([]),
            json!([["ann"], ["bob"], ["cleo"], ["dave"], ["eve"]])),
        ("SELECT name FROM app.customers EXCEPT SELECT customer FROM app.orders", json!([]), json!([["eve"]])),
        ("SELECT name FROM app.customers INTERSECT SELECT customer FROM app.orders ORDER BY 1", json!([]),
            json!([["ann"], ["bob"], ["cleo"], ["dave"]])),
        ("SELECT DISTINCT city FROM app.customers ORDER BY city DESC", json!([]), json!([["Rome"], ["Oslo"], ["Bonn"], ["Bern"]])),
        ("SELECT array_agg(name ORDER BY name) FROM app.customers WHERE city = 'Bern'", json!([]), json!([[["ann", "cleo"]]])),
        ("SELECT CASE WHEN qty > 3 THEN 'many' ELSE 'few' END AS k, count(*) FROM app.orders GROUP BY 1 ORDER BY 1", json!([]), json!(null)),
        ("SELECT count(*) FILTER (WHERE qty = 1), avg(qty), count(DISTINCT customer) FROM app.orders", json!([]), json!(null)),
        ("SELECT upper(substr(customer, 1, 1)) || $1, id * 2 FROM app.orders WHERE id = $2", json!(["!", 3]), json!([["D!", "6"]])),
        ("SELECT date_trunc('day', at) AS d, count(*) FROM app.orders GROUP BY d ORDER BY d LIMIT 2", json!([]),
            json!([[1_699_920_000_000_000_i64, "2"], [1_700_006_400_000_000_i64, "24"]])),
        ("SELECT id FROM app.orders WHERE weight > 48.5 ORDER BY id", json!([]), json!([["49"], ["99"], ["149"], ["199"], ["249"], ["299"]])),
        ("SELECT id, weight FROM app.orders ORDER BY weight DESC, id LIMIT 2", json!([]), json!([["299", "NaN"], ["49", 49.5]])),
        ("SELECT id, info FROM app.orders WHERE id = 160 UNION ALL SELECT id, info FROM app.orders WHERE id = 10 ORDER BY id", json!([]),
            json!([["10", {"n": 10}], ["160", {"n": 160}]])),
        ("SELECT unnest(tags) FROM app.orders WHERE id = 200", json!([]), json!([["t2"], [null]])),
        ("SELECT value FROM generate_series(1, 3)", json!([]), json!([["1"], ["2"], ["3"]])),
        ("VALUES (1, 'a'), (2, 'b')", json!([]), json!([["1", "a"], ["2", "b"]])),
        ("SELECT count(*) FROM app.orders CROSS JOIN app.customers", json!([]), json!([["1500"]])),
        ("SELECT id FROM app.orders WHERE false", json!([]), json!([])),
    ]
}

#[tokio::test]
async fn a_query_returns_the_same_wherever_its_rows_are() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let mut pod = home.start().await?;
    for user in ["hot", "half", "cold"] {
        fill(&pod, user, 0).await?;
        if user == "half" {
            flush(&pod, user).await?;
        }
        fill(&pod, user, 1).await?;
        if user == "cold" {
            flush(&pod, user).await?;
        }
    }
    let files = |user: &str| data_files_below(&home.data_dir().join("files/users").join(user));
    ensure!(files("hot")?.is_empty() && files("half")?.len() == 2 && files("cold")?.len() == 2);
    let mut before: Option<Vec<String>> = None;
    for round in ["as written", "after a restart", "after kill -9"] {
        let mut answers = Vec::new();
        for (sql, params, expected) in queries() {
            let hot = pod.sql("hot", sql, params.clone()).await?;
            ensure!(hot.status == 200, "{sql}: {}", hot.text);
            let found = &hot.body["results"][0]["rows"];
            ensure!(
                expected.is_null() || *found == expected,
                "{round}: {sql}\n returned {found}\n expected {expected}"
            );
            for user in ["half", "cold"] {
                let other = pod.sql(user, sql, params.clone()).await?;
                ensure!(other.results() == hot.results(), "{round}, {user}: {sql}\n{}\n{}", other.text, hot.text);
            }
            answers.push(hot.results().to_owned());
        }
        if let Some(before) = &before {
            ensure!(*before == answers, "{round} the answers are others than before");
        }
        before = Some(answers);
        if round == "as written" {
            ensure!(pod.stop().await?.success());
        } else {
            pod.kill()?;
        }
        pod = home.start().await?;
    }
    Ok(())
}

#[tokio::test]
async fn limit_counts_buffered_and_filed_rows_together() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    for part in [0, 1] {
        fill(&pod, "alice", part).await?;
        if part == 0 {
            flush(&pod, "alice").await?;
        }
    }
    for n in [0, 1, 149, 150, 151, 299, 300, 1_000] {
        let expected = n.min(300);
        for sql in ["SELECT id FROM app.orders LIMIT $1", "SELECT id, qty FROM app.orders WHERE id >= 0 LIMIT $1"] {
            let found = rows(&pod, "alice", sql, json!([n])).await?;
            let mut ids: Vec<&str> = found.as_array().unwrap().iter().map(|row| row[0].as_str().unwrap()).collect();
            ids.sort_unstable();
            ids.dedup();
            ensure!(ids.len() == expected, "{sql} with {n}: {} rows", ids.len());
        }
        let count = format!("SELECT count(*) FROM (SELECT id FROM app.orders LIMIT {n}) x");
        returns(&pod, "alice", &count, json!([[expected.to_string()]])).await?;
    }
    Ok(())
}

#[tokio::test]
async fn star_has_no_system_columns_and_names_show_them() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    fill(&pod, "alice", 0).await?;
    flush(&pod, "alice").await?;
    fill(&pod, "alice", 1).await?;
    let names = async |sql: &str| -> anyhow::Result<Vec<String>> {
        let answer = pod.sql("alice", sql, json!([])).await?;
        ensure!(answer.status == 200, "{sql}: {}", answer.text);
        let schema = answer.body["results"][0]["schema"].as_array().context("a schema")?.clone();
        Ok(schema.iter().map(|column| column["name"].as_str().unwrap_or_default().to_owned()).collect())
    };
    let own = ["name", "city"];
    for sql in [
        "SELECT * FROM app.customers",
        "SELECT t.* FROM app.customers t",
        "SELECT app.customers.* FROM app.customers",
        "SELECT * FROM app.customers AS t",
        "SELECT * FROM app.customers WHERE _seq > 0",
        "SELECT t.* FROM app.customers t ORDER BY t._seq",
        "SELECT * FROM app.customers t WHERE NOT t._deleted",
        "SELECT * FROM (SELECT * FROM app.customers WHERE _seq > 0) x",
        "WITH c AS (SELECT * FROM app.customers) SELECT * FROM c",
        "WITH c AS (SELECT * FROM app.customers WHERE _updated > TIMESTAMP '2020-01-01') SELECT c.* FROM c",
        "SELECT * FROM kalam.app.customers WHERE _seq > 0",
        "SELECT * FROM app.customers WHERE EXISTS (SELECT _seq FROM app.orders)",
        "SELECT * FROM app.customers WHERE _seq > 0 UNION ALL SELECT * FROM app.customers WHERE _seq < 0",
    ] {
        ensure!(names(sql).await? == own, "{sql}: {:?}", names(sql).await?);
    }
    for (sql, expected) in [
        ("SELECT _seq, * FROM app.customers", &["_seq", "name", "city"][..]),
        ("SELECT *, _deleted FROM app.customers", &["name", "city", "_deleted"]),
        ("SELECT a.*, b._seq FROM app.customers a JOIN app.customers b ON a.name = b.name", &["name", "city", "_seq"]),
        ("SELECT * FROM app.customers a JOIN app.customers b ON a._seq = b._seq", &["name", "city", "name", "city"]),
        ("SELECT * FROM app.customers a JOIN app.customers b USING (name)", &["name", "city", "city"]),
        ("SELECT * FROM (SELECT name, _seq FROM app.customers) x", &["name", "_seq"]),
        ("WITH c AS (SELECT _seq AS s FROM app.customers) SELECT * FROM c", &["s"]),
        ("SELECT * FROM (app.customers CROSS JOIN (VALUES (1)) one(x)) WHERE _seq > 0", &["name", "city", "x"]),
        ("SELECT * FROM app.customers, LATERAL (SELECT 1 AS one) l", &["name", "city", "one"]),
    ] {
        ensure!(names(sql).await? == expected, "{sql}: {:?}", names(sql).await?);
    }
    returns(
        &pod,
        "alice",
        "SELECT count(*), count(DISTINCT _seq), bool_or(_deleted), min(_updated) > TIMESTAMP '2020-01-01', \
         max(CASE WHEN id < 150 THEN _seq END) < min(CASE WHEN id >= 150 THEN _seq END) FROM app.orders",
        json!([["300", "300", false, true, true]]),
    )
    .await
}

#[tokio::test]
async fn names_resolve_with_namespace_id_and_errors_name_what_is_near() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    let authorization = format!("Bearer {}", pod.token("alice", "user")?);
    let send = async |body: Value| pod.send(Some(&authorization), body.to_string()).await;
    let insert = json!({"sql": "INSERT INTO customers VALUES ('ann', $1)", "params": ["Bern"], "namespace_id": "app"});
    ensure!(send(insert.clone()).await?.status == 200);
    refusal("again", &send(insert).await?, 409, "DUPLICATE_KEY")?;
    for (sql, namespace) in [
        ("SELECT * FROM customers", json!("app")),
        ("SELECT * FROM Customers WHERE _seq > 0", json!("app")),
        ("SELECT c.* FROM customers c JOIN app.customers d ON c.name = d.name", json!("app")),
        ("SELECT * FROM app.customers", json!("nope")),
        ("SELECT * FROM APP.customers", json!(null)),
        ("SELECT * FROM kalam.app.customers", json!(null)),
    ] {
        let answer = send(json!({"sql": sql, "params": null, "namespace_id": namespace})).await?;
        ensure!(answer.rows()? == [json!(["ann", "Bern"])], "{sql}: {}", answer.text);
    }
    let flushed = send(json!({"sql": "STORAGE FLUSH TABLE customers", "namespace_id": "app"})).await?;
    ensure!(flushed.body["results"][0]["row_count"] == 1, "{}", flushed.text);
    for (sql, namespace, status, code, says) in [
        (
            "SELECT * FROM customer",
            json!("app"),
            404,
            "TABLE_NOT_FOUND",
            "`app.customer` does not exist; did you mean `app.customers`?",
        ),
        ("SELECT * FROM app.custommers", json!(null), 404, "TABLE_NOT_FOUND", "did you mean `app.customers`?"),
        (
            "SELECT * FROM app.something_else",
            json!(null),
            404,
            "TABLE_NOT_FOUND",
            "`app.something_else` does not exist",
        ),
        ("SELECT * FROM customers", json!(null), 404, "TABLE_NOT_FOUND", "`customers` does not exist"),
        ("SELECT * FROM \"APP\".customers", json!(null), 404, "TABLE_NOT_FOUND", "does not exist"),
        ("SELECT * FROM a.b.c.d", json!(null), 400, "INVALID_SQL", "a.b.c.d"),
        ("STORAGE FLUSH TABLE app.custommers", json!(null), 404, "TABLE_NOT_FOUND", "did you mean `app.customers`?"),
        ("STORAGE FLUSH TABLE customers", json!(null), 400, "INVALID_TABLE_NAME", "has no namespace"),
        ("SELECT nope FROM customers", json!("app"), 400, "INVALID_SQL", "nope"),
        ("SELECT * FROM information_schema.nope", json!(null), 404, "TABLE_NOT_FOUND", "information_schema.nope"),
    ] {
        let message = refusal(sql, &send(json!({"sql": sql, "namespace_id": namespace})).await?, status, code)?;
        ensure!(message.contains(says), "{sql}: {message}");
    }
    for body in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"sql": 1}"#,
        r#"{"sql": "SELECT 1", "parms": []}"#,
        r#"{"sql": "SELECT 1", "params": {}}"#,
    ] {
        refusal(body, &pod.send(Some(&authorization), body.to_owned()).await?, 400, "INVALID_REQUEST")?;
    }
    refusal(
        "latin-1",
        &pod.send(Some(&authorization), b"{\"sql\": \"SELECT '\xe9'\"}".to_vec()).await?,
        400,
        "INVALID_REQUEST",
    )?;
    ensure!(pod.get("/nope").await?.0 == 404 && pod.get("/v1/api/sql").await?.0 == 405);
    Ok(())
}

#[tokio::test]
async fn information_schema_tells_the_catalog() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    let alice = "alice";
    returns(&pod, alice, "SELECT schema_name FROM information_schema.schemata", json!([["app"]])).await?;
    returns(
        &pod,
        alice,
        "SELECT table_schema, table_name, table_type, use_user_storage FROM information_schema.tables ORDER BY 2",
        json!([["app", "customers", "USER TABLE", false], ["app", "orders", "USER TABLE", false]]),
    )
    .await?;
    let sql = "SELECT column_name, ordinal_position, is_nullable, data_type, is_primary_key FROM information_schema.columns \
               WHERE table_name = $1 ORDER BY ordinal_position LIMIT 4";
    let expected = json!([
        ["id", "1", "NO", "BIGINT", true],
        ["customer", "2", "NO", "TEXT", false],
        ["qty", "3", "YES", "INT", false],
        ["price", "4", "YES", "DECIMAL(10,2)", false]
    ]);
    ensure!(rows(&pod, alice, sql, json!(["orders"])).await? == expected);
    let sql = "SELECT count(*) FROM information_schema.columns c JOIN information_schema.tables t USING (table_schema, table_name)";
    returns(&pod, alice, sql, json!([["10"]])).await
}

#[tokio::test]
async fn parameters_are_checked_before_a_query_runs() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    fill(&pod, "alice", 0).await?;
    #[rustfmt::skip]
    let wrong: [(&str, Value, &str); 10] = [
        ("SELECT id FROM app.orders WHERE id = $1", json!([]), "uses $1, and 0 parameter(s)"),
        ("SELECT id FROM app.orders WHERE id = $2", json!([1, 2]), "$1 was sent, and the statement does not use it"),
        ("SELECT id FROM app.orders", json!([1]), "$1 was sent"),
        ("SELECT id FROM app.orders WHERE id = $1", json!(["x"]), "$1: expected BIGINT"),
        ("SELECT id FROM app.orders WHERE id = $1", json!([1.5]), "$1: expected BIGINT"),
        ("SELECT id FROM app.orders WHERE qty = $1", json!([3_000_000_000_i64]), "$1: `3000000000` is out of range for INT"),
        ("SELECT id FROM app.orders WHERE customer = $1", json!([5]), "$1: expected TEXT"),
        ("SELECT id FROM app.orders WHERE at > $1", json!(["yesterday"]), "$1: expected TIMESTAMP"),
        ("SELECT id FROM app.orders WHERE id = $x", json!([1]), "`$x` is no parameter"),
        ("SELECT id FROM app.orders LIMIT $1", json!(["many"]), "$1: expected BIGINT"),
    ];
    for (sql, params, says) in wrong {
        let message = refused(&pod, sql, params, 400, "INVALID_PARAMETER").await?;
        ensure!(message.contains(says), "{sql}: {message}");
    }
    #[rustfmt::skip]
    let right: [(&str, Value, Value); 15] = [
        ("SELECT count(*) FROM app.orders WHERE id = $1", json!(["7"]), json!([["1"]])),
        ("SELECT count(*) FROM app.orders WHERE id = $1 OR id = $1 + 1", json!([7]), json!([["2"]])),
        ("SELECT count(*) FROM app.orders WHERE qty = $1", json!([null]), json!([["0"]])),
        ("SELECT $1, $2, $3, $4", json!([1, 1.5, "x", true]), json!([["1", 1.5, "x", true]])),
        ("SELECT count(*) FROM app.orders WHERE weight = $1", json!([7.5]), json!([["3"]])),
        ("SELECT count(*) FROM app.orders WHERE price > $1", json!([140]), json!([["10"]])),
        ("SELECT count(*) FROM app.orders WHERE price > $1 AND price < $2", json!(["140.40", 142.42]), json!([["1"]])),
        ("SELECT count(*) FROM app.orders WHERE at = $1", json!([1_700_000_000_000_000_i64]), json!([["1"]])),
        ("SELECT count(*) FROM app.orders WHERE customer || $1 = 'ann!'", json!(["!"]), json!([["38"]])),
        ("SELECT count(*) FROM app.orders WHERE customer = $1", json!(["' OR 1=1 --"]), json!([["0"]])),
        ("SELECT $1::timestamp, CAST($2 AS DATE), $3::time", json!([1_700_000_000_000_001_i64, 19_675, 1]), json!([[1_700_000_000_000_001_i64, 19_675, 1]])),
        ("SELECT $1::timestamp, CAST($2 AS DATE), $3::time", json!(["9999-12-31T23:59:59.999999Z", "2023-11-14", "22:13:20.5"]),
            json!([[253_402_300_799_999_999_i64, 19_675, 80_000_500_000_i64]])),
        ("SELECT $1 AS a, $1::timestamp AS b, $1::date AS c FROM (VALUES ($1)) v(x) WHERE x::timestamp = $1::timestamp", json!([7]), json!([["7", 7, 7]])),
        ("SELECT count(*) FROM app.orders WHERE at = $1::timestamp AND at = TIMESTAMP '2023-11-14 22:13:20'", json!([1_700_000_000_000_000_i64]), json!([["1"]])),
        ("SELECT count(*) FROM app.orders WHERE id = $1 AND qty = $1 AND price < $1 + 1", json!([3]), json!([["1"]])),
    ];
    for (sql, params, expected) in right {
        let found = rows(&pod, "alice", sql, params.clone()).await?;
        ensure!(found == expected, "{sql} with {params}: {found}");
    }
    Ok(())
}

#[tokio::test]
async fn statements_that_are_not_listed_are_refused() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let secret = home.data_dir().join("jwt.key");
    let pod = home.start().await?;
    fill(&pod, "alice", 0).await?;
    let key = std::fs::read_to_string(&secret)?;
    let secret = secret.display();
    #[rustfmt::skip]
    let refused_forms: Vec<(String, u16, &str)> = [
        ("CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '{f}'", 400, ""),
        ("CREATE TABLE app.x (a INT)", 400, "UNSUPPORTED_STATEMENT"), ("CREATE TABLE app.x AS SELECT 1", 400, ""),
        ("CREATE VIEW app.v AS SELECT 1", 400, "UNSUPPORTED_STATEMENT"), ("CREATE SCHEMA s", 400, "UNSUPPORTED_STATEMENT"),
        ("CREATE DATABASE d", 400, "UNSUPPORTED_STATEMENT"), ("CREATE FUNCTION f() RETURNS INT RETURN 1", 400, ""),
        ("COPY app.orders TO '/tmp/x.csv'", 400, ""), ("COPY (SELECT 1) TO '/tmp/x.csv'", 400, ""),
        ("COPY app.orders FROM '{f}'", 400, ""), ("SET datafusion.execution.batch_size = 1", 400, ""),
        ("SET TIME ZONE 'UTC'", 400, ""), ("SHOW ALL", 400, ""), ("SHOW TABLES", 400, ""), ("USE app", 400, ""),
        ("PREPARE p AS SELECT 1", 400, ""), ("EXECUTE p", 400, ""), ("DEALLOCATE p", 400, ""), ("BEGIN", 400, ""), ("COMMIT", 400, ""),
        ("DROP TABLE app.orders", 400, "UNSUPPORTED_STATEMENT"), ("ALTER TABLE app.orders ADD COLUMN x INT", 400, ""),
        ("UPDATE app.orders SET qty = 1 FROM app.customers", 400, "UNSUPPORTED_STATEMENT"),
        ("DELETE FROM app.orders USING app.customers", 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE app.orders SET _seq = 1", 400, "READ_ONLY_COLUMN"), ("UPDATE app.orders SET nope = 1", 400, "COLUMN_NOT_FOUND"),
        ("UPDATE '{f}' SET a = 1", 400, ""), ("DELETE FROM read_csv('{f}')", 400, ""), ("DELETE FROM app.nope", 404, "TABLE_NOT_FOUND"),
        ("UPDATE app.orders SET qty = 1 WHERE id IN (SELECT * FROM read_csv('{f}'))", 400, "UNSUPPORTED_FUNCTION"),
        ("INSERT INTO app.customers SELECT * FROM read_csv('{f}')", 400, "UNSUPPORTED_FUNCTION"),
        ("INSERT INTO app.customers VALUES ('zoe', 'x') ON CONFLICT (nope) DO NOTHING", 400, "INVALID_SQL"),
        ("INSERT INTO app.customers VALUES ('zoe', 'x') RETURNING _seq + 1", 400, "UNSUPPORTED_STATEMENT"),
        ("INSERT INTO app.customers VALUES ('zoe', 'x') RETURNING 1/0", 400, "DIVISION_BY_ZERO"),
        ("INSERT INTO app.customers SELECT 'zoe'", 400, "INVALID_SQL"),
        ("DELETE FROM app.orders TABLESAMPLE BERNOULLI (1)", 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE app.orders TABLESAMPLE (1 PERCENT) SET qty = 0", 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE app.orders SET other.qty = 0", 400, "UNSUPPORTED_STATEMENT"),
        ("UPDATE app.orders SET qty = unnest(make_array(1, 2))", 400, "UNSUPPORTED_STATEMENT"),
        ("DELETE FROM app.orders RETURNING unnest(make_array(1, 2))", 400, "UNSUPPORTED_STATEMENT"),
        ("INSERT INTO app.customers VALUES ('zoe', 'x') ON CONFLICT (name) DO UPDATE SET nope = 1", 400, ""),
        ("INSERT INTO app.customers VALUES (map(1, map(1, map(1, map(1, map(1, map(1, map(1, map(1, map(1, 2))))))))), 'x')", 400, ""),
        ("TRUNCATE app.orders", 400, ""), ("MERGE INTO app.orders USING app.orders s ON true WHEN MATCHED THEN DELETE", 400, ""),
        ("WITH x AS (DELETE FROM app.orders RETURNING *) SELECT * FROM x", 400, ""),
        ("WITH x AS (INSERT INTO app.customers VALUES ('zoe', 'x') RETURNING *) SELECT * FROM x", 400, ""),
        ("SELECT * INTO app.x FROM app.orders", 400, "UNSUPPORTED_STATEMENT"), ("SELECT * FROM app.orders FOR UPDATE", 400, ""),
        ("EXPLAIN INSERT INTO app.customers VALUES ('zoe', 'x')", 400, ""), ("EXPLAIN ANALYZE DELETE FROM app.orders", 400, ""),
        ("INSERT INTO app.customers TABLE app.customers", 400, ""), ("INSERT INTO app.customers DEFAULT VALUES", 400, ""),
        ("INSERT OVERWRITE app.customers VALUES ('zoe', 'x')", 400, ""), ("REPLACE INTO app.customers VALUES ('zoe', 'x')", 400, ""),
        ("INSERT INTO FUNCTION file('{f}') VALUES (1)", 400, ""), ("TABLE app.orders", 400, ""),
        ("ATTACH DATABASE '{f}' AS y", 400, ""), ("LOAD DATA INPATH '{f}' INTO TABLE y", 400, ""), ("VACUUM", 400, ""),
        ("DECLARE c CURSOR FOR SELECT 1", 400, ""), ("KILL 1", 400, ""), ("GRANT ALL ON app.orders TO bob", 400, ""),
        ("SELECT * FROM '{f}'", 404, "TABLE_NOT_FOUND"), ("SELECT * FROM \"{f}\"", 404, "TABLE_NOT_FOUND"),
        ("SELECT * FROM \"file://{f}\"", 404, "TABLE_NOT_FOUND"), ("SELECT * FROM \"x.parquet\"", 404, "TABLE_NOT_FOUND"),
        ("SELECT * FROM 's3://bucket/x.parquet'", 404, "TABLE_NOT_FOUND"), ("SELECT * FROM \"kalam://local.0/users\"", 404, "TABLE_NOT_FOUND"),
        ("SELECT * FROM read_csv('{f}')", 400, "UNSUPPORTED_FUNCTION"), ("SELECT * FROM read_parquet('{f}')", 400, "UNSUPPORTED_FUNCTION"),
        ("SELECT * FROM parquet_metadata('{f}')", 400, "UNSUPPORTED_FUNCTION"), ("SELECT * FROM metadata_cache()", 400, "UNSUPPORTED_FUNCTION"),
        ("SELECT 1 WHERE EXISTS (SELECT * FROM glob('/*'))", 400, "UNSUPPORTED_FUNCTION"),
        ("SELECT * FROM app.orders TABLESAMPLE (10 PERCENT)", 400, ""), ("SELECT * FROM app.orders FOR SYSTEM_TIME AS OF 1", 400, ""),
        ("SELECT read_file('{f}')", 400, ""), ("SELECT pg_read_file('{f}')", 400, ""), ("SELECT * FROM pg_catalog.pg_tables", 404, ""),
        ("SELECT * FROM information_schema.df_settings", 404, ""), ("SELECT @@version", 400, ""),
        ("SELECT 1; SELECT 2", 400, "MULTIPLE_STATEMENTS"), ("SELECT 1; DROP TABLE app.orders", 400, "MULTIPLE_STATEMENTS"),
        ("INSERT INTO app.customers VALUES ('zoe', 'x'); SELECT 1", 400, "MULTIPLE_STATEMENTS"),
        ("", 400, "EMPTY_STATEMENT"), (" ; ", 400, "EMPTY_STATEMENT"), ("-- nothing", 400, "EMPTY_STATEMENT"), ("SELECT", 400, ""),
        ("SELEC 1", 400, "SYNTAX_ERROR"), ("SELECT * FROM app.orders WHERE (", 400, "SYNTAX_ERROR"), ("SELECT 'a", 400, "SYNTAX_ERROR"),
        ("STORAGE FLUSH TABLE app.orders; SELECT 1", 400, "SYNTAX_ERROR"), ("STORAGE FLUSH ALL", 400, "SYNTAX_ERROR"),
    ].iter().map(|(sql, status, code)| (sql.replace("{f}", &secret.to_string()), *status, *code)).collect();
    for (sql, status, code) in refused_forms {
        let answer = pod.sql("alice", &sql, json!([])).await?;
        let code = if code.is_empty() { answer.code().to_owned() } else { code.to_owned() };
        refusal(&sql, &answer, status, &code)?;
        ensure!(!answer.text.contains(&key) && code != "INTERNAL", "{sql}: {}", answer.text);
    }
    returns(&pod, "alice", "SELECT count(*) FROM app.orders", json!([["150"]])).await?;
    returns(&pod, "alice", "SELECT count(*) FROM app.customers", json!([["3"]])).await?;
    ensure!(!std::path::Path::new("/tmp/x.csv").exists());
    Ok(())
}

#[tokio::test]
async fn explain_tells_the_plan_and_analyze_what_it_did() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    fill(&pod, "alice", 0).await?;
    flush(&pod, "alice").await?;
    fill(&pod, "alice", 1).await?;
    for (sql, says) in [
        ("EXPLAIN SELECT id FROM app.orders WHERE id = $1", "TableScan: app.orders"),
        ("EXPLAIN VERBOSE SELECT id FROM app.orders WHERE id = $1", "UnionExec"),
        ("EXPLAIN ANALYZE SELECT id FROM app.orders WHERE id = $1", "output_rows="),
        ("EXPLAIN ANALYZE VERBOSE SELECT id FROM app.orders WHERE id = $1", "output_rows="),
    ] {
        let text = rows(&pod, "alice", sql, json!([7])).await?.to_string();
        ensure!(text.contains(says), "{sql}: {text}");
    }
    // What cannot be planned is an error, and no row that says so.
    for sql in [
        "SELECT CAST('x' AS INT)",
        "SELECT ntile(0) OVER () FROM app.orders",
        "SELECT (SELECT b.id FROM app.orders b WHERE b.id > a.id) FROM app.orders a",
    ] {
        for explain in ["", "EXPLAIN ", "EXPLAIN VERBOSE ", "EXPLAIN ANALYZE "] {
            let answer = pod.sql("alice", &format!("{explain}{sql}"), json!([])).await?;
            refusal(&format!("{explain}{sql}"), &answer, 400, answer.code())?;
        }
    }
    Ok(())
}

#[tokio::test]
async fn rows_become_a_file_by_count_by_age_and_on_request() -> anyhow::Result<()> {
    let columns = ["id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()", "body, type: TEXT"];
    let home = Home::new(
        BINARY,
        &declare(&[
            table("UserTable", "by_rows", &columns, &["flushPolicy: {rows: 50}"]),
            table("UserTable", "by_age", &columns, &["flushPolicy: {interval: 1s}"]),
            table("UserTable", "on_request", &columns, &[]),
        ]),
    )?;
    let pod = home.start().await?;
    let files = |user: &str, table: &str| {
        data_files_below(&home.data_dir().join("files/users").join(user).join("app").join(table))
    };
    let insert = async |user: &str, table: &str, count: usize| {
        pod.run(user, &format!("INSERT INTO app.{table} (body) VALUES {}", vec!["('x')"; count].join(",")), json!([]))
            .await
    };
    insert("alice", "by_rows", 49).await?;
    insert("bob", "by_rows", 49).await?;
    insert("alice", "by_age", 1).await?;
    let written = std::time::Instant::now();
    eventually("a row is a file by its age", async || Ok(files("alice", "by_age")?.len() == 1)).await?;
    let age = written.elapsed();
    ensure!(age.as_millis() > 900 && age.as_millis() < 4_000, "flushed after {age:?}");
    ensure!(files("alice", "by_rows")?.is_empty(), "49 rows were flushed, and 50 are needed");
    insert("alice", "by_rows", 1).await?;
    eventually("50 rows are a file", async || Ok(files("alice", "by_rows")?.len() == 1)).await?;
    ensure!(files("bob", "by_rows")?.is_empty(), "another user's count was taken for his");

    insert("alice", "on_request", 3).await?;
    insert("bob", "on_request", 4).await?;
    ensure!(pod.run("alice", "STORAGE FLUSH TABLE app.on_request", json!([])).await? == 3);
    ensure!(
        pod.run("alice", "storage flush table app.on_request;", json!([])).await? == 0,
        "nothing was left to flush"
    );
    ensure!(
        files("alice", "on_request")?.len() == 1 && files("bob", "on_request")?.is_empty(),
        "a user flushes his own rows"
    );
    insert("alice", "on_request", 2).await?;
    let all = pod.sql_as("root", "dba", "STORAGE FLUSH TABLE app.on_request", json!([])).await?;
    ensure!(all.body["results"][0]["row_count"] == 6, "a dba flushes everybody's: {}", all.text);
    ensure!(files("alice", "on_request")?.len() == 2 && files("bob", "on_request")?.len() == 1);
    for (user, table, count) in
        [("alice", "by_rows", "50"), ("alice", "by_age", "1"), ("alice", "on_request", "5"), ("bob", "on_request", "4")]
    {
        returns(&pod, user, &format!("SELECT count(*) FROM app.{table}"), json!([[count]])).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_shared_table_is_one_for_all_who_may() -> anyhow::Result<()> {
    let columns = ["id, type: BIGINT, primaryKey: true", "body, type: TEXT"];
    let home = Home::new(
        BINARY,
        &declare(&[
            table("SharedTable", "open", &columns, &["access: Public"]),
            table("SharedTable", "closed", &columns, &["access: Restricted"]),
            table("SharedTable", "unsaid", &columns, &[]),
        ]),
    )?;
    let pod = home.start().await?;
    for table in ["open", "closed", "unsaid"] {
        let insert = |id: u32| format!("INSERT INTO app.{table} VALUES ({id}, 'shared')");
        refusal(table, &pod.sql("alice", &insert(1), json!([])).await?, 403, "PERMISSION_DENIED")?;
        for (id, role) in [(1, "service"), (2, "dba"), (3, "system")] {
            ensure!(pod.sql_as("root", role, &insert(id), json!([])).await?.status == 200);
        }
        refusal(table, &pod.sql_as("other", "service", &insert(2), json!([])).await?, 409, "DUPLICATE_KEY")?;
    }
    for flushed in [false, true] {
        returns(&pod, "alice", "SELECT * FROM app.open WHERE id = 1", json!([["1", "shared"]])).await?;
        returns(&pod, "bob", "SELECT count(*) FROM app.open", json!([["3"]])).await?;
        for table in ["closed", "unsaid"] {
            for sql in [
                format!("SELECT * FROM app.{table}"),
                format!("SELECT count(*) FROM app.open WHERE id IN (SELECT id FROM app.{table})"),
                format!("EXPLAIN SELECT * FROM app.{table}"),
                format!("EXPLAIN ANALYZE SELECT * FROM app.{table}"),
                format!("INSERT INTO app.{table} VALUES (1, 'mine')"),
            ] {
                let message = refused(&pod, &sql, json!([]), 403, "PERMISSION_DENIED").await?;
                ensure!(message.contains("service"), "{message}");
            }
            let sql = format!("SELECT count(*) FROM app.{table}");
            ensure!(pod.sql_as("root", "service", &sql, json!([])).await?.rows()? == [json!(["3"])]);
        }
        returns(&pod, "alice", "SELECT table_name FROM information_schema.tables", json!([["open"]])).await?;
        if !flushed {
            for table in ["open", "closed", "unsaid"] {
                let sql = format!("STORAGE FLUSH TABLE app.{table}");
                ensure!(pod.sql("alice", &sql, json!([])).await?.body["results"][0]["row_count"] == 0);
                let answer = pod.sql_as("root", "dba", &sql, json!([])).await?;
                ensure!(answer.body["results"][0]["row_count"] == 3, "{}", answer.text);
            }
        }
    }
    ensure!(data_files_below(&home.data_dir().join("files/shared/app"))?.len() == 3);
    Ok(())
}

#[tokio::test]
async fn a_column_that_came_later_reads_right_from_old_rows() -> anyhow::Result<()> {
    let old = ["id, type: BIGINT, primaryKey: true", "body, type: TEXT"];
    let new = [
        old[0],
        old[1],
        "state, type: TEXT, default: \"'new'\"",
        "count, type: INT, nullable: false, default: \"7\"",
        "note, type: TEXT",
        "price, type: \"DECIMAL(10,2)\", default: \"1.5\"",
        "tags, type: ARRAY<INT>, default: \"[1,null]\"",
        "at, type: TIMESTAMP, default: NOW()",
    ];
    let home = Home::new(BINARY, &declare(&[user_table("t", &old)]))?;
    let mut pod = home.start().await?;
    for user in ["hot", "half", "cold"] {
        pod.run(user, "INSERT INTO app.t VALUES (1, 'in a file'), (2, 'too')", json!([])).await?;
        if user != "hot" {
            pod.run(user, "STORAGE FLUSH TABLE app.t", json!([])).await?;
        }
        pod.run(user, "INSERT INTO app.t VALUES (3, 'buffered')", json!([])).await?;
    }
    home.write_manifest("all.yaml", &declare(&[user_table("t", &new)]))?;
    eventually("the new column is there", async || {
        Ok(pod.sql("hot", "SELECT count FROM app.t", json!([])).await?.status == 200)
    })
    .await?;
    for user in ["hot", "half", "cold"] {
        pod.run(user, "INSERT INTO app.t (id, body, state, count, note) VALUES (4, 'young', 'old', 8, 'n'), (5, 'x', NULL, 7, NULL)", json!([]))
            .await?;
        if user == "cold" {
            pod.run(user, "STORAGE FLUSH TABLE app.t", json!([])).await?;
        }
    }
    for round in ["at once", "after a restart"] {
        for user in ["hot", "half", "cold"] {
            let old_row = |id: &str, body: &str| json!([id, body, "new", 7, null, "1.50", [1, null], null]);
            let expected = json!([old_row("1", "in a file"), old_row("2", "too"), old_row("3", "buffered")]);
            returns(&pod, user, "SELECT * FROM app.t WHERE id < 4 ORDER BY id", expected).await.context(user)?;
            for (condition, ids) in [
                ("state = 'new'", "1,2,3"),
                ("state <> 'new'", "4"),
                ("state IS NULL", "5"),
                ("state IS NOT NULL", "1,2,3,4"),
                ("count = 7", "1,2,3,5"),
                ("count > 7", "4"),
                ("count + 1 = 8 AND body <> 'x'", "1,2,3"),
                ("note IS NULL", "1,2,3,5"),
                ("note = 'n'", "4"),
                ("note <> 'n'", ""),
                ("price = 1.5", "1,2,3,4,5"),
                ("price > 1.5", ""),
                ("state = 'new' OR count = 8", "1,2,3,4"),
                ("NOT (state = 'new')", "4"),
                ("coalesce(note, state) = 'new'", "1,2,3"),
                ("state LIKE 'n%' AND id > 1", "2,3"),
                ("tags[1] = 1", "1,2,3,4,5"),
            ] {
                let sql = format!(
                    "SELECT coalesce(string_agg(CAST(id AS TEXT), ',' ORDER BY id), '') FROM app.t WHERE {condition}"
                );
                returns(&pod, user, &sql, json!([[ids]])).await.with_context(|| format!("{round}, {user}"))?;
            }
            returns(
                &pod,
                user,
                "SELECT state, count(*) FROM app.t GROUP BY state ORDER BY state",
                json!([["new", "3"], ["old", "1"], [null, "1"]]),
            )
            .await?;
            returns(&pod, user, "SELECT id FROM app.t ORDER BY count DESC, id LIMIT 2", json!([["4"], ["1"]])).await?;
            returns(
                &pod,
                user,
                "SELECT a.id FROM app.t a JOIN app.t b ON a.count = b.count WHERE b.id = 4",
                json!([["4"]]),
            )
            .await?;
            returns(&pod, user, "SELECT min(count), max(count), sum(price) FROM app.t", json!([[7, 8, "7.50"]]))
                .await?;
        }
        ensure!(pod.stop().await?.success());
        pod = home.start().await?;
    }
    Ok(())
}

#[tokio::test]
async fn an_empty_table_answers_like_any_other() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &shop())?;
    let pod = home.start().await?;
    let answer = pod.sql("alice", "SELECT * FROM app.customers", json!([])).await?;
    ensure!(answer.results().contains(r#""rows":[],"row_count":0"#), "{}", answer.text);
    ensure!(answer.body["results"][0]["schema"].as_array().is_some_and(|schema| schema.len() == 2), "{}", answer.text);
    returns(&pod, "alice", "SELECT count(*), sum(qty), max(price) FROM app.orders", json!([["0", null, null]])).await?;
    returns(&pod, "alice", "SELECT * FROM app.orders ORDER BY id LIMIT 5", json!([])).await?;
    ensure!(pod.run("alice", FLUSH_ORDERS, json!([])).await? == 0);
    ensure!(data_files_below(&home.data_dir().join("files/users"))?.is_empty());
    Ok(())
}
