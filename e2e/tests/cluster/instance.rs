//! The instance under test: its objects through kubectl, its SQL through the Service, its files through S3.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::TryStreamExt as _;
use object_store::ObjectStore as _;
use object_store::aws::AmazonS3Builder;
use serde_json::{Value, json};

/// The Kubernetes namespace of the instance.
pub const NAMESPACE: &str = "kalamdb";
const PATIENCE: Duration = Duration::from_secs(90);

/// A variable of those that a cluster is known by; `kind-config.yaml` lists them.
///
/// # Errors
/// If it is not set: a cluster test is never skipped.
pub fn env(name: &str) -> anyhow::Result<String> {
    std::env::var(name).with_context(|| format!("`{name}` is not set; run the cluster tests with `make e2e`"))
}

/// The root of the checkout.
pub fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs kubectl in the instance's namespace.
pub fn kubectl(args: &[&str], input: Option<&str>) -> anyhow::Result<Output> {
    // Never the cluster of somebody's `~/.kube/config`.
    env("KUBECONFIG")?;
    let mut command = Command::new("kubectl");
    command
        .args(["--namespace", NAMESPACE])
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("kubectl")?;
    let mut stdin = child.stdin.take().context("a pipe")?;
    stdin.write_all(input.unwrap_or_default().as_bytes())?;
    drop(stdin);
    Ok(child.wait_with_output()?)
}

/// Runs kubectl and returns what it prints.
///
/// # Errors
/// With what it said, if it failed.
pub fn kubectl_ok(args: &[&str], input: Option<&str>) -> anyhow::Result<String> {
    let output = kubectl(args, input)?;
    ensure!(output.status.success(), "kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Applies manifests.
pub fn apply(text: &str) -> anyhow::Result<String> {
    kubectl_ok(&["apply", "-f", "-"], Some(text))
}

/// An object as JSON.
pub fn get(kind: &str, name: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&kubectl_ok(&["get", kind, name, "-o", "json"], None)?)?)
}

/// Status, reason and message of a condition.
pub fn condition(object: &Value, wanted: &str) -> Option<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all = object["status"]["conditions"].as_array()?;
    let found = all.iter().find(|condition| condition["type"] == wanted)?;
    Some((text(&found["status"]), text(&found["reason"]), text(&found["message"])))
}

/// Waits until `check` holds.
pub async fn until<F: AsyncFnMut() -> anyhow::Result<bool>>(what: &str, mut check: F) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let outcome = check().await;
        if matches!(outcome, Ok(true)) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "waited in vain until {what}; last: {outcome:?}");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// Applies `examples/s3` and waits until its table is Ready and serves.
pub async fn with_messages() -> anyhow::Result<Sql> {
    let folder = root().join("examples/s3");
    kubectl_ok(&["apply", "-f", folder.to_str().context("a path")?], None)?;
    until("app.messages is Ready", async || {
        Ok(condition(&get("usertable", "app.messages")?, "Ready").is_some_and(|(status, ..)| status == "True"))
    })
    .await?;
    let sql = Sql::through_the_service()?;
    until("the query pod knows app.messages", async || {
        Ok(sql.run("probe", "SELECT count(*) FROM app.messages", json!([])).await?.0 == 200)
    })
    .await?;
    Ok(sql)
}

/// SQL through the ClusterIP of the Service.
pub struct Sql {
    url: String,
    secret: String,
    client: reqwest::Client,
}

impl Sql {
    pub fn through_the_service() -> anyhow::Result<Self> {
        let ip = kubectl_ok(&["get", "service", "kalamdb", "-o", "jsonpath={.spec.clusterIP}"], None)?;
        let template = "{{.data.secret | base64decode}}";
        let secret = kubectl_ok(&["get", "secret", "kalamdb-jwt", "-o", &format!("go-template={template}")], None)?;
        // A new connection each time: through the Service a connection ends with its pod.
        let client = reqwest::Client::builder().timeout(Duration::from_secs(40)).pool_max_idle_per_host(0).build()?;
        Ok(Self { url: format!("http://{ip}:2900"), secret, client })
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    pub fn secret(&self) -> &str {
        &self.secret
    }

    fn token(&self, user: &str) -> anyhow::Result<String> {
        let output = Command::new(kalamdb_test_support::pod::binary("kalamdb-query-pod")?)
            .args(["token", "--user", user])
            .env("KALAMDB_JWT_SECRET", &self.secret)
            .output()?;
        ensure!(output.status.success(), "no token: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    }

    /// Status and envelope.
    pub async fn run(&self, user: &str, sql: &str, params: Value) -> anyhow::Result<(u16, Value)> {
        let body = json!({"sql": sql, "params": params});
        let (url, token) = (format!("{}/v1/api/sql", self.url), self.token(user)?);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.client.post(&url).bearer_auth(&token).json(&body).send().await {
                Ok(response) => return Ok((response.status().as_u16(), response.json().await?)),
                // A Service refuses connections for a moment after its pod changed; nothing was sent then.
                Err(error) if error.is_connect() && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Rows of a statement that must succeed.
    pub async fn rows(&self, user: &str, sql: &str) -> anyhow::Result<Vec<Value>> {
        let (status, body) = self.run(user, sql, json!([])).await?;
        ensure!(status == 200, "{sql}: {body}");
        Ok(body["results"][0]["rows"].as_array().context("no rows")?.clone())
    }

    /// `count(*)` of app.messages, as `user` sees it.
    pub async fn count(&self, user: &str) -> anyhow::Result<i64> {
        let rows = self.rows(user, "SELECT count(*) FROM app.messages").await?;
        Ok(rows[0][0].as_str().context("a BIGINT is a string")?.parse()?)
    }

    /// Writes `count` rows as `user`, in one statement.
    pub async fn insert(&self, user: &str, count: usize) -> anyhow::Result<()> {
        let rows = vec!["($1)"; count].join(", ");
        let (status, body) = self
            .run(user, &format!("INSERT INTO app.messages (body) VALUES {rows}"), json!([format!("of {user}")]))
            .await?;
        ensure!(status == 200, "{body}");
        Ok(())
    }
}

/// Keys in the bucket of `examples/s3`.
pub async fn bucket(prefix: &str) -> anyhow::Result<Vec<String>> {
    let store = AmazonS3Builder::new()
        .with_endpoint(env("KALAMDB_TEST_S3_ENDPOINT")?)
        .with_access_key_id(env("KALAMDB_TEST_S3_ACCESS_KEY")?)
        .with_secret_access_key(env("KALAMDB_TEST_S3_SECRET_KEY")?)
        .with_region(env("KALAMDB_TEST_S3_REGION")?)
        .with_bucket_name("kalamdb-data")
        .with_allow_http(true)
        .build()?;
    let prefix = object_store::path::Path::parse(prefix)?;
    let found: Vec<_> = store.list(Some(&prefix)).try_collect().await?;
    Ok(found.into_iter().map(|meta| meta.location.to_string()).collect())
}

/// Runs one of the scripts in `e2e/cluster`.
pub fn script(name: &str, args: &[&str]) -> anyhow::Result<()> {
    let output = Command::new(root().join("e2e/cluster").join(name)).args(args).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{name} {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    Ok(())
}
