//! The roles of operator and query pod, held against the API server's own log of what they ask for.

use std::collections::BTreeSet;

use anyhow::ensure;
use serde_json::Value;

use crate::instance::{NAMESPACE, apply, condition, env, get, kubectl_ok, until, with_messages};

/// API group, resource (with its subresource) and verb.
type Right = (String, String, String);

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().map(text).collect()
}

/// What the Role of that name allows.
fn granted(role: &str) -> anyhow::Result<BTreeSet<Right>> {
    let role = get("role", role)?;
    let mut rights = BTreeSet::new();
    for rule in role["rules"].as_array().into_iter().flatten() {
        for group in texts(&rule["apiGroups"]) {
            for resource in texts(&rule["resources"]) {
                let all = texts(&rule["verbs"]).into_iter().map(|verb| (group.clone(), resource.clone(), verb));
                rights.extend(all);
            }
        }
    }
    Ok(rights)
}

/// What the service account has asked for since the cluster began, allowed or not.
fn asked(account: &str) -> anyhow::Result<BTreeSet<Right>> {
    let user = format!("system:serviceaccount:{NAMESPACE}:{account}");
    let log = std::fs::read_to_string(env("KALAMDB_AUDIT_LOG")?)?;
    // The last line may be half written.
    let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let own = events.filter(|event| event["user"]["username"] == user && event["objectRef"].is_object());
    let rights = own.map(|event| {
        let object = &event["objectRef"];
        let (resource, subresource) = (text(&object["resource"]), text(&object["subresource"]));
        let resource = if subresource.is_empty() { resource } else { format!("{resource}/{subresource}") };
        (text(&object["apiGroup"]), resource, text(&event["verb"]))
    });
    Ok(rights.collect())
}

/// Kinds that no other test declares.
const OTHER_KINDS: &str = "
apiVersion: kalamdb.org/v1alpha1
kind: ReplicaNode
metadata: {name: rights}
spec: {address: 'rights.example:9000'}
---
apiVersion: kalamdb.org/v1alpha1
kind: SharedTable
metadata: {name: app.rights}
spec:
  namespaceRef: app
  tableName: rights
  columns: [{name: body, type: TEXT}]
";

fn namespace_with(storage: &str) -> String {
    format!(
        "
apiVersion: kalamdb.org/v1alpha1
kind: Namespace
metadata: {{name: rights}}
spec: {{defaultStorage: {storage}}}
"
    )
}

#[tokio::test]
async fn each_role_allows_exactly_what_its_pods_ask_for() -> anyhow::Result<()> {
    with_messages().await?;
    apply(OTHER_KINDS)?;
    // The same mistake twice: its event is created, and then counted.
    for (storage, ready) in [("nowhere", "False"), ("s3", "True"), ("nowhere", "False")] {
        apply(&namespace_with(storage))?;
        until("the namespace says so", async || {
            Ok(condition(&get("kalamnamespace", "rights")?, "Ready").is_some_and(|(status, ..)| status == ready))
        })
        .await?;
    }
    for role in ["kalamdb-operator", "kalamdb"] {
        until("every right is used", async || {
            let (granted, asked) = (granted(role)?, asked(role)?);
            let unused: Vec<_> = granted.difference(&asked).collect();
            ensure!(unused.is_empty(), "`{role}` may and never does: {unused:?}");
            Ok(true)
        })
        .await?;
        let (granted, asked) = (granted(role)?, asked(role)?);
        let missing: Vec<_> = asked.difference(&granted).collect();
        ensure!(missing.is_empty(), "`{role}` asks for what it may not: {missing:?}");
    }
    for object in ["sharedtable/app.rights", "kalamnamespace/rights", "replicanode/rights"] {
        kubectl_ok(&["delete", object], None)?;
    }
    Ok(())
}
