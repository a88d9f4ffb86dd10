//! Five queries as the busiest maintainer, and the check that another one sees none of his rows.

use std::collections::HashSet;
use std::time::Instant;

use anyhow::Context as _;
use chrono::DateTime;
use kalamdb_model::{Role, UserId};
use serde_json::Value;

use super::TABLE;
use super::changelog::Entry;
use super::check::number;
use super::source::Source;
use crate::client::Client;
use crate::token::Signer;

/// Times each query runs; the fastest is shown beside the first.
const RUNS: usize = 5;
/// Keys of one user that another one asks for.
const KEYS_ASKED: usize = 200;

struct Query {
    what: &'static str,
    sql: &'static str,
    /// Column that is a time, shown as one.
    time: Option<usize>,
}

const QUERIES: [Query; 5] = [
    Query { what: "how many entries", sql: "SELECT count(*) FROM debian.changelogs", time: None },
    Query {
        what: "entries per year, newest first",
        sql: "SELECT date_part('year', changed_at) AS year, count(*) AS entries FROM debian.changelogs \
              WHERE changed_at IS NOT NULL GROUP BY 1 ORDER BY 1 DESC LIMIT 5",
        time: None,
    },
    Query {
        what: "packages with most entries",
        sql: "SELECT package, count(*) AS entries FROM debian.changelogs GROUP BY package ORDER BY entries DESC, package LIMIT 5",
        time: None,
    },
    Query {
        what: "search for `security`",
        sql: "SELECT package, version FROM debian.changelogs WHERE body LIKE '%security%' ORDER BY package, version LIMIT 5",
        time: None,
    },
    Query {
        what: "the newest five",
        sql: "SELECT package, version, changed_at FROM debian.changelogs ORDER BY changed_at DESC NULLS LAST LIMIT 5",
        time: Some(2),
    },
];

/// Runs the queries as the busiest user and asks for his rows as another. Returns whether nobody saw foreign rows.
///
/// # Errors
/// If the server refuses or does not answer.
pub async fn run(client: &Client, signer: &Signer, source: &Source) -> anyhow::Result<bool> {
    let users = source.by_rows();
    let Some((user, entries)) = users.first() else { return Ok(true) };
    println!("\nas {}:", user.as_str());
    let token = signer.token(user, Role::User)?;
    for query in &QUERIES {
        show(client, &token, query).await?;
    }
    match users.get(1) {
        Some((other, others)) => is_private(client, signer, (user, entries), (other, others)).await,
        None => Ok(true),
    }
}

async fn show(client: &Client, token: &str, query: &Query) -> anyhow::Result<()> {
    let mut times = Vec::with_capacity(RUNS);
    let mut rows = Vec::new();
    for _ in 0..RUNS {
        let started = Instant::now();
        rows = client.sql(token, query.sql, &[]).await.with_context(|| format!("failed: {}", query.sql))?.rows;
        times.push(started.elapsed().as_secs_f64() * 1_000.0);
    }
    let best = times.iter().copied().fold(f64::INFINITY, f64::min);
    println!("  {} ({:.1} ms, best of {RUNS}: {best:.1} ms)", query.what, times.first().copied().unwrap_or_default());
    for row in &rows {
        let shown: Vec<String> =
            row.iter().enumerate().map(|(at, value)| shown(value, query.time == Some(at))).collect();
        println!("      {}", shown.join("  "));
    }
    Ok(())
}

fn shown(value: &Value, is_time: bool) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Number(us) if is_time => {
            let time = us.as_i64().and_then(DateTime::from_timestamp_micros);
            time.map_or_else(|| us.to_string(), |time| time.format("%Y-%m-%d %H:%M:%S").to_string())
        }
        other => other.to_string(),
    }
}

/// Asks as `other` for keys that only `user` has.
async fn is_private(
    client: &Client,
    signer: &Signer,
    (user, entries): (&UserId, &[Entry]),
    (other, others): (&UserId, &[Entry]),
) -> anyhow::Result<bool> {
    let own: HashSet<(&str, &str)> =
        others.iter().map(|entry| (entry.package.as_str(), entry.version.as_str())).collect();
    let foreign = entries.iter().filter(|entry| !own.contains(&(entry.package.as_str(), entry.version.as_str())));
    let keys: Vec<Value> =
        foreign.take(KEYS_ASKED).map(|entry| format!("{} {}", entry.package, entry.version).into()).collect();
    if keys.is_empty() {
        return Ok(true);
    }
    let marks: Vec<String> = (1..=keys.len()).map(|number| format!("${number}")).collect();
    let sql = format!("SELECT count(*) FROM {TABLE} WHERE package || ' ' || version IN ({})", marks.join(", "));
    let count = async |who| anyhow::Ok(number(&client.sql(&signer.token(who, Role::User)?, &sql, &keys).await?)?);
    let (to_owner, to_other) = (count(user).await?, count(other).await?);
    println!(
        "\nof {} rows of {}, he is shown {to_owner} and {} is shown {to_other}",
        keys.len(),
        user.as_str(),
        other.as_str()
    );
    let private = to_other == 0 && to_owner == keys.len() as u64;
    if !private {
        println!("  WRONG: it must be {} and 0", keys.len());
    }
    Ok(private)
}
