//! Who uses a storage or a namespace, and what follows for its finalizer. Pure.
//!
//! The finalizer is only the backstop: the API server itself refuses to delete what `status.usedBy` or
//! `status.dependents` says is in use, and that rule may be missing or late.

use std::collections::HashMap;

use kalamdb_crds::Dependents;
use kalamdb_model::catalog::Catalog;
use kalamdb_model::declared::Kind;

use crate::watch::Seen;

/// On a Storage or Namespace only while tables use it.
pub const FINALIZER: &str = "kalamdb.org/in-use";

/// Tables by the object that they use.
#[derive(Debug, Default)]
pub struct Usage {
    storages: HashMap<String, Vec<String>>,
    namespaces: HashMap<String, Vec<String>>,
}

impl Usage {
    /// Counts the tables of `catalog`. A storage is also used by tables that are gone and left their files.
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
        for table in catalog.retained.values() {
            if let Some(storage) = catalog.storages.get(&table.location.storage) {
                let name = format!("{} (retained)", table.object.name);
                usage.storages.entry(storage.object.name.clone()).or_default().push(name);
            }
        }
        usage
    }

    fn tables(&self, kind: Kind, name: &str) -> &[String] {
        let found = match kind {
            Kind::Storage => self.storages.get(name),
            Kind::Namespace => self.namespaces.get(name),
            Kind::ReplicaNode | Kind::UserTable | Kind::SharedTable => None,
        };
        found.map(Vec::as_slice).unwrap_or_default()
    }

    /// Whether any table uses the object.
    #[must_use]
    pub fn is_used(&self, kind: Kind, name: &str) -> bool {
        !self.tables(kind, name).is_empty()
    }

    /// How many tables use the object, and the first of them.
    #[must_use]
    pub fn dependents(&self, kind: Kind, name: &str) -> Dependents {
        Dependents::of(self.tables(kind, name).iter().cloned())
    }
}

/// Whether the Kubernetes namespace goes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Instance {
    /// It does.
    Lives,
    /// It is being deleted: nothing may hold it up.
    Ends,
}

/// The finalizers that an object must have instead of those that it has; `None` = it is right as it is.
#[must_use]
pub fn finalizers(seen: &Seen, is_used: bool, instance: Instance) -> Option<Vec<String>> {
    let has = holds(seen);
    let wanted = is_used && instance == Instance::Lives && !(seen.declared.deleting && seen.forced);
    match (has, wanted) {
        // An object that is being deleted takes no new finalizers.
        (false, true) if !seen.declared.deleting => {
            Some(seen.finalizers.iter().cloned().chain([FINALIZER.to_owned()]).collect())
        }
        (true, false) => Some(seen.finalizers.iter().filter(|name| *name != FINALIZER).cloned().collect()),
        _ => None,
    }
}

/// Whether our finalizer is on the object.
#[must_use]
pub fn holds(seen: &Seen) -> bool {
    seen.finalizers.iter().any(|name| name == FINALIZER)
}

/// Whether the Kubernetes namespace seems to end, where the API server does not say: everything in it is going.
#[must_use]
pub fn all_are_going<'a>(mut all: impl Iterator<Item = &'a Seen>) -> bool {
    all.all(|seen| seen.declared.deleting)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::{Fixture, storage};

    #[test]
    fn retained_tables_use_their_storage_and_not_their_namespace() {
        let mut fixture = Fixture::new();
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Storage, "s").sample, ["app.messages"]);
        assert_eq!(Usage::of(&fixture.catalog).dependents(Kind::Namespace, "app").count, 1);
        fixture.remove("app.messages");
        let usage = Usage::of(&fixture.catalog);
        assert_eq!(usage.dependents(Kind::Storage, "s").sample, ["app.messages (retained)"]);
        assert!(!usage.is_used(Kind::Namespace, "app"));
        assert!(!usage.is_used(Kind::UserTable, "s"));
    }

    #[test]
    fn the_finalizer_is_there_while_in_use_and_others_stay() {
        let mut seen = storage();
        seen.finalizers = vec!["other".to_owned()];
        assert_eq!(finalizers(&seen, false, Instance::Lives), None);
        assert_eq!(finalizers(&seen, true, Instance::Lives).unwrap(), ["other", FINALIZER]);
        seen.finalizers.push(FINALIZER.to_owned());
        assert_eq!(finalizers(&seen, true, Instance::Lives), None);
        assert_eq!(finalizers(&seen, false, Instance::Lives).unwrap(), ["other"]);
    }

    #[test]
    fn a_deletion_waits_for_the_tables_but_not_when_forced_or_when_all_ends() {
        let mut seen = storage();
        seen.declared.deleting = true;
        assert_eq!(finalizers(&seen, true, Instance::Lives), None);
        seen.finalizers = vec![FINALIZER.to_owned()];
        assert_eq!(finalizers(&seen, true, Instance::Lives), None);
        assert_eq!(finalizers(&seen, true, Instance::Ends).unwrap(), [""; 0]);
        seen.forced = true;
        assert_eq!(finalizers(&seen, true, Instance::Lives).unwrap(), [""; 0]);
    }

    #[test]
    fn an_object_that_stays_says_that_the_namespace_does() {
        let (stays, mut goes) = (storage(), storage());
        goes.declared.deleting = true;
        assert!(all_are_going([&goes].into_iter()));
        assert!(!all_are_going([&goes, &stays].into_iter()));
    }
}
