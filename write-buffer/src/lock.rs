//! One process per directory: a locked file that names the process.
//!
//! The lock is the kernel's (`flock`), so it ends with its process however that ends; the pid in the file is only told
//! to people.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::OpenError;

const FILE_NAME: &str = "owner.pid";
/// The owner writes its pid right after it has the lock.
const PID_TRIES: u32 = 10;
const PID_WAIT: Duration = Duration::from_millis(10);

/// Held while the directory is in use.
#[derive(Debug)]
pub(crate) struct DirectoryLock {
    file: File,
}

impl DirectoryLock {
    /// Locks `directory`, which exists, for this process.
    pub(crate) fn take(directory: &Path) -> Result<Self, OpenError> {
        let path = directory.join(FILE_NAME);
        let failed = |source| OpenError::Directory { path: path.clone(), source };
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(locked(directory, &path)),
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).map_err(failed)?;
        file.write_all(format!("{}\n", std::process::id()).as_bytes()).map_err(failed)?;
        Ok(Self { file })
    }
}

impl Drop for DirectoryLock {
    /// Closing would not do: a process that another thread is just starting has a copy of the file until its `exec`,
    /// and the lock would last as long. If this fails, the lock ends with the file.
    fn drop(&mut self) {
        let _released = self.file.unlock();
    }
}

fn locked(directory: &Path, file: &Path) -> OpenError {
    let mut pid = None;
    for _ in 0..PID_TRIES {
        pid = read_pid(file);
        if pid.is_some() {
            break;
        }
        std::thread::sleep(PID_WAIT);
    }
    OpenError::Locked { path: PathBuf::from(directory), pid }
}

fn read_pid(path: &Path) -> Option<u32> {
    let mut text = String::new();
    File::open(path).ok()?.take(32).read_to_string(&mut text).ok()?;
    text.strip_suffix('\n')?.parse().ok()
}
