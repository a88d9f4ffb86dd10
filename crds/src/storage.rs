//! The kind `Storage`: a bucket, container or folder for the files of tables.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::is_default;
use crate::status::{Dependents, has_conditions};

/// `userTablesTemplate` of a storage that has none.
pub const DEFAULT_USER_TABLES_TEMPLATE: &str = "users/{userId}/{namespace}/{tableName}";
/// `sharedTablesTemplate` of a storage that has none.
pub const DEFAULT_SHARED_TABLES_TEMPLATE: &str = "shared/{namespace}/{tableName}";

/// Where files go and how the place is reached.
#[derive(CustomResource, KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[kube(
    group = "kalamdb.org",
    version = "v1alpha1",
    kind = "Storage",
    plural = "kalamstorages",
    singular = "kalamstorage",
    shortname = "kst",
    category = "kalamdb",
    namespaced,
    status = "StorageStatus",
    derive = "PartialEq",
    doc = "A place for the files of tables: a folder, or a bucket or container of a cloud.",
    printcolumn(name = "Type", type_ = "string", json_path = ".spec.type"),
    printcolumn(name = "Used", type_ = "integer", json_path = ".status.usedBy.count"),
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
        "has(self.spec.sqlName) || \
         (size(self.metadata.name) <= 63 && self.metadata.name.matches('^[a-z]([a-z0-9-]*[a-z0-9])?$'))"
    )
    .message("metadata.name is no storage name: lower-case letters, digits and -, a letter first, at most 63"),
    validation = Rule::new(
        "(has(self.spec.sqlName) ? self.spec.sqlName : self.metadata.name) == \
         (has(oldSelf.spec.sqlName) ? oldSelf.spec.sqlName : oldSelf.metadata.name)"
    )
    .message("spec.sqlName cannot be changed")
)]
#[x_kube(
    validation = Rule::new(
        "has(self.filesystem) == (self.type == 'Filesystem') && has(self.s3) == (self.type == 'S3') && \
         has(self.gcs) == (self.type == 'Gcs') && has(self.azure) == (self.type == 'Azure')"
    )
    .message("set exactly the member that type names: filesystem for Filesystem, s3 for S3, gcs for Gcs, azure for Azure")
)]
#[serde(rename_all = "camelCase")]
pub struct StorageSpec {
    /// Name in SQL, which may hold `_` and `-`; without it, metadata.name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z]([a-z0-9_-]*[a-z0-9])?$"))]
    pub sql_name: Option<String>,
    /// Name for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub display_name: Option<String>,
    /// What kind of place; cannot be changed.
    #[serde(rename = "type")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("type cannot be changed"))]
    pub type_: StorageType,
    /// For type Filesystem.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filesystem: Option<FilesystemStorage>,
    /// For type S3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub s3: Option<S3Storage>,
    /// For type Gcs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gcs: Option<GcsStorage>,
    /// For type Azure.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub azure: Option<AzureStorage>,
    /// Path of shared tables, made of literals, {namespace} and {tableName}; what is missing of the two is appended.
    /// Without it, shared/{namespace}/{tableName}.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("!self.contains('{userId}') && !self.contains('{user_id}')")
            .message("sharedTablesTemplate must not contain {userId}"),
        validation = Rule::new(
            "self.matches('^([a-z0-9._/-]|[$]?[{](userId|user_id)[}]|[{](namespace|tableName)[}])*$')"
        )
        .message(
            "allowed in a template are {userId}, {namespace}, {tableName}, lower-case letters, digits, -, _, . and /"
        ),
        validation = Rule::new(
            "self.matches('[^/]') && !self.matches('(^|/)[.][.]?(/|$)') && !self.matches('[^/]//+[^/]') && \
             !self.matches('^/*_')"
        )
        .message("a template has no empty, . or .. segment and does not begin with _")
    )]
    pub shared_tables_template: Option<String>,
    /// Path of user tables, made of literals, {userId}, {namespace} and {tableName}; {userId} comes before the other
    /// two, and what is missing of those is appended. Without it, users/{userId}/{namespace}/{tableName}.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(
        validation = Rule::new("self.matches('(^|/)[$]?[{](userId|user_id)[}](/|$)')")
            .message("userTablesTemplate must contain {userId} as a whole path segment"),
        validation = Rule::new("!self.matches('[{](namespace|tableName)[}].*[{](userId|user_id)[}]')")
            .message("{userId} must come before {namespace} and {tableName}"),
        validation = Rule::new("!self.matches('[{](userId|user_id)[}].*[{](userId|user_id)[}]')")
            .message("{userId} stands more than once"),
        validation = Rule::new(
            "self.matches('^([a-z0-9._/-]|[$]?[{](userId|user_id)[}]|[{](namespace|tableName)[}])*$')"
        )
        .message(
            "allowed in a template are {userId}, {namespace}, {tableName}, lower-case letters, digits, -, _, . and /"
        ),
        validation = Rule::new(
            "self.matches('[^/]') && !self.matches('(^|/)[.][.]?(/|$)') && !self.matches('[^/]//+[^/]') && \
             !self.matches('^/*_')"
        )
        .message("a template has no empty, . or .. segment and does not begin with _")
    )]
    pub user_tables_template: Option<String>,
}

/// What kind of place a storage is.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq, JsonSchema)]
pub enum StorageType {
    /// A folder.
    #[default]
    Filesystem,
    /// Amazon S3, or a server that speaks it.
    S3,
    /// Google Cloud Storage.
    Gcs,
    /// Azure Blob Storage.
    Azure,
}

/// A folder.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct FilesystemStorage {
    /// The folder; a relative path is relative to the data directory.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("!self.matches('(^|/)[.][.](/|$)') && !self.matches('[[:cntrl:]]')")
            .message("a path has no .. segment and no control characters")
    )]
    pub path: String,
}

/// A bucket of Amazon S3 or of a server that speaks it.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[x_kube(
    validation = Rule::new(
        "!has(self.endpoint) || !self.endpoint.startsWith('http://') || (has(self.allowHttp) && self.allowHttp)"
    )
    .message("an endpoint with http:// needs allowHttp: true")
)]
#[serde(rename_all = "camelCase")]
pub struct S3Storage {
    /// Bucket.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9][a-z0-9._-]*[a-z0-9]$"))]
    pub bucket: String,
    /// Folder in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = r"^[A-Za-z0-9._=/-]*$"))]
    #[x_kube(
        validation = Rule::new("!self.matches('(^|/)[.][.]?(/|$)') && !self.matches('[^/]//+[^/]')")
            .message("a prefix has no empty, . or .. segment")
    )]
    pub prefix: Option<String>,
    /// Region.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64), regex(pattern = r"^[a-z0-9-]+$"))]
    pub region: Option<String>,
    /// URL of a server other than Amazon's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512), regex(pattern = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"))]
    pub endpoint: Option<String>,
    /// Whether the bucket stands in the path of URLs rather than in the host name.
    #[serde(default, skip_serializing_if = "is_default")]
    pub path_style: bool,
    /// Whether an endpoint with `http://` is taken.
    #[serde(default, skip_serializing_if = "is_default")]
    pub allow_http: bool,
    /// Secret with `accessKeyId`, `secretAccessKey` and, if need be, `sessionToken`; without it, the pod's own identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<SecretRef>,
}

/// A bucket of Google Cloud Storage.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct GcsStorage {
    /// Bucket.
    #[schemars(length(min = 3, max = 222), regex(pattern = r"^[a-z0-9][a-z0-9._-]*[a-z0-9]$"))]
    pub bucket: String,
    /// Folder in the bucket.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = r"^[A-Za-z0-9._=/-]*$"))]
    #[x_kube(
        validation = Rule::new("!self.matches('(^|/)[.][.]?(/|$)') && !self.matches('[^/]//+[^/]')")
            .message("a prefix has no empty, . or .. segment")
    )]
    pub prefix: Option<String>,
    /// Secret with `serviceAccountKey`; without it, the pod's own identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<SecretRef>,
}

/// A container of Azure Blob Storage.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct AzureStorage {
    /// Storage account.
    #[schemars(length(min = 3, max = 24), regex(pattern = r"^[a-z0-9]+$"))]
    pub account: String,
    /// Container.
    #[schemars(length(min = 3, max = 63), regex(pattern = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"))]
    pub container: String,
    /// Folder in the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 512), regex(pattern = r"^[A-Za-z0-9._=/-]*$"))]
    #[x_kube(
        validation = Rule::new("!self.matches('(^|/)[.][.]?(/|$)') && !self.matches('[^/]//+[^/]')")
            .message("a prefix has no empty, . or .. segment")
    )]
    pub prefix: Option<String>,
    /// URL of a server other than Azure's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 8, max = 512), regex(pattern = r"^https?://[^\s/@?#]+(/[^\s@?#]*)?$"))]
    pub endpoint: Option<String>,
    /// Secret with `accountKey` or `sasToken`; without it, the pod's own identity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials_secret: Option<SecretRef>,
}

/// A Secret in the same Kubernetes namespace.
#[derive(Serialize, Deserialize, Clone, Debug, Default, PartialEq, Eq, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretRef {
    /// Its name.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"))]
    pub name: String,
}

/// What became of a storage.
#[derive(KubeSchema, Serialize, Deserialize, Clone, Debug, Default, PartialEq)]
#[serde(rename_all = "camelCase")]
pub struct StorageStatus {
    /// The metadata.generation that this status speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Version of the catalog that contains that generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub catalog_version: Option<i64>,
    /// The tables declared in it; while there are any, it cannot be deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by: Option<Dependents>,
    /// Ready, Accepted, Reachable, Reconciling, Stalled.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

has_conditions!(StorageStatus);
