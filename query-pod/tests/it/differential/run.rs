//! Runs a list on a new database, and compares what is answered.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use kalamdb_model::Role;

use super::actions::Asked;
use super::general::{Form, General};
use super::generate::{Op, USERS, What, send};
use super::model::Model;
use super::sqlite::Theirs;
use super::tables::{STORAGES, TABLES, Table};
use super::{Counts, Effect, Ours, Said, Volume};

/// An answer that is not as it should be.
pub struct Failure {
    /// The operation, counted from 0; after the last one for what is found at the end.
    pub at: usize,
    pub error: anyhow::Error,
}

/// Runs `ops` until one fails.
pub async fn attempt(ops: &[Op], counts: &mut Counts) -> Result<(), Failure> {
    let mut run = Run::new().await.map_err(|error| Failure { at: 0, error })?;
    let outcome = run.all(ops, counts).await;
    run.ours.close().await;
    outcome
}

/// A database and its referees.
struct Run {
    ours: Ours,
    /// Of each user.
    theirs: Vec<Theirs>,
    models: BTreeMap<(usize, &'static str), Model>,
    /// Where the rows of each user are to lie.
    storages: Vec<&'static str>,
}

impl Run {
    async fn new() -> anyhow::Result<Self> {
        let theirs = USERS.iter().map(|_| Theirs::new()).collect::<anyhow::Result<_>>()?;
        let storages = vec![STORAGES[0]; USERS.len()];
        Ok(Self { ours: Ours::new().await?, theirs, models: BTreeMap::new(), storages })
    }

    async fn all(&mut self, ops: &[Op], counts: &mut Counts) -> Result<(), Failure> {
        for (at, op) in ops.iter().enumerate() {
            let done = self.one(op).await.with_context(|| op.to_string());
            counts.add(op, done.map_err(|error| Failure { at, error })?);
        }
        let ended = self.end().await.context("after the last operation");
        ended.map_err(|error| Failure { at: ops.len(), error })
    }

    async fn one(&mut self, op: &Op) -> anyhow::Result<Effect> {
        let user = USERS[op.user];
        Ok(match &op.what {
            What::Asked(asked) => self.asked(op.user, asked).await?,
            What::General(general) => self.general(op.user, general).await?,
            What::Flush(table) => self.ours.run(user, &format!("STORAGE FLUSH TABLE {}", table.name)).await?.effect(),
            What::Compact(table) => {
                self.ours.run(user, &format!("STORAGE COMPACT TABLE {}", table.name)).await?.effect()
            }
            What::Restart => {
                self.ours.restart(Volume::Kept).await?;
                Effect::Some
            }
            What::Lose => {
                self.ours.restart(Volume::Lost).await?;
                Effect::Some
            }
            What::Move(storage) => {
                self.storages[op.user] = *storage;
                self.ours.ask("root", Role::Dba, &send(op.user, storage), &[]).await?.effect()
            }
            What::Settle => self.settle(op.user).await?,
        })
    }

    /// The model knows what is answered; SQLite, where it has the table, agrees with it.
    async fn asked(&mut self, user: usize, asked: &Asked) -> anyhow::Result<Effect> {
        let expected = self.model(user, asked.table).answer(asked).sorted();
        let effect = expected.effect();
        if asked.table.sqlite.is_some() {
            let theirs = self.theirs[user].run(&asked.literal())?.sorted();
            ensure!(theirs == expected, "SQLite says    {theirs:?}\nthe model says {expected:?}");
        }
        let (sql, params) = asked.sent();
        let found = self.ours.ask(USERS[user], Role::User, &sql, &params).await?.sorted();
        ensure!(found == expected, "found    {found:?}\nexpected {expected:?}");
        Ok(effect)
    }

    /// SQLite knows what is answered, and what the model has to go on from.
    async fn general(&mut self, user: usize, general: &General) -> anyhow::Result<Effect> {
        let in_order = |said: Said| if general.form == Form::Ordered { said } else { said.sorted() };
        let expected = in_order(self.theirs[user].run(&general.sql).context("SQLite")?);
        let found = in_order(self.ours.run(USERS[user], &general.sql).await?);
        ensure!(found == expected, "found    {found:?}\nexpected {expected:?}");
        if general.form == Form::Change {
            let rows = self.theirs[user].all(general.table)?;
            self.model(user, general.table).replace(general.table, rows);
        }
        Ok(expected.effect())
    }

    fn model(&mut self, user: usize, table: &Table) -> &mut Model {
        self.models.entry((user, table.name)).or_default()
    }

    /// Waits for the moves of a user.
    async fn settle(&mut self, user: usize) -> anyhow::Result<Effect> {
        let storage = self.storages[user];
        let mut effect = Effect::None;
        for table in TABLES.iter().filter(|table| table.moves()) {
            // What was never written to lies nowhere.
            if !self.model(user, table).is_empty() {
                self.ours.arrives(USERS[user], table.name, storage).await?;
                effect = if storage == STORAGES[0] { effect } else { Effect::Some };
            }
        }
        Ok(effect)
    }

    /// Everything is as it should be, for the next process, too.
    async fn end(&mut self) -> anyhow::Result<()> {
        for user in 0..USERS.len() {
            self.settle(user).await?;
        }
        self.check_all().await?;
        self.ours.restart(Volume::Kept).await?;
        self.check_all().await
    }

    async fn check_all(&mut self) -> anyhow::Result<()> {
        for (user, name) in USERS.iter().enumerate() {
            for table in &TABLES {
                let checked = self.asked(user, &Asked::all(table)).await;
                checked.with_context(|| format!("{} of {name}", table.name))?;
            }
        }
        Ok(())
    }
}
