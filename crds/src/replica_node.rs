//! The kind `ReplicaNode`: a pod that keeps copies of flushed files.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use serde::{Deserialize, Serialize};

use crate::is_default;
use crate::status::has_conditions;

/// Where a replica node is and what selects it.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "kalamdb.org",
    version = "v1alpha1",
    kind = "ReplicaNode",
    plural = "replicanodes",
    singular = "replicanode",
    shortname = "krn",
    category = "kalamdb",
    namespaced,
    status = "ReplicaNodeStatus",
    derive = "PartialEq",
    doc = "A node that keeps copies of the files of tables with replication.",
    printcolumn(name = "Address", type_ = "string", json_path = ".spec.address"),
    printcolumn(name = "Unschedulable", type_ = "boolean", json_path = ".spec.unschedulable"),
    printcolumn(name = "Tables", type_ = "integer", json_path = ".status.tables"),
    printcolumn(name = "Health", type_ = "number", json_path = ".status.replicationHealth"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason",
        priority = 1
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaNodeSpec {
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub display_name: Option<String>,
    /// `host:port`; an IPv6 address stands in brackets.
    #[schemars(
        length(min = 3, max = 259),
        regex(pattern = r"^([A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}$")
    )]
    #[x_kube(
        validation = Rule::new(
            "self.matches(':[0-9]{1,5}$') && int(self.substring(self.lastIndexOf(':') + 1)) >= 1 && \
             int(self.substring(self.lastIndexOf(':') + 1)) <= 65535"
        )
        .message("address must be host:port with a port of 1 to 65535")
    )]
    pub address: String,
    /// What `replication.tags` of tables select by.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(length(min = 1, max = 63), regex(pattern = r"^[A-Za-z0-9]([A-Za-z0-9._:=/-]*[A-Za-z0-9])?$"))
    )]
    #[x_kube(merge_strategy = ListMerge::Set)]
    pub tags: Vec<String>,
    /// Gives it no new tables, so that it can be emptied.
    #[serde(default, skip_serializing_if = "is_default")]
    pub unschedulable: bool,
}

/// How a replica node is.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct ReplicaNodeStatus {
    /// The metadata.generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the catalog that contains that generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog_version: Option<i64>,
    /// Number of tables with copies on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub tables: Option<i32>,
    /// When it was last asked how it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_probe: Option<Time>,
    /// Share of successful copies over the last 24 hours, 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1))]
    pub replication_health: Option<f64>,
    /// Ready, Accepted, Reachable, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

has_conditions!(ReplicaNodeStatus);
