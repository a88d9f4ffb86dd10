//! Outside readers: the Parquet files, read as `docs/formats.md` says, are what SELECT shows.

use anyhow::{Context as _, ensure};
use arrow::array::AsArray as _;
use arrow::datatypes::Int64Type;
use kalamdb_table_store::FileEntry;
use kalamdb_test_support::pod::{Home, MANIFESTS};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::json;

use crate::BINARY;

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
    let manifest = std::fs::read(root.join("users/alice/app/messages/_manifest.json"))?;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    ensure!(manifest["format"] == 1 && manifest["table"] == "app.messages", "{manifest}");
    let files: Vec<FileEntry> = serde_json::from_value(manifest["files"].clone())?;
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
    ensure!(shown == serde_json::Value::Array(found.clone()), "{found:?}");
    Ok(())
}
