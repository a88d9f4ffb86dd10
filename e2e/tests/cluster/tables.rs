//! From `kubectl apply` to rows in the bucket.

use std::process::Command;
use std::time::Duration;

use anyhow::ensure;
use serde_json::{Value, json};

use crate::instance::{apply, bucket, condition, get, kubectl_ok, root, until, with_messages};

#[tokio::test]
async fn a_table_that_is_applied_serves_each_user_his_own_rows_and_files() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let (alice, bob) = (sql.count("alice").await?, sql.count("Bob/é").await?);
    sql.insert("alice", 3).await?;
    sql.insert("Bob/é", 2).await?;
    ensure!(sql.count("alice").await? == alice + 3);
    for user in ["alice", "Bob/é"] {
        let (status, body) = sql.run(user, "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        ensure!(status == 200, "{body}");
    }
    ensure!(sql.count("alice").await? == alice + 3 && sql.count("Bob/é").await? == bob + 2);
    let bodies = sql.rows("alice", "SELECT DISTINCT body FROM app.messages").await?;
    ensure!(bodies == [json!(["of alice"])], "{bodies:?}");
    for prefix in ["users/alice/app/messages", "users/%42ob%2f%c3%a9/app/messages"] {
        let files = bucket(prefix).await?;
        let (data, others): (Vec<_>, Vec<_>) = files.iter().partition(|file| file.ends_with(".parquet"));
        ensure!(!data.is_empty() && others == [&format!("{prefix}/_manifest.json")], "{prefix}: {files:?}");
    }
    let table = get("usertable", "app.messages")?;
    ensure!(table["status"]["location"].as_str().is_some_and(|text| text.contains("users/{userId}/app/messages")));
    Ok(())
}

#[tokio::test]
async fn deleting_the_pod_loses_nothing() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let before = sql.count("carol").await?;
    for (round, how) in [&["--grace-period=0", "--force"][..], &["--grace-period=30"][..]].into_iter().enumerate() {
        sql.insert("carol", 5).await?;
        let mut args = vec!["delete", "pod", "kalamdb-0", "--wait=true"];
        args.extend(how);
        kubectl_ok(&args, None)?;
        let expected = before + 5 * (i64::try_from(round)? + 1);
        until("the new pod has the rows", async || Ok(sql.count("carol").await? == expected)).await?;
    }
    Ok(())
}

#[tokio::test]
async fn losing_the_volume_loses_nothing_that_the_storage_has() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let before = sql.count("dave").await?;
    sql.insert("dave", 5).await?;
    let (status, body) = sql.run("dave", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(status == 200, "{body}");
    sql.insert("dave", 7).await?;
    // A graceful end ships what is left; the claim goes with its volume, and the pod comes back on an empty one.
    kubectl_ok(&["delete", "persistentvolumeclaim", "data-kalamdb-0", "--wait=false"], None)?;
    kubectl_ok(&["delete", "pod", "kalamdb-0", "--grace-period=30", "--wait=true"], None)?;
    until("the pod on the new volume has the rows", async || Ok(sql.count("dave").await? == before + 12)).await?;
    let claim = get("persistentvolumeclaim", "data-kalamdb-0")?;
    ensure!(claim["metadata"]["deletionTimestamp"].is_null(), "the pod still has its old volume");
    sql.insert("dave", 1).await?;
    ensure!(sql.count("dave").await? == before + 13);
    Ok(())
}

const BROKEN: &str = "
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.broken}
spec:
  namespaceRef: app
  tableName: broken
  storageRef: nowhere
  columns: [{name: body, type: TEXT}]
";

#[tokio::test]
async fn a_mistake_is_a_condition_and_disturbs_nobody() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    apply(BROKEN)?;
    until("app.broken is Stalled", async || {
        let stalled = condition(&get("usertable", "app.broken")?, "Stalled");
        Ok(stalled.is_some_and(|(status, reason, message)| {
            status == "True" && reason == "StorageNotFound" && message.contains("nowhere")
        }))
    })
    .await?;
    sql.count("alice").await?;
    kubectl_ok(&["delete", "usertable", "app.broken"], None)?;
    apply(&BROKEN.replace("  storageRef: nowhere\n", ""))?;
    until("app.broken is Ready", async || {
        Ok(condition(&get("usertable", "app.broken")?, "Ready").is_some_and(|(status, ..)| status == "True"))
    })
    .await?;
    until("app.broken serves", async || Ok(sql.run("alice", "SELECT * FROM app.broken", json!([])).await?.0 == 200))
        .await?;
    kubectl_ok(&["delete", "usertable", "app.broken"], None)?;
    until("app.broken is gone from SQL", async || {
        Ok(sql.run("alice", "SELECT * FROM app.broken", json!([])).await?.0 == 404)
    })
    .await
}

#[tokio::test]
async fn an_idle_instance_writes_nothing_to_the_api_server() -> anyhow::Result<()> {
    with_messages().await?;
    let versions = || -> anyhow::Result<Vec<(String, String)>> {
        let all = kubectl_ok(&["get", "kalamstorages,kalamnamespaces,usertables", "-o", "json"], None)?;
        let all: Value = serde_json::from_str(&all)?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let items = all["items"].as_array().cloned().unwrap_or_default();
        Ok(items.iter().map(|o| (text(&o["metadata"]["name"]), text(&o["metadata"]["resourceVersion"]))).collect())
    };
    // Let what was applied before settle: two equal looks in a row.
    let mut last = versions()?;
    until("the objects have settled", async || {
        tokio::time::sleep(Duration::from_secs(3)).await;
        let now = versions()?;
        Ok(std::mem::replace(&mut last, now.clone()) == now)
    })
    .await?;
    // Time has to pass here: the promise is that nothing happens in it.
    tokio::time::sleep(Duration::from_secs(20)).await;
    ensure!(versions()? == last, "objects changed while nothing happened: {last:?} became {:?}", versions()?);
    Ok(())
}

#[tokio::test]
async fn the_real_changelogs_load_through_the_service_and_every_user_agrees() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let folder = root().join("examples/demo-s3");
    kubectl_ok(&["apply", "-f", folder.to_string_lossy().as_ref()], None)?;
    until("debian.changelogs serves", async || {
        Ok(sql.run("x", "SELECT count(*) FROM debian.changelogs", json!([])).await?.0 == 200)
    })
    .await?;
    let output = Command::new(kalamdb_test_support::pod::binary("kalamdb-bench")?)
        .args(["demo", "--url", sql.url()])
        .env("KALAMDB_JWT_SECRET", sql.secret())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    println!("{said}");
    ensure!(said.contains("users agree"), "{said}");
    Ok(())
}
