//! Reads a folder of manifests for standalone mode: the same YAML that Kubernetes would take.
//!
//! Owns: what a file says, and every problem with its file, line and field.
//! Does not own: reading the disk and watching it; `kalamdb_model::compile` decides what becomes of the objects.
//!
//! A broken document never takes a good object away: if its kind and name can still be read, the object is handed on
//! with its problems, so that compiling keeps its last good entry; else the folder is marked incomplete, and the caller
//! keeps everything that was served before.

use std::collections::BTreeMap;
use std::fmt;

use k8s_openapi::api::core::v1::Secret;
use kalamdb_model::declared::{Declared, Kind, ObjectRef};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::convert::Declare;
use crate::yaml::{Document, Node, SyntaxError};
use crate::{API_VERSION, Namespace, ReplicaNode, SharedTable, Storage, UserTable, schema, yaml};

const KINDS: [Kind; 5] = [Kind::Storage, Kind::Namespace, Kind::ReplicaNode, Kind::UserTable, Kind::SharedTable];

/// What is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Name of the file.
    pub file: String,
    /// Line, from 1.
    pub line: u32,
    /// The field, as in `spec.columns[1].type`; empty if the whole document is meant.
    pub field: String,
    /// What is wrong, for people.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.file, self.line)?;
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}

/// A Secret of the folder. `Debug` shows the names of the values only.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretManifest {
    /// `metadata.name`.
    pub name: String,
    /// `data`, decoded, and `stringData`, which goes first.
    pub values: BTreeMap<String, String>,
}

impl fmt::Debug for SecretManifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretManifest")
            .field("name", &self.name)
            .field("values", &self.values.keys().collect::<Vec<_>>())
            .finish()
    }
}

/// One document of a file.
#[derive(Debug)]
pub enum Parsed {
    /// An object, good or with problems.
    Object(Box<Object>),
    /// A secret and the line where it begins.
    Secret(SecretManifest, u32),
    /// A document that cannot be assigned to an object.
    Unreadable(Vec<Problem>),
}

/// An object of the folder.
#[derive(Debug)]
pub struct Object {
    /// What it declares.
    pub declared: Declared,
    /// Its file.
    pub file: String,
    /// The line where it begins.
    pub line: u32,
    /// The same problems as in `declared`, with their lines.
    pub problems: Vec<Problem>,
    tree: Option<Node>,
}

impl Object {
    /// Finds the line of the field that `message` begins with, as in `spec.storageRef: storage does not exist`.
    #[must_use]
    pub fn problem(&self, message: &str) -> Problem {
        let (field, text) = split_field(message);
        let line = self.tree.as_ref().map_or(self.line, |tree| line_of(tree, field, self.line));
        Problem { file: self.file.clone(), line, field: field.to_owned(), message: text.to_owned() }
    }
}

/// Everything that a folder says.
#[derive(Debug, Default)]
pub struct Folder {
    /// All objects, sorted by kind and name; those with problems too.
    pub declared: Vec<Declared>,
    /// Secrets by name.
    pub secrets: BTreeMap<String, SecretManifest>,
    /// All problems, sorted by file and line.
    pub problems: Vec<Problem>,
    /// Whether a document could not be assigned to an object: what is missing here may only be misspelt, so the caller
    /// keeps serving what it served.
    pub incomplete: bool,
    objects: BTreeMap<(Kind, String), Object>,
}

impl Folder {
    /// What compiling says about `object`, with the file and line of the field that it names; `None` for an object that
    /// is not in the folder.
    #[must_use]
    pub fn problem(&self, object: &ObjectRef, message: &str) -> Option<Problem> {
        Some(self.objects.get(&(object.kind, object.name.clone()))?.problem(message))
    }
}

/// Reads all files of a folder, given as names and texts.
#[must_use]
pub fn folder(files: &[(String, String)]) -> Folder {
    let mut folder = Folder::default();
    let mut secret_places = BTreeMap::new();
    let mut sorted: Vec<&(String, String)> = files.iter().collect();
    sorted.sort();
    for (name, text) in sorted {
        for parsed in parse(name, text) {
            match parsed {
                Parsed::Object(object) => add_object(&mut folder, *object),
                Parsed::Secret(secret, line) => add_secret(&mut folder, &mut secret_places, secret, name, line),
                Parsed::Unreadable(problems) => {
                    folder.incomplete = true;
                    folder.problems.extend(problems);
                }
            }
        }
    }
    for object in folder.objects.values() {
        folder.problems.extend(object.problems.iter().cloned());
        folder.declared.push(object.declared.clone());
    }
    folder.problems.sort();
    folder
}

/// Of two documents for one object neither counts: which one was meant, nobody can tell.
fn add_object(folder: &mut Folder, object: Object) {
    let key = (object.declared.object.kind, object.declared.object.name.clone());
    let Some(first) = folder.objects.get_mut(&key) else {
        folder.objects.insert(key, object);
        return;
    };
    let (kind, name) = (key.0.as_str(), &key.1);
    let message = format!("{kind} `{name}` is also declared at {}:{}; keep one of them", first.file, first.line);
    let problem =
        Problem { file: object.file, line: object.line, field: "metadata.name".to_owned(), message: message.clone() };
    first.problems.extend(object.problems);
    first.problems.push(problem);
    let mut reasons = first.declared.spec.as_ref().err().cloned().unwrap_or_default();
    reasons.push(format!("metadata.name: {message}"));
    first.declared.spec = Err(reasons);
}

fn add_secret(
    folder: &mut Folder,
    places: &mut BTreeMap<String, (String, u32)>,
    secret: SecretManifest,
    file: &str,
    line: u32,
) {
    if let Some((first_file, first_line)) = places.get(&secret.name) {
        let message =
            format!("Secret `{}` is also declared at {first_file}:{first_line}; keep one of them", secret.name);
        folder.problems.push(Problem { file: file.to_owned(), line, field: "metadata.name".to_owned(), message });
        folder.incomplete = true;
        folder.secrets.remove(&secret.name);
        return;
    }
    places.insert(secret.name.clone(), (file.to_owned(), line));
    folder.secrets.insert(secret.name.clone(), secret);
}

/// Reads all documents of one file.
#[must_use]
pub fn parse(file_name: &str, text: &str) -> Vec<Parsed> {
    yaml::documents(text).iter().map(|document| parse_document(file_name, document)).collect()
}

fn parse_document(file: &str, document: &Document<'_>) -> Parsed {
    match document.parse() {
        Ok(tree) => parse_tree(file, document, tree),
        Err(error) => parse_broken(file, document, &error),
    }
}

fn parse_tree(file: &str, document: &Document<'_>, tree: Node) -> Parsed {
    let first = document.first_line();
    let unreadable = |field: &str, message: String| {
        let line = line_of(&tree, field, first);
        Parsed::Unreadable(vec![Problem { file: file.to_owned(), line, field: field.to_owned(), message }])
    };
    let Some(kind) = tree.get("kind").and_then(Node::as_str) else {
        return unreadable("kind", "missing; every document needs apiVersion, kind and metadata.name".to_owned());
    };
    let name = tree.get("metadata").and_then(|metadata| metadata.get("name")).and_then(Node::as_str);
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return unreadable("metadata.name", "missing".to_owned());
    };
    let api_version = tree.get("apiVersion").and_then(Node::as_str).unwrap_or_default();
    match (kind, api_version) {
        ("Secret", "v1") => match secret(&tree, name) {
            Ok(secret) => Parsed::Secret(secret, first),
            Err((field, message)) => unreadable(&field, message),
        },
        _ => match KINDS.into_iter().find(|known| known.as_str() == kind) {
            Some(known) if api_version == API_VERSION => object(file, document, known, name.to_owned(), tree),
            Some(_) => unreadable("apiVersion", format!("must be `{API_VERSION}`, got `{api_version}`")),
            None => {
                let known = KINDS.map(Kind::as_str).join("`, `");
                unreadable("kind", format!("unknown kind `{kind}`; there are `{known}` and `Secret` of apiVersion v1"))
            }
        },
    }
}

fn object(file: &str, document: &Document<'_>, kind: Kind, name: String, tree: Node) -> Parsed {
    let reference = reference(kind, &name, document.text);
    let findings = schema::check(kind, &tree);
    let mut declared = match kind {
        Kind::Storage => declare::<Storage>(&tree, &reference),
        Kind::Namespace => declare::<Namespace>(&tree, &reference),
        Kind::ReplicaNode => declare::<ReplicaNode>(&tree, &reference),
        Kind::UserTable => declare::<UserTable>(&tree, &reference),
        Kind::SharedTable => declare::<SharedTable>(&tree, &reference),
    };
    declared.spec = with_findings(declared.spec, findings);
    let line = document.first_line();
    let mut object = Object { declared, file: file.to_owned(), line, problems: Vec::new(), tree: Some(tree) };
    let messages = object.declared.spec.as_ref().err().cloned().unwrap_or_default();
    object.problems = messages.iter().map(|message| object.problem(message)).collect();
    object.problems.sort();
    Parsed::Object(Box::new(object))
}

/// The object that `tree` is; an empty list of problems means that it has not the shape of its kind, of which
/// [`schema::check`] knows more than the decoder.
fn declare<T: Declare + DeserializeOwned>(tree: &Node, reference: &ObjectRef) -> Declared {
    let mut json = tree.to_json();
    if let Some(map) = json.as_object_mut() {
        map.remove("status");
        map.insert("metadata".to_owned(), serde_json::json!({"name": reference.name}));
    }
    let object = reference.clone();
    match serde_json::from_value::<T>(without_nulls(json)) {
        Ok(resource) => Declared { object, ..resource.declare() },
        Err(_) => Declared { object, deleting: false, spec: Err(Vec::new()) },
    }
}

/// An explicit null is a field left out, as the API server has it.
fn without_nulls(value: Value) -> Value {
    match value {
        Value::Object(map) => map
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(key, value)| (key, without_nulls(value)))
            .collect(),
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        other => other,
    }
}

/// Adds the findings about fields of which the conversion did not say something better already.
fn with_findings<T>(spec: Result<T, Vec<String>>, findings: Vec<schema::Finding>) -> Result<T, Vec<String>> {
    let (value, mut messages) = match spec {
        Ok(value) => (Some(value), Vec::new()),
        Err(messages) => (None, messages),
    };
    for (field, message) in findings {
        if !messages.iter().any(|known| split_field(known).0 == field) {
            messages.push(format!("{field}: {message}"));
        }
    }
    match value {
        Some(value) if messages.is_empty() => Ok(value),
        _ if messages.is_empty() => Err(vec!["spec: cannot be read".to_owned()]),
        _ => Err(messages),
    }
}

/// A document that is no YAML may still say which object it would be.
fn parse_broken(file: &str, document: &Document<'_>, error: &SyntaxError) -> Parsed {
    let problem = Problem {
        file: file.to_owned(),
        line: error.line,
        field: String::new(),
        message: format!("no valid YAML: {}", error.message),
    };
    let Some((kind, name)) = identity(document.text) else { return Parsed::Unreadable(vec![problem]) };
    let object = reference(kind, &name, document.text);
    let declared = Declared { object, deleting: false, spec: Err(vec![problem.message.clone()]) };
    let line = document.first_line();
    Parsed::Object(Box::new(Object { declared, file: file.to_owned(), line, problems: vec![problem], tree: None }))
}

/// Kind and name by their usual lines: `kind: X` at the margin, and `metadata: {name: x}` or `name: x` right below
/// `metadata:`. Anything less usual is nobody's: a label `name` must not be taken for the object's.
fn identity(text: &str) -> Option<(Kind, String)> {
    let mut kind = None;
    let mut name = None;
    let mut indent = None;
    let mut in_metadata = false;
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.trim_start().starts_with('#')) {
        let depth = line.len() - line.trim_start().len();
        if depth == 0 {
            in_metadata = line.trim_end() == "metadata:";
            if let Some(value) = line.strip_prefix("kind:") {
                kind = KINDS.into_iter().find(|known| known.as_str() == plain(value));
            }
            name = name.or_else(|| line.strip_prefix("metadata: {name:").map(plain));
        } else if in_metadata && *indent.get_or_insert(depth) == depth {
            name = name.or_else(|| line.trim_start().strip_prefix("name:").map(plain));
        }
    }
    Some((kind?, name.filter(|name| is_object_name(name))?))
}

fn plain(value: &str) -> String {
    let end = value.find([',', '}', '#']).unwrap_or(value.len());
    value[..end].trim().trim_matches(['"', '\'']).to_owned()
}

fn is_object_name(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.'))
}

fn secret(tree: &Node, name: &str) -> Result<SecretManifest, schema::Finding> {
    const KNOWN: [&str; 7] = ["apiVersion", "kind", "metadata", "data", "stringData", "type", "immutable"];
    let json = without_nulls(tree.to_json());
    if let Some(key) = json.as_object().and_then(|map| map.keys().find(|key| !KNOWN.contains(&key.as_str()))) {
        return Err((key.clone(), format!("unknown field `{key}`; there are `data` and `stringData`")));
    }
    for member in ["data", "stringData"] {
        for (key, value) in json.get(member).and_then(Value::as_object).into_iter().flatten() {
            if !value.is_string() {
                return Err((format!("{member}.{key}"), "must be a text; write it in quotes".to_owned()));
            }
        }
    }
    // The decoder's own message would repeat what it could not decode.
    let decoded: Secret = serde_json::from_value(serde_json::json!({
        "apiVersion": "v1", "kind": "Secret",
        "data": json.get("data"), "stringData": json.get("stringData"),
    }))
    .map_err(|_| {
        ("data".to_owned(), "must be a map of names to base64; plain text goes into `stringData`".to_owned())
    })?;
    let mut values = BTreeMap::new();
    for (key, bytes) in decoded.data.unwrap_or_default() {
        let text = String::from_utf8(bytes.0).map_err(|_| (format!("data.{key}"), "must be UTF-8".to_owned()))?;
        values.insert(key, text);
    }
    values.extend(decoded.string_data.unwrap_or_default());
    Ok(SecretManifest { name: name.to_owned(), values })
}

fn reference(kind: Kind, name: &str, text: &str) -> ObjectRef {
    ObjectRef {
        kind,
        name: name.to_owned(),
        uid: format!("{}/{name}", kind.as_str()),
        resource_version: format!("{:016x}", fnv1a(text.trim().as_bytes())),
        generation: 1,
        created: 0,
    }
}

/// FNV-1a: the same on every machine and in every version, which the standard library's hasher does not promise.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// `spec.columns[2].type: unknown type` in its two parts; a message that names no field has an empty one.
fn split_field(message: &str) -> (&str, &str) {
    match message.split_once(": ") {
        Some((field, text)) if !field.contains(' ') && !field.contains('`') => (field, text),
        _ => ("", message),
    }
}

/// The line of `field`, or of the document where nothing of the field is there.
fn line_of(tree: &Node, field: &str, document: u32) -> u32 {
    let top = field.split(['.', '[']).next().unwrap_or_default();
    if tree.get(top).is_some() { tree.line_of(field) } else { document }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_object_of_broken_yaml_is_found_by_its_usual_lines_only() {
        let found = |text: &str| identity(text).map(|(kind, name)| (kind.as_str(), name));
        let messages = Some(("UserTable", "app.messages".to_owned()));
        assert_eq!(found("kind: UserTable\nmetadata: {name: app.messages}\nspec: ["), messages);
        assert_eq!(
            found("kind: UserTable # a\nmetadata:\n  name: \"app.messages\"\n  labels:\n    name: x\n"),
            messages
        );
        let labels = "kind: UserTable\nmetadata:\n  labels:\n    name: x\n    a/name: y\n  name: app.messages\nspec: [";
        assert_eq!(found(labels), messages);
        for nobody in [
            "kind: UserTable\nmetadata: {labels: {name: x}, name: app.messages}\nspec: [",
            "kind: UserTable\nspec:\n  name: x\n",
            "kind: Deployment\nmetadata: {name: x}\n",
            "  kind: UserTable\nmetadata: {name: x}\n",
            "kind: UserTable\nmetadata: {name: 'X y'}\n",
        ] {
            assert_eq!(found(nobody), None, "{nobody}");
        }
    }
}
