//! From custom resources to [`Declared`], the same for objects of an API server and for manifests of a folder.
//!
//! Owns: every rule that the API server checks with CEL or patterns, once more in Rust, because standalone mode has no
//! API server. All problems of an object come together, each naming its field.
//! Does not own: rules between objects and between an object and its past (`kalamdb_model::compile`).

use std::fmt::Display;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kalamdb_model::declared::{
    Access, ColumnSpec, Declared, DeletionPolicy, Durability, FlushPolicy, Kind, NamespaceSpec, NodeSpec, ObjectRef,
    Replication, Spec, StorageRoot, StorageSpec, TableSpec,
};
use kalamdb_model::defaults::DefaultExpr;
use kalamdb_model::names::{RESERVED_NAMESPACES, SYSTEM_COLUMNS};
use kalamdb_model::{ColumnType, SqlName, StorageName, template};

use crate::storage::{AzureStorage, GcsStorage, S3Storage, SecretRef};
use crate::{
    Column, DEFAULT_SHARED_TABLES_TEMPLATE, DEFAULT_USER_TABLES_TEMPLATE, Namespace, ReplicaNode, SharedTable, Storage,
    StorageType, TableFields, UserTable,
};

/// Longest `interval` of a flush policy, seconds: a day.
const INTERVAL_SECS_MAX: u64 = 24 * 60 * 60;
/// Most rows of a flush policy.
const FLUSH_ROWS_MAX: i64 = 10_000_000;
/// Longest retention of deleted rows: ten years.
const RETENTION_HOURS_MAX: i32 = 87_600;
/// Most copies of a table.
const REPLICAS_MAX: i32 = 16;

/// A custom resource that declares something.
pub trait Declare {
    /// Its kind.
    const KIND: Kind;

    /// What it declares, or all that is wrong with it.
    fn declare(&self) -> Declared;
}

macro_rules! declare {
    ($($object:ident: $spec:ident),*) => {$(
        impl Declare for $object {
            const KIND: Kind = Kind::$object;

            fn declare(&self) -> Declared {
                let mut problems = Problems::default();
                let object = object_ref(Kind::$object, &self.metadata);
                let spec = $spec(&object.name, &self.spec, &mut problems);
                let deleting = self.metadata.deletion_timestamp.is_some();
                Declared { object, deleting, spec: problems.or(spec) }
            }
        }
    )*};
}
declare!(Namespace: namespace, Storage: storage, ReplicaNode: replica_node, UserTable: user_table, SharedTable: shared_table);

/// An object that the API server has and this version cannot read.
#[must_use]
pub fn undecodable(kind: Kind, meta: &ObjectMeta, error: &dyn Display) -> Declared {
    let deleting = meta.deletion_timestamp.is_some();
    Declared { object: object_ref(kind, meta), deleting, spec: Err(vec![format!("spec: cannot be read: {error}")]) }
}

/// Which object `meta` belongs to; what is missing of it is empty or zero.
#[must_use]
pub fn object_ref(kind: Kind, meta: &ObjectMeta) -> ObjectRef {
    ObjectRef {
        kind,
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        resource_version: meta.resource_version.clone().unwrap_or_default(),
        generation: meta.generation.unwrap_or(1),
        created: meta.creation_timestamp.as_ref().map_or(0, |time| time.0.as_second()),
    }
}

/// What is wrong with an object so far.
#[derive(Default)]
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, field: &str, message: impl Display) {
        self.0.push(format!("{field}: {message}"));
    }

    /// The value, or its error noted.
    fn take<T, E: Display>(&mut self, field: &str, result: Result<T, E>) -> Option<T> {
        result.map_err(|error| self.add(field, error)).ok()
    }

    fn unless(&mut self, holds: bool, field: &str, message: impl Display) {
        if !holds {
            self.add(field, message);
        }
    }

    fn or(self, spec: Option<Spec>) -> Result<Spec, Vec<String>> {
        match spec {
            Some(spec) if self.0.is_empty() => Ok(spec),
            _ => Err(self.0),
        }
    }
}

fn namespace(name: &str, spec: &crate::NamespaceSpec, problems: &mut Problems) -> Option<Spec> {
    let sql_name = match &spec.sql_name {
        Some(sql_name) => problems.take("spec.sqlName", SqlName::new(sql_name.as_str())),
        None => {
            let own = SqlName::new(name)
                .map_err(|_| format!("`{name}` is no SQL name: set spec.sqlName, for example my_app for my-app"));
            problems.take("metadata.name", own)
        }
    };
    if let Some(sql_name) = &sql_name {
        named_after(name, &sql_name.object_name(), problems);
        let field = if spec.sql_name.is_some() { "spec.sqlName" } else { "metadata.name" };
        let reserved = RESERVED_NAMESPACES.contains(&sql_name.as_str());
        let list = RESERVED_NAMESPACES.join("`, `");
        problems.unless(!reserved, field, format!("`{sql_name}` is reserved, as are all of `{list}`"));
    }
    if let Some(storage) = &spec.default_storage {
        reference("spec.defaultStorage", storage, problems);
    }
    check_options(&spec.options, problems);
    let (default_storage, options) = (spec.default_storage.clone(), spec.options.clone());
    Some(Spec::Namespace(NamespaceSpec { sql_name: sql_name?, default_storage, options }))
}

fn check_options(options: &std::collections::BTreeMap<String, String>, problems: &mut Problems) {
    problems.unless(options.len() <= 32, "spec.options", "has at most 32 entries");
    let key_fits = |key: &String| (1..=63).contains(&key.chars().count());
    problems.unless(options.keys().all(key_fits), "spec.options", "the keys have 1 to 63 characters");
    for (key, value) in options {
        problems.unless(value.chars().count() <= 1024, &format!("spec.options.{key}"), "has at most 1024 characters");
    }
}

fn named_after(name: &str, wanted: &str, problems: &mut Problems) {
    problems.unless(name == wanted, "metadata.name", format!("must be `{wanted}`, got `{name}`"));
}

/// The name of a Namespace, Storage or Secret object.
fn reference(field: &str, name: &str, problems: &mut Problems) {
    let good = SqlName::new(name.replace('-', "_")).is_ok() && !name.contains('_');
    problems.unless(good, field, format!("`{name}` is no name of an object: lower-case letters, digits and `-`"));
}

fn storage(name: &str, spec: &crate::StorageSpec, problems: &mut Problems) -> Option<Spec> {
    let (field, sql_name) = match &spec.sql_name {
        Some(sql_name) => ("spec.sqlName", sql_name.as_str()),
        None => ("metadata.name", name),
    };
    let sql_name = problems.take(field, StorageName::new(sql_name));
    if let Some(sql_name) = &sql_name {
        named_after(name, &sql_name.object_name(), problems);
    }
    let display_name = display_name(spec.display_name.as_ref(), problems);
    let place = storage_root(spec, problems);
    let user = spec.user_tables_template.as_deref().unwrap_or(DEFAULT_USER_TABLES_TEMPLATE);
    let user = problems.take("spec.userTablesTemplate", template::user(user));
    let shared = spec.shared_tables_template.as_deref().unwrap_or(DEFAULT_SHARED_TABLES_TEMPLATE);
    let shared = problems.take("spec.sharedTablesTemplate", template::shared(shared));
    let (root, credentials_secret) = place?;
    Some(Spec::Storage(StorageSpec {
        sql_name: sql_name?,
        display_name,
        root,
        credentials_secret,
        shared_tables_template: shared?,
        user_tables_template: user?,
    }))
}

fn display_name(name: Option<&String>, problems: &mut Problems) -> Option<String> {
    let fits = name.is_none_or(|name| (1..=128).contains(&name.chars().count()));
    problems.unless(fits, "spec.displayName", "has 1 to 128 characters");
    name.cloned()
}

/// The place that `type` names, and the Secret for it.
fn storage_root(spec: &crate::StorageSpec, problems: &mut Problems) -> Option<(StorageRoot, Option<String>)> {
    let members = [
        (StorageType::Filesystem, "filesystem", spec.filesystem.is_some()),
        (StorageType::S3, "s3", spec.s3.is_some()),
        (StorageType::Gcs, "gcs", spec.gcs.is_some()),
        (StorageType::Azure, "azure", spec.azure.is_some()),
    ];
    for (of, member, is_set) in members {
        let field = format!("spec.{member}");
        match (of == spec.type_, is_set) {
            (true, false) => problems.add(&field, format!("missing, and spec.type is `{:?}`", spec.type_)),
            (false, true) => problems.add(&field, format!("must be left out, because spec.type is `{:?}`", spec.type_)),
            _ => {}
        }
    }
    match spec.type_ {
        StorageType::Filesystem => Some((filesystem(&spec.filesystem.as_ref()?.path, problems)?, None)),
        StorageType::S3 => {
            let s3 = spec.s3.as_ref()?;
            Some((s3_root(s3, problems)?, secret("spec.s3", s3.credentials_secret.as_ref(), problems)))
        }
        StorageType::Gcs => {
            let gcs = spec.gcs.as_ref()?;
            Some((gcs_root(gcs, problems)?, secret("spec.gcs", gcs.credentials_secret.as_ref(), problems)))
        }
        StorageType::Azure => {
            let azure = spec.azure.as_ref()?;
            Some((azure_root(azure, problems)?, secret("spec.azure", azure.credentials_secret.as_ref(), problems)))
        }
    }
}

/// One folder has one spelling, because another spelling would be taken for another place.
fn filesystem(path: &str, problems: &mut Problems) -> Option<StorageRoot> {
    let field = "spec.filesystem.path";
    let before = problems.0.len();
    problems.unless((1..=1024).contains(&path.chars().count()), field, "has 1 to 1024 characters");
    problems.unless(!path.chars().any(char::is_control), field, "must not contain control characters");
    problems.unless(path.split('/').all(|segment| segment != ".."), field, "must not have a `..` segment");
    let segments: Vec<&str> = path.split('/').filter(|segment| !matches!(*segment, "" | ".")).collect();
    let joined = segments.join("/");
    let path = match (path.starts_with('/'), joined.is_empty()) {
        (true, _) => format!("/{joined}"),
        (false, true) => ".".to_owned(),
        (false, false) => joined,
    };
    (problems.0.len() == before).then_some(StorageRoot::Filesystem { path })
}

fn s3_root(s3: &S3Storage, problems: &mut Problems) -> Option<StorageRoot> {
    bucket("spec.s3.bucket", &s3.bucket, 63, problems);
    let endpoint = s3.endpoint.as_deref().and_then(|url| endpoint("spec.s3.endpoint", url, problems));
    let plain = endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
    problems.unless(!plain || s3.allow_http, "spec.s3.allowHttp", "an endpoint with http:// needs allowHttp: true");
    if let Some(region) = &s3.region {
        let plain = region.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
        let good = plain && (1..=64).contains(&region.len());
        problems.unless(good, "spec.s3.region", format!("`{region}` is no region, such as `eu-central-1`"));
    }
    Some(StorageRoot::S3 {
        bucket: s3.bucket.clone(),
        prefix: prefix("spec.s3.prefix", s3.prefix.as_deref(), problems)?,
        region: s3.region.clone(),
        endpoint,
        path_style: s3.path_style,
        allow_http: s3.allow_http,
    })
}

fn gcs_root(gcs: &GcsStorage, problems: &mut Problems) -> Option<StorageRoot> {
    bucket("spec.gcs.bucket", &gcs.bucket, 222, problems);
    let prefix = prefix("spec.gcs.prefix", gcs.prefix.as_deref(), problems)?;
    Some(StorageRoot::Gcs { bucket: gcs.bucket.clone(), prefix })
}

fn azure_root(azure: &AzureStorage, problems: &mut Problems) -> Option<StorageRoot> {
    let alphanumeric = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let account = (3..=24).contains(&azure.account.len()) && azure.account.chars().all(alphanumeric);
    problems.unless(account, "spec.azure.account", "has 3 to 24 lower-case letters and digits");
    bucket("spec.azure.container", &azure.container, 63, problems);
    let dashed = azure.container.chars().all(|c| alphanumeric(c) || c == '-');
    problems.unless(dashed, "spec.azure.container", "may hold lower-case letters, digits and `-`");
    let endpoint = azure.endpoint.as_deref().and_then(|url| endpoint("spec.azure.endpoint", url, problems));
    Some(StorageRoot::Azure {
        account: azure.account.clone(),
        container: azure.container.clone(),
        prefix: prefix("spec.azure.prefix", azure.prefix.as_deref(), problems)?,
        endpoint,
    })
}

fn bucket(field: &str, name: &str, bytes_max: usize, problems: &mut Problems) {
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = (3..=bytes_max).contains(&name.len())
        && name.chars().all(|c| edge(c) || matches!(c, '.' | '_' | '-'))
        && name.starts_with(edge)
        && name.ends_with(edge);
    let rule = format!("3 to {bytes_max} lower-case letters, digits, `.`, `_` and `-`");
    problems.unless(good, field, format!("`{name}` is no name of a bucket: {rule}"));
}

fn prefix(field: &str, prefix: Option<&str>, problems: &mut Problems) -> Option<String> {
    let prefix = prefix.unwrap_or_default();
    let trimmed = prefix.trim_matches('/');
    let before = problems.0.len();
    problems.unless(prefix.len() <= 512, field, "has at most 512 characters");
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '=' | '/' | '-');
    problems.unless(prefix.chars().all(plain), field, "may hold letters, digits, `.`, `_`, `=`, `-` and `/`");
    let whole = trimmed.is_empty() || trimmed.split('/').all(|segment| !matches!(segment, "" | "." | ".."));
    problems.unless(whole, field, "must not have an empty, `.` or `..` segment");
    (problems.0.len() == before).then(|| trimmed.to_owned())
}

/// A URL of a server. Its text is not repeated in the problem: people put passwords there, which is what is refused.
fn endpoint(field: &str, url: &str, problems: &mut Problems) -> Option<String> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
    let plain = !url.contains(['@', '?', '#']) && !url.contains(char::is_whitespace) && url.len() <= 512;
    let good = plain && !host.is_empty();
    problems.unless(good, field, "must be a URL like `https://host:9000`, without a user, password or query");
    good.then(|| url.trim_end_matches('/').to_owned())
}

fn secret(field: &str, secret: Option<&SecretRef>, problems: &mut Problems) -> Option<String> {
    let name = &secret?.name;
    let edge = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let good = (1..=253).contains(&name.len())
        && name.chars().all(|c| edge(c) || matches!(c, '.' | '-'))
        && name.starts_with(edge)
        && name.ends_with(edge);
    problems.unless(good, &format!("{field}.credentialsSecret.name"), format!("`{name}` is no name of a Secret"));
    Some(name.clone())
}

fn replica_node(name: &str, spec: &crate::ReplicaNodeSpec, problems: &mut Problems) -> Option<Spec> {
    problems.unless(!name.is_empty(), "metadata.name", "missing");
    problems.unless(is_address(&spec.address), "spec.address", "must be host:port with a port of 1 to 65535");
    tags("spec.tags", &spec.tags, problems);
    Some(Spec::ReplicaNode(NodeSpec {
        display_name: display_name(spec.display_name.as_ref(), problems),
        address: spec.address.clone(),
        tags: spec.tags.clone(),
        unschedulable: spec.unschedulable,
    }))
}

fn is_address(address: &str) -> bool {
    let Some((host, port)) = address.rsplit_once(':') else { return false };
    let digits = (1..=5).contains(&port.len()) && port.chars().all(|c| c.is_ascii_digit());
    let port_fits = digits && port.parse::<u16>().is_ok_and(|port| port > 0);
    let named = host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-'))
        && host.starts_with(|c: char| c.is_ascii_alphanumeric())
        && host.ends_with(|c: char| c.is_ascii_alphanumeric());
    let numbered = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    let numbered = numbered.is_some_and(|v6| v6.parse::<std::net::Ipv6Addr>().is_ok());
    port_fits && address.len() <= 259 && (named || numbered)
}

fn tags(field: &str, tags: &[String], problems: &mut Problems) {
    problems.unless(tags.len() <= 16, field, "has at most 16 tags");
    for (index, tag) in tags.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let edge = |c: char| c.is_ascii_alphanumeric();
        let good = (1..=63).contains(&tag.len())
            && tag.chars().all(|c| edge(c) || matches!(c, '.' | '_' | ':' | '=' | '/' | '-'))
            && tag.starts_with(edge)
            && tag.ends_with(edge);
        problems.unless(good, &field, format!("`{tag}` is no tag: 1 to 63 letters, digits and `. _ : = / -` inside"));
        problems.unless(!tags[..index].contains(tag), &field, format!("`{tag}` is there twice"));
    }
}

fn user_table(name: &str, spec: &crate::UserTableSpec, problems: &mut Problems) -> Option<Spec> {
    let mut table = table(name, &spec.table, Kind::UserTable, problems)?;
    table.use_user_storage = spec.use_user_storage;
    Some(Spec::Table(Box::new(table)))
}

fn shared_table(name: &str, spec: &crate::SharedTableSpec, problems: &mut Problems) -> Option<Spec> {
    let mut table = table(name, &spec.table, Kind::SharedTable, problems)?;
    table.access = match spec.access {
        crate::Access::Public => Access::Public,
        crate::Access::Restricted => Access::Restricted,
    };
    Some(Spec::Table(Box::new(table)))
}

fn table(name: &str, fields: &TableFields, kind: Kind, problems: &mut Problems) -> Option<TableSpec> {
    reference("spec.namespaceRef", &fields.namespace_ref, problems);
    let table_name = problems.take("spec.tableName", SqlName::new(fields.table_name.as_str()));
    if let Some(table_name) = &table_name {
        named_after(name, &format!("{}.{}", fields.namespace_ref, table_name.object_name()), problems);
    }
    let columns = columns(&fields.columns, problems);
    if let Some(storage) = &fields.storage_ref {
        reference("spec.storageRef", storage, problems);
    }
    let both = fields.storage_ref.is_some() && fields.location.is_some();
    problems.unless(!both, "spec.location", "excludes `storageRef`; leave one of the two out");
    if let Some(url) = &fields.location {
        problems.take("spec.location", location(url, kind));
    }
    let hours = fields.deleted_retention_hours;
    let hours_fit = hours.is_none_or(|hours| (0..=RETENTION_HOURS_MAX).contains(&hours));
    let range = format!("must be 0 to {RETENTION_HOURS_MAX}; leave it out to keep deleted rows for ever");
    problems.unless(hours_fit, "spec.deletedRetentionHours", range);
    Some(TableSpec {
        flush_policy: flush_policy(fields.flush_policy.as_ref(), problems),
        replication: fields.replication.as_ref().and_then(|wanted| replication(wanted, problems)),
        namespace_ref: fields.namespace_ref.clone(),
        table_name: table_name?,
        columns,
        storage_ref: fields.storage_ref.clone(),
        location: fields.location.clone(),
        use_user_storage: false,
        deleted_retention_hours: hours.and_then(|hours| u32::try_from(hours).ok()),
        durability: match fields.durability {
            crate::Durability::Local => Durability::Local,
            crate::Durability::ObjectStore => Durability::ObjectStore,
        },
        deletion_policy: match fields.deletion_policy {
            crate::DeletionPolicy::Retain => DeletionPolicy::Retain,
            crate::DeletionPolicy::Delete => DeletionPolicy::Delete,
        },
        access: Access::default(),
    })
}

fn columns(columns: &[Column], problems: &mut Problems) -> Vec<ColumnSpec> {
    problems.unless(!columns.is_empty(), "spec.columns", "a table needs at least one column");
    problems.unless(columns.len() <= 256, "spec.columns", "a table has at most 256 columns");
    let mut checked = Vec::with_capacity(columns.len());
    for (index, declared) in columns.iter().enumerate() {
        let field = format!("spec.columns[{index}]");
        let twice = columns[..index].iter().any(|other| other.name == declared.name);
        problems.unless(!twice, &format!("{field}.name"), format!("`{}` is there twice", declared.name));
        checked.extend(column(&field, declared, problems));
    }
    checked
}

fn column(field: &str, column: &Column, problems: &mut Problems) -> Option<ColumnSpec> {
    let name_field = format!("{field}.name");
    let name = if SYSTEM_COLUMNS.contains(&column.name.as_str()) {
        problems.add(&name_field, format!("`{}` is a system column, which every table has", column.name));
        None
    } else {
        problems.take(&name_field, SqlName::new(column.name.as_str()))
    };
    let key = column.primary_key;
    let nullable = column.nullable.unwrap_or(!key);
    problems.unless(!(key && nullable), &format!("{field}.nullable"), "a column of the primary key cannot be nullable");
    let ty = problems.take(&format!("{field}.type"), column.type_.parse::<ColumnType>())?;
    let fits = !key || ty.can_be_key();
    problems.unless(fits, &format!("{field}.type"), format!("{ty} cannot be part of a primary key"));
    let default = match &column.default {
        Some(text) => Some(problems.take(&format!("{field}.default"), DefaultExpr::parse(text, &ty))?),
        None => None,
    };
    Some(ColumnSpec { name: name?, ty, nullable, primary_key: key, default })
}

/// Checks what can be checked without the storage that contains the location.
fn location(url: &str, kind: Kind) -> Result<(), String> {
    let path = ["s3://", "gs://", "az://", "file://"].iter().find_map(|scheme| url.strip_prefix(scheme));
    let Some(path) = path.filter(|path| !path.is_empty() && url.chars().count() <= 1024) else {
        return Err(format!("`{url}` is no location: write s3://, gs://, az:// or file:// and a path"));
    };
    let path = path.replace("${user_id}", template::USER).replace("{user_id}", template::USER);
    let path = path.replace("${userId}", template::USER);
    if path.replace(template::USER, "").contains(['{', '}', '$']) {
        return Err(format!("unknown variable in `{url}`; the only one in a location is `{{userId}}`"));
    }
    let segments: Vec<&str> = path.trim_matches('/').split('/').collect();
    if segments.iter().any(|segment| matches!(*segment, "" | "." | "..")) || path.contains(char::is_control) {
        return Err(format!("`{url}` has an empty, `.` or `..` segment"));
    }
    let whole = segments.iter().skip(1).filter(|segment| **segment == template::USER).count();
    match (kind, path.matches(template::USER).count(), whole) {
        (Kind::SharedTable, 0, _) | (Kind::UserTable, 1, 1) => Ok(()),
        (Kind::SharedTable, ..) => Err("the location of a shared table must not contain `{userId}`".to_owned()),
        (_, 0 | 1, _) => Err("the location of a user table must contain `{userId}` as a whole path segment".to_owned()),
        _ => Err("`{userId}` stands more than once".to_owned()),
    }
}

fn flush_policy(declared: Option<&crate::FlushPolicy>, problems: &mut Problems) -> FlushPolicy {
    let Some(declared) = declared else { return FlushPolicy::default() };
    let some = declared.rows.is_some() || declared.interval.is_some();
    problems.unless(some, "spec.flushPolicy", "needs `rows`, `interval` or both");
    let rows_fit = declared.rows.is_none_or(|rows| (1..=FLUSH_ROWS_MAX).contains(&rows));
    problems.unless(rows_fit, "spec.flushPolicy.rows", format!("must be 1 to {FLUSH_ROWS_MAX}"));
    let interval = declared.interval.as_deref();
    let interval_secs = interval.and_then(|text| problems.take("spec.flushPolicy.interval", interval_secs(text)));
    FlushPolicy { rows: declared.rows.and_then(|rows| u64::try_from(rows).ok()), interval_secs }
}

/// Seconds of a duration as Kubernetes writes it, in whole hours, minutes and seconds: `1h30m`.
fn interval_secs(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` must be 1s to 24h, written like 90s, 30m or 1h30m");
    let (mut total, mut parts) = (0_u64, 0);
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).filter(|at| (1..=5).contains(at)).ok_or_else(wrong)?;
        let count: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let unit = match rest.as_bytes()[digits] {
            b'h' => 3_600,
            b'm' => 60,
            b's' => 1,
            _ => return Err(wrong()),
        };
        total += count * unit;
        parts += 1;
        rest = &rest[digits + 1..];
    }
    if parts <= 4 && (1..=INTERVAL_SECS_MAX).contains(&total) { Ok(total) } else { Err(wrong()) }
}

fn replication(wanted: &crate::Replication, problems: &mut Problems) -> Option<Replication> {
    tags("spec.replication.tags", &wanted.tags, problems);
    match (wanted.replicas, wanted.tags.is_empty()) {
        (Some(replicas), true) => {
            let fits = (1..=REPLICAS_MAX).contains(&replicas);
            problems.unless(fits, "spec.replication.replicas", format!("must be 1 to {REPLICAS_MAX}"));
            u32::try_from(replicas).ok().map(Replication::Replicas)
        }
        (None, false) => Some(Replication::Tags(wanted.tags.clone())),
        _ => {
            problems.add("spec.replication", "needs either `replicas` or `tags`");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_read_as_kubernetes_writes_them() {
        for (text, secs) in [("1s", 1), ("90s", 90), ("30m", 1_800), ("1h30m", 5_400), ("24h", 86_400)] {
            assert_eq!(interval_secs(text), Ok(secs), "{text}");
        }
        for bad in ["", "0s", "1", "h", "1.5h", "500ms", "25h", "-1s", "1s1s1s1s1s", "999999s", "1h é"] {
            assert!(interval_secs(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn one_folder_has_one_spelling() {
        for (text, path) in
            [("./files", "files"), ("files/", "files"), ("a//b/./c", "a/b/c"), ("/x/", "/x"), ("./", ".")]
        {
            let root = filesystem(text, &mut Problems::default());
            assert_eq!(root, Some(StorageRoot::Filesystem { path: path.to_owned() }), "{text}");
        }
    }

    #[test]
    fn addresses_are_host_and_port() {
        for good in ["node-1.internal:9000", "10.0.0.1:1", "[::1]:65535"] {
            assert!(is_address(good), "{good}");
        }
        for bad in ["", "host", "host:", ":80", "host:0", "host:65536", "host:+80", "a b:80", "::1:80", "[x]:80"] {
            assert!(!is_address(bad), "{bad}");
        }
    }
}
