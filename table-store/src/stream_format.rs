//! The bytes of a commit-stream object, format 1.
//!
//! ```text
//! object  = "KDBS", format u16, header block, block…           (numbers little endian)
//! block   = type u8, length u32, crc32c u32, payload            (the checksum covers type, length and payload)
//! header  = type 0x01, JSON {incarnation, seq, nonce, atUs, blocks}    blocks = how many follow
//! edit    = type 0x02, JSON Edit
//! fence   = type 0x03, JSON {by}: the only block after the header; the stream ends here
//! rows    = type 0x04, [acknowledged u8][instance length u32][instance JSON][row]…
//! row     = [key length u32][key][value length u32][value]      as the write buffer stores them: memcomparable, binary
//! parts   = type 0x05, JSON {parts}: the only block after the header; a checkpoint is complete, and has so many objects
//! ```
//! A type with bit 0x80 is optional: a reader that does not know it skips it. It refuses every other type that it does
//! not know: what a block says must not get lost. `blocks` makes an object that was cut between two blocks as damaged as
//! one that was cut inside one.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use kalamdb_model::InstanceId;

use crate::manifest::Edit;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u16 = 1;

/// Largest payload of one block: the rows of one statement; far more than this is a fault, not data.
pub const BLOCK_BYTES_MAX: usize = 128 << 20;

const MAGIC: &[u8; 4] = b"KDBS";
const BLOCK_HEAD: usize = 9;
const HEADER: u8 = 0x01;
const EDIT: u8 = 0x02;
const FENCE: u8 = 0x03;
const ROWS: u8 = 0x04;
const PARTS: u8 = 0x05;
const OPTIONAL: u8 = 0x80;

/// Who wrote an object, and as which.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Header {
    /// Whose stream this is: one process start of one pod.
    pub incarnation: String,
    /// Number in the stream; equals the one in the path.
    pub seq: u64,
    /// Random: what makes the bytes this writer's own.
    pub nonce: String,
    /// When, microseconds since 1970; for people.
    pub at_us: i64,
    /// Blocks after this one.
    pub blocks: u32,
}

/// Rows of one instance, as the write buffer stores them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowBlock {
    /// Whose.
    pub instance: InstanceId,
    /// Whether they were in the write buffer before the object was written. If not, they were acknowledged, if at all,
    /// because of it.
    pub buffered: bool,
    /// Primary key and value, stamped. A deleted row is a value like any other.
    pub rows: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What one object commits.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Round {
    /// Flushes and compactions, in their order.
    pub edits: Vec<Edit>,
    /// Rows that are in no file yet, a block for each statement.
    pub rows: Vec<RowBlock>,
}

/// What an object says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Commits.
    Round(Round),
    /// The stream ends before this object.
    Fence {
        /// The incarnation that ended it.
        by: String,
    },
    /// A checkpoint is complete.
    Checkpoint {
        /// Objects that it consists of.
        parts: u32,
    },
}

/// A decoded object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamObject {
    /// Who wrote it.
    pub header: Header,
    /// What it says.
    pub body: Body,
}

/// Why bytes are no object of a commit stream.
#[derive(Debug, thiserror::Error)]
pub enum FormatError {
    /// Other bytes altogether.
    #[error("it does not begin with `KDBS`")]
    Magic,
    /// From a later version of KalamDB.
    #[error("it has format {0}, this version reads {FORMAT}; upgrade KalamDB")]
    Newer(u16),
    /// The end is missing.
    #[error("it is cut off after {at} bytes")]
    Truncated {
        /// Where.
        at: usize,
    },
    /// A block is not what was written.
    #[error("the checksum of the block at byte {at} is wrong")]
    Checksum {
        /// Where the block begins.
        at: usize,
    },
    /// A block that must be understood and is not.
    #[error("the block at byte {at} has type {kind:#04x}, which this version does not know; upgrade KalamDB")]
    UnknownBlock {
        /// Where the block begins.
        at: usize,
        /// Its type.
        kind: u8,
    },
    /// Blocks that do not belong together.
    #[error("its blocks are out of order: {0}")]
    Order(&'static str),
    /// A payload is not the JSON that it should be.
    #[error("the payload of the block at byte {at} is damaged")]
    Payload {
        /// Where the block begins.
        at: usize,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The lengths within a block of rows do not add up.
    #[error("the block of rows at byte {at} is damaged")]
    Rows {
        /// Where the block begins.
        at: usize,
    },
    /// More than can be written.
    #[error("a block of {0} bytes is larger than {BLOCK_BYTES_MAX}")]
    TooLarge(usize),
}

#[derive(Serialize, Deserialize)]
struct FencePayload {
    by: String,
}

#[derive(Serialize, Deserialize)]
struct PartsPayload {
    parts: u32,
}

impl StreamObject {
    /// The object with a header that counts the blocks of `body`.
    ///
    /// # Errors
    /// If there are more blocks than the header can count.
    pub fn new(incarnation: &str, seq: u64, nonce: String, at_us: i64, body: Body) -> Result<Self, FormatError> {
        let count = match &body {
            Body::Round(round) => round.edits.len() + round.rows.len(),
            Body::Fence { .. } | Body::Checkpoint { .. } => 1,
        };
        let blocks = u32::try_from(count).map_err(|_| FormatError::TooLarge(count))?;
        Ok(Self { header: Header { incarnation: incarnation.to_owned(), seq, nonce, at_us, blocks }, body })
    }

    /// The object's bytes.
    ///
    /// # Errors
    /// If an edit or the rows of a statement are larger than [`BLOCK_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT.to_le_bytes());
        push_json(&mut out, HEADER, &self.header)?;
        match &self.body {
            Body::Round(round) => {
                round.edits.iter().try_for_each(|edit| push_json(&mut out, EDIT, edit))?;
                round.rows.iter().try_for_each(|block| push(&mut out, ROWS, &encode_rows(block)?))?;
            }
            Body::Fence { by } => push_json(&mut out, FENCE, &FencePayload { by: by.clone() })?,
            Body::Checkpoint { parts } => push_json(&mut out, PARTS, &PartsPayload { parts: *parts })?,
        }
        Ok(out)
    }

    /// Reads [`StreamObject::encode`].
    ///
    /// # Errors
    /// Says what is wrong; nothing is skipped but unknown blocks that say they may be.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut blocks = Blocks::open(bytes)?;
        let first = blocks.next()?.ok_or(FormatError::Truncated { at: bytes.len() })?;
        if first.kind != HEADER {
            return Err(FormatError::Order("the first is no header"));
        }
        let header: Header = first.json()?;
        let (mut round, mut alone, mut count) = (Round::default(), None, 0_u32);
        while let Some(block) = blocks.next()? {
            count = count.saturating_add(1);
            match block.kind {
                EDIT => round.edits.push(block.json()?),
                ROWS => round.rows.push(decode_rows(&block)?),
                FENCE if alone.is_none() => alone = Some(Body::Fence { by: block.json::<FencePayload>()?.by }),
                PARTS if alone.is_none() => {
                    alone = Some(Body::Checkpoint { parts: block.json::<PartsPayload>()?.parts });
                }
                HEADER | FENCE | PARTS => return Err(FormatError::Order("one that stands once stands twice")),
                kind if kind & OPTIONAL != 0 => {}
                kind => return Err(FormatError::UnknownBlock { at: block.at, kind }),
            }
        }
        match alone {
            _ if count < header.blocks => Err(FormatError::Truncated { at: bytes.len() }),
            _ if count > header.blocks => Err(FormatError::Order("there are more than the header says")),
            Some(_) if round != Round::default() => {
                Err(FormatError::Order("one that stands alone stands beside others"))
            }
            Some(body) => Ok(Self { header, body }),
            None => Ok(Self { header, body: Body::Round(round) }),
        }
    }
}

fn encode_rows(block: &RowBlock) -> Result<Vec<u8>, FormatError> {
    let instance = serde_json::to_vec(&block.instance).map_err(|source| FormatError::Payload { at: 0, source })?;
    let mut out = vec![u8::from(block.buffered)];
    let texts = block.rows.iter().flat_map(|(key, value)| [key, value]);
    for text in std::iter::once(&instance).chain(texts) {
        let length = u32::try_from(text.len()).map_err(|_| FormatError::TooLarge(text.len()))?;
        out.extend(length.to_le_bytes());
        out.extend(text);
    }
    Ok(out)
}

fn decode_rows(block: &Block<'_>) -> Result<RowBlock, FormatError> {
    let damaged = || FormatError::Rows { at: block.at };
    let (buffered, mut rest) = match block.payload.split_first() {
        Some((0, rest)) => (false, rest),
        Some((1, rest)) => (true, rest),
        _ => return Err(damaged()),
    };
    let mut text = || {
        let (length, after) = rest.split_first_chunk()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (text, after) = after.split_at_checked(length)?;
        rest = after;
        Some((text, rest.is_empty()))
    };
    let (instance, mut end) = text().ok_or_else(damaged)?;
    let instance = serde_json::from_slice(instance).map_err(|source| FormatError::Payload { at: block.at, source })?;
    let mut rows = Vec::new();
    while !end {
        let (key, _) = text().ok_or_else(damaged)?;
        let (value, last) = text().ok_or_else(damaged)?;
        rows.push((key.to_vec(), value.to_vec()));
        end = last;
    }
    Ok(RowBlock { instance, buffered, rows })
}

fn push_json(out: &mut Vec<u8>, kind: u8, payload: &impl Serialize) -> Result<(), FormatError> {
    let payload = serde_json::to_vec(payload).map_err(|source| FormatError::Payload { at: out.len(), source })?;
    push(out, kind, &payload)
}

fn push(out: &mut Vec<u8>, kind: u8, payload: &[u8]) -> Result<(), FormatError> {
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= BLOCK_BYTES_MAX);
    let length = length.ok_or(FormatError::TooLarge(payload.len()))?;
    out.push(kind);
    out.extend(length.to_le_bytes());
    out.extend(checksum(kind, length, payload).to_le_bytes());
    out.extend(payload);
    Ok(())
}

fn checksum(kind: u8, length: u32, payload: &[u8]) -> u32 {
    let head = crc32c::crc32c_append(crc32c::crc32c(&[kind]), &length.to_le_bytes());
    crc32c::crc32c_append(head, payload)
}

struct Block<'a> {
    at: usize,
    kind: u8,
    payload: &'a [u8],
}

impl Block<'_> {
    fn json<T: DeserializeOwned>(&self) -> Result<T, FormatError> {
        serde_json::from_slice(self.payload).map_err(|source| FormatError::Payload { at: self.at, source })
    }
}

struct Blocks<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Blocks<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let rest = bytes.strip_prefix(MAGIC).ok_or(FormatError::Magic)?;
        let format = rest.first_chunk().ok_or(FormatError::Truncated { at: bytes.len() })?;
        match u16::from_le_bytes(*format) {
            FORMAT => Ok(Self { bytes, at: MAGIC.len() + 2 }),
            other => Err(FormatError::Newer(other)),
        }
    }

    fn next(&mut self) -> Result<Option<Block<'a>>, FormatError> {
        let (at, rest) = (self.at, &self.bytes[self.at..]);
        if rest.is_empty() {
            return Ok(None);
        }
        let truncated = FormatError::Truncated { at: self.bytes.len() };
        let Some(&[kind, l0, l1, l2, l3, c0, c1, c2, c3]) = rest.first_chunk::<BLOCK_HEAD>() else {
            return Err(truncated);
        };
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let payload = usize::try_from(length).ok().and_then(|length| rest[BLOCK_HEAD..].get(..length));
        let payload = payload.ok_or(truncated)?;
        if checksum(kind, length, payload) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(FormatError::Checksum { at });
        }
        self.at += BLOCK_HEAD + payload.len();
        Ok(Some(Block { at, kind, payload }))
    }
}

#[cfg(test)]
mod tests {
    use kalamdb_model::ids::{Generation, InstanceId, TableId, UserId};
    use proptest::prelude::*;

    use super::*;

    fn edit(user: &str, files: usize) -> Edit {
        Edit {
            instance: InstanceId::of_user(UserId::new(user).unwrap(), TableId(7)),
            generation: Generation(3),
            last_seq: 99,
            add: Vec::new(),
            remove: (0..files).map(|n| format!("old/{n}")).collect(),
            replace: std::collections::BTreeMap::new(),
            placed: None,
        }
    }

    fn object(edits: Vec<Edit>) -> StreamObject {
        with_rows(edits, Vec::new())
    }

    fn with_rows(edits: Vec<Edit>, rows: Vec<RowBlock>) -> StreamObject {
        StreamObject::new("01J", 5, "nonce".into(), 1, Body::Round(Round { edits, rows })).unwrap()
    }

    fn block(user: &str, buffered: bool, rows: Vec<(Vec<u8>, Vec<u8>)>) -> RowBlock {
        RowBlock { instance: InstanceId::of_user(UserId::new(user).unwrap(), TableId(7)), buffered, rows }
    }

    proptest! {
        #[test]
        fn an_object_reads_back(
            users in proptest::collection::vec("[a-zé]{1,9}", 0..6),
            files in 0..4_usize,
            rows in proptest::collection::vec(any::<(Vec<u8>, Vec<u8>)>(), 0..4),
            buffered in any::<bool>(),
        ) {
            let blocks = users.iter().map(|user| block(user, buffered, rows.clone())).collect();
            let object = with_rows(users.iter().map(|user| edit(user, files)).collect(), blocks);
            prop_assert_eq!(StreamObject::decode(&object.encode().unwrap()).unwrap(), object);
        }

        #[test]
        fn every_cut_is_noticed(edits in 0..3_usize, cut in 0.0..1.0_f64) {
            let rows = vec![block("a", true, vec![(b"k".to_vec(), b"v".to_vec())])];
            let bytes = with_rows((0..edits).map(|_| edit("a", 1)).collect(), rows).encode().unwrap();
            let length = (bytes.len() as f64 * cut) as usize;
            prop_assert!(StreamObject::decode(&bytes[..length]).is_err());
        }

        #[test]
        fn every_flipped_bit_is_noticed(at in 0..1_000_usize, bit in 0..8_u32) {
            let rows = vec![block("a", false, vec![(b"k".to_vec(), b"v".to_vec())])];
            let mut bytes = with_rows(vec![edit("a", 1), edit("b", 2)], rows).encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(StreamObject::decode(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in any::<Vec<u8>>()) {
            let _ = StreamObject::decode(&bytes);
            let _ = StreamObject::decode(&[b"KDBS\x01\x00".as_slice(), &bytes].concat());
            let mut object = object(Vec::new());
            object.header.blocks = 1;
            let mut whole = object.encode().unwrap();
            push(&mut whole, ROWS, &bytes).unwrap();
            let _ = StreamObject::decode(&whole);
        }
    }

    fn with_block(kind: u8) -> Vec<u8> {
        let mut object = object(vec![edit("a", 0)]);
        object.header.blocks += 1;
        let mut bytes = object.encode().unwrap();
        push(&mut bytes, kind, b"anything").unwrap();
        bytes
    }

    #[test]
    fn unknown_blocks_are_skipped_only_if_they_say_so() {
        let edits = object(vec![edit("a", 0)]).body;
        assert_eq!(StreamObject::decode(&with_block(0x84)).unwrap().body, edits);
        for kind in [0x06, 0x00, 0x7f] {
            assert!(matches!(StreamObject::decode(&with_block(kind)), Err(FormatError::UnknownBlock { .. })), "{kind}");
        }
    }

    #[test]
    fn blocks_that_do_not_belong_together_are_refused() {
        assert!(matches!(StreamObject::decode(&with_block(HEADER)), Err(FormatError::Order(_))));
        let mut beside = object(vec![edit("a", 0)]);
        beside.header.blocks += 1;
        let mut bytes = beside.encode().unwrap();
        push_json(&mut bytes, FENCE, &FencePayload { by: "x".into() }).unwrap();
        assert!(matches!(StreamObject::decode(&bytes), Err(FormatError::Order(_))));
        let mut rows = with_rows(Vec::new(), vec![block("a", true, Vec::new())]);
        rows.header.blocks += 1;
        let mut bytes = rows.encode().unwrap();
        push_json(&mut bytes, PARTS, &PartsPayload { parts: 1 }).unwrap();
        assert!(matches!(StreamObject::decode(&bytes), Err(FormatError::Order(_))));
        assert!(matches!(StreamObject::decode(b"KDBS\x02\x00"), Err(FormatError::Newer(2))));
        assert!(matches!(StreamObject::decode(b"PAR1"), Err(FormatError::Magic)));
    }
}
