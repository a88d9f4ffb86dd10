//! Outside readers: the Parquet files, read as `docs/formats.md` says, are what SELECT shows.
//!
//! `KALAMDB_TEST_PYTHON` is a Python with what `e2e/outside/read.py` needs (`e2e/outside/venv.sh` prints one). Without it
//! the test of that reader says that it did not run; with `KALAMDB_TEST_REQUIRE_PYTHON=1` or `CI=true` it fails instead.

use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, ensure};
use arrow::array::AsArray as _;
use arrow::datatypes::Int64Type;
use kalamdb_table_store::FileEntry;
use kalamdb_test_support::pod::{Home, MANIFESTS, Pod, eventually, files_below};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::{Value, json};

use crate::types::{COLUMNS, VALUES};
use crate::{BINARY, declare, user_table};

/// What is written from `docs/formats.md` alone.
const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../e2e/outside/read.py");

/// Users, with the folders of their rows as that page says.
const USERS: [(&str, &str); 2] = [("alice", "users/alice/app/v"), ("A é/%", "users/%41%20%c3%a9%2f%25/app/v")];

const KEY: [&str; 2] = ["part, type: TEXT, primaryKey: true", "id, type: BIGINT, primaryKey: true"];

/// Columns that come later. Old rows show the literal defaults, and NULL for the others.
#[rustfmt::skip]
const LATER: [&str; 15] = [
    r#"l_text, type: TEXT, default: "'it''s new'""#, r#"l_int, type: INT, nullable: false, default: "7""#,
    r#"l_bool, type: BOOLEAN, default: "true""#, r#"l_float, type: FLOAT, default: "0.1""#,
    r#"l_double, type: DOUBLE, default: "1e300""#, r#"l_money, type: "DECIMAL(10,2)", default: "1.5""#,
    r#"l_bytes, type: BYTES, default: "AP8=""#, r#"l_json, type: JSON, default: '{"a": 1.10}'"#,
    r#"l_stamp, type: TIMESTAMP, default: "2024-02-29T12:00:00+02:00""#, r#"l_date, type: DATE, default: "2024-02-29""#,
    r#"l_time, type: TIME, default: "12:30""#, r#"l_ints, type: "ARRAY<INT>", default: "[1,null]""#,
    r#"l_uuid, type: UUID, default: "6F9619FF-8B86-D011-B42D-00CF4FC964FF""#,
    "l_none, type: TEXT", "l_now, type: TIMESTAMP, default: NOW()",
];

/// Statements that give files replaced and deleted rows.
const CHANGES: [&str; 4] = [
    "UPDATE app.v SET c_text = 'new' WHERE id IN (1, 50)",
    "DELETE FROM app.v WHERE id IN (3, 55)",
    "INSERT INTO app.v (part, id) VALUES ('y', 101), ('y', 102)",
    "STORAGE FLUSH TABLE app.v",
];

/// A row with [`LATER`].
const YOUNG: [&str; 2] = [
    "INSERT INTO app.v (part, id, l_text, l_int, l_money) VALUES ('x', 1000, 'own', 8, NULL)",
    "STORAGE FLUSH TABLE app.v",
];

/// What was written for outside readers of format 1 once, and beside it what SELECT showed: to be read so for ever.
const STORED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/outside-format-1");

#[tokio::test]
async fn the_files_without_deleted_and_replaced_rows_are_what_select_shows() -> anyhow::Result<()> {
    let home = Home::new(BINARY, MANIFESTS)?;
    let pod = home.start().await?;
    for sql in [
        "INSERT INTO app.messages (id, body) VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd')",
        "STORAGE FLUSH TABLE app.messages",
        "UPDATE app.messages SET body = 'new' WHERE id = 2",
        "DELETE FROM app.messages WHERE id = 3",
        "INSERT INTO app.messages (id, body) VALUES (5, 'e')",
        "STORAGE FLUSH TABLE app.messages",
        "DELETE FROM app.messages WHERE id = 5",
        "INSERT INTO app.messages (id, body) VALUES (3, 'back')",
        "STORAGE FLUSH TABLE app.messages",
    ] {
        pod.run("alice", sql, json!([])).await?;
    }
    let shown = crate::rows(&pod, "alice", "SELECT id, body FROM app.messages ORDER BY id", json!([])).await?;
    ensure!(shown == json!([["1", "a"], ["2", "new"], ["3", "back"], ["4", "d"]]), "{shown}");
    let root = home.data_dir().join("files");
    let (manifest, files) = manifest(&root.join("users/alice/app/messages"))?;
    ensure!(manifest["format"] == 1 && manifest["table"] == "app.messages", "{manifest}");
    ensure!(manifest["columns"][1]["name"] == "body" && manifest["key"] == json!([1]), "{manifest}");
    ensure!(files.len() == 3, "{manifest}");
    let mut found = Vec::new();
    for file in &files {
        let bytes = std::fs::File::open(root.join(&file.path))?;
        let mut at = 0;
        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            let batch = batch?;
            let ids = batch.column_by_name("id").context("id")?.as_primitive::<Int64Type>();
            let bodies = batch.column_by_name("body").context("body")?.as_string::<i32>();
            let deleted = batch.column_by_name("_deleted").context("_deleted")?.as_boolean();
            for row in 0..batch.num_rows() {
                ensure!(file.tombstones.contains(at) == deleted.value(row), "row {at} of {}", file.path);
                if !file.tombstones.contains(at) && !file.replaced.contains(at) {
                    found.push((ids.value(row), bodies.value(row).to_owned()));
                }
                at += 1;
            }
        }
    }
    found.sort();
    let found: Vec<_> = found.into_iter().map(|(id, body)| json!([id.to_string(), body])).collect();
    ensure!(shown == Value::Array(found.clone()), "{found:?}");
    Ok(())
}

#[tokio::test]
async fn a_reader_that_knows_only_the_docs_shows_every_value_as_select_does() -> anyhow::Result<()> {
    let Some(python) = python()? else { return Ok(()) };
    let home = Home::new(BINARY, &manifests(&[]))?;
    let pod = home.start().await?;
    for (user, _) in USERS {
        insert_all(&pod, user).await?;
    }
    let files = home.data_dir().join("files");
    let after = Outside { python, files: &files, pod: &pod };
    after.check("every type", &["STORAGE FLUSH TABLE app.v"]).await?;
    after.check("changed and deleted", &CHANGES).await?;
    for (user, folder) in USERS {
        let (_, files) = manifest(&files.join(folder))?;
        let replaced = files.iter().any(|file| !file.replaced.is_empty());
        let deleted = files.iter().any(|file| !file.tombstones.is_empty());
        ensure!(replaced && deleted, "`{user}`: {files:?}");
    }
    let changes = [
        "UPDATE app.v SET c_text = 'again' WHERE id = 50",
        "UPDATE app.v SET part = 'moved' WHERE id = 20",
        "INSERT INTO app.v (part, id, c_int) VALUES ('a', 3, 5)",
        "DELETE FROM app.v WHERE id = 101",
        "STORAGE FLUSH TABLE app.v",
    ];
    after.check("changed again and brought back", &changes).await?;
    add_columns(&home, &pod).await?;
    after.check("with new columns", &YOUNG).await?;
    after.check("compacted", &["STORAGE COMPACT TABLE app.v"]).await?;
    after.check("changed after that", &["DELETE FROM app.v WHERE id < 40", "STORAGE FLUSH TABLE app.v"]).await?;
    after.check("emptied", &["DELETE FROM app.v", "STORAGE FLUSH TABLE app.v"]).await
}

#[test]
fn a_stored_folder_is_still_read_as_it_was_shown() -> anyhow::Result<()> {
    let (root, (_, folder)) = (Path::new(STORED), USERS[0]);
    let shown = std::fs::read_to_string(root.join("rows.json"))?;
    let rows: Vec<Value> = serde_json::from_str(&shown)?;
    let (manifest, files) = manifest(&root.join(folder))?;
    let counted: u64 = files.iter().map(|file| file.rows - file.hidden().len()).sum();
    ensure!(manifest["format"] == 1 && counted == rows.len() as u64, "{counted} rows instead of {}", rows.len());
    let Some(python) = python()? else { return Ok(()) };
    let lines = read(&python, root, folder)?;
    ensure!(format!("[{}]", lines.join(",")) == shown, "files\n{lines:?}\n SELECT\n{shown}");
    Ok(())
}

/// Writes the sample if it is missing; one that is there stays as it is.
#[tokio::test]
#[ignore = "run by hand when a new kind of sample is added"]
async fn write_missing_samples() -> anyhow::Result<()> {
    let (root, (user, folder)) = (Path::new(STORED), USERS[0]);
    if root.exists() {
        return Ok(());
    }
    let home = Home::new(BINARY, &manifests(&[]))?;
    let mut pod = home.start().await?;
    insert_all(&pod, user).await?;
    for sql in ["STORAGE FLUSH TABLE app.v"].iter().chain(&CHANGES) {
        pod.run(user, sql, json!([])).await?;
    }
    add_columns(&home, &pod).await?;
    for sql in YOUNG {
        pod.run(user, sql, json!([])).await?;
    }
    let answer = pod.sql(user, "SELECT * FROM app.v ORDER BY part, id", json!([])).await?;
    let rows = answer.text.split_once("\"rows\":").and_then(|(_, rest)| rest.split_once(",\"row_count\":"));
    let (rows, _) = rows.context("rows")?;
    ensure!(pod.stop().await?.success());
    let (from, to) = (home.data_dir().join("files").join(folder), root.join(folder));
    std::fs::create_dir_all(&to)?;
    for file in files_below(&from)? {
        std::fs::copy(from.join(&file), to.join(&file))?;
    }
    Ok(std::fs::write(root.join("rows.json"), rows)?)
}

/// Rows with values of every type, in files and in the buffer.
async fn insert_all(pod: &Pod, user: &str) -> anyhow::Result<()> {
    for (at, (column, literal, ..)) in VALUES.iter().enumerate() {
        let part = ["a", "é", "🙂"][at % 3];
        let sql = format!("INSERT INTO app.v (part, id, {column}) VALUES ('{part}', {at}, {literal})");
        pod.run(user, &sql, json!([])).await?;
        if at == VALUES.len() / 2 {
            pod.run(user, "STORAGE FLUSH TABLE app.v", json!([])).await?;
        }
    }
    let sql = "INSERT INTO app.v (part, id, c_text) VALUES ('z', -100, $1), ('z', 100, $1)";
    pod.run(user, sql, json!([user])).await.map(drop)
}

/// Waits for the columns [`LATER`].
async fn add_columns(home: &Home, pod: &Pod) -> anyhow::Result<()> {
    home.write_manifest("all.yaml", &manifests(&LATER))?;
    eventually("the new columns are there", async || {
        Ok(pod.sql("alice", "SELECT l_now FROM app.v", json!([])).await?.status == 200)
    })
    .await
}

/// The lines that the reader prints of an instance.
fn read(python: &str, root: &Path, folder: &str) -> anyhow::Result<Vec<String>> {
    let read = Command::new(python).arg(READER).arg(root).arg(folder).output()?;
    ensure!(read.status.success(), "{}", String::from_utf8_lossy(&read.stderr));
    Ok(String::from_utf8(read.stdout)?.lines().map(str::to_owned).collect())
}

/// The reader, beside the pod whose files it reads.
struct Outside<'a> {
    python: String,
    files: &'a Path,
    pod: &'a Pod,
}

impl Outside<'_> {
    /// Runs `statements` for each user; then what the reader prints must be the rows of `SELECT *`, byte by byte.
    async fn check(&self, step: &str, statements: &[&str]) -> anyhow::Result<()> {
        for (user, folder) in USERS {
            for sql in statements {
                self.pod.run(user, sql, json!([])).await?;
            }
            let answer = self.pod.sql(user, "SELECT * FROM app.v ORDER BY part, id", json!([])).await?;
            let lines = read(&self.python, self.files, folder).with_context(|| format!("{step}, `{user}`"))?;
            let shown = format!(r#""rows":[{}],"row_count":{},"#, lines.join(","), lines.len());
            ensure!(answer.text.contains(&shown), "{step}, `{user}`: files\n{shown}\n SELECT\n{}", answer.text);
        }
        Ok(())
    }
}

/// The table `app.v`, with a column of each type and `later`.
fn manifests(later: &[&str]) -> String {
    let typed: Vec<String> = COLUMNS.iter().map(|(name, ty, _)| format!("{name}, type: \"{ty}\"")).collect();
    let all: Vec<&str> = KEY.into_iter().chain(typed.iter().map(String::as_str)).chain(later.iter().copied()).collect();
    declare(&[user_table("v", &all)])
}

/// The manifest for outside readers in `folder`, and its files.
fn manifest(folder: &Path) -> anyhow::Result<(Value, Vec<FileEntry>)> {
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("_manifest.json"))?)?;
    let files = serde_json::from_value(manifest["files"].clone())?;
    Ok((manifest, files))
}

/// The Python to run the reader with, if there is one.
fn python() -> anyhow::Result<Option<String>> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let python = variable("KALAMDB_TEST_PYTHON");
    if !python.is_empty() {
        return Ok(Some(python));
    }
    let required = variable("KALAMDB_TEST_REQUIRE_PYTHON") == "1" || variable("CI") == "true";
    ensure!(!required, "KALAMDB_TEST_PYTHON is not set; set it to what `e2e/outside/venv.sh` prints");
    writeln!(std::io::stderr(), "the outside reader was not tested: KALAMDB_TEST_PYTHON is not set")?;
    Ok(None)
}
