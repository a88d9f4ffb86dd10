//! What there is: the objects of all kinds, as the API server tells them.
//!
//! Owns: decoding, the index of objects, whether all kinds were listed once. Does not own: what follows from a change
//! ([`crate::pass`]).
//!
//! Objects are watched undecoded, and each is decoded alone: one that cannot be read is declared with its problem and
//! disturbs no other. Of the metadata only what is needed is kept; managedFields, most of an object's size, are not.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use kalamdb_crds::{Declare, Namespace, ReplicaNode, SharedTable, Storage, UserTable, convert};
use kalamdb_model::declared::{Declared, Kind, ObjectRef};
use kube::Api;
use kube::api::{DynamicObject, ObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, Event, watcher};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::metrics::{Failure, KINDS, Metrics};

/// One object as it was last seen.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// What it declares.
    pub declared: Declared,
    /// `status` as stored; null if there is none.
    pub status: Value,
}

impl Seen {
    /// Which object.
    #[must_use]
    pub const fn object(&self) -> &ObjectRef {
        &self.declared.object
    }

    /// Decodes an object of `kind`; what cannot be read of its spec is declared as its problem.
    #[must_use]
    pub fn decode(kind: Kind, mut object: DynamicObject) -> Self {
        let status = object.data.get_mut("status").map(Value::take).unwrap_or_default();
        let spec = object.data.get_mut("spec").map(Value::take).unwrap_or_default();
        let meta = object.metadata;
        let declared = match kind {
            Kind::Storage => declare::<Storage>(&meta, spec),
            Kind::Namespace => declare::<Namespace>(&meta, spec),
            Kind::ReplicaNode => declare::<ReplicaNode>(&meta, spec),
            Kind::UserTable => declare::<UserTable>(&meta, spec),
            Kind::SharedTable => declare::<SharedTable>(&meta, spec),
        };
        Self { declared, status }
    }
}

fn declare<T: Declare + DeserializeOwned>(meta: &ObjectMeta, spec: Value) -> Declared {
    // Only what a declaration depends on is decoded again.
    let short = json!({ "name": meta.name, "uid": meta.uid, "resourceVersion": meta.resource_version,
        "generation": meta.generation, "creationTimestamp": meta.creation_timestamp,
        "deletionTimestamp": meta.deletion_timestamp });
    match serde_json::from_value::<T>(json!({ "metadata": short, "spec": spec })) {
        Ok(object) => object.declare(),
        Err(error) => convert::undecodable(T::KIND, meta, &error),
    }
}

#[derive(Default)]
struct OfKind {
    objects: BTreeMap<String, Arc<Seen>>,
    /// Objects of a list that is not complete yet.
    incoming: BTreeMap<String, Arc<Seen>>,
    listed: bool,
}

/// All objects of one instance.
pub struct Objects {
    kinds: Mutex<[OfKind; KINDS.len()]>,
    changes: watch::Sender<u64>,
}

impl Default for Objects {
    fn default() -> Self {
        Self { kinds: Mutex::default(), changes: watch::Sender::new(0) }
    }
}

impl Objects {
    /// Takes one event of the watch of `kind`.
    pub fn take(&self, kind: Kind, event: Event<DynamicObject>) {
        let changed = {
            let mut kinds = self.kinds.lock();
            let of_kind = &mut kinds[index(kind)];
            match event {
                Event::Init => {
                    of_kind.incoming.clear();
                    false
                }
                Event::InitApply(object) => {
                    let seen = Arc::new(Seen::decode(kind, object));
                    of_kind.incoming.insert(seen.object().name.clone(), seen);
                    false
                }
                Event::InitDone => {
                    let before = std::mem::replace(&mut of_kind.objects, std::mem::take(&mut of_kind.incoming));
                    let first = !std::mem::replace(&mut of_kind.listed, true);
                    first || before != of_kind.objects
                }
                Event::Apply(object) => {
                    let seen = Arc::new(Seen::decode(kind, object));
                    let before = of_kind.objects.insert(seen.object().name.clone(), Arc::clone(&seen));
                    before.is_none_or(|before| before != seen)
                }
                Event::Delete(object) => {
                    object.metadata.name.is_some_and(|name| of_kind.objects.remove(&name).is_some())
                }
            }
        };
        if changed {
            self.changes.send_modify(|count| *count += 1);
        }
    }

    /// Takes what a write to `before` returned, unless the watch has told something newer meanwhile. The next pass
    /// then does not work on what this one has changed, and the watch's own event brings nothing new.
    pub fn take_written(&self, before: &ObjectRef, after: &Arc<Seen>) {
        let mut kinds = self.kinds.lock();
        let found = kinds[index(before.kind)].objects.get_mut(&before.name);
        if let Some(found) = found
            && found.object().uid == before.uid
            && found.object().resource_version == before.resource_version
        {
            *found = Arc::clone(after);
        }
    }

    /// Kinds that were never listed completely.
    #[must_use]
    pub fn unlisted(&self) -> Vec<Kind> {
        let kinds = self.kinds.lock();
        KINDS.into_iter().filter(|kind| !kinds[index(*kind)].listed).collect()
    }

    /// All objects.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Seen>> {
        self.kinds.lock().iter().flat_map(|of_kind| of_kind.objects.values().cloned()).collect()
    }

    /// All objects of `kind`.
    #[must_use]
    pub fn of(&self, kind: Kind) -> Vec<Arc<Seen>> {
        self.kinds.lock()[index(kind)].objects.values().cloned().collect()
    }

    /// Counts changes.
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}

const fn index(kind: Kind) -> usize {
    match kind {
        Kind::Storage => 0,
        Kind::Namespace => 1,
        Kind::ReplicaNode => 2,
        Kind::UserTable => 3,
        Kind::SharedTable => 4,
    }
}

/// Longest pause before a watch begins again. The client's own 30 s would leave every change unseen for that long after
/// the API server is back, and five watches are no burden to it.
const PAUSE_LONGEST: Duration = Duration::from_secs(5);

/// The client's pauses, cut to [`PAUSE_LONGEST`].
#[derive(Default)]
struct Pauses(watcher::DefaultBackoff);

impl Iterator for Pauses {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        self.0.next().map(|pause| pause.min(PAUSE_LONGEST))
    }
}

impl Backoff for Pauses {
    fn reset(&mut self) {
        self.0.reset();
    }
}

/// Watches one kind for ever; a watch that fails begins again.
pub async fn follow(kind: Kind, api: Api<DynamicObject>, objects: Arc<Objects>, metrics: Arc<Metrics>) {
    let mut events = watcher(api, watcher::Config::default()).backoff(Pauses::default()).boxed();
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => objects.take(kind, event),
            Err(error) => {
                tracing::warn!(kind = kind.as_str(), error = %error, "a watch failed and begins again");
                metrics.failed(Failure::Watch);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(name: &str, version: &str, spec: &Value) -> DynamicObject {
        serde_json::from_value(json!({
            "apiVersion": "kalamdb.org/v1alpha1", "kind": "Namespace",
            "metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": version, "generation": 1,
                         "creationTimestamp": "2026-01-02T03:04:05Z"},
            "spec": spec, "status": {"tables": 3, "fromTheFuture": true},
        }))
        .unwrap()
    }

    fn names(objects: &Objects) -> Vec<String> {
        objects.all().iter().map(|seen| seen.object().name.clone()).collect()
    }

    #[test]
    fn an_object_that_cannot_be_read_is_declared_with_its_problem() {
        let good = Seen::decode(Kind::Namespace, object("app", "1", &json!({"defaultStorage": "s"})));
        assert!(good.declared.spec.is_ok());
        assert_eq!(good.status["tables"], 3);
        let bad = Seen::decode(Kind::Namespace, object("app", "1", &json!({"defaultStorage": 7})));
        let problems = bad.declared.spec.unwrap_err();
        assert!(problems[0].starts_with("spec: cannot be read: "), "{problems:?}");
        assert_eq!(bad.declared.object.uid, "uid-app");
        assert_eq!(bad.declared.object.created, good.declared.object.created);
    }

    #[test]
    fn a_list_replaces_what_was_known_only_when_it_is_complete() {
        let (objects, spec) = (Objects::default(), json!({}));
        let mut changes = objects.changes();
        objects.take(Kind::Namespace, Event::Init);
        objects.take(Kind::Namespace, Event::InitApply(object("a", "1", &spec)));
        assert!(names(&objects).is_empty() && objects.unlisted().len() == KINDS.len());
        objects.take(Kind::Namespace, Event::InitDone);
        assert!(names(&objects) == ["a"] && !objects.unlisted().contains(&Kind::Namespace));
        assert!(changes.has_changed().unwrap());
        changes.mark_unchanged();
        objects.take(Kind::Namespace, Event::Init);
        objects.take(Kind::Namespace, Event::InitApply(object("b", "2", &spec)));
        assert_eq!(names(&objects), ["a"]);
        assert!(!changes.has_changed().unwrap());
        objects.take(Kind::Namespace, Event::InitDone);
        assert_eq!(names(&objects), ["b"]);
        objects.take(Kind::Namespace, Event::Delete(object("b", "3", &spec)));
        assert!(names(&objects).is_empty());
    }

    #[test]
    fn a_watch_begins_again_soon_however_often_it_failed() {
        let mut pauses = Pauses::default();
        assert!((0..50).all(|_| pauses.next().is_some_and(|pause| pause <= PAUSE_LONGEST)));
        pauses.reset();
        assert!(pauses.next().is_some_and(|pause| pause < Duration::from_secs(2)));
    }

    #[test]
    fn what_a_write_returned_is_news_to_nobody_and_never_replaces_something_newer() {
        let (objects, spec) = (Objects::default(), json!({}));
        objects.take(Kind::Namespace, Event::Apply(object("a", "1", &spec)));
        let before = objects.all()[0].object().clone();
        let after = Arc::new(Seen::decode(Kind::Namespace, object("a", "2", &spec)));
        objects.take_written(&before, &after);
        let mut changes = objects.changes();
        changes.mark_unchanged();
        objects.take(Kind::Namespace, Event::Apply(object("a", "2", &spec)));
        assert!(!changes.has_changed().unwrap());
        objects.take(Kind::Namespace, Event::Apply(object("a", "3", &spec)));
        objects.take_written(&before, &after);
        assert_eq!(objects.all()[0].object().resource_version, "3");
    }
}
