//! The public client, unchanged, against a standalone pod: it is the judge of the envelope.
#![allow(missing_docs)]

use anyhow::{Context as _, ensure};
use kalam_client::{KalamLinkClient, KalamLinkError, QueryParam};
use kalamdb_test_support::pod::{Home, MANIFESTS, Pod};
use serde_json::json;

const TYPES: &str = "
---
apiVersion: kalamdb.org/v1alpha1
kind: UserTable
metadata: {name: app.every-type}
spec:
  namespaceRef: app
  tableName: every_type
  columns:
    - {name: id, type: BIGINT, primaryKey: true}
    - {name: flag, type: BOOLEAN}
    - {name: small, type: SMALLINT}
    - {name: medium, type: INT}
    - {name: single, type: FLOAT}
    - {name: twice, type: DOUBLE}
    - {name: price, type: 'DECIMAL(18,4)'}
    - {name: body, type: TEXT}
    - {name: raw, type: BYTES}
    - {name: doc, type: JSON}
    - {name: at, type: TIMESTAMP}
    - {name: day, type: DATE}
    - {name: clock, type: TIME}
    - {name: code, type: UUID}
";

async fn start() -> anyhow::Result<(Home, Pod)> {
    let home = Home::new(kalamdb_test_support::pod::binary("kalamdb-query-pod")?, &format!("{MANIFESTS}{TYPES}"))?;
    let pod = home.start().await?;
    Ok((home, pod))
}

fn client(pod: &Pod, user: &str) -> anyhow::Result<KalamLinkClient> {
    Ok(KalamLinkClient::builder().base_url(pod.url.clone()).jwt_token(pod.token(user, "user")?).build()?)
}

#[tokio::test]
async fn the_public_client_writes_and_reads_every_type_by_name() -> anyhow::Result<()> {
    let (_home, pod) = start().await?;
    let client = client(&pod, "alice")?;
    let params = vec![
        json!(i64::MAX),
        json!(true),
        json!(-5),
        json!(7),
        json!(1.5),
        json!(0.1),
        json!("123456789012.3456"),
        json!("grüße 🙂"),
        json!("AQID"),
        json!({"a": [1, null]}),
        json!("2026-01-02T03:04:05.000006Z"),
        json!("2026-01-02"),
        json!("03:04:05"),
        json!("67e55044-10b1-426f-9247-bb680e5fe0c8"),
    ];
    let params: Vec<QueryParam> = params.into_iter().map(QueryParam::from).collect();
    let marks: Vec<String> = (1..=params.len()).map(|number| format!("${number}")).collect();
    let insert = format!("INSERT INTO every_type VALUES ({})", marks.join(", "));
    let written = client.execute_query(&insert, None, Some(params), Some("app")).await?;
    ensure!(written.success() && written.row_count() == 1, "{written:?}");
    for flushed in [false, true] {
        if flushed {
            client.execute_query("STORAGE FLUSH TABLE app.every_type", None, None, None).await?;
        }
        let answer = client
            .execute_query(
                "SELECT * FROM app.every_type WHERE id = $1",
                None,
                Some(vec![QueryParam::from(i64::MAX)]),
                None,
            )
            .await?;
        let row = answer.first_row_as_map().context("a row")?;
        let cell = |name: &str| row.get(name).with_context(|| format!("no column `{name}`"));
        ensure!(answer.get_i64("id") == Some(i64::MAX));
        ensure!(cell("flag")?.as_boolean() == Some(true));
        ensure!(cell("small")?.as_small_int() == Some(-5));
        ensure!(cell("medium")?.as_int() == Some(7));
        ensure!(cell("single")?.as_float() == Some(1.5));
        ensure!(cell("twice")?.as_double() == Some(0.1));
        ensure!(cell("price")?.inner() == &json!("123456789012.3456"));
        ensure!(answer.get_string("body").as_deref() == Some("grüße 🙂"));
        ensure!(cell("raw")?.inner() == &json!("AQID"));
        ensure!(cell("doc")?.as_json() == Some(&json!({"a": [1, null]})));
        ensure!(cell("at")?.as_timestamp() == Some(1_767_323_045_000_006));
        ensure!(cell("day")?.as_date() == Some(20_455));
        ensure!(cell("clock")?.as_time() == Some(11_045_000_000));
        ensure!(cell("code")?.as_uuid() == Some("67e55044-10b1-426f-9247-bb680e5fe0c8"));
        let types: Vec<String> =
            answer.results[0].schema.iter().map(|field| format!("{:?}", field.data_type)).collect();
        ensure!(types.iter().any(|ty| ty.contains("Decimal") && ty.contains("18")), "{types:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_public_client_understands_our_errors() -> anyhow::Result<()> {
    let (_home, pod) = start().await?;
    let client = client(&pod, "alice")?;
    let failure = async |sql: &str| -> anyhow::Result<String> {
        // The client reports an error envelope as an answer or as a server error, by HTTP status.
        match client.execute_query(sql, None, None, None).await {
            Ok(answer) => {
                let error = answer.error.context("an error")?;
                Ok(format!("{}: {}", error.code, error.message))
            }
            Err(KalamLinkError::ServerError { status_code, message }) => Ok(format!("{status_code}: {message}")),
            Err(other) => Err(other.into()),
        }
    };
    ensure!(failure("SELECT * FROM app.missing").await?.contains("app.missing"));
    ensure!(failure("SELEC 1").await?.contains("SELEC"));
    ensure!(failure("INSERT INTO app.messages (body) VALUES (NULL)").await?.contains("row 1"));
    Ok(())
}

#[tokio::test]
async fn the_public_client_sees_only_its_users_rows() -> anyhow::Result<()> {
    let (_home, pod) = start().await?;
    for user in ["alice", "bob"] {
        let own = client(&pod, user)?;
        own.execute_query(
            "INSERT INTO app.messages (body) VALUES ($1)",
            None,
            Some(vec![QueryParam::from(user)]),
            None,
        )
        .await?;
        let answer = own.execute_query("SELECT body FROM messages", None, None, Some("app")).await?;
        ensure!(answer.rows().len() == 1 && answer.get_string("body").as_deref() == Some(user), "{answer:?}");
    }
    Ok(())
}
