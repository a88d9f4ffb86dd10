//! `demo`: this machine's Debian changelogs as real multi-user data, loaded, flushed, compared and queried.

mod changelog;
mod check;
mod load;
mod queries;
mod source;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use kalamdb_model::{Role, UserId};
use kalamdb_table_store::paths;

use crate::client::{Client, Failure};
use crate::progress::Progress;
use crate::token::{SecretArgs, Signer};
use changelog::Oddity;
use check::Compared;
use source::Source;

/// The table of `examples/demo`.
const TABLE: &str = "debian.changelogs";
/// Users whose counts are printed one by one.
const SHOWN: usize = 15;
/// How long the server may take to become ready before the first statement.
const READY: Duration = Duration::from_secs(10);

/// Flags of `demo`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// The server.
    #[arg(long, env = "KALAMDB_URL", default_value = "http://127.0.0.1:2900")]
    url: String,
    /// Where the secret is.
    #[command(flatten)]
    secret: SecretArgs,
    /// Folder with the changelogs.
    #[arg(long, default_value = "/usr/share/doc")]
    docs: PathBuf,
    /// Statements at once.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=256))]
    concurrency: u16,
    /// How long a busy or absent server is asked again, seconds per statement.
    #[arg(long, default_value_t = 60)]
    patience_secs: u64,
}

/// Runs the demo. The exit code is 1 if the server and the files differ.
///
/// # Errors
/// If the files cannot be read, or the server refuses or does not answer.
pub async fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let signer = args.secret.signer()?;
    let client = Client::new(&args.url, Duration::from_secs(args.patience_secs))?;
    let concurrency = usize::from(args.concurrency);
    let operator = signer.token(&UserId::new("kalamdb-demo")?, Role::System)?;
    await_table(&client, &operator).await?;

    let source = read(&args.docs)?;
    let started = Instant::now();
    let loaded = load::load(&client, &signer, &source, concurrency)
        .await
        .context("the load stopped; what the server acknowledged stays, and the same command goes on from there")?;
    println!(
        "loaded in {:.1} s: {} rows written by {} statements, {} were there already, {} requests sent again",
        started.elapsed().as_secs_f64(),
        loaded.written,
        loaded.statements,
        loaded.present,
        client.repeated()
    );
    flush(&client, &operator).await?;
    let agree = compare(&client, &signer, &source, concurrency).await?;
    let private = queries::run(&client, &signer, &source).await?;
    show_files(args, &source);
    Ok(if agree && private { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Waits until the server is ready, and says what is missing if the table is.
async fn await_table(client: &Client, token: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    while !client.is_ready().await {
        let url = client.url();
        anyhow::ensure!(
            started.elapsed() < READY,
            "no server is ready at {url}; start one with `make run`, or name it with --url"
        );
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    match client.sql(token, &format!("SELECT count(*) FROM {TABLE}"), &[]).await {
        Ok(_) => Ok(()),
        Err(failure) if failure.is("TABLE_NOT_FOUND") => anyhow::bail!(
            "the server has no table `{TABLE}`; declare it and run this again\n  \
             standalone (`make run`):  cp examples/demo/debian.yaml examples/quickstart/\n  \
             cluster:                  kubectl apply -n kalamdb -f examples/s3/ -f examples/demo-s3/"
        ),
        Err(failure @ Failure::Refused { status: reqwest::StatusCode::UNAUTHORIZED, .. }) => Err(failure).context(
            "the server takes no token that is signed with this secret; name its data folder with --data-dir, or set \
             KALAMDB_JWT_SECRET",
        ),
        Err(failure) => Err(failure).with_context(|| format!("failed to read `{TABLE}`")),
    }
}

fn read(docs: &Path) -> anyhow::Result<Source> {
    let progress = Progress::start("changelogs read", source::files(docs)?.len() as u64);
    let source = Source::read(docs, || progress.advance(1))?;
    progress.finish();
    println!(
        "{} changelogs below {} hold {} entries, {} of them copies in other packages of the same source",
        source.files,
        docs.display(),
        source.found,
        source.copies
    );
    for (reason, (count, place)) in &source.left_out {
        let first = if Oddity::is_harmless(reason) { String::new() } else { format!(" (first: {place})") };
        println!("  {count:>6} {reason}{first}");
    }
    println!("{} rows of {} users to load", source.rows(), source.users.len());
    anyhow::ensure!(source.rows() > 0, "there is nothing to load; name another folder with --docs");
    Ok(source)
}

async fn flush(client: &Client, token: &str) -> anyhow::Result<()> {
    let started = Instant::now();
    let answer = client.sql(token, &format!("STORAGE FLUSH TABLE {TABLE}"), &[]).await.context("failed to flush")?;
    println!("flushed {} rows to Parquet files in {:.1} s", answer.row_count, started.elapsed().as_secs_f64());
    Ok(())
}

/// Prints how the users' rows compare with the files. Returns whether all agree.
async fn compare(client: &Client, signer: &Signer, source: &Source, concurrency: usize) -> anyhow::Result<bool> {
    let started = Instant::now();
    let compared = check::compare(client, signer, source, concurrency).await?;
    println!("\n{:>8} {:>8}  user", "files", "server");
    for one in compared.iter().take(SHOWN) {
        println!("{:>8} {:>8}  {}", one.in_files, one.counted, one.user.as_str());
    }
    let agreeing = compared.iter().filter(|one| one.agrees()).count();
    let (all, elapsed) = (compared.len(), started.elapsed().as_secs_f64());
    println!("{agreeing} of {all} users agree with the files, in number and in every value ({elapsed:.1} s)");
    for one in compared.iter().filter(|one| !one.agrees()) {
        let Compared { user, in_files, counted, missing, foreign } = one;
        println!(
            "  DIFFERS: `{}`: {in_files} rows in the files, {counted} counted, {missing} missing or changed, {foreign} that \
             the files do not have",
            user.as_str()
        );
    }
    Ok(agreeing == all)
}

/// Says where the files are: found on this machine's disk, or by the rule that leads to them.
fn show_files(args: &Args, source: &Source) {
    let Some((user, _)) = source.by_rows().into_iter().next() else { return };
    let folder = format!("users/{}/debian/changelogs", paths::encode_user(user));
    let root = args.secret.data_dir.join("files");
    if args.secret.jwt_secret.is_some() || !root.join(&folder).is_dir() {
        println!("\nfiles: {folder}/*.parquet and so on, one folder per user, in the storage of `{TABLE}`");
        return;
    }
    let (count, bytes) = parquet_below(&root.join("users"), 0);
    println!("\n{count} Parquet files, {:.1} MB, one folder per user; for example", megabytes(bytes));
    println!("  find '{}' -name '*.parquet'", root.join(folder).display());
}

fn parquet_below(folder: &Path, depth: usize) -> (u64, u64) {
    let (mut count, mut bytes) = (0, 0);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()).filter(|path| !path.is_symlink()) {
        if path.is_dir() && depth < 16 {
            let below = parquet_below(&path, depth + 1);
            count += below.0;
            bytes += below.1;
        } else if path.extension().is_some_and(|extension| extension == "parquet") {
            count += 1;
            bytes += path.metadata().map_or(0, |metadata| metadata.len());
        }
    }
    (count, bytes)
}

#[expect(clippy::cast_precision_loss, reason = "shown with one digit")]
fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}
