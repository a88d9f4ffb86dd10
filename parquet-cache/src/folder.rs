//! The folder of the cache: whose it is, of which format, and how much of the disk it may take.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::chunk::CHUNK_BYTES;

/// foyer evicts a block at a time.
const BLOCK_BYTES_MAX: u64 = 16 << 20;
/// A chunk and its index fit into one.
const BLOCK_BYTES_MIN: u64 = 1 << 20;
/// Fewer, and each insert evicts a large share.
const BLOCKS_MIN: u64 = 8;
/// Of what the disk has free, the cache takes one part in so many: it is there for the rows first.
const FREE_SHARE: u64 = 2;

/// Says what made the other files.
const FORMAT_FILE: &str = "FORMAT";
/// What foyer calls a block.
const BLOCK_PREFIX: &str = "foyer-storage-direct-fs-";

/// How the folder is divided.
pub(crate) struct Room {
    pub(crate) block_bytes: usize,
    pub(crate) blocks: usize,
}

/// How long a look at the free space is trusted.
const FREE_TRUSTED: Duration = Duration::from_secs(1);

/// Keeps the cache from taking the last of a disk that it shares with rows. The default one has no disk to keep.
#[derive(Debug, Default)]
pub(crate) struct Reserve {
    folder: PathBuf,
    bytes: u64,
    looked: Mutex<Option<(Instant, bool)>>,
}

impl Reserve {
    pub(crate) fn new(folder: PathBuf, bytes: u64) -> Self {
        Self { folder, bytes, looked: Mutex::default() }
    }

    /// Whether at least so much is free. A disk that does not tell is left alone.
    pub(crate) fn is_left(&self) -> bool {
        if self.bytes == 0 {
            return true;
        }
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        match *looked {
            Some((at, is_left)) if at.elapsed() < FREE_TRUSTED => is_left,
            _ => {
                let is_left = free(&self.folder).is_ok_and(|free| free >= self.bytes);
                *looked = Some((Instant::now(), is_left));
                is_left
            }
        }
    }
}

fn free(folder: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Makes `folder` fit for use, with room for at most `wanted` bytes, and less if its disk would have fewer than `reserve`
/// left. What another format or version left is removed, not read. Nothing is allocated: foyer's files have holes until
/// they are written.
pub(crate) fn prepare(folder: &Path, wanted: u64, reserve: u64) -> io::Result<Room> {
    DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    // It holds bytes of users.
    fs::set_permissions(folder, Permissions::from_mode(0o700))?;
    let bytes = wanted.min(room_for(folder, reserve)?);
    if bytes < wanted {
        tracing::info!(folder = %folder.display(), bytes, "the cache takes less than it may: half of what the disk has free");
    }
    let block_bytes = (bytes / BLOCKS_MIN).min(BLOCK_BYTES_MAX) & !4_095;
    if block_bytes < BLOCK_BYTES_MIN {
        return Err(io::Error::other(format!(
            "{bytes} bytes are too few; {} are needed",
            BLOCK_BYTES_MIN * BLOCKS_MIN
        )));
    }
    let format = format!("kalamdb parquet cache 1, foyer 0.22, chunks of {CHUNK_BYTES}, blocks of {block_bytes}\n");
    let file = folder.join(FORMAT_FILE);
    let is_ours = fs::read(&file).is_ok_and(|found| found == format.as_bytes());
    let blocks = bytes / block_bytes;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix(BLOCK_PREFIX)).and_then(|n| n.parse::<u64>().ok());
        let is_file = entry.file_type()?.is_file();
        let stays = is_ours && is_file && (name == FORMAT_FILE || number.is_some_and(|number| number < blocks));
        if stays {
            continue;
        }
        if entry.file_type()?.is_dir() { fs::remove_dir_all(entry.path())? } else { fs::remove_file(entry.path())? }
    }
    // Last: a folder that was emptied by half is emptied again.
    if !is_ours {
        fs::write(&file, format)?;
    }
    let fit = |bytes: u64| usize::try_from(bytes).map_err(io::Error::other);
    Ok(Room { block_bytes: fit(block_bytes)?, blocks: fit(blocks)? })
}

/// Half of what is free above the reserve, or the cache's own already.
fn room_for(folder: &Path, reserve: u64) -> io::Result<u64> {
    let mut bytes = free(folder)?;
    for entry in fs::read_dir(folder)? {
        bytes = bytes.saturating_add(entry?.metadata()?.blocks().saturating_mul(512));
    }
    Ok(bytes.saturating_sub(reserve) / FREE_SHARE)
}
