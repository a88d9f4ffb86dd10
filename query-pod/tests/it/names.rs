//! What names mean: what a system column does to the rest of a statement, names of WITH, and names that are too long.

use anyhow::ensure;
use kalamdb_test_support::pod::{Answer, Home, Pod};
use serde_json::{Value, json};

use super::{BINARY, declare, refusal, user_table};

fn people() -> String {
    declare(&[
        user_table("customers", &["name, type: TEXT, primaryKey: true", "city, type: TEXT"]),
        user_table("people", &["name, type: TEXT, primaryKey: true", "age, type: INT"]),
    ])
}

async fn start(home: &Home) -> anyhow::Result<Pod> {
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.customers VALUES ('ann', 'Bern'), ('bob', 'Bonn')", json!([])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.customers", json!([])).await?;
    pod.run("alice", "INSERT INTO app.people VALUES ('ann', 30), ('bob', 40), ('eve', 50)", json!([])).await?;
    Ok(pod)
}

async fn send(pod: &Pod, sql: &str, namespace: &str) -> anyhow::Result<Answer> {
    let authorization = format!("Bearer {}", pod.token("alice", "user")?);
    pod.send(Some(&authorization), json!({"sql": sql, "namespace_id": namespace}).to_string()).await
}

/// The condition that holds for every row, without a system column and with one.
const EVERY_ROW: [&str; 2] = ["c.name IS NOT NULL", "c._seq > 0"];

#[tokio::test]
async fn naming_a_system_column_changes_nothing_else_of_an_answer() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &people())?;
    let pod = start(&home).await?;
    #[rustfmt::skip]
    let same = [
        "SELECT * FROM customers c WHERE {} ORDER BY name",
        "SELECT x.* FROM customers x, customers c WHERE {} AND x.name = c.name ORDER BY 1",
        r#"SELECT "C".*, c.city FROM people "C", customers c WHERE {} AND "C".name = c.name ORDER BY 1"#,
        "SELECT app.people.*, c.city FROM app.people, customers c WHERE {} AND app.people.name = c.name ORDER BY 1",
        "SELECT * FROM (customers c CROSS JOIN people p) WHERE {} ORDER BY 1, 3",
        "SELECT * FROM customers c LEFT JOIN people p ON p.name = c.name WHERE {} ORDER BY 1",
        "SELECT c.city, p.age FROM customers c JOIN people p USING (name) WHERE {} ORDER BY 1",
        "SELECT DISTINCT * FROM customers c WHERE {} ORDER BY 1", "(SELECT * FROM customers c WHERE {}) ORDER BY 1 LIMIT 1",
        "SELECT count(*), count(DISTINCT name) FROM (SELECT * FROM customers c WHERE {}) x",
        // Columns that an alias names.
        "SELECT * FROM customers AS c(name, town) WHERE {} ORDER BY 1", "SELECT town FROM customers AS c(name, town) WHERE {} ORDER BY 1",
        r#"SELECT x.* FROM people AS x("N", a), customers c WHERE {} AND x."N" = c.name ORDER BY 1"#,
        "SELECT * FROM (SELECT * FROM customers c WHERE {}) AS x(a, b) ORDER BY 1",
        "WITH x(a, b) AS (SELECT * FROM customers c WHERE {}) SELECT b, a FROM x ORDER BY 1",
        // Subqueries and sets.
        "SELECT * FROM customers c WHERE {} AND EXISTS (SELECT * FROM people p WHERE p.name = c.name) ORDER BY 1",
        "SELECT * FROM customers c WHERE {} AND c.name IN (SELECT name FROM (SELECT * FROM people) p) ORDER BY 1",
        "SELECT * FROM customers c WHERE {} AND c.name = (SELECT max(x.name) FROM (SELECT * FROM customers) x)",
        "SELECT * FROM customers c, LATERAL (SELECT * FROM people p WHERE p.name = c.name) l WHERE {} ORDER BY 1",
        "SELECT * FROM customers c WHERE {} UNION SELECT * FROM customers ORDER BY 1", "SELECT * FROM customers INTERSECT SELECT * FROM customers c WHERE {} ORDER BY 1",
        "SELECT * FROM customers EXCEPT SELECT * FROM customers c WHERE {}", "SELECT * FROM customers c WHERE {} UNION ALL VALUES ('a', 'b') ORDER BY 1",
        "SELECT table_name, column_name FROM information_schema.columns, customers c WHERE {} ORDER BY 1, 2",
        "SELECT t.*, c.* FROM information_schema.tables t, customers c WHERE {} ORDER BY 3, 6",
        "SELECT g.*, c.* FROM generate_series(1, 2) g, customers c WHERE {} ORDER BY 1, 2",
        "SELECT * FROM customers c WHERE {} UNION BY NAME SELECT * FROM people ORDER BY 1, 2, 3", "SELECT city, count(*) FROM customers c WHERE {} GROUP BY ALL ORDER BY 1",
        "SELECT * FROM customers c WHERE {} QUALIFY row_number() OVER (ORDER BY name) = 1",
        // WITH names that are names of tables.
        "WITH customers AS (SELECT * FROM customers c WHERE {}) SELECT * FROM customers ORDER BY 1",
        "WITH x AS (SELECT * FROM customers), customers AS (SELECT 1 AS one) SELECT x.*, customers.* FROM x, customers, people c WHERE {} ORDER BY 1",
        r#"WITH "CUSTOMERS" AS (SELECT 1 AS one) SELECT * FROM customers c WHERE {} ORDER BY 1"#,
        r#"WITH "CUSTOMERS" AS (SELECT 1 AS one) SELECT * FROM "CUSTOMERS" x, customers c WHERE {} ORDER BY 2"#,
        "WITH Customers AS (SELECT 1 AS one) SELECT * FROM customers x, people c WHERE {} ORDER BY 2",
        "WITH customers AS (SELECT 1 AS one) SELECT * FROM app.customers c, customers x WHERE {} ORDER BY 1",
        "SELECT * FROM (WITH customers AS (SELECT 1 AS one) SELECT * FROM customers) x, customers c WHERE {} ORDER BY 2",
        "WITH a AS (WITH customers AS (SELECT 1 AS one) SELECT * FROM customers) SELECT * FROM a, customers c WHERE {} ORDER BY 2",
        "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r WHERE n < 3) SELECT r.*, c.* FROM r, customers c WHERE {} ORDER BY 1, 2",
    ];
    for sql in same {
        let [without, with] = EVERY_ROW.map(|condition| sql.replace("{}", condition));
        let (without, with) = (send(&pod, &without, "app").await?, send(&pod, &with, "app").await?);
        ensure!(
            without.status == 200 && !without.rows()?.is_empty() || sql.contains("EXCEPT"),
            "{sql}\n{}",
            without.text
        );
        ensure!(with.status == 200 && with.results() == without.results(), "{sql}\n{}\n{}", without.text, with.text);
    }
    Ok(())
}

#[tokio::test]
async fn what_a_system_column_would_change_is_refused() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &people())?;
    let pod = start(&home).await?;
    #[rustfmt::skip]
    let refused = [
        ("SELECT c.city FROM customers c NATURAL JOIN people WHERE {}", "NATURAL JOIN"),
        ("SELECT count(*) FROM (customers c NATURAL LEFT JOIN people) WHERE {}", "NATURAL JOIN"),
        ("SELECT c.city FROM customers c WHERE {} AND EXISTS (SELECT 1 FROM people NATURAL JOIN customers)", "NATURAL JOIN"),
        ("WITH x AS (SELECT age FROM people NATURAL FULL JOIN customers) SELECT c.city FROM customers c, x WHERE {}", "NATURAL JOIN"),
        ("EXPLAIN SELECT c.city FROM customers c NATURAL JOIN people WHERE {}", "NATURAL JOIN"),
        ("SELECT * FROM customers c JOIN people p USING (name) WHERE {}", "USING"),
        ("SELECT * FROM customers c LEFT SEMI JOIN people p ON p.name = c.name WHERE {}", "SEMI"),
        ("SELECT j.city, c.name FROM (customers CROSS JOIN (SELECT 1 AS one) y) AS j, customers c WHERE {}", "an alias for a whole join"),
        ("SELECT j.* FROM (customers CROSS JOIN (SELECT 1 AS one) y) AS j, customers c WHERE {}", "an alias for a whole join"),
        ("SELECT * FROM (SELECT 1 AS one), customers c WHERE {}", "without a name"),
        ("WITH RECURSIVE customers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM customers WHERE n < 3) SELECT n FROM customers, app.customers c WHERE {}",
            "WITH RECURSIVE with the name of a table, `customers`,"),
    ];
    for (sql, says) in refused {
        let [without, with] = EVERY_ROW.map(|condition| sql.replace("{}", condition));
        let without = send(&pod, &without, "app").await?;
        ensure!(without.status == 200, "{sql}\n{}", without.text);
        let message = refusal(&with, &send(&pod, &with, "app").await?, 400, "UNSUPPORTED")?;
        ensure!(message.contains(says) && message.contains("system column"), "{sql}: {message}");
    }
    // Wrong with and without.
    for sql in [
        "SELECT * FROM customers AS c(a) WHERE {}",
        "SELECT * FROM customers AS c(name, b, d, e, f) WHERE {}",
        "SELECT x.* FROM customers c WHERE {}",
        "SELECT customers.* FROM customers c WHERE {}",
        "SELECT customers.*, c.city FROM app.customers, customers c WHERE {}",
        r#"SELECT "C".* FROM customers c WHERE {}"#,
        "SELECT city FROM people c WHERE {}",
    ] {
        for condition in EVERY_ROW {
            let sql = sql.replace("{}", condition);
            refusal(&sql, &send(&pod, &sql, "app").await?, 400, "INVALID_SQL")?;
        }
    }
    let joined = send(&pod, "SELECT count(*) FROM customers a JOIN customers b USING (name, _seq)", "app").await?;
    ensure!(joined.rows()? == [json!(["2"])], "{}", joined.text);
    Ok(())
}

#[tokio::test]
async fn a_name_of_any_length_is_answered_shortly() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &people())?;
    let pod = start(&home).await?;
    let long = "x".repeat(900_000);
    for sql in [
        "SELECT * FROM {}",
        "SELECT * FROM '{}'",
        "SELECT {} FROM customers",
        "SELECT {}(1)",
        "SELECT * FROM customers WHERE name = $n{}",
        "INSERT INTO {} VALUES (1)",
        "INSERT INTO customers ({}) VALUES (1)",
        "STORAGE FLUSH TABLE '{}'",
    ] {
        refusal(sql, &send(&pod, &sql.replace("{}", &long), "app").await?, 400, "NAME_TOO_LONG")?;
    }
    for sql in ["SELECT * FROM customers", "STORAGE FLUSH TABLE customers"] {
        refusal(sql, &send(&pod, sql, &long).await?, 400, "NAME_TOO_LONG")?;
    }
    let number = "9".repeat(900_000);
    for sql in [
        "INSERT INTO customers VALUES ({}, 'x')",
        "INSERT INTO people VALUES ('x', {})",
        "INSERT INTO people VALUES ('x', CAST('{}' AS INT))",
        "SELECT CAST('{}' AS INT)",
    ] {
        let answer = send(&pod, &sql.replace("{}", &number), "app").await?;
        refusal(sql, &answer, 400, answer.code())?;
    }
    let unknown = send(&pod, &format!("SELECT * FROM {}", "é".repeat(128)), "app").await?;
    refusal("128 characters", &unknown, 404, "TABLE_NOT_FOUND")?;
    Ok(())
}

#[tokio::test]
async fn a_star_that_would_not_count_rows_is_refused() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &people())?;
    let pod = start(&home).await?;
    for sql in [
        "SELECT count(DISTINCT *) FROM people",
        "SELECT count(c.*) FROM people p LEFT JOIN customers c ON c.name = p.name",
    ] {
        refusal(sql, &send(&pod, sql, "app").await?, 400, "UNSUPPORTED_STATEMENT")?;
    }
    let answer: Vec<Value> = send(&pod, "SELECT count(*) FROM people", "app").await?.rows()?;
    ensure!(answer == [json!(["3"])], "{answer:?}");
    Ok(())
}
