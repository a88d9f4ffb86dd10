//! Examples and properties of [`compile`].

use proptest::prelude::*;

use super::*;
use crate::declared::{Access, Durability, FlushPolicy};

fn object(kind: Kind, name: &str) -> ObjectRef {
    ObjectRef {
        kind,
        name: name.to_owned(),
        uid: format!("{}/{name}", kind.as_str()),
        resource_version: "1".to_owned(),
        generation: 1,
        created: 0,
    }
}

fn declared(kind: Kind, name: &str, spec: Spec) -> Declared {
    Declared { object: object(kind, name), deleting: false, spec: Ok(spec) }
}

fn storage(name: &str, path: &str) -> Declared {
    let spec = StorageSpec {
        sql_name: StorageName::new(name).expect("name"),
        display_name: None,
        root: StorageRoot::Filesystem { path: path.to_owned() },
        credentials_secret: None,
        shared_tables_template: "shared".to_owned(),
        user_tables_template: "users/{userId}".to_owned(),
    };
    declared(Kind::Storage, name, Spec::Storage(spec))
}

fn namespace(name: &str, storage: &str) -> Declared {
    let spec = NamespaceSpec {
        sql_name: SqlName::new(name).expect("name"),
        default_storage: Some(storage.to_owned()),
        options: BTreeMap::new(),
    };
    declared(Kind::Namespace, name, Spec::Namespace(spec))
}

fn column_spec(name: &str, ty: &str) -> ColumnSpec {
    ColumnSpec {
        name: SqlName::new(name).expect("name"),
        ty: ty.parse().expect("type"),
        nullable: true,
        primary_key: false,
        default: None,
    }
}

fn table_spec(table: &str, columns: Vec<ColumnSpec>) -> TableSpec {
    TableSpec {
        namespace_ref: "app".to_owned(),
        table_name: SqlName::new(table).expect("name"),
        columns,
        storage_ref: None,
        location: None,
        use_user_storage: false,
        flush_policy: FlushPolicy::default(),
        replication: None,
        deleted_retention_hours: None,
        durability: Durability::default(),
        deletion_policy: DeletionPolicy::default(),
        access: Access::default(),
    }
}

fn table_of(kind: Kind, spec: TableSpec) -> Declared {
    let name = format!("app.{}", spec.table_name.object_name());
    declared(kind, &name, Spec::Table(Box::new(spec)))
}

fn table(name: &str) -> Declared {
    table_of(Kind::UserTable, table_spec(name, vec![column_spec("body", "TEXT")]))
}

fn base() -> Vec<Declared> {
    vec![storage("local", "./files"), namespace("app", "local")]
}

fn with(more: impl IntoIterator<Item = Declared>) -> Vec<Declared> {
    base().into_iter().chain(more).collect()
}

fn run(previous: &Catalog, declared: &[Declared]) -> (Catalog, Vec<Outcome>) {
    compile(previous, declared, OnRemoval::Retain)
}

fn get<'a>(catalog: &'a Catalog, name: &str) -> Option<&'a TableEntry> {
    catalog.tables.get(&TableName::parse(name).expect("name"))
}

fn reason(outcomes: &[Outcome], name: &str) -> Option<Reason> {
    let outcome = outcomes.iter().find(|outcome| outcome.object.name == name).expect("an outcome for each object");
    outcome.verdict.as_ref().err().map(|refusal| refusal.reason)
}

#[test]
fn a_table_without_a_key_gets_an_id_column_first() {
    let (catalog, _) = run(&Catalog::default(), &with([table("t")]));
    let entry = get(&catalog, "app.t").expect("accepted");
    assert_eq!(entry.columns.iter().map(|c| c.name.as_str()).collect::<Vec<_>>(), ["id", "body"]);
    assert_eq!(entry.key, [entry.columns[0].id]);
    assert_eq!(entry.columns[0].default, Some(DefaultExpr::Call(DefaultCall::SnowflakeId)));
    assert_eq!(entry.location.template, "users/{userId}/app/t");
}

#[test]
fn a_changed_storage_path_leaves_existing_tables_where_they_are() {
    let (first, _) = run(&Catalog::default(), &with([table("old")]));
    let moved = vec![storage("local", "./elsewhere"), namespace("app", "local"), table("old"), table("new")];
    let (second, outcomes) = run(&first, &moved);
    let root = |name: &str| second.root(&get(&second, name).expect("table").location).expect("root").url();
    assert_eq!((root("app.old").as_str(), root("app.new").as_str()), ("file://./files", "file://./elsewhere"));
    assert_eq!(outcomes.iter().find(|o| o.object.name == "local").expect("storage").warnings.len(), 1);
}

#[test]
fn a_broken_table_keeps_its_last_good_entry() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let mut broken = table("t");
    broken.spec = Err(vec!["spec.columns[0].type: unknown".to_owned()]);
    let (second, outcomes) = run(&first, &with([broken]));
    assert_eq!(reason(&outcomes, "app.t"), Some(Reason::Invalid));
    assert_eq!(second, first);
}

#[test]
fn a_removed_table_is_retained_and_adopted_with_the_same_id_and_columns_only() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let (gone, _) = run(&first, &base());
    assert!(get(&gone, "app.t").is_none());
    let other = table_of(Kind::UserTable, table_spec("t", vec![column_spec("text", "TEXT")]));
    let (_, outcomes) = run(&gone, &with([other]));
    assert_eq!(reason(&outcomes, "app.t"), Some(Reason::IncompatibleChange));
    let (back, _) = run(&gone, &with([table("t")]));
    assert_eq!(get(&back, "app.t").expect("adopted").id, get(&first, "app.t").expect("first").id);
    assert!(back.retained.is_empty());
}

#[test]
fn ids_are_never_reused() {
    let mut spec = table_spec("t", vec![column_spec("body", "TEXT")]);
    spec.deletion_policy = DeletionPolicy::Delete;
    let doomed = table_of(Kind::UserTable, spec);
    let (first, _) = compile(&Catalog::default(), &with([doomed.clone()]), OnRemoval::FollowPolicy);
    let (gone, _) = compile(&first, &base(), OnRemoval::FollowPolicy);
    assert!(gone.retained.is_empty() && gone.tables.is_empty());
    let (again, _) = compile(&gone, &with([doomed]), OnRemoval::FollowPolicy);
    assert!(get(&again, "app.t").expect("new").id > get(&first, "app.t").expect("first").id);
}

#[test]
fn columns_grow_and_neither_shrink_nor_change() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let check = |columns: Vec<ColumnSpec>| {
        let (catalog, outcomes) = run(&first, &with([table_of(Kind::UserTable, table_spec("t", columns))]));
        (catalog, reason(&outcomes, "app.t"))
    };
    let body = || column_spec("body", "TEXT");
    assert_eq!(check(vec![column_spec("other", "TEXT")]).1, Some(Reason::IncompatibleChange));
    assert_eq!(check(vec![column_spec("body", "BIGINT")]).1, Some(Reason::IncompatibleChange));
    let strict = ColumnSpec { nullable: false, ..column_spec("n", "INT") };
    assert_eq!(check(vec![body(), strict]).1, Some(Reason::IncompatibleChange));
    let (grown, verdict) = check(vec![column_spec("n", "INT"), body()]);
    assert_eq!(verdict, None);
    let entry = get(&grown, "app.t").expect("grown");
    assert_eq!(entry.columns.iter().map(|c| c.id.0).collect::<Vec<_>>(), [1, 3, 2]);
    assert_eq!(entry.schema_version, 2);
}

#[test]
fn old_rows_keep_the_default_that_a_column_was_added_with() {
    let with_default = |text: &str| {
        let default = Some(DefaultExpr::parse(text, &ColumnType::Int).expect("default"));
        let columns = vec![column_spec("body", "TEXT"), ColumnSpec { default, ..column_spec("n", "INT") }];
        with([table_of(Kind::UserTable, table_spec("t", columns))])
    };
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let (added, _) = run(&first, &with_default("1"));
    let (changed, _) = run(&added, &with_default("2"));
    let column = get(&changed, "app.t").and_then(|entry| entry.columns.last()).expect("added");
    assert_eq!(column.default.as_ref().and_then(DefaultExpr::literal), Some(&crate::Value::Int(2)));
    assert_eq!(column.absent(), &crate::Value::Int(1));
}

#[test]
fn a_shared_table_inside_the_users_folder_is_refused() {
    let mut spec = table_spec("t2", vec![column_spec("body", "TEXT")]);
    spec.location = Some("file://./files/users/bob/app/t".to_owned());
    let (_, outcomes) = run(&Catalog::default(), &with([table("t"), table_of(Kind::SharedTable, spec)]));
    assert_eq!(reason(&outcomes, "app.t2"), Some(Reason::Conflict));
}

#[test]
fn of_two_tables_with_one_name_the_older_wins() {
    let user = table("t");
    let mut shared = table_of(Kind::SharedTable, table_spec("t", vec![column_spec("body", "TEXT")]));
    shared.object.created = -1;
    let (catalog, outcomes) = run(&Catalog::default(), &with([user.clone(), shared.clone()]));
    assert_eq!(outcomes.iter().filter(|o| o.verdict.is_err()).count(), 1);
    let (again, _) = run(&catalog, &with([shared, user]));
    assert_eq!(again, catalog);
}

#[test]
fn a_status_update_makes_no_new_version() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let mut touched = table("t");
    touched.object.resource_version = "2".to_owned();
    assert_eq!(run(&first, &with([touched])).0, first);
}

#[test]
fn a_storage_in_use_stays_when_its_declaration_goes() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let (second, outcomes) = run(&first, &[namespace("app", "local"), table("t")]);
    assert_eq!(second.storages, first.storages);
    assert!(get(&second, "app.t").is_some());
    assert_eq!(reason(&outcomes, "app"), Some(Reason::StorageNotFound));
}

#[test]
fn a_storage_keeps_its_name_and_type_and_with_them_its_last_good_entry() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let refused = |change: &dyn Fn(&mut StorageSpec)| {
        let mut changed = storage("local", "./files");
        let Ok(Spec::Storage(spec)) = &mut changed.spec else { panic!("a storage") };
        change(spec);
        let (second, outcomes) = run(&first, &[changed.clone(), namespace("app", "local"), table("t")]);
        assert_eq!((&second, reason(&outcomes, "local")), (&first, Some(Reason::IncompatibleChange)));
        // Another object under the name, as when it is deleted and created again, is another storage.
        changed.object.uid = "another".to_owned();
        let (_, outcomes) = run(&first, &[changed]);
        assert_eq!(reason(&outcomes, "local"), None);
    };
    refused(&|spec| spec.sql_name = StorageName::new("lo_cal").expect("name"));
    refused(&|spec| spec.root = StorageRoot::Gcs { bucket: "bucket".to_owned(), prefix: String::new() });
}

#[test]
fn of_two_storages_at_one_place_the_one_that_is_there_stays() {
    let check = |previous: &Catalog, first: &str, second: &str| {
        let declared = vec![storage("local", first), storage("other", second)];
        let (catalog, outcomes) = run(previous, &declared);
        assert_eq!(run(&catalog, &declared).0, catalog);
        (catalog, reason(&outcomes, "local"), reason(&outcomes, "other"))
    };
    let refused = Some(Reason::Conflict);
    let (one, ..) = check(&Catalog::default(), "./files", "files/");
    assert_eq!(one.storages.len(), 1);
    assert_eq!(check(&Catalog::default(), "./files", "files/").2, refused);
    let (apart, local, other) = check(&Catalog::default(), "./files", "/files");
    assert_eq!((local, other), (None, None));
    let (moved, local, other) = check(&apart, "/files", "/files");
    assert_eq!((&moved, local, other), (&apart, refused, None));
    // Where it was before, it may still have tables.
    let (elsewhere, ..) = check(&apart, "./new", "/files");
    assert_eq!(check(&elsewhere, "./new", "./files").2, refused);
}

#[test]
fn a_table_that_is_created_again_after_deletion_with_its_files_is_another_table() {
    let declared = |uid: &str, policy: DeletionPolicy| {
        let spec = TableSpec { deletion_policy: policy, ..table_spec("t", vec![column_spec("body", "TEXT")]) };
        let mut declared = table_of(Kind::UserTable, spec);
        declared.object.uid = uid.to_owned();
        with([declared])
    };
    let id = |catalog: &Catalog| get(catalog, "app.t").expect("accepted").id;
    for (policy, is_another) in [(DeletionPolicy::Delete, true), (DeletionPolicy::Retain, false)] {
        let compiled = |previous: &Catalog, objects: &[Declared]| compile(previous, objects, OnRemoval::FollowPolicy).0;
        let first = compiled(&Catalog::default(), &declared("one", policy));
        let at_once = compiled(&first, &declared("two", policy));
        let later = compiled(&compiled(&first, &base()), &declared("two", policy));
        for again in [at_once, later] {
            assert_eq!(id(&again) != id(&first), is_another, "{policy:?}");
            assert_eq!(again.next_table, id(&again).0 + 1, "{policy:?}");
        }
    }
}

#[test]
fn only_a_catalog_that_differs_waits_for_a_nonce() {
    let (first, _) = run(&Catalog::default(), &with([table("t")]));
    let stored = Catalog { nonce: "n".to_owned(), ..first };
    assert_eq!(run(&stored, &with([table("t")])).0, stored);
    let (next, _) = run(&stored, &with([table("u")]));
    assert_eq!((next.version, next.nonce.as_str()), (stored.version + 1, ""));
}

/// Objects of a small world in which names, storages and mistakes meet often.
fn any_object() -> impl Strategy<Value = Declared> {
    let types = prop::sample::select(vec!["TEXT", "BIGINT", "UUID"]);
    let columns = prop::collection::vec((prop::sample::select(vec!["a", "b", "id"]), types), 0..3);
    let table = (prop::sample::select(vec!["t", "u", "v_w"]), columns, any::<bool>(), 0..3_i64);
    prop_oneof![
        (prop::sample::select(vec!["local", "other"]), prop::sample::select(vec!["./a", "./b"]))
            .prop_map(|(name, path)| storage(name, path)),
        prop::sample::select(vec!["local", "other", "missing"]).prop_map(|default| namespace("app", default)),
        Just(namespace("system", "local")),
        table.prop_map(|(name, columns, user, created)| {
            let columns = columns.into_iter().map(|(name, ty)| column_spec(name, ty)).collect();
            let kind = if user { Kind::UserTable } else { Kind::SharedTable };
            let mut declared = table_of(kind, table_spec(name, columns));
            declared.object.created = created;
            declared
        }),
    ]
}

/// A set of objects: names are unique per kind, as the API server keeps them.
fn any_objects() -> impl Strategy<Value = Vec<Declared>> {
    prop::collection::vec(any_object(), 0..9).prop_map(|objects| {
        let mut unique: BTreeMap<(Kind, String), Declared> = BTreeMap::new();
        for object in objects {
            unique.insert((object.object.kind, object.object.name.clone()), object);
        }
        unique.into_values().collect()
    })
}

fn ids(catalog: &Catalog) -> BTreeMap<TableName, TableId> {
    catalog.tables.iter().chain(&catalog.retained).map(|(name, entry)| (name.clone(), entry.id)).collect()
}

proptest! {
    #[test]
    fn the_order_of_objects_does_not_matter(first in any_objects(), second in any_objects(), seed in any::<u64>()) {
        let (previous, _) = run(&Catalog::default(), &first);
        let mut shuffled = second.clone();
        shuffled.sort_by_key(|d| xxhash_rust::xxh3::xxh3_64_with_seed(d.object.uid.as_bytes(), seed));
        prop_assert_eq!(run(&previous, &second), run(&previous, &shuffled));
    }

    #[test]
    fn compiling_twice_changes_nothing(first in any_objects(), second in any_objects()) {
        let (previous, _) = run(&Catalog::default(), &first);
        let (once, _) = run(&previous, &second);
        let (twice, _) = run(&once, &second);
        prop_assert_eq!(once, twice);
    }

    #[test]
    fn ids_and_locations_stay_and_are_unique(states in prop::collection::vec(any_objects(), 1..5)) {
        let mut catalog = Catalog::default();
        for state in states {
            let (next, _) = run(&catalog, &state);
            let (before, after) = (ids(&catalog), ids(&next));
            for (name, id) in &before {
                prop_assert_eq!(after.get(name), Some(id), "{} lost its id", name);
            }
            let mut unique: Vec<_> = after.values().collect();
            unique.sort();
            unique.dedup();
            prop_assert_eq!(unique.len(), after.len());
            prop_assert!(after.values().all(|id| id.0 < next.next_table));
            for (name, entry) in catalog.tables.iter().chain(&catalog.retained) {
                let now = next.tables.get(name).or_else(|| next.retained.get(name)).expect("kept");
                prop_assert_eq!(&now.location, &entry.location);
            }
            catalog = next;
        }
    }

    #[test]
    fn a_bad_object_changes_nothing_for_good_ones(objects in any_objects(), at in any::<prop::sample::Index>()) {
        prop_assume!(!objects.is_empty());
        let (good, outcomes) = run(&Catalog::default(), &objects);
        let refused: Vec<_> = outcomes.iter().filter(|o| o.verdict.is_err()).map(|o| o.object.clone()).collect();
        prop_assume!(!refused.is_empty());
        let bad = &refused[at.index(refused.len())];
        let without: Vec<_> = objects.into_iter().filter(|d| d.object != *bad).collect();
        prop_assert_eq!(run(&Catalog::default(), &without).0, good);
    }

    #[test]
    fn a_catalog_reads_back_from_json(objects in any_objects()) {
        let (catalog, _) = run(&Catalog::default(), &objects);
        let json = serde_json::to_vec(&catalog).expect("json");
        prop_assert_eq!(serde_json::from_slice::<Catalog>(&json).expect("json"), catalog);
    }
}
