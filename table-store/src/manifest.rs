//! What files an instance has, and the edits that a flush makes to that.
//!
//! Owns: the JSON of manifests and edits, format 1. Does not own: where edits are stored ([`crate::stream`]) or
//! where the manifest of an instance is kept (the write buffer).
//!
//! After a crash edits are applied again in their order; applying one twice changes nothing.

use std::collections::BTreeMap;

use kalamdb_model::catalog::Location;
use kalamdb_model::ids::{Generation, InstanceId};
use serde::{Deserialize, Serialize};

use crate::positions::Positions;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// One Parquet file of an instance. Immutable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FileEntry {
    /// Relative to the storage's root.
    pub path: String,
    /// Rows in it.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// What its rows take in memory, decoded.
    #[serde(default)]
    pub raw_bytes: u64,
    /// What the widest of them takes.
    #[serde(default)]
    pub widest_row: u64,
    /// Smallest key, memcomparable; hexadecimal in JSON.
    #[serde(with = "hex")]
    pub min_key: Vec<u8>,
    /// Largest key.
    #[serde(with = "hex")]
    pub max_key: Vec<u8>,
    /// Smallest `_seq`.
    pub min_seq: i64,
    /// Largest `_seq`.
    pub max_seq: i64,
    /// The table's schema version when it was written.
    pub schema_version: u32,
    /// When it was written, microseconds since 1970.
    pub created_us: i64,
    /// Rows that are deleted ones, kept for retention. Decided when the file is written.
    #[serde(default, skip_serializing_if = "Positions::is_empty")]
    pub tombstones: Positions,
    /// When the first of them was deleted, microseconds since 1970; 0 without any.
    #[serde(default)]
    pub deleted_since_us: i64,
    /// The file's deletion vector: rows of which a newer version lies in another file, or whose deletion does. Grows.
    #[serde(default, skip_serializing_if = "Positions::is_empty")]
    pub replaced: Positions,
}

impl FileEntry {
    /// Rows that `SELECT` does not show.
    #[must_use]
    pub fn hidden(&self) -> Positions {
        self.tombstones.union(&self.replaced)
    }

    /// What a row takes in memory, decoded, on average.
    #[must_use]
    pub fn average_row(&self) -> u64 {
        self.raw_bytes / self.rows.max(1)
    }
}

/// All files of one instance, ordered by path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Every row of the instance up to this `_seq` is in the files, or was replaced by one that is.
    pub last_seq: i64,
    /// The files.
    pub files: Vec<FileEntry>,
    /// Where they lie, if not where the table's do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed: Option<Placed>,
}

impl Default for Manifest {
    fn default() -> Self {
        Self { format: FORMAT, last_seq: 0, files: Vec::new(), placed: None }
    }
}

/// Where the files of an instance lie that was moved, or that began elsewhere than its table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Placed {
    /// The place.
    pub location: Location,
    /// How often it was placed. After a crash two storages may both seem to have it: the higher number does.
    pub moves: u32,
}

/// What one flush or compaction changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Edit {
    /// Of which instance.
    pub instance: InstanceId,
    /// Every row of this and earlier generations is in files now.
    pub generation: Generation,
    /// Largest `_seq` that is in files.
    pub last_seq: i64,
    /// New files.
    pub add: Vec<FileEntry>,
    /// Paths of files that these replace.
    pub remove: Vec<String>,
    /// Rows of other files that rows of `add` replace, by path.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub replace: BTreeMap<String, Positions>,
    /// The instance was placed: from now on its files are those of `add` and no others. The same edit stands in the stream
    /// that it leaves, without files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placed: Option<Placed>,
}

/// Why bytes are no manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not this JSON.
    #[error("the manifest is damaged")]
    Damaged(#[source] serde_json::Error),
    /// From a later version of KalamDB.
    #[error("the manifest has format {0}, this version reads up to {FORMAT}; upgrade KalamDB")]
    Newer(u32),
}

impl Manifest {
    /// How often the instance was placed.
    #[must_use]
    pub fn moves(&self) -> u32 {
        self.placed.as_ref().map_or(0, |placed| placed.moves)
    }

    /// The manifest as JSON.
    ///
    /// # Panics
    /// Never: strings and numbers always have a JSON form.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("strings and numbers always have a JSON form")
    }

    /// Reads [`Manifest::encode`].
    ///
    /// # Errors
    /// If it is damaged or of a later format; a damaged manifest is never an empty one.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        #[derive(Deserialize)]
        struct Versioned {
            format: u32,
        }
        let Versioned { format } = serde_json::from_slice(bytes).map_err(ManifestError::Damaged)?;
        if format > FORMAT {
            return Err(ManifestError::Newer(format));
        }
        serde_json::from_slice(bytes).map_err(ManifestError::Damaged)
    }
}

/// The manifest after `edit`. Applying an edit again changes nothing.
#[must_use]
pub fn apply(manifest: &Manifest, edit: &Edit) -> Manifest {
    let placed = edit.placed.as_ref().filter(|placed| placed.moves > manifest.moves());
    let gone = |path: &String| {
        placed.is_some() || edit.remove.contains(path) || edit.add.iter().any(|file| file.path == *path)
    };
    let mut files: Vec<FileEntry> = manifest.files.iter().filter(|file| !gone(&file.path)).cloned().collect();
    for file in &mut files {
        if let Some(replaced) = edit.replace.get(&file.path) {
            file.replaced = file.replaced.union(replaced);
        }
    }
    files.extend(edit.add.iter().cloned());
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let last_seq = manifest.last_seq.max(edit.last_seq);
    Manifest { format: manifest.format, last_seq, files, placed: placed.or(manifest.placed.as_ref()).cloned() }
}

mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let digits: Option<Vec<u8>> =
            text.chars().map(|digit| digit.to_digit(16).and_then(|value| u8::try_from(value).ok())).collect();
        match digits {
            Some(digits) if digits.len() % 2 == 0 => Ok(digits.chunks(2).map(|pair| pair[0] * 16 + pair[1]).collect()),
            _ => Err(D::Error::custom("expected an even number of hexadecimal digits")),
        }
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::ids::{TableId, UserId};
    use kalamdb_model::names::StorageName;
    use proptest::prelude::*;

    use super::*;

    fn file(path: &str) -> FileEntry {
        FileEntry {
            path: path.to_owned(),
            rows: 1,
            bytes: 1,
            raw_bytes: 1,
            widest_row: 1,
            min_key: vec![0, 0xff],
            max_key: vec![0x80],
            min_seq: 1,
            max_seq: 2,
            schema_version: 1,
            created_us: 0,
            tombstones: Positions::default(),
            deleted_since_us: 0,
            replaced: Positions::default(),
        }
    }

    fn edit(add: &[u8], remove: &[u8]) -> Edit {
        let name = |n: &u8| format!("f{n}");
        Edit {
            instance: InstanceId::of_user(UserId::new("a").unwrap(), TableId(1)),
            generation: Generation(1),
            last_seq: 1,
            add: add.iter().map(|n| file(&name(n))).collect(),
            remove: remove.iter().map(name).collect(),
            replace: BTreeMap::new(),
            placed: None,
        }
    }

    fn placed(moves: u32) -> Option<Placed> {
        let location = Location { storage: StorageName::new("s").unwrap(), root: 1, template: "t".to_owned() };
        Some(Placed { location, moves })
    }

    #[test]
    fn placing_takes_all_files_away_but_its_own_and_only_once() {
        let before = apply(&Manifest::default(), &edit(&[1, 2], &[]));
        let moving = Edit { placed: placed(1), ..edit(&[3], &[]) };
        let moved = apply(&before, &moving);
        assert_eq!((moved.files.len(), moved.moves()), (1, 1));
        let later = apply(&moved, &edit(&[4], &[]));
        assert_eq!((apply(&later, &moving).files.len(), later.moves()), (2, 1));
        let left = apply(&later, &Edit { placed: placed(2), ..edit(&[], &[]) });
        assert_eq!((left.files.len(), left.moves()), (0, 2));
        assert_eq!(Manifest::decode(&left.encode()).unwrap(), left);
    }

    proptest! {
        #[test]
        fn applying_an_edit_again_changes_nothing(
            before in proptest::collection::btree_set(0..20_u8, 0..10),
            add in proptest::collection::btree_set(20..30_u8, 0..5),
            remove in proptest::collection::btree_set(0..20_u8, 0..5),
        ) {
            let list = |set: &std::collections::BTreeSet<u8>| set.iter().copied().collect::<Vec<_>>();
            let start = apply(&Manifest::default(), &edit(&list(&before), &[]));
            let change = edit(&list(&add), &list(&remove));
            let once = apply(&start, &change);
            prop_assert_eq!(&apply(&once, &change), &once);
            prop_assert_eq!(once.files.len(), before.difference(&remove).count() + add.len());
        }

        #[test]
        fn a_manifest_reads_back(names in proptest::collection::vec(any::<String>(), 0..5), key in any::<Vec<u8>>()) {
            let files = names.iter().map(|name| FileEntry { min_key: key.clone(), ..file(name) }).collect();
            let manifest = Manifest { files, ..Manifest::default() };
            prop_assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        }
    }

    #[test]
    fn a_damaged_manifest_is_never_an_empty_one() {
        for bad in ["", "{}", "{\"format\":1}", "{\"format\":1,\"files\":[{}]}", "[]", "null"] {
            assert!(matches!(Manifest::decode(bad.as_bytes()), Err(ManifestError::Damaged(_))), "{bad}");
        }
        assert!(matches!(Manifest::decode(b"{\"format\":2,\"files\":{}}"), Err(ManifestError::Newer(2))));
    }
}
