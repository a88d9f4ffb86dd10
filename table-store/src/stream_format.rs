//! The bytes of a commit-stream object, format 1.
//!
//! ```text
//! object  = "KDBS", format u16, header block, block…           (numbers little endian)
//! block   = type u8, length u32, crc32c u32, payload            (the checksum covers type, length and payload)
//! header  = type 0x01, JSON {incarnation, seq, nonce, atUs, blocks}    blocks = how many follow
//! edit    = type 0x02, JSON Edit
//! fence   = type 0x03, JSON {by}: the only block after the header; the stream ends here
//! rows    = type 0x04: reserved for rows of the write buffer (row WAL)
//! ```
//! A type with bit 0x80 is optional: a reader that does not know it skips it. It refuses every other type that it does
//! not know, `rows` included: what a block says must not get lost. `blocks` makes an object that was cut between two
//! blocks as damaged as one that was cut inside one.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::manifest::Edit;

/// The format that this build writes, and the newest that it reads.
pub const FORMAT: u16 = 1;

/// Largest payload of one block. An edit names a few files; far more than this is a fault, not data.
pub const BLOCK_BYTES_MAX: usize = 16 << 20;

const MAGIC: &[u8; 4] = b"KDBS";
const BLOCK_HEAD: usize = 9;
const HEADER: u8 = 0x01;
const EDIT: u8 = 0x02;
const FENCE: u8 = 0x03;
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

/// What an object says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// Commits, in their order.
    Edits(Vec<Edit>),
    /// The stream ends before this object.
    Fence {
        /// The incarnation that ended it.
        by: String,
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
    /// More than can be written.
    #[error("an edit of {0} bytes is larger than {BLOCK_BYTES_MAX}")]
    TooLarge(usize),
}

#[derive(Serialize, Deserialize)]
struct FencePayload {
    by: String,
}

impl StreamObject {
    /// The object with a header that counts the blocks of `body`.
    ///
    /// # Errors
    /// If there are more blocks than the header can count.
    pub fn new(incarnation: &str, seq: u64, nonce: String, at_us: i64, body: Body) -> Result<Self, FormatError> {
        let blocks = match &body {
            Body::Edits(edits) => u32::try_from(edits.len()).map_err(|_| FormatError::TooLarge(edits.len()))?,
            Body::Fence { .. } => 1,
        };
        Ok(Self { header: Header { incarnation: incarnation.to_owned(), seq, nonce, at_us, blocks }, body })
    }

    /// The object's bytes.
    ///
    /// # Errors
    /// If an edit is larger than [`BLOCK_BYTES_MAX`].
    pub fn encode(&self) -> Result<Vec<u8>, FormatError> {
        let mut out = MAGIC.to_vec();
        out.extend(FORMAT.to_le_bytes());
        push(&mut out, HEADER, &self.header)?;
        match &self.body {
            Body::Edits(edits) => edits.iter().try_for_each(|edit| push(&mut out, EDIT, edit))?,
            Body::Fence { by } => push(&mut out, FENCE, &FencePayload { by: by.clone() })?,
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
        let (mut edits, mut fence, mut count) = (Vec::new(), None, 0_u32);
        while let Some(block) = blocks.next()? {
            count = count.saturating_add(1);
            match block.kind {
                EDIT => edits.push(block.json()?),
                FENCE if fence.is_none() => fence = Some(block.json::<FencePayload>()?.by),
                HEADER | FENCE => return Err(FormatError::Order("one that stands once stands twice")),
                kind if kind & OPTIONAL != 0 => {}
                kind => return Err(FormatError::UnknownBlock { at: block.at, kind }),
            }
        }
        match fence {
            _ if count < header.blocks => Err(FormatError::Truncated { at: bytes.len() }),
            _ if count > header.blocks => Err(FormatError::Order("there are more than the header says")),
            Some(_) if !edits.is_empty() => Err(FormatError::Order("a fence stands beside edits")),
            Some(by) => Ok(Self { header, body: Body::Fence { by } }),
            None => Ok(Self { header, body: Body::Edits(edits) }),
        }
    }
}

fn push(out: &mut Vec<u8>, kind: u8, payload: &impl Serialize) -> Result<(), FormatError> {
    let payload = serde_json::to_vec(payload).map_err(|source| FormatError::Payload { at: out.len(), source })?;
    let length = u32::try_from(payload.len()).ok().filter(|_| payload.len() <= BLOCK_BYTES_MAX);
    let length = length.ok_or(FormatError::TooLarge(payload.len()))?;
    out.push(kind);
    out.extend(length.to_le_bytes());
    out.extend(checksum(kind, length, &payload).to_le_bytes());
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
        }
    }

    fn object(edits: Vec<Edit>) -> StreamObject {
        StreamObject::new("01J", 5, "nonce".into(), 1, Body::Edits(edits)).unwrap()
    }

    proptest! {
        #[test]
        fn an_object_reads_back(users in proptest::collection::vec("[a-zé]{1,9}", 0..6), files in 0..4_usize) {
            let object = object(users.iter().map(|user| edit(user, files)).collect());
            prop_assert_eq!(StreamObject::decode(&object.encode().unwrap()).unwrap(), object);
        }

        #[test]
        fn every_cut_is_noticed(edits in 0..3_usize, cut in 0.0..1.0_f64) {
            let bytes = object((0..edits).map(|_| edit("a", 1)).collect()).encode().unwrap();
            let length = (bytes.len() as f64 * cut) as usize;
            prop_assert!(StreamObject::decode(&bytes[..length]).is_err());
        }

        #[test]
        fn every_flipped_bit_is_noticed(at in 0..1_000_usize, bit in 0..8_u32) {
            let mut bytes = object(vec![edit("a", 1), edit("b", 2)]).encode().unwrap();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(StreamObject::decode(&bytes).is_err());
        }

        #[test]
        fn any_bytes_are_read_without_harm(bytes in any::<Vec<u8>>()) {
            let _ = StreamObject::decode(&bytes);
            let _ = StreamObject::decode(&[b"KDBS\x01\x00".as_slice(), &bytes].concat());
        }
    }

    fn with_block(kind: u8) -> Vec<u8> {
        let mut object = object(vec![edit("a", 0)]);
        object.header.blocks += 1;
        let mut bytes = object.encode().unwrap();
        push(&mut bytes, kind, &"anything").unwrap();
        bytes
    }

    #[test]
    fn unknown_blocks_are_skipped_only_if_they_say_so() {
        let edits = Body::Edits(vec![edit("a", 0)]);
        assert_eq!(StreamObject::decode(&with_block(0x84)).unwrap().body, edits);
        for kind in [0x04, 0x00, 0x7f] {
            assert!(matches!(StreamObject::decode(&with_block(kind)), Err(FormatError::UnknownBlock { .. })), "{kind}");
        }
    }

    #[test]
    fn blocks_that_do_not_belong_together_are_refused() {
        assert!(matches!(StreamObject::decode(&with_block(HEADER)), Err(FormatError::Order(_))));
        let mut beside = object(vec![edit("a", 0)]);
        beside.header.blocks += 1;
        let mut bytes = beside.encode().unwrap();
        push(&mut bytes, FENCE, &FencePayload { by: "x".into() }).unwrap();
        assert!(matches!(StreamObject::decode(&bytes), Err(FormatError::Order(_))));
        assert!(matches!(StreamObject::decode(b"KDBS\x02\x00"), Err(FormatError::Newer(2))));
        assert!(matches!(StreamObject::decode(b"PAR1"), Err(FormatError::Magic)));
    }
}
