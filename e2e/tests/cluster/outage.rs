//! What goes on when a part of the cluster does not.

use anyhow::ensure;
use serde_json::json;

use crate::instance::{apply, condition, get, kubectl_ok, script, until, with_messages};

/// Starts a part again however the test ends: later tests need it.
struct Restart<'a>(&'a str, &'a [&'a str]);

impl Drop for Restart<'_> {
    fn drop(&mut self) {
        if let Err(error) = script(self.0, self.1) {
            eprintln!("cannot start it again: {error:#}");
        }
    }
}

#[tokio::test]
async fn sql_goes_on_while_the_api_server_is_down() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let before = sql.count("dora").await?;
    script("daemon.sh", &["stop", "kube-apiserver"])?;
    {
        let _restart = Restart("daemon.sh", &["start", "kube-apiserver"]);
        sql.insert("dora", 4).await?;
        let (status, body) = sql.run("dora", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        ensure!(status == 200, "{body}");
        sql.insert("dora", 1).await?;
        ensure!(sql.count("dora").await? == before + 5);
    }
    until("the API server is back", async || Ok(get("usertable", "app.messages").is_ok())).await
}

#[tokio::test]
async fn writes_go_on_while_object_storage_is_down_and_a_wrong_answer_is_never_given() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    sql.insert("emil", 2).await?;
    let (status, body) = sql.run("emil", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(status == 200, "{body}");
    let before = sql.count("emil").await?;
    script("s3.sh", &["stop", "cluster"])?;
    {
        // It keeps the address that it had.
        let _restart = Restart("s3.sh", &["start", "cluster", ""]);
        sql.insert("emil", 3).await?;
        // The cache may have all that is asked for; then the answer is whole.
        let (status, body) = sql.run("emil", "SELECT sum(length(body)) FROM app.messages", json!([])).await?;
        let whole = i64::try_from("of emil".len())? * (before + 3);
        let answered = status == 200 && body["results"][0]["rows"][0][0] == json!(whole.to_string());
        ensure!(status == 503 || answered, "{status}: {body}");
        let (status, body) = sql.run("emil", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
        ensure!(status == 503 && body["error"]["code"] == "STORAGE_UNAVAILABLE", "{status}: {body}");
        sql.insert("fresh-user", 1).await?;
        ensure!(sql.count("fresh-user").await? >= 1, "rows that are only buffered need no storage");
    }
    until("everything is there again", async || Ok(sql.count("emil").await? == before + 3)).await?;
    until("the rows can be flushed", async || {
        Ok(sql.run("emil", "STORAGE FLUSH TABLE app.messages", json!([])).await?.0 == 200)
    })
    .await?;
    ensure!(sql.count("emil").await? == before + 3);
    Ok(())
}

#[tokio::test]
async fn a_restarted_operator_goes_on_where_it_was() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let version = || -> anyhow::Result<i64> {
        Ok(get("usertable", "app.messages")?["status"]["catalogVersion"].as_i64().unwrap_or_default())
    };
    let before = version()?;
    kubectl_ok(&["delete", "pod", "-l", "app.kubernetes.io/component=operator", "--wait=true"], None)?;
    apply(
        "
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.later}
spec: {namespaceRef: app, tableName: later, columns: [{name: body, type: TEXT}]}
",
    )?;
    until("app.later is Ready", async || {
        Ok(condition(&get("usertable", "app.later")?, "Ready").is_some_and(|(status, ..)| status == "True"))
    })
    .await?;
    until("app.later serves", async || Ok(sql.run("a", "SELECT * FROM app.later", json!([])).await?.0 == 200)).await?;
    ensure!(version()? >= before, "the catalog went back");
    kubectl_ok(&["delete", "usertable", "app.later"], None)?;
    Ok(())
}
