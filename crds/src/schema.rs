//! Checks a manifest against the schema of its kind, as the API server would: unknown and missing fields, types, sizes.
//!
//! Owns: what a structural schema says, patterns and CEL excepted; [`crate::convert`] checks those in Rust.
//! The schemas are the generated ones, so that a new field or limit holds in standalone mode without a second list.

use std::sync::LazyLock;

use kalamdb_model::declared::Kind;
use kube::CustomResourceExt;
use serde_json::Value;

use crate::yaml::{Content, Node};
use crate::{Namespace, ReplicaNode, SharedTable, Storage, UserTable};

/// Fields of `metadata` that are taken, some without effect: an object as `kubectl get -o yaml` prints it is a manifest.
const METADATA: [&str; 15] = [
    "name",
    "namespace",
    "labels",
    "annotations",
    "generateName",
    "finalizers",
    "ownerReferences",
    "uid",
    "resourceVersion",
    "generation",
    "creationTimestamp",
    "deletionTimestamp",
    "deletionGracePeriodSeconds",
    "managedFields",
    "selfLink",
];

/// Most problems that one document reports; a file of junk must not fill the log.
const PROBLEMS_MAX: usize = 50;

/// A field and what is wrong with it.
pub(crate) type Finding = (String, String);

/// The schema of `spec`.
fn spec_schema(kind: Kind) -> &'static Value {
    static SCHEMAS: LazyLock<[Value; 5]> = LazyLock::new(|| {
        [Namespace::crd(), Storage::crd(), ReplicaNode::crd(), UserTable::crd(), SharedTable::crd()].map(|crd| {
            let json = serde_json::to_value(crd).expect("a CRD is JSON");
            json.pointer("/spec/versions/0/schema/openAPIV3Schema/properties/spec").cloned().expect("a CRD has a spec")
        })
    });
    let index = match kind {
        Kind::Namespace => 0,
        Kind::Storage => 1,
        Kind::ReplicaNode => 2,
        Kind::UserTable => 3,
        Kind::SharedTable => 4,
    };
    &SCHEMAS[index]
}

/// All findings of a document of that kind, in the order of its lines as far as they have one.
pub(crate) fn check(kind: Kind, document: &Node) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Content::Map(entries) = &document.content {
        for (key, node) in entries {
            match key.as_str() {
                "apiVersion" | "kind" | "status" => {}
                "metadata" => check_metadata(node, &mut findings),
                "spec" => walk(spec_schema(kind), node, "spec", &mut findings),
                _ => findings.push((key.clone(), unknown(key, &["apiVersion", "kind", "metadata", "spec"]))),
            }
        }
    }
    if document.get("spec").is_none() {
        findings.push(("spec".to_owned(), "missing".to_owned()));
    }
    findings.truncate(PROBLEMS_MAX);
    findings
}

fn check_metadata(metadata: &Node, findings: &mut Vec<Finding>) {
    let Content::Map(entries) = &metadata.content else { return };
    for (key, node) in entries {
        if !METADATA.contains(&key.as_str()) {
            findings.push((format!("metadata.{key}"), unknown(key, &METADATA[..4])));
        }
        if matches!(key.as_str(), "labels" | "annotations") {
            let text =
                serde_json::json!({"type": "object", "nullable": true, "additionalProperties": {"type": "string"}});
            walk(&text, node, &format!("metadata.{key}"), findings);
        }
    }
}

fn unknown(key: &str, known: &[&str]) -> String {
    let similar = known.iter().find(|name| name.eq_ignore_ascii_case(key));
    match similar {
        Some(name) => format!("unknown field `{key}`; did you mean `{name}`?"),
        None => format!("unknown field `{key}`; there are `{}`", known.join("`, `")),
    }
}

fn walk(schema: &Value, node: &Node, path: &str, findings: &mut Vec<Finding>) {
    if findings.len() >= PROBLEMS_MAX {
        return;
    }
    let found = check_node(schema, &node.content);
    if let Some(message) = found {
        findings.push((path.to_owned(), message));
        return;
    }
    match &node.content {
        Content::Map(entries) => walk_map(schema, entries, path, findings),
        Content::List(items) => {
            for (index, item) in items.iter().enumerate() {
                walk(&schema["items"], item, &format!("{path}[{index}]"), findings);
            }
            check_repeats(schema, items, path, findings);
        }
        Content::Scalar(_) => {}
    }
}

fn walk_map(schema: &Value, entries: &[(String, Node)], path: &str, findings: &mut Vec<Finding>) {
    let properties = schema["properties"].as_object();
    for (key, node) in entries {
        let field = format!("{path}.{key}");
        match (properties.and_then(|all| all.get(key)), schema.get("additionalProperties")) {
            (Some(inner), _) => walk(inner, node, &field, findings),
            (None, Some(inner)) => walk(inner, node, &field, findings),
            (None, None) => {
                let known: Vec<&str> = properties.into_iter().flatten().map(|(name, _)| name.as_str()).collect();
                findings.push((field, unknown(key, &known)));
            }
        }
    }
    let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
    for name in required.filter(|name| !entries.iter().any(|(key, _)| key == name)) {
        findings.push((format!("{path}.{name}"), "missing".to_owned()));
    }
}

fn check_node(schema: &Value, content: &Content) -> Option<String> {
    let wanted = schema["type"].as_str().unwrap_or_default();
    match (wanted, content) {
        (_, Content::Scalar(Value::Null)) => {
            let nullable = schema["nullable"].as_bool().unwrap_or(false);
            (!nullable).then(|| format!("must not be empty; {}", article(wanted)))
        }
        ("object", Content::Map(entries)) => at_most(entries.len(), &schema["maxProperties"], "entries"),
        ("array", Content::List(items)) => {
            let few = schema["minItems"].as_u64().is_some_and(|min| (items.len() as u64) < min);
            if few { Some("must not be empty".to_owned()) } else { at_most(items.len(), &schema["maxItems"], "items") }
        }
        ("string", Content::Scalar(Value::String(text))) => check_text(schema, text),
        ("integer", Content::Scalar(Value::Number(number))) if number.is_i64() || number.is_u64() => {
            check_range(schema, number.as_f64()?)
        }
        ("number", Content::Scalar(Value::Number(number))) => check_range(schema, number.as_f64()?),
        ("boolean", Content::Scalar(Value::Bool(_))) => None,
        ("string", Content::Scalar(_)) => Some("must be a text; write it in quotes".to_owned()),
        _ => Some(article(wanted)),
    }
}

fn article(wanted: &str) -> String {
    let name = match wanted {
        "object" => "a map",
        "array" => "a list",
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        _ => "true or false",
    };
    format!("must be {name}")
}

fn at_most(count: usize, max: &Value, what: &str) -> Option<String> {
    let max = max.as_u64().filter(|max| count as u64 > *max)?;
    Some(format!("has at most {max} {what}, got {count}"))
}

fn check_text(schema: &Value, text: &str) -> Option<String> {
    if let Some(allowed) = schema["enum"].as_array() {
        let names: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        return (!names.contains(&text)).then(|| format!("must be one of `{}`, got `{text}`", names.join("`, `")));
    }
    let length = text.chars().count();
    if schema["minLength"].as_u64().is_some_and(|min| (length as u64) < min) {
        return Some(if length == 0 { "must not be empty".to_owned() } else { format!("`{text}` is too short") });
    }
    at_most(length, &schema["maxLength"], "characters")
}

fn check_range(schema: &Value, number: f64) -> Option<String> {
    let (min, max) = (schema["minimum"].as_f64(), schema["maximum"].as_f64());
    if min.is_none_or(|min| number >= min) && max.is_none_or(|max| number <= max) {
        return None;
    }
    Some(match (min, max) {
        (Some(min), Some(max)) => format!("must be {min} to {max}, got {number}"),
        (Some(min), None) => format!("must be at least {min}, got {number}"),
        (None, max) => format!("must be at most {}, got {number}", max.unwrap_or_default()),
    })
}

/// Items that a map list or a set has twice.
fn check_repeats(schema: &Value, items: &[Node], path: &str, findings: &mut Vec<Finding>) {
    let key = match schema["x-kubernetes-list-type"].as_str() {
        Some("map") => schema["x-kubernetes-list-map-keys"][0].as_str(),
        Some("set") => None,
        _ => return,
    };
    let name = |node: &Node| match key {
        Some(key) => node.get(key).map(Node::to_json),
        None => Some(node.to_json()),
    };
    let names: Vec<Option<Value>> = items.iter().map(name).collect();
    for (index, name) in names.iter().enumerate() {
        if let Some(text) = name.as_ref().and_then(Value::as_str)
            && names[..index].contains(name)
        {
            let field = key.map_or_else(String::new, |key| format!(".{key}"));
            findings.push((format!("{path}[{index}]{field}"), format!("`{text}` is there twice")));
        }
    }
}
