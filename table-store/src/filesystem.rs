//! An object store in a folder, durable when it says so.
//!
//! Owns: the order write temporary → fsync → link or rename → fsync folder, and leftovers of a crash.
//! Does not own: what objects are called; paths come encoded ([`crate::paths`]), and this store refuses none but its own
//! folder of temporaries. Symbolic links inside the root are followed: they are the administrator's business.
//!
//! A root that was used before may be a disk that is not mounted now. [`FilesystemStore::open_used`] never makes such a
//! root anew: what were written there would lie on another disk.
//!
//! After a crash an object is there whole or not at all. An answer was only given after the file *and* every folder on
//! the way to it were on disk; `object_store`'s own `LocalFileSystem` syncs neither, which is why this one exists.

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path as FsPath, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::{self, BoxStream};
use futures::{FutureExt, StreamExt};
use object_store::path::{Path, PathPart};
use object_store::{
    Attributes, CopyMode, CopyOptions, Error, GetOptions, GetRange, GetResult, GetResultPayload, ListResult,
    MultipartUpload, ObjectMeta, ObjectStore, PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    RenameOptions, RenameTargetMode, Result, UploadPart,
};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::paths;

const STORE: &str = "filesystem";

/// Folder of temporaries below the root. No encoded path holds a `~`, so no object can lie there.
const TEMPORARIES: &str = ".tmp~";

/// Folders remembered as durable. 65,536 paths are about 10 MB; when full, all are forgotten and synced once more.
const KNOWN_FOLDERS_MAX: usize = 65_536;

/// Listed objects in flight between the walk and its reader.
const LIST_BUFFER: usize = 1_024;

/// Puts whose temporary or folder somebody removed are tried again this often.
const VANISHED_RETRIES: usize = 3;

/// An [`ObjectStore`] in a folder. Clones share one state.
#[derive(Clone, Debug)]
pub struct FilesystemStore {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    temporaries: PathBuf,
    /// A folder that must be there before anything is made in the root.
    marker: Option<PathBuf>,
    process: u128,
    next_temporary: AtomicU64,
    /// Folders whose entry in their parent is on disk.
    durable: Mutex<HashSet<PathBuf>>,
}

/// What failed on which file; the source of [`Error::Generic`] and its like.
#[derive(Debug, thiserror::Error)]
#[error("failed to {action} `{}`", path.display())]
struct FileError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

impl FilesystemStore {
    /// Opens `root`, which is made if it is missing, and removes what a crash left of unfinished puts. Several processes
    /// may have one root open: temporaries in use are locked and stay.
    ///
    /// # Errors
    /// If the folder cannot be made or written.
    pub fn open(root: &FsPath) -> Result<Self> {
        let root = absolute(root)?;
        create_durably(&root)?;
        Self::in_root(root, None)
    }

    /// Opens `root` for its first use: makes it if it is missing, and its marker, durably.
    ///
    /// # Errors
    /// If the folder cannot be made or written.
    pub fn open_first(root: &FsPath) -> Result<Self> {
        create_durably(&marker(&absolute(root)?))?;
        Self::open_used(root)
    }

    /// Opens `root`, which was used before. It must be there and hold what the first use made, now and whenever
    /// something is made in it: a disk may be unmounted while we run.
    ///
    /// # Errors
    /// [`Error::NotFound`] if it is not there or empty; else if it cannot be written.
    pub fn open_used(root: &FsPath) -> Result<Self> {
        let root = absolute(root)?;
        let marker = marker(&root);
        check_marker(&marker)?;
        Self::in_root(root, Some(marker))
    }

    fn in_root(root: PathBuf, marker: Option<PathBuf>) -> Result<Self> {
        let temporaries = root.join(TEMPORARIES);
        create_durably(&temporaries)?;
        remove_leftovers(&temporaries)?;
        let (process, next_temporary) = (rand::random(), AtomicU64::new(0));
        let inner = Inner { root, temporaries, marker, process, next_temporary, durable: Mutex::default() };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Runs blocking work where it blocks nobody.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> Result<T> + Send + 'static) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&inner)).await?
    }
}

impl fmt::Display for FilesystemStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FilesystemStore({})", self.inner.root.display())
    }
}

/// A file that is not an object yet. Removed when dropped, locked while in use.
#[derive(Debug)]
struct Temporary {
    file: File,
    path: PathBuf,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename there is nothing to remove, and what a failure leaves behind goes at the next open.
        let _ = fs::remove_file(&self.path);
    }
}

impl Inner {
    fn resolve(&self, location: &Path) -> Result<PathBuf> {
        let mut path = self.root.clone();
        for part in location.parts() {
            path.push(part.as_ref());
        }
        if location.is_root() || path.starts_with(&self.temporaries) {
            let source = format!("`{location}` cannot be an object").into();
            return Err(Error::NotSupported { source });
        }
        Ok(path)
    }

    fn temporary(&self) -> Result<Temporary> {
        self.check_root()?;
        let number = self.next_temporary.fetch_add(1, Ordering::Relaxed);
        let path = self.temporaries.join(format!("{:032x}-{number}", self.process));
        let create = || File::options().read(true).write(true).create_new(true).open(&path);
        let file = match create() {
            // Only this one folder: a root that is gone may be a volume that is not mounted, and must not be made anew.
            Err(e) if e.kind() == io::ErrorKind::NotFound => fs::create_dir(&self.temporaries).and_then(|()| create()),
            other => other,
        };
        let file = file.map_err(|e| failure("create", &path, e))?;
        let temporary = Temporary { file, path };
        temporary.file.try_lock().map_err(|e| failure("lock", &temporary.path, e.into()))?;
        Ok(temporary)
    }

    fn put(&self, location: &Path, payload: &PutPayload, create: bool) -> Result<PutResult> {
        let path = self.resolve(location)?;
        retry_vanished(|| {
            let temporary = self.temporary()?;
            let mut at = 0;
            for chunk in payload.iter() {
                temporary.file.write_all_at(chunk, at).map_err(|e| failure("write", &path, e))?;
                at += chunk.len() as u64;
            }
            self.publish(&temporary, &path, create)
        })
    }

    /// Gives a temporary its name. Nothing is visible before its bytes are on disk, nothing is answered before its name
    /// is.
    fn publish(&self, temporary: &Temporary, path: &FsPath, create: bool) -> Result<PutResult> {
        temporary.file.sync_all().map_err(|e| failure("sync", path, e))?;
        let metadata = temporary.file.metadata().map_err(|e| failure("inspect", path, e))?;
        self.make_parents(path)?;
        let named = if create { fs::hard_link(&temporary.path, path) } else { fs::rename(&temporary.path, path) };
        // Also when the object was there already: an earlier put may have failed between its link and this sync, and
        // the caller who now finds his own bytes takes them as durable.
        self.sync_parent_after(named.map_err(|e| failure("name", path, e)), path)?;
        Ok(PutResult { e_tag: Some(etag(&metadata)), version: None })
    }

    fn sync_parent_after(&self, outcome: Result<()>, path: &FsPath) -> Result<()> {
        match outcome {
            Ok(()) | Err(Error::AlreadyExists { .. }) => sync_folder(parent(path))?,
            Err(Error::NotFound { .. }) => self.known().clear(),
            Err(_) => {}
        }
        outcome
    }

    /// Makes every missing folder between root and `path`, and syncs each folder that gained one. A folder that is found
    /// in place is synced once per process: whoever made it may have died before.
    fn make_parents(&self, path: &FsPath) -> Result<()> {
        let folder = parent(path);
        if folder == self.root || self.known().contains(folder) {
            return Ok(());
        }
        self.make_parents(folder)?;
        match fs::create_dir(folder) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(failure("create", folder, e)),
            _ => sync_folder(parent(folder))?,
        }
        let mut known = self.known();
        if known.len() >= KNOWN_FOLDERS_MAX {
            known.clear();
        }
        known.insert(folder.to_owned());
        Ok(())
    }

    /// Fails if the root is not the one that was opened any more. Asked before each write: it costs a microsecond, and a
    /// put that takes milliseconds would go to another disk.
    fn check_root(&self) -> Result<()> {
        self.marker.as_deref().map_or(Ok(()), check_marker)
    }

    fn known(&self) -> std::sync::MutexGuard<'_, HashSet<PathBuf>> {
        // A panic between two lines that hold the lock leaves a set that is right, only smaller.
        self.durable.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open_object(&self, location: &Path) -> Result<(File, PathBuf, ObjectMeta)> {
        let path = self.resolve(location)?;
        let file = File::open(&path).map_err(|e| failure("open", &path, e))?;
        let metadata = file.metadata().map_err(|e| failure("inspect", &path, e))?;
        if metadata.is_dir() {
            return Err(failure("open", &path, io::Error::new(io::ErrorKind::NotFound, "it is a folder")));
        }
        let meta = object_meta(location.clone(), &metadata, &path)?;
        Ok((file, path, meta))
    }

    fn get(&self, location: &Path, options: &GetOptions) -> Result<GetResult> {
        let (file, path, meta) = self.open_object(location)?;
        options.check_preconditions(&meta)?;
        let range = match &options.range {
            Some(range) => checked(range, meta.size)?,
            None => 0..meta.size,
        };
        Ok(GetResult { payload: GetResultPayload::File(file, path), attributes: Attributes::default(), range, meta })
    }

    fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let (file, path, meta) = self.open_object(location)?;
        let read = |range: &Range<u64>| {
            let range = checked(&GetRange::Bounded(range.clone()), meta.size)?;
            let bytes = usize::try_from(range.end - range.start).map_err(|e| generic(e.into()))?;
            let mut buffer = vec![0; bytes];
            file.read_exact_at(&mut buffer, range.start).map_err(|e| failure("read", &path, e))?;
            Ok(Bytes::from(buffer))
        };
        ranges.iter().map(read).collect()
    }

    fn delete(&self, location: &Path) -> Result<()> {
        let path = self.resolve(location)?;
        fs::remove_file(&path).map_err(|e| failure("delete", &path, e))?;
        sync_folder(parent(&path))
    }

    /// Links rather than copies: objects are never changed in place, so two names may share one file.
    fn copy(&self, from: &Path, to: &Path, create: bool) -> Result<()> {
        let (from, to) = (self.resolve(from)?, self.resolve(to)?);
        self.check_root()?;
        retry_vanished(|| {
            self.make_parents(&to)?;
            if create {
                return self.sync_parent_after(fs::hard_link(&from, &to).map_err(|e| failure("copy to", &to, e)), &to);
            }
            let temporary = self.temporary()?;
            let staged = temporary.path.with_extension("copy");
            fs::hard_link(&from, &staged).map_err(|e| failure("copy", &from, e))?;
            let renamed = fs::rename(&staged, &to).map_err(|e| failure("copy to", &to, e));
            // Renaming one name of a file onto another name of the same file does nothing, and leaves both.
            let _ = fs::remove_file(&staged);
            self.sync_parent_after(renamed, &to)
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> Result<()> {
        let (from, to) = (self.resolve(from)?, self.resolve(to)?);
        self.check_root()?;
        retry_vanished(|| {
            self.make_parents(&to)?;
            let renamed = fs::rename(&from, &to).map_err(|e| failure("rename", &from, e));
            self.sync_parent_after(renamed, &to)
        })?;
        sync_folder(parent(&from))
    }

    fn folder(&self, prefix: Option<&Path>) -> PathBuf {
        let mut path = self.root.clone();
        path.extend(prefix.iter().flat_map(|prefix| prefix.parts()).map(|part| part.as_ref().to_owned()));
        path
    }

    /// Entries of one folder, by name: folders and objects. Names that no path can hold are nobody's objects; entries
    /// that vanish while we look are gone.
    fn entries(&self, folder: &FsPath, location: &Path) -> Result<(BTreeSet<Path>, Vec<ObjectMeta>)> {
        let (mut folders, mut objects) = (BTreeSet::new(), Vec::new());
        let reader = match fs::read_dir(folder) {
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                return Ok((folders, objects));
            }
            other => other.map_err(|e| failure("list", folder, e))?,
        };
        for entry in reader {
            let entry = entry.map_err(|e| failure("list", folder, e))?;
            let path = entry.path();
            let name = entry.file_name();
            let Some(part) = name.to_str().and_then(|name| PathPart::parse(name).ok()) else { continue };
            if path == self.temporaries {
                continue;
            }
            let child = location.clone().join(part);
            match fs::metadata(&path) {
                Ok(metadata) if metadata.is_dir() => drop(folders.insert(child)),
                Ok(metadata) => objects.push(object_meta(child, &metadata, &path)?),
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(failure("inspect", &path, e)),
            }
        }
        objects.sort_by(|a, b| a.location.cmp(&b.location));
        Ok((folders, objects))
    }

    /// Sends every object below `prefix`; ends early when nobody listens any more.
    fn walk(&self, prefix: Option<&Path>, out: &mpsc::Sender<ObjectMeta>) -> Result<()> {
        let mut pending = vec![prefix.cloned().unwrap_or_default()];
        while let Some(location) = pending.pop() {
            let (folders, objects) = self.entries(&self.folder(Some(&location)), &location)?;
            pending.extend(folders.into_iter().rev());
            for object in objects {
                if out.blocking_send(object).is_err() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl ObjectStore for FilesystemStore {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let create = match opts.mode {
            PutMode::Create => true,
            PutMode::Overwrite => false,
            PutMode::Update(_) => {
                let operation = "`put_opts` with mode `PutMode::Update`".into();
                return Err(Error::NotImplemented { operation, implementer: self.to_string() });
            }
        };
        let location = location.clone();
        self.blocking(move |inner| inner.put(&location, &payload, create)).await
    }

    async fn put_multipart_opts(&self, location: &Path, _: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let (store, location) = (self.clone(), location.clone());
        let path = store.inner.resolve(&location)?;
        let temporary = self.blocking(Inner::temporary).await?;
        let parts = Parts { temporary, written: AtomicU64::new(0) };
        Ok(Box::new(Upload { store, path, bytes: 0, parts: Some(Arc::new(parts)) }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        let location = location.clone();
        self.blocking(move |inner| inner.get(&location, &options)).await
    }

    async fn get_ranges(&self, location: &Path, ranges: &[Range<u64>]) -> Result<Vec<Bytes>> {
        let (location, ranges) = (location.clone(), ranges.to_vec());
        self.blocking(move |inner| inner.get_ranges(&location, &ranges)).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let store = self.clone();
        locations
            .map(move |location| {
                let store = store.clone();
                async move {
                    let location = location?;
                    store.blocking(move |inner| inner.delete(&location).map(|()| location)).await
                }
            })
            .buffered(10)
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (inner, prefix) = (Arc::clone(&self.inner), prefix.cloned());
        let start = async move {
            let (send, receive) = mpsc::channel(LIST_BUFFER);
            let walk = tokio::task::spawn_blocking(move || inner.walk(prefix.as_ref(), &send));
            stream::unfold((receive, Some(walk)), next_listed)
        };
        start.flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        let prefix = prefix.cloned();
        self.blocking(move |inner| {
            let location = prefix.clone().unwrap_or_default();
            let (folders, objects) = inner.entries(&inner.folder(prefix.as_ref()), &location)?;
            Ok(ListResult { common_prefixes: folders.into_iter().collect(), objects })
        })
        .await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        let (from, to, create) = (from.clone(), to.clone(), options.mode == CopyMode::Create);
        self.blocking(move |inner| inner.copy(&from, &to, create)).await
    }

    async fn rename_opts(&self, from: &Path, to: &Path, options: RenameOptions) -> Result<()> {
        let (from, to) = (from.clone(), to.clone());
        self.blocking(move |inner| match options.target_mode {
            RenameTargetMode::Overwrite => inner.rename(&from, &to),
            RenameTargetMode::Create => inner.copy(&from, &to, true).and_then(|()| inner.delete(&from)),
        })
        .await
    }
}

type Listing = (mpsc::Receiver<ObjectMeta>, Option<JoinHandle<Result<()>>>);

/// The next object of a walk; at its end its error, so that a walk that failed is never a short list.
async fn next_listed((mut receive, walk): Listing) -> Option<(Result<ObjectMeta>, Listing)> {
    if let Some(object) = receive.recv().await {
        return Some((Ok(object), (receive, walk)));
    }
    match walk?.await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some((Err(error), (receive, None))),
        Err(error) => Some((Err(error.into()), (receive, None))),
    }
}

/// A multipart upload: parts are written into one temporary, which completion names.
#[derive(Debug)]
struct Upload {
    store: FilesystemStore,
    path: PathBuf,
    bytes: u64,
    parts: Option<Arc<Parts>>,
}

#[derive(Debug)]
struct Parts {
    temporary: Temporary,
    /// Bytes of parts that were written whole.
    written: AtomicU64,
}

#[async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let start = self.bytes;
        self.bytes += data.content_length() as u64;
        let (store, parts) = (self.store.clone(), self.parts.clone());
        async move {
            let parts = parts.ok_or_else(finished)?;
            let write = move |_: &Inner| {
                let mut at = start;
                for chunk in data.iter() {
                    let written = parts.temporary.file.write_all_at(chunk, at);
                    written.map_err(|e| failure("write", &parts.temporary.path, e))?;
                    at += chunk.len() as u64;
                }
                parts.written.fetch_add(at - start, Ordering::AcqRel);
                Ok(())
            };
            store.blocking(write).await
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let (parts, path, bytes) = (self.parts.take().ok_or_else(finished)?, self.path.clone(), self.bytes);
        self.store
            .blocking(move |inner| {
                if parts.written.load(Ordering::Acquire) != bytes {
                    return Err(generic(format!("`{}` lacks a part that was not written", path.display()).into()));
                }
                inner.publish(&parts.temporary, &path, false)
            })
            .await
    }

    async fn abort(&mut self) -> Result<()> {
        self.parts.take().ok_or_else(finished)?;
        Ok(())
    }
}

/// Repeats a put whose temporary or folder was removed under it.
fn retry_vanished<T>(mut put: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..VANISHED_RETRIES {
        match put() {
            Err(Error::NotFound { .. }) => {}
            outcome => return outcome,
        }
    }
    put()
}

/// Makes `folder` and its missing ancestors, and syncs each folder that gained one.
fn create_durably(folder: &FsPath) -> Result<()> {
    if folder.is_dir() {
        return Ok(());
    }
    create_durably(parent(folder))?;
    match fs::create_dir(folder) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(failure("create", folder, e)),
        _ => sync_folder(parent(folder)),
    }
}

/// Removes temporaries that nobody holds: their process died.
fn remove_leftovers(temporaries: &FsPath) -> Result<()> {
    for entry in fs::read_dir(temporaries).map_err(|e| failure("list", temporaries, e))? {
        let path = entry.map_err(|e| failure("list", temporaries, e))?.path();
        let Ok(file) = File::open(&path) else { continue };
        if file.try_lock().is_ok() {
            // It may have got its name and gone in the meantime.
            let _ = fs::remove_file(&path);
        }
    }
    Ok(())
}

fn absolute(root: &FsPath) -> Result<PathBuf> {
    std::path::absolute(root).map_err(|e| failure("find", root, e))
}

fn marker(root: &FsPath) -> PathBuf {
    root.join(paths::CLUSTER)
}

fn check_marker(marker: &FsPath) -> Result<()> {
    match fs::metadata(marker) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(failure("use", marker, io::ErrorKind::NotADirectory.into())),
        Err(e) => Err(failure("find", marker, e)),
    }
}

fn parent(path: &FsPath) -> &FsPath {
    path.parent().unwrap_or(path)
}

fn sync_folder(folder: &FsPath) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(|e| failure("sync", folder, e))
}

fn checked(range: &GetRange, size: u64) -> Result<Range<u64>> {
    range.as_range(size).map_err(|e| generic(e.into()))
}

fn object_meta(location: Path, metadata: &fs::Metadata, path: &FsPath) -> Result<ObjectMeta> {
    let last_modified = metadata.modified().map_err(|e| failure("inspect", path, e))?.into();
    Ok(ObjectMeta { location, last_modified, size: metadata.len(), e_tag: Some(etag(metadata)), version: None })
}

/// Inode, time of change and size, as `LocalFileSystem` and web servers make it.
fn etag(metadata: &fs::Metadata) -> String {
    let micros = i128::from(metadata.mtime()) * 1_000_000 + i128::from(metadata.mtime_nsec()) / 1_000;
    format!("{:x}-{micros:x}-{:x}", metadata.ino(), metadata.len())
}

fn finished() -> Error {
    generic("the upload is completed or aborted".into())
}

fn generic(source: Box<dyn std::error::Error + Send + Sync>) -> Error {
    Error::Generic { store: STORE, source }
}

fn failure(action: &'static str, path: &FsPath, source: io::Error) -> Error {
    let kind = source.kind();
    let text = path.display().to_string();
    let source = Box::new(FileError { action, path: path.to_owned(), source });
    match kind {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::NotFound { path: text, source },
        io::ErrorKind::AlreadyExists => Error::AlreadyExists { path: text, source },
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::PermissionDenied { path: text, source }
        }
        _ => Error::Generic { store: STORE, source },
    }
}

#[cfg(test)]
mod tests {
    use object_store::ObjectStoreExt;

    use super::*;

    #[tokio::test]
    async fn leftovers_of_a_crash_go_at_open_and_uploads_under_way_stay() {
        let folder = tempfile::tempdir().unwrap();
        let store = FilesystemStore::open(folder.path()).unwrap();
        let path = Path::parse("a/b").unwrap();
        let mut upload = store.put_multipart(&path).await.unwrap();
        upload.put_part("one".into()).await.unwrap();
        let leftover = folder.path().join(TEMPORARIES).join("dead");
        fs::write(&leftover, "half").unwrap();
        let again = FilesystemStore::open(folder.path()).unwrap();
        assert!(!leftover.exists());
        upload.put_part("two".into()).await.unwrap();
        upload.complete().await.unwrap();
        assert_eq!(again.get(&path).await.unwrap().bytes().await.unwrap(), "onetwo");
        assert_eq!(fs::read_dir(folder.path().join(TEMPORARIES)).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_folder_that_somebody_removed_is_made_again() {
        let folder = tempfile::tempdir().unwrap();
        let store = FilesystemStore::open(folder.path()).unwrap();
        let path = Path::parse("users/a/file").unwrap();
        store.put(&path, "one".into()).await.unwrap();
        fs::remove_dir_all(folder.path().join("users")).unwrap();
        store.put(&path, "two".into()).await.unwrap();
        fs::remove_dir_all(folder.path()).unwrap();
        assert!(store.put(&path, "three".into()).await.is_err());
    }

    #[tokio::test]
    async fn a_used_root_is_never_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (root, away) = (folder.path().join("root"), folder.path().join("away"));
        let path = Path::parse("users/a/file").unwrap();
        let gone =
            |result: Result<FilesystemStore>| assert!(matches!(result, Err(Error::NotFound { .. })), "{result:?}");
        gone(FilesystemStore::open_used(&root));
        assert!(!root.exists());
        let running = FilesystemStore::open_first(&root).unwrap();
        running.put(&path, "one".into()).await.unwrap();
        // The disk is unmounted: what stays is an empty folder, or one that an earlier mistake left something in.
        fs::rename(&root, &away).unwrap();
        for leftovers in [&[][..], &[TEMPORARIES], &[TEMPORARIES, "users/a"]] {
            fs::create_dir(&root).unwrap();
            leftovers.iter().for_each(|leftover| fs::create_dir_all(root.join(leftover)).unwrap());
            gone(FilesystemStore::open_used(&root));
            assert!(matches!(running.put(&path, "two".into()).await, Err(Error::NotFound { .. })));
            assert!(running.get(&path).await.is_err());
            assert_eq!(fs::read_dir(&root).unwrap().count(), leftovers.len());
            fs::remove_dir_all(&root).unwrap();
        }
        fs::rename(&away, &root).unwrap();
        running.put(&path, "two".into()).await.unwrap();
        let again = FilesystemStore::open_used(&root).unwrap();
        assert_eq!(again.get(&path).await.unwrap().bytes().await.unwrap(), "two");
    }

    #[tokio::test]
    async fn a_part_that_was_not_written_fails_the_upload() {
        let folder = tempfile::tempdir().unwrap();
        let store = FilesystemStore::open(folder.path()).unwrap();
        let path = Path::parse("a").unwrap();
        let mut upload = store.put_multipart(&path).await.unwrap();
        drop(upload.put_part("one".into()));
        upload.put_part("two".into()).await.unwrap();
        assert!(upload.complete().await.is_err());
        assert!(matches!(store.head(&path).await, Err(Error::NotFound { .. })));
    }

    #[tokio::test]
    async fn the_folder_of_temporaries_is_no_place_for_objects_and_not_listed() {
        let folder = tempfile::tempdir().unwrap();
        let store = FilesystemStore::open(folder.path()).unwrap();
        let inside = Path::parse(format!("{TEMPORARIES}/x")).unwrap();
        assert!(matches!(store.put(&inside, "x".into()).await, Err(Error::NotSupported { .. })));
        fs::write(folder.path().join(TEMPORARIES).join("x"), "x").unwrap();
        assert_eq!(store.list(None).count().await, 0);
        assert!(store.list_with_delimiter(None).await.unwrap().common_prefixes.is_empty());
    }
}
