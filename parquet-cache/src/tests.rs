#![allow(clippy::single_range_in_vec_init, reason = "one range is what is asked for")]

use std::collections::HashSet;
use std::error::Error as _;
use std::fmt;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::sync::atomic::{AtomicBool, AtomicUsize};

use async_trait::async_trait;
use futures::StreamExt as _;
use futures::future::join_all;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStoreExt as _,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use proptest::prelude::*;
use tokio::sync::Semaphore;

use super::*;

const C: u64 = CHUNK_BYTES;
const MEMORY: usize = 64 << 20;

/// A store in memory that counts reads, and lets them wait or fail.
#[derive(Debug)]
struct Counting {
    below: InMemory,
    gets: AtomicUsize,
    fails: AtomicBool,
    panics: AtomicBool,
    gate: Semaphore,
}

impl Counting {
    async fn with(files: &[(&str, &Bytes)]) -> Arc<Self> {
        let below = InMemory::new();
        for (path, bytes) in files {
            below.put(&Path::from(*path), PutPayload::from_bytes(Bytes::clone(bytes))).await.unwrap();
        }
        let (fails, panics) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { below, gets: AtomicUsize::new(0), fails, panics, gate: Semaphore::new(1_000_000) })
    }

    fn gets(&self) -> usize {
        self.gets.load(Ordering::SeqCst)
    }

    /// Until [`Self::open`], reads wait.
    fn shut(&self) {
        self.gate.forget_permits(1_000_000);
    }

    fn open(&self) {
        self.gate.add_permits(1_000_000);
    }
}

impl fmt::Display for Counting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("counting")
    }
}

#[async_trait]
impl ObjectStore for Counting {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.below.put_opts(location, payload, opts).await
    }
    async fn put_multipart_opts(&self, at: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.below.put_multipart_opts(at, opts).await
    }
    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.gets.fetch_add(1, Ordering::SeqCst);
        let _passed = self.gate.acquire().await.unwrap();
        assert!(!self.panics.load(Ordering::SeqCst), "on purpose");
        if self.fails.load(Ordering::SeqCst) {
            return Err(Error::Generic { store: "counting", source: "503, on purpose".into() });
        }
        self.below.get_opts(location, options).await
    }
    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.below.delete_stream(locations)
    }
    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        self.below.list(prefix)
    }
    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.below.list_with_delimiter(prefix).await
    }
    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.below.copy_opts(from, to, options).await
    }
}

/// Bytes that differ wherever one looks.
fn bytes(length: u64, seed: u64) -> Bytes {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..length.div_ceil(8)).flat_map(|_| next().to_le_bytes()).take(length as usize).collect()
}

fn root(name: &str) -> Arc<str> {
    name.into()
}

fn path() -> Path {
    Path::from("users/a/app/t/f.parquet")
}

fn layer(cache: &Cache, store: &Arc<Counting>) -> Arc<dyn ObjectStore> {
    cache.layer(&root("r"), Arc::clone(store) as Arc<dyn ObjectStore>)
}

fn on_disk(folder: &std::path::Path) -> Settings {
    Settings { memory_bytes: 1 << 20, disk_bytes: 64 << 20, disk_reserve_bytes: 0, folder: folder.join("cache") }
}

/// A memory so small that nothing stays in it.
fn disk_only(folder: &std::path::Path) -> Settings {
    Settings { memory_bytes: 1, ..on_disk(folder) }
}

async fn one(store: &Arc<dyn ObjectStore>, range: Range<u64>) -> Result<Bytes> {
    Ok(store.get_ranges(&path(), &[range]).await?.remove(0))
}

#[tokio::test]
async fn what_was_read_once_is_asked_of_no_store_again() {
    let file = bytes(3 * C + 100, 1);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(MEMORY).await;
    assert_eq!(one(&layer(&cache, &store), C - 10..C + 10).await.unwrap(), file[C as usize - 10..C as usize + 10]);
    assert_eq!(store.gets(), 1, "two neighbours are one request");
    assert_eq!(one(&layer(&cache, &store), 0..2 * C).await.unwrap(), file[..2 * C as usize]);
    assert_eq!(store.gets(), 1);
    one(&layer(&cache, &store), 3 * C..3 * C + 100).await.unwrap();
    assert_eq!(store.gets(), 2);
    let counts = cache.counts();
    assert_eq!((counts.hits, counts.misses), (2, 3));
    assert!(counts.memory_bytes >= 2 * C + 100);
}

#[tokio::test]
async fn a_file_that_was_filled_in_is_never_fetched() {
    let file = bytes(2 * C + 5, 2);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(MEMORY).await;
    cache.fill(&root("r"), &path(), &file);
    assert_eq!(one(&layer(&cache, &store), 0..2 * C + 5).await.unwrap(), file);
    assert_eq!(store.gets(), 0);
    let small = Cache::in_memory(4 * C as usize).await;
    small.fill(&root("r"), &path(), &file);
    assert_eq!(small.counts().memory_bytes, 0, "more than a quarter of the cache");
}

#[tokio::test]
async fn equal_paths_in_two_roots_are_two_files() {
    let (ours, theirs) = (bytes(1_000, 3), bytes(1_000, 4));
    let a = Counting::with(&[(path().as_ref(), &ours)]).await;
    let b = Counting::with(&[(path().as_ref(), &theirs)]).await;
    let folder = tempfile::tempdir().unwrap();
    for cache in [Cache::in_memory(MEMORY).await, Cache::open(&disk_only(folder.path())).await] {
        let read = async |name: &str, store: &Arc<Counting>| {
            let layer = cache.layer(&root(name), Arc::clone(store) as Arc<dyn ObjectStore>);
            one(&layer, 0..1_000).await.unwrap()
        };
        for _ in 0..2 {
            assert_eq!(read("a", &a).await, ours);
            assert_eq!(read("b", &b).await, theirs);
            cache.0.chunks.storage().wait().await;
        }
    }
}

#[tokio::test]
async fn only_ranges_of_data_files_are_answered_from_the_cache() {
    let before = bytes(1_000, 5);
    let names = ["_cluster/stream/x/1.log", "users/a/_manifest.json", path().as_ref()].map(str::to_owned);
    let files: Vec<(&str, &Bytes)> = names.iter().map(|name| (name.as_str(), &before)).collect();
    let store = Counting::with(&files).await;
    let cache = Cache::in_memory(MEMORY).await;
    let layer = layer(&cache, &store);
    for _ in 0..2 {
        for name in &names {
            layer.get_ranges(&Path::from(name.as_str()), &[0..10]).await.unwrap();
        }
    }
    assert_eq!(store.gets(), 5, "twice each, but once for the data file");
    // A whole object is read back after an unclear upload, and has to be what is there now.
    let after = bytes(1_000, 6);
    layer.put(&path(), PutPayload::from_bytes(after.clone())).await.unwrap();
    assert_eq!(layer.get(&path()).await.unwrap().bytes().await.unwrap(), after);
    assert_eq!(layer.head(&path()).await.unwrap().size, 1_000);
    assert!(layer.put_opts(&path(), "x".into(), object_store::PutMode::Create.into()).await.is_err());
    assert_eq!(layer.list(None).count().await, 3);
}

#[tokio::test]
async fn those_who_miss_a_chunk_at_one_time_make_one_request() {
    let file = bytes(2 * C, 7);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(MEMORY).await;
    store.shut();
    let readers: Vec<_> = (0..20_u64)
        .map(|n| {
            let layer = layer(&cache, &store);
            tokio::spawn(async move { one(&layer, n..C + n + 1).await.unwrap() })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.open();
    for (n, read) in join_all(readers).await.into_iter().enumerate() {
        assert_eq!(read.unwrap(), file[n..C as usize + n + 1]);
    }
    assert_eq!(store.gets(), 1);
    assert!(cache.0.flights.is_empty());
}

#[tokio::test]
async fn an_error_goes_to_all_who_wait_and_is_not_kept() {
    let file = bytes(10, 8);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(MEMORY).await;
    store.shut();
    store.fails.store(true, Ordering::SeqCst);
    let reads = |count: u32| (0..count).map(|_| layer(&cache, &store));
    let failing: Vec<_> = reads(5).map(|layer| tokio::spawn(async move { one(&layer, 0..10).await })).collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    store.open();
    for read in join_all(failing).await {
        assert!(read.unwrap().unwrap_err().source().unwrap().to_string().contains("503"));
    }
    assert_eq!(store.gets(), 1);
    store.fails.store(false, Ordering::SeqCst);
    assert_eq!(one(&layer(&cache, &store), 0..10).await.unwrap(), file);
    // What is not there is told as such: readers tell a lost file from a store that is down.
    let lost = layer(&cache, &store).get_ranges(&Path::from("lost.parquet"), &[0..1]).await;
    assert!(matches!(lost, Err(Error::NotFound { .. })));
    store.panics.store(true, Ordering::SeqCst);
    assert!(layer(&cache, &store).get_ranges(&Path::from("other.parquet"), &[0..1]).await.is_err());
    assert!(cache.0.flights.is_empty(), "not even a panic leaves one behind");
}

#[tokio::test]
async fn a_reader_who_leaves_takes_the_fetch_from_nobody() {
    let file = bytes(10, 9);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(MEMORY).await;
    store.shut();
    let first = {
        let layer = layer(&cache, &store);
        tokio::spawn(async move { one(&layer, 0..10).await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    let second = {
        let layer = layer(&cache, &store);
        tokio::spawn(async move { one(&layer, 0..10).await })
    };
    tokio::time::sleep(Duration::from_millis(20)).await;
    first.abort();
    store.open();
    assert_eq!(second.await.unwrap().unwrap(), file);
    assert_eq!(store.gets(), 1);
    assert!(cache.0.flights.is_empty());
}

#[tokio::test]
async fn one_reader_takes_a_quarter_of_the_cache_at_most() {
    let file = bytes(16 * C, 10);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    let cache = Cache::in_memory(16 * C as usize).await;
    let scan = layer(&cache, &store);
    assert_eq!(one(&scan, 0..5 * C).await.unwrap().len(), 5 * C as usize);
    assert_eq!(cache.counts().memory_bytes, 0, "one request for more than the share");
    for group in 0..8 {
        let range = group * 2 * C..(group + 1) * 2 * C;
        assert_eq!(one(&scan, range.clone()).await.unwrap(), file[range.start as usize..range.end as usize]);
    }
    let kept = cache.counts().memory_bytes;
    assert!((3 * C..5 * C).contains(&kept), "{kept} bytes are kept");
    let gets = store.gets();
    one(&scan, 0..C).await.unwrap();
    assert_eq!(store.gets(), gets, "what is there, it still reads there");
}

fn ranges() -> impl Strategy<Value = (u64, Vec<Range<u64>>)> {
    let near = |at: u64| prop_oneof![0..=at, (0..=at / C).prop_map(|n| n * C), Just(at)];
    let sizes =
        prop_oneof![1..4 * C, (1..5_u64).prop_map(|n| n * C), (1..5_u64, 1..50_u64).prop_map(|(n, m)| n * C - m)];
    sizes.prop_flat_map(move |size| {
        let range = (near(size - 1), prop_oneof![1..40_u64, 1..3 * C, Just(C)])
            .prop_map(|(start, length)| start..start + length);
        (Just(size), proptest::collection::vec(range, 1..5))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn ranges_are_what_the_store_itself_would_give((size, ranges) in ranges(), again in any::<bool>()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(async {
            let store = Counting::with(&[(path().as_ref(), &bytes(size, size))]).await;
            let cache = Cache::in_memory(MEMORY).await;
            let expected = store.below.get_ranges(&path(), &ranges).await.unwrap();
            for _ in 0..=u8::from(again) {
                prop_assert_eq!(&layer(&cache, &store).get_ranges(&path(), &ranges).await.unwrap(), &expected);
            }
            Ok(())
        })?;
    }

    #[test]
    fn a_chunk_reads_back_and_a_flipped_bit_or_a_moved_end_is_seen(length in 0..2_000_u64, bit in any::<usize>(), cut in 1..40_usize) {
        use foyer::Code as _;
        let chunk = Chunk { number: 3, file_bytes: 3 * C + length, bytes: bytes(length, 1) };
        let mut encoded = Vec::new();
        chunk.encode(&mut encoded).unwrap();
        prop_assert_eq!(&Chunk::decode(&mut encoded.as_slice()).unwrap(), &chunk);
        prop_assert!(Chunk::decode(&mut &encoded[..encoded.len().saturating_sub(cut)]).is_err());
        let longer = [encoded.as_slice(), &[0; 3]].concat();
        prop_assert!(Chunk::decode(&mut longer.as_slice()).is_err());
        let bit = bit % (encoded.len() * 8);
        encoded[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(Chunk::decode(&mut encoded.as_slice()).is_err());
    }
}

#[tokio::test]
async fn a_restart_finds_on_disk_what_was_read_before() {
    let (file, folder) = (bytes(3 * C + 7, 11), tempfile::tempdir().unwrap());
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    for gets in [1, 1] {
        let cache = Cache::open(&on_disk(folder.path())).await;
        assert_eq!(one(&layer(&cache, &store), 0..3 * C + 7).await.unwrap(), file);
        assert_eq!(store.gets(), gets);
        cache.close(Duration::from_secs(10)).await;
    }
    let cache = folder.path().join("cache");
    assert_eq!(cache.metadata().unwrap().permissions().mode() & 0o777, 0o700);
    let taken: u64 = std::fs::read_dir(&cache)
        .unwrap()
        .map(|entry| std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512)
        .sum();
    assert!(taken < 6 << 20, "{taken} bytes of the 64 MiB are on disk");
}

/// Damages the cache's files and counts how many reads were answered from them all the same.
async fn after(damage: impl Fn(&std::path::Path)) -> usize {
    let (files, folder) = (20_u64, tempfile::tempdir().unwrap());
    let file = |n: u64| (format!("{n}.parquet"), bytes(300_000 + n, n));
    let truth: Vec<(String, Bytes)> = (0..files).map(file).collect();
    let listed: Vec<(&str, &Bytes)> = truth.iter().map(|(name, bytes)| (name.as_str(), bytes)).collect();
    let store = Counting::with(&listed).await;
    let settings = disk_only(folder.path());
    let read = async |cache: &Cache| {
        for (name, bytes) in &truth {
            let found = layer(cache, &store).get_ranges(&Path::from(name.as_str()), &[0..bytes.len() as u64]).await;
            assert_eq!(found.unwrap(), std::slice::from_ref(bytes), "{name}");
        }
    };
    let cache = Cache::open(&settings).await;
    read(&cache).await;
    cache.0.chunks.storage().wait().await;
    let asked = store.gets();
    // While it runs ...
    damage(&settings.folder);
    read(&cache).await;
    let while_running = store.gets() - asked;
    cache.close(Duration::from_secs(10)).await;
    // ... and while it does not.
    damage(&settings.folder);
    let cache = Cache::open(&settings).await;
    read(&cache).await;
    2 * files as usize - (store.gets() - asked - while_running) - while_running
}

fn blocks(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let all = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    all.filter(|path| path.file_name().unwrap() != "FORMAT").collect()
}

#[tokio::test]
async fn no_damage_on_disk_gives_a_wrong_byte() {
    assert_eq!(after(|_| {}).await, 40, "the disk answers everything when nothing is damaged");
    // One bit in each page, at another place in each, and another one the second time.
    let round = AtomicUsize::new(0);
    let flipped = after(|folder| {
        let round = round.fetch_add(1, Ordering::SeqCst) as u64;
        for block in blocks(folder) {
            let file = std::fs::File::options().read(true).write(true).open(&block).unwrap();
            for page in 0..file.metadata().unwrap().len() / 4_096 {
                let (at, mut byte) = (page * 4_096 + (page * 7) % 4_096, [0]);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << ((page + round) % 8))], at).unwrap();
            }
        }
    });
    assert_eq!(flipped.await, 0);
    // One bit in one page of a few.
    let some = after(|folder| {
        for block in blocks(folder) {
            let file = std::fs::File::options().read(true).write(true).open(&block).unwrap();
            for at in (0..file.metadata().unwrap().len()).step_by(1_000_003) {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            }
        }
    });
    let some = some.await;
    assert!((1..40).contains(&some), "{some}");
    let emptied = after(|folder| {
        for block in blocks(folder) {
            std::fs::File::options().write(true).open(&block).unwrap().set_len(0).unwrap();
        }
    });
    assert_eq!(emptied.await, 0);
    let exchanged = after(|folder| {
        let blocks = blocks(folder);
        let bytes: Vec<Vec<u8>> = blocks.iter().map(|block| std::fs::read(block).unwrap()).collect();
        for (at, block) in blocks.iter().enumerate() {
            std::fs::write(block, &bytes[(at + 1) % bytes.len()]).unwrap();
        }
    });
    exchanged.await;
    after(|folder| drop(std::fs::remove_dir_all(folder))).await;
}

#[tokio::test]
async fn a_folder_of_another_format_is_emptied_and_not_trusted() {
    let folder = tempfile::tempdir().unwrap();
    let settings = on_disk(folder.path());
    let (file, cache) = (bytes(1_000, 12), folder.path().join("cache"));
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    std::fs::create_dir(&cache).unwrap();
    std::fs::write(cache.join("FORMAT"), "kalamdb parquet cache 0\n").unwrap();
    std::fs::create_dir_all(cache.join("old/er")).unwrap();
    std::fs::write(cache.join("foyer-storage-direct-fs-00000000"), bytes(1 << 20, 13)).unwrap();
    std::fs::write(cache.join("foyer-storage-direct-fs-99999999"), "of a larger one").unwrap();
    let opened = Cache::open(&settings).await;
    assert_eq!(opened.counts().disk_bytes, 64 << 20);
    assert_eq!(one(&layer(&opened, &store), 0..1_000).await.unwrap(), file);
    opened.close(Duration::from_secs(10)).await;
    let names: HashSet<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 1 + 8, "{names:?}");
    // What it holds is right, but for a format that is not ours nobody knows that.
    for (format, gets) in [(None, 1), (Some("kalamdb parquet cache 0\n"), 2)] {
        if let Some(format) = format {
            std::fs::write(cache.join("FORMAT"), format).unwrap();
        }
        let opened = Cache::open(&settings).await;
        assert_eq!(one(&layer(&opened, &store), 0..1_000).await.unwrap(), file);
        assert_eq!(store.gets(), gets);
        opened.close(Duration::from_secs(10)).await;
    }
    // A smaller one lets go of what it does not use.
    let smaller = Settings { disk_bytes: 16 << 20, ..settings };
    Cache::open(&smaller).await.close(Duration::from_secs(10)).await;
    let size: u64 = blocks(&cache).iter().map(|block| block.metadata().unwrap().len()).sum();
    assert_eq!(size, 16 << 20);
}

#[tokio::test]
async fn a_folder_that_cannot_be_used_costs_only_the_disk() {
    let folder = tempfile::tempdir().unwrap();
    let file = bytes(1_000, 14);
    let store = Counting::with(&[(path().as_ref(), &file)]).await;
    std::fs::write(folder.path().join("cache"), "not a folder").unwrap();
    for settings in [on_disk(folder.path()), Settings { disk_bytes: 4_096, ..on_disk(&folder.path().join("x")) }] {
        let cache = Cache::open(&settings).await;
        assert_eq!(cache.counts().disk_bytes, 0);
        assert_eq!(one(&layer(&cache, &store), 0..1_000).await.unwrap(), file);
    }
}

#[tokio::test]
async fn nothing_goes_to_a_disk_that_has_less_free_than_is_kept_for_rows() {
    let folder = tempfile::tempdir().unwrap();
    let written = async |settings: Settings| {
        let cache = Cache::open(&settings).await;
        let file = Bytes::from(vec![7; 3 * usize::try_from(C).unwrap()]);
        cache.fill(&"root".into(), &Path::from("a.parquet"), &file);
        cache.close(Duration::from_secs(10)).await;
        let blocks = std::fs::read_dir(&settings.folder).unwrap();
        blocks
            .map(|entry| std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512)
            .sum::<u64>()
    };
    let before = written(Settings { disk_reserve_bytes: 1, ..on_disk(&folder.path().join("free")) }).await;
    assert!(before > C, "with room it goes to the disk: {before}");
    // It opens, and then a lot is kept back.
    let full = folder.path().join("full");
    let cache = Cache::open(&on_disk(&full)).await;
    drop(cache);
    let reserve = Reserve::new(full.join("cache"), u64::MAX);
    assert!(!reserve.is_left());
    assert!(Reserve::new(full.join("cache"), 1).is_left());
    assert!(!Reserve::new(full.join("nowhere"), 1).is_left(), "a disk that does not tell");
    let kept_back = Settings { disk_reserve_bytes: u64::MAX, ..on_disk(&full) };
    assert_eq!(Cache::open(&kept_back).await.counts().disk_bytes, 0, "there is no room above the reserve");
}
