//! Entries into the table, each as its user; run again, it writes only what is missing.
//!
//! A statement is all or nothing, and every row has its own key. So a statement that meets an existing key asks which keys
//! exist and writes the others; an aborted load is completed by the same command.

use std::collections::HashSet;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::{Role, UserId};
use serde_json::Value;

use super::TABLE;
use super::changelog::Entry;
use super::source::Source;
use crate::client::{Client, Failure};
use crate::progress::Progress;
use crate::token::Signer;

/// Rows of one statement, and about how many bytes of bodies, whichever is reached first.
const ROWS_MAX: usize = 100;
const BYTES_MAX: usize = 2 << 20;
/// How often a statement is tried when others write the same keys meanwhile.
const TRIES: usize = 5;

/// What a load did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Loaded {
    /// Rows written now.
    pub written: u64,
    /// Rows that were there before.
    pub present: u64,
    /// Statements that wrote.
    pub statements: u64,
}

/// One statement's rows.
struct Batch<'a> {
    user: &'a UserId,
    entries: &'a [Entry],
}

/// Loads all of `source`, `concurrency` statements at once, of as many users as can be.
///
/// # Errors
/// If the server refuses a statement or does not answer; what was loaded stays.
pub async fn load(client: &Client, signer: &Signer, source: &Source, concurrency: usize) -> anyhow::Result<Loaded> {
    let progress = Progress::start("rows loaded", source.rows() as u64);
    let work = stream::iter(batches(source)).map(|batch| write(client, signer, batch, &progress));
    let loaded = work.buffer_unordered(concurrency).try_fold(Loaded::default(), |sum, one| async move {
        Ok(Loaded {
            written: sum.written + one.written,
            present: sum.present + one.present,
            statements: sum.statements + one.statements,
        })
    });
    let loaded = loaded.await;
    progress.finish();
    loaded
}

/// First batches of all users, then second ones, and so on: many users at once.
fn batches(source: &Source) -> Vec<Batch<'_>> {
    let mut batches: Vec<(usize, Batch<'_>)> = Vec::new();
    for (user, entries) in source.by_rows() {
        let mut rest = entries;
        for turn in 0.. {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(batch_rows(rest));
            batches.push((turn, Batch { user, entries: now }));
            rest = later;
        }
    }
    batches.sort_by_key(|(turn, _)| *turn);
    batches.into_iter().map(|(_, batch)| batch).collect()
}

fn batch_rows(entries: &[Entry]) -> usize {
    let mut bytes = 0;
    let fitting = entries.iter().take(ROWS_MAX).take_while(|entry| {
        bytes += entry.body.len();
        bytes <= BYTES_MAX
    });
    fitting.count().max(1)
}

async fn write(client: &Client, signer: &Signer, batch: Batch<'_>, progress: &Progress) -> anyhow::Result<Loaded> {
    let token = signer.token(batch.user, Role::User)?;
    let mut missing: Vec<&Entry> = batch.entries.iter().collect();
    for _ in 0..TRIES {
        if missing.is_empty() {
            break;
        }
        match insert(client, &token, &missing).await {
            Ok(()) => {
                progress.advance(batch.entries.len() as u64);
                let written = missing.len() as u64;
                return Ok(Loaded { written, present: batch.entries.len() as u64 - written, statements: 1 });
            }
            Err(failure) if failure.is("DUPLICATE_KEY") => {
                let present = present(client, &token, batch.entries).await?;
                missing = batch.entries.iter().filter(|entry| !present.contains(&key(entry))).collect();
            }
            Err(failure) => {
                return Err(failure).with_context(|| format!("failed to load rows of `{}`", batch.user.as_str()));
            }
        }
    }
    anyhow::ensure!(missing.is_empty(), "others write the rows of `{}` at the same time", batch.user.as_str());
    progress.advance(batch.entries.len() as u64);
    Ok(Loaded { present: batch.entries.len() as u64, ..Loaded::default() })
}

async fn insert(client: &Client, token: &str, entries: &[&Entry]) -> Result<(), Failure> {
    let rows: Vec<String> = (0..entries.len()).map(placeholders).collect();
    let sql = format!(
        "INSERT INTO {TABLE} (package, version, distributions, urgency, changed_at, body) VALUES {}",
        rows.join(", ")
    );
    let params: Vec<Value> = entries.iter().flat_map(|entry| values(entry)).collect();
    client.sql(token, &sql, &params).await.map(|_| ())
}

fn placeholders(row: usize) -> String {
    let first = row * 6 + 1;
    let marks: Vec<String> = (first..first + 6).map(|number| format!("${number}")).collect();
    format!("({})", marks.join(", "))
}

/// An entry as the server takes and gives it, in the order of the columns.
pub fn values(entry: &Entry) -> [Value; 6] {
    [
        entry.package.as_str().into(),
        entry.version.as_str().into(),
        entry.distributions.as_str().into(),
        entry.urgency.as_deref().into(),
        entry.changed_at.into(),
        entry.body.as_str().into(),
    ]
}

fn key(entry: &Entry) -> (String, String) {
    (entry.package.clone(), entry.version.clone())
}

/// Which keys of the packages of `entries` exist.
async fn present(client: &Client, token: &str, entries: &[Entry]) -> anyhow::Result<HashSet<(String, String)>> {
    let mut packages: Vec<&str> = entries.iter().map(|entry| entry.package.as_str()).collect();
    packages.dedup();
    let marks: Vec<String> = (1..=packages.len()).map(|number| format!("${number}")).collect();
    let sql = format!("SELECT package, version FROM {TABLE} WHERE package IN ({})", marks.join(", "));
    let params: Vec<Value> = packages.into_iter().map(Value::from).collect();
    let answer = client.sql(token, &sql, &params).await.context("failed to ask which rows exist")?;
    let text = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let keys = answer.rows.iter().map(|row| Some((text(row.first())?, text(row.get(1))?)));
    keys.collect::<Option<_>>().context("the server answered keys that are no texts")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(body_bytes: usize) -> Entry {
        Entry {
            package: "a".into(),
            version: "1".into(),
            distributions: "unstable".into(),
            urgency: None,
            changed_at: Some(1),
            maintainer: "A <a@x>".into(),
            body: "x".repeat(body_bytes),
        }
    }

    #[test]
    fn a_batch_ends_at_its_rows_or_its_bytes_and_is_never_empty() {
        assert_eq!(batch_rows(&vec![entry(1); 150]), ROWS_MAX);
        assert_eq!(batch_rows(&vec![entry(BYTES_MAX / 3); 5]), 3);
        assert_eq!(batch_rows(&vec![entry(BYTES_MAX + 1); 5]), 1);
    }

    #[test]
    fn parameters_are_numbered_on_through_a_statement() {
        assert_eq!(placeholders(0), "($1, $2, $3, $4, $5, $6)");
        assert_eq!(placeholders(1), "($7, $8, $9, $10, $11, $12)");
    }
}
