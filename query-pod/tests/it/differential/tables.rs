//! The tables of the test, and values for their columns.

use rand::Rng as _;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use serde_json::json;

use crate::{namespace, storage, table};

/// Where the rows of a user may lie; in the first unless something else is said of him.
pub const STORAGES: [&str; 3] = ["home", "eu", "us"];

/// A value as SQL and as a parameter has it, and as answers show it.
#[derive(Clone, Debug)]
pub struct Value {
    pub sql: String,
    pub json: String,
    pub shown: Option<String>,
}

pub struct Column {
    pub name: &'static str,
    ty: &'static str,
    pub is_key: bool,
    value: fn(&mut StdRng) -> Value,
}

pub struct Table {
    pub name: &'static str,
    pub columns: &'static [Column],
    /// Where SQLite has such types.
    pub sqlite: Option<InSqlite>,
    spec: &'static [&'static str],
}

/// A table of SQLite, too.
#[derive(Clone, Copy)]
pub struct InSqlite {
    pub columns: &'static str,
    /// A column of small numbers or NULL.
    pub number: &'static str,
    /// A column of short texts.
    pub text: &'static str,
}

const SELDOM: &str = "flushPolicy: {rows: 100000, interval: 24h}";
const MOVES: &str = "useUserStorage: true";
const FORGETS: &str = "deletedRetentionHours: 0";

const fn key(name: &'static str, ty: &'static str, value: fn(&mut StdRng) -> Value) -> Column {
    Column { name, ty, is_key: true, value }
}

const fn column(name: &'static str, ty: &'static str, value: fn(&mut StdRng) -> Value) -> Column {
    Column { name, ty, is_key: false, value }
}

pub static TABLES: [Table; 7] = [
    Table {
        name: "notes",
        columns: &[key("id", "BIGINT", id), column("num", "BIGINT", number), column("s", "TEXT", text)],
        sqlite: Some(InSqlite { columns: "id INTEGER PRIMARY KEY, num INTEGER, s TEXT", number: "num", text: "s" }),
        spec: &[SELDOM, MOVES, FORGETS],
    },
    Table {
        name: "pairs",
        columns: &[column("v", "BIGINT", number), key("a", "TEXT", word), key("b", "INT", digit)],
        sqlite: Some(InSqlite {
            columns: "v INTEGER, a TEXT NOT NULL, b INTEGER NOT NULL, PRIMARY KEY (a, b)",
            number: "v",
            text: "a",
        }),
        spec: &[SELDOM],
    },
    Table {
        name: "words",
        columns: &[key("w", "TEXT", word), column("num", "BIGINT", number)],
        sqlite: Some(InSqlite { columns: "w TEXT PRIMARY KEY NOT NULL, num INTEGER", number: "num", text: "w" }),
        // Flushed and compacted without being asked.
        spec: &["flushPolicy: {rows: 8, interval: 24h}"],
    },
    Table {
        name: "codes",
        columns: &[
            key("id", "UUID", uuid),
            column("big", "BIGINT", big),
            column("exact", "DECIMAL(38,10)", exact),
            column("real", "DOUBLE", double),
            column("flag", "BOOLEAN", flag),
            column("raw", "BYTES", bytes),
        ],
        sqlite: None,
        spec: &[SELDOM, MOVES, FORGETS],
    },
    Table {
        name: "moments",
        columns: &[
            column("day", "DATE", date),
            key("at", "TIMESTAMP", stamp),
            column("clock", "TIME", time),
            column("doc", "JSON", document),
            column("list", "ARRAY<BIGINT>", list),
        ],
        sqlite: None,
        spec: &[SELDOM, MOVES, "durability: objectStore"],
    },
    Table {
        name: "amounts",
        columns: &[key("m", "DECIMAL(38,10)", amount), column("t", "TEXT", wild), column("f", "FLOAT", float)],
        sqlite: None,
        spec: &["flushPolicy: {rows: 20, interval: 24h}"],
    },
    Table {
        name: "ledger",
        columns: &[
            key("at", "TIMESTAMP", opening),
            key("kind", "TEXT", kind),
            column("big", "BIGINT", big),
            key("m", "DECIMAL(38,10)", rate),
            key("flag", "BOOLEAN", truth),
        ],
        sqlite: None,
        spec: &[SELDOM, MOVES],
    },
];

impl Table {
    /// Whether the rows of a user lie in his storage.
    pub fn moves(&self) -> bool {
        self.spec.contains(&MOVES)
    }

    pub fn row(&self, rng: &mut StdRng) -> Vec<Value> {
        self.columns.iter().map(|column| (column.value)(rng)).collect()
    }

    /// A value for column `at`.
    pub fn value(&self, rng: &mut StdRng, at: usize) -> Value {
        (self.columns[at].value)(rng)
    }

    pub fn key(&self) -> impl Iterator<Item = &'static Column> + use<> {
        self.columns.iter().filter(|column| column.is_key)
    }

    /// `a, b`
    pub fn key_names(&self) -> String {
        self.key().map(|column| column.name).collect::<Vec<_>>().join(", ")
    }

    pub fn a_key(&self, rng: &mut StdRng) -> Vec<Value> {
        self.key().map(|column| (column.value)(rng)).collect()
    }

    /// The key of a row, which has no NULL.
    pub fn key_of(&self, row: &[Option<String>]) -> Vec<String> {
        let cells = self.columns.iter().zip(row).filter(|(column, _)| column.is_key);
        cells.map(|(_, cell)| cell.clone().unwrap()).collect()
    }
}

/// The manifests of all of it.
pub fn manifests() -> String {
    let storages: String = STORAGES.iter().map(|name| storage(name, &format!("/{name}"))).collect();
    let declared = TABLES.iter().map(|of| {
        let ty = |column: &Column| {
            let key = if column.is_key { ", primaryKey: true" } else { "" };
            format!("{}, type: \"{}\"{key}", column.name, column.ty)
        };
        let columns: Vec<String> = of.columns.iter().map(ty).collect();
        let columns: Vec<&str> = columns.iter().map(String::as_str).collect();
        table("UserTable", of.name, &columns, of.spec)
    });
    format!("{storages}{}{}", namespace(STORAGES[0]), declared.collect::<String>())
}

/// A number or a boolean.
fn bare(sql: &str, shown: &str) -> Value {
    Value { sql: sql.to_owned(), json: sql.to_owned(), shown: Some(shown.to_owned()) }
}

fn whole(number: i64) -> Value {
    let text = number.to_string();
    bare(&text, &text)
}

fn quoted(text: &str, shown: &str) -> Value {
    let sql = format!("'{}'", text.replace('\'', "''"));
    Value { sql, json: json!(text).to_string(), shown: Some(shown.to_owned()) }
}

/// What a parameter has as it is, and SQL in quotes.
fn structured(text: &str) -> Value {
    Value { json: text.to_owned(), ..quoted(text, text) }
}

/// Now and then NULL.
fn maybe(rng: &mut StdRng, value: Value) -> Value {
    match rng.random_range(0..6) {
        0 => Value { sql: "NULL".to_owned(), json: "null".to_owned(), shown: None },
        _ => value,
    }
}

fn one<T: Copy>(rng: &mut StdRng, of: &[T]) -> T {
    *of.choose(rng).unwrap()
}

fn id(rng: &mut StdRng) -> Value {
    match rng.random_range(0..40) {
        0 => whole(i64::MAX),
        1 => whole(i64::MIN),
        _ => whole(rng.random_range(-5..60)),
    }
}

fn number(rng: &mut StdRng) -> Value {
    let number = whole(rng.random_range(-9..10));
    maybe(rng, number)
}

fn digit(rng: &mut StdRng) -> Value {
    whole(rng.random_range(0..6))
}

fn word(rng: &mut StdRng) -> Value {
    let word = one(rng, &["", "a", "b", "A", "é", "e\u{301}", "zz", "it's", "%", "_", "🙂", "a b"]);
    quoted(word, word)
}

fn text(rng: &mut StdRng) -> Value {
    let word = word(rng);
    maybe(rng, word)
}

const WILD: [&str; 16] = [
    "a\0b",
    "",
    "a",
    "a ",
    "A",
    "é",
    "e\u{301}",
    "🙂",
    "it's",
    "\0",
    "NULL",
    "$1 -- ; \"q\"",
    "a\nb\tc\u{1}",
    "\\x00",
    "\u{feff}\u{2028}\u{10ffff}",
    "of some more bytes than the others, so that not all of the texts in a file are of about the same size",
];

fn wild(rng: &mut StdRng) -> Value {
    let text = one(rng, &WILD);
    maybe(rng, quoted(text, text))
}

fn kind(rng: &mut StdRng) -> Value {
    let text = one(rng, &WILD[..3]);
    quoted(text, text)
}

fn big(rng: &mut StdRng) -> Value {
    let any = rng.random();
    let number = one(rng, &[i64::MIN, i64::MIN + 1, -1, 0, 1, i64::MAX - 1, i64::MAX, any]);
    maybe(rng, whole(number))
}

/// One of some, in one of its spellings.
fn uuid(rng: &mut StdRng) -> Value {
    let number = match rng.random_range(0..32) {
        30 => 0x6f96_19ff_8b86_d011_b42d_00cf_4fc9_64ff,
        31 => u128::MAX,
        small => small,
    };
    let hex = format!("{number:032x}");
    let shown = [&hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]].join("-");
    let spelled = match rng.random_range(0..4) {
        0 => hex.to_uppercase(),
        1 => format!("{{{shown}}}"),
        _ => shown.clone(),
    };
    quoted(&spelled, &shown)
}

/// Texts with their microseconds since 1970.
const STAMPS: [(&str, &str); 10] = [
    ("-9223372036854775808", "-9223372036854775808"),
    ("9999-12-31 23:59:59.999999", "253402300799999999"),
    ("1970-01-01", "0"),
    ("9223372036854775807", "9223372036854775807"),
    ("0001-01-01", "-62135596800000000"),
    ("1969-12-31T23:59:59.999999Z", "-1"),
    ("-1", "-1"),
    ("1970-01-01T01:00:01.5+01:00", "1500000"),
    ("2024-02-29T12:00:00+02:00", "1709200800000000"),
    ("2024-02-29 10:00:00", "1709200800000000"),
];

fn stamp(rng: &mut StdRng) -> Value {
    match rng.random_range(0..30) {
        at @ 0..10 => quoted(STAMPS[at].0, STAMPS[at].1),
        second => {
            let micros = (second * 1_000_000).to_string();
            quoted(&micros, &micros)
        }
    }
}

fn opening(rng: &mut StdRng) -> Value {
    let (text, shown) = one(rng, &STAMPS[..3]);
    quoted(text, shown)
}

/// Numbers of `DECIMAL(38,10)`.
const EXACT: [(&str, &str); 8] = [
    ("9999999999999999999999999999.9999999999", "9999999999999999999999999999.9999999999"),
    ("-9999999999999999999999999999.9999999999", "-9999999999999999999999999999.9999999999"),
    ("0.5", "0.5000000000"),
    ("0.0000000001", "0.0000000001"),
    ("-0.0000000001", "-0.0000000001"),
    ("-0", "0.0000000000"),
    ("1.50", "1.5000000000"),
    ("1.5", "1.5000000000"),
];

/// For a key.
fn amount(rng: &mut StdRng) -> Value {
    match rng.random_range(0..40) {
        at @ 0..8 => bare(EXACT[at].0, EXACT[at].1),
        more => {
            let number = format!("-{more}.25");
            bare(&number, &format!("{number}00000000"))
        }
    }
}

fn exact(rng: &mut StdRng) -> Value {
    let amount = amount(rng);
    maybe(rng, amount)
}

fn rate(rng: &mut StdRng) -> Value {
    let (text, shown) = one(rng, &EXACT[..3]);
    bare(text, shown)
}

/// What the two types of floating point have in common.
fn floating(rng: &mut StdRng, finite: &[(&str, &str)]) -> Value {
    let value = match rng.random_range(0..8) {
        0 => {
            let text = one(rng, &["NaN", "Infinity", "-Infinity"]);
            quoted(text, text)
        }
        _ => {
            let (text, shown) = one(rng, finite);
            bare(text, shown)
        }
    };
    maybe(rng, value)
}

fn double(rng: &mut StdRng) -> Value {
    let finite = [
        ("0", "0.0"),
        ("-0.0", "-0.0"),
        ("-1", "-1.0"),
        ("0.1", "0.1"),
        ("123456.78901234567", "123456.78901234567"),
        ("5e-324", "5e-324"),
        ("1.7976931348623157e308", "1.7976931348623157e308"),
    ];
    floating(rng, &finite)
}

fn float(rng: &mut StdRng) -> Value {
    let finite = [("0", "0.0"), ("-0.0", "-0.0"), ("0.1", "0.1"), ("1e-45", "1e-45"), ("3.4028235e38", "3.4028235e38")];
    floating(rng, &finite)
}

fn truth(rng: &mut StdRng) -> Value {
    let text = one(rng, &["true", "false"]);
    bare(text, text)
}

fn flag(rng: &mut StdRng) -> Value {
    let truth = truth(rng);
    maybe(rng, truth)
}

fn bytes(rng: &mut StdRng) -> Value {
    let (text, shown) = one(rng, &[("", ""), ("\\x00ff", "AP8="), ("AP8=", "AP8="), ("\\x0a", "Cg==")]);
    maybe(rng, quoted(text, shown))
}

fn date(rng: &mut StdRng) -> Value {
    let dates =
        [("1969-12-31", "-1"), ("0001-01-01", "-719162"), ("9999-12-31", "2932896"), ("2147483647", "2147483647")];
    let (text, shown) = one(rng, &dates);
    maybe(rng, quoted(text, shown))
}

fn time(rng: &mut StdRng) -> Value {
    let (text, shown) = one(rng, &[("00:00", "0"), ("23:59:59.999999", "86399999999"), ("1", "1")]);
    maybe(rng, quoted(text, shown))
}

fn document(rng: &mut StdRng) -> Value {
    let documents = [
        "[]",
        "true",
        r#"{"b":1, "a":1.10 ,"a":[ ]}"#,
        r#"{"a":"it's \ud83d\ude42"}"#,
        "123456789012345678901234567890.10",
    ];
    let text = one(rng, &documents);
    maybe(rng, structured(text))
}

fn list(rng: &mut StdRng) -> Value {
    let text = one(rng, &["[]", "[null]", r#"["1",null]"#, r#"["-9223372036854775808",null,"9223372036854775807"]"#]);
    maybe(rng, structured(text))
}
