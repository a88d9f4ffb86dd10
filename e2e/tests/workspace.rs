//! What DESIGN says of the workspace, held by the build's own metadata.
#![allow(missing_docs, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};

/// Which of our crates may name which heavy dependency.
const MAY_NAME: [(&str, &[&str]); 10] = [
    ("kalamdb-model", &["arrow-schema"]),
    ("kalamdb-crds", &["kube", "schemars"]),
    ("kalamdb-write-buffer", &["rocksdb"]),
    ("kalamdb-table-store", &["object_store", "parquet"]),
    ("kalamdb-parquet-cache", &["foyer", "object_store"]),
    ("kalamdb-query-pod", &["datafusion", "axum", "parquet", "object_store", "kube"]),
    ("kalamdb-operator", &["kube", "object_store", "axum"]),
    ("kalamdb-test-support", &["object_store"]),
    ("kalamdb-bench", &["datafusion", "parquet", "tokio-postgres"]),
    ("kalamdb-e2e", &["kube", "object_store"]),
];

const HEAVY: [&str; 10] = [
    "datafusion",
    "axum",
    "rocksdb",
    "foyer",
    "parquet",
    "object_store",
    "kube",
    "schemars",
    "arrow-schema",
    "tokio-postgres",
];

fn metadata() -> Metadata {
    MetadataCommand::new().other_options(vec!["--locked".to_owned()]).exec().expect("cargo metadata works here")
}

fn heavy_dependencies(package: &Package) -> BTreeSet<&str> {
    let shipped = package.dependencies.iter().filter(|dependency| dependency.kind != DependencyKind::Development);
    shipped.map(|dependency| dependency.name.as_str()).filter(|name| HEAVY.contains(name)).collect()
}

#[test]
fn each_heavy_dependency_is_named_only_where_it_belongs() {
    let metadata = metadata();
    let rules: BTreeMap<_, _> = MAY_NAME.into_iter().collect();
    for package in metadata.workspace_packages() {
        let allowed: BTreeSet<&str> = rules
            .get(package.name.as_str())
            .unwrap_or_else(|| panic!("`{}` is new: say what it may name", package.name))
            .iter()
            .copied()
            .collect();
        // arrow-schema is light; only the model is held to it as its one Arrow crate.
        let named: BTreeSet<&str> =
            heavy_dependencies(package).into_iter().filter(|name| *name != "arrow-schema").collect();
        let extra: Vec<_> = named.difference(&allowed).collect();
        assert!(extra.is_empty(), "`{}` names {extra:?}", package.name);
    }
}

#[test]
fn the_light_crates_build_without_datafusion() {
    let metadata = metadata();
    let resolve = metadata.resolve.as_ref().expect("a resolved graph");
    let by_id: BTreeMap<_, _> = resolve.nodes.iter().map(|node| (&node.id, node)).collect();
    let names: BTreeMap<_, _> = metadata.packages.iter().map(|package| (&package.id, package.name.as_str())).collect();
    for package in metadata.workspace_packages() {
        let light = ["model", "crds", "write-buffer", "table-store", "parquet-cache", "operator"];
        if !light.iter().any(|name| package.name.as_str() == format!("kalamdb-{name}")) {
            continue;
        }
        let mut reached = BTreeSet::from([&package.id]);
        let mut next = vec![&package.id];
        while let Some(id) = next.pop() {
            for dependency in &by_id[id].deps {
                let is_test_only = dependency.dep_kinds.iter().all(|kind| kind.kind == DependencyKind::Development);
                if !is_test_only && reached.insert(&dependency.pkg) {
                    next.push(&dependency.pkg);
                }
            }
        }
        let datafusion: Vec<_> =
            reached.iter().map(|id| names[*id]).filter(|name| name.starts_with("datafusion")).collect();
        assert!(datafusion.is_empty(), "`{}` builds {datafusion:?}", package.name);
    }
}

#[test]
fn there_is_one_arrow_one_parquet_and_one_object_store() {
    let metadata = metadata();
    for name in ["arrow", "arrow-array", "arrow-schema", "parquet", "object_store", "datafusion"] {
        let versions: Vec<_> = metadata
            .packages
            .iter()
            .filter(|package| package.name.as_str() == name)
            .map(|package| &package.version)
            .collect();
        assert_eq!(versions.len(), 1, "`{name}` is there as {versions:?}");
    }
}
