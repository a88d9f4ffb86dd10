//! The generated YAML is up to date, small, and reads back as what it was made from.

use std::path::PathBuf;

use kalamdb_crds::generate::manifests;
use kube::CustomResourceExt;
use kube::core::cel::{VapEvaluator, VapExpression};
use serde_json::{Value, json};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("manifests")
}

#[test]
fn the_files_are_what_the_types_say() {
    for (name, text) in manifests().expect("YAML") {
        let stored = std::fs::read_to_string(folder().join(name)).unwrap_or_default();
        assert!(stored == text, "{name} is stale: run `cargo run -p kalamdb-crds -- generate`");
    }
    let stored = std::fs::read_dir(folder()).expect("the folder is there").count();
    assert_eq!(stored, manifests().expect("YAML").len(), "a file is left over");
}

#[test]
fn each_file_is_small_enough_for_kubectl_apply() {
    for (name, text) in manifests().expect("YAML") {
        assert!(text.len() < 100_000, "{name} has {} bytes", text.len());
    }
}

#[test]
fn the_yaml_reads_back_as_the_definition() {
    let text = manifests().expect("YAML").into_iter().find(|(name, _)| *name == "usertables.yaml").expect("there").1;
    let read: Value = serde_saphyr::from_str(&text).expect("YAML");
    assert_eq!(read, serde_json::to_value(kalamdb_crds::UserTable::crd()).expect("JSON"));
}

#[test]
fn short_names_plurals_and_scope_never_change() {
    for (file, plural, short) in [
        ("kalamnamespaces.yaml", "kalamnamespaces", "kns"),
        ("kalamstorages.yaml", "kalamstorages", "kst"),
        ("replicanodes.yaml", "replicanodes", "krn"),
        ("usertables.yaml", "usertables", "kut"),
        ("sharedtables.yaml", "sharedtables", "ksh"),
    ] {
        let text = manifests().expect("YAML").into_iter().find(|(name, _)| *name == file).expect("there").1;
        let read: Value = serde_saphyr::from_str(&text).expect("YAML");
        assert_eq!(read["metadata"]["name"], format!("{plural}.kalamdb.org"));
        assert_eq!(read["spec"]["names"]["plural"], plural);
        assert_eq!(read["spec"]["names"]["shortNames"], json!([short]));
        assert_eq!(read["spec"]["names"]["categories"], json!(["kalamdb"]));
        assert_eq!(read["spec"]["scope"], "Namespaced");
        assert_eq!(read["spec"]["versions"][0]["name"], "v1alpha1");
        assert!(!read["spec"]["versions"][0]["subresources"]["status"].is_null());
    }
}

fn guard() -> Vec<Value> {
    let text =
        manifests().expect("YAML").into_iter().find(|(name, _)| *name == "deletion-guard.yaml").expect("there").1;
    serde_saphyr::from_multiple(&text).expect("YAML")
}

/// The guard's validation with its variables written out, for the evaluator that knows no variables; its exceptions for
/// the namespace and the annotation need a real API server.
fn is_deletable(old: &Value) -> bool {
    let guard = guard();
    let text = |pointer: &str| guard[0].pointer(pointer).and_then(Value::as_str).expect(pointer).to_owned();
    let dependents = format!("({})", text("/spec/variables/0/expression"));
    let total = format!("({})", text("/spec/variables/1/expression").replace("variables.dependents", &dependents));
    let expression = text("/spec/validations/0/expression").replace("variables.total", &total);
    let expression = expression.split("||").next().expect("a first part").to_owned();
    let evaluator = VapEvaluator::builder().old_object(old.clone()).build();
    let wanted = VapExpression { expression, message: None, message_expression: None };
    evaluator.evaluate(&[wanted]).iter().all(|result| result.passed)
}

#[test]
fn what_is_in_use_cannot_be_deleted() {
    let object = |status: Value| json!({"metadata": {"name": "local"}, "status": status});
    assert!(is_deletable(&json!({"metadata": {"name": "local"}})));
    assert!(is_deletable(&object(json!({}))));
    assert!(is_deletable(&object(json!({"usedBy": {"count": 0}}))));
    assert!(!is_deletable(&object(json!({"usedBy": {"count": 2, "sample": ["app.a", "app.b"]}}))));
    assert!(!is_deletable(&object(json!({"dependents": {"count": 1}}))));
}
