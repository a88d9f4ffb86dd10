//! A comparison with a cast is one with what the cast gives, wherever the rows are.

use anyhow::{Context as _, ensure};
use kalamdb_test_support::pod::{Home, Pod};
use serde_json::{Value, json};

use super::{BINARY, declare, refused, returns, rows, user_table};

/// Column, type, values that are in range of every type below, and others.
#[rustfmt::skip]
const NUMBERS: [(&str, &str, &[&str], &[&str]); 8] = [
    ("c_small", "SMALLINT", &["5", "0", "-4", "100"], &["-32768", "32767"]),
    ("c_int", "INT", &["5", "0", "-4", "100"], &["-2147483648", "2147483647", "70000"]),
    ("c_big", "BIGINT", &["5", "0", "-4", "100"], &["-9223372036854775808", "9223372036854775807", "9007199254740993"]),
    ("c_float", "FLOAT", &["5", "5.21", "-4.6", "0.5"], &["1e30", "-1e30", "'NaN'", "'-Infinity'"]),
    ("c_double", "DOUBLE", &["5", "5.213", "-4.6", "4.999"], &["1e300", "-1e300", "'NaN'", "'Infinity'"]),
    ("c_price", "DECIMAL(5,2)", &["5", "5.21", "-4.6", "4.99"], &["999.99", "-999.99"]),
    ("c_fine", "DECIMAL(25,3)", &["5", "5.213", "-4.6", "4.999"], &["9999999999999999999999.999", "-70000.5"]),
    ("c_whole", "DECIMAL(38,0)", &["5", "0", "-4", "100"],
        &["99999999999999999999999999999999999999", "-99999999999999999999999999999999999999"]),
];

const TYPES: [&str; 9] =
    ["SMALLINT", "INT", "BIGINT", "FLOAT", "DOUBLE", "DECIMAL(5,2)", "DECIMAL(10,1)", "DECIMAL(25,3)", "DECIMAL(38,0)"];

const CONDITIONS: [&str; 5] = ["= 5", "<> 5", "> 4", "<= -4", "IN (5, -4)"];

/// Checks that each condition selects the rows for which it is true of what `cast` gives.
async fn selects_what_it_gives(pod: &Pod, user: &str, cast: &str) -> anyhow::Result<()> {
    let shown = CONDITIONS.map(|condition| format!("x {condition}")).join(", ");
    // What is made distinct is computed; nothing looks behind it.
    let sql = format!("SELECT id, {shown} FROM (SELECT DISTINCT id, {cast} AS x FROM app.numbers) q ORDER BY id");
    let given = rows(pod, user, &sql, json!([])).await?;
    let given = given.as_array().context("rows")?;
    for (at, condition) in (1_usize..).zip(CONDITIONS) {
        let expected: Vec<&Value> = given.iter().filter(|row| row[at] == json!(true)).map(|row| &row[0]).collect();
        let sql = format!("SELECT id FROM app.numbers WHERE {cast} {condition} ORDER BY id");
        let found = rows(pod, user, &sql, json!([])).await?;
        let found: Vec<&Value> = found.as_array().into_iter().flatten().map(|row| &row[0]).collect();
        ensure!(found == expected, "{user}: {sql}\n returned {found:?}\n expected {expected:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_number_that_is_cast_to_any_other_type_is_compared_as_that() -> anyhow::Result<()> {
    let columns: Vec<String> = NUMBERS.iter().map(|(name, ty, ..)| format!("{name}, type: \"{ty}\"")).collect();
    let all: Vec<&str> =
        ["id, type: BIGINT, primaryKey: true"].into_iter().chain(columns.iter().map(String::as_str)).collect();
    let home = Home::new(BINARY, &declare(&[user_table("numbers", &all)]))?;
    let pod = home.start().await?;
    // What is out of range fails as CAST, and is NULL as TRY_CAST.
    for (user, others) in [("few", false), ("all", true)] {
        let mut id = 0;
        for (column, _, in_range, out_of_range) in NUMBERS {
            for value in in_range.iter().chain(out_of_range.iter().filter(|_| others)) {
                id += 1;
                pod.run(user, &format!("INSERT INTO app.numbers (id, {column}) VALUES ({id}, {value})"), json!([]))
                    .await?;
            }
        }
    }
    for round in ["buffered", "flushed"] {
        for (column, ..) in NUMBERS {
            for ty in TYPES {
                selects_what_it_gives(&pod, "few", &format!("CAST({column} AS {ty})")).await.context(round)?;
                selects_what_it_gives(&pod, "all", &format!("TRY_CAST({column} AS {ty})")).await.context(round)?;
            }
        }
        for user in ["few", "all"] {
            pod.run(user, "STORAGE FLUSH TABLE app.numbers", json!([])).await?;
        }
    }
    Ok(())
}

async fn start() -> anyhow::Result<(Home, Pod)> {
    let columns = [
        "id, type: BIGINT, primaryKey: true",
        "price, type: \"DECIMAL(25,3)\"",
        "qty, type: INT",
        "big, type: BIGINT",
        "weight, type: DOUBLE",
        "at, type: TIMESTAMP",
        "day, type: DATE",
    ];
    let home = Home::new(BINARY, &declare(&[user_table("v", &columns)]))?;
    let pod = home.start().await?;
    let rows = [
        "(1, 5.213, 5, 9007199254740992, 9007199254740992, '2024-01-01T00:00:01.5Z', '2024-01-01')",
        "(2, 5.4, 70000, 9007199254740993, 0, '2024-01-01T12:00:00Z', '2024-01-02')",
        "(3, -99999.999, 0, -1, -1.5, '1969-12-31T23:59:59.999999Z', '1969-12-31')",
    ];
    pod.run("alice", &format!("INSERT INTO app.v VALUES {}", rows.join(",")), json!([])).await?;
    Ok((home, pod))
}

#[tokio::test]
async fn a_cast_hides_no_row_and_shows_none_that_it_should_not() -> anyhow::Result<()> {
    let (_home, pod) = start().await?;
    for round in ["buffered", "flushed"] {
        for (condition, ids) in [
            ("CAST(price AS DECIMAL(10,2)) = 5.21", "1"),
            ("CAST(price AS DECIMAL(30,4)) = 5.4", "2"),
            ("CAST(price AS INT) = 5", "1,2"),
            ("CAST(price AS INT) > 5", ""),
            ("5 >= CAST(price AS INT)", "1,2,3"),
            ("CAST(price AS INT) IN (5)", "1,2"),
            ("CAST(price AS INT) NOT IN (5)", "3"),
            ("CAST(price AS INT) BETWEEN 5 AND 5", "1,2"),
            ("CAST(price AS INT) IS DISTINCT FROM 5", "3"),
            ("CAST(CAST(price AS INT) AS TEXT) = '5'", "1,2"),
            ("CAST(TRY_CAST(CAST(price AS INT) AS SMALLINT) AS BIGINT) = 5", "1,2"),
            ("arrow_cast(price, 'Int32') = 5", "1,2"),
            ("TRY_CAST(qty AS SMALLINT) > 5", ""),
            ("TRY_CAST(qty AS SMALLINT) <> 5", "3"),
            ("TRY_CAST(qty AS SMALLINT) IS NULL", "2"),
            ("CAST(qty AS BIGINT) = 5", "1"),
            ("CAST(qty AS TEXT) = '70000'", "2"),
            ("CAST(qty AS BOOLEAN) < true", "3"),
            ("CAST(big AS DOUBLE) = 9007199254740993", "1,2"),
            ("CAST(at AS TIMESTAMP(0)) = TIMESTAMP '2024-01-01 00:00:01'", "1"),
            ("CAST(at AS TIMESTAMP(0)) = TIMESTAMP '2024-01-01 00:00:01.5'", ""),
            ("to_timestamp_seconds(qty) = TIMESTAMP '1970-01-01 00:00:05'", "1"),
            ("to_timestamp_seconds(qty) = TIMESTAMP '1970-01-01 00:00:05.5'", ""),
            ("CAST(at AS TIME) = '00:00:01.5'", "1"),
            ("CAST(at AS TIME) > TIME '12:00'", "3"),
            ("CAST(at AS DATE) = DATE '2024-01-01'", "1,2"),
            ("CAST(at AS TIMESTAMP) >= TIMESTAMP '2024-01-01 12:00:00'", "2"),
        ] {
            let sql = format!(
                "SELECT coalesce(string_agg(CAST(id AS TEXT), ',' ORDER BY id), '') FROM app.v WHERE {condition}"
            );
            returns(&pod, "alice", &sql, json!([[ids]])).await.context(round)?;
        }
        // 70000 is no SMALLINT, whatever it is compared with.
        refused(&pod, "SELECT id FROM app.v WHERE CAST(qty AS SMALLINT) > 5", json!([]), 400, "INVALID_VALUE").await?;
        pod.run("alice", "STORAGE FLUSH TABLE app.v", json!([])).await?;
    }
    ensure!(pod.run("alice", "DELETE FROM app.v WHERE CAST(price AS INT) > 5", json!([])).await? == 0);
    ensure!(pod.run("alice", "UPDATE app.v SET qty = 6 WHERE CAST(price AS INT) = 5", json!([])).await? == 2);
    returns(&pod, "alice", "SELECT id, qty FROM app.v ORDER BY id", json!([["1", 6], ["2", 6], ["3", 0]])).await
}

#[tokio::test]
async fn a_cast_stands_wherever_a_column_does_and_names_its_column_as_before() -> anyhow::Result<()> {
    let (_home, pod) = start().await?;
    for (sql, expected) in [
        (
            "SELECT CAST(price AS INT), count(*) FROM app.v GROUP BY CAST(price AS INT) HAVING CAST(price AS INT) > 0 \
             ORDER BY CAST(price AS INT)",
            json!([[5, "2"]]),
        ),
        (
            "SELECT GROUPING(CAST(price AS INT)), CAST(price AS INT), count(*) FROM app.v \
             GROUP BY ROLLUP(CAST(price AS INT)) ORDER BY 1, 2",
            json!([[0, -99_999, "1"], [0, 5, "2"], [1, null, "3"]]),
        ),
        ("SELECT DISTINCT CAST(price AS INT) FROM app.v ORDER BY 1", json!([[-99_999], [5]])),
        ("SELECT id FROM app.v ORDER BY CAST(price AS INT) DESC, id LIMIT 2", json!([["1"], ["2"]])),
        (
            "SELECT a.id, b.id FROM app.v a JOIN app.v b ON CAST(a.price AS INT) = b.qty ORDER BY 1, 2",
            json!([["1", "1"], ["2", "1"]]),
        ),
        ("SELECT id FROM app.v WHERE qty IN (SELECT CAST(price AS INT) FROM app.v)", json!([["1"]])),
        (
            "SELECT id FROM app.v v WHERE EXISTS (SELECT 1 FROM app.v x WHERE CAST(x.price AS INT) = v.qty)",
            json!([["1"]]),
        ),
        (
            "SELECT id, (SELECT count(*) FROM app.v x WHERE CAST(x.qty AS BIGINT) = v.big) FROM app.v v ORDER BY id",
            json!([["1", "0"], ["2", "0"], ["3", "0"]]),
        ),
        (
            "SELECT CASE CAST(price AS INT) WHEN 5 THEN 'five' ELSE 'other' END FROM app.v ORDER BY id",
            json!([["five"], ["five"], ["other"]]),
        ),
        (
            "SELECT CAST(price AS INT) + 1 AS x FROM app.v UNION SELECT qty FROM app.v ORDER BY x LIMIT 2",
            json!([["-99998"], ["0"]]),
        ),
        ("VALUES (CAST(1 + 1.5 AS INT))", json!([[2]])),
        ("SELECT id FROM app.v ORDER BY id LIMIT CAST(1 + 1.0 AS INT)", json!([["1"], ["2"]])),
    ] {
        returns(&pod, "alice", sql, expected).await?;
    }
    // These have a row for each value of what is cast, if any.
    for condition in ["CAST(x.price AS INT) = v.qty", "v.day = CAST(x.at AS DATE)", "x.big = v.weight"] {
        let sql = format!("SELECT id, (SELECT count(*) FROM app.v x WHERE {condition}) FROM app.v v");
        refused(&pod, &sql, json!([]), 400, "UNSUPPORTED").await?;
    }
    let sql = "SELECT CAST(price AS INT), sum(CAST(price AS INT)) OVER (), TRY_CAST(qty AS SMALLINT) FROM app.v";
    let answer = pod.sql("alice", sql, json!([])).await?;
    let schema = answer.body["results"][0]["schema"].as_array().context("a schema")?;
    let names: Vec<&Value> = schema.iter().map(|column| &column["name"]).collect();
    let sum = "sum(app.v.price) ROWS BETWEEN UNBOUNDED PRECEDING AND UNBOUNDED FOLLOWING";
    ensure!(json!(names) == json!(["app.v.price", sum, "app.v.qty"]), "{}", answer.text);
    Ok(())
}
