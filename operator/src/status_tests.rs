use std::sync::Arc;

use kalamdb_model::declared::Declared;
use kalamdb_model::{OnRemoval, Reason, compile};
use kube::api::DynamicObject;
use serde_json::json;

use super::*;

const T0: i64 = 1_800_000_000;

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(T0 + seconds).unwrap()
}

fn seen(kind: Kind, name: &str, spec: Value) -> Seen {
    let object: DynamicObject = serde_json::from_value(json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "resourceVersion": "1", "generation": 1},
        "spec": spec,
    }))
    .unwrap();
    Seen::decode(kind, object)
}

pub fn storage() -> Seen {
    seen(Kind::Storage, "s", json!({"type": "S3", "s3": {"bucket": "bucket", "prefix": "p"}}))
}

fn table() -> Seen {
    let columns = json!([{"name": "id", "type": "BIGINT", "primaryKey": true}, {"name": "body", "type": "TEXT"}]);
    let spec = json!({"namespaceRef": "app", "tableName": "messages", "columns": columns});
    seen(Kind::UserTable, "app.messages", spec)
}

/// One storage, one namespace and one table, compiled.
pub struct Fixture {
    pub objects: Vec<Arc<Seen>>,
    pub catalog: Catalog,
}

impl Fixture {
    pub fn new() -> Self {
        let namespace = seen(Kind::Namespace, "app", json!({"defaultStorage": "s"}));
        let mut fixture = Self {
            objects: vec![Arc::new(storage()), Arc::new(namespace), Arc::new(table())],
            catalog: Catalog::default(),
        };
        fixture.compile();
        fixture
    }

    pub fn remove(&mut self, name: &str) {
        self.objects.retain(|seen| seen.object().name != name);
        self.compile();
    }

    fn compile(&mut self) {
        let declared: Vec<Declared> = self.objects.iter().map(|seen| seen.declared.clone()).collect();
        self.catalog = compile(&self.catalog, &declared, OnRemoval::FollowPolicy).0;
    }

    fn desired(&self, seen: &Seen, standing: &Standing, reach: Option<&Reach>, now: Timestamp) -> Desired {
        let usage = Usage::of(&self.catalog);
        desired(seen, standing, reach, &View::new(&self.catalog, &usage), now)
    }
}

fn accepted() -> Standing {
    Standing::Accepted { warnings: Vec::new() }
}

fn refused(reason: Reason) -> Standing {
    Standing::Refused(Refusal { reason, message: "spec.x: wrong".to_owned() })
}

/// `type=status/reason` of all conditions, and the seconds since `T0` of their last transition.
fn shown(status: &Value) -> Vec<(String, i64)> {
    parsed::<Conditions>(status)
        .conditions
        .iter()
        .map(|it| (format!("{}={}/{}", it.type_, it.status, it.reason), it.last_transition_time.0.as_second() - T0))
        .collect()
}

fn names(status: &Value) -> Vec<String> {
    shown(status).into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_second_look_writes_nothing_however_late_it_is() {
    let fixture = Fixture::new();
    let reaches = [Some(Reach::Reachable), None, None];
    for (seen, reach) in fixture.objects.iter().zip(&reaches) {
        let mut seen = Seen::clone(seen);
        let first = fixture.desired(&seen, &accepted(), reach.as_ref(), at(0));
        assert!(first.patch.is_some());
        assert!(first.news.is_some_and(|news| news.good));
        seen.status = first.status;
        let second = fixture.desired(&seen, &accepted(), reach.as_ref(), at(86_400));
        assert_eq!(second.patch, None);
        assert_eq!(second.news, None);
    }
}

#[test]
fn times_move_with_a_conditions_status_and_with_nothing_else() {
    let fixture = Fixture::new();
    let mut seen = table();
    seen.status = fixture.desired(&seen, &accepted(), None, at(0)).status;
    assert_eq!(shown(&seen.status), [("Ready=True/Ready".into(), 0), ("Accepted=True/Valid".into(), 0)]);
    let warned = Standing::Accepted { warnings: vec!["careful".into()] };
    seen.status = fixture.desired(&seen, &warned, None, at(1)).status;
    assert_eq!(shown(&seen.status), [("Ready=True/Ready".into(), 0), ("Accepted=True/Valid".into(), 0)]);
    seen.status = fixture.desired(&seen, &refused(Reason::Conflict), None, at(2)).status;
    seen.status = fixture.desired(&seen, &refused(Reason::StorageNotFound), None, at(3)).status;
    let shown = shown(&seen.status);
    assert_eq!(shown[0], ("Ready=False/StorageNotFound".into(), 2));
    assert_eq!(shown[2], ("Stalled=True/StorageNotFound".into(), 2));
}

#[test]
fn a_refusal_is_stalled_with_its_reason_until_it_is_mended() {
    let fixture = Fixture::new();
    let mut seen = table();
    let bad = fixture.desired(&seen, &refused(Reason::NamespaceNotFound), None, at(0));
    let reason = "NamespaceNotFound";
    let expected =
        [format!("Ready=False/{reason}"), format!("Accepted=False/{reason}"), format!("Stalled=True/{reason}")];
    assert_eq!(names(&bad.status), expected);
    let news = bad.news.unwrap();
    assert!(!news.good && news.reason == reason && news.message == "spec.x: wrong");
    assert_eq!(bad.status.get("catalogVersion"), None);
    seen.status = bad.status;
    let good = fixture.desired(&seen, &accepted(), None, at(1));
    assert_eq!(names(&good.status), ["Ready=True/Ready", "Accepted=True/Valid"]);
    assert!(good.news.unwrap().good);
}

#[test]
fn what_the_log_has_not_taken_is_pending_and_no_event() {
    let fixture = Fixture::new();
    let pending = fixture.desired(&table(), &Standing::Pending("the store is down".into()), None, at(0));
    let expected =
        ["Ready=Unknown/CatalogPending", "Accepted=Unknown/CatalogPending", "Reconciling=True/CatalogPending"];
    assert_eq!(names(&pending.status), expected);
    assert_eq!((pending.ready, pending.news), ("Unknown", None));
    assert_eq!(pending.status["observedGeneration"], 1);
}

#[test]
fn the_catalog_version_is_the_one_that_accepted_the_generation() {
    let mut fixture = Fixture::new();
    let mut seen = table();
    seen.status = fixture.desired(&seen, &accepted(), None, at(0)).status;
    assert_eq!(seen.status["catalogVersion"], 1);
    fixture.catalog.version = 7;
    assert_eq!(fixture.desired(&seen, &accepted(), None, at(0)).status["catalogVersion"], 1);
    seen.declared.object.generation = 2;
    assert_eq!(fixture.desired(&seen, &accepted(), None, at(0)).status["catalogVersion"], 7);
    fixture.catalog.version = 0;
    seen.declared.object.generation = 1;
    assert_eq!(fixture.desired(&seen, &accepted(), None, at(0)).status["catalogVersion"], 0);
}

#[test]
fn a_storage_waits_for_its_probe_and_tells_trouble_from_delay() {
    let fixture = Fixture::new();
    let check = |reach: Reach, expected: &[&str]| {
        assert_eq!(names(&fixture.desired(&storage(), &accepted(), Some(&reach), at(0)).status), expected);
    };
    let trouble = |trouble| Reach::Unreachable { trouble, message: "m".into() };
    check(Reach::Reachable, &["Ready=True/Ready", "Accepted=True/Valid", "Reachable=True/Probed"]);
    check(Reach::NotProbed, &["Ready=True/Ready", "Accepted=True/Valid", "Reachable=Unknown/NotProbed"]);
    let probing = "Reconciling=True/Probing";
    check(Reach::Probing, &["Ready=Unknown/Probing", "Accepted=True/Valid", "Reachable=Unknown/Probing", probing]);
    for (kind, why) in [(Trouble::CredentialsMissing, "Stalled"), (Trouble::Timeout, "Reconciling")] {
        let reason = kind.as_str();
        let (ready, reach) = (format!("Ready=False/{reason}"), format!("Reachable=False/{reason}"));
        check(trouble(kind), &[&ready, "Accepted=True/Valid", &reach, &format!("{why}=True/{reason}")]);
    }
}

#[test]
fn a_restarted_operator_keeps_what_was_probed_of_the_same_generation() {
    let fixture = Fixture::new();
    let mut seen = storage();
    for reach in [Reach::Reachable, Reach::Unreachable { trouble: Trouble::AccessDenied, message: "denied".into() }] {
        seen.status = fixture.desired(&seen, &accepted(), Some(&reach), at(0)).status;
        let restarted = fixture.desired(&seen, &accepted(), Some(&Reach::Probing), at(9));
        assert_eq!(restarted.patch, None);
    }
    seen.declared.object.generation = 2;
    assert_eq!(fixture.desired(&seen, &accepted(), Some(&Reach::Probing), at(9)).ready, "Unknown");
}

#[test]
fn statuses_tell_users_tables_and_locations() {
    let fixture = Fixture::new();
    let status = |index: usize| fixture.desired(&fixture.objects[index], &accepted(), None, at(0)).status;
    assert_eq!(status(0)["usedBy"], json!({"count": 1, "sample": ["app.messages"]}));
    assert_eq!(status(1)["tables"], 1);
    assert_eq!(status(1)["dependents"]["sample"], json!(["app.messages"]));
    assert_eq!(status(2)["location"], "s3://bucket/p/users/{userId}/app/messages");
    assert_eq!(status(2)["schemaVersion"], 1);
}

#[test]
fn others_conditions_and_fields_stay() {
    let fixture = Fixture::new();
    let mut seen = table();
    let serving = json!({"type": "Serving", "status": "True", "reason": "Loaded", "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z"});
    seen.status = json!({"assignedNodes": ["n1"], "conditions": [serving]});
    let status = fixture.desired(&seen, &accepted(), None, at(0)).status;
    assert_eq!(status["assignedNodes"], json!(["n1"]));
    assert_eq!(names(&status), ["Ready=True/Ready", "Accepted=True/Valid", "Serving=True/Loaded"]);
}

#[test]
fn fields_of_a_later_version_and_other_spellings_of_a_number_are_no_change() {
    let node = seen(Kind::ReplicaNode, "n", json!({"address": "n:1"}));
    let mut node = Seen { status: json!({"replicationHealth": 1, "fromTheFuture": {"x": 1}}), ..node };
    let fixture = Fixture::new();
    let first = fixture.desired(&node, &accepted(), None, at(0)).patch.unwrap();
    assert!(first.get("replicationHealth").is_none() && first.get("fromTheFuture").is_none(), "{first}");
    for (key, value) in first.as_object().unwrap() {
        node.status[key] = value.clone();
    }
    assert_eq!(fixture.desired(&node, &accepted(), None, at(1)).patch, None);
}

#[test]
fn a_patch_holds_what_differs_and_removes_what_is_gone() {
    let old = json!({"a": 1, "b": {"x": 1, "y": 2}, "c": [1], "d": 4});
    let new = json!({"a": 1, "b": {"x": 1}, "c": [1, 2], "e": 5});
    assert_eq!(patch(&old, &new).unwrap(), json!({"b": {"y": null}, "c": [1, 2], "d": null, "e": 5}));
    assert_eq!(patch(&old, &old), None);
    assert_eq!(patch(&Value::Null, &new), Some(new));
}

#[test]
fn messages_are_bounded_and_cut_at_a_character() {
    assert_eq!(bounded("äöü", 6), "äöü");
    assert_eq!(bounded("äöüß", 7), "äö…");
    let standing = Standing::Refused(Refusal { reason: Reason::Invalid, message: "ä".repeat(9_000) });
    let status = Fixture::new().desired(&table(), &standing, None, at(0)).status;
    assert!(status["conditions"][0]["message"].as_str().unwrap().len() <= MESSAGE_BYTES_MAX);
}

#[test]
fn a_table_that_asks_for_purging_is_warned() {
    let mut seen = table();
    assert!(warnings_of(&seen, Vec::new()).is_empty());
    if let Ok(kalamdb_model::declared::Spec::Table(spec)) = &mut seen.declared.spec {
        spec.deletion_policy = DeletionPolicy::Delete;
    }
    let warnings = warnings_of(&seen, vec!["first".into()]);
    assert!(warnings.len() == 2 && warnings[1].contains("not purged yet"), "{warnings:?}");
}

#[test]
fn the_catalog_contains_an_object_only_in_the_generation_that_it_took() {
    let fixture = Fixture::new();
    let usage = Usage::of(&fixture.catalog);
    let view = View::new(&fixture.catalog, &usage);
    for seen in &fixture.objects {
        assert!(view.contains(seen.object()));
        let mut later = seen.object().clone();
        later.generation += 1;
        assert!(!view.contains(&later));
    }
}
