//! Who uses a storage or a namespace. Pure.
//!
//! The API server itself refuses to delete what `status.usedBy` or `status.dependents` says is in use (the deletion
//! guard in `crds`). There is no finalizer behind it: that would hold up the deletion of a Kubernetes namespace whose
//! operator is gone, and a storage that is deleted all the same costs nothing, because the catalog keeps what tables
//! stand on.

use std::collections::HashMap;

use kalamdb_crds::Dependents;
use kalamdb_model::catalog::Catalog;
use kalamdb_model::declared::Kind;

/// Tables by the object that they use.
#[derive(Debug, Default)]
pub struct Usage {
    storages: HashMap<String, Vec<String>>,
    namespaces: HashMap<String, Vec<String>>,
}

impl Usage {
    /// Counts the tables of `catalog`. Those whose object is gone do not count: nobody could say how to let go of them.
    #[must_use]
    pub fn of(catalog: &Catalog) -> Self {
        let mut usage = Self::default();
        for table in catalog.tables.values() {
            if let Some(storage) = catalog.storages.get(&table.location.storage) {
                usage.storages.entry(storage.object.name.clone()).or_default().push(table.object.name.clone());
            }
            if let Some(namespace) = catalog.namespaces.get(&table.name.namespace) {
                usage.namespaces.entry(namespace.object.name.clone()).or_default().push(table.object.name.clone());
            }
        }
        usage
    }

    /// How many tables use the object, and the first of them.
    #[must_use]
    pub fn dependents(&self, kind: Kind, name: &str) -> Dependents {
        let found = match kind {
            Kind::Storage => self.storages.get(name),
            Kind::Namespace => self.namespaces.get(name),
            Kind::ReplicaNode | Kind::UserTable | Kind::SharedTable => None,
        };
        Dependents::of(found.into_iter().flatten().cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::Fixture;

    #[test]
    fn what_is_in_use_names_its_tables_and_a_table_that_is_gone_holds_nothing() {
        let mut fixture = Fixture::new();
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Storage, "s").sample, ["app.messages"]);
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Namespace, "app").count, 1);
        fixture.remove("app.messages");
        assert_eq!(fixture.catalog.retained.len(), 1, "its files stay known");
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Storage, "s"), Dependents::default());
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Namespace, "app"), Dependents::default());
    }
}
