//! The bytes of one stored row. Little endian:
//!
//! ```text
//! [format u8 = 1][flags u8][schema version u32][_seq i64][_updated i64]     22 bytes, stamped by the committer
//! [column count u16][null bitmap, 1 = NULL][cell]…                          cells of the columns that are not NULL
//! cell  = [length varint][payload]
//! array = [item count varint][null bitmap][cell]…                           the payload of an ARRAY
//! ```
//!
//! Columns lie in the order of their ids. A later column has a higher id, so it is simply absent from older rows, and a
//! reader with an older catalog ignores what it does not know. The length before each payload lets a reader step over
//! columns without knowing their types; it costs one byte for nearly every value.

use kalamdb_model::{Column, ColumnType, TableEntry, Value};

/// The format that this version writes; it reads no other.
pub const FORMAT: u8 = 1;

const FLAGS_AT: usize = 1;
const SCHEMA_VERSION_AT: usize = 2;
const SEQ_AT: usize = 6;
const UPDATED_AT: usize = 14;
/// Bytes before the column count.
pub const HEADER_BYTES: usize = 22;

const DELETED: u8 = 1;
const FRESH: u8 = 2;

/// Why bytes are no row of the table that they are read for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowError {
    /// Shorter than it says.
    #[error("a stored row ends too early")]
    Short,
    /// Longer than it says.
    #[error("a stored row has {0} bytes after its last column")]
    Trailing(usize),
    /// Written by another version.
    #[error("a stored row has format {0}, this version reads {FORMAT}")]
    Format(u8),
    /// A length or count that no writer makes.
    #[error("a stored row holds an impossible length")]
    Length,
    /// A flag that no writer sets.
    #[error("a stored row has unknown flags {0:#04x}")]
    Flags(u8),
    /// The payload does not fit the column's type.
    #[error("a stored value is no {0}")]
    Value(ColumnType),
    /// More rows than one Arrow batch can address.
    #[error("a batch holds at most {limit} bytes of rows; finish it and start another")]
    BatchFull {
        /// The limit.
        limit: usize,
    },
    /// The projection or the decoded columns do not fit the table.
    #[error("rows of `{table}` do not make a batch: {reason}")]
    Batch {
        /// The table.
        table: String,
        /// What Arrow says.
        reason: String,
    },
}

/// Encodes one row; `values` are in the order of `table.columns` and fit them. The committer stamps the rest.
#[must_use]
pub fn encode(table: &TableEntry, values: &[Value]) -> Vec<u8> {
    debug_assert_eq!(values.len(), table.columns.len(), "one value for each column");
    debug_assert!(table.columns.iter().zip(values).all(|(column, value)| value.is_of(&column.ty)), "checked values");
    let mut row = Vec::with_capacity(HEADER_BYTES + 8 + values.iter().map(Value::size).sum::<usize>());
    row.extend([FORMAT, 0]);
    row.extend(table.schema_version.to_le_bytes());
    row.resize(HEADER_BYTES, 0);
    let order = id_order(&table.columns);
    row.extend(u16::try_from(order.len()).expect("a table has fewer than 65536 columns").to_le_bytes());
    put_cells(order.iter().map(|position| &values[*position]), &mut row);
    row
}

/// Marks an encoded row as deleted: it keeps all its values, for retention and change events.
pub fn mark_deleted(row: &mut [u8]) {
    if let Some(flags) = row.get_mut(FLAGS_AT) {
        *flags |= DELETED;
    }
}

/// Marks an encoded row as one whose key is in no file.
pub fn mark_fresh(row: &mut [u8]) {
    if let Some(flags) = row.get_mut(FLAGS_AT) {
        *flags |= FRESH;
    }
}

/// Takes [`mark_fresh`] back.
pub fn clear_fresh(row: &mut [u8]) {
    if let Some(flags) = row.get_mut(FLAGS_AT) {
        *flags &= !FRESH;
    }
}

/// Writes `_seq` and `_updated` (microseconds since 1970 UTC) into an encoded row. Only the committer does.
///
/// # Errors
/// If `row` is no encoded row; it is unchanged then.
pub fn stamp(row: &mut [u8], seq: i64, updated_us: i64) -> Result<(), RowError> {
    Header::parse(row)?;
    row[SEQ_AT..UPDATED_AT].copy_from_slice(&seq.to_le_bytes());
    row[UPDATED_AT..HEADER_BYTES].copy_from_slice(&updated_us.to_le_bytes());
    Ok(())
}

/// Positions in `columns`, in the order of column ids: the order of cells.
#[must_use]
pub fn id_order(columns: &[Column]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..columns.len()).collect();
    order.sort_by_key(|position| columns[*position].id);
    order
}

/// What the committer stamped and the writer marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the table's columns when the row was written.
    pub schema_version: u32,
    /// `_seq`.
    pub seq: i64,
    /// `_updated`, microseconds since 1970 UTC.
    pub updated_us: i64,
    /// `_deleted`.
    pub deleted: bool,
    /// No file holds an older version.
    pub fresh: bool,
}

impl Header {
    /// Reads the first [`HEADER_BYTES`] and nothing else.
    ///
    /// # Errors
    /// If they are no header of this format.
    pub fn parse(row: &[u8]) -> Result<Self, RowError> {
        let format = *row.first().ok_or(RowError::Short)?;
        if format != FORMAT {
            return Err(RowError::Format(format));
        }
        let flags = *row.get(FLAGS_AT).ok_or(RowError::Short)?;
        if flags & !(DELETED | FRESH) != 0 {
            return Err(RowError::Flags(flags));
        }
        Ok(Self {
            schema_version: u32::from_le_bytes(array_at(row, SCHEMA_VERSION_AT)?),
            seq: i64::from_le_bytes(array_at(row, SEQ_AT)?),
            updated_us: i64::from_le_bytes(array_at(row, UPDATED_AT)?),
            deleted: flags & DELETED != 0,
            fresh: flags & FRESH != 0,
        })
    }
}

/// A stored row whose structure was checked to its last byte. Values are decoded one by one.
#[derive(Clone, Copy, Debug)]
pub struct RowView<'a> {
    header: Header,
    cells: Cells<'a>,
}

impl<'a> RowView<'a> {
    /// Checks the structure: header, bitmap, and that the cells end where the bytes do.
    ///
    /// # Errors
    /// If any of them is off.
    pub fn parse(row: &'a [u8]) -> Result<Self, RowError> {
        let header = Header::parse(row)?;
        let count = u16::from_le_bytes(array_at(row, HEADER_BYTES)?);
        let cells = Cells::new(usize::from(count), &row[HEADER_BYTES + 2..])?;
        cells.check()?;
        Ok(Self { header, cells })
    }

    /// Version of the table's columns when the row was written.
    #[must_use]
    pub const fn schema_version(&self) -> u32 {
        self.header.schema_version
    }

    /// `_seq`.
    #[must_use]
    pub const fn seq(&self) -> i64 {
        self.header.seq
    }

    /// `_updated`, microseconds since 1970 UTC.
    #[must_use]
    pub const fn updated(&self) -> i64 {
        self.header.updated_us
    }

    /// `_deleted`.
    #[must_use]
    pub const fn deleted(&self) -> bool {
        self.header.deleted
    }

    /// Whether the writer knew that no file holds an older version.
    #[must_use]
    pub const fn fresh(&self) -> bool {
        self.header.fresh
    }

    /// Columns that the row was written with.
    #[must_use]
    pub const fn column_count(&self) -> usize {
        self.cells.left
    }

    /// The value of the column at `index` in the order of ids; `None` if the row is older than the column.
    ///
    /// # Errors
    /// If the stored bytes are no value of type `ty`.
    pub fn value(&self, index: usize, ty: &ColumnType) -> Result<Option<Value>, RowError> {
        let mut cells = self.cells;
        for _ in 0..index {
            if cells.next()?.is_none() {
                return Ok(None);
            }
        }
        cells.next()?.map(|cell| decode(cell, ty)).transpose()
    }

    /// All values in the order of `table.columns`, absent ones filled as [`Column::absent`] says.
    ///
    /// # Errors
    /// If the stored bytes do not fit the table.
    pub fn values(&self, table: &TableEntry) -> Result<Vec<Value>, RowError> {
        let mut values = vec![Value::Null; table.columns.len()];
        let mut cells = self.cells;
        for position in id_order(&table.columns) {
            let column = &table.columns[position];
            values[position] = match cells.next()? {
                Some(cell) => decode(cell, &column.ty)?,
                None => column.absent().clone(),
            };
        }
        Ok(values)
    }

    pub(crate) const fn header(&self) -> &Header {
        &self.header
    }

    pub(crate) const fn cells(&self) -> Cells<'a> {
        self.cells
    }
}

/// A NULL, or the bytes of a value.
pub(crate) type Cell<'a> = Option<&'a [u8]>;

/// Steps through the cells of a row or an array.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cells<'a> {
    left: usize,
    at: usize,
    nulls: &'a [u8],
    rest: &'a [u8],
}

impl<'a> Cells<'a> {
    fn new(count: usize, bytes: &'a [u8]) -> Result<Self, RowError> {
        let (nulls, rest) = bytes.split_at_checked(count.div_ceil(8)).ok_or(RowError::Short)?;
        let used = count % 8;
        let spare = nulls.last().copied().unwrap_or(0).checked_shr(u32::try_from(used).unwrap_or(0)).unwrap_or(0);
        if used != 0 && spare != 0 { Err(RowError::Length) } else { Ok(Self { left: count, at: 0, nulls, rest }) }
    }

    /// The items of an array's payload.
    pub(crate) fn of_array(payload: &'a [u8]) -> Result<Self, RowError> {
        let (count, rest) = take_varint(payload)?;
        // Checked before anything is sized by it: a bitmap of `count` bits must follow.
        let cells = Self::new(count, rest)?;
        cells.check()?;
        Ok(cells)
    }

    /// The next cell; `None` after the last.
    pub(crate) fn next(&mut self) -> Result<Option<Cell<'a>>, RowError> {
        if self.left == 0 {
            return Ok(None);
        }
        let null = self.nulls.get(self.at / 8).is_some_and(|byte| byte >> (self.at % 8) & 1 == 1);
        self.left -= 1;
        self.at += 1;
        if null {
            return Ok(Some(None));
        }
        let (length, rest) = take_varint(self.rest)?;
        let (payload, rest) = rest.split_at_checked(length).ok_or(RowError::Short)?;
        self.rest = rest;
        Ok(Some(Some(payload)))
    }

    fn check(mut self) -> Result<(), RowError> {
        while self.next()?.is_some() {}
        if self.rest.is_empty() { Ok(()) } else { Err(RowError::Trailing(self.rest.len())) }
    }
}

fn put_cells<'a>(values: impl ExactSizeIterator<Item = &'a Value> + Clone, out: &mut Vec<u8>) {
    let bitmap = out.len();
    out.resize(bitmap + values.len().div_ceil(8), 0);
    for (index, value) in values.enumerate() {
        if value.is_null() {
            out[bitmap + index / 8] |= 1 << (index % 8);
        } else {
            put_cell(value, out);
        }
    }
}

fn put_cell(value: &Value, out: &mut Vec<u8>) {
    let mut put = |payload: &[u8]| {
        put_varint(payload.len(), out);
        out.extend(payload);
    };
    match value {
        Value::Null => {}
        Value::Boolean(v) => put(&[u8::from(*v)]),
        Value::SmallInt(v) => put(&v.to_le_bytes()),
        Value::Int(v) | Value::Date(v) => put(&v.to_le_bytes()),
        Value::BigInt(v) | Value::Timestamp(v) | Value::Time(v) => put(&v.to_le_bytes()),
        Value::Float(v) => put(&v.to_le_bytes()),
        Value::Double(v) => put(&v.to_le_bytes()),
        Value::Decimal(v) => put(&v.to_le_bytes()),
        Value::Text(v) | Value::Json(v) => put(v.as_bytes()),
        Value::Bytes(v) => put(v),
        Value::Uuid(v) => put(v),
        Value::Array(items) => {
            let mut payload = Vec::with_capacity(value.size());
            put_varint(items.len(), &mut payload);
            put_cells(items.iter(), &mut payload);
            put(&payload);
        }
    }
}

/// Decodes one cell.
pub(crate) fn decode(cell: Cell<'_>, ty: &ColumnType) -> Result<Value, RowError> {
    let Some(payload) = cell else { return Ok(Value::Null) };
    Ok(match ty {
        ColumnType::Boolean => Value::Boolean(boolean(payload)?),
        ColumnType::SmallInt => Value::SmallInt(i16::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Int => Value::Int(i32::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::BigInt => Value::BigInt(i64::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Float => Value::Float(f32::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Double => Value::Double(f64::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Decimal { .. } => Value::Decimal(i128::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Text => Value::Text(text(payload, ty)?.to_owned()),
        ColumnType::Bytes => Value::Bytes(payload.to_vec()),
        ColumnType::Json => Value::Json(text(payload, ty)?.to_owned()),
        ColumnType::Timestamp => Value::Timestamp(i64::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Date => Value::Date(i32::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Time => Value::Time(i64::from_le_bytes(fixed(payload, ty)?)),
        ColumnType::Uuid => Value::Uuid(fixed(payload, ty)?),
        ColumnType::Array(item) => {
            let mut cells = Cells::of_array(payload)?;
            let mut items = Vec::new();
            while let Some(cell) = cells.next()? {
                items.push(decode(cell, item)?);
            }
            Value::Array(items)
        }
    })
}

pub(crate) fn boolean(payload: &[u8]) -> Result<bool, RowError> {
    match payload {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(RowError::Value(ColumnType::Boolean)),
    }
}

pub(crate) fn fixed<const N: usize>(payload: &[u8], ty: &ColumnType) -> Result<[u8; N], RowError> {
    payload.try_into().map_err(|_| RowError::Value(ty.clone()))
}

pub(crate) fn text<'a>(payload: &'a [u8], ty: &ColumnType) -> Result<&'a str, RowError> {
    std::str::from_utf8(payload).map_err(|_| RowError::Value(ty.clone()))
}

fn array_at<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N], RowError> {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk());
    found.copied().ok_or(RowError::Short)
}

/// LEB128.
fn put_varint(value: usize, out: &mut Vec<u8>) {
    let mut left = value;
    while left >= 0x80 {
        out.push(u8::try_from(left & 0x7F).expect("7 bits fit") | 0x80);
        left >>= 7;
    }
    out.push(u8::try_from(left).expect("7 bits fit"));
}

fn take_varint(bytes: &[u8]) -> Result<(usize, &[u8]), RowError> {
    let mut value = 0_u64;
    // Five groups of seven bits: 32 GiB and more than any row.
    for (index, byte) in bytes.iter().take(5).enumerate() {
        value |= u64::from(byte & 0x7F) << (7 * index);
        if byte & 0x80 == 0 {
            let length = usize::try_from(value).map_err(|_| RowError::Length)?;
            return Ok((length, &bytes[index + 1..]));
        }
    }
    Err(if bytes.len() < 5 { RowError::Short } else { RowError::Length })
}
