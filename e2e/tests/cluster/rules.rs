//! The rules of the custom resources, judged by the real API server: the files of `crds/tests/rules`.

use anyhow::{Context as _, ensure};
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde_json::Value;

use crate::instance::{env, kubectl_ok, root};

/// Objects of the rule files live in a Kubernetes namespace of their own, where no operator looks.
const NAMESPACE: &str = "rules";

fn plural(kind: &str) -> anyhow::Result<&'static str> {
    Ok(match kind {
        "Namespace" => "kalamnamespaces",
        "Storage" => "kalamstorages",
        "ReplicaNode" => "replicanodes",
        "UserTable" => "usertables",
        "SharedTable" => "sharedtables",
        other => anyhow::bail!("no such kind: {other}"),
    })
}

fn documents(text: &str) -> anyhow::Result<Vec<Value>> {
    text.split("\n---\n").map(|document| Ok(serde_saphyr::from_str(document)?)).collect()
}

fn api(client: &kube::Client, document: &Value) -> anyhow::Result<Api<DynamicObject>> {
    let kind = document["kind"].as_str().context("no kind")?;
    let gvk = GroupVersionKind::gvk("kalamdb.org", "v1alpha1", kind);
    Ok(Api::namespaced_with(client.clone(), NAMESPACE, &ApiResource::from_gvk_with_plural(&gvk, plural(kind)?)))
}

/// What the API server says of `document`, as a new object or in place of `old`, without keeping it.
async fn judge(
    client: &kube::Client,
    document: &Value,
    old: Option<&DynamicObject>,
) -> anyhow::Result<Result<(), String>> {
    let mut object: DynamicObject = serde_json::from_value(document.clone())?;
    let params = PostParams { dry_run: true, ..PostParams::default() };
    let api = api(client, document)?;
    let verdict = match old {
        None => api.create(&params, &object).await,
        Some(old) => {
            object.metadata.resource_version = old.metadata.resource_version.clone();
            api.replace(object.metadata.name.as_deref().context("no name")?, &params, &object).await
        }
    };
    match verdict {
        Ok(_) => Ok(Ok(())),
        Err(kube::Error::Api(status)) => Ok(Err(status.message.clone())),
        Err(other) => Err(other.into()),
    }
}

#[tokio::test]
async fn the_api_server_takes_and_refuses_what_every_rule_says() -> anyhow::Result<()> {
    env("KUBECONFIG")?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = kube::Client::try_default().await?;
    kubectl_ok(&["create", "namespace", NAMESPACE], None)?;
    let mut files: Vec<_> = std::fs::read_dir(root().join("crds/tests/rules"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<anyhow::Result<_>>()?;
    files.sort();
    ensure!(files.len() > 200, "the rule files are missing");
    let mut wrong = Vec::new();
    for file in &files {
        let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = std::fs::read_to_string(file)?;
        let header = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let documents = documents(&text).with_context(|| name.clone())?;
        let new = documents.last().context("an object")?;
        let old = if name.starts_with("update-") { documents.first() } else { None };
        let stored = match old {
            Some(old) => {
                let object: DynamicObject = serde_json::from_value(old.clone())?;
                Some(api(&client, old)?.create(&PostParams::default(), &object).await.with_context(|| name.clone())?)
            }
            None => None,
        };
        let verdict = judge(&client, new, stored.as_ref()).await?;
        let expected = header("# expect:").filter(|_| name.contains("reject-"));
        match (&verdict, expected) {
            (Ok(()), None) => {}
            (Err(message), Some(expected)) if message.contains(expected) => {}
            _ => wrong.push(format!("{name}: expected {expected:?}, got {verdict:?}")),
        }
        if let Some(old) = old {
            let name = old["metadata"]["name"].as_str().context("no name")?;
            api(&client, old)?.delete(name, &kube::api::DeleteParams::default()).await?;
        }
    }
    kubectl_ok(&["delete", "namespace", NAMESPACE, "--wait=false"], None)?;
    ensure!(wrong.is_empty(), "{} of {} files:\n{}", wrong.len(), files.len(), wrong.join("\n"));
    Ok(())
}
