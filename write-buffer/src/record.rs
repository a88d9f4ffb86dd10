//! What is stored about an instance beside its rows, in two parts because two threads write them:
//!
//! - *progress*, by the committer when it freezes: `[format u8 = 1][active u32][last _seq i64]`
//! - *publication*, by whoever flushed: `[format u8 = 1][flushed u32][last _seq i64][manifest]`
//!
//! All little endian. The last `_seq` is in both, because after a flush no row is left to tell it. Read the publication
//! first: then `flushed < active` holds for whatever pair is seen.

use kalamdb_model::Generation;

/// The state of an instance that was ever frozen or published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Rows of generations up to this are in files.
    pub flushed: Generation,
    /// Takes rows. Generations between `flushed` and this are frozen and not published.
    pub active: Generation,
    /// No `_seq` up to this is given again.
    pub last_seq: i64,
    /// As it was published; empty before the first time.
    pub manifest: Vec<u8>,
}

impl Default for Record {
    fn default() -> Self {
        Self { flushed: Generation(0), active: Generation(1), last_seq: 0, manifest: Vec::new() }
    }
}

/// Why a stored record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// Ends within its fixed part.
    #[error("it ends too early")]
    Short,
    /// Written by another version.
    #[error("it has format {0}, this version reads {FORMAT}")]
    Format(u8),
    /// No generation follows the flushed one.
    #[error("no generation is left")]
    Generation,
}

const FORMAT: u8 = 1;

/// Which part, as the last byte of its key: `[instance prefix][part]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Part {
    Progress = 0,
    Publication = 1,
}

pub(crate) fn key(instance_prefix: &[u8], part: Part) -> Vec<u8> {
    let mut key = Vec::with_capacity(instance_prefix.len() + 1);
    key.extend(instance_prefix);
    key.push(part as u8);
    key
}

/// Encodes either part; a progress has no manifest.
pub(crate) fn encode(generation: Generation, last_seq: i64, manifest: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(13 + manifest.len());
    bytes.push(FORMAT);
    bytes.extend(generation.0.to_le_bytes());
    bytes.extend(last_seq.to_le_bytes());
    bytes.extend(manifest);
    bytes
}

/// Puts the parts together; `None` if neither is stored.
pub(crate) fn decode(publication: Option<&[u8]>, progress: Option<&[u8]>) -> Result<Option<Record>, RecordError> {
    if publication.is_none() && progress.is_none() {
        return Ok(None);
    }
    let mut record = Record::default();
    if let Some(bytes) = publication {
        let (flushed, last_seq, manifest) = parse(bytes)?;
        record.flushed = flushed;
        record.active = Generation(flushed.0.checked_add(1).ok_or(RecordError::Generation)?);
        record.last_seq = last_seq;
        record.manifest = manifest.to_vec();
    }
    if let Some(bytes) = progress {
        let (active, last_seq, _) = parse(bytes)?;
        record.active = record.active.max(active);
        record.last_seq = record.last_seq.max(last_seq);
    }
    Ok(Some(record))
}

fn parse(bytes: &[u8]) -> Result<(Generation, i64, &[u8]), RecordError> {
    let (format, rest) = bytes.split_first().ok_or(RecordError::Short)?;
    if *format != FORMAT {
        return Err(RecordError::Format(*format));
    }
    let (generation, rest) = rest.split_first_chunk().ok_or(RecordError::Short)?;
    let (last_seq, manifest) = rest.split_first_chunk().ok_or(RecordError::Short)?;
    Ok((Generation(u32::from_le_bytes(*generation)), i64::from_le_bytes(*last_seq), manifest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A progress and a publication of format 1; must decode for as long as any version reads format 1.
    const SAMPLE: &str = include_str!("../tests/it/record-format-1.hex");

    fn from_hex(digits: &str) -> Vec<u8> {
        let byte = |at| u8::from_str_radix(&digits[at..at + 2], 16).expect("two digits");
        (0..digits.len()).step_by(2).map(byte).collect()
    }

    #[test]
    fn the_stored_sample_of_format_1_decodes_and_is_still_what_is_written() {
        let lines: Vec<&str> = SAMPLE.lines().collect();
        let to_hex = |bytes: Vec<u8>| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let manifest = br#"{"format":1,"files":[]}"#;
        let expected = Record {
            flushed: Generation(4),
            active: Generation(6),
            last_seq: 1_732_000_000_000_060,
            manifest: manifest.to_vec(),
        };
        let (progress, publication) = (from_hex(lines[0]), from_hex(lines[1]));
        assert_eq!(decode(Some(&publication), Some(&progress)), Ok(Some(expected)));
        let written = [
            to_hex(encode(Generation(6), 1_732_000_000_000_060, b"")),
            to_hex(encode(Generation(4), 1_732_000_000_000_040, manifest)),
        ];
        assert_eq!(written[..], lines, "what is written changed: that needs a new format");
    }

    #[test]
    fn both_parts_make_one_record() {
        let publication = encode(Generation(4), 40, b"files");
        let progress = encode(Generation(6), 60, b"");
        let record = decode(Some(&publication), Some(&progress)).expect("valid").expect("stored");
        let expected =
            Record { flushed: Generation(4), active: Generation(6), last_seq: 60, manifest: b"files".to_vec() };
        assert_eq!(record, expected);
        assert_eq!(decode(None, None), Ok(None));
    }

    #[test]
    fn an_instance_that_was_published_elsewhere_goes_on_after_the_flushed_generation() {
        let record = decode(Some(&encode(Generation(4), 40, b"")), None).expect("valid").expect("stored");
        assert_eq!(record.active, Generation(5));
    }

    #[test]
    fn damaged_records_are_errors() {
        let good = encode(Generation(1), 1, b"");
        for cut in 0..good.len() {
            assert_eq!(decode(Some(&good[..cut]), None), Err(RecordError::Short), "{cut}");
        }
        assert_eq!(decode(None, Some(&[9, 0, 0])), Err(RecordError::Format(9)));
        assert_eq!(decode(Some(&encode(Generation(u32::MAX), 1, b"")), None), Err(RecordError::Generation));
    }
}
