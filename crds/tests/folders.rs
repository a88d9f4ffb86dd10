//! Reading folders of manifests, the examples among them.

#![allow(clippy::panic)]

use std::path::PathBuf;

use kalamdb_crds::manifests::{Folder, folder};
use kalamdb_model::declared::{Kind, Spec};
use kalamdb_model::{Catalog, OnRemoval, compile};

fn files(texts: &[(&str, &str)]) -> Vec<(String, String)> {
    texts.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect()
}

fn problems(folder: &Folder) -> Vec<String> {
    folder.problems.iter().map(ToString::to_string).collect()
}

fn examples(names: &[&str]) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for name in names {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../examples").join(name);
        for entry in std::fs::read_dir(path).expect("the example is there") {
            let path = entry.expect("readable").path();
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            found.push((path.display().to_string(), std::fs::read_to_string(path).expect("readable")));
        }
    }
    found
}

#[test]
fn the_examples_compile_without_a_word() {
    for names in [&["quickstart"][..], &["s3"], &["quickstart", "demo"], &["s3", "demo-s3"]] {
        let folder = folder(&examples(names));
        assert_eq!(problems(&folder), Vec::<String>::new(), "{names:?}");
        assert!(!folder.incomplete);
        let (catalog, outcomes) = compile(&Catalog::default(), &folder.declared, OnRemoval::Retain);
        for outcome in &outcomes {
            assert_eq!(outcome.verdict, Ok(()), "{names:?}: {}", outcome.object.name);
            assert!(outcome.warnings.is_empty(), "{names:?}: {:?}", outcome.warnings);
        }
        assert_eq!(outcomes.len(), folder.declared.len());
        assert_eq!(catalog.tables.len(), names.len());
    }
}

const GOOD: &str = "\
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.messages}
spec:
  namespaceRef: app
  tableName: messages
  columns:
    - {name: id, type: BIGINT, primaryKey: true, default: SNOWFLAKE_ID()}
    - {name: body, type: TEXT, nullable: false}
";

#[test]
fn an_object_of_a_folder_has_a_stable_identity() {
    let first = &folder(&files(&[("a.yaml", GOOD)])).declared[0];
    let again = &folder(&files(&[("b.yaml", &format!("---\n{GOOD}\n"))])).declared[0];
    assert_eq!(first, again);
    assert_eq!(first.object.uid, "UserTable/app.messages");
    assert_eq!((first.object.generation, first.object.created), (1, 0));
    let changed = &folder(&files(&[("a.yaml", &GOOD.replace("body", "text"))])).declared[0];
    assert_ne!(first.object.resource_version, changed.object.resource_version);
}

#[test]
fn every_problem_names_file_line_and_field() {
    let text =
        format!("# a comment\n---\n{}", GOOD.replace("TEXT, nullable", "VARCHAR, nullabel").replace("BIGINT", "3"));
    let folder = folder(&files(&[("a.yaml", &text)]));
    let found = problems(&folder);
    assert_eq!(found.len(), 2, "{found:?}");
    assert_eq!(found[0], "a.yaml:10: spec.columns[0].type: must be a text; write it in quotes");
    assert!(found[1].starts_with("a.yaml:11: spec.columns[1].nullabel: unknown field `nullabel`"), "{found:?}");
    assert!(folder.declared[0].spec.is_err());
    assert!(!folder.incomplete);
}

#[test]
fn problems_of_meaning_and_of_shape_come_together() {
    let text = GOOD
        .replace("TEXT", "VARCHAR")
        .replace("tableName:", "surprise: 1\n  tableName:")
        .replace("metadata: {name: app.messages}", "metadata:\n  name: app.other");
    let found = problems(&folder(&files(&[("a.yaml", &text)])));
    assert_eq!(found.len(), 3, "{found:?}");
    assert!(found[0].starts_with("a.yaml:4: metadata.name: must be `app.messages`, got `app.other`"), "{found:?}");
    assert!(found[1].starts_with("a.yaml:7: spec.surprise: unknown field `surprise`"), "{found:?}");
    assert!(found[2].starts_with("a.yaml:11: spec.columns[1].type: unknown type `VARCHAR`"), "{found:?}");
}

#[test]
fn a_broken_document_keeps_its_object_and_its_neighbours() {
    let text = format!("{}---\n{}", GOOD.replace("columns:", "columns: ["), GOOD.replace("messages", "notes"));
    let folder = folder(&files(&[("a.yaml", &text)]));
    assert_eq!(folder.declared.len(), 2);
    assert_eq!(folder.declared[0].object.name, "app.messages");
    assert!(folder.declared[0].spec.is_err());
    assert!(folder.declared[1].spec.is_ok());
    assert!(!folder.incomplete);
    assert_eq!(folder.problems.len(), 1);
    assert!(problems(&folder)[0].contains("no valid YAML"), "{:?}", problems(&folder));
}

#[test]
fn a_document_of_nobody_makes_the_folder_incomplete() {
    for text in [
        "a: [",
        "kind: UserTable\n",
        "just text\n",
        "- a\n- b\n",
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n",
        "apiVersion: kalamdb.org/v1\nkind: Namespace\nmetadata: {name: x}\nspec: {}\n",
        "apiVersion: kalamdb.org/v1alpha1\nkind: UserTabel\nmetadata: {name: x}\n",
        "apiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {name: 3}\nspec: {}\n",
    ] {
        let folder = folder(&files(&[("a.yaml", text), ("b.yaml", GOOD)]));
        assert!(folder.incomplete, "{text}");
        assert_eq!(folder.declared.len(), 1, "{text}");
        assert_eq!(folder.problems.len(), 1, "{text}: {:?}", problems(&folder));
    }
}

#[test]
fn an_empty_folder_and_comments_are_no_problem() {
    let folder = folder(&files(&[("a.yaml", ""), ("b.yaml", "# nothing\n---\n\n---\n# more\n")]));
    assert!(folder.declared.is_empty() && folder.problems.is_empty() && !folder.incomplete);
}

#[test]
fn of_two_documents_for_one_object_neither_counts_and_both_are_named() {
    let folder = folder(&files(&[("b.yaml", GOOD), ("a.yaml", &format!("# first\n{GOOD}"))]));
    assert_eq!(folder.declared.len(), 1);
    assert!(folder.declared[0].spec.is_err());
    let found = problems(&folder);
    assert_eq!(found.len(), 1);
    assert!(found[0].starts_with("b.yaml:1: metadata.name: UserTable `app.messages` is also declared at a.yaml:2"));
}

#[test]
fn a_user_table_and_a_shared_table_of_one_name_are_two_objects_for_compile_to_judge() {
    let shared = GOOD.replace("UserTable", "SharedTable");
    let folder = folder(&files(&[("a.yaml", GOOD), ("b.yaml", &shared)]));
    let kinds: Vec<Kind> = folder.declared.iter().map(|declared| declared.object.kind).collect();
    assert_eq!(kinds, [Kind::UserTable, Kind::SharedTable]);
    assert!(folder.problems.is_empty());
}

#[test]
fn secrets_are_decoded_and_never_shown() {
    let text = "apiVersion: v1\nkind: Secret\nmetadata: {name: s3-credentials}\ndata: {accessKeyId: aHVudGVy}\n\
                stringData: {secretAccessKey: swordfish}\n";
    let read = folder(&files(&[("a.yaml", text)]));
    assert!(read.problems.is_empty() && !read.incomplete, "{:?}", problems(&read));
    let secret = &read.secrets["s3-credentials"];
    assert_eq!(secret.values["accessKeyId"], "hunter");
    assert_eq!(secret.values["secretAccessKey"], "swordfish");
    let shown = format!("{read:?}");
    assert!(shown.contains("accessKeyId") && !shown.contains("hunter") && !shown.contains("swordfish"), "{shown}");

    let bad = folder(&files(&[("a.yaml", &text.replace("aHVudGVy", "sword-fish!"))]));
    assert!(bad.incomplete && bad.secrets.is_empty());
    assert!(problems(&bad)[0].starts_with("a.yaml:4: data: "), "{:?}", problems(&bad));
    assert!(!problems(&bad)[0].contains("sword"), "{:?}", problems(&bad));
    let twice = folder(&files(&[("a.yaml", text), ("b.yaml", text)]));
    assert!(twice.incomplete && twice.secrets.is_empty());
    assert!(problems(&twice)[0].contains("a.yaml:1"), "{:?}", problems(&twice));
}

#[test]
fn what_compiling_says_gets_its_line() {
    let folder = folder(&files(&[("a.yaml", GOOD)]));
    let (_, outcomes) = compile(&Catalog::default(), &folder.declared, OnRemoval::Retain);
    let refusal = outcomes[0].verdict.as_ref().expect_err("there is no namespace");
    let problem = folder.problem(&outcomes[0].object, &refusal.message).expect("the object is there").to_string();
    assert!(problem.starts_with("a.yaml:5: spec.namespaceRef: namespace `app` does not exist"), "{problem}");
}

#[test]
fn an_object_as_kubectl_prints_it_is_a_manifest() {
    let text = GOOD.replace(
        "metadata: {name: app.messages}",
        "metadata: {name: app.messages, namespace: prod, uid: x, generation: 4, resourceVersion: \"7\", \
         creationTimestamp: \"2026-01-01T00:00:00Z\", labels: {a: b}, managedFields: [{manager: x}]}",
    ) + "status: {observedGeneration: 4}\n";
    let folder = folder(&files(&[("a.yaml", &text)]));
    assert_eq!(problems(&folder), Vec::<String>::new());
    assert_eq!(folder.declared[0].object.uid, "UserTable/app.messages");
}

#[test]
fn columns_are_nullable_unless_they_say_otherwise_and_keys_never_are() {
    let text = GOOD.to_owned() + "    - {name: price, type: \"DECIMAL(18,4)\"}\n";
    let declared = folder(&files(&[("a.yaml", &text)])).declared.remove(0);
    let Ok(Spec::Table(table)) = declared.spec else { panic!("{declared:?}") };
    let nullable: Vec<bool> = table.columns.iter().map(|column| column.nullable).collect();
    assert_eq!(nullable, [false, false, true]);
}

#[test]
fn junk_never_panics_and_reports_a_bounded_number_of_problems() {
    let many: String = (0..2_000).map(|n| format!("  field{n}: 1\n")).collect();
    let text = format!("apiVersion: kalamdb.org/v1alpha1\nkind: Namespace\nmetadata: {{name: app}}\nspec:\n{many}");
    assert!(folder(&files(&[("a.yaml", &text)])).problems.len() <= 100);
    for text in
        ["\u{0}", "\u{feff}a: 1", "---", "--- ---", "&a *a", "{", "? :", "kind: UserTable\nmetadata:\nspec:\n\t"]
    {
        let _ = folder(&files(&[("a.yaml", text)]));
    }
}
