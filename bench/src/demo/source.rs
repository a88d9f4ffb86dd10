//! All changelogs of this machine as rows by user, each entry once.
//!
//! The changelog of a source package lies in each of its binary packages; an entry is known by source package and version.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use flate2::read::MultiGzDecoder;
use kalamdb_model::UserId;

use super::changelog::{self, Entry, Oddity};

/// Largest changelog, decompressed; a larger one is reported and left out.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Depth of folders below the documentation folder.
const DEPTH_MAX: usize = 8;
/// The name of Debian's changelog in every package.
const FILE_NAME: &str = "changelog.Debian.gz";

/// Entries by package and version. The first is the row; more than one is a mistake in the files.
type Seen = HashMap<(String, String), Vec<Entry>>;

/// What the files hold.
#[derive(Default)]
pub struct Source {
    /// Entries by user, sorted by package, in the order of their file.
    pub users: BTreeMap<UserId, Vec<Entry>>,
    /// Files read.
    pub files: usize,
    /// Entries in them, copies included.
    pub found: usize,
    /// Copies of entries that were seen before.
    pub copies: usize,
    /// What was not taken as it is: reason → how often, and the first place.
    pub left_out: BTreeMap<String, (usize, String)>,
}

impl Source {
    /// Reads all changelogs below `docs`.
    ///
    /// # Errors
    /// If the folder cannot be listed.
    pub fn read(docs: &Path, advance: impl Fn()) -> anyhow::Result<Self> {
        let mut source = Self::default();
        let mut seen = Seen::new();
        for path in files(docs)? {
            match text_of(&path) {
                Ok((text, encoding)) => {
                    source.files += 1;
                    if let Some(encoding) = encoding {
                        source.odd(encoding, &path.display());
                    }
                    source.take(&path, &text, &mut seen);
                }
                Err(error) => {
                    source.odd("files that cannot be read, skipped", &format!("{}: {error:#}", path.display()))
                }
            }
            advance();
        }
        for entry in seen.into_values().filter_map(|variants| variants.into_iter().next()) {
            source.assign(entry);
        }
        for entries in source.users.values_mut() {
            entries.sort_by(|a, b| (&a.package, &a.version).cmp(&(&b.package, &b.version)));
        }
        Ok(source)
    }

    /// Rows to load.
    pub fn rows(&self) -> usize {
        self.users.values().map(Vec::len).sum()
    }

    /// Users with the most rows first.
    pub fn by_rows(&self) -> Vec<(&UserId, &[Entry])> {
        let mut users: Vec<_> = self.users.iter().map(|(user, entries)| (user, entries.as_slice())).collect();
        users.sort_by_key(|(user, entries)| (std::cmp::Reverse(entries.len()), *user));
        users
    }

    fn take(&mut self, path: &Path, text: &str, seen: &mut Seen) {
        let parsed = changelog::parse(text);
        for (line, oddity) in parsed.odd {
            self.odd(oddity.as_str(), &format!("{}, line {line}", path.display()));
        }
        for entry in parsed.entries {
            self.found += 1;
            let variants = seen.entry((entry.package.clone(), entry.version.clone())).or_default();
            if variants.contains(&entry) {
                self.copies += 1;
                continue;
            }
            if !variants.is_empty() {
                let place = format!("{} ({}) in {}", entry.package, entry.version, path.display());
                self.odd("entries whose package and version stand elsewhere with other contents, skipped", &place);
            }
            variants.push(entry);
        }
    }

    fn assign(&mut self, entry: Entry) {
        match UserId::new(entry.maintainer.as_str()) {
            Ok(user) => self.users.entry(user).or_default().push(entry),
            Err(error) => self.odd(&format!("entries without a possible user ({error}), skipped"), &entry.package),
        }
    }

    fn odd(&mut self, reason: &str, place: &impl ToString) {
        self.left_out.entry(reason.to_owned()).or_insert_with(|| (0, place.to_string())).0 += 1;
    }
}

impl Oddity {
    /// Whether nothing is lost by it.
    pub fn is_harmless(reason: &str) -> bool {
        reason == Self::Remark.as_str()
    }
}

/// All changelogs below `folder`, sorted; links are not followed, since they lead to the same files.
pub fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![(folder.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let entries = std::fs::read_dir(&folder).with_context(|| format!("failed to list `{}`", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("failed to list `{}`", folder.display()))?;
            let kind = entry.file_type()?;
            if kind.is_dir() && depth < DEPTH_MAX {
                folders.push((entry.path(), depth + 1));
            } else if kind.is_file() && entry.file_name() == FILE_NAME {
                found.push(entry.path());
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The text of a file, and what to report about its encoding.
fn text_of(path: &Path) -> anyhow::Result<(String, Option<&'static str>)> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    MultiGzDecoder::new(file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    anyhow::ensure!(bytes.len() as u64 <= FILE_BYTES_MAX, "more than {FILE_BYTES_MAX} bytes");
    Ok(match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        // Line by line: mostly UTF-8 with a few lines from before it. Latin-1 maps every byte to the character of its number.
        Err(error) => {
            let lines =
                error.as_bytes().split_inclusive(|byte| *byte == b'\n').map(|line| match std::str::from_utf8(line) {
                    Ok(line) => line.to_owned(),
                    Err(_) => line.iter().map(|byte| char::from(*byte)).collect(),
                });
            (lines.collect(), Some("files with lines that are not UTF-8, those read as Latin-1"))
        }
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn entry(package: &str, version: &str, who: &str) -> String {
        format!(
            "{package} ({version}) unstable; urgency=low\n\n  * é\n\n -- {who}  Mon, 02 Jan 2023 13:06:21 +0100\n\n"
        )
    }

    fn write(docs: &Path, package: &str, text: &[u8]) {
        let folder = docs.join(package);
        std::fs::create_dir_all(&folder).unwrap();
        let file = std::fs::File::create(folder.join(FILE_NAME)).unwrap();
        let mut file = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        file.write_all(text).unwrap();
        file.finish().unwrap();
    }

    #[test]
    fn an_entry_in_two_binary_packages_is_one_row_of_its_maintainer() {
        let docs = tempfile::tempdir().unwrap();
        let both = entry("a", "1", "A <a@x>") + &entry("a", "2", "a <a@x>");
        write(docs.path(), "a", both.as_bytes());
        write(docs.path(), "liba", both.as_bytes());
        write(docs.path(), "a-other", entry("a", "1", "B <b@x>").as_bytes());
        let source = Source::read(docs.path(), || ()).unwrap();
        assert_eq!((source.files, source.found, source.copies, source.rows()), (3, 5, 2, 2));
        let users: Vec<&str> = source.users.keys().map(UserId::as_str).collect();
        assert_eq!(users, ["A <a@x>", "a <a@x>"]);
        assert_eq!(source.left_out.values().map(|(count, _)| *count).collect::<Vec<_>>(), [1]);
    }

    #[test]
    fn files_of_another_encoding_or_broken_ones_are_reported_and_stop_nothing() {
        let docs = tempfile::tempdir().unwrap();
        let latin1: Vec<u8> = entry("a", "1", "J\u{f6}rg <j@x>").chars().map(|c| c as u8).collect();
        write(docs.path(), "a", &[latin1.as_slice(), entry("b", "1", "Jörg <j@x>").as_bytes()].concat());
        std::fs::create_dir(docs.path().join("broken")).unwrap();
        std::fs::write(docs.path().join("broken").join(FILE_NAME), b"no gzip").unwrap();
        let long = format!("{} <x@x>", "x".repeat(300));
        write(docs.path(), "c", entry("c", "1", &long).as_bytes());
        let source = Source::read(docs.path(), || ()).unwrap();
        assert_eq!(source.users.keys().map(UserId::as_str).collect::<Vec<_>>(), ["Jörg <j@x>"]);
        assert_eq!(source.rows(), 2);
        assert_eq!(source.left_out.len(), 3);
    }
}
