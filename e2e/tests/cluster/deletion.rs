//! What can be deleted, what cannot, and that nothing is lost or stuck either way.

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use crate::instance::{apply, condition, get, kubectl, kubectl_ok, root, until, with_messages};

fn used(kind: &str, name: &str) -> anyhow::Result<Option<i64>> {
    let status = &get(kind, name)?["status"];
    Ok(status["usedBy"]["count"].as_i64().or(status["dependents"]["count"].as_i64()))
}

fn is_ready(kind: &str, name: &str) -> anyhow::Result<bool> {
    Ok(condition(&get(kind, name)?, "Ready").is_some_and(|(status, ..)| status == "True"))
}

#[tokio::test]
async fn what_is_in_use_cannot_be_deleted_and_names_who_uses_it() -> anyhow::Result<()> {
    with_messages().await?;
    for (kind, name) in [("kalamstorage", "s3"), ("kalamnamespace", "app")] {
        until("the use is known", async || Ok(used(kind, name)? > Some(0))).await?;
        until("the refusal", async || {
            let output = kubectl(&["delete", kind, name, "--dry-run=server"], None)?;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            Ok(!output.status.success() && said.contains("in use by") && said.contains("app.messages"))
        })
        .await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_deletion_that_is_forced_costs_nothing() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let before = sql.count("fay").await?;
    sql.insert("fay", 2).await?;
    let (status, body) = sql.run("fay", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(status == 200, "{body}");
    sql.insert("fay", 1).await?;
    until("the use is known", async || Ok(used("kalamstorage", "s3")? > Some(0))).await?;
    kubectl_ok(&["annotate", "kalamstorage", "s3", "kalamdb.org/force-delete="], None)?;
    kubectl_ok(&["delete", "kalamstorage", "s3", "--timeout=30s"], None)?;
    until("the namespace misses its storage", async || {
        let stalled = condition(&get("kalamnamespace", "app")?, "Stalled");
        Ok(stalled.is_some_and(|(status, reason, _)| status == "True" && reason == "StorageNotFound"))
    })
    .await?;
    let (status, body) = sql.run("fay", "STORAGE FLUSH TABLE app.messages", json!([])).await?;
    ensure!(status == 200, "rows go where they went before: {body}");
    sql.insert("fay", 1).await?;
    ensure!(sql.count("fay").await? == before + 4);
    with_messages().await?;
    until("all is as it was", async || Ok(is_ready("kalamstorage", "s3")? && is_ready("kalamnamespace", "app")?))
        .await?;
    ensure!(used("kalamstorage", "s3")? > Some(0) && sql.count("fay").await? == before + 4);
    Ok(())
}

const SPARE: &str = "
apiVersion: kalamdb.org/v1alpha1
kind: Storage
metadata: {name: spare}
spec:
  type: S3
  s3:
    bucket: kalamdb-data
    prefix: spare
    region: us-east-1
    endpoint: http://s3:9000
    pathStyle: true
    allowHttp: true
    credentialsSecret: {name: s3-credentials}
---
apiVersion: kalamdb.org/v1alpha1
kind: Namespace
metadata: {name: spare}
spec: {defaultStorage: spare}
---
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: spare.notes}
spec:
  namespaceRef: spare
  tableName: notes
  columns: [{name: body, type: TEXT}]
";

#[tokio::test]
async fn a_table_that_is_gone_holds_no_storage_and_comes_back_with_its_rows() -> anyhow::Result<()> {
    let sql = with_messages().await?;
    let serves = async || -> anyhow::Result<bool> {
        Ok(sql.run("gus", "SELECT count(*) FROM spare.notes", json!([])).await?.0 == 200)
    };
    apply(SPARE)?;
    until("spare.notes serves", &serves).await?;
    for body in ["in a file", "in the buffer"] {
        let insert = "INSERT INTO spare.notes (body) VALUES ($1)";
        let (status, answer) = sql.run("gus", insert, json!([body])).await?;
        ensure!(status == 200, "{answer}");
        if body == "in a file" {
            let (status, answer) = sql.run("gus", "STORAGE FLUSH TABLE spare.notes", json!([])).await?;
            ensure!(status == 200, "{answer}");
        }
    }
    kubectl_ok(&["delete", "usertable", "spare.notes"], None)?;
    until("the pod hears that it is gone", async || Ok(!serves().await?)).await?;
    // No annotation, no other order than the one that the references ask for.
    for kind in ["kalamnamespace", "kalamstorage"] {
        until("nothing uses it any more", async || {
            let output = kubectl(&["delete", kind, "spare", "--timeout=30s"], None)?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            Ok(true)
        })
        .await?;
    }
    apply(SPARE)?;
    until("spare.notes serves again", &serves).await?;
    let bodies = sql.rows("gus", "SELECT body FROM spare.notes ORDER BY body").await?;
    ensure!(bodies == [json!(["in a file"]), json!(["in the buffer"])], "{bodies:?}");
    kubectl_ok(&["delete", "usertable", "spare.notes"], None)?;
    Ok(())
}

/// An instance of its own, without query pods: a Storage and a Namespace in use, and tables of both kinds.
const DOOMED: &str = "
apiVersion: kalamdb.org/v1alpha1
kind: Storage
metadata: {name: folder}
spec: {type: Filesystem, filesystem: {path: files}}
---
apiVersion: kalamdb.org/v1alpha1
kind: Namespace
metadata: {name: app}
spec: {defaultStorage: folder}
---
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.messages}
spec:
  namespaceRef: app
  tableName: messages
  columns: [{name: body, type: TEXT}]
---
apiVersion: kalamdb.org/v1alpha1
kind: SharedTable
metadata: {name: app.rooms}
spec:
  namespaceRef: app
  tableName: rooms
  columns: [{name: title, type: TEXT}]
";

/// The operator of `e2e/manifests` in another Kubernetes namespace, its catalog in its own memory.
fn operator_in(namespace: &str) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(root().join("e2e/manifests/operator.yaml"))?;
    Ok(text
        .replace("namespace: kalamdb", &format!("namespace: {namespace}"))
        .replace("s3://kalamdb-home/dev", "memory:")
        .replace("secretRef: {name: kalamdb-home}", "secretRef: {name: kalamdb-home, optional: true}"))
}

#[tokio::test]
async fn deleting_the_kubernetes_namespace_never_hangs_with_or_without_its_operator() -> anyhow::Result<()> {
    for (namespace, operator_stays) in [("doomed-with", true), ("doomed-without", false)] {
        let within = |args: &[&str], input: Option<&str>| kubectl_ok(&[&["-n", namespace][..], args].concat(), input);
        kubectl_ok(&["create", "namespace", namespace], None)?;
        within(&["apply", "-f", "-"], Some(&operator_in(namespace)?))?;
        within(&["apply", "-f", "-"], Some(DOOMED))?;
        until("both tables count", async || {
            let storage: Value =
                serde_json::from_str(&within(&["get", "kalamstorage", "folder", "-o", "json"], None)?)?;
            Ok(storage["status"]["usedBy"]["count"] == 2)
        })
        .await?;
        if !operator_stays {
            within(&["delete", "deployment", "kalamdb-operator", "--cascade=foreground", "--timeout=60s"], None)?;
        }
        kubectl_ok(&["delete", "namespace", namespace, "--timeout=60s"], None)
            .with_context(|| format!("the operator stays: {operator_stays}"))?;
    }
    Ok(())
}
