//! What the server says afterwards, against the files: counts and every value, as each user.

use std::collections::BTreeMap;

use anyhow::Context as _;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use kalamdb_model::{Role, UserId};
use serde_json::Value;

use super::TABLE;
use super::changelog::Entry;
use super::load::values;
use super::source::Source;
use crate::client::{Answer, Client};
use crate::progress::Progress;
use crate::token::Signer;

/// One user's rows on both sides.
pub struct Compared<'a> {
    /// The user.
    pub user: &'a UserId,
    /// Rows in the files.
    pub in_files: u64,
    /// What `count(*)` says.
    pub counted: u64,
    /// Rows that the server does not have, or has with other values.
    pub missing: u64,
    /// Rows that the server shows to this user and the files do not have as his.
    pub foreign: u64,
}

impl Compared<'_> {
    /// Whether both sides are the same, value for value.
    pub const fn agrees(&self) -> bool {
        self.in_files == self.counted && self.missing == 0 && self.foreign == 0
    }
}

/// Compares all users, most rows first.
///
/// # Errors
/// If the server refuses or does not answer.
pub async fn compare<'a>(
    client: &Client,
    signer: &Signer,
    source: &'a Source,
    concurrency: usize,
) -> anyhow::Result<Vec<Compared<'a>>> {
    let progress = Progress::start("users compared", source.users.len() as u64);
    let work = stream::iter(source.by_rows()).map(|(user, entries)| {
        let progress = &progress;
        async move {
            let compared = compare_user(client, signer, user, entries).await;
            progress.advance(1);
            compared.with_context(|| format!("failed to compare the rows of `{}`", user.as_str()))
        }
    });
    let compared = work.buffered(concurrency).try_collect().await;
    progress.finish();
    compared
}

async fn compare_user<'a>(
    client: &Client,
    signer: &Signer,
    user: &'a UserId,
    entries: &[Entry],
) -> anyhow::Result<Compared<'a>> {
    let token = signer.token(user, Role::User)?;
    let counted = number(&client.sql(&token, &format!("SELECT count(*) FROM {TABLE}"), &[]).await?)?;
    let columns = "package, version, distributions, urgency, changed_at, body";
    let answer = client.sql(&token, &format!("SELECT {columns} FROM {TABLE}"), &[]).await?;
    let (missing, foreign) = differences(entries, answer.rows);
    Ok(Compared { user, in_files: entries.len() as u64, counted, missing, foreign })
}

/// Entries that no row equals, and rows that no entry equals; a row twice is one too many.
fn differences(entries: &[Entry], rows: Vec<Vec<Value>>) -> (u64, u64) {
    let key = |values: &[Value]| values.iter().take(2).map(ToString::to_string).collect::<Vec<_>>();
    let mut expected: BTreeMap<Vec<String>, [Value; 6]> = BTreeMap::new();
    for values in entries.iter().map(values) {
        expected.insert(key(&values), values);
    }
    let mut foreign = 0;
    for row in rows {
        match expected.remove(&key(&row)) {
            Some(values) if values == row[..] => {}
            Some(values) => {
                foreign += 1;
                expected.insert(key(&row), values);
            }
            None => foreign += 1,
        }
    }
    (expected.len() as u64, foreign)
}

/// The single number of an answer such as `count(*)`.
///
/// # Errors
/// If the answer is something else.
pub fn number(answer: &Answer) -> anyhow::Result<u64> {
    let value = answer.rows.first().and_then(|row| row.first()).and_then(Value::as_str);
    let parsed = value.and_then(|text| text.parse().ok());
    parsed.with_context(|| format!("the answer to a count is no number: {:?}", answer.rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(version: &str) -> Entry {
        Entry {
            package: "a".into(),
            version: version.into(),
            distributions: "unstable".into(),
            urgency: Some("low".into()),
            changed_at: Some(1),
            maintainer: "A <a@x>".into(),
            body: "  * x".into(),
        }
    }

    #[test]
    fn every_difference_is_counted() {
        let row = |entry: &Entry| values(entry).to_vec();
        let (one, two, three) = (entry("1"), entry("2"), entry("3"));
        let entries = [one.clone(), two.clone()];
        assert_eq!(differences(&entries, vec![row(&two), row(&one)]), (0, 0));
        assert_eq!(differences(&entries, vec![row(&one)]), (1, 0));
        assert_eq!(differences(&entries, vec![row(&one), row(&two), row(&three)]), (0, 1));
        assert_eq!(differences(&entries, vec![row(&one), row(&two), row(&one)]), (0, 1));
        let mut changed = row(&two);
        changed[5] = "  * y".into();
        assert_eq!(differences(&entries, vec![row(&one), changed]), (1, 1));
    }
}
