//! An engine over a store that fails on purpose, without HTTP.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use arrow::array::{AsArray as _, RecordBatch};
use arrow::datatypes::Int64Type;
use bytes::Bytes;
use futures::TryStreamExt as _;
use kalamdb_model::declared::StorageRoot;
use kalamdb_model::{OnRemoval, Owner, TableEntry, TableName, UserId, Value, compile, key};
use kalamdb_query_pod::catalog::CatalogHandle;
use kalamdb_query_pod::engine::{Engine, EngineLimits, NewRow, RootKey, Secrets, Storages};
use kalamdb_query_pod::metrics::Metrics;
use kalamdb_table_store::{Positions, owners};
use kalamdb_test_support::fault_store::{Call, Fault, FaultStore, Rates};
use kalamdb_test_support::pod::MANIFESTS;
use kalamdb_write_buffer::row;
use object_store::memory::InMemory;
use object_store::prefix::PrefixStore;
use object_store::{ObjectStore, ObjectStoreExt as _};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

pub struct World {
    pub dir: tempfile::TempDir,
    pub truth: Arc<dyn ObjectStore>,
    pub faults: FaultStore,
    /// Storages with these paths, or prefixes, have stores of their own, in folders of `truth`.
    regions: [(&'static str, FaultStore); 3],
    pub buffered_bytes_max: u64,
    /// The volume that had the instance of KalamDB first: storages know it by that.
    pub founder: &'static str,
    /// The folder is new, and its instance is not.
    lost: bool,
}

impl World {
    pub fn new(seed: u64, rates: Rates) -> anyhow::Result<Self> {
        Self::over(Arc::new(InMemory::new()), seed, rates)
    }

    /// Whose objects lie in `truth`.
    pub fn over(truth: Arc<dyn ObjectStore>, seed: u64, rates: Rates) -> anyhow::Result<Self> {
        let faults = FaultStore::seeded(Arc::clone(&truth), seed, rates);
        let region = |name: &'static str| {
            let own = Arc::new(PrefixStore::new(Arc::clone(&truth), name));
            (name, FaultStore::seeded(own, seed, rates))
        };
        let regions = ["home", "eu", "us"].map(region);
        let (dir, founder) = (tempfile::tempdir()?, "founder");
        Ok(Self { dir, truth, faults, regions, buffered_bytes_max: 1 << 30, founder, lost: false })
    }

    /// Whether every call to a region fails.
    pub fn set_down(&self, region: &str, down: bool) {
        self.regions.iter().filter(|(name, _)| *name == region).for_each(|(_, faults)| faults.set_down(down));
    }

    /// The home store, of the instance of KalamDB that is opened next.
    pub fn home(&self) -> PrefixStore<Arc<dyn ObjectStore>> {
        PrefixStore::new(Arc::clone(&self.truth), format!("homes/{}", self.founder))
    }

    /// What happens to the next puts to a region.
    pub fn script(&self, region: &str, faults: &[Option<Fault>]) {
        let (_, store) = self.regions.iter().find(|(name, _)| *name == region).expect("a region");
        store.script(faults.iter().copied());
    }

    /// No failures by chance or by script any more.
    pub fn heal(&self) {
        self.stores().for_each(FaultStore::heal);
    }

    fn stores(&self) -> impl Iterator<Item = &FaultStore> {
        self.regions.iter().map(|(_, faults)| faults).chain([&self.faults])
    }

    /// How all stores fail by chance from now on.
    pub fn set_rates(&self, rates: Rates) {
        self.stores().for_each(|store| store.set_rates(rates));
    }

    /// How often which call to any of them failed how.
    pub fn tally(&self) -> BTreeMap<(Call, Fault), u64> {
        let mut tally: BTreeMap<(Call, Fault), u64> = BTreeMap::new();
        for (failed, times) in self.stores().flat_map(FaultStore::tally) {
            *tally.entry(failed).or_default() += times;
        }
        tally
    }

    /// Every object of a region, with its path there.
    pub async fn objects(&self, region: &str) -> anyhow::Result<Vec<(String, Bytes)>> {
        let store = PrefixStore::new(Arc::clone(&self.truth), region);
        let listed: Vec<_> = store.list(None).try_collect().await?;
        let mut objects = Vec::new();
        for meta in listed {
            // It may go meanwhile.
            if let Ok(found) = store.get(&meta.location).await {
                objects.push((meta.location.to_string(), found.bytes().await?));
            }
        }
        Ok(objects)
    }

    /// A data file of a storage.
    async fn file(&self, root: &RootKey, path: &str) -> anyhow::Result<Bytes> {
        let region = self.regions.iter().find(|(name, _)| *name == root.storage.as_str());
        let path = region.map_or_else(|| path.to_owned(), |(name, _)| format!("{name}/{path}"));
        Ok(self.truth.get(&object_store::path::Path::parse(path)?).await?.bytes().await?)
    }

    pub fn open(&self) -> anyhow::Result<(Arc<Engine>, Arc<TableEntry>)> {
        self.open_with(MANIFESTS)
    }

    pub fn open_with(&self, manifests: &str) -> anyhow::Result<(Arc<Engine>, Arc<TableEntry>)> {
        self.open_after(&[manifests])
    }

    /// With what was declared one after the other.
    pub fn open_after(&self, declared: &[&str]) -> anyhow::Result<(Arc<Engine>, Arc<TableEntry>)> {
        let catalog = CatalogHandle::open(self.dir.path())?;
        let mut compiled = catalog.current().catalog.clone();
        for manifests in declared {
            let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), (*manifests).to_owned())]);
            let (next, outcomes) = compile(&compiled, &folder.declared, OnRemoval::Retain);
            ensure!(folder.problems.is_empty() && outcomes.iter().all(|o| o.verdict.is_ok()), "{:?}", folder.problems);
            compiled = next;
        }
        if !self.lost {
            catalog.save(&compiled)?;
            catalog.serve(compiled.clone());
        }
        let (faults, regions) = (self.faults.clone(), self.regions.clone());
        let open = Box::new(move |root: &StorageRoot, _: Option<&_>, _| {
            let region = regions.iter().find(|(name, _)| root.place().1.trim_matches('/') == *name);
            Ok(Arc::new(region.map_or(&faults, |(_, own)| own).clone()) as Arc<dyn ObjectStore>)
        });
        let storages = Storages::opened_by(open, Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 64 << 20,
            disk_reserve_bytes: 0,
            buffered_bytes_max: self.buffered_bytes_max,
            flushes_max: 4,
            garbage_after_secs: 0,
            orphans_after_secs: 0,
        };
        let engine = Engine::open(self.dir.path(), catalog.clone(), storages, limits, Arc::new(Metrics::default()))?;
        engine.set_owner(self.founder)?;
        engine.follow_users(Arc::new(PrefixStore::new(self.faults.clone(), format!("homes/{}", self.founder))));
        if self.lost {
            // Whatever that waits for is not done by this thread.
            engine.expect_rebuild(futures::executor::block_on(owners::used(&self.home()))?)?;
            engine.serve_catalog(compiled)?;
        }
        let table = catalog.current().table(&TableName::parse("app.messages")?).context("the table")?.clone();
        Ok((engine, table))
    }

    /// From now on there is another, empty folder; the next process is the first that knows. Returns the one before: a
    /// process that still runs needs it.
    pub fn lose_volume(&mut self) -> anyhow::Result<tempfile::TempDir> {
        self.lost = true;
        Ok(std::mem::replace(&mut self.dir, tempfile::tempdir()?))
    }

    /// A restart: the folder is the one that the last process had.
    pub fn keep_volume(&mut self) {
        self.lost = false;
    }

    /// The one process that has committed so far.
    pub async fn incarnation(&self) -> anyhow::Result<String> {
        let objects: Vec<_> = self.truth.list(None).try_collect().await?;
        let object =
            objects.iter().map(|meta| meta.location.to_string()).find(|path| path.contains("_cluster/stream/"));
        Ok(object.context("a commit")?.split('/').nth(2).context("its stream")?.to_owned())
    }
}

/// Changes what is declared while `engine` runs.
pub fn serve(engine: &Arc<Engine>, manifests: &str) -> anyhow::Result<()> {
    let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), manifests.to_owned())]);
    let current = engine.catalog().current();
    let (compiled, outcomes) = compile(&current.catalog, &folder.declared, OnRemoval::Retain);
    ensure!(outcomes.iter().all(|outcome| outcome.verdict.is_ok()), "{outcomes:?}");
    Ok(engine.serve_catalog(compiled)?)
}

/// How long the streams of a store that answers may take.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub fn user(name: &str) -> anyhow::Result<Owner> {
    Ok(Owner::User(UserId::new(name)?))
}

pub async fn insert(engine: &Arc<Engine>, table: &Arc<TableEntry>, owner: &Owner, id: i64) -> anyhow::Result<()> {
    let values = [Value::BigInt(id), Value::Text(format!("body {id}"))];
    let row = NewRow { key: key::encode(&values[..1]), value: row::encode(table, &values) };
    engine.write(table, owner).await?.insert(vec![row]).await?;
    Ok(())
}

/// Every id that a reader sees, buffered or in files, with repetitions.
pub async fn seen(
    world: &World,
    engine: &Arc<Engine>,
    table: &Arc<TableEntry>,
    owner: &Owner,
) -> anyhow::Result<Vec<i64>> {
    let ids = |batch: &RecordBatch| batch.column(0).as_primitive::<Int64Type>().values().to_vec();
    let rows = engine.read(table, owner, vec![0], None).await?;
    ensure!(rows.root == RootKey::of(&table.location));
    let mut all: Vec<i64> = rows.buffered.iter().flat_map(ids).collect();
    for file in &rows.view.manifest.files {
        let path = object_store::path::Path::parse(&file.path)?;
        let bytes = world.truth.get_opts(&path, object_store::GetOptions::default()).await?.bytes().await?;
        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            all.extend(ids(&batch?));
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// The rows of `messages` that a reader is shown: no key twice.
pub async fn contents(
    world: &World,
    engine: &Arc<Engine>,
    table: &Arc<TableEntry>,
    owner: &Owner,
) -> anyhow::Result<BTreeMap<i64, String>> {
    let rows = engine.read(table, owner, vec![0, 1], None).await?;
    let mut found = BTreeMap::new();
    let mut add = |batch: &RecordBatch, hidden: &Positions, first: u32| {
        let (ids, bodies) = (batch.column(0).as_primitive::<Int64Type>(), batch.column(1).as_string::<i32>());
        for (row, at) in (first..).zip(0..batch.num_rows()) {
            if !hidden.contains(row) {
                let before = found.insert(ids.value(at), bodies.value(at).to_owned());
                ensure!(before.is_none(), "row {} is shown twice", ids.value(at));
            }
        }
        Ok(())
    };
    for batch in &rows.buffered {
        add(batch, &Positions::default(), 0)?;
    }
    for file in &rows.view.manifest.files {
        let replaced = rows.replaced.get(file.path.as_str()).cloned().unwrap_or_default();
        let hidden = file.hidden().union(&replaced);
        let bytes = world.file(&rows.root, &file.path).await?;
        let mut first = 0;
        for batch in ParquetRecordBatchReaderBuilder::try_new(bytes)?.build()? {
            let batch = batch?;
            add(&batch, &hidden, first)?;
            first += u32::try_from(batch.num_rows())?;
        }
    }
    Ok(found)
}

/// The data files below `prefix`, named by a manifest or not.
pub async fn data_files(world: &World, prefix: &object_store::path::Path) -> anyhow::Result<Vec<String>> {
    let all: Vec<_> = world.truth.list(Some(prefix)).try_collect().await?;
    let paths = all.iter().map(|meta| meta.location.to_string());
    Ok(paths.filter(|path| path.ends_with(".parquet")).collect())
}

/// A row of `messages`.
pub fn message(table: &TableEntry, id: i64, body: &str) -> NewRow {
    let values = [Value::BigInt(id), Value::Text(body.to_owned())];
    NewRow { key: key::encode(&values[..1]), value: row::encode(table, &values) }
}
