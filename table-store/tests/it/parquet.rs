//! Parquet files: what is written reads back, is laid out as promised, and answers which keys it holds.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;

use arrow_array::types::Int64Type;
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, Int16Array, Int32Array, Int64Array, ListArray,
    RecordBatch, StringArray, Time64MicrosecondArray, TimestampMicrosecondArray,
};
use bytes::Bytes;
use kalamdb_model::catalog::{FIELD_ID_METADATA, TableEntry};
use kalamdb_model::value::Value;
use kalamdb_table_store::parquet_file::{self, FileStats, ReadError, WriteError, key_of, locate_keys, metadata_keys};
use kalamdb_table_store::{DataFiles, FileEntry, Footers, Positions, parquet_read};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use parquet::arrow::async_reader::AsyncFileReader;
use parquet::file::metadata::PageIndexPolicy;

use crate::backend::Store;
use crate::sample::{batch, table};

fn write(table: &TableEntry, batches: Vec<RecordBatch>) -> Result<(Bytes, FileStats), WriteError<Infallible>> {
    let mut out = Vec::new();
    let stats = parquet_file::write(table, 5, batches.into_iter().map(Ok::<_, Infallible>), &mut out)?;
    assert_eq!(stats.bytes, out.len() as u64);
    Ok((out.into(), stats))
}

fn entry(stats: &FileStats) -> FileEntry {
    FileEntry {
        path: "users/a/app/t/file.parquet".to_owned(),
        rows: stats.rows,
        bytes: stats.bytes,
        raw_bytes: stats.raw_bytes,
        widest_row: stats.widest_row,
        min_key: stats.min_key.clone(),
        max_key: stats.max_key.clone(),
        min_seq: stats.min_seq,
        max_seq: stats.max_seq,
        schema_version: 3,
        created_us: 0,
        tombstones: stats.tombstones.clone(),
        deleted_since_us: stats.deleted_since_us,
        replaced: Positions::default(),
    }
}

pub async fn upload(store: &Store, table: &TableEntry, batches: Vec<RecordBatch>) -> FileEntry {
    let (bytes, stats) = write(table, batches).unwrap();
    let entry = entry(&stats);
    store.put(&Path::parse(&entry.path).unwrap(), PutPayload::from_bytes(bytes)).await.unwrap();
    entry
}

pub fn texts(values: impl IntoIterator<Item = String>) -> ArrayRef {
    Arc::new(StringArray::from_iter_values(values))
}

pub fn longs(values: impl IntoIterator<Item = i64>) -> ArrayRef {
    Arc::new(Int64Array::from_iter_values(values))
}

/// A table with one key column of each type, and 40 rows of it with rising keys.
fn keyed_tables() -> Vec<(TableEntry, RecordBatch)> {
    let n = || 0..40_i32;
    let long = || n().map(i64::from);
    let uuids = || texts(n().map(|n| format!("0190a0b0-{n:04x}-7000-8000-00000000000{}", n % 10)));
    let words = || texts(n().map(|n| format!("w{n:03}\u{0}{}é", "x".repeat(70))));
    let decimals = Decimal128Array::from_iter_values(n().map(|n| i128::from(n) * 10_i128.pow(30) - 10_i128.pow(31)));
    let keys: Vec<(&str, ArrayRef)> = vec![
        ("SMALLINT", Arc::new(Int16Array::from_iter_values(-20..20))),
        ("INT", Arc::new(Int32Array::from_iter_values(n().map(|n| n - 20)))),
        ("BIGINT", longs(long().map(|n| n * 1_000_000_007 - 9))),
        ("DECIMAL(38,4)", Arc::new(decimals.with_precision_and_scale(38, 4).unwrap())),
        ("TEXT", words()),
        ("BYTES", Arc::new(BinaryArray::from_iter_values(n().map(|n| vec![0, u8::try_from(n).unwrap(), 255])))),
        ("TIMESTAMP", Arc::new(TimestampMicrosecondArray::from_iter_values(long()).with_timezone("UTC"))),
        ("DATE", Arc::new(Date32Array::from_iter_values(n().map(|n| n - 20)))),
        ("TIME", Arc::new(Time64MicrosecondArray::from_iter_values(long()))),
        ("UUID", uuids()),
    ];
    let body = || texts(n().map(|n| format!("body {n}")));
    let mut tables: Vec<_> = keys
        .into_iter()
        .map(|(ty, key)| {
            let table = table(&[("body", "TEXT", false), ("k", ty, true)]);
            let rows = batch(&table, vec![body(), key], 100);
            (table, rows)
        })
        .collect();
    let composite =
        table(&[("flag", "BOOLEAN", true), ("body", "TEXT", false), ("word", "TEXT", true), ("n", "BIGINT", true)]);
    let flags: ArrayRef = Arc::new(BooleanArray::from_iter(n().map(|n| Some(n >= 20))));
    let few = texts(n().map(|n| format!("w{}", n / 4)));
    let rows = batch(&composite, vec![flags, body(), few, longs(long())], 100);
    tables.push((composite, rows));
    tables
}

/// The files of a store, without a cache.
pub fn files(store: &Store) -> DataFiles {
    DataFiles::new(Arc::clone(store), "test".into(), Footers::default())
}

pub async fn keys_are_found_in_files_of_every_key_type(store: Store) {
    for (table, rows) in keyed_tables() {
        // Every second row is in the file.
        let kept = BooleanArray::from_iter((0..rows.num_rows()).map(|row| Some(row % 2 == 0)));
        let written = arrow::compute::filter_record_batch(&rows, &kept).unwrap();
        let file = upload(&store, &table, vec![written]).await;
        let key = |row: usize| key_of(&table, &rows, row).unwrap();
        let wanted: BTreeSet<_> = (0..rows.num_rows()).map(key).collect();
        let expected: BTreeMap<_, u32> =
            (0..).zip((0..rows.num_rows()).step_by(2).map(key)).map(|(at, key)| (key, at)).collect();
        assert_eq!(
            locate_keys(&files(&store), &file, &table, &wanted).await.unwrap(),
            expected,
            "{:?}",
            table.columns[1].ty
        );
        let absent = BTreeSet::from([key(1), key(39), vec![], vec![0xFF; 9]]);
        assert!(locate_keys(&files(&store), &file, &table, &absent).await.unwrap().is_empty());
    }
}

pub async fn a_file_that_is_not_what_its_entry_says_is_an_error(store: Store) {
    let table = table(&[("id", "BIGINT", true), ("body", "TEXT", false)]);
    let rows = batch(&table, vec![longs(0..9_000), texts((0..9_000).map(|n| format!("{n}")))], 1);
    let keys = BTreeSet::from([key_of(&table, &rows, 5).unwrap()]);
    let file = upload(&store, &table, vec![rows]).await;
    assert_eq!(locate_keys(&files(&store), &file, &table, &keys).await.unwrap().into_values().collect::<Vec<_>>(), [5]);
    let fewer = FileEntry { rows: 8_999, ..file.clone() };
    assert!(matches!(locate_keys(&files(&store), &fewer, &table, &keys).await, Err(ReadError::Rows { .. })));
    let path = Path::parse(&file.path).unwrap();
    let bytes = store.get(&path).await.unwrap().bytes().await.unwrap();
    store.put(&path, PutPayload::from_bytes(bytes.slice(..bytes.len() / 2))).await.unwrap();
    assert!(matches!(locate_keys(&files(&store), &file, &table, &keys).await, Err(ReadError::File { .. })));
    store.delete(&path).await.unwrap();
    assert!(matches!(locate_keys(&files(&store), &file, &table, &keys).await, Err(ReadError::File { .. })));
    let elsewhere = BTreeSet::from([vec![0xFF; 8]]);
    assert!(locate_keys(&files(&store), &file, &table, &elsewhere).await.unwrap().is_empty(), "no request is needed");
}

#[tokio::test]
async fn a_reader_takes_no_file_of_other_rows_from_the_store_or_from_memory() {
    let store = crate::backend::memory();
    let table = table(&[("id", "BIGINT", true)]);
    let file = upload(&store, &table, vec![batch(&table, vec![longs(0..10)], 1)]).await;
    let files = DataFiles::new(Arc::clone(&store), "test".into(), Footers::new(1 << 20));
    let read = async |rows: u64| {
        let mut reader = files.reader(Path::parse(&file.path).unwrap(), file.bytes, rows);
        reader.get_metadata(None).await.map(|footer| footer.file_metadata().num_rows())
    };
    let refused = async |rows: u64| read(rows).await.unwrap_err().to_string();
    assert!(refused(9).await.ends_with("has 10 rows, its manifest says 9"), "{}", refused(9).await);
    assert_eq!(read(10).await.unwrap(), 10);
    assert!(refused(11).await.ends_with("has 10 rows, its manifest says 11"), "{}", refused(11).await);
}

fn read(bytes: &Bytes) -> ParquetRecordBatchReaderBuilder<Bytes> {
    let options = ArrowReaderOptions::new().with_page_index_policy(PageIndexPolicy::Required);
    ParquetRecordBatchReaderBuilder::try_new_with_options(bytes.clone(), options).unwrap()
}

#[test]
fn every_row_and_type_reads_back_as_it_was_written() {
    let columns = [
        ("id", "BIGINT", true),
        ("a", "BOOLEAN", false),
        ("b", "DOUBLE", false),
        ("c", "JSON", false),
        ("d", "ARRAY<BIGINT>", false),
        ("e", "DECIMAL(18,4)", false),
        ("f", "UUID", false),
        ("g", "TEXT", false),
    ];
    let table = table(&columns);
    let lists = ListArray::from_iter_primitive::<Int64Type, _, _>([Some(vec![Some(1), None]), None, Some(vec![])]);
    let decimals = Decimal128Array::from(vec![Some(12_345), None, Some(-1)]).with_precision_and_scale(18, 4).unwrap();
    let own: Vec<ArrayRef> = vec![
        longs([1, 2, i64::MAX]),
        Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
        Arc::new(arrow_array::Float64Array::from(vec![Some(f64::NAN), None, Some(-0.0)])),
        Arc::new(StringArray::from(vec![Some("{\"a\":1.10}"), None, Some("null")])),
        Arc::new(lists),
        Arc::new(decimals),
        Arc::new(StringArray::from(vec![Some("0190a0b0-0000-7000-8000-000000000000"), None, None])),
        Arc::new(StringArray::from(vec![Some(""), None, Some("é\u{0}🦀")])),
    ];
    let rows = batch(&table, own, 100);
    let (bytes, stats) = write(&table, vec![rows.slice(0, 1), rows.slice(1, 2)]).unwrap();
    assert_eq!((stats.rows, stats.min_seq, stats.max_seq), (3, 100, 102));
    assert_eq!(stats.min_key, key_of(&table, &rows, 0).unwrap());
    assert_eq!(stats.max_key, key_of(&table, &rows, 2).unwrap());
    let found: Vec<RecordBatch> = read(&bytes).build().unwrap().collect::<Result<_, _>>().unwrap();
    let found = arrow::compute::concat_batches(&found[0].schema(), &found).unwrap();
    assert_eq!(found, rows);
    for (field, own) in found.schema().fields().iter().zip(table.arrow_schema().fields()) {
        assert_eq!(field.metadata().get(FIELD_ID_METADATA), own.metadata().get(FIELD_ID_METADATA));
    }
}

/// Steps of equal size that add up to more than their type, in both directions.
#[tokio::test]
async fn every_row_is_read_by_its_position_however_far_integers_are_apart() {
    let table = table(&[
        ("id", "BIGINT", true),
        ("s", "SMALLINT", false),
        ("i", "INT", false),
        ("b", "BIGINT", false),
        ("d", "DATE", false),
    ]);
    let rows: Vec<i64> = (0..100).collect();
    let step = |row: &i64| *row % 3 - 1;
    let columns: Vec<ArrayRef> = vec![
        longs(rows.clone()),
        Arc::new(Int16Array::from_iter_values(rows.iter().map(|row| 30_000 * step(row) as i16))),
        Arc::new(Int32Array::from_iter_values(rows.iter().map(|row| 2_000_000_000 * step(row) as i32))),
        longs(rows.iter().map(|row| 9_000_000_000_000_000_000 * step(row))),
        Arc::new(Date32Array::from_iter_values(rows.iter().map(|row| i32::MAX * step(row) as i32))),
    ];
    for count in [3, 4, 100] {
        let own = columns.iter().map(|array| array.slice(0, count)).collect();
        let store: Store = Arc::new(object_store::memory::InMemory::new());
        let file = upload(&store, &table, vec![batch(&table, own, 1)]).await;
        for row in 0..u32::try_from(count).unwrap() {
            let found =
                parquet_read::read_rows(&files(&store), &file, &table, &[row].into_iter().collect()).await.unwrap();
            let by = step(&i64::from(row));
            let expected = vec![
                Value::BigInt(i64::from(row)),
                Value::SmallInt(30_000 * by as i16),
                Value::Int(2_000_000_000 * by as i32),
                Value::BigInt(9_000_000_000_000_000_000 * by),
                Value::Date(i32::MAX * by as i32),
            ];
            assert_eq!(found, [expected], "row {row} of {count}");
        }
    }
}

#[test]
fn a_large_file_is_laid_out_as_promised() {
    let table =
        table(&[("room", "TEXT", true), ("id", "BIGINT", true), ("kind", "TEXT", false), ("body", "TEXT", false)]);
    let rows = |from: i64| {
        let n = || from..from + 10_000;
        let own = vec![
            texts(n().map(|n| format!("room {:05}", n / 100))),
            longs(n()),
            texts(n().map(|n| format!("kind {}", n % 7))),
            texts(n().map(|n| format!("body {n}"))),
        ];
        batch(&table, own, from)
    };
    let (bytes, stats) = write(&table, (0..7).map(|n| rows(n * 10_000)).collect()).unwrap();
    assert_eq!(stats.rows, 70_000);
    let reader = read(&bytes);
    let metadata = reader.metadata();
    let groups: Vec<i64> = metadata.row_groups().iter().map(|group| group.num_rows()).collect();
    assert_eq!(groups, [32_768, 32_768, 4_464]);
    let pages = metadata.offset_index().unwrap()[0][3].page_locations();
    assert_eq!(pages[1].first_row_index - pages[0].first_row_index, 1_024);
    let group = metadata.row_group(0);
    let sorting: Vec<_> = group.sorting_columns().unwrap().iter().map(|by| (by.column_idx, by.descending)).collect();
    assert_eq!(sorting, [(0, false), (1, false)]);
    let dictionary: Vec<bool> = (0..4).map(|at| group.column(at).dictionary_page_offset().is_some()).collect();
    assert_eq!(dictionary, [true, false, true, false]);
    let bloom: Vec<bool> = (0..4).map(|at| group.column(at).bloom_filter_offset().is_some()).collect();
    assert_eq!(bloom, [true, true, false, false]);
    let ids: Vec<i32> = (0..4).map(|at| group.column(at).column_descr().self_type().get_basic_info().id()).collect();
    assert_eq!(ids, [1, 2, 3, 4]);
    let of_file = |key: &str| {
        let pairs = metadata.file_metadata().key_value_metadata().unwrap();
        pairs.iter().find(|pair| pair.key == key).and_then(|pair| pair.value.clone()).unwrap()
    };
    let facts = [
        metadata_keys::TABLE_ID,
        metadata_keys::SCHEMA_VERSION,
        metadata_keys::EPOCH,
        metadata_keys::MIN_SEQ,
        metadata_keys::MAX_SEQ,
    ]
    .map(of_file);
    assert_eq!(facts, ["1", "3", "5", "0", "69999"]);
}

#[test]
fn a_row_group_ends_at_64_mib_of_decoded_rows_however_little_they_take_encoded() {
    let table = table(&[("id", "BIGINT", true), ("body", "TEXT", false)]);
    let rows = |ids: Range<i64>| {
        let bodies = texts(ids.clone().map(|_| "x".repeat(1 << 20)));
        batch(&table, vec![longs(ids.clone()), bodies], ids.start)
    };
    for batches in [vec![rows(0..70)], (0..70).map(|id| rows(id..id + 1)).collect()] {
        let (bytes, stats) = write(&table, batches).unwrap();
        let groups: Vec<i64> = read(&bytes).metadata().row_groups().iter().map(|group| group.num_rows()).collect();
        assert_eq!(groups, [63, 7]);
        // Beside the text and its offset: three times eight bytes, and a boolean.
        let row = (1 << 20) + 4 + 3 * 8 + 1;
        assert_eq!((stats.raw_bytes, stats.widest_row), (70 * row, row));
        assert!(stats.bytes < 1 << 20, "{} bytes", stats.bytes);
    }
}

#[test]
fn a_single_number_as_key_has_no_bloom_filter_and_a_small_file_neither() {
    let has_bloom = |table: &TableEntry, rows| {
        let (bytes, _) = write(table, vec![rows]).unwrap();
        read(&bytes).metadata().row_group(0).column(0).bloom_filter_offset().is_some()
    };
    let numbers = table(&[("id", "BIGINT", true)]);
    assert!(!has_bloom(&numbers, batch(&numbers, vec![longs(0..2_000)], 1)));
    let words = table(&[("id", "TEXT", true)]);
    let rows = |n| batch(&words, vec![texts((0..n).map(|n| format!("{n:06}")))], 1);
    assert!(has_bloom(&words, rows(1_024)));
    assert!(!has_bloom(&words, rows(1_023)));
}

#[test]
fn rows_out_of_key_order_are_refused_within_and_between_batches() {
    let table = table(&[("id", "BIGINT", true)]);
    let ids = |ids: &[i64]| batch(&table, vec![longs(ids.iter().copied())], 1);
    let refused_at = |batches: Vec<RecordBatch>| match write(&table, batches) {
        Err(WriteError::Order { row }) => row,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused_at(vec![ids(&[1, 3, 2])]), 2);
    assert_eq!(refused_at(vec![ids(&[1, 1])]), 1);
    assert_eq!(refused_at(vec![ids(&[1, 2]), ids(&[2, 3])]), 2);
    assert!(matches!(write(&table, vec![]), Err(WriteError::Empty)));
    assert!(matches!(write(&table, vec![ids(&[])]), Err(WriteError::Empty)));
    let other = self::table(&[("other", "BIGINT", true)]);
    let foreign = batch(&other, vec![longs([1])], 1);
    assert!(matches!(write(&table, vec![foreign]), Err(WriteError::Schema(_))));
}

#[tokio::test]
async fn only_pages_whose_range_holds_a_key_are_read() {
    let truth = crate::backend::memory();
    let table = table(&[("id", "BIGINT", true), ("body", "TEXT", false)]);
    let body = |n: i64| format!("{n:016x}{}", n.wrapping_mul(6_364_136_223_846_793_005));
    // Gaps that no encoding can shrink, so that the key column of a group weighs something.
    let id = |n: i64| (n << 40) | (n.wrapping_mul(6_364_136_223_846_793_005).unsigned_abs() >> 25) as i64;
    let rows = batch(&table, vec![longs((0..200_000).map(id)), texts((0..200_000).map(body))], 1);
    let wanted = BTreeSet::from([key_of(&table, &rows, 100_000).unwrap()]);
    let file = upload(&truth, &table, vec![rows]).await;
    let counted = Arc::new(crate::parquet::counted::Counted::new(truth));
    let store: Store = Arc::clone(&counted) as Store;
    let located = locate_keys(&files(&store), &file, &table, &wanted).await.unwrap();
    assert_eq!(located.into_keys().collect::<BTreeSet<_>>(), wanted);
    let read = counted.bytes();
    // Half a MiB of it is the end of the file, the rest one page of its keys.
    assert!(read < (512 + 16) << 10 && file.bytes > 3_000_000, "{read} of {} bytes", file.bytes);
}

#[tokio::test]
async fn keys_are_found_on_every_page_however_its_bounds_were_cut() {
    let store = crate::backend::memory();
    let n = || 0..6_000_i64;
    // Bounds of text are cut to 64 bytes: here those of all pages become the same.
    let long = table(&[("id", "TEXT", true)]);
    let long = (long.clone(), batch(&long, vec![texts(n().map(|n| format!("{}{n:05}", "x".repeat(80))))], 1));
    // A value of the first key column goes over several pages.
    let wide = table(&[("room", "TEXT", true), ("id", "BIGINT", true)]);
    let rooms = texts(n().map(|n| format!("room {}", n / 2_500)));
    let wide = (wide.clone(), batch(&wide, vec![rooms, longs(n())], 1));
    let numbers = table(&[("id", "BIGINT", true)]);
    let numbers = (numbers.clone(), batch(&numbers, vec![longs(n().map(|n| n * 3 - 7_000))], 1));
    for (table, rows) in [long, wide, numbers] {
        let kept = BooleanArray::from_iter((0..rows.num_rows()).map(|row| Some(row % 2 == 0)));
        let file = upload(&store, &table, vec![arrow::compute::filter_record_batch(&rows, &kept).unwrap()]).await;
        let located = async |wanted: &[usize]| {
            let keys = wanted.iter().map(|row| key_of(&table, &rows, *row).unwrap()).collect();
            locate_keys(&files(&store), &file, &table, &keys).await.unwrap().into_values().collect::<Vec<u32>>()
        };
        for row in (0..6_000).step_by(397).chain([2_046, 2_048, 4_094, 4_096, 4_998, 5_000, 5_998]) {
            let expected: &[u32] = if row % 2 == 0 { &[u32::try_from(row / 2).unwrap()] } else { &[] };
            assert_eq!(located(&[row]).await, expected, "row {row}");
        }
        assert_eq!(located(&[1, 2, 2_047, 2_048, 5_998, 5_999]).await, [1, 1_024, 2_999]);
        assert_eq!(located(&(0..6_000).collect::<Vec<_>>()).await, (0..3_000).collect::<Vec<_>>());
    }
}

mod counted {
    //! Counts what is read.

    use std::ops::Range;
    use std::sync::atomic::{AtomicU64, Ordering};

    use async_trait::async_trait;
    use bytes::Bytes;
    use futures::stream::BoxStream;
    use object_store::path::Path;
    use object_store::{
        CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
        PutOptions, PutPayload, PutResult, Result,
    };

    use crate::backend::Store;

    #[derive(Debug)]
    pub struct Counted(Store, AtomicU64);

    impl Counted {
        pub fn new(store: Store) -> Self {
            Self(store, AtomicU64::new(0))
        }

        pub fn bytes(&self) -> u64 {
            self.1.load(Ordering::Relaxed)
        }
    }

    impl std::fmt::Display for Counted {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            self.0.fmt(f)
        }
    }

    #[async_trait]
    impl ObjectStore for Counted {
        async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
            self.0.put_opts(location, payload, opts).await
        }
        async fn put_multipart_opts(&self, at: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
            self.0.put_multipart_opts(at, opts).await
        }
        async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
            let result = self.0.get_opts(location, options).await?;
            self.1.fetch_add(result.range.end - result.range.start, Ordering::Relaxed);
            Ok(result)
        }
        async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
            let found = self.0.get_ranges(location, ranges).await?;
            self.1.fetch_add(found.iter().map(|bytes| bytes.len() as u64).sum(), Ordering::Relaxed);
            Ok(found)
        }
        fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
            self.0.delete_stream(locations)
        }
        fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
            self.0.list(prefix)
        }
        async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
            self.0.list_with_delimiter(prefix).await
        }
        async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
            self.0.copy_opts(from, to, options).await
        }
    }
}
