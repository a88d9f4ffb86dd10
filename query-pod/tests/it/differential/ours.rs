//! The engine with its SQL front in this process, over stores in memory, which outlive it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use clap::Parser as _;
use kalamdb_model::declared::StorageRoot;
use kalamdb_model::{OnRemoval, Owner, Role, TableName, UserId, compile};
use kalamdb_query_pod::auth::Identity;
use kalamdb_query_pod::catalog::CatalogHandle;
use kalamdb_query_pod::engine::{CacheLimits, Caches, Engine, EngineLimits, OpenError, Secrets, Storages};
use kalamdb_query_pod::metrics::Metrics;
use kalamdb_query_pod::sql::{Request, Sql, SqlLimits};
use kalamdb_table_store::owners;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use serde_json::value::RawValue;
use tokio::time::Instant;

use super::tables::{STORAGES, manifests};
use super::{Row, Said};
use crate::world::PATIENCE;

#[derive(clap::Parser)]
struct Limits {
    #[command(flatten)]
    limits: SqlLimits,
}

/// The limits that a pod has unless it is told others.
pub fn sql_limits() -> SqlLimits {
    Limits::parse_from(["pod"]).limits
}

/// What a process finds on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Volume {
    /// What the one before left there, if there was one.
    Kept,
    /// Nothing, although there was one before.
    Lost,
}

pub struct Ours {
    dir: tempfile::TempDir,
    storages: [Arc<dyn ObjectStore>; STORAGES.len()],
    home: Arc<dyn ObjectStore>,
    running: Option<(Arc<Engine>, Sql)>,
    /// How long replaced files stay: longer than any statement takes.
    garbage_after_secs: u64,
}

impl Ours {
    /// A new database.
    pub async fn new() -> anyhow::Result<Self> {
        Self::keeping_files_for(2).await
    }

    /// A new database, whose replaced files stay for so many seconds.
    pub async fn keeping_files_for(garbage_after_secs: u64) -> anyhow::Result<Self> {
        let store = || Arc::new(InMemory::new()) as Arc<dyn ObjectStore>;
        let storages = STORAGES.map(|_| store());
        let mut ours = Self { dir: tempfile::tempdir()?, storages, home: store(), running: None, garbage_after_secs };
        ours.open(Volume::Kept).await?;
        Ok(ours)
    }

    async fn open(&mut self, volume: Volume) -> anyhow::Result<()> {
        let catalog = CatalogHandle::open(self.dir.path())?;
        let folder = kalamdb_crds::manifests::folder(&[("all.yaml".to_owned(), manifests())]);
        let (compiled, outcomes) = compile(&catalog.current().catalog, &folder.declared, OnRemoval::Retain);
        let is_good = folder.problems.is_empty() && outcomes.iter().all(|outcome| outcome.verdict.is_ok());
        ensure!(is_good, "{:?} {outcomes:?}", folder.problems);
        if volume == Volume::Kept {
            catalog.save(&compiled)?;
            catalog.serve(compiled.clone());
        }
        let engine = self.engine_on(&catalog).await?;
        let caches = CacheLimits { cache_memory_bytes: 64 << 20, cache_disk_bytes: 0 };
        engine.storages().set_caches(Box::pin(Caches::open(self.dir.path(), &caches, 0)).await);
        // Whatever volume comes later, the instance and its storages are those of the first one.
        engine.set_owner("founder")?;
        engine.follow_users(Arc::clone(&self.home));
        if volume == Volume::Lost {
            engine.expect_rebuild(owners::used(self.home.as_ref()).await?)?;
            engine.serve_catalog(compiled)?;
        }
        engine.open_known_streams(PATIENCE).await?;
        let sql = Sql::new(Arc::clone(&engine), sql_limits(), Arc::new(Metrics::default()))?;
        self.running = Some((engine, sql));
        Ok(())
    }

    async fn engine_on(&self, catalog: &CatalogHandle) -> anyhow::Result<Arc<Engine>> {
        let stores = self.storages.clone();
        let open = Box::new(move |root: &StorageRoot, _: Option<&_>, _| {
            let name = root.place().1.trim_matches('/');
            let at = STORAGES.iter().position(|storage| *storage == name).unwrap();
            Ok(Arc::clone(&stores[at]))
        });
        let storages = Storages::opened_by(open, Secrets::default());
        let limits = EngineLimits {
            instance_bytes_max: 64 << 20,
            disk_reserve_bytes: 0,
            buffered_bytes_max: 1 << 30,
            flushes_max: 4,
            garbage_after_secs: self.garbage_after_secs,
            orphans_after_secs: 86_400,
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (catalog, storages, limits) = (catalog.clone(), storages.clone(), limits.clone());
            match Engine::open(self.dir.path(), catalog, storages, limits, Arc::new(Metrics::default())) {
                // What is left of a query of the process before may have the folder a moment longer.
                Err(OpenError::Buffer(kalamdb_write_buffer::OpenError::Locked { .. })) if Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                other => return Ok(other?),
            }
        }
    }

    /// Ends the process. Returns how many bytes of rows only its volume has.
    pub async fn close(&mut self) -> usize {
        let Some((engine, sql)) = self.running.take() else { return 0 };
        drop(sql);
        engine.close(PATIENCE).await;
        engine.unshipped_bytes()
    }

    /// Ends the process, and begins another one.
    pub async fn restart(&mut self, volume: Volume) -> anyhow::Result<()> {
        let unshipped = self.close().await;
        if volume == Volume::Lost {
            ensure!(unshipped == 0, "{unshipped} bytes of rows were not stored before the end");
            self.dir = tempfile::tempdir()?;
        }
        self.open(volume).await
    }

    pub async fn run(&self, user: &str, sql: &str) -> anyhow::Result<Said> {
        self.ask(user, Role::User, sql, &[]).await
    }

    /// Runs a statement with parameters, which are JSON.
    pub async fn ask(&self, user: &str, role: Role, sql: &str, params: &[String]) -> anyhow::Result<Said> {
        let (_, front) = self.running.as_ref().context("it runs")?;
        let identity = Identity { user: UserId::new(user)?, role };
        let params: Vec<Box<RawValue>> =
            params.iter().map(|text| RawValue::from_string(text.clone())).collect::<Result<_, _>>()?;
        let params: Vec<&RawValue> = params.iter().map(|raw| &**raw).collect();
        let request = Request { identity: &identity, sql, params: &params, namespace: Some("app") };
        match Box::pin(front.run(&request)).await {
            Ok(answer) => said(&answer.into_pieces(0.0, ()).concat()),
            Err(error) if error.code == "DUPLICATE_KEY" => Ok(Said::Duplicate),
            Err(error) => bail!("{}: {error}", error.code),
        }
    }

    /// Waits until the rows that `user` has in a table lie in `storage`.
    pub async fn arrives(&self, user: &str, table: &str, storage: &str) -> anyhow::Result<()> {
        let (engine, _) = self.running.as_ref().context("it runs")?;
        let owner = Owner::User(UserId::new(user)?);
        let snapshot = engine.catalog().current();
        let table = snapshot.table(&TableName::parse(&format!("app.{table}"))?).context("the table")?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let place = engine.read(table, &owner, vec![0], None).await?.root.storage;
            if place.as_str() == storage {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "`{}` of {user} stays in {place}, and not in {storage}", table.name);
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

#[derive(serde::Deserialize)]
struct Envelope<'a> {
    #[serde(borrow)]
    results: [Answer<'a>; 1],
}

#[derive(serde::Deserialize)]
struct Answer<'a> {
    schema: Vec<serde::de::IgnoredAny>,
    #[serde(borrow)]
    rows: Vec<Vec<&'a RawValue>>,
    row_count: usize,
}

pub fn said(answer: &[u8]) -> anyhow::Result<Said> {
    let Envelope { results: [answer] } = serde_json::from_slice(answer)?;
    if answer.schema.is_empty() {
        return Ok(Said::Changed(answer.row_count));
    }
    ensure!(answer.rows.len() == answer.row_count, "{} rows are counted as {}", answer.rows.len(), answer.row_count);
    let row = |cells: &Vec<&RawValue>| cells.iter().map(|cell| shown(cell)).collect::<anyhow::Result<Row>>();
    Ok(Said::Rows(answer.rows.iter().map(row).collect::<anyhow::Result<_>>()?))
}

/// A text without its quotes, and anything else as it is written.
fn shown(cell: &RawValue) -> anyhow::Result<Option<String>> {
    let text = cell.get();
    Ok(match text.as_bytes() {
        b"null" => None,
        [b'"', ..] => Some(serde_json::from_str(text)?),
        _ => Some(text.to_owned()),
    })
}
