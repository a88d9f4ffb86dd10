//! Turns declared objects into a catalog: one pure function for operator and standalone mode.
//!
//! What it keeps from the previous catalog: ids of tables and columns, the root and template that a table was first
//! accepted with, and the last good entry of every object that has become invalid. The order of objects does not
//! matter, one object's mistake changes nothing for another, and compiling its own result again changes nothing.

use std::collections::{BTreeMap, HashSet};

use crate::catalog::{Catalog, Column, Location, NamespaceEntry, NodeEntry, StorageEntry, TableEntry, TableKind};
use crate::declared::{
    ColumnSpec, Declared, DeletionPolicy, Kind, NamespaceSpec, NodeSpec, ObjectRef, Replication, Spec, StorageRoot,
    StorageSpec, TableSpec,
};
use crate::defaults::{DefaultCall, DefaultExpr};
use crate::ids::{ColumnId, TableId};
use crate::names::{RESERVED_NAMESPACES, SYSTEM_COLUMNS, SqlName, StorageName, TableName};
use crate::template;
use crate::types::ColumnType;

/// What becomes of a table whose object is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnRemoval {
    /// It is retained, whatever its policy says: a file that left a folder must never cost data.
    Retain,
    /// `deletionPolicy` decides.
    FollowPolicy,
}

/// What compiling found for one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// The object.
    pub object: ObjectRef,
    /// Accepted, or why not; a refused object keeps its last good entry, if it had one.
    pub verdict: Result<(), Refusal>,
    /// True things that the declarer may not expect.
    pub warnings: Vec<String>,
}

/// Why an object is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// One word of a closed list.
    pub reason: Reason,
    /// For people; names the field where there is one.
    pub message: String,
}

/// The closed list of reasons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The spec breaks a rule.
    Invalid,
    /// A reference names no storage.
    StorageNotFound,
    /// The storage is being deleted.
    StorageTerminating,
    /// A reference names no namespace.
    NamespaceNotFound,
    /// No node carries any of the tags.
    NoMatchingNode,
    /// Another object has the name, address or prefix.
    Conflict,
    /// SQL keeps the name for itself.
    NameReserved,
    /// A path template is wrong, or no storage contains the location.
    InvalidTemplate,
    /// The change would break stored rows.
    IncompatibleChange,
}

impl Reason {
    /// The reason as conditions carry it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "Invalid",
            Self::StorageNotFound => "StorageNotFound",
            Self::StorageTerminating => "StorageTerminating",
            Self::NamespaceNotFound => "NamespaceNotFound",
            Self::NoMatchingNode => "NoMatchingNode",
            Self::Conflict => "Conflict",
            Self::NameReserved => "NameReserved",
            Self::InvalidTemplate => "InvalidTemplate",
            Self::IncompatibleChange => "IncompatibleChange",
        }
    }
}

fn refuse<T>(reason: Reason, message: impl Into<String>) -> Result<T, Refusal> {
    Err(Refusal { reason, message: message.into() })
}

/// Compiles `declared`, all objects there are, on top of `previous`. If anything differs, the result's version is one
/// above `previous`'s and whoever stores it gives it a nonce; else it is `previous`. Outcomes come sorted by kind and name.
#[must_use]
pub fn compile(previous: &Catalog, declared: &[Declared], on_removal: OnRemoval) -> (Catalog, Vec<Outcome>) {
    let mut pass = Pass {
        previous,
        on_removal,
        next: Catalog {
            version: previous.version,
            nonce: previous.nonce.clone(),
            next_table: previous.next_table.max(1),
            ..Catalog::default()
        },
        outcomes: Vec::with_capacity(declared.len()),
        terminating: Vec::new(),
    };
    let mut objects: Vec<&Declared> = declared.iter().collect();
    let known = known(previous);
    objects.sort_by_cached_key(|d| {
        let ObjectRef { kind, uid, created, name, .. } = &d.object;
        (*kind, !known.contains(uid.as_str()), is_elsewhere(previous, d), *created, uid.clone(), name.clone())
    });
    for object in &objects {
        pass.object(object);
    }
    pass.keep_what_is_still_needed(on_removal, &objects);
    let mut next = pass.next;
    if next != *previous {
        next.version = previous.version + 1;
        next.nonce.clear();
    }
    pass.outcomes.sort_by(|a, b| (a.object.kind, &a.object.name).cmp(&(b.object.kind, &b.object.name)));
    (next, pass.outcomes)
}

/// Uids of the objects that have entries: such objects go first, so that no newcomer takes their name.
fn known(previous: &Catalog) -> HashSet<&str> {
    let storages = previous.storages.values().map(|entry| &entry.object);
    let namespaces = previous.namespaces.values().map(|entry| &entry.object);
    let nodes = previous.nodes.values().map(|entry| &entry.object);
    let tables = previous.tables.values().map(|entry| &entry.object);
    storages.chain(namespaces).chain(nodes).chain(tables).map(|object| object.uid.as_str()).collect()
}

/// Whether a storage is declared where it never was: those that stay go first, so that no other one takes their place.
fn is_elsewhere(previous: &Catalog, declared: &Declared) -> bool {
    let Ok(Spec::Storage(spec)) = &declared.spec else { return false };
    previous.storages.get(&spec.sql_name).is_none_or(|entry| !lies_at(entry, &spec.root))
}

/// Whether one of its roots is the place of `root`.
fn lies_at(entry: &StorageEntry, root: &StorageRoot) -> bool {
    entry.roots.values().any(|found| found.is_same_place(root))
}

struct Pass<'a> {
    previous: &'a Catalog,
    on_removal: OnRemoval,
    next: Catalog,
    outcomes: Vec<Outcome>,
    terminating: Vec<StorageName>,
}

impl Pass<'_> {
    fn object(&mut self, declared: &Declared) {
        let mut warnings = Vec::new();
        let verdict = match &declared.spec {
            Err(problems) => refuse(Reason::Invalid, problems.join("; ")),
            Ok(Spec::Storage(spec)) => self.storage(declared, spec, &mut warnings),
            Ok(Spec::Namespace(spec)) => self.namespace(&declared.object, spec),
            Ok(Spec::ReplicaNode(spec)) => self.node(&declared.object, spec),
            Ok(Spec::Table(spec)) => self.table(&declared.object, spec, &mut warnings),
        };
        if verdict.is_err() {
            self.keep_last_good(&declared.object);
        }
        self.outcomes.push(Outcome { object: declared.object.clone(), verdict, warnings });
    }

    /// The entry that the refused object had stays, unless another object has taken its name by right.
    fn keep_last_good(&mut self, object: &ObjectRef) {
        let same = |entry: &ObjectRef| entry.kind == object.kind && entry.name == object.name;
        for (name, entry) in self.previous.storages.iter().filter(|(_, entry)| same(&entry.object)) {
            self.next.storages.entry(name.clone()).or_insert_with(|| entry.clone());
        }
        for (name, entry) in self.previous.namespaces.iter().filter(|(_, entry)| same(&entry.object)) {
            self.next.namespaces.entry(name.clone()).or_insert_with(|| entry.clone());
        }
        for (name, entry) in self.previous.nodes.iter().filter(|(_, entry)| same(&entry.object)) {
            self.next.nodes.entry(name.clone()).or_insert_with(|| entry.clone());
        }
        for (name, entry) in self.previous.tables.iter().filter(|(_, entry)| same(&entry.object)) {
            self.next.tables.entry(name.clone()).or_insert_with(|| entry.clone());
        }
    }

    fn storage(&mut self, declared: &Declared, spec: &StorageSpec, warnings: &mut Vec<String>) -> Result<(), Refusal> {
        let template = |field: &str, result: Result<String, String>| {
            result.or_else(|message| refuse(Reason::InvalidTemplate, format!("spec.{field}: {message}")))
        };
        let shared_tables_template = template("sharedTablesTemplate", template::shared(&spec.shared_tables_template))?;
        let user_tables_template = template("userTablesTemplate", template::user(&spec.user_tables_template))?;
        self.refuse_taken("storage", &spec.sql_name, self.next.storages.get(&spec.sql_name).map(|e| &e.object))?;
        self.refuse_another_storage(&declared.object, spec)?;
        let old = self.previous.storages.get(&spec.sql_name);
        self.refuse_taken_place(spec, old)?;
        let mut roots = old.map(|entry| entry.roots.clone()).unwrap_or_default();
        let identity = spec.root.identity();
        let current_root = match roots.iter().find(|(_, root)| root.identity() == identity) {
            Some((number, _)) => *number,
            None => roots.keys().next_back().map_or(1, |last| last + 1),
        };
        roots.insert(current_root, spec.root.clone());
        let elsewhere = self.previous.tables_in(&spec.sql_name).filter(|t| t.location.root != current_root).count();
        if elsewhere > 0 {
            warnings.push(format!(
                "{elsewhere} existing table(s) keep the location that they were created with; only new tables use {}",
                spec.root.url()
            ));
        }
        if declared.deleting {
            self.terminating.push(spec.sql_name.clone());
        }
        let entry = StorageEntry {
            object: settled(old.map(|entry| &entry.object), &declared.object),
            display_name: spec.display_name.clone(),
            roots,
            current_root,
            credentials_secret: spec.credentials_secret.clone(),
            shared_tables_template,
            user_tables_template,
        };
        self.next.storages.insert(spec.sql_name.clone(), entry);
        Ok(())
    }

    /// Tables stand on a storage's name and type; in a cluster, the API server refuses the same.
    fn refuse_another_storage(&self, object: &ObjectRef, spec: &StorageSpec) -> Result<(), Refusal> {
        let mut storages = self.previous.storages.iter();
        let Some((name, old)) = storages.find(|(_, entry)| entry.object.uid == object.uid) else { return Ok(()) };
        if *name != spec.sql_name {
            let message = format!("spec.sqlName: cannot be changed from `{name}`; declare another storage instead");
            return refuse(Reason::IncompatibleChange, message);
        }
        match old.roots.get(&old.current_root) {
            Some(root) if std::mem::discriminant(root) != std::mem::discriminant(&spec.root) => refuse(
                Reason::IncompatibleChange,
                format!(
                    "spec.type: cannot be changed; its files are at `{}`; declare another storage instead",
                    root.url()
                ),
            ),
            _ => Ok(()),
        }
    }

    /// A place has one commit stream, and so one storage. Storages that share one from before go on as they do.
    fn refuse_taken_place(&self, spec: &StorageSpec, old: Option<&StorageEntry>) -> Result<(), Refusal> {
        let mut others = self.next.storages.iter().filter(|(name, _)| **name != spec.sql_name);
        match others.find(|(_, other)| lies_at(other, &spec.root)) {
            Some((other, _)) if old.is_none_or(|old| !lies_at(old, &spec.root)) => {
                let place = spec.root.url();
                refuse(
                    Reason::Conflict,
                    format!("spec: storage `{other}` lies at `{place}`; declare another bucket, prefix or folder"),
                )
            }
            _ => Ok(()),
        }
    }

    fn namespace(&mut self, object: &ObjectRef, spec: &NamespaceSpec) -> Result<(), Refusal> {
        if RESERVED_NAMESPACES.contains(&spec.sql_name.as_str()) {
            return refuse(Reason::NameReserved, format!("the name `{}` is reserved", spec.sql_name));
        }
        self.refuse_taken("namespace", &spec.sql_name, self.next.namespaces.get(&spec.sql_name).map(|e| &e.object))?;
        let default_storage = match &spec.default_storage {
            Some(name) => Some(self.storage_of_object("spec.defaultStorage", name)?.0.clone()),
            None => None,
        };
        let old = self.previous.namespaces.get(&spec.sql_name).map(|entry| &entry.object);
        let entry = NamespaceEntry { object: settled(old, object), default_storage, options: spec.options.clone() };
        self.next.namespaces.insert(spec.sql_name.clone(), entry);
        Ok(())
    }

    fn node(&mut self, object: &ObjectRef, spec: &NodeSpec) -> Result<(), Refusal> {
        if let Some((other, _)) = self.next.nodes.iter().find(|(_, node)| node.address == spec.address) {
            return refuse(Reason::Conflict, format!("spec.address: `{}` is the address of `{other}`", spec.address));
        }
        let old = self.previous.nodes.get(&object.name).map(|entry| &entry.object);
        let entry = NodeEntry {
            object: settled(old, object),
            display_name: spec.display_name.clone(),
            address: spec.address.clone(),
            tags: spec.tags.clone(),
            unschedulable: spec.unschedulable,
        };
        self.next.nodes.insert(object.name.clone(), entry);
        Ok(())
    }

    fn refuse_taken(&self, what: &str, name: &impl ToString, holder: Option<&ObjectRef>) -> Result<(), Refusal> {
        match holder {
            Some(holder) => refuse(
                Reason::Conflict,
                format!(
                    "the {what} `{}` is already declared by {} `{}`",
                    name.to_string(),
                    holder.kind.as_str(),
                    holder.name
                ),
            ),
            None => Ok(()),
        }
    }

    fn storage_of_object(&self, field: &str, object: &str) -> Result<(&StorageName, &StorageEntry), Refusal> {
        self.next.storages.iter().find(|(_, entry)| entry.object.name == object).map_or_else(
            || {
                let names = self.next.storages.values().map(|entry| entry.object.name.as_str());
                refuse(Reason::StorageNotFound, format!("{field}: storage `{object}` does not exist{}", listed(names)))
            },
            Ok,
        )
    }

    fn table(&mut self, object: &ObjectRef, spec: &TableSpec, warnings: &mut Vec<String>) -> Result<(), Refusal> {
        let namespace = self.namespace_of_object(&spec.namespace_ref)?;
        let name = TableName { namespace, table: spec.table_name.clone() };
        self.refuse_taken("table", &name, self.next.tables.get(&name).map(|entry| &entry.object))?;
        self.check_replication(spec.replication.as_ref(), warnings)?;
        let kind = if object.kind == Kind::UserTable { TableKind::User } else { TableKind::Shared };
        // Another object under the name of one whose files were to go with it: a new table, not the old one again.
        let is_gone = |old: &&TableEntry| {
            self.on_removal == OnRemoval::FollowPolicy
                && old.deletion_policy == DeletionPolicy::Delete
                && old.object.uid != object.uid
        };
        let live = self.previous.tables.get(&name).filter(|old| !is_gone(old));
        let old = live.or_else(|| self.previous.retained.get(&name));
        if let Some(old) = old
            && old.kind != kind
        {
            return refuse(
                Reason::Conflict,
                format!("`{name}` exists as another kind of table, with files of its own"),
            );
        }
        let declared = declared_columns(spec)?;
        let adopted = old.is_some_and(|old| live.is_none() || old.object.uid != object.uid);
        let (columns, next_column) = match old {
            Some(old) => evolve(old, &declared, adopted)?,
            None => number(&declared),
        };
        let key = key_of(&columns, &declared);
        let location = match old {
            Some(old) => old.location.clone(),
            None => self.locate(&name, kind, spec)?,
        };
        if let Some(old) = old {
            self.warn_of_move(spec, old, warnings);
        }
        let id = old.map_or(TableId(self.next.next_table), |old| old.id);
        let schema_version = match old {
            Some(old) if old.columns == columns => old.schema_version,
            Some(old) => old.schema_version + 1,
            None => 1,
        };
        let entry = TableEntry {
            object: settled(live.map(|entry| &entry.object), object),
            id,
            name: name.clone(),
            kind,
            schema_version,
            columns,
            next_column,
            key,
            location,
            use_user_storage: spec.use_user_storage,
            had_user_storage: spec.use_user_storage || old.is_some_and(|old| old.had_user_storage),
            flush_policy: spec.flush_policy,
            replication: spec.replication.clone(),
            deleted_retention_hours: spec.deleted_retention_hours,
            durability: spec.durability,
            deletion_policy: spec.deletion_policy,
            access: spec.access,
        };
        if old.is_none() {
            self.next.next_table += 1;
        }
        self.next.tables.insert(name, entry);
        Ok(())
    }

    fn namespace_of_object(&self, object: &str) -> Result<SqlName, Refusal> {
        match self.next.namespaces.iter().find(|(_, entry)| entry.object.name == object) {
            Some((name, _)) => Ok(name.clone()),
            None => {
                let names = self.next.namespaces.values().map(|entry| entry.object.name.as_str());
                let message = format!("spec.namespaceRef: namespace `{object}` does not exist{}", listed(names));
                refuse(Reason::NamespaceNotFound, message)
            }
        }
    }

    fn check_replication(&self, wanted: Option<&Replication>, warnings: &mut Vec<String>) -> Result<(), Refusal> {
        if wanted.is_some() {
            warnings.push("spec.replication: copies are not made in this version".to_owned());
        }
        match wanted {
            Some(Replication::Tags(tags)) => {
                let found = self.next.nodes.values().any(|node| node.tags.iter().any(|tag| tags.contains(tag)));
                if found {
                    Ok(())
                } else {
                    refuse(
                        Reason::NoMatchingNode,
                        format!("spec.replication.tags: no ReplicaNode carries any of `{}`", tags.join("`, `")),
                    )
                }
            }
            Some(Replication::Replicas(count)) => {
                let nodes = self.next.nodes.values().filter(|node| !node.unschedulable).count();
                if u64::from(*count) > nodes as u64 {
                    warnings.push(format!("{count} replicas are asked for, and there are {nodes} schedulable nodes"));
                }
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn locate(&self, name: &TableName, kind: TableKind, spec: &TableSpec) -> Result<Location, Refusal> {
        let location = match &spec.location {
            Some(url) => self.locate_inline(url, kind)?,
            None => self.locate_in_storage(name, kind, spec)?,
        };
        let taken =
            self.previous.tables.values().chain(self.previous.retained.values()).chain(self.next.tables.values());
        for other in taken.filter(|other| other.name != *name) {
            // Users of the other table may have any storage as their own.
            let of_users = self.next.storages.keys().filter(|_| other.had_user_storage);
            let of_users = of_users.filter_map(|storage| self.next.place_in(storage, other));
            if of_users.chain([other.location.clone()]).any(|taken| self.overlap(&location, &taken)) {
                return refuse(
                    Reason::Conflict,
                    format!("its files would lie at `{}`, where those of `{}` lie", location.template, other.name),
                );
            }
        }
        Ok(location)
    }

    fn locate_in_storage(&self, name: &TableName, kind: TableKind, spec: &TableSpec) -> Result<Location, Refusal> {
        let (storage, entry) = match &spec.storage_ref {
            Some(object) => self.storage_of_object("spec.storageRef", object)?,
            None => self.default_storage(&name.namespace)?,
        };
        if self.terminating.contains(storage) {
            return refuse(Reason::StorageTerminating, format!("storage `{storage}` is being deleted"));
        }
        let pattern = match kind {
            TableKind::User => &entry.user_tables_template,
            TableKind::Shared => &entry.shared_tables_template,
        };
        Ok(Location { storage: storage.clone(), root: entry.current_root, template: template::resolve(pattern, name) })
    }

    fn default_storage(&self, namespace: &SqlName) -> Result<(&StorageName, &StorageEntry), Refusal> {
        let storage = self.next.namespaces.get(namespace).and_then(|entry| entry.default_storage.as_ref());
        let found = storage.and_then(|storage| self.next.storages.get_key_value(storage));
        found.map_or_else(
            || {
                let message = format!("spec.storageRef: missing, and namespace `{namespace}` has no defaultStorage");
                refuse(Reason::StorageNotFound, message)
            },
            Ok,
        )
    }

    fn locate_inline(&self, url: &str, kind: TableKind) -> Result<Location, Refusal> {
        let within = self.next.storages.iter().find_map(|(name, entry)| {
            let root = entry.roots.get(&entry.current_root)?;
            let rest = url.strip_prefix(root.url().as_str())?.strip_prefix('/')?;
            Some((name, entry, rest))
        });
        let Some((storage, entry, rest)) = within else {
            let message = format!("spec.location: no storage contains `{url}`; declare one for its bucket or folder");
            return refuse(Reason::InvalidTemplate, message);
        };
        let template = template::inline(rest, kind == TableKind::User)
            .or_else(|message| refuse(Reason::InvalidTemplate, format!("spec.location: {message}")))?;
        Ok(Location { storage: storage.clone(), root: entry.current_root, template })
    }

    /// Whether two locations could name one object, on whatever storages they are declared.
    fn overlap(&self, a: &Location, b: &Location) -> bool {
        let root = |location: &Location| self.next.root(location).or_else(|| self.previous.root(location));
        let (Some(x), Some(y)) = (root(a), root(b)) else { return false };
        x.overlaps(&a.template, y, &b.template)
    }

    fn warn_of_move(&self, spec: &TableSpec, old: &TableEntry, warnings: &mut Vec<String>) {
        let Some(object) = &spec.storage_ref else { return };
        if self.storage_of_object("", object).is_ok_and(|(name, _)| *name != old.location.storage) {
            let at = format!("{}:{}", old.location.storage, old.location.template);
            warnings.push(format!("its files stay at `{at}`: the location is fixed when a table is created"));
        }
    }

    /// Tables whose object is gone go by their policy; what they and retained ones stand on stays.
    fn keep_what_is_still_needed(&mut self, on_removal: OnRemoval, objects: &[&Declared]) {
        for (name, entry) in &self.previous.retained {
            if !self.next.tables.contains_key(name) {
                self.next.retained.insert(name.clone(), entry.clone());
            }
        }
        let declared: HashSet<(Kind, &str)> = objects.iter().map(|d| (d.object.kind, d.object.name.as_str())).collect();
        for (name, entry) in &self.previous.tables {
            let declared = declared.contains(&(entry.object.kind, entry.object.name.as_str()));
            let keep = on_removal == OnRemoval::Retain || entry.deletion_policy == DeletionPolicy::Retain;
            if !self.next.tables.contains_key(name) && !declared && keep {
                self.next.retained.insert(name.clone(), entry.clone());
            }
        }
        let tables = || self.next.tables.values().chain(self.next.retained.values());
        let mut used: Vec<StorageName> = tables().map(|table| table.location.storage.clone()).collect();
        // Nobody here knows which users have storages of their own: their rows stay within reach.
        if tables().any(|table| table.had_user_storage) {
            used.extend(self.previous.storages.keys().cloned());
        }
        for storage in used {
            if let Some(entry) = self.previous.storages.get(&storage) {
                self.next.storages.entry(storage).or_insert_with(|| entry.clone());
            }
        }
        let namespaces: Vec<SqlName> = self.next.tables.keys().map(|name| name.namespace.clone()).collect();
        for namespace in namespaces {
            if let Some(entry) = self.previous.namespaces.get(&namespace) {
                self.next.namespaces.entry(namespace).or_insert_with(|| entry.clone());
            }
        }
    }
}

/// The reference that the entry keeps while the object's spec stays the same: a status update changes the resource
/// version, and must not make a new catalog version, which would make a new status.
fn settled(old: Option<&ObjectRef>, new: &ObjectRef) -> ObjectRef {
    match old {
        Some(old) if old.uid == new.uid && old.generation == new.generation => old.clone(),
        _ => new.clone(),
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a str>) -> String {
    let names: Vec<&str> = names.take(10).collect();
    if names.is_empty() { String::new() } else { format!("; there are `{}`", names.join("`, `")) }
}

/// A declared column with what follows from its being in the key.
struct Wanted {
    spec: ColumnSpec,
    in_key: bool,
}

fn declared_columns(spec: &TableSpec) -> Result<Vec<Wanted>, Refusal> {
    if spec.columns.is_empty() {
        return refuse(Reason::Invalid, "spec.columns: a table needs at least one column");
    }
    let mut wanted: Vec<Wanted> =
        spec.columns.iter().map(|column| Wanted { spec: column.clone(), in_key: column.primary_key }).collect();
    if !wanted.iter().any(|column| column.in_key) {
        add_key(&mut wanted);
    }
    let mut seen = BTreeMap::new();
    for (index, column) in wanted.iter_mut().enumerate() {
        let at = |message: String| refuse(Reason::Invalid, format!("spec.columns[{index}]: {message}"));
        let name = column.spec.name.clone();
        if SYSTEM_COLUMNS.contains(&name.as_str()) {
            return at(format!("`{name}` is a system column"));
        }
        if seen.insert(name.clone(), ()).is_some() {
            return at(format!("`{name}` is there twice"));
        }
        if column.in_key {
            if !column.spec.ty.can_be_key() {
                return at(format!("`{name}` is {}, which cannot be part of a primary key", column.spec.ty));
            }
            column.spec.nullable = false;
        }
    }
    Ok(wanted)
}

/// A table without a key gets one: its column `id`, or a new first column `id`.
fn add_key(wanted: &mut Vec<Wanted>) {
    if let Some(id) = wanted.iter_mut().find(|column| column.spec.name.as_str() == "id") {
        id.in_key = true;
        if id.spec.ty == ColumnType::BigInt && id.spec.default.is_none() {
            id.spec.default = Some(DefaultExpr::Call(DefaultCall::SnowflakeId));
        }
        return;
    }
    let spec = ColumnSpec {
        name: SqlName::new("id").expect("`id` is a name"),
        ty: ColumnType::BigInt,
        nullable: false,
        primary_key: true,
        default: Some(DefaultExpr::Call(DefaultCall::SnowflakeId)),
    };
    wanted.insert(0, Wanted { spec, in_key: true });
}

fn column(id: ColumnId, spec: &ColumnSpec, initial: Option<DefaultExpr>) -> Column {
    let (name, ty, default) = (spec.name.clone(), spec.ty.clone(), spec.default.clone());
    Column { id, name, ty, nullable: spec.nullable, default, initial }
}

fn number(wanted: &[Wanted]) -> (Vec<Column>, u32) {
    let columns: Vec<Column> = (1_u32..).zip(wanted).map(|(id, w)| column(ColumnId(id), &w.spec, None)).collect();
    let next = u32::try_from(columns.len()).expect("a table has at most 256 columns") + 1;
    (columns, next)
}

/// Old columns keep their ids; new ones must be readable in rows that were written without them.
fn evolve(old: &TableEntry, wanted: &[Wanted], adopted: bool) -> Result<(Vec<Column>, u32), Refusal> {
    let incompatible = |message: String| refuse(Reason::IncompatibleChange, format!("spec.columns: {message}"));
    for was in &old.columns {
        let Some(now) = wanted.iter().find(|w| w.spec.name == was.name) else {
            return incompatible(format!("`{}` exists and cannot be removed", was.name));
        };
        if now.spec.ty != was.ty {
            return incompatible(format!("`{}` is {} and cannot become {}", was.name, was.ty, now.spec.ty));
        }
        if now.in_key != old.key.contains(&was.id) {
            return incompatible(format!("the primary key is fixed; `{}` cannot join or leave it", was.name));
        }
        if was.nullable && !now.spec.nullable {
            return incompatible(format!("`{}` may hold NULL already and cannot become NOT NULL", was.name));
        }
    }
    let mut next_column = old.next_column;
    let mut columns = Vec::with_capacity(wanted.len());
    for now in wanted {
        if let Some(was) = old.columns.iter().find(|was| was.name == now.spec.name) {
            columns.push(column(was.id, &now.spec, was.initial.clone()));
            continue;
        }
        let name = &now.spec.name;
        if adopted {
            return incompatible(format!(
                "the table's files are from an earlier declaration without `{name}`; declare it with the same columns first"
            ));
        }
        if now.in_key {
            return incompatible(format!("the primary key is fixed; `{name}` cannot join it"));
        }
        let initial = now.spec.default.clone().filter(|default| default.literal().is_some());
        if !now.spec.nullable && initial.is_none() {
            return incompatible(format!("the new column `{name}` must be nullable or have a literal default"));
        }
        columns.push(column(ColumnId(next_column), &now.spec, initial));
        next_column += 1;
    }
    if key_of(&columns, wanted) != old.key {
        return incompatible("the order of the primary key's columns is fixed".to_owned());
    }
    Ok((columns, next_column))
}

fn key_of(columns: &[Column], wanted: &[Wanted]) -> Vec<ColumnId> {
    columns.iter().zip(wanted).filter(|(_, wanted)| wanted.in_key).map(|(column, _)| column.id).collect()
}

#[cfg(test)]
#[path = "compile_tests.rs"]
mod tests;
