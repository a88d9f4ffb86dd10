//! Plans that were made before serve everybody who may see the same, and nobody else.

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod, eventually};
use serde_json::{Value, json};

use super::{BINARY, declare, refusal, refused, returns, rows, table, user_table};

const COLUMNS: [&str; 2] = ["id, type: BIGINT, primaryKey: true", "v, type: TEXT"];

fn closed() -> String {
    table("SharedTable", "closed", &COLUMNS, &["access: Restricted"])
}

async fn reused(pod: &Pod) -> anyhow::Result<u64> {
    let (_, text) = pod.get("/metrics").await?;
    let value = text.lines().find_map(|line| line.strip_prefix("kalamdb_plans_reused_total "));
    Ok(value.context("no such metric")?.parse()?)
}

/// Runs a statement that has no plan yet, and then once more each as `again`; returns all rows.
async fn by(pod: &Pod, sql: &str, users: &[&str]) -> anyhow::Result<Vec<Value>> {
    let before = reused(pod).await?;
    let mut answers = Vec::new();
    for user in users {
        answers.push(rows(pod, user, sql, json!([])).await?);
    }
    let used = reused(pod).await? - before;
    ensure!(used + 1 == users.len() as u64, "{sql}: {used} plans were used again");
    Ok(answers)
}

#[tokio::test]
async fn a_plan_that_serves_many_users_shows_each_his_own_rows_and_name() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let pod = home.start().await?;
    for user in ["alice", "bob"] {
        pod.run(user, "INSERT INTO app.t VALUES (1, $1), (2, 'x')", json!([user])).await?;
    }
    for sql in [
        "SELECT CURRENT_USER(), v FROM app.t WHERE v = CURRENT_USER()",
        "SELECT upper(lower(CURRENT_USER)), v FROM app.t WHERE v IN (SELECT v FROM app.t WHERE v = CURRENT_USER())",
        "SELECT coalesce(CURRENT_USER(), 'x'), min(v) FROM app.t WHERE v <> 'x' GROUP BY CURRENT_USER()",
        "WITH me AS (SELECT CURRENT_USER() AS name) SELECT name, v FROM me JOIN app.t ON v = name",
        "SELECT CURRENT_USER(), (SELECT max(v) FROM app.t WHERE v LIKE CURRENT_USER() || '%')",
    ] {
        let answers = by(&pod, sql, &["alice", "bob", "alice", "carol"]).await.context(sql)?;
        let shown: Vec<String> = answers[..3].iter().map(|rows| rows[0].to_string().to_lowercase()).collect();
        ensure!(shown == [r#"["alice","alice"]"#, r#"["bob","bob"]"#, r#"["alice","alice"]"#], "{sql}: {shown:?}");
        ensure!(!answers[3].to_string().contains("alice"), "{sql}: {}", answers[3]);
    }
    // What writes uses plans, too, and each time of all is the statement's own.
    for user in ["alice", "bob"] {
        let sql = "UPDATE app.t SET v = v || '!' WHERE v = CURRENT_USER()";
        ensure!(pod.run(user, sql, json!([])).await? == 1);
        returns(&pod, user, "SELECT v FROM app.t WHERE id = 1", json!([[format!("{user}!")]])).await?;
    }
    let times =
        by(&pod, "SELECT NOW(), CURRENT_TIMESTAMP FROM app.t WHERE NOW() > '2020-01-01' LIMIT 1", &["alice"; 3])
            .await?;
    let times: Vec<i64> = times.iter().filter_map(|rows| rows[0][0].as_i64()).collect();
    ensure!(times.len() == 3 && times.is_sorted_by(|a, b| a < b), "{times:?}");
    Ok(())
}

#[tokio::test]
async fn a_plan_takes_parameters_of_any_type_each_time() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'one'), (2, 'two')", json!([])).await?;
    for (sql, params, expected) in [
        ("SELECT $1", json!([1]), json!([["1"]])),
        ("SELECT $1", json!(["x"]), json!([["x"]])),
        ("SELECT $1", json!([true]), json!([[true]])),
        ("SELECT v FROM app.t WHERE id + 0 = $1", json!([1]), json!([["one"]])),
        ("SELECT v FROM app.t WHERE id + 0 = $1", json!(["2"]), json!([["two"]])),
        ("SELECT v FROM app.t ORDER BY id LIMIT $1", json!([1]), json!([["one"]])),
        ("SELECT v FROM app.t ORDER BY id LIMIT $1", json!([2]), json!([["one"], ["two"]])),
    ] {
        let found = rows(&pod, "alice", sql, params.clone()).await?;
        ensure!(found == expected, "{sql} {params}: {found}");
    }
    let sql = "SELECT v FROM app.t WHERE id + 0 = $1";
    for (params, says) in [(json!(["x"]), "$1: "), (json!([]), "0 parameter(s)"), (json!([1, 2]), "$2 was sent")] {
        let message = refused(&pod, sql, params, 400, "INVALID_PARAMETER").await?;
        ensure!(message.contains(says), "{message}");
    }
    Ok(())
}

#[tokio::test]
async fn a_plan_ends_with_its_catalog_and_serves_no_one_who_may_not_see() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS), user_table("u", &COLUMNS), closed()]))?;
    let pod = home.start().await?;
    let sql = "SELECT * FROM app.closed ORDER BY id";
    for _ in 0..2 {
        pod.sql_as("root", "service", sql, json!([])).await?.rows()?;
        refused(&pod, sql, json!([]), 403, "PERMISSION_DENIED").await?;
        refused(&pod, &format!("EXPLAIN {sql}"), json!([]), 403, "PERMISSION_DENIED").await?;
    }
    // What is not a table of the catalog is looked at each time.
    let names = "SELECT table_name FROM information_schema.tables ORDER BY 1";
    let series = "SELECT * FROM generate_series(1, CAST(length(CURRENT_USER()) AS BIGINT))";
    let before = reused(&pod).await?;
    for _ in 0..2 {
        let all = pod.sql_as("root", "service", names, json!([])).await?.rows()?;
        ensure!(json!(all) == json!([["closed"], ["t"], ["u"]]), "{all:?}");
        returns(&pod, "alice", names, json!([["t"], ["u"]])).await?;
        ensure!(pod.rows("alice", series).await?.len() == 5 && pod.rows("bob", series).await?.len() == 3);
    }
    ensure!(reused(&pod).await? == before);

    let all = "SELECT * FROM app.t WHERE TRUE";
    let answer = by(&pod, all, &["alice", "alice"]).await?;
    ensure!(answer == [json!([]), json!([])]);
    by(&pod, "SELECT * FROM app.u WHERE TRUE", &["alice", "bob"]).await?;
    // The column is added, and the other table dropped, in one version of the catalog.
    let more = user_table("t", &[COLUMNS[0], COLUMNS[1], "w, type: INT, default: \"7\""]);
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'x')", json!([])).await?;
    home.write_manifest("all.yaml", &declare(&[more, closed()]))?;
    eventually("the table is gone", async || {
        Ok(pod.sql("bob", "SELECT * FROM app.u WHERE TRUE", json!([])).await?.status == 404)
    })
    .await?;
    let gone = pod.sql("alice", "SELECT * FROM app.u WHERE TRUE", json!([])).await?;
    refusal("a dropped table", &gone, 404, "TABLE_NOT_FOUND")?;
    returns(&pod, "alice", all, json!([["1", "x", 7]])).await?;
    returns(&pod, "alice", all, json!([["1", "x", 7]])).await
}

#[tokio::test]
async fn one_statement_in_two_namespaces_has_two_plans() -> anyhow::Result<()> {
    let other = "---\napiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {name: other}\nspec: {defaultStorage: local}\n";
    let there =
        user_table("t", &COLUMNS).replace("app.t", "other.t").replace("namespaceRef: app", "namespaceRef: other");
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS), other.to_owned(), there]))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'app')", json!([])).await?;
    pod.run("alice", "INSERT INTO other.t VALUES (1, 'other')", json!([])).await?;
    let authorization = format!("Bearer {}", pod.token("alice", "user")?);
    for _ in 0..2 {
        for namespace in ["app", "other"] {
            let body = json!({"sql": "SELECT v FROM t WHERE TRUE", "namespace_id": namespace});
            let answer = pod.send(Some(&authorization), body.to_string()).await?;
            ensure!(json!(answer.rows()?) == json!([[namespace]]), "{}", answer.text);
        }
        let body = json!({"sql": "SELECT v FROM t WHERE TRUE"});
        ensure!(pod.send(Some(&authorization), body.to_string()).await?.status == 404);
    }
    Ok(())
}
