//! Begins the commit stream of this process in a storage: ends those of former ones, and publishes what they committed.
//!
//! The streams also tell when the data folder is an older copy of what once ran: a former stream was ended by a process
//! that the folder does not know, goes on beyond a gap, or has commits that the folder cannot have made. Publishing these
//! would drop buffered rows that are in no file, and without them answers are too short; so the pod gives up
//! ([`Disowned`]). It looks before it fences: a copy that was started by mistake must not lock the newest one out.
//!
//! A storage belongs to one instance of KalamDB, from before its first object on ([`owners::hold`]). What another one holds
//! is neither written nor read back nor ended.

use std::sync::Arc;

use kalamdb_table_store::owners;
use kalamdb_table_store::stream::{self, Body, Round, StreamWriter};
use object_store::ObjectStore;

use super::publish::PublishError;
use super::ship::{self, Backoff, Disowned, FIRST_SEQ, Place, ShipError};
use super::storages::Use;
use super::{Engine, RootKey};
use crate::crash;
use crate::error::Chain;

pub(super) type BeginError = Box<dyn std::error::Error + Send + Sync>;

/// Ends the streams of former incarnations and begins our own.
pub(super) async fn open(engine: &Arc<Engine>, place: &Place) -> Result<StreamWriter, ShipError> {
    let root = &place.root;
    let (mut next_seq, mut backoff) = (FIRST_SEQ, Backoff::default());
    loop {
        let begun = begin(engine, place, &mut next_seq).await;
        if begun.is_err() && next_seq == FIRST_SEQ {
            engine.leave_place(place);
        }
        engine.check_owned()?;
        match begun {
            Ok(stream) => return Ok(stream),
            Err(error) => {
                tracing::warn!(storage = %root, error = %Chain(error.as_ref()), "cannot begin the commit stream yet");
            }
        }
        engine.pause(&mut backoff).await?;
    }
}

/// `next_seq` is that of the stream, which may have its first object from an earlier attempt.
async fn begin(engine: &Arc<Engine>, place: &Place, next_seq: &mut u64) -> Result<StreamWriter, BeginError> {
    let (root, shippers, catalog) = (&place.root, &engine.shippers, engine.catalog.current());
    if !place.is_in(engine, &catalog) {
        return Err("the storage is declared elsewhere now, or not at all".into());
    }
    if let Err(other) = engine.take_place(place) {
        return Err(format!("storage `{other}` lies at the same place; declare another bucket or prefix").into());
    }
    let rebuilding = !engine.is_rebuilt(root);
    let known = shippers.known(root)?;
    let own_disk = !engine.storages.ships_rows(&catalog, root);
    // Noted as known, and yet nothing of it is there: then it was noted before its first object.
    let first = known.iter().all(|(incarnation, _)| *incarnation == shippers.incarnation);
    let usage = if known.is_empty() && (own_disk || !rebuilding) { Use::First } else { Use::Again };
    let store = engine.storages.open(&catalog, root, usage)?;
    let held = own_disk || is_held(engine, root, store.as_ref()).await?;
    if !held || (first && !rebuilding && !own_disk) {
        check_unused(engine, store.as_ref()).await?;
    }
    let mut stream = StreamWriter::new(Arc::clone(&store), shippers.incarnation.clone(), *next_seq);
    if !held {
        hold(engine, place, store.as_ref()).await?;
    } else if rebuilding {
        // Whatever is there was made by those who came before us.
        let oldest = stream::incarnations(store.as_ref()).await?.into_iter().next();
        engine.note_since(root, oldest.as_deref().and_then(incarnation_us))?;
        take(engine, place, &mut stream, store.as_ref()).await?;
        *next_seq = stream.next_seq();
        engine.rebuild(root, store.as_ref(), own_disk).await?;
    }
    let former: Vec<_> = known.iter().filter(|(incarnation, _)| *incarnation != shippers.incarnation).collect();
    for (incarnation, from) in &former {
        let fenced_by = look(engine, root, store.as_ref(), incarnation, *from).await?;
        check_end(engine, root, &known, incarnation, fenced_by.as_deref())?;
    }
    engine.note_since(root, None)?;
    take(engine, place, &mut stream, store.as_ref()).await?;
    *next_seq = stream.next_seq();
    for (incarnation, from) in &former {
        let fence = stream::fence(store.as_ref(), incarnation, *from, &shippers.incarnation).await?;
        check_end(engine, root, &known, incarnation, Some(&fence.by))?;
        crash::point("begin.fenced");
        for seq in *from..fence.seq {
            let (_, Round { edits, rows }) = stream::round(store.as_ref(), incarnation, seq).await?;
            engine.restore_all(rows).await?;
            engine.publish_all(root, edits).await?;
        }
        crash::point("begin.published");
        tracing::info!(storage = %root, objects = fence.seq - from, "ended the commit stream of a former process");
    }
    // All at the end, oldest first: whoever ended a stream is known as long as that stream is.
    for (incarnation, _) in &former {
        shippers.forget(root, incarnation)?;
        crash::point("begin.forgotten");
    }
    shippers.forget_stored_first(root)?;
    Ok(stream)
}

/// Stores the first object of `stream`, before anything is fenced or read back for it: another storage may be this place
/// in other words, and then only one of them gets its object there. On the own disk the first commit has to tell.
async fn take(
    engine: &Arc<Engine>,
    place: &Place,
    stream: &mut StreamWriter,
    store: &dyn ObjectStore,
) -> Result<(), BeginError> {
    let (root, own) = (&place.root, engine.shippers.incarnation.as_str());
    if stream.next_seq() > FIRST_SEQ {
        return Ok(());
    }
    if let Some(last) = stream::last(store, own).await?
        && !stream::is_fence(store, own, last).await?
    {
        return Err(ShipError::Shared(root.clone()).into());
    }
    // On disk before our first object, a fence included: the next process must know us by both.
    engine.shippers.note(root, own, FIRST_SEQ)?;
    crash::point("begin.noted");
    if !engine.storages.ships_rows(&engine.catalog.current(), root) {
        return Ok(());
    }
    let stored = ship::append_nothing(engine, place, stream).await;
    if matches!(stored, Err(ShipError::Shared(_))) {
        engine.shippers.forget(root, own)?;
    }
    stored?;
    crash::point("begin.taken");
    Ok(())
}

/// Whether the storage belongs to our instance; not if it belongs to nobody yet.
async fn is_held(engine: &Engine, root: &RootKey, store: &dyn ObjectStore) -> Result<bool, BeginError> {
    let (holder, founder) = (owners::holder(store).await?, engine.founder()?);
    match holder {
        Some(holder) if holder != founder => Err(not_ours(engine, root, &holder)),
        holder => Ok(holder.is_some()),
    }
}

/// Takes the storage, in which nothing is of ours. The home store knows of it before: from then on a new volume reads it
/// back. If we die in between, it finds nothing there.
async fn hold(engine: &Engine, place: &Place, store: &dyn ObjectStore) -> Result<(), BeginError> {
    let home = engine.users.home().ok_or("the home store is not known yet")?;
    owners::note_used(home.as_ref(), &place.root.used_name(&place.identity)).await?;
    crash::point("hold.noted");
    engine.note_rebuilt(&place.root)?;
    let founder = engine.founder()?;
    let holder = owners::hold(store, &founder).await?;
    crash::point("hold.held");
    if holder == founder { Ok(()) } else { Err(not_ours(engine, &place.root, &holder)) }
}

fn not_ours(engine: &Engine, root: &RootKey, holder: &str) -> BeginError {
    // Nothing of ours ever was there: nobody need wait for it.
    if let Err(error) = engine.note_rebuilt(root) {
        return error.into();
    }
    format!(
        "it belongs to another instance of KalamDB, which volume `{holder}` had first; declare another bucket or prefix, \
         or, if its data is of no use, delete `_cluster/` there"
    )
    .into()
}

/// When a process got its name, microseconds since 1970.
fn incarnation_us(name: &str) -> Option<i64> {
    let made = ulid::Ulid::from_string(&name.to_ascii_uppercase()).ok()?;
    i64::try_from(made.timestamp_ms()).ok()?.checked_mul(1_000)
}

/// Before the first use of a storage: a process that does not know this data folder may be at work there, or may have left
/// there what nobody else has. Streams that were ended are those of the past.
async fn check_unused(engine: &Arc<Engine>, store: &dyn ObjectStore) -> Result<(), BeginError> {
    for incarnation in stream::incarnations(store).await? {
        if engine.shippers.ran_here(&incarnation)? {
            continue;
        }
        let Some(last) = stream::last(store, &incarnation).await? else { continue };
        if !stream::is_fence(store, &incarnation, last).await? {
            return Err(format!(
                "it has the commit stream of process `{incarnation}`, which never ran on this data folder; declare another \
                 bucket or prefix, or, if its data is of no use, delete `_cluster/` there"
            )
            .into());
        }
    }
    Ok(())
}

/// Checks all that a stream holds beyond what is known here before anything is changed for it, and tells who ended it.
async fn look(
    engine: &Arc<Engine>,
    root: &RootKey,
    store: &dyn ObjectStore,
    incarnation: &str,
    from: u64,
) -> Result<Option<String>, BeginError> {
    let Some(last) = stream::last(store, incarnation).await? else { return Ok(None) };
    for seq in from..=last {
        let Some(object) = stream::read(store, incarnation, seq).await? else {
            let found =
                format!("object {seq} of the stream of process `{incarnation}` is deleted, and {last} is there");
            return Err(engine.older_copy(root, found).into());
        };
        match object.body {
            Body::Fence { by } => return Ok(Some(by)),
            Body::Round(round) => check(engine, root, round).await?,
            Body::Checkpoint { .. } => {}
        }
    }
    Ok(None)
}

/// Whoever ended a stream noted itself in its data folder before: a stranger did not run on this one.
fn check_end(
    engine: &Engine,
    root: &RootKey,
    known: &[(String, u64)],
    incarnation: &str,
    fenced_by: Option<&str>,
) -> Result<(), Disowned> {
    let Some(by) = fenced_by else { return Ok(()) };
    if by == engine.shippers.incarnation || known.iter().any(|(known, _)| known == by) {
        return Ok(());
    }
    let found = format!("the stream of process `{incarnation}` was ended by `{by}`, which never ran on this folder");
    Err(engine.older_copy(root, found))
}

async fn check(engine: &Arc<Engine>, root: &RootKey, round: Round) -> Result<(), BeginError> {
    let checking = Arc::clone(engine);
    let checked = tokio::task::spawn_blocking(move || {
        round.edits.iter().try_for_each(|edit| checking.check_covered(edit))?;
        round.rows.iter().try_for_each(|block| checking.check_buffered(block))
    });
    match checked.await? {
        Err(PublishError::Uncovered(found)) => Err(engine.older_copy(root, found).into()),
        other => Ok(other?),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kalamdb_model::StorageName;
    use kalamdb_test_support::pod::MANIFESTS;
    use object_store::memory::InMemory;

    use super::super::{Secrets, Storages, testing};
    use super::*;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_two_storages_that_begin_at_one_place_at_once_one_waits_and_the_pod_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        let manifests = MANIFESTS.replace("./files", &path("one")) + &testing::storage("other", &path("another"));
        let storages = Storages::new(dir.path().to_owned(), Secrets::default());
        let (engine, _) = testing::open(dir.path(), &manifests, storages);
        engine.follow_users(Arc::new(InMemory::new()));
        // Two that share a place are refused today.
        let mut catalog = engine.catalog.current().catalog.clone();
        let [local, other] = ["local", "other"].map(|name| StorageName::new(name).unwrap());
        let roots = catalog.storages[&local].roots.clone();
        catalog.storages.get_mut(&other).unwrap().roots = roots;
        engine.catalog.serve(catalog);
        let opening = [local, other].map(|storage| {
            let engine = Arc::clone(&engine);
            tokio::spawn(async move {
                let root = RootKey { storage, root: 1 };
                tokio::time::timeout(Duration::from_secs(3), engine.open_stream(&root)).await.is_ok_and(|it| it.is_ok())
            })
        });
        let mut opened = 0;
        for opening in opening {
            opened += u32::from(opening.await.unwrap());
        }
        assert_eq!((opened, engine.disowned()), (1, None));
        engine.close(Duration::from_secs(5)).await;
    }
}
