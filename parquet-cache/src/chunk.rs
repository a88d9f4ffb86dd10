//! What is cached: pieces of data files, and how they look on disk.
//!
//! A chunk on disk carries a checksum of its bytes and of its place. foyer verifies key and value as one text; where the
//! one ends and the other begins is not verified, so that a flipped bit of a length would move bytes between them.

use std::io::{Read, Write};
use std::sync::Arc;

use bytes::Bytes;
use foyer::{Code, Error, ErrorKind};
use object_store::path::Path;

/// Bytes of a chunk; the last of a file has fewer. Files of at most so many are one chunk, and one request.
pub const CHUNK_BYTES: u64 = 512 << 10;

/// Longest root or path that is read back from disk.
const TEXT_BYTES_MAX: u32 = 16 << 10;

/// Only these are immutable and never written twice.
pub(crate) fn is_data_file(path: &Path) -> bool {
    path.as_ref().ends_with(".parquet")
}

/// Which chunk of which file in which storage root.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) root: Arc<str>,
    pub(crate) path: Arc<str>,
    pub(crate) chunk: u32,
}

impl Key {
    /// What it takes in memory, about: the texts are shared between the chunks of a file, the entry around it is not.
    pub(crate) fn bytes(&self) -> usize {
        256 + self.path.len()
    }
}

/// Some bytes of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    /// Which of the file, from 0.
    pub(crate) number: u32,
    /// Size of the whole file.
    pub(crate) file_bytes: u64,
    pub(crate) bytes: Bytes,
}

impl Chunk {
    /// The chunks in `bytes`, which begin with chunk `first` of a file of `file_bytes`. Each has memory of its own: one
    /// that is evicted must not be held by its neighbours.
    pub(crate) fn split(bytes: &Bytes, first: u32, file_bytes: u64) -> impl Iterator<Item = Self> {
        bytes.chunks(CHUNK_BYTES as usize).zip(first..).map(move |(piece, number)| Self {
            number,
            file_bytes,
            bytes: Bytes::copy_from_slice(piece),
        })
    }

    /// Bytes that chunk `number` of a file of `file_bytes` has.
    pub(crate) fn length(number: u32, file_bytes: u64) -> u64 {
        file_bytes.saturating_sub(u64::from(number) * CHUNK_BYTES).min(CHUNK_BYTES)
    }

    fn checksum(&self) -> u32 {
        let place = [self.file_bytes.to_le_bytes().as_slice(), &self.number.to_le_bytes()].concat();
        crc32c::crc32c_append(crc32c::crc32c(&place), &self.bytes)
    }
}

impl Code for Key {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        write_text(writer, &self.root)?;
        write_text(writer, &self.path)?;
        write(writer, &self.chunk.to_le_bytes())
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let (root, path) = (read_text(reader)?, read_text(reader)?);
        Ok(Self { root, path, chunk: u32::from_le_bytes(read(reader)?) })
    }

    fn estimated_size(&self) -> usize {
        12 + self.root.len() + self.path.len()
    }
}

impl Code for Chunk {
    fn encode(&self, writer: &mut impl Write) -> foyer::Result<()> {
        write(writer, &self.checksum().to_le_bytes())?;
        write(writer, &self.file_bytes.to_le_bytes())?;
        write(writer, &self.number.to_le_bytes())?;
        write(writer, &self.bytes)
    }

    fn decode(reader: &mut impl Read) -> foyer::Result<Self> {
        let checksum = u32::from_le_bytes(read(reader)?);
        let (file_bytes, number) = (u64::from_le_bytes(read(reader)?), u32::from_le_bytes(read(reader)?));
        let mut bytes = Vec::new();
        // One more than there may be: an end that was moved is seen.
        reader.take(CHUNK_BYTES + 1).read_to_end(&mut bytes).map_err(damaged)?;
        let chunk = Self { number, file_bytes, bytes: bytes.into() };
        let whole = chunk.bytes.len() as u64 == Self::length(number, file_bytes) && chunk.checksum() == checksum;
        if whole { Ok(chunk) } else { Err(damaged("a chunk is other than it was written")) }
    }

    fn estimated_size(&self) -> usize {
        16 + self.bytes.len()
    }
}

fn write(writer: &mut impl Write, bytes: &[u8]) -> foyer::Result<()> {
    writer.write_all(bytes).map_err(Error::io_error)
}

fn write_text(writer: &mut impl Write, text: &str) -> foyer::Result<()> {
    let length = u32::try_from(text.len()).unwrap_or(u32::MAX);
    if length > TEXT_BYTES_MAX {
        return Err(damaged("a path is too long for the cache"));
    }
    write(writer, &length.to_le_bytes())?;
    write(writer, text.as_bytes())
}

fn read<const N: usize>(reader: &mut impl Read) -> foyer::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes).map_err(damaged)?;
    Ok(bytes)
}

fn read_text(reader: &mut impl Read) -> foyer::Result<Arc<str>> {
    let length = u32::from_le_bytes(read(reader)?);
    if length > TEXT_BYTES_MAX {
        return Err(damaged("a length is damaged"));
    }
    let mut bytes = vec![0; length as usize];
    reader.read_exact(&mut bytes).map_err(damaged)?;
    String::from_utf8(bytes).map(Into::into).map_err(damaged)
}

/// What foyer takes as "not there", and forgets.
fn damaged(why: impl ToString) -> Error {
    Error::new(ErrorKind::ChecksumMismatch, why.to_string())
}
