//! Writes the definitions of the custom resources as YAML.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Parser, Subcommand};

/// Works with the custom resources of KalamDB.
#[derive(Parser)]
#[command(name = "kalamdb-crds", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Writes one YAML file per custom resource, and the deletion guard.
    Generate {
        /// Folder to write to; it is made if it does not exist.
        #[arg(long, default_value = "crds/manifests")]
        out: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    let Command::Generate { out } = Arguments::parse().command;
    std::fs::create_dir_all(&out).with_context(|| format!("failed to make the folder `{}`", out.display()))?;
    for (name, text) in kalamdb_crds::generate::manifests()? {
        let path = out.join(name);
        std::fs::write(&path, text).with_context(|| format!("failed to write `{}`", path.display()))?;
        println!("{}", path.display());
    }
    Ok(())
}
