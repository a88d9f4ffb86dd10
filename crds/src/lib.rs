//! The custom resources of KalamDB: what people declare as Kubernetes objects, or as the same YAML in a folder.
//!
//! Owns: the Rust types of the five kinds with their rules and limits, the generated YAML ([`generate`]), conversion to
//! [`kalamdb_model::declared`] ([`convert`]) and reading a folder of manifests ([`manifests`]).
//! Does not own: rules that need other objects (references, conflicts, compatibility with stored rows); those are
//! `kalamdb_model::compile`'s.
//!
//! Everything here is pure: no API server, no disk. Each rule lives twice, as CEL for the API server and in [`convert`]
//! for standalone mode; the files under `tests/rules` run through both, so that the two cannot drift apart.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]
// Printer columns of one definition have the same types: the lint takes the arguments of all of them for one list.
#![allow(clippy::duplicated_attributes)]

pub mod convert;
pub mod generate;
pub mod manifests;
mod namespace;
mod replica_node;
mod schema;
mod status;
mod storage;
mod table;
mod yaml;

pub use convert::Declare;
pub use namespace::{Namespace, NamespaceSpec, NamespaceStatus};
pub use replica_node::{ReplicaNode, ReplicaNodeSpec, ReplicaNodeStatus};
pub use status::{Dependents, HasConditions};
pub use storage::{
    AzureStorage, DEFAULT_SHARED_TABLES_TEMPLATE, DEFAULT_USER_TABLES_TEMPLATE, FilesystemStorage, GcsStorage,
    S3Storage, SecretRef, Storage, StorageSpec, StorageStatus, StorageType,
};
pub use table::{
    Access, Column, DeletionPolicy, Durability, FlushPolicy, Replication, SharedTable, SharedTableSpec, TableFields,
    TableStatus, UserTable, UserTableSpec,
};

/// API group of all kinds.
pub const GROUP: &str = "kalamdb.org";
/// Version of all kinds.
pub const VERSION: &str = "v1alpha1";
/// `apiVersion` of all kinds.
pub const API_VERSION: &str = "kalamdb.org/v1alpha1";

pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
