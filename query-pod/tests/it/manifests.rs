//! The folder of manifests steers a running pod; the data folder outlives it.

use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod, data_files_below, eventually};
use serde_json::{Value, json};

use super::{BINARY, declare, returns, table, user_table};

const COLUMNS: [&str; 2] = ["id, type: BIGINT, primaryKey: true", "body, type: TEXT"];

/// Waits until `sql` is answered with `status`: within the second that is promised, and one for a busy machine.
async fn within_a_second(pod: &Pod, sql: &str, status: u16) -> anyhow::Result<()> {
    let started = Instant::now();
    loop {
        let answer = pod.sql("alice", sql, json!([])).await?;
        if answer.status == status {
            return Ok(());
        }
        ensure!(
            started.elapsed() < Duration::from_secs(2),
            "{sql}: {} after two seconds: {}",
            answer.status,
            answer.text
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Starts a process that must end by itself, with a line in the log that holds all of `parts`.
async fn refuses_to_start(home: &Home, parts: &[&str]) -> anyhow::Result<()> {
    let before = home.log().len();
    let mut child = home.spawn()?;
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if started.elapsed() > Duration::from_secs(20) {
            child.kill()?;
            child.wait()?;
            anyhow::bail!("the process is running");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    ensure!(!status.success(), "{status}");
    let log = home.log();
    let is_told = log[before..].lines().any(|line| parts.iter().all(|part| line.contains(part)));
    ensure!(is_told, "no line says {parts:?}:\n{}", &log[before..]);
    Ok(())
}

async fn logged(pod: &Pod, parts: &[&str]) -> anyhow::Result<()> {
    let what = format!("a line of the log says {parts:?}");
    eventually(&what, async || Ok(pod.log().lines().any(|line| parts.iter().all(|part| line.contains(part))))).await
}

#[tokio::test]
async fn a_manifest_that_is_added_changed_or_removed_shows_within_a_second() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("first", &COLUMNS)]))?;
    let pod = home.start().await?;
    home.write_manifest("more.yaml", &user_table("second", &COLUMNS))?;
    within_a_second(&pod, "SELECT * FROM app.second", 200).await?;
    pod.run("alice", "INSERT INTO app.second VALUES (1, 'in a file')", json!([])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.second", json!([])).await?;
    pod.run("alice", "INSERT INTO app.second VALUES (2, 'buffered')", json!([])).await?;

    home.write_manifest("more.yaml", &user_table("second", &[COLUMNS[0], COLUMNS[1], "added, type: INT"]))?;
    within_a_second(&pod, "SELECT added FROM app.second", 200).await?;

    home.remove_manifest("more.yaml")?;
    within_a_second(&pod, "SELECT * FROM app.second", 404).await?;
    within_a_second(&pod, "INSERT INTO app.second VALUES (3, 'x', 1)", 404).await?;
    let names = "SELECT table_name FROM information_schema.tables";
    returns(&pod, "alice", names, json!([["first"]])).await?;
    let files = data_files_below(&home.data_dir().join("files/users"))?;
    ensure!(files.len() == 1, "a file was removed or made: {files:?}");

    home.write_manifest("more.yaml", &user_table("second", &[COLUMNS[0], COLUMNS[1], "added, type: INT"]))?;
    within_a_second(&pod, "SELECT * FROM app.second", 200).await?;
    let expected = json!([["1", "in a file", null], ["2", "buffered", null]]);
    returns(&pod, "alice", "SELECT * FROM app.second ORDER BY id", expected).await?;
    let again = pod.sql("alice", "INSERT INTO app.second VALUES (1, 'again', 1)", json!([])).await?;
    ensure!(again.status == 409, "{}", again.text);
    Ok(())
}

#[tokio::test]
async fn a_broken_manifest_is_reported_with_file_line_and_field_and_changes_nothing() -> anyhow::Result<()> {
    let good = declare(&[user_table("t", &COLUMNS)]);
    let home = Home::new(BINARY, &good)?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'x')", json!([])).await?;
    let serves_on = async |what: &str| -> anyhow::Result<()> {
        returns(&pod, "alice", "SELECT * FROM app.t", json!([["1", "x"]])).await.context(what.to_owned())
    };
    let head = good.lines().count();
    let line_of = |text: &str, part: &str| text.lines().position(|line| line.contains(part)).map_or(0, |at| at + 1);

    let wrong_type = good.replace("body, type: TEXT", "body, type: VARCHAR");
    home.write_manifest("all.yaml", &wrong_type)?;
    let line = format!("all.yaml:{}:", line_of(&wrong_type, "VARCHAR"));
    logged(&pod, &[&line, "spec.columns[1].type", "VARCHAR"]).await?;
    serves_on("a wrong type").await?;

    home.write_manifest("all.yaml", &format!("{good}---\nkind: [\n"))?;
    logged(&pod, &[&format!("all.yaml:{}", head + 2)]).await?;
    serves_on("no YAML").await?;

    let unknown = good.replace("  tableName: t\n", "  tableName: t\n  flushPolice: {rows: 1}\n");
    home.write_manifest("all.yaml", &unknown)?;
    logged(&pod, &[&format!("all.yaml:{}:", line_of(&unknown, "flushPolice")), "flushPolice"]).await?;
    serves_on("an unknown field").await?;

    home.write_manifest("all.yaml", &good.replace("body, type: TEXT", "body, type: INT"))?;
    logged(&pod, &["all.yaml:", "spec.columns", "refused"]).await?;
    serves_on("a column of another type").await?;

    home.write_manifest("all.yaml", &good)?;
    home.write_manifest("other.yaml", &user_table("u", &COLUMNS).replace("namespaceRef: app", "namespaceRef: nope"))?;
    logged(&pod, &["other.yaml:", "nope"]).await?;
    serves_on("an unknown namespace").await?;
    home.write_manifest("other.yaml", &user_table("u", &COLUMNS))?;
    within_a_second(&pod, "SELECT * FROM app.u", 200).await?;
    serves_on("all is good again").await
}

#[tokio::test]
async fn a_restart_keeps_ids_and_rows_even_when_the_manifests_are_broken() -> anyhow::Result<()> {
    let tables = |names: &[&str]| declare(&names.iter().map(|name| user_table(name, &COLUMNS)).collect::<Vec<_>>());
    let home = Home::new(BINARY, &tables(&["b", "c"]))?;
    let ids = || -> anyhow::Result<Vec<Value>> {
        let catalog: Value = serde_json::from_slice(&std::fs::read(home.data_dir().join("catalog.json"))?)?;
        ["app.b", "app.c"]
            .map(|name| Some(catalog["tables"][name]["id"].clone()).context("an id"))
            .into_iter()
            .collect()
    };
    let mut pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.c VALUES (1, 'x')", json!([])).await?;
    let before = ids()?;
    ensure!(before.iter().all(Value::is_u64) && before[0] != before[1], "{before:?}");
    pod.kill()?;
    home.write_manifest("all.yaml", &tables(&["a", "b", "c"]))?;
    let mut pod = home.start().await?;
    within_a_second(&pod, "SELECT * FROM app.a", 200).await?;
    ensure!(ids()? == before, "ids changed with a table that sorts first");
    returns(&pod, "alice", "SELECT * FROM app.c", json!([["1", "x"]])).await?;
    returns(&pod, "alice", "SELECT * FROM app.a", json!([])).await?;
    ensure!(pod.stop().await?.success());
    home.write_manifest("all.yaml", "no: [yaml")?;
    let pod = home.start().await?;
    returns(&pod, "alice", "SELECT * FROM app.c", json!([["1", "x"]])).await?;
    ensure!(pod.run("alice", "INSERT INTO app.c VALUES (2, 'y')", json!([])).await? == 1);
    Ok(())
}

#[tokio::test]
async fn a_data_folder_whose_catalog_is_older_or_another_or_gone_refuses_to_start() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let file = home.data_dir().join("catalog.json");
    let mut pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'x')", json!([])).await?;
    let older = std::fs::read(&file)?;
    home.write_manifest("more.yaml", &user_table("u", &COLUMNS))?;
    within_a_second(&pod, "SELECT * FROM app.u", 200).await?;
    pod.run("alice", "INSERT INTO app.u VALUES (1, 'y')", json!([])).await?;
    ensure!(pod.stop().await?.success());
    let newest = std::fs::read(&file)?;
    let path = file.display().to_string();

    std::fs::write(&file, older)?;
    refuses_to_start(&home, &["belongs to catalog version 2", &path, "is version 1; restore the file"]).await?;
    let mut other: Value = serde_json::from_slice(&newest)?;
    ensure!(other["nonce"].as_str().is_some_and(|nonce| nonce.len() == 32), "{}", other["nonce"]);
    other["nonce"] = json!("another");
    std::fs::write(&file, other.to_string())?;
    refuses_to_start(&home, &["belongs to another catalog version 2", &path]).await?;
    std::fs::remove_file(&file)?;
    refuses_to_start(&home, &[&path, "is missing"]).await?;

    std::fs::write(&file, newest)?;
    let pod = home.start().await?;
    returns(&pod, "alice", "SELECT * FROM app.t", json!([["1", "x"]])).await?;
    returns(&pod, "alice", "SELECT * FROM app.u", json!([["1", "y"]])).await
}

#[tokio::test]
async fn a_broken_secret_is_reported_with_file_line_and_field_and_changes_nothing() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let secret = |data: &str| format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: creds}}\n{data}\n");
    home.write_manifest("secret.yaml", &secret("stringData: {accessKeyId: swordfish}"))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'x')", json!([])).await?;
    for (data, field) in [
        ("data: {accessKeyId: \"sword-fish!\"}", "secret.yaml:4: data: must be"),
        ("stringData:\n  a: b\n  pin: 1234567", "secret.yaml:6: stringData.pin: must be a text"),
        ("strigData: {accessKeyId: swordfish}", "secret.yaml:4: strigData: unknown field"),
    ] {
        home.write_manifest("secret.yaml", &secret(data))?;
        logged(&pod, &["a manifest is broken", field]).await?;
        returns(&pod, "alice", "SELECT * FROM app.t", json!([["1", "x"]])).await?;
    }
    // While it cannot be read, nobody knows which credentials are meant: nothing of the folder is taken.
    let reports = || pod.log().matches("a manifest is broken").count();
    let before = reports();
    home.write_manifest("more.yaml", &user_table("u", &COLUMNS))?;
    eventually("the folder is read again", async || Ok(reports() > before)).await?;
    let refused = pod.sql("alice", "SELECT * FROM app.u", json!([])).await?;
    ensure!(refused.status == 404, "{}", refused.text);
    home.write_manifest("secret.yaml", &secret("stringData: {accessKeyId: swordfish}"))?;
    within_a_second(&pod, "SELECT * FROM app.u", 200).await?;
    let log = pod.log();
    ensure!(!log.contains("swordfish") && !log.contains("sword-fish") && !log.contains("1234567"), "{log}");
    Ok(())
}

#[tokio::test]
async fn a_storage_that_is_to_become_another_is_refused_and_stays_as_it_was() -> anyhow::Result<()> {
    let good = declare(&[user_table("t", &COLUMNS)])
        .replace("metadata: {name: local}\nspec:\n", "metadata: {name: my-disk}\nspec:\n  sqlName: my_disk\n")
        .replace("defaultStorage: local", "defaultStorage: my-disk");
    let home = Home::new(BINARY, &good)?;
    let pod = home.start().await?;
    let mut expected = Vec::new();
    let in_s3 = "type: S3\n  s3: {bucket: elsewhere, region: us-east-1}";
    for (id, (was, is, field)) in [
        ("sqlName: my_disk", "sqlName: my-disk", "spec.sqlName: cannot be changed from `my_disk`"),
        ("type: Filesystem\n  filesystem: {path: ./files}", in_s3, "spec.type: cannot be changed"),
    ]
    .into_iter()
    .enumerate()
    {
        let changed = good.replace(was, is);
        let other = format!("other{id}");
        home.write_manifest("all.yaml", &format!("{changed}{}", user_table(&other, &COLUMNS)))?;
        let line = changed.lines().position(|line| line.trim() == is.lines().next().unwrap_or_default());
        let line = format!("all.yaml:{}:", line.context("the changed line")? + 1);
        logged(&pod, &[&line, field, "an object is refused"]).await?;
        // What is not refused is taken, and lies where the storage was.
        within_a_second(&pod, &format!("SELECT * FROM app.{other}"), 200).await?;
        for table in ["t", other.as_str()] {
            pod.run("alice", &format!("INSERT INTO app.{table} VALUES ({id}, 'x')"), json!([])).await?;
            pod.run("alice", &format!("STORAGE FLUSH TABLE app.{table}"), json!([])).await?;
        }
        expected.push(json!([id.to_string(), "x"]));
        returns(&pod, "alice", "SELECT * FROM app.t ORDER BY id", json!(expected)).await?;
        let files = data_files_below(&home.data_dir().join("files/users"))?;
        ensure!(files.len() == 2 * (id + 1), "{files:?}");
        home.write_manifest("all.yaml", &good)?;
        within_a_second(&pod, &format!("SELECT * FROM app.{other}"), 404).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_table_that_leaves_the_folder_comes_back_as_it_was_whatever_its_deletion_policy() -> anyhow::Result<()> {
    let doomed = |columns: &[&str]| table("UserTable", "doomed", columns, &["deletionPolicy: Delete"]);
    let home = Home::new(BINARY, &declare(&[doomed(&COLUMNS)]))?;
    let pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.doomed VALUES (1, 'in a file')", json!([])).await?;
    pod.run("alice", "STORAGE FLUSH TABLE app.doomed", json!([])).await?;
    pod.run("alice", "INSERT INTO app.doomed VALUES (2, 'buffered')", json!([])).await?;
    home.write_manifest("all.yaml", &declare(&[]))?;
    within_a_second(&pod, "SELECT * FROM app.doomed", 404).await?;
    // Rows are never read by other columns than they were written with.
    home.write_manifest("all.yaml", &declare(&[doomed(&["id, type: BIGINT, primaryKey: true", "other, type: INT"])]))?;
    logged(&pod, &["cannot be removed", "an object is refused"]).await?;
    within_a_second(&pod, "SELECT * FROM app.doomed", 404).await?;
    home.write_manifest("all.yaml", &declare(&[doomed(&COLUMNS)]))?;
    within_a_second(&pod, "SELECT * FROM app.doomed", 200).await?;
    let expected = json!([["1", "in a file"], ["2", "buffered"]]);
    returns(&pod, "alice", "SELECT * FROM app.doomed ORDER BY id", expected).await
}

#[tokio::test]
async fn a_second_process_on_a_data_folder_refuses_to_start_and_names_the_first() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let mut pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (1, 'x')", json!([])).await?;
    refuses_to_start(&home, &[&pod.pid().to_string(), "buffer"]).await?;
    returns(&pod, "alice", "SELECT * FROM app.t", json!([["1", "x"]])).await?;
    ensure!(pod.run("alice", "INSERT INTO app.t VALUES (2, 'y')", json!([])).await? == 1);
    ensure!(pod.stop().await?.success());
    let pod = home.start().await?;
    returns(&pod, "alice", "SELECT count(*) FROM app.t", json!([["2"]])).await
}

#[tokio::test]
async fn sigterm_finishes_what_is_under_way_and_ends_with_success() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &declare(&[user_table("t", &COLUMNS)]))?;
    let mut pod = home.start().await?;
    pod.run("alice", "INSERT INTO app.t VALUES (0, 'x')", json!([])).await?;
    let pid = pod.pid().to_string();
    let slow = pod.sql(
        "alice",
        "SELECT count(*) FROM generate_series(1, 3000) a, generate_series(1, 3000) b, app.t WHERE a.value % 7 = b.value % 11",
        json!([]),
    );
    let stop = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        std::process::Command::new("kill").args(["-TERM", &pid]).status()
    };
    let (slow, stopped) = tokio::join!(slow, stop);
    ensure!(stopped?.success());
    ensure!(slow?.status == 200, "a query that had begun was cut off");
    let status = pod.wait().await?;
    ensure!(status.code() == Some(0), "{status}\n{}", pod.log());
    ensure!(pod.log().contains("stopped"), "{}", pod.log());
    ensure!(pod.sql("alice", "SELECT 1", json!([])).await.is_err(), "it still answers");
    let pod = home.start().await?;
    returns(&pod, "alice", "SELECT * FROM app.t", json!([["0", "x"]])).await
}
