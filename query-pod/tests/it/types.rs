//! Every column type through literal, parameter, buffer, file and JSON without loss, as the table of encodings says.

use anyhow::ensure;
use kalamdb_test_support::pod::{Answer, Home, Pod};
use serde_json::json;

use super::{BINARY, declare, refusal, refused, returns, user_table};

/// Column, type, `data_type` in answers.
#[rustfmt::skip]
pub const COLUMNS: [(&str, &str, &str); 24] = [
    ("c_bool", "BOOLEAN", r#""Boolean""#), ("c_small", "SMALLINT", r#""SmallInt""#), ("c_int", "INT", r#""Int""#),
    ("c_big", "BIGINT", r#""BigInt""#), ("c_float", "FLOAT", r#""Float""#), ("c_double", "DOUBLE", r#""Double""#),
    ("c_whole", "DECIMAL(38,0)", r#"{"Decimal":{"precision":38,"scale":0}}"#),
    ("c_fine", "DECIMAL(38,38)", r#"{"Decimal":{"precision":38,"scale":38}}"#),
    ("c_money", "DECIMAL(18,4)", r#"{"Decimal":{"precision":18,"scale":4}}"#),
    ("c_text", "TEXT", r#""Text""#), ("c_bytes", "BYTES", r#""Bytes""#), ("c_json", "JSON", r#""Json""#),
    ("c_stamp", "TIMESTAMP", r#""Timestamp""#), ("c_date", "DATE", r#""Date""#), ("c_time", "TIME", r#""Time""#),
    ("c_uuid", "UUID", r#""Uuid""#), ("c_bigs", "ARRAY<BIGINT>", r#"{"Array":"BigInt"}"#),
    ("c_texts", "ARRAY<ARRAY<TEXT>>", r#"{"Array":{"Array":"Text"}}"#), ("c_doubles", "ARRAY<DOUBLE>", r#"{"Array":"Double"}"#),
    ("c_jsons", "ARRAY<JSON>", r#"{"Array":"Json"}"#), ("c_uuids", "ARRAY<UUID>", r#"{"Array":"Uuid"}"#),
    ("c_moneys", "ARRAY<DECIMAL(20,2)>", r#"{"Array":{"Decimal":{"precision":20,"scale":2}}}"#),
    ("c_stamps", "ARRAY<TIMESTAMP>", r#"{"Array":"Timestamp"}"#), ("c_bytess", "ARRAY<BYTES>", r#"{"Array":"Bytes"}"#),
];

/// Column, SQL literal, parameter as JSON, what answers hold: all three mean one value.
#[rustfmt::skip]
pub const VALUES: &[(&str, &str, &str, &str)] = &[
    ("c_bool", "true", "true", "true"), ("c_bool", "false", "false", "false"),
    ("c_small", "-32768", "-32768", "-32768"), ("c_small", "32767", r#""32767""#, "32767"), ("c_small", "'7'", "7.0", "7"),
    ("c_int", "-2147483648", "-2147483648", "-2147483648"), ("c_int", "2147483647", r#""2147483647""#, "2147483647"),
    ("c_big", "-9223372036854775808", "-9223372036854775808", r#""-9223372036854775808""#),
    ("c_big", "9223372036854775807", r#""9223372036854775807""#, r#""9223372036854775807""#), ("c_big", "0", "1e0", r#""0""#),
    ("c_float", "0.1", "0.1", "0.1"), ("c_float", "-0.0", "-0.0", "-0.0"), ("c_float", "1", "1", "1.0"),
    ("c_float", "'NaN'", r#""NaN""#, r#""NaN""#), ("c_float", "'Infinity'", r#""Infinity""#, r#""Infinity""#),
    ("c_float", "'-Infinity'", r#""-Infinity""#, r#""-Infinity""#), ("c_float", "1e-45", "1e-45", "1e-45"),
    ("c_float", "3.4028235e38", "3.4028235e38", "3.4028235e38"), ("c_float", "1.1754944e-38", "1.1754944e-38", "1.1754944e-38"),
    ("c_double", "0.1", "0.1", "0.1"), ("c_double", "-0.0", "-0.0", "-0.0"), ("c_double", "-1", r#""-1""#, "-1.0"),
    ("c_double", "'NaN'", r#""NaN""#, r#""NaN""#), ("c_double", "'Infinity'", r#""Infinity""#, r#""Infinity""#),
    ("c_double", "'-Infinity'", r#""-Infinity""#, r#""-Infinity""#), ("c_double", "5e-324", "5e-324", "5e-324"),
    ("c_double", "1.7976931348623157e308", "1.7976931348623157e308", "1.7976931348623157e308"),
    ("c_double", "2.2250738585072014e-308", "2.2250738585072014e-308", "2.2250738585072014e-308"),
    ("c_double", "123456.78901234567", "123456.78901234567", "123456.78901234567"),
    ("c_whole", "99999999999999999999999999999999999999", "99999999999999999999999999999999999999", r#""99999999999999999999999999999999999999""#),
    ("c_whole", "-99999999999999999999999999999999999999", r#""-99999999999999999999999999999999999999""#, r#""-99999999999999999999999999999999999999""#),
    ("c_fine", "0.99999999999999999999999999999999999999", "0.99999999999999999999999999999999999999", r#""0.99999999999999999999999999999999999999""#),
    ("c_fine", "-0.00000000000000000000000000000000000001", "-1e-38", r#""-0.00000000000000000000000000000000000001""#),
    ("c_money", "1.5", "1.50000", r#""1.5000""#), ("c_money", "-99999999999999.9999", r#""-99999999999999.9999""#, r#""-99999999999999.9999""#),
    ("c_money", "0", "0.0", r#""0.0000""#),
    ("c_text", "''", r#""""#, r#""""#), ("c_text", "'it''s \"q\" \\ back'", r#""it's \"q\" \\ back""#, r#""it's \"q\" \\ back""#),
    ("c_text", "'é e\u{301} 🙂 \u{2028}\u{feff}\u{10ffff}'", r#""é e\u0301 \ud83d\ude42 \u2028\ufeff\udbff\udfff""#, "\"é e\u{301} 🙂 \u{2028}\u{feff}\u{10ffff}\""),
    ("c_text", "'a\nb\tc\u{1}'", r#""a\nb\tc\u0001""#, r#""a\nb\tc\u0001""#), ("c_text", "'NULL'", r#""NULL""#, r#""NULL""#),
    ("c_bytes", "''", r#""""#, r#""""#), ("c_bytes", r"'\x00ff'", r#""AP8=""#, r#""AP8=""#), ("c_bytes", "X'0a'", r#""\\x0A""#, r#""Cg==""#),
    ("c_json", r#"'{"b":1, "a":1.10 ,"a":[ ]}'"#, r#"{"b":1, "a":1.10 ,"a":[ ]}"#, r#"{"b":1, "a":1.10 ,"a":[ ]}"#),
    ("c_json", "'123456789012345678901234567890.10'", "123456789012345678901234567890.10", "123456789012345678901234567890.10"),
    ("c_json", r#"'"t\u00e9xt"'"#, r#""t\u00e9xt""#, r#""t\u00e9xt""#), ("c_json", "'true'", "true", "true"), ("c_json", "'[]'", "[]", "[]"),
    ("c_json", r#"'{"a":"it''s \ud83d\ude42"}'"#, r#"{"a":"it's \ud83d\ude42"}"#, r#"{"a":"it's \ud83d\ude42"}"#),
    ("c_stamp", "'1969-12-31T23:59:59.999999Z'", "-1", "-1"), ("c_stamp", "'9999-12-31 23:59:59.999999'", r#""9999-12-31T23:59:59.999999Z""#, "253402300799999999"),
    ("c_stamp", "'2024-02-29T12:00:00+02:00'", r#""2024-02-29T10:00:00Z""#, "1709200800000000"), ("c_stamp", "'0001-01-01'", "-62135596800000000", "-62135596800000000"),
    ("c_stamp", "-9223372036854775808", "-9223372036854775808", "-9223372036854775808"), ("c_stamp", "9223372036854775807", "9223372036854775807", "9223372036854775807"),
    ("c_date", "'1969-12-31'", "-1", "-1"), ("c_date", "'9999-12-31'", r#""9999-12-31""#, "2932896"), ("c_date", "'0001-01-01'", r#""-719162""#, "-719162"),
    ("c_date", "2147483647", "2147483647", "2147483647"), ("c_date", "-2147483648", "-2147483648", "-2147483648"),
    ("c_time", "'00:00'", "0", "0"), ("c_time", "'23:59:59.999999'", r#""23:59:59.999999""#, "86399999999"), ("c_time", "1", "1", "1"),
    ("c_uuid", "'6F9619FF-8B86-D011-B42D-00CF4FC964FF'", r#""6f9619ff8b86d011b42d00cf4fc964ff""#, r#""6f9619ff-8b86-d011-b42d-00cf4fc964ff""#),
    ("c_uuid", "'00000000-0000-0000-0000-000000000000'", r#""00000000-0000-0000-0000-000000000000""#, r#""00000000-0000-0000-0000-000000000000""#),
    ("c_bigs", "'[]'", "[]", "[]"), ("c_bigs", "'[-9223372036854775808,null,\"1\"]'", r#"["-9223372036854775808",null,1]"#, r#"["-9223372036854775808",null,"1"]"#),
    ("c_bigs", "ARRAY[1, NULL, 1 + 1]", "[1,null,2]", r#"["1",null,"2"]"#), ("c_bigs", "'[null]'", "[null]", "[null]"),
    ("c_texts", r#"'[["a",null,""],null,[]]'"#, r#"[["a",null,""],null,[]]"#, r#"[["a",null,""],null,[]]"#),
    ("c_texts", "ARRAY[ARRAY['a', 'é'], ARRAY[NULL]]", r#"[["a","é"],[null]]"#, r#"[["a","é"],[null]]"#),
    ("c_doubles", r#"'["NaN",1.5,-0.0,"-Infinity",null,5e-324]'"#, r#"["NaN",1.5,-0.0,"-Infinity",null,5e-324]"#, r#"["NaN",1.5,-0.0,"-Infinity",null,5e-324]"#),
    ("c_jsons", r#"'[{"a":1.10},"x",null,[ 1]]'"#, r#"[{"a":1.10},"x",null,[ 1]]"#, r#"[{"a":1.10},"x",null,[ 1]]"#),
    ("c_uuids", "'[\"6F9619FF-8B86-D011-B42D-00CF4FC964FF\",null]'", r#"["6F9619FF-8B86-D011-B42D-00CF4FC964FF",null]"#, r#"["6f9619ff-8b86-d011-b42d-00cf4fc964ff",null]"#),
    ("c_moneys", "'[999999999999999999.99,\"-0.01\",null]'", r#"["999999999999999999.99",-0.01,null]"#, r#"["999999999999999999.99","-0.01",null]"#),
    ("c_stamps", "'[-1,\"1970-01-01T00:00:01Z\",null]'", r#"[-1,"1970-01-01T00:00:01Z",null]"#, "[-1,1000000,null]"),
    ("c_bytess", "'[\"\",\"AP8=\",null]'", r#"["","AP8=",null]"#, r#"["","AP8=",null]"#),
];

fn manifests() -> String {
    let columns: Vec<String> = COLUMNS.iter().map(|(name, ty, _)| format!("{name}, type: \"{ty}\"")).collect();
    let all: Vec<&str> =
        ["id, type: BIGINT, primaryKey: true"].into_iter().chain(columns.iter().map(String::as_str)).collect();
    declare(&[user_table("v", &all)])
}

/// Runs a statement with one parameter, which is sent as it is written here.
async fn with_raw(pod: &Pod, sql: &str, parameter: &str) -> anyhow::Result<Answer> {
    let authorization = format!("Bearer {}", pod.token("alice", "user")?);
    pod.send(Some(&authorization), format!(r#"{{"sql":{},"params":[{parameter}]}}"#, json!(sql))).await
}

/// All rows as text, from columns one by one: `column: [["id",value],…]`.
async fn everything(pod: &Pod) -> anyhow::Result<Vec<String>> {
    let mut all = Vec::new();
    for (name, _, data_type) in COLUMNS {
        let answer = pod
            .sql("alice", &format!("SELECT id, {name} FROM app.v WHERE {name} IS NOT NULL ORDER BY id"), json!([]))
            .await?;
        ensure!(answer.status == 200, "{name}: {}", answer.text);
        let described = format!(r#"{{"data_type":{data_type},"index":1,"name":"{name}"}}"#);
        ensure!(answer.text.contains(&described), "{name}: expected {described} in {}", answer.text);
        all.push(answer.results().to_owned());
    }
    let answer = pod.sql("alice", "SELECT * FROM app.v ORDER BY id", json!([])).await?;
    all.push(answer.results().to_owned());
    Ok(all)
}

#[tokio::test]
async fn every_value_comes_back_as_the_table_of_encodings_says() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &manifests())?;
    let mut pod = home.start().await?;
    for (at, (column, literal, parameter, _)) in VALUES.iter().enumerate() {
        let sql = format!("INSERT INTO app.v (id, {column}) VALUES ({}, {literal})", 2 * at);
        let answer = pod.sql("alice", &sql, json!([])).await?;
        ensure!(answer.status == 200, "{sql}: {}", answer.text);
        let sql = format!("INSERT INTO app.v (id, {column}) VALUES ({}, $1)", 2 * at + 1);
        let answer = with_raw(&pod, &sql, parameter).await?;
        ensure!(answer.status == 200, "{sql} with {parameter}: {}", answer.text);
    }
    pod.run("alice", "INSERT INTO app.v (id) VALUES (100000)", json!([])).await?;
    let buffered = everything(&pod).await?;
    for ((name, ..), found) in COLUMNS.iter().zip(&buffered) {
        let of_column = VALUES.iter().enumerate().filter(|(_, value)| value.0 == *name);
        let expected: Vec<String> = of_column
            // `1e0` is the one parameter that means another number than its literal, 0.
            .flat_map(|(at, value)| {
                let sent = if value.2 == "1e0" { r#""1""# } else { value.3 };
                [format!(r#"["{}",{}]"#, 2 * at, value.3), format!(r#"["{}",{sent}]"#, 2 * at + 1)]
            })
            .collect();
        let expected = format!(r#""rows":[{}],"#, expected.join(","));
        ensure!(found.contains(&expected), "{name}\n expected {expected}\n found    {found}");
    }
    let nulls = format!(r#"["100000"{}]"#, ",null".repeat(COLUMNS.len()));
    ensure!(buffered.last().is_some_and(|all| all.contains(&nulls)), "the row of NULLs");
    pod.run("alice", "STORAGE FLUSH TABLE app.v", json!([])).await?;
    ensure!(everything(&pod).await? == buffered, "the file holds something else than the buffer");
    pod.kill()?;
    let pod = home.start().await?;
    ensure!(everything(&pod).await? == buffered, "a restart changed something");
    Ok(())
}

#[tokio::test]
async fn every_value_is_found_by_itself_in_buffer_and_file() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &manifests())?;
    let pod = home.start().await?;
    for (at, (column, literal, ..)) in VALUES.iter().enumerate() {
        pod.run("alice", &format!("INSERT INTO app.v (id, {column}) VALUES ({at}, {literal})"), json!([])).await?;
    }
    for round in ["buffered", "flushed"] {
        for (at, (column, literal, parameter, _)) in VALUES.iter().enumerate() {
            // JSON and arrays are not compared as a whole; `1e0` means another number than its literal.
            if column.ends_with('s') || *column == "c_json" || *parameter == "1e0" {
                continue;
            }
            let sql = format!("SELECT count(*) FROM app.v WHERE {column} = $1 AND id = {at}");
            let answer = with_raw(&pod, &sql, parameter).await?;
            ensure!(
                answer.rows().is_ok_and(|rows| rows == [json!(["1"])]),
                "{round}: {sql} with {parameter}: {}",
                answer.text
            );
            // In a query, a text is no bytes, and an integer is no time.
            let is_integer = literal.parse::<i64>().is_ok();
            if *column == "c_bytes" || (is_integer && ["c_stamp", "c_date", "c_time"].contains(column)) {
                continue;
            }
            let sql = format!("SELECT count(*) FROM app.v WHERE {column} = {literal} AND id = {at}");
            let answer = pod.sql("alice", &sql, json!([])).await?;
            ensure!(answer.rows().is_ok_and(|rows| rows == [json!(["1"])]), "{round}: {sql}: {}", answer.text);
        }
        for (sql, expected) in [
            ("SELECT count(*) FROM app.v WHERE c_float > 1e38", json!([["3"]])),
            ("SELECT count(*) FROM app.v WHERE c_double > 1e308", json!([["3"]])),
            ("SELECT count(*) FROM app.v WHERE c_double < -0.5", json!([["2"]])),
            ("SELECT count(*) FROM app.v WHERE c_double IN (0.1, -1.0)", json!([["2"]])),
            ("SELECT count(*) FROM app.v WHERE c_double BETWEEN 0.05 AND 123456.78901234567", json!([["2"]])),
            ("SELECT count(*) FROM app.v WHERE c_double > 123456.78901234566", json!([["4"]])),
            (
                "SELECT c_double FROM app.v WHERE c_double IS NOT NULL ORDER BY c_double DESC LIMIT 2",
                json!([["NaN"], ["Infinity"]]),
            ),
            ("SELECT max(c_float), min(c_double) FROM app.v", json!([["NaN", "-Infinity"]])),
            ("SELECT count(*) FROM app.v WHERE c_whole > 99999999999999999999999999999999999998", json!([["1"]])),
            ("SELECT count(*) FROM app.v WHERE c_fine >= 0.99999999999999999999999999999999999999", json!([["1"]])),
            ("SELECT count(*) FROM app.v WHERE c_stamp > '9999-01-01'", json!([["2"]])),
            ("SELECT count(*) FROM app.v WHERE c_date < DATE '1970-01-01'", json!([["3"]])),
            ("SELECT count(*) FROM app.v WHERE c_uuid IN ('6F9619FF-8B86-D011-B42D-00CF4FC964FF')", json!([["1"]])),
            ("SELECT count(*) FROM app.v WHERE c_text = ''", json!([["1"]])),
        ] {
            returns(&pod, "alice", sql, expected).await.map_err(|error| error.context(round))?;
        }
        pod.run("alice", "STORAGE FLUSH TABLE app.v", json!([])).await?;
    }
    Ok(())
}

#[tokio::test]
async fn a_value_that_does_not_fit_is_refused_with_its_row_and_column() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &manifests())?;
    let pod = home.start().await?;
    #[rustfmt::skip]
    let wrong: &[(&str, &[&str], &[&str])] = &[
        ("c_bool", &["1", "'yes'", "'1'"], &["1", r#""true""#, "[]"]),
        ("c_small", &["32768", "-32769", "1.5", "'x'", "''", "true", "1e9"], &["32768", "1.5", r#""x""#, "true", "[1]", "{}", r#""""#]),
        ("c_int", &["2147483648", "0.1", "'NaN'"], &["2147483648", "-2147483649", "1e-1"]),
        ("c_big", &["9223372036854775808", "-9223372036854775809", "1e19"], &["9223372036854775808", r#""9223372036854775808""#, "1e400", "0.5"]),
        ("c_float", &["3.5e38", "'nan?'", "'inf'"], &["1e39", r#""inf""#, "true"]),
        ("c_double", &["1.8e308", "'x'"], &["1e309", r#""-1e309""#, "{}"]),
        ("c_whole", &["100000000000000000000000000000000000000", "0.5"], &["100000000000000000000000000000000000000", "0.5", r#""NaN""#]),
        ("c_fine", &["1", "0.999999999999999999999999999999999999999"], &["1.0", "1e-39"]),
        ("c_money", &["100000000000000", "0.00001"], &["100000000000000", "0.00001", "true"]),
        ("c_text", &["5", "true"], &["5", "true", "{}", "[]"]),
        ("c_bytes", &["'%%%'", r"'\x0'", r"'\xzz'", "'AP8'"], &[r#""%%%""#, "5", r#""\\xf""#]),
        ("c_json", &["'{'", "'{a:1}'", "''", "'NaN'", r#"'"\ud800"'"#, "'1e999'"], &[r#""\ud800""#, r#"{"a":"\udc00x"}"#, "1e999"]),
        ("c_stamp", &["'yesterday'", "'2024-02-30'", "'1970-01-01T00:00:00.0000001Z'", "9223372036854775808"], &[r#""""#, r#""2024-13-01T00:00:00Z""#, "1.5"]),
        ("c_date", &["'2023-02-29'", "2147483648", "'12:00'"], &[r#""2023-02-29""#, "2147483648"]),
        ("c_time", &["86400000000", "-1", "'24:00'", "'12:00:00.0000001'"], &["86400000000", r#""25:00""#]),
        ("c_uuid", &["'6F9619FF'", "5"], &[r#""x""#, "5"]),
        ("c_bigs", &["'[1'", "'[1.5]'", "'[\"x\"]'", "5", "'[9223372036854775808]'", "ARRAY['x']"], &["[1.5]", r#"["x"]"#, "{}", "5", "[[1]]"]),
        ("c_texts", &["'[\"a\"]'", "'[[1]]'"], &[r#"["a"]"#, "[[1]]"]),
        ("c_moneys", &["'[0.001]'"], &["[0.001]", "[1e20]"]),
        ("c_jsons", &[], &[r#"["\ud800"]"#]),
    ];
    for (column, literals, parameters) in wrong {
        let place = format!("row 2, column `{column}`");
        for literal in *literals {
            let sql = format!("INSERT INTO app.v (id, {column}) VALUES (1, NULL), (2, {literal})");
            let message = refused(&pod, &sql, json!([]), 400, "INVALID_VALUE").await?;
            ensure!(message.contains(&place), "{sql}: {message}");
        }
        for parameter in *parameters {
            let sql = format!("INSERT INTO app.v (id, {column}) VALUES (1, NULL), (2, $1)");
            let message = refusal(
                &format!("{sql} with {parameter}"),
                &with_raw(&pod, &sql, parameter).await?,
                400,
                "INVALID_VALUE",
            )?;
            ensure!(message.contains(&place) && message.contains("$1: "), "{sql} with {parameter}: {message}");
        }
    }
    let deep = format!("{}1{}", "[".repeat(200), "]".repeat(200));
    let answer = with_raw(&pod, "INSERT INTO app.v (id, c_json) VALUES (1, $1)", &deep).await?;
    refusal("JSON nested too deep", &answer, 400, "INVALID_VALUE")?;
    returns(&pod, "alice", "SELECT count(*) FROM app.v", json!([["0"]])).await
}

#[tokio::test]
async fn results_of_expressions_have_types_of_ours_and_are_exact_or_errors() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &manifests())?;
    let pod = home.start().await?;
    let rows: Vec<String> = (1..=4).map(|n| format!("({n}, {n}, 922337203685477580{n}, {n}.5, {n}.25)")).collect();
    pod.run(
        "alice",
        &format!("INSERT INTO app.v (id, c_int, c_big, c_double, c_money) VALUES {}", rows.join(",")),
        json!([]),
    )
    .await?;
    #[rustfmt::skip]
    let exact: &[(&str, &str, &str)] = &[
        ("count(*)", r#""BigInt""#, r#""4""#), ("count(DISTINCT c_int)", r#""BigInt""#, r#""4""#),
        ("sum(c_int)", r#""BigInt""#, r#""10""#), ("sum(c_double)", r#""Double""#, "12.0"), ("avg(c_int)", r#""Double""#, "2.5"),
        ("sum(c_money)", r#"{"Decimal":{"precision":28,"scale":4}}"#, r#""11.0000""#),
        ("avg(c_money)", r#"{"Decimal":{"precision":22,"scale":8}}"#, r#""2.75000000""#),
        ("min(c_big)", r#""BigInt""#, r#""9223372036854775801""#), ("max(c_int)", r#""Int""#, "4"), ("sum(c_small)", r#""BigInt""#, "null"),
        ("arrow_cast(5, 'UInt8')", r#""SmallInt""#, "5"), ("arrow_cast(5, 'UInt16')", r#""Int""#, "5"), ("arrow_cast(5, 'UInt32')", r#""BigInt""#, r#""5""#),
        ("arrow_cast(9223372036854775807, 'UInt64')", r#""BigInt""#, r#""9223372036854775807""#), ("[arrow_cast(7, 'UInt64')]", r#"{"Array":"BigInt"}"#, r#"["7"]"#),
        ("row_number() OVER ()", r#""BigInt""#, r#""1""#), ("rank() OVER (ORDER BY 1) - 1", r#""BigInt""#, r#""0""#), ("DENSE_RANK() OVER () * 2", r#""BigInt""#, r#""2""#),
        ("ntile(1) OVER ()", r#""BigInt""#, r#""1""#), ("count(*) OVER ()", r#""BigInt""#, r#""1""#), ("approx_distinct(c_int)", r#""BigInt""#, r#""4""#),
        ("regr_count(c_int, c_int) + 1", r#""BigInt""#, r#""5""#), ("array_length([1, 2]) - 3", r#""BigInt""#, r#""-1""#), ("cardinality([1])", r#""BigInt""#, r#""1""#),
        ("array_position([5, 6], 6)", r#""BigInt""#, r#""2""#), ("[5, 6][array_position([5, 6], 6)]", r#""BigInt""#, r#""6""#), ("array_positions([5], 5)", r#"{"Array":"BigInt"}"#, r#"["1"]"#),
        ("arrow_cast(1.5, 'Float16')", r#""Float""#, "1.5"), ("CAST(max(c_int) AS SMALLINT)", r#""SmallInt""#, "4"), ("CAST(1 AS REAL)", r#""Float""#, "1.0"),
        ("CAST('12.345' AS DECIMAL(10,3))", r#"{"Decimal":{"precision":10,"scale":3}}"#, r#""12.345""#), ("1.10", r#"{"Decimal":{"precision":3,"scale":2}}"#, r#""1.10""#),
        ("NULL", r#""Text""#, "null"), ("true AND NULL", r#""Boolean""#, "null"), ("1 = 1.0", r#""Boolean""#, "true"), ("'a' || 1", r#""Text""#, r#""a1""#),
        ("INTERVAL '1 day 2 hours'", r#""Text""#, r#""1 days 2 hours""#), ("DATE '1970-01-02'", r#""Date""#, "1"), ("TIME '00:00:01'", r#""Time""#, "1000000"),
        ("TIMESTAMP '1970-01-01 00:00:01.5'", r#""Timestamp""#, "1500000"), ("to_timestamp_seconds(2)", r#""Timestamp""#, "2000000"),
        ("DATE '1970-01-01' + INTERVAL '1 day'", r#""Date""#, "1"), ("extract(year FROM DATE '2024-02-29')", r#""Int""#, "2024"),
        ("CAST('9999-12-31 23:59:59.999999' AS TIMESTAMP)", r#""Timestamp""#, "253402300799999999"), ("TIMESTAMP '0001-01-01'", r#""Timestamp""#, "-62135596800000000"),
        ("5::timestamp", r#""Timestamp""#, "5"), ("5::timestamp(9)", r#""Timestamp""#, "5"), ("CAST(5 AS TIMESTAMP(3))", r#""Timestamp""#, "0"), ("CAST(max(id) AS TIMESTAMP)", r#""Timestamp""#, "4"),
        ("CAST(max(c_int) AS TIMESTAMP WITH TIME ZONE)", r#""Timestamp""#, "4"), ("5::date", r#""Date""#, "5"), ("max(c_int)::date", r#""Date""#, "4"),
        ("5::time", r#""Time""#, "5"), ("max(c_int)::time", r#""Time""#, "4"), ("TRY_CAST(5 AS TIME)", r#""Time""#, "5"), ("TRY_CAST(86400000000 AS TIME)", r#""Time""#, "null"),
        ("CAST(CAST(NULL AS INT) AS TIME)", r#""Time""#, "null"), ("to_timestamp(5)", r#""Timestamp""#, "5000000"),
        ("TIMESTAMP '2020-01-03' - TIMESTAMP '2020-01-01' > INTERVAL '1 day'", r#""Boolean""#, "true"),
        ("TIMESTAMP '2020-01-03' - TIMESTAMP '2020-01-01' BETWEEN INTERVAL '47 hours' AND INTERVAL '2 days'", r#""Boolean""#, "true"),
        ("coalesce(sum(c_double), 0.0)", r#""Double""#, "12.0"), ("coalesce(CAST(NULL AS DOUBLE), 0.1)", r#""Double""#, "0.1"), ("greatest(1e-20, 0.0)", r#""Double""#, "1e-20"),
        ("CASE WHEN max(c_int) = 4 THEN 1e300 ELSE 0.5 END", r#""Double""#, "1e300"), ("[1e-20, 0.5]", r#"{"Array":"Double"}"#, "[1e-20,0.5]"),
        ("CASE 1e-20 WHEN 0.00000000000000000001 THEN 'same' END", r#""Text""#, r#""same""#), ("nullif(1e-20, 0.00000000000000000001)", r#""Double""#, "null"),
        ("coalesce(CAST(1.5 AS FLOAT), max(c_money))", r#""Double""#, "1.5"), ("coalesce(max(c_money), 0.5)", r#"{"Decimal":{"precision":18,"scale":4}}"#, r#""4.2500""#),
        ("X'00ff'", r#""Bytes""#, r#""AP8=""#), ("encode(X'00ff', 'hex')", r#""Text""#, r#""00ff""#), ("CAST('6F' AS BYTEA)", r#""Bytes""#, r#""NkY=""#),
        ("[1, NULL]", r#"{"Array":"BigInt"}"#, r#"["1",null]"#), ("array_agg(c_int ORDER BY c_int DESC)", r#"{"Array":"Int"}"#, "[4,3,2,1]"),
        ("[[1.5], []]", r#"{"Array":{"Array":{"Decimal":{"precision":2,"scale":1}}}}"#, r#"[["1.5"],[]]"#),
        ("named_struct('a', 1, 'b', NULL)", r#""Json""#, r#"{"a":1,"b":null}"#), ("named_struct('a', named_struct('b', NULL))", r#""Json""#, r#"{"a":{"b":null}}"#),
        ("struct('x')", r#""Json""#, r#"{"c0":"x"}"#), ("map(['a'], [1])", r#""Json""#, r#"{"a":1}"#),
        ("CURRENT_USER()", r#""Text""#, r#""alice""#), ("current_user", r#""Text""#, r#""alice""#), ("CURRENT_USER ( ) = 'alice'", r#""Boolean""#, "true"),
        ("now() = CURRENT_TIMESTAMP", r#""Boolean""#, "true"), ("now() - now() = INTERVAL '0 days'", r#""Boolean""#, "true"),
        ("CAST('NaN' AS DOUBLE)", r#""Double""#, r#""NaN""#), ("CAST('inf' AS DOUBLE)", r#""Double""#, r#""Infinity""#), ("-CAST(0 AS DOUBLE)", r#""Double""#, "-0.0"),
        ("2147483647 + 1", r#""BigInt""#, r#""2147483648""#), ("max(c_big) + 3", r#""BigInt""#, r#""9223372036854775807""#),
        ("max(c_int) * 0.5", r#"{"Decimal":{"precision":12,"scale":1}}"#, r#""2.0""#), ("max(c_double) * 0.5", r#""Double""#, "2.25"), ("7 / 2", r#""BigInt""#, r#""3""#),
        ("9223372036854775807 - 9223372036854775807", r#""BigInt""#, r#""0""#), ("abs(-3)", r#""BigInt""#, r#""3""#), ("-max(c_int)", r#""Int""#, "-4"),
        ("(SELECT sum(x) FROM (VALUES (9223372036854775807), (-1)) v(x))", r#""BigInt""#, r#""9223372036854775806""#),
        ("(SELECT sum(DISTINCT x) FROM (VALUES (9223372036854775807), (9223372036854775807)) v(x))", r#""BigInt""#, r#""9223372036854775807""#),
    ];
    for (expression, data_type, value) in exact {
        let answer = pod.sql("alice", &format!("SELECT {expression} AS v FROM app.v"), json!([])).await?;
        let aggregated = answer.text.contains(r#""row_count":1,"#);
        let answer =
            if aggregated { answer } else { pod.sql("alice", &format!("SELECT {expression} AS v"), json!([])).await? };
        let expected = format!(
            r#""results":[{{"schema":[{{"data_type":{data_type},"index":0,"name":"v"}}],"rows":[[{value}]],"row_count":1,"#
        );
        ensure!(answer.text.contains(&expected), "{expression}\n expected {expected}\n found    {}", answer.text);
    }
    #[rustfmt::skip]
    let errors: &[&str] = &[
        "9223372036854775807 + 1", "-9223372036854775808 - 1", "9223372036854775807 * 2", "max(c_big) + 100", "sum(c_big)", "max(c_big) * max(c_int)",
        "CAST(300000 AS SMALLINT)", "CAST('x' AS INT)", "1 / 0", "1 % 0", "abs(-9223372036854775808)", "CAST(1e10 AS INT)", "- (-9223372036854775807 - 1)",
        "CAST(max(c_int) AS SMALLINT) * CAST(30000 AS SMALLINT)", "max(c_int) * CAST(2147483647 AS INT)", "CAST(99999999999999999999 AS DECIMAL(10,0))",
        "99999999999999999999999999999999999999 + 1", "99999999999999999999 * 99999999999999999999",
        "arrow_cast(18446744073709551615, 'UInt64')", "[arrow_cast(9223372036854775808, 'UInt64')]", "CAST(86400000000 AS TIME)", "now() - now() < INTERVAL '1 month'", "CAST(2147483648 AS DATE)",
        "(SELECT sum(x) FROM (VALUES (9223372036854775807), (1)) v(x))", "(SELECT sum(x) FROM (VALUES (-9223372036854775808), (-1)) v(x))",
        "(SELECT max(s) FROM (SELECT g, sum(x) AS s FROM (VALUES (1, 9223372036854775807), (1, 1), (2, 1)) v(g, x) GROUP BY g) t)",
        "(SELECT max(s) FROM (SELECT sum(x) OVER (ORDER BY x) AS s FROM (VALUES (9223372036854775806), (9223372036854775807)) v(x)) t)",
        "(SELECT sum(x) FROM (VALUES (99999999999999999999999999999999999999), (99999999999999999999999999999999999999)) v(x))",
        "(SELECT sum(DISTINCT x) FROM (VALUES (9223372036854775807), (9223372036854775806)) v(x))",
    ];
    for expression in errors {
        let sql = if expression.contains("c_") {
            format!("SELECT {expression} FROM app.v")
        } else {
            format!("SELECT {expression}")
        };
        let answer = pod.sql("alice", &sql, json!([])).await?;
        ensure!(answer.status == 400, "{sql}: {}", answer.text);
        refusal(&sql, &answer, 400, answer.code())?;
    }
    Ok(())
}

#[tokio::test]
async fn both_zeros_are_one_value_in_every_question() -> anyhow::Result<()> {
    let home = Home::new(BINARY, &manifests())?;
    let pod = home.start().await?;
    let values = "(1, -0.0, -0.0), (2, 0, 0), (3, 1, 1), (4, 'NaN', 'NaN'), (5, 'NaN', 'NaN'), (6, NULL, NULL)";
    pod.run("alice", &format!("INSERT INTO app.v (id, c_float, c_double) VALUES {values}"), json!([])).await?;
    for round in ["buffered", "flushed"] {
        for x in ["c_float", "c_double"] {
            for (sql, expected) in [
                ("SELECT count(*) FROM app.v a, app.v b WHERE a.id = 1 AND b.id = 2 AND a.{} = b.{}", json!([["1"]])),
                (
                    "SELECT count(*) FROM app.v a JOIN app.v b ON a.{} = b.{} WHERE a.id = 1 AND b.id <> 1",
                    json!([["1"]]),
                ),
                ("SELECT count(*) FROM app.v WHERE {} = 0", json!([["2"]])),
                ("SELECT count(*) FROM app.v WHERE {} IN (0, 7)", json!([["2"]])),
                ("SELECT count(*) FROM app.v WHERE {} < 0 OR {} NOT BETWEEN 0 AND 1", json!([["2"]])),
                ("SELECT count(*) FROM (SELECT {} FROM app.v GROUP BY {}) g", json!([["4"]])),
                ("SELECT count(*) FROM (SELECT DISTINCT {} FROM app.v) g", json!([["4"]])),
                ("SELECT count(*) FROM (SELECT {} FROM app.v UNION SELECT {} FROM app.v) g", json!([["4"]])),
                ("SELECT count(DISTINCT {}) FROM app.v", json!([["3"]])),
                ("SELECT count(DISTINCT {}), count(DISTINCT id), sum(id) FROM app.v", json!([["3", "6", "21"]])),
                ("SELECT count(DISTINCT {}) FILTER (WHERE id < 3), count(*) FROM app.v", json!([["1", "6"]])),
                (
                    "SELECT id > 2, count(DISTINCT {}), max(id) FROM app.v GROUP BY 1 ORDER BY 1",
                    json!([[false, "1", "2"], [true, "2", "6"]]),
                ),
                ("SELECT count(*) FROM app.v WHERE {} IN (0, 7, 8, 9, 10)", json!([["2"]])),
                ("SELECT count(*) FROM app.v WHERE {} NOT IN (0, 7, 8, 9, 10)", json!([["3"]])),
                (
                    "SELECT CASE {} WHEN 0 THEN 'zero' WHEN 1 THEN 'one' END FROM app.v WHERE id < 3",
                    json!([["zero"], ["zero"]]),
                ),
                ("SELECT id FROM app.v ORDER BY {}, id DESC LIMIT 2", json!([["2"], ["1"]])),
                (
                    "SELECT id, rank() OVER (ORDER BY {}) FROM app.v WHERE id < 4 ORDER BY id",
                    json!([["1", "1"], ["2", "1"], ["3", "3"]]),
                ),
                ("SELECT count(*) OVER (PARTITION BY {}) FROM app.v WHERE id < 3", json!([["2"], ["2"]])),
                ("SELECT array_agg(id ORDER BY {}, id DESC) FROM app.v WHERE id < 4", json!([[["2", "1", "3"]]])),
                ("SELECT cardinality(array_agg(DISTINCT {})), count(*) FROM app.v WHERE id < 3", json!([["1", "2"]])),
            ] {
                returns(&pod, "alice", &sql.replace("{}", x), expected).await.map_err(|error| error.context(round))?;
            }
        }
        pod.run("alice", "STORAGE FLUSH TABLE app.v", json!([])).await?;
    }
    Ok(())
}
