//! Which status an object gets: pure, from what was seen of it and what became of it.
//!
//! Owns: the conditions `Ready`, `Accepted`, `Reachable`, `Reconciling` and `Stalled` of all kinds and the fields that
//! the operator knows. Others' conditions and fields stay as they are.
//!
//! A status is written only if something but time differs: `lastTransitionTime` moves with a condition's status and with
//! nothing else, and `catalogVersion` stays the version in which the generation was first accepted.

use std::collections::HashMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kalamdb_crds::{HasConditions, NamespaceStatus, ReplicaNodeStatus, StorageStatus, TableStatus};
use kalamdb_model::Refusal;
use kalamdb_model::catalog::{Catalog, TableEntry};
use kalamdb_model::declared::{DeletionPolicy, Kind, ObjectRef};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::usage::Usage;
use crate::watch::Seen;

/// Longest message of a condition, bytes; the API allows 32,768.
const MESSAGE_BYTES_MAX: usize = 4096;
/// The conditions that are the operator's.
const OWNED: [&str; 5] = ["Ready", "Accepted", "Reachable", "Reconciling", "Stalled"];

/// What became of an object's declaration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// The catalog has it.
    Accepted {
        /// True things that the declarer may not expect.
        warnings: Vec<String>,
    },
    /// It is right, and the catalog does not have it yet; holds what it waits for.
    Pending(String),
    /// It is wrong.
    Refused(Refusal),
}

/// Whether a storage can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// The operator cannot tell, and will not.
    NotProbed,
    /// The operator does not know yet.
    Probing,
    /// It can.
    Reachable,
    /// It cannot.
    Unreachable {
        /// What kind of trouble.
        trouble: Trouble,
        /// For people; never a value of a Secret.
        message: String,
    },
}

/// The closed list of what keeps a storage from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    /// The Secret or one of its keys is missing.
    CredentialsMissing,
    /// The credentials are wrong, or may not do this.
    AccessDenied,
    /// The bucket or container does not exist.
    NotFound,
    /// No answer in time.
    Timeout,
    /// Anything else.
    Unavailable,
}

impl Trouble {
    const ALL: [Self; 5] =
        [Self::CredentialsMissing, Self::AccessDenied, Self::NotFound, Self::Timeout, Self::Unavailable];

    /// The reason as conditions carry it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::CredentialsMissing => "CredentialsMissing",
            Self::AccessDenied => "AccessDenied",
            Self::NotFound => "NotFound",
            Self::Timeout => "Timeout",
            Self::Unavailable => "Unavailable",
        }
    }

    /// Whether somebody has to change something; the others may pass by themselves.
    const fn needs_somebody(self) -> bool {
        match self {
            Self::CredentialsMissing | Self::AccessDenied | Self::NotFound => true,
            Self::Timeout | Self::Unavailable => false,
        }
    }
}

/// The newest catalog in the log, with what statuses ask of it.
pub struct View<'a> {
    catalog: &'a Catalog,
    usage: &'a Usage,
    tables: HashMap<(Kind, &'a str), &'a TableEntry>,
}

impl<'a> View<'a> {
    /// Indexes `catalog`, whose usage is `usage`.
    #[must_use]
    pub fn new(catalog: &'a Catalog, usage: &'a Usage) -> Self {
        let tables = catalog.tables.values().map(|entry| ((entry.object.kind, entry.object.name.as_str()), entry));
        Self { catalog, usage, tables: tables.collect() }
    }

    /// Whether the catalog has this generation of the object.
    #[must_use]
    pub fn contains(&self, object: &ObjectRef) -> bool {
        let entry = match object.kind {
            Kind::Storage => self.catalog.storages.values().map(|e| &e.object).find(|e| e.name == object.name),
            Kind::Namespace => self.catalog.namespaces.values().map(|e| &e.object).find(|e| e.name == object.name),
            Kind::ReplicaNode => self.catalog.nodes.get(&object.name).map(|e| &e.object),
            Kind::UserTable | Kind::SharedTable => self.table(object).map(|e| &e.object),
        };
        entry.is_some_and(|entry| entry.uid == object.uid && entry.generation == object.generation)
    }

    /// The table's entry, of whatever generation.
    #[must_use]
    pub fn table(&self, object: &ObjectRef) -> Option<&'a TableEntry> {
        self.tables.get(&(object.kind, object.name.as_str())).copied()
    }

    fn location(&self, table: &TableEntry) -> Option<String> {
        let root = self.catalog.root(&table.location)?;
        Some(format!("{}/{}", root.url().trim_end_matches('/'), table.location.template))
    }
}

/// A status to write, and what is new in it.
#[derive(Debug, PartialEq)]
pub struct Desired {
    /// The whole status.
    pub status: Value,
    /// What of it differs from the stored one, as a JSON merge patch; `None` = nothing but time does.
    pub patch: Option<Value>,
    /// The condition Ready: `True`, `False` or `Unknown`.
    pub ready: &'static str,
    /// Ready has become true or false.
    pub news: Option<News>,
}

/// For an event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct News {
    /// Whether it has become true.
    pub good: bool,
    /// Why.
    pub reason: String,
    /// For people.
    pub message: String,
}

/// The status that the object gets. `reach` is for storages.
#[must_use]
pub fn desired(seen: &Seen, standing: &Standing, reach: Option<&Reach>, view: &View<'_>, now: Timestamp) -> Desired {
    let (kind, name) = (seen.object().kind, seen.object().name.as_str());
    match kind {
        Kind::Storage => {
            let known = reach.map(|reach| settled(reach, seen));
            finish::<StorageStatus>(seen, standing, known.as_ref(), view, now, |status| {
                status.used_by = Some(view.usage.dependents(kind, name));
            })
        }
        Kind::Namespace => finish::<NamespaceStatus>(seen, standing, None, view, now, |status| {
            let dependents = view.usage.dependents(kind, name);
            status.tables = Some(dependents.count);
            status.dependents = Some(dependents);
        }),
        Kind::ReplicaNode => finish::<ReplicaNodeStatus>(seen, standing, None, view, now, |_| {}),
        Kind::UserTable | Kind::SharedTable => {
            let entry = view.table(seen.object());
            finish::<TableStatus>(seen, standing, None, view, now, |status| {
                status.location = entry.and_then(|entry| view.location(entry));
                status.schema_version = entry.and_then(|entry| i32::try_from(entry.schema_version).ok());
            })
        }
    }
}

/// Whether the object's status says that this generation is accepted.
fn was_accepted(seen: &Seen) -> bool {
    let conditions = parsed::<Conditions>(&seen.status).conditions;
    let accepted = conditions.iter().find(|condition| condition.type_ == "Accepted");
    accepted.is_some_and(|it| it.status == "True" && it.observed_generation == Some(seen.object().generation))
}

/// The part of `new` that differs from `old`, as a JSON merge patch; `None` = nothing does.
fn patch(old: &Value, new: &Value) -> Option<Value> {
    let empty = Map::new();
    let changed = removed_as_null(old.as_object().unwrap_or(&empty), new);
    (changed != Value::Object(Map::new())).then_some(changed)
}

fn removed_as_null(old: &Map<String, Value>, new: &Value) -> Value {
    let Value::Object(new) = new else { return new.clone() };
    let mut changed: Map<String, Value> =
        old.keys().filter(|key| !new.contains_key(*key)).map(|key| (key.clone(), Value::Null)).collect();
    for (key, value) in new {
        match (old.get(key), value) {
            (Some(was), value) if was == value => {}
            (Some(Value::Object(was)), Value::Object(_)) => {
                changed.insert(key.clone(), removed_as_null(was, value));
            }
            _ => {
                changed.insert(key.clone(), value.clone());
            }
        }
    }
    Value::Object(changed)
}

#[derive(serde::Deserialize, Default)]
struct Conditions {
    #[serde(default)]
    conditions: Vec<Condition>,
}

/// What is stored, or nothing if it is not ours to understand.
fn parsed<T: DeserializeOwned + Default>(status: &Value) -> T {
    serde_json::from_value(status.clone()).unwrap_or_default()
}

/// A restarted operator has probed nothing yet: what the status says of the same generation holds until it has.
fn settled(reach: &Reach, seen: &Seen) -> Reach {
    if *reach != Reach::Probing {
        return reach.clone();
    }
    let conditions = parsed::<Conditions>(&seen.status).conditions;
    let generation = Some(seen.object().generation);
    let before = conditions.into_iter().find(|it| it.type_ == "Reachable" && it.observed_generation == generation);
    match before {
        Some(before) if before.status == "True" => Reach::Reachable,
        Some(before) => match Trouble::ALL.into_iter().find(|trouble| trouble.as_str() == before.reason) {
            Some(trouble) => Reach::Unreachable { trouble, message: before.message },
            None => Reach::Probing,
        },
        None => Reach::Probing,
    }
}

fn finish<S: HasConditions + DeserializeOwned + Serialize + Default>(
    seen: &Seen,
    standing: &Standing,
    reach: Option<&Reach>,
    view: &View<'_>,
    now: Timestamp,
    fill: impl FnOnce(&mut S),
) -> Desired {
    let generation = seen.object().generation;
    let mut status: S = parsed(&seen.status);
    // Compared with what was understood, not with what was stored: a later version's fields and other spellings of a
    // number must not look like changes.
    let before = serde_json::to_value(&status).unwrap_or_default();
    fill(&mut status);
    *status.catalog_version_mut() = match standing {
        Standing::Accepted { .. } => Some(version(seen, *status.catalog_version_mut(), view.catalog.version)),
        Standing::Pending(_) | Standing::Refused(_) => None,
    };
    *status.observed_generation_mut() = Some(generation);
    let wanted = wanted(standing, reach);
    let ready = wanted.first().map_or("Unknown", |ready| ready.status);
    let old = std::mem::take(status.conditions_mut());
    let news = news(&old, &wanted);
    *status.conditions_mut() = conditions(&old, wanted, generation, now);
    // These are plain structs of strings and numbers; they serialize.
    let status = serde_json::to_value(&status).unwrap_or_default();
    Desired { patch: patch(&before, &status), status, ready, news }
}

/// The version in which this generation was first accepted, or else the newest.
fn version(seen: &Seen, before: Option<i64>, newest: u64) -> i64 {
    let newest = i64::try_from(newest).unwrap_or(i64::MAX);
    match before {
        Some(before) if before <= newest && was_accepted(seen) => before,
        _ => newest,
    }
}

/// A condition without its time.
struct Wanted {
    type_: &'static str,
    status: &'static str,
    reason: String,
    message: String,
}

impl Wanted {
    fn new(type_: &'static str, status: &'static str, reason: &str, message: &str) -> Self {
        Self { type_, status, reason: reason.to_owned(), message: bounded(message, MESSAGE_BYTES_MAX) }
    }
}

/// Cuts a text at a character.
#[must_use]
pub fn bounded(text: &str, bytes_max: usize) -> String {
    if text.len() <= bytes_max {
        return text.to_owned();
    }
    let end = (0..=bytes_max.saturating_sub('…'.len_utf8())).rev().find(|end| text.is_char_boundary(*end));
    format!("{}…", &text[..end.unwrap_or(0)])
}

/// The operator's conditions, Ready first.
fn wanted(standing: &Standing, reach: Option<&Reach>) -> Vec<Wanted> {
    let accepted = match standing {
        Standing::Accepted { warnings } => Wanted::new("Accepted", "True", "Valid", &warnings.join("; ")),
        Standing::Pending(what) => Wanted::new("Accepted", "Unknown", "CatalogPending", what),
        Standing::Refused(refusal) => Wanted::new("Accepted", "False", refusal.reason.as_str(), &refusal.message),
    };
    let mut all = summary(standing, reach);
    all.insert(1, accepted);
    if let Some(reach) = reach {
        all.insert(2, reachable(reach));
    }
    all
}

fn reachable(reach: &Reach) -> Wanted {
    let condition = |status, reason, message: &str| Wanted::new("Reachable", status, reason, message);
    match reach {
        Reach::NotProbed => {
            condition("Unknown", "NotProbed", "the folder is on the query pods' disk, where the operator cannot look")
        }
        Reach::Probing => condition("Unknown", "Probing", "not probed yet"),
        Reach::Reachable => condition("True", "Probed", "an object was created, read and deleted"),
        Reach::Unreachable { trouble, message } => condition("False", trouble.as_str(), message),
    }
}

/// Ready, and Reconciling or Stalled where it is not true.
fn summary(standing: &Standing, reach: Option<&Reach>) -> Vec<Wanted> {
    let with = |ready, why, reason: &str, message: &str| {
        vec![Wanted::new("Ready", ready, reason, message), Wanted::new(why, "True", reason, message)]
    };
    match standing {
        Standing::Refused(refusal) => return with("False", "Stalled", refusal.reason.as_str(), &refusal.message),
        Standing::Pending(what) => return with("Unknown", "Reconciling", "CatalogPending", what),
        Standing::Accepted { .. } => {}
    }
    match reach {
        Some(Reach::Probing) => with("Unknown", "Reconciling", "Probing", "not probed yet"),
        Some(Reach::Unreachable { trouble, message }) => {
            let why = if trouble.needs_somebody() { "Stalled" } else { "Reconciling" };
            with("False", why, trouble.as_str(), message)
        }
        Some(Reach::NotProbed | Reach::Reachable) | None => vec![Wanted::new("Ready", "True", "Ready", "")],
    }
}

fn news(old: &[Condition], wanted: &[Wanted]) -> Option<News> {
    let ready = wanted.first()?;
    let before = old.iter().find(|condition| condition.type_ == "Ready").map(|condition| condition.status.as_str());
    if ready.status == "Unknown" || before == Some(ready.status) {
        return None;
    }
    // What warns the declarer belongs into the good news too.
    let accepted = wanted.iter().find(|condition| condition.type_ == "Accepted").map(|it| it.message.as_str());
    let good = ready.status == "True";
    let message = if good { accepted.unwrap_or_default() } else { &ready.message };
    Some(News { good, reason: ready.reason.clone(), message: message.to_owned() })
}

/// `wanted` with times, and others' conditions after them as they were.
fn conditions(old: &[Condition], wanted: Vec<Wanted>, generation: i64, now: Timestamp) -> Vec<Condition> {
    let ours = wanted.into_iter().map(|wanted| {
        let before = old.iter().find(|condition| condition.type_ == wanted.type_);
        let since = before.filter(|before| before.status == wanted.status).map(|it| it.last_transition_time.clone());
        Condition {
            type_: wanted.type_.to_owned(),
            status: wanted.status.to_owned(),
            reason: wanted.reason,
            message: wanted.message,
            observed_generation: Some(generation),
            last_transition_time: since.unwrap_or(Time(now)),
        }
    });
    let others = old.iter().filter(|condition| !OWNED.contains(&condition.type_.as_str())).cloned();
    ours.chain(others).collect()
}

/// What an accepted table's declarer must know besides what compiling found.
#[must_use]
pub fn warnings_of(seen: &Seen, mut found: Vec<String>) -> Vec<String> {
    if let Ok(kalamdb_model::declared::Spec::Table(table)) = &seen.declared.spec
        && table.deletion_policy == DeletionPolicy::Delete
    {
        found.push("spec.deletionPolicy: files are not purged yet when it is deleted".to_owned());
    }
    found
}

#[cfg(test)]
#[path = "status_tests.rs"]
pub(crate) mod tests;
