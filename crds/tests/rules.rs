//! Every rule, by the files under `rules/`: `accept-X.yaml` and `reject-X.yaml` hold one object each, `update-accept-X` and
//! `update-reject-X` an old and a new one. A rejected file says in its first lines what the API server's answer contains
//! (`expect`), what standalone mode's does (`rust`, or `none`: only the past forbids it), and which half of the
//! definition refuses it (`by`: `cel`, or `schema` for types, patterns and limits, which only a real API server judges).

#![allow(clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use kalamdb_crds::manifests::{Parsed, folder, parse};
use kalamdb_crds::{Namespace, ReplicaNode, SharedTable, Storage, UserTable};
use kalamdb_model::{Catalog, OnRemoval, compile};
use kube::CustomResourceExt;
use kube::core::cel::Validator;
use serde_json::Value;

struct Case {
    name: String,
    text: String,
    objects: Vec<Value>,
}

impl Case {
    fn header(&self, key: &str) -> &str {
        let prefix = format!("# {key}: ");
        self.text.lines().find_map(|line| line.strip_prefix(&prefix)).unwrap_or_default()
    }

    fn is_rejected(&self) -> bool {
        self.name.contains("reject-")
    }

    fn new_object(&self) -> &Value {
        self.objects.last().expect("a file has objects")
    }

    fn kind(&self) -> &str {
        self.new_object()["kind"].as_str().expect("an object has a kind")
    }
}

fn cases() -> Vec<Case> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/rules");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).expect("the folder is there").map(|entry| entry.expect("readable").path()).collect();
    paths.sort();
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(&path).expect("readable");
        let name = path.file_stem().expect("a name").to_string_lossy().into_owned();
        let objects: Vec<Value> = serde_saphyr::from_multiple(&text).expect("YAML");
        assert_eq!(objects.len(), if name.starts_with("update-") { 2 } else { 1 }, "{name}");
        Case { name, text, objects }
    };
    paths.into_iter().map(read).collect()
}

fn schemas() -> BTreeMap<String, Value> {
    let crds = [Namespace::crd(), Storage::crd(), ReplicaNode::crd(), UserTable::crd(), SharedTable::crd()];
    let schema = |crd| {
        let json = serde_json::to_value(crd).expect("a CRD is JSON");
        let kind = json["spec"]["names"]["kind"].as_str().expect("a kind").to_owned();
        (kind, json["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone())
    };
    crds.into_iter().map(schema).collect()
}

fn cel_messages(schemas: &BTreeMap<String, Value>, case: &Case) -> Vec<String> {
    let old = (case.objects.len() == 2).then(|| &case.objects[0]);
    match Validator::new().validate(&schemas[case.kind()], case.new_object(), old) {
        Ok(()) => Vec::new(),
        Err(errors) => errors.iter().map(ToString::to_string).collect(),
    }
}

#[test]
fn cel_accepts_and_rejects_what_the_files_say() {
    let schemas = schemas();
    for case in cases() {
        let messages = cel_messages(&schemas, &case);
        if case.is_rejected() && case.header("by") == "cel" {
            let expected = case.header("expect");
            assert!(!expected.is_empty(), "{}: no `expect`", case.name);
            assert!(messages.iter().any(|message| message.contains(expected)), "{}: {messages:?}", case.name);
        } else if !case.is_rejected() {
            assert!(messages.is_empty(), "{}: {messages:?}", case.name);
        }
        for old in case.objects.iter().take(case.objects.len() - 1) {
            let result = Validator::new().validate(&schemas[case.kind()], old, None);
            assert!(result.is_ok(), "{}: the old object is wrong itself: {result:?}", case.name);
        }
    }
}

#[test]
fn standalone_mode_accepts_and_rejects_what_the_files_say() {
    for case in cases() {
        let mut parsed = parse(&case.name, &case.text);
        let Some(Parsed::Object(object)) = parsed.pop() else { panic!("{}: unreadable: {parsed:?}", case.name) };
        let problems: Vec<String> = object.problems.iter().map(ToString::to_string).collect();
        assert_eq!(problems.is_empty(), object.declared.spec.is_ok(), "{}", case.name);
        let expected = case.header("rust");
        if case.is_rejected() && expected != "none" {
            assert!(!expected.is_empty(), "{}: no `rust`", case.name);
            assert!(problems.iter().any(|problem| problem.contains(expected)), "{}: {problems:?}", case.name);
        } else {
            assert!(problems.is_empty(), "{}: {problems:?}", case.name);
        }
    }
}

/// What only the past forbids is `compile`'s to refuse in standalone mode.
#[test]
fn compiling_refuses_the_changes_of_columns_that_cel_refuses() {
    let around = "apiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {name: app}\n\
                  spec: {defaultStorage: local}\n---\napiVersion: kalamdb.org/v1alpha1\nkind: Storage\n\
                  metadata: {name: local}\nspec: {type: Filesystem, filesystem: {path: files}}\n";
    let compiled = |previous: &Catalog, object: &Value| {
        let text = serde_saphyr::to_string(object).expect("YAML");
        let folder = folder(&[("around".to_owned(), around.to_owned()), ("table".to_owned(), text)]);
        let (catalog, mut outcomes) = compile(previous, &folder.declared, OnRemoval::Retain);
        (catalog, outcomes.pop().expect("an outcome for the table").verdict)
    };
    let mut count = 0;
    for case in cases() {
        if case.objects.len() == 2 && (case.name.contains("-column-") || case.name.contains("-key-")) {
            let (catalog, verdict) = compiled(&Catalog::default(), &case.objects[0]);
            assert_eq!(verdict, Ok(()), "{}", case.name);
            let (_, verdict) = compiled(&catalog, &case.objects[1]);
            assert_eq!(verdict.is_err(), case.is_rejected(), "{}: {verdict:?}", case.name);
            count += 1;
        }
    }
    assert!(count >= 32, "only {count} files");
}

#[test]
fn every_rejected_file_has_an_accepted_twin() {
    let names: BTreeSet<String> = cases().into_iter().map(|case| case.name).collect();
    for name in names.iter().filter(|name| name.contains("reject-")) {
        assert!(names.contains(&name.replace("reject-", "accept-")), "{name}");
    }
}

#[test]
fn every_cel_rule_is_broken_by_a_file_of_its_kind() {
    let cases = cases();
    for (kind, schema) in schemas() {
        let mut messages = BTreeSet::new();
        collect_messages(&schema, &mut messages);
        assert!(!messages.is_empty(), "{kind}");
        for message in messages {
            let is_broken = |case: &&Case| case.kind() == kind && case.is_rejected() && case.header("by") == "cel";
            let found = cases.iter().filter(is_broken).any(|case| message.contains(case.header("expect")));
            assert!(found, "no file breaks the rule of {kind}: {message}");
        }
    }
}

fn collect_messages(schema: &Value, into: &mut BTreeSet<String>) {
    match schema {
        Value::Object(map) => {
            for rule in map.get("x-kubernetes-validations").and_then(Value::as_array).into_iter().flatten() {
                into.insert(rule["message"].as_str().expect("every rule has a message").to_owned());
            }
            map.values().for_each(|inner| collect_messages(inner, into));
        }
        Value::Array(items) => items.iter().for_each(|inner| collect_messages(inner, into)),
        _ => {}
    }
}

/// The API server refuses a definition whose rules could cost too much, which it judges by these limits.
#[test]
fn every_text_list_and_map_of_a_spec_has_a_maximum() {
    for (kind, schema) in schemas() {
        check_maximum(&schema["properties"]["spec"], &format!("{kind}.spec"));
    }
}

fn check_maximum(schema: &Value, at: &str) {
    let limit = match schema["type"].as_str() {
        Some("string") if schema["enum"].is_null() => "maxLength",
        Some("array") => "maxItems",
        Some("object") if !schema["additionalProperties"].is_null() => "maxProperties",
        Some("integer") => "maximum",
        _ => "type",
    };
    assert!(!schema[limit].is_null(), "{at} has no {limit}");
    for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
        check_maximum(inner, &format!("{at}.{name}"));
    }
    for member in ["items", "additionalProperties"] {
        if !schema[member].is_null() {
            check_maximum(&schema[member], &format!("{at}.{member}"));
        }
    }
}
