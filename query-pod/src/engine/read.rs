//! What a statement reads of its instances, all as of one moment: buffered rows in batches, the lists of files, and
//! which of their rows buffered ones replace.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::array::RecordBatch;
use kalamdb_model::{InstanceId, Owner, TableEntry};
use kalamdb_table_store::Positions;
use kalamdb_table_store::parquet_read;
use kalamdb_table_store::paths::{self, PathError};
use kalamdb_write_buffer::row::Header;
use kalamdb_write_buffer::{BatchBuilder, Generations, RowError};

use super::instance::{Instance, InstanceError, View};
use super::storages::StoragesError;
use super::{Disowned, Engine, Rebuilding, RootKey};

/// Rows of a batch that is read, at most: as many as DataFusion takes at once, so that it need not cut them.
const BATCH_ROWS: usize = 8_192;

/// Bytes of stored rows after which a batch is ended: what is not counted yet of a reader's memory.
const BATCH_BYTES: usize = 1 << 20;

/// One consistent state of one instance.
pub struct Rows {
    /// Rows that are in no file; at least one batch, which may have no rows.
    pub buffered: Vec<RecordBatch>,
    /// The columns of those batches: positions in the table's Arrow schema.
    pub columns: Vec<usize>,
    /// The files.
    pub view: Arc<View>,
    /// Rows of the files that newer, unflushed versions replace, by path.
    pub replaced: HashMap<Arc<str>, Positions>,
    /// Where the files lie.
    pub root: RootKey,
}

/// What is to be read of one instance.
pub struct Want {
    /// Its table.
    pub table: Arc<TableEntry>,
    /// Columns of buffered rows: positions in the table's Arrow schema.
    pub columns: Vec<usize>,
    /// Which buffered rows.
    pub needed: Needed,
}

/// Which buffered rows a reader needs. He may get more.
pub enum Needed {
    /// All.
    All,
    /// Any so many.
    First(usize),
    /// Those that this leaves in a batch.
    Where(Keep),
}

/// Leaves out rows of a batch.
pub type Keep = Box<dyn Fn(RecordBatch) -> RecordBatch + Send + Sync>;

/// An instance cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The data is another's now, who may have acknowledged rows that are not here.
    #[error(transparent)]
    Disowned(#[from] Disowned),
    /// Its storage is being read back.
    #[error(transparent)]
    Rebuilding(#[from] Rebuilding),
    /// Its state.
    #[error("failed to load the instance")]
    Instance(#[from] InstanceError),
    /// The buffer.
    #[error("failed to read buffered rows")]
    Buffer(#[from] kalamdb_write_buffer::ReadError),
    /// A row.
    #[error("a buffered row is damaged")]
    Row(#[from] RowError),
    /// Its place.
    #[error("failed to resolve the place of an instance")]
    Path(#[from] PathError),
    /// Its store.
    #[error("the storage of the table is not usable")]
    Storage(#[from] StoragesError),
    /// A file.
    #[error("failed to look keys up in a file")]
    File(#[from] parquet_read::ReadError),
    /// Two files have the same row, and neither says that it was replaced.
    #[error("two files of the instance hold the same row")]
    Twice,
    /// A worker thread was lost.
    #[error("the read was interrupted")]
    Interrupted(#[from] tokio::task::JoinError),
    /// A file that is not the owner's. Nothing is read then.
    #[error("a file of the instance lies outside its owner's prefix")]
    Foreign,
    /// The reader has no room for the buffered rows.
    #[error("the buffered rows do not fit into the memory of their reader")]
    Full,
}

/// Rows on their way into batches of at most so many rows, and of no more bytes than one may hold.
pub(super) struct Batches<'a> {
    table: &'a TableEntry,
    projection: &'a [usize],
    rows_max: usize,
    full: Vec<RecordBatch>,
    rows_in_full: usize,
    builder: BatchBuilder,
}

impl<'a> Batches<'a> {
    pub(super) fn new(table: &'a TableEntry, projection: &'a [usize], rows_max: usize) -> Self {
        let builder = BatchBuilder::new(table, projection);
        Self { table, projection, rows_max, full: Vec::new(), rows_in_full: 0, builder }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows_in_full + self.builder.rows()
    }

    pub(super) fn push(&mut self, row: &[u8]) -> Result<(), RowError> {
        match self.builder.push(row) {
            Err(RowError::BatchFull { .. }) if self.builder.rows() > 0 => {
                self.turn()?;
                self.builder.push(row)?;
            }
            other => other?,
        }
        if self.builder.rows() >= self.rows_max { self.turn() } else { Ok(()) }
    }

    fn turn(&mut self) -> Result<(), RowError> {
        let full = std::mem::replace(&mut self.builder, BatchBuilder::new(self.table, self.projection));
        self.rows_in_full += full.rows();
        self.full.push(full.finish()?);
        Ok(())
    }

    /// Ends the last batch. There is one even of no rows: it tells the columns.
    fn close(&mut self) -> Result<(), RowError> {
        if self.builder.rows() > 0 || self.rows() == 0 { self.turn() } else { Ok(()) }
    }

    /// The batches that have ended since the last call.
    fn take_full(&mut self) -> Vec<RecordBatch> {
        std::mem::take(&mut self.full)
    }

    pub(super) fn finish(mut self) -> Result<Vec<RecordBatch>, RowError> {
        self.close()?;
        Ok(self.full)
    }
}

/// What was there of one instance, complete if nothing is unknown.
struct Taken {
    instance: Arc<Instance>,
    table: Arc<TableEntry>,
    rows: Rows,
    /// Keys that may replace a row of a file nobody has looked for.
    unknown: BTreeSet<Vec<u8>>,
}

impl Engine {
    /// The rows that `owner` has in `table`: buffered ones with the columns `projection` (positions in the table's
    /// Arrow schema), at most `limit` of them, and the files with those of their rows that are replaced.
    ///
    /// # Errors
    /// If anything cannot be read; never fewer rows than there are.
    pub async fn read(
        self: &Arc<Self>,
        table: &Arc<TableEntry>,
        owner: &Owner,
        projection: Vec<usize>,
        limit: Option<usize>,
    ) -> Result<Rows, ReadError> {
        let needed = limit.map_or(Needed::All, Needed::First);
        let want = Want { table: Arc::clone(table), columns: projection, needed };
        let wants = BTreeMap::from([(Self::instance_id(table, owner), want)]);
        let rows = self.read_all(wants, |_| true).await?;
        Ok(rows.into_values().next().expect("one was wanted, and each is read"))
    }

    /// What `wants` says of each instance, all as of one moment: what was acknowledged before something else was
    /// written is there if that is. `room` is asked for the bytes of each batch.
    ///
    /// # Errors
    /// If anything cannot be read; never fewer rows than there are. [`ReadError::Full`] if there is no room.
    pub async fn read_all(
        self: &Arc<Self>,
        wants: BTreeMap<InstanceId, Want>,
        room: impl FnMut(usize) -> bool + Send + 'static,
    ) -> Result<BTreeMap<InstanceId, Rows>, ReadError> {
        self.check_owned()?;
        let mut wanted = Vec::with_capacity(wants.len());
        for (id, want) in wants {
            self.check_rebuilt(&want.table, &id.owner).await?;
            wanted.push((self.instances.get(&id)?, want));
        }
        // Filters compute: no more at once than there are processors.
        let filters = wanted.iter().any(|(_, want)| matches!(want.needed, Needed::Where(_)));
        let turn = if filters { Arc::clone(&self.filters).acquire_owned().await.ok() } else { None };
        // A statement that is given up drops this, and needs no further room.
        let waiting = Arc::new(());
        let (engine, waits, mut room) = (Arc::clone(self), Arc::downgrade(&waiting), room);
        let taking = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            engine.take(&wanted, |bytes| waits.strong_count() > 0 && room(bytes))
        });
        let taken = taking.await??;
        drop(waiting);
        let mut all = BTreeMap::new();
        for Taken { instance, table, mut rows, unknown } in taken {
            self.check_owner(&table, &instance.id, &rows.view)?;
            if !unknown.is_empty() {
                // Once for rows from before a restart or of before a change of the files; afterwards they are known.
                let found = self.locate(&table, &instance, &rows.view, &unknown).await?;
                for at in found.values().flatten() {
                    rows.replaced.entry(Arc::clone(&at.path)).or_default().insert(at.row);
                }
                instance.current.write().note(&rows.view, found);
            }
            all.insert(instance.id.clone(), rows);
        }
        Ok(all)
    }

    /// Views and buffered rows of `wanted`, which are sorted by their ids, as of one moment. Blocking.
    fn take(
        &self,
        wanted: &[(Arc<Instance>, Want)],
        mut room: impl FnMut(usize) -> bool,
    ) -> Result<Vec<Taken>, ReadError> {
        // A flush published between the look at the files and the one at the buffer would show its rows twice or not at
        // all. Nobody else waits for one of these locks with another, and all who do take them in the same order.
        let locked: Vec<_> = wanted.iter().map(|(instance, _)| instance.current.read()).collect();
        let moment = self.buffer.moment();
        let mut states = Vec::with_capacity(wanted.len());
        for ((instance, want), current) in wanted.iter().zip(&locked) {
            let view = Arc::clone(&current.view);
            let buffered = moment.generations(&instance.id, view.flushed)?;
            states.push((instance, want, view, buffered));
        }
        // What a view lists and the moment shows stays as it is: nobody has to wait while rows are decoded.
        drop(locked);
        let mut taken = Vec::with_capacity(states.len());
        for (instance, want, view, buffered) in states {
            taken.push(Reading::new(instance, want, view, &mut room).read(&buffered)?);
        }
        Ok(taken)
    }

    /// The last fence before bytes are read: every file of the view lies below the prefix of its owner.
    pub(super) fn check_owner(&self, table: &TableEntry, id: &InstanceId, view: &View) -> Result<(), ReadError> {
        let prefix = format!("{}/", paths::instance_prefix(view.location(table), &id.owner)?);
        let foreign = view.manifest.files.iter().find(|file| !file.path.starts_with(&prefix));
        match foreign {
            Some(file) => {
                tracing::error!(object_path = %file.path, "a manifest names a file outside its owner's prefix");
                Err(ReadError::Foreign)
            }
            None => Ok(()),
        }
    }
}

/// The buffered rows of one instance on their way to a reader.
struct Reading<'a, R> {
    instance: &'a Arc<Instance>,
    want: &'a Want,
    view: Arc<View>,
    batches: Batches<'a>,
    room: &'a mut R,
    kept: Vec<RecordBatch>,
    replaced: HashMap<Arc<str>, Positions>,
    unknown: BTreeSet<Vec<u8>>,
}

impl<'a, R: FnMut(usize) -> bool> Reading<'a, R> {
    fn new(instance: &'a Arc<Instance>, want: &'a Want, view: Arc<View>, room: &'a mut R) -> Self {
        let batches = Batches::new(&want.table, &want.columns, BATCH_ROWS);
        let (kept, replaced, unknown) = (Vec::new(), HashMap::new(), BTreeSet::new());
        Self { instance, want, view, batches, room, kept, replaced, unknown }
    }

    fn read(mut self, buffered: &Generations<'_>) -> Result<Taken, ReadError> {
        let mut failed = None;
        buffered.scan(&mut |_, key, row| match self.take(key, row) {
            Ok(flow) => flow,
            Err(error) => {
                failed = Some(error);
                ControlFlow::Break(())
            }
        })?;
        if let Some(error) = failed {
            return Err(error);
        }
        self.batches.close()?;
        self.keep()?;
        let (table, columns) = (Arc::clone(&self.want.table), self.want.columns.clone());
        let root = RootKey::of(self.view.location(&table));
        let rows = Rows { buffered: self.kept, columns, view: self.view, replaced: self.replaced, root };
        Ok(Taken { instance: Arc::clone(self.instance), table, rows, unknown: self.unknown })
    }

    fn take(&mut self, key: &[u8], row: &[u8]) -> Result<ControlFlow<()>, ReadError> {
        let header = Header::parse(row)?;
        let has_files = !self.view.manifest.files.is_empty();
        let full = matches!(self.want.needed, Needed::First(enough) if self.batches.rows() >= enough);
        if !header.deleted && !full {
            self.batches.push(row)?;
            if self.batches.builder.bytes() >= BATCH_BYTES {
                self.batches.turn()?;
            }
            self.keep()?;
        }
        // Every row that replaces one in a file counts, whether or not it is shown itself.
        if !header.fresh && has_files {
            self.replace(key);
        }
        Ok(if full && !has_files { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Takes note of the row of a file that the buffered one with this key replaces.
    fn replace(&mut self, key: &[u8]) {
        let current = self.instance.current.read();
        // What is known is of the files that are there now.
        let known = if Arc::ptr_eq(&current.view, &self.view) { current.located.get(key) } else { None };
        match known {
            Some(Some(at)) => self.replaced.entry(Arc::clone(&at.path)).or_default().insert(at.row),
            Some(None) => {}
            None => drop(self.unknown.insert(key.to_vec())),
        }
    }

    /// Keeps what is needed of the batches that have ended.
    fn keep(&mut self) -> Result<(), ReadError> {
        for batch in self.batches.take_full() {
            let batch = if let Needed::Where(keep) = &self.want.needed { keep(batch) } else { batch };
            let is_left_out = batch.num_rows() == 0 && !self.kept.is_empty();
            if !(self.room)(if is_left_out { 0 } else { batch.get_array_memory_size() }) {
                return Err(ReadError::Full);
            }
            if is_left_out {
                continue;
            }
            self.kept.push(batch);
        }
        Ok(())
    }
}
