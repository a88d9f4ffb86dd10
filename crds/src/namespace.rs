//! The kind `Namespace`: a namespace of KalamDB, which is not a namespace of Kubernetes.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::status::{Dependents, has_conditions};

/// What a namespace is called and where its tables go.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "kalamdb.org",
    version = "v1alpha1",
    kind = "Namespace",
    plural = "kalamnamespaces",
    singular = "kalamnamespace",
    shortname = "kns",
    category = "kalamdb",
    namespaced,
    status = "NamespaceStatus",
    derive = "PartialEq",
    doc = "A namespace of KalamDB: the first part of its tables' names.",
    selectable = ".spec.defaultStorage",
    printcolumn(name = "Storage", type_ = "string", json_path = ".spec.defaultStorage"),
    printcolumn(name = "Tables", type_ = "integer", json_path = ".status.tables"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("!has(self.spec.sqlName) || self.metadata.name == self.spec.sqlName.replace('_', '-')")
        .message("metadata.name must be spec.sqlName with _ written as -"),
    validation = Rule::new(
        "has(self.spec.sqlName) || (size(self.metadata.name) <= 63 && self.metadata.name.matches('^[a-z][a-z0-9]*$'))"
    )
    .message("metadata.name is no SQL name: set spec.sqlName, for example my_app for my-app"),
    validation = Rule::new(
        "!((has(self.spec.sqlName) ? self.spec.sqlName : self.metadata.name) in \
         ['system', 'information_schema', 'public', 'kalam'])"
    )
    .message("the namespaces system, information_schema, public and kalam are reserved"),
    validation = Rule::new(
        "(has(self.spec.sqlName) ? self.spec.sqlName : self.metadata.name) == \
         (has(oldSelf.spec.sqlName) ? oldSelf.spec.sqlName : oldSelf.metadata.name)"
    )
    .message("spec.sqlName cannot be changed"),
    validation = Rule::new("!has(self.spec.options) || self.spec.options.all(key, size(key) >= 1 && size(key) <= 63)")
        .message("the keys of spec.options have 1 to 63 characters")
)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceSpec {
    /// Name in SQL; without it, metadata.name. Lower-case letters, digits and `_`, a letter first, no `_` at the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9_]*[a-z0-9])?$"))]
    pub sql_name: Option<String>,
    /// Name of the Storage object for tables that name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9-]*[a-z0-9])?$"))]
    pub default_storage: Option<String>,
    /// Free options, shown by `SHOW NAMESPACES`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend(
        "maxProperties" = 32,
        "additionalProperties" = {"type": "string", "maxLength": 1024}
    ))]
    pub options: BTreeMap<String, String>,
}

/// What became of a namespace.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct NamespaceStatus {
    /// The metadata.generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the catalog that contains that generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog_version: Option<i64>,
    /// Number of its tables.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub tables: Option<i32>,
    /// The tables in it; while there are any, it cannot be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dependents: Option<Dependents>,
    /// Ready, Accepted, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

has_conditions!(NamespaceStatus);
