//! What changed between two catalogs: the payload of a catalog-log entry. Pure.
//!
//! `apply(old, diff(old, new)) == new` up to version and nonce, which are the entry's own.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use kalamdb_model::TableId;
use kalamdb_model::catalog::{Catalog, NamespaceEntry, NodeEntry, StorageEntry, TableEntry};
use kalamdb_model::declared::StorageRoot;
use kalamdb_model::names::{SqlName, StorageName, TableName};
use serde::{Deserialize, Serialize};

/// Changes of one map of the catalog.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(bound(deserialize = "K: Deserialize<'de> + Ord, V: Deserialize<'de>"))]
pub struct Changes<K: Ord, V> {
    /// New and changed entries, whole.
    #[serde(default = "BTreeMap::new", skip_serializing_if = "BTreeMap::is_empty")]
    pub upsert: BTreeMap<K, V>,
    /// Names of entries that are gone.
    #[serde(default = "BTreeSet::new", skip_serializing_if = "BTreeSet::is_empty")]
    pub remove: BTreeSet<K>,
}

/// Changes of a catalog, member by member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CatalogDelta {
    /// The next table's id afterwards.
    pub next_table: u32,
    /// Storages.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub storages: Changes<StorageName, StorageEntry>,
    /// Namespaces.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub namespaces: Changes<SqlName, NamespaceEntry>,
    /// Replica nodes.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub nodes: Changes<String, NodeEntry>,
    /// Tables.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub tables: Changes<TableName, TableEntry>,
    /// Retained tables.
    #[serde(default, skip_serializing_if = "Changes::is_empty")]
    pub retained: Changes<TableName, TableEntry>,
}

impl<K: Ord, V> Default for Changes<K, V> {
    fn default() -> Self {
        Self { upsert: BTreeMap::new(), remove: BTreeSet::new() }
    }
}

impl<K: Ord, V> Changes<K, V> {
    fn is_empty(&self) -> bool {
        self.upsert.is_empty() && self.remove.is_empty()
    }
}

impl<K: Ord + Clone, V: Clone + PartialEq> Changes<K, V> {
    fn between(old: &BTreeMap<K, V>, new: &BTreeMap<K, V>) -> Self {
        let changed = new.iter().filter(|(key, value)| old.get(key) != Some(value));
        Self {
            upsert: changed.map(|(key, value)| (key.clone(), value.clone())).collect(),
            remove: old.keys().filter(|key| !new.contains_key(key)).cloned().collect(),
        }
    }

    fn apply_to(&self, map: &mut BTreeMap<K, V>) {
        for key in &self.remove {
            map.remove(key);
        }
        map.extend(self.upsert.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
}

/// What makes `old` into `new`, but for version and nonce.
#[must_use]
pub fn diff(old: &Catalog, new: &Catalog) -> CatalogDelta {
    CatalogDelta {
        next_table: new.next_table,
        storages: Changes::between(&old.storages, &new.storages),
        namespaces: Changes::between(&old.namespaces, &new.namespaces),
        nodes: Changes::between(&old.nodes, &new.nodes),
        tables: Changes::between(&old.tables, &new.tables),
        retained: Changes::between(&old.retained, &new.retained),
    }
}

/// `catalog` after `delta`, as version `version` with `nonce`.
#[must_use]
pub fn apply(catalog: &Catalog, delta: &CatalogDelta, version: u64, nonce: &str) -> Catalog {
    let mut next = Catalog { version, nonce: nonce.to_owned(), next_table: delta.next_table, ..catalog.clone() };
    delta.storages.apply_to(&mut next.storages);
    delta.namespaces.apply_to(&mut next.namespaces);
    delta.nodes.apply_to(&mut next.nodes);
    delta.tables.apply_to(&mut next.tables);
    delta.retained.apply_to(&mut next.retained);
    next
}

/// How `new` cannot be a later version of `old`; `None` if it can. Ids of tables and columns are never given twice, and
/// what a table is and where its files lie never changes: rows are found by these.
#[must_use]
pub fn contradiction(old: &Catalog, new: &Catalog) -> Option<String> {
    if new.next_table < old.next_table {
        return Some(format!("the next table gets id {}, and {} is taken", new.next_table, old.next_table - 1));
    }
    let known: HashMap<TableId, &TableEntry> = tables(old).map(|table| (table.id, table)).collect();
    let root = |catalog: &Catalog, table: &TableEntry| catalog.root(&table.location).map(StorageRoot::identity);
    tables(new).filter(|table| table.id.0 < old.next_table).find_map(|table| {
        let (name, id) = (&table.name, table.id.0);
        match known.get(&table.id) {
            None => Some(format!("`{name}` has id {id}, which was another table's")),
            Some(was) if was.name != *name => Some(format!("`{name}` has id {id}, which is that of `{}`", was.name)),
            Some(was) if continues(was, table) && root(old, was) == root(new, table) => None,
            Some(_) => Some(format!("`{name}` has other columns or lies elsewhere")),
        }
    })
}

fn tables(catalog: &Catalog) -> impl Iterator<Item = &TableEntry> {
    catalog.tables.values().chain(catalog.retained.values())
}

/// Whether rows of `was` read the same as rows of `table`.
fn continues(was: &TableEntry, table: &TableEntry) -> bool {
    let kept = was
        .columns
        .iter()
        .all(|column| table.column(column.id).is_some_and(|now| (&now.name, &now.ty) == (&column.name, &column.ty)));
    let unmixed = table.columns.iter().all(|column| column.id.0 >= was.next_column || was.column(column.id).is_some());
    kept && unmixed && (was.kind, &was.key, &was.location) == (table.kind, &table.key, &table.location)
}

#[cfg(test)]
mod tests {
    use kalamdb_model::declared::{Kind, ObjectRef, StorageRoot};
    use proptest::prelude::*;

    use super::*;

    fn object(name: &str, resource_version: u32) -> ObjectRef {
        ObjectRef {
            kind: Kind::Namespace,
            name: name.to_owned(),
            uid: name.to_owned(),
            resource_version: resource_version.to_string(),
            generation: 1,
            created: 0,
        }
    }

    fn catalogs() -> impl Strategy<Value = Catalog> {
        let map = || proptest::collection::btree_map("[a-d]", 0..3_u32, 0..4);
        (map(), map(), map(), any::<u32>()).prop_map(|(storages, namespaces, nodes, next_table)| Catalog {
            next_table,
            storages: storages
                .iter()
                .map(|(name, n)| (StorageName::new(name.clone()).unwrap(), storage(name, *n)))
                .collect(),
            namespaces: namespaces
                .iter()
                .map(|(name, n)| (SqlName::new(name.clone()).unwrap(), namespace(name, *n)))
                .collect(),
            nodes: nodes.iter().map(|(name, n)| (name.clone(), node(name, *n))).collect(),
            ..Catalog::default()
        })
    }

    fn storage(name: &str, n: u32) -> StorageEntry {
        StorageEntry {
            object: object(name, n),
            display_name: None,
            roots: (0..=n).map(|root| (root, StorageRoot::Filesystem { path: format!("é/{root}") })).collect(),
            current_root: n,
            credentials_secret: (n == 1).then(|| "creds".to_owned()),
            shared_tables_template: "shared/{namespace}/{tableName}".into(),
            user_tables_template: "users/{userId}/{namespace}/{tableName}".into(),
        }
    }

    fn namespace(name: &str, n: u32) -> NamespaceEntry {
        let options = [("n".to_owned(), n.to_string())].into_iter().collect();
        NamespaceEntry { object: object(name, n), default_storage: None, options }
    }

    fn node(name: &str, n: u32) -> NodeEntry {
        let (address, tags) = (format!("{name}:{n}"), vec![n.to_string()]);
        NodeEntry { object: object(name, n), display_name: None, address, tags, unschedulable: n == 2 }
    }

    proptest! {
        #[test]
        fn applying_the_difference_gives_the_new_catalog(old in catalogs(), new in catalogs(), version in any::<u64>()) {
            let delta = diff(&old, &new);
            let stored: CatalogDelta = serde_json::from_slice(&serde_json::to_vec(&delta).unwrap()).unwrap();
            prop_assert_eq!(&stored, &delta);
            prop_assert_eq!(apply(&old, &stored, version, "n"), Catalog { version, nonce: "n".into(), ..new });
        }

        #[test]
        fn nothing_changed_is_nothing_stored(catalog in catalogs()) {
            let delta = diff(&catalog, &catalog);
            prop_assert_eq!(serde_json::to_value(&delta).unwrap(), serde_json::json!({"nextTable": catalog.next_table}));
        }
    }
}
