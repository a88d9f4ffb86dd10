//! Component tests: a query pod as a process, driven over HTTP.
#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod cache;
mod casts;
mod crash;
mod differential;
mod failure;
mod fast;
mod faults;
mod inserts;
mod isolation;
mod limits;
mod lost_volume;
mod manifests;
mod moments;
mod moves;
mod names;
mod outside;
mod places;
mod plans;
mod returning;
mod sql;
mod types;
mod unreliable;
mod upkeep;
mod world;

use std::io::Write as _;

use anyhow::ensure;
use kalamdb_test_support::pod::{Answer, Pod};
use serde_json::{Value, json};

const BINARY: &str = env!("CARGO_BIN_EXE_kalamdb-query-pod");

/// A storage on the local file system.
fn storage(name: &str, path: &str) -> String {
    format!(
        "---\napiVersion: kalamdb.org/v1alpha1\nkind: Storage\nmetadata: {{name: {name}}}\nspec:\n  \
         type: Filesystem\n  filesystem: {{path: {path}}}\n  \
         userTablesTemplate: users/{{userId}}/{{namespace}}/{{tableName}}\n  \
         sharedTablesTemplate: shared/{{namespace}}/{{tableName}}\n"
    )
}

/// The namespace `app`, whose tables lie in `storage`.
fn namespace(storage: &str) -> String {
    format!(
        "---\napiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {{name: app}}\nspec: {{defaultStorage: \
         {storage}}}\n"
    )
}

/// A storage in the data folder, the namespace `app`, and `tables`.
fn declare(tables: &[String]) -> String {
    format!("{}{}{}", storage("local", "./files"), namespace("local"), tables.concat())
}

/// A table in `app` with columns like `id, type: BIGINT, primaryKey: true`, and more lines of its spec.
fn table(kind: &str, name: &str, columns: &[&str], more: &[&str]) -> String {
    let columns: Vec<String> = columns.iter().map(|column| format!("    - {{name: {column}}}\n")).collect();
    let more: Vec<String> = more.iter().map(|line| format!("  {line}\n")).collect();
    format!(
        "---\napiVersion: kalamdb.org/v1alpha1\nkind: {kind}\nmetadata: {{name: app.{}}}\nspec:\n  namespaceRef: app\n  \
         tableName: {name}\n  columns:\n{}{}",
        name.replace('_', "-"),
        columns.concat(),
        more.concat()
    )
}

fn user_table(name: &str, columns: &[&str]) -> String {
    table("UserTable", name, columns, &["flushPolicy: {rows: 100000, interval: 24h}"])
}

/// The S3 server that tests may use.
struct S3 {
    endpoint: String,
    bucket: String,
    access_key: String,
    secret_key: String,
}

impl S3 {
    /// `None` without one.
    fn find() -> anyhow::Result<Option<Self>> {
        let variable = |name: &str| std::env::var(format!("KALAMDB_TEST_S3_{name}"));
        let Ok(endpoint) = variable("ENDPOINT") else {
            ensure!(
                std::env::var("KALAMDB_TEST_REQUIRE_S3").as_deref() != Ok("1"),
                "KALAMDB_TEST_S3_ENDPOINT is not set"
            );
            writeln!(std::io::stderr(), "an S3 test did not run: KALAMDB_TEST_S3_ENDPOINT is not set")?;
            return Ok(None);
        };
        let (bucket, access_key, secret_key) = (variable("BUCKET")?, variable("ACCESS_KEY")?, variable("SECRET_KEY")?);
        Ok(Some(Self { endpoint, bucket, access_key, secret_key }))
    }
}

/// The rows of a statement with parameters.
async fn rows(pod: &Pod, user: &str, sql: &str, params: Value) -> anyhow::Result<Value> {
    let answer = pod.sql(user, sql, params).await?;
    ensure!(answer.status == 200, "{sql}: {}", answer.text);
    Ok(answer.body["results"][0]["rows"].clone())
}

/// Checks what a query without parameters returns.
async fn returns(pod: &Pod, user: &str, sql: &str, expected: Value) -> anyhow::Result<()> {
    let found = rows(pod, user, sql, json!([])).await?;
    ensure!(found == expected, "{sql}\n returned {found}\n expected {expected}");
    Ok(())
}

/// Checks that a statement is refused, and returns the message.
async fn refused(pod: &Pod, sql: &str, params: Value, status: u16, code: &str) -> anyhow::Result<String> {
    let answer = pod.sql("alice", sql, params).await?;
    refusal(sql, &answer, status, code)
}

fn refusal(what: &str, answer: &Answer, status: u16, code: &str) -> anyhow::Result<String> {
    let what: String = what.chars().take(200).collect();
    ensure!((answer.status, answer.code()) == (status, code), "{what}: {}", answer.text);
    ensure!(answer.body["results"] == json!([]) && answer.body["status"] == "error", "{what}: {}", answer.text);
    ensure!(!answer.message().is_empty() && answer.message().len() < 2_000, "{what}: {}", answer.text);
    Ok(answer.message().to_owned())
}
