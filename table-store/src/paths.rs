//! Every object path there is, and how a user id becomes part of one.
//!
//! Owns: the layout below a storage's root. Does not own: which storage ([`crate::store`]) or what is inside.
//!
//! A user id is written so that ids never meet on any disk: every byte outside `[a-z0-9._-]` is `%xx`, upper case too,
//! because some disks ignore case; a long id spans segments of at most 200 bytes, each but the last ending in `=`, so
//! that no user's folder lies inside another's. Paths are made with [`Path::parse`]; `Path::from` would encode `%` again.
//!
//! ```text
//! {root}/{template, user filled in}/{epoch:08x}-{flush seq:016x}-{ulid}.parquet
//! {root}/_cluster/stream/{incarnation}/{seq:020}.log
//! {root}/_cluster/holder.json
//! {home}/_cluster/used/{name of a storage's root, encoded like a user id}.json
//! {home}/_catalog/objects/{version:020}.json        one entry of the catalog log
//! {home}/_catalog/objects/snapshot-{version:020}.json
//! {home}/_catalog/users/{version:020}.json
//! {root}/_cluster/probe/{nonce}
//! ```

use kalamdb_model::catalog::Location;
use kalamdb_model::ids::{Owner, UserId};
use kalamdb_model::template;
use object_store::path::{Path, PathPart};

/// Longest segment of an encoded user id. File systems take 255 bytes; the rest is room for a backup tool's suffix.
pub const SEGMENT_BYTES_MAX: usize = 200;

/// First segments that no instance may use: KalamDB's own folders.
const RESERVED: [&str; 2] = [CLUSTER, "_catalog"];
/// The folder of KalamDB's own objects, which every used root has.
pub const CLUSTER: &str = "_cluster";

const ENTRIES: &str = "_catalog/objects";
const USED: &str = "_cluster/used";
const SNAPSHOT: &str = "snapshot-";

/// Why an instance has no path.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// A user's instance of a template without `{userId}`, or the shared instance of one with it.
    #[error("the path template `{template}` does not fit {owner}")]
    Template {
        /// The template.
        template: String,
        /// `a user's instance` or `a shared instance`.
        owner: &'static str,
    },
    /// The rendered path does not lead back to the same user, so it must not be used.
    #[error("the path template `{template}` does not keep users apart")]
    Ambiguous {
        /// The template.
        template: String,
    },
    /// The path would lie in a folder of KalamDB itself.
    #[error(
        "the path template `{template}` leads into `{folder}`, which is KalamDB's own; put a folder before `{{userId}}`"
    )]
    Reserved {
        /// The template.
        template: String,
        /// The folder.
        folder: &'static str,
    },
    /// The template holds something that no path can.
    #[error("the path template `{template}` is no path")]
    Invalid {
        /// The template.
        template: String,
        /// What is wrong.
        source: object_store::path::Error,
    },
}

/// The segments of `user` in a path, joined by `/`. One-to-one; see the module's text for the rule.
#[must_use]
pub fn encode_user(user: &UserId) -> String {
    encode(user.as_str())
}

fn encode(text: &str) -> String {
    let units: Vec<String> = text.bytes().map(encode_byte).collect();
    let mut segments = Vec::new();
    let mut rest = units.as_slice();
    while length(rest) > SEGMENT_BYTES_MAX {
        let (segment, after) = rest.split_at(cut(rest));
        segments.push(segment.concat() + "=");
        rest = after;
    }
    segments.push(rest.concat());
    segments.join("/")
}

/// The user whose [`encode_user`] is `encoded`. `None` for every other text, so two texts never mean one user.
#[must_use]
pub fn decode_user(encoded: &str) -> Option<UserId> {
    let user = UserId::new(decode_segments(encoded)?).ok()?;
    (encode_user(&user) == encoded).then_some(user)
}

/// Where the files of `owner`'s instance lie, relative to the storage's root: `location` with its user filled in.
///
/// # Errors
/// If template and owner do not fit, or if the result does not lead back to the same owner.
pub fn instance_prefix(location: &Location, owner: &Owner) -> Result<Path, PathError> {
    let template = || location.template.clone();
    let rendered = match owner {
        Owner::User(user) if location.template.matches(template::USER).count() == 1 => {
            location.template.replace(template::USER, &encode_user(user))
        }
        Owner::Shared if !location.template.contains(template::USER) => location.template.clone(),
        Owner::User(_) => return Err(PathError::Template { template: template(), owner: "a user's instance" }),
        Owner::Shared => return Err(PathError::Template { template: template(), owner: "a shared instance" }),
    };
    let path = Path::parse(&rendered).map_err(|source| PathError::Invalid { template: template(), source })?;
    if let Some(folder) = RESERVED.into_iter().find(|folder| path.parts().next().is_some_and(|p| p.as_ref() == *folder))
    {
        return Err(PathError::Reserved { template: template(), folder });
    }
    if owner_of_prefix(location, &path).as_ref() == Some(owner) {
        Ok(path)
    } else {
        Err(PathError::Ambiguous { template: template() })
    }
}

/// Whose instance lies at `prefix`: the reverse of [`instance_prefix`].
#[must_use]
pub fn owner_of_prefix(location: &Location, prefix: &Path) -> Option<Owner> {
    let Some((before, after)) = location.template.split_once(template::USER) else {
        return (prefix.as_ref() == location.template).then_some(Owner::Shared);
    };
    let whole_segments = (before.is_empty() || before.ends_with('/')) && (after.is_empty() || after.starts_with('/'));
    let encoded = prefix.as_ref().strip_prefix(before)?.strip_suffix(after)?;
    if whole_segments { decode_user(encoded).map(Owner::User) } else { None }
}

/// A new data file of the instance at `prefix`. The epoch keeps a former owner from ever overwriting the next one's
/// files; `ulid` is written in lower case, because some disks ignore case.
#[must_use]
pub fn data_file(prefix: &Path, epoch: u32, flush_seq: u64, ulid: &str) -> Path {
    child(prefix, &format!("{epoch:08x}-{flush_seq:016x}-{}.parquet", ulid.to_ascii_lowercase()))
}

/// When a [`data_file`] got its name, microseconds since 1970; `None` for other paths.
#[must_use]
pub fn data_file_made_us(path: &Path) -> Option<i64> {
    let mut parts = path.filename()?.strip_suffix(".parquet")?.split('-');
    let (epoch, seq, ulid) = (parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, digits: usize| text.len() == digits && text.bytes().all(|digit| digit.is_ascii_hexdigit());
    if !hex(epoch, 8) || !hex(seq, 16) || parts.next().is_some() {
        return None;
    }
    let made = ulid::Ulid::from_string(&ulid.to_ascii_uppercase()).ok()?;
    i64::try_from(made.timestamp_ms()).ok()?.checked_mul(1_000)
}

/// File name of what an outside reader needs to know.
pub const OUTSIDE_MANIFEST: &str = "_manifest.json";

/// What an outside reader needs to know of the data files at `prefix`.
#[must_use]
pub fn outside_manifest(prefix: &Path) -> Path {
    child(prefix, OUTSIDE_MANIFEST)
}

/// Object `seq` of the commit stream of `incarnation`, in each storage that it wrote to.
#[must_use]
pub fn stream_object(incarnation: &str, seq: u64) -> Path {
    child(&stream_prefix(incarnation), &format!("{seq:020}.log"))
}

/// The folder of one commit stream.
#[must_use]
pub fn stream_prefix(incarnation: &str) -> Path {
    Path::from_iter([CLUSTER, "stream", incarnation])
}

/// The folder of all commit streams of a storage.
#[must_use]
pub fn streams_prefix() -> Path {
    Path::from_iter([CLUSTER, "stream"])
}

/// The number of a [`stream_object`].
#[must_use]
pub fn stream_seq(path: &Path) -> Option<u64> {
    path.filename()?.strip_suffix(".log")?.parse().ok()
}

/// The folder of the checkpoints of one commit stream.
#[must_use]
pub fn checkpoints_prefix(incarnation: &str) -> Path {
    Path::from_iter([CLUSTER, "checkpoint", incarnation])
}

/// What says that a checkpoint is complete: it stands for all objects of the stream before `seq`. `attempt` tells it from
/// others of the same number.
#[must_use]
pub fn checkpoint(incarnation: &str, seq: u64, attempt: &str) -> Path {
    child(&checkpoints_prefix(incarnation), &format!("{seq:020}-{attempt}.log"))
}

/// A part of a checkpoint, counted from 0.
#[must_use]
pub fn checkpoint_part(incarnation: &str, seq: u64, attempt: &str, part: u32) -> Path {
    child(&child(&checkpoints_prefix(incarnation), &format!("{seq:020}-{attempt}")), &format!("{part:06}.log"))
}

/// Number and attempt of a [`checkpoint`]; `None` for a part.
#[must_use]
pub fn checkpoint_name(path: &Path) -> Option<(u64, String)> {
    let (seq, attempt) = path.filename()?.strip_suffix(".log")?.split_once('-')?;
    Some((seq.parse().ok()?, attempt.to_owned()))
}

/// The folder of the catalog log.
#[must_use]
pub fn catalog_prefix() -> Path {
    Path::from_iter(ENTRIES.split('/'))
}

/// Entry `version` of the catalog log.
#[must_use]
pub fn catalog_entry(version: u64) -> Path {
    child(&catalog_prefix(), &format!("{version:020}.json"))
}

/// The whole catalog after entry `version`.
#[must_use]
pub fn catalog_snapshot(version: u64) -> Path {
    child(&catalog_prefix(), &format!("{SNAPSHOT}{version:020}.json"))
}

/// The version of a [`catalog_entry`]; `None` for other paths.
#[must_use]
pub fn catalog_entry_version(path: &Path) -> Option<u64> {
    number(path, "").filter(|version| catalog_entry(*version) == *path)
}

/// The version of a [`catalog_snapshot`]; `None` for other paths.
#[must_use]
pub fn catalog_snapshot_version(path: &Path) -> Option<u64> {
    number(path, SNAPSHOT).filter(|version| catalog_snapshot(*version) == *path)
}

/// Entry `number` of the ownership log, in the home store: which volume serves the instance.
#[must_use]
pub fn owners_entry(number: u64) -> Path {
    child(&Path::from_iter([CLUSTER, "owners"]), &format!("{number:020}.json"))
}

/// What says, in a storage, which instance of KalamDB it belongs to.
#[must_use]
pub fn holder() -> Path {
    Path::from_iter([CLUSTER, "holder.json"])
}

/// The folder of [`used_entry`].
#[must_use]
pub fn used_prefix() -> Path {
    Path::from_iter(USED.split('/'))
}

/// What says, in the home store, that the storage root of this name is used.
///
/// # Panics
/// Never: encoded segments are a path.
#[must_use]
pub fn used_entry(name: &str) -> Path {
    Path::parse(format!("{USED}/{}.json", encode(name))).expect("encoded segments are a path")
}

/// The name of a [`used_entry`]; `None` for other paths.
#[must_use]
pub fn used_name(path: &Path) -> Option<String> {
    let encoded = path.as_ref().strip_prefix(USED)?.strip_prefix('/')?.strip_suffix(".json")?;
    decode_segments(encoded)
}

/// The folder of the log of users.
#[must_use]
pub fn users_prefix() -> Path {
    Path::from_iter(["_catalog", "users"])
}

/// Entry `version` of the log of users.
#[must_use]
pub fn users_entry(version: u64) -> Path {
    child(&users_prefix(), &format!("{version:020}.json"))
}

/// The version of a [`users_entry`]; `None` for other paths.
#[must_use]
pub fn users_entry_version(path: &Path) -> Option<u64> {
    number(path, "").filter(|version| users_entry(*version) == *path)
}

/// A small object that shows whether a storage can be used.
#[must_use]
pub fn probe_object(nonce: &str) -> Path {
    Path::from_iter([CLUSTER, "probe", nonce])
}

fn encode_byte(byte: u8) -> String {
    match byte {
        b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' => char::from(byte).to_string(),
        _ => format!("%{byte:02x}"),
    }
}

fn length(units: &[String]) -> usize {
    units.iter().map(String::len).sum()
}

/// How many units the next segment takes, its `=` included in the limit. One fewer where the last segment would
/// otherwise be `.` or `..`, which no path can hold.
fn cut(units: &[String]) -> usize {
    let mut bytes = 1;
    let fits = units.iter().take_while(|unit| {
        bytes += unit.len();
        bytes <= SEGMENT_BYTES_MAX
    });
    let count = fits.count();
    if matches!(units[count..].concat().as_str(), "." | "..") { count - 1 } else { count }
}

fn decode_segments(encoded: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(encoded.len());
    let mut segments = encoded.split('/').peekable();
    while let Some(segment) = segments.next() {
        let text = if segments.peek().is_some() { segment.strip_suffix('=')? } else { segment };
        decode_percent(text, &mut bytes)?;
    }
    String::from_utf8(bytes).ok()
}

fn decode_percent(text: &str, out: &mut Vec<u8>) -> Option<()> {
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let (high, low) = (char::from(bytes.next()?).to_digit(16)?, char::from(bytes.next()?).to_digit(16)?);
            out.push(u8::try_from(high * 16 + low).ok()?);
        } else {
            out.push(byte);
        }
    }
    Some(())
}

/// Appends one segment. `Path::join` leaves the segments before it as they are, and encodes in `name` what no path can
/// hold; the names made here have nothing to encode.
fn child(prefix: &Path, name: &str) -> Path {
    prefix.clone().join(PathPart::from(name))
}

fn number(path: &Path, before: &str) -> Option<u64> {
    path.filename()?.strip_prefix(before)?.strip_suffix(".json")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kalamdb_model::names::StorageName;
    use proptest::prelude::*;

    use super::*;

    fn user(id: &str) -> UserId {
        UserId::new(id).expect("valid user id")
    }

    fn location(template: &str) -> Location {
        Location { storage: StorageName::new("main").expect("valid"), root: 0, template: template.to_owned() }
    }

    /// Ids that were chosen to meet, on one disk or another.
    fn hard_ids() -> Vec<String> {
        let mut ids: Vec<String> = [
            "a",
            "A",
            "a/",
            "a/b",
            "a%2f",
            "a%2F",
            "a%",
            "%",
            "%2f",
            "/",
            "a=",
            "=",
            "a=/b",
            "==",
            "...",
            ".a",
            "é",
            "e\u{301}",
            "É",
            "👩‍👩‍👧‍👦",
            "🦀",
            "a b",
            "a\\b",
            "_cluster",
            "con",
            "~",
            "ß",
            "ı",
            "I",
            "i",
        ]
        .map(str::to_owned)
        .into();
        for dots in 1..4 {
            for letters in 195..=202 {
                ids.push("x".repeat(letters) + &".".repeat(dots));
            }
        }
        for letters in [1, 196, 197, 198, 199, 200, 201, 255, 256] {
            ids.extend(["y", "Y", "="].map(|letter| letter.repeat(letters)));
        }
        ids.push("é".repeat(128));
        ids.push("🦀".repeat(64));
        ids.push("y".repeat(199) + "=");
        ids.push("y".repeat(199) + "=/" + "y");
        ids.sort();
        ids.dedup();
        ids
    }

    #[test]
    fn encoded_ids_are_what_the_layout_promises() {
        assert_eq!(encode_user(&user("alice.b-c_9")), "alice.b-c_9");
        assert_eq!(encode_user(&user("A é/%")), "%41%20%c3%a9%2f%25");
        assert_eq!(encode_user(&user(&"y".repeat(200))), "y".repeat(200));
        assert_eq!(encode_user(&user(&"y".repeat(201))), format!("{}=/yy", "y".repeat(199)));
        assert_eq!(encode_user(&user(&("x".repeat(199) + ".."))), format!("{}=/x..", "x".repeat(198)));
    }

    #[test]
    fn ids_that_were_chosen_to_meet_stay_apart_on_every_disk() {
        let location = location("users/{userId}/app/messages");
        let mut seen: BTreeMap<String, String> = BTreeMap::new();
        for id in hard_ids() {
            let path = instance_prefix(&location, &Owner::User(user(&id))).expect("every id has a path");
            assert_eq!(owner_of_prefix(&location, &path), Some(Owner::User(user(&id))));
            assert!(path.parts().all(|part| part.as_ref().len() <= SEGMENT_BYTES_MAX), "{id}");
            let folded = path.as_ref().to_lowercase();
            assert_eq!(seen.insert(folded, id.clone()), None, "{id} meets another id");
        }
        let folders: Vec<Path> = hard_ids().iter().map(|id| Path::parse(encode_user(&user(id))).unwrap()).collect();
        for (at, a) in folders.iter().enumerate() {
            for (other, b) in folders.iter().enumerate() {
                assert_eq!(a.prefix_matches(b), at == other, "{a} lies in {b}");
            }
        }
    }

    fn any_id() -> impl Strategy<Value = String> {
        let wild = "\\PC{1,64}".prop_map(|s| s);
        let long = proptest::collection::vec("[a-zA-Z./%=é_-]", 1..256).prop_map(|v| v.concat());
        let tail = ("[xX]{190,203}", "[./=%x]{0,6}").prop_map(|(a, b)| a + &b);
        prop_oneof![wild, long, tail]
    }

    proptest! {
        #[test]
        fn an_encoded_user_decodes_to_the_same_user(id in any_id()) {
            prop_assume!(UserId::new(id.clone()).is_ok());
            let encoded = encode_user(&user(&id));
            prop_assert_eq!(decode_user(&encoded), Some(user(&id)));
            prop_assert!(Path::parse(&encoded).is_ok());
            for segment in encoded.split('/') {
                prop_assert!(!segment.is_empty() && segment.len() <= SEGMENT_BYTES_MAX);
                prop_assert!(segment.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-' | b'%' | b'=')));
            }
        }

        #[test]
        fn no_user_lies_in_the_folder_of_another(a in any_id(), b in any_id()) {
            prop_assume!(a != b && UserId::new(a.clone()).is_ok() && UserId::new(b.clone()).is_ok());
            let (x, y) = (encode_user(&user(&a)), encode_user(&user(&b)));
            let lies_in = (x + "/").to_lowercase().starts_with(&(y + "/").to_lowercase());
            prop_assert!(!lies_in);
        }

        #[test]
        fn a_text_that_is_not_an_encoding_means_nobody(text in "[a-cA-C%0-9=/.]{0,12}") {
            if let Some(user) = decode_user(&text) {
                prop_assert_eq!(encode_user(&user), text);
            }
        }
    }

    #[test]
    fn a_template_that_does_not_fit_its_owner_is_refused() {
        let alice = Owner::User(user("alice"));
        assert!(matches!(instance_prefix(&location("shared/app/x"), &alice), Err(PathError::Template { .. })));
        assert!(matches!(instance_prefix(&location("u/{userId}"), &Owner::Shared), Err(PathError::Template { .. })));
        assert!(matches!(instance_prefix(&location("u-{userId}/x"), &alice), Err(PathError::Ambiguous { .. })));
        let cluster = Owner::User(user("_cluster"));
        assert!(matches!(instance_prefix(&location("{userId}/x"), &cluster), Err(PathError::Reserved { .. })));
        assert!(instance_prefix(&location("users/{userId}/x"), &cluster).is_ok());
        assert_eq!(instance_prefix(&location("shared/app/x"), &Owner::Shared).unwrap().as_ref(), "shared/app/x");
    }

    #[test]
    fn objects_lie_where_stored_data_has_them() {
        let prefix = instance_prefix(&location("users/{userId}/app/t"), &Owner::User(user("Ann"))).unwrap();
        let file = data_file(&prefix, 7, 255, "01JARZ3NDEKTSV4RRFFQ69G5FAV");
        assert_eq!(file.as_ref(), "users/%41nn/app/t/00000007-00000000000000ff-01jarz3ndektsv4rrffq69g5fav.parquet");
        assert_eq!(stream_object("01JAB", 3).as_ref(), "_cluster/stream/01JAB/00000000000000000003.log");
        assert_eq!(stream_seq(&stream_object("01JAB", 3)), Some(3));
        assert_eq!(
            checkpoint_part("01JAB", 3, "9f", 1).as_ref(),
            "_cluster/checkpoint/01JAB/00000000000000000003-9f/000001.log"
        );
        assert_eq!(checkpoint_name(&checkpoint("01JAB", 3, "9f")), Some((3, "9f".to_owned())));
        assert_eq!(checkpoint_name(&checkpoint_part("01JAB", 3, "9f", 1)), None);
        assert_eq!(catalog_entry(64).as_ref(), "_catalog/objects/00000000000000000064.json");
        assert_eq!(catalog_snapshot(64).as_ref(), "_catalog/objects/snapshot-00000000000000000064.json");
        assert_eq!(users_entry(1).as_ref(), "_catalog/users/00000000000000000001.json");
        assert_eq!(holder().as_ref(), "_cluster/holder.json");
        assert_eq!(used_entry("eu.1/s3:b/p").as_ref(), "_cluster/used/eu.1%2fs3%3ab%2fp.json");
        for name in ["eu.1/s3:b/p".to_owned(), format!("a.2/file:/{}", "Ä/".repeat(300))] {
            assert_eq!(used_name(&used_entry(&name)), Some(name));
        }
        assert_eq!(used_name(&holder()), None);
        assert_eq!(catalog_entry_version(&catalog_entry(u64::MAX)), Some(u64::MAX));
        assert_eq!(catalog_entry_version(&catalog_snapshot(9)), None);
        assert_eq!(catalog_snapshot_version(&catalog_snapshot(9)), Some(9));
    }
}
