//! Stored rows into one Arrow batch: only the projected columns are decoded, straight into their builders.

use std::any::Any;
use std::sync::Arc;

use arrow_array::builder::{ArrayBuilder, BinaryBuilder, BooleanBuilder, ListBuilder, PrimitiveBuilder, StringBuilder};
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Decimal128Type, Float32Type, Float64Type, Int16Type, Int32Type, Int64Type,
    Time64MicrosecondType, TimestampMicrosecondType,
};
use arrow_array::{ArrayRef, RecordBatch, RecordBatchOptions};
use arrow_schema::{ArrowError, Schema, SchemaRef};
use kalamdb_model::{ColumnType, TableEntry, Value};

use crate::row::{self, Cell, Cells, Header, RowError, RowView};

/// Most bytes of encoded rows in one batch. Arrow's 32-bit offsets end at 2^31; a UUID grows from 17 to 36 bytes, and
/// a NULL in an array takes one bit of a row and one slot of the batch: 8 * 192 Mi < 2^31.
pub const BATCH_BYTES_MAX: usize = 192 << 20;

/// Builds one batch of the projected columns of a table from stored rows.
pub struct BatchBuilder {
    table: String,
    schema: Result<SchemaRef, String>,
    /// By the order of column ids: builder and what rows show that are older than the column.
    columns: Vec<Option<Own>>,
    seq: Option<PrimitiveBuilder<Int64Type>>,
    updated: Option<PrimitiveBuilder<TimestampMicrosecondType>>,
    deleted: Option<BooleanBuilder>,
    /// For each projected column, in order, where its values are built.
    outputs: Vec<Output>,
    rows: usize,
    bytes: usize,
    failed: bool,
}

struct Own {
    builder: Builder,
    ty: ColumnType,
    absent: Value,
}

#[derive(Clone, Copy)]
enum Output {
    Own(usize),
    Seq,
    Updated,
    Deleted,
}

impl BatchBuilder {
    /// A builder for the columns at `projection` in `table.arrow_schema()`. A position that is not there is reported by
    /// [`BatchBuilder::push`] and [`BatchBuilder::finish`].
    #[must_use]
    pub fn new(table: &TableEntry, projection: &[usize]) -> Self {
        let schema = table.arrow_schema().project(projection).map(Arc::new).map_err(|error| error.to_string());
        let order = row::id_order(&table.columns);
        let own = |position: usize| order.iter().position(|at| *at == position).map_or(Output::Seq, Output::Own);
        let first_system = table.columns.len();
        let outputs: Vec<Output> = projection
            .iter()
            .map(|position| match position.checked_sub(first_system) {
                None => own(*position),
                Some(0) => Output::Seq,
                Some(1) => Output::Updated,
                Some(_) => Output::Deleted,
            })
            .collect();
        let column = |index: usize| {
            let column = &table.columns[order[index]];
            let projected = outputs.iter().any(|output| matches!(output, Output::Own(at) if *at == index));
            projected.then(|| Own {
                builder: Builder::new(&column.ty),
                ty: column.ty.clone(),
                absent: column.absent().clone(),
            })
        };
        let has = |wanted: fn(&Output) -> bool| outputs.iter().any(wanted);
        Self {
            table: table.name.to_string(),
            schema,
            columns: (0..order.len()).map(column).collect(),
            seq: has(|output| matches!(output, Output::Seq)).then(PrimitiveBuilder::new),
            updated: has(|output| matches!(output, Output::Updated))
                .then(|| PrimitiveBuilder::new().with_timezone("UTC")),
            deleted: has(|output| matches!(output, Output::Deleted)).then(BooleanBuilder::new),
            outputs,
            rows: 0,
            bytes: 0,
            failed: false,
        }
    }

    /// Appends one stored row.
    ///
    /// # Errors
    /// If the bytes are no row of the table, or the batch is full ([`RowError::BatchFull`]: this row is not in it, and
    /// the builder can still be finished). After any other error the builder can only be dropped.
    pub fn push(&mut self, row: &[u8]) -> Result<(), RowError> {
        if self.bytes + row.len() > BATCH_BYTES_MAX {
            return Err(RowError::BatchFull { limit: BATCH_BYTES_MAX });
        }
        let view = RowView::parse(row)?;
        if let Err(error) = self.append(&view) {
            self.failed = true;
            return Err(error);
        }
        self.rows += 1;
        self.bytes += row.len();
        Ok(())
    }

    fn append(&mut self, view: &RowView<'_>) -> Result<(), RowError> {
        let mut cells = view.cells();
        for column in &mut self.columns {
            let cell = cells.next()?;
            let Some(own) = column else { continue };
            match cell {
                Some(cell) => own.builder.append(cell, &own.ty)?,
                None => {
                    own.builder.append_value(&own.absent, &own.ty)?;
                    self.bytes += own.absent.size();
                }
            }
        }
        self.append_system(view.header());
        Ok(())
    }

    fn append_system(&mut self, header: &Header) {
        if let Some(seq) = &mut self.seq {
            seq.append_value(header.seq);
        }
        if let Some(updated) = &mut self.updated {
            updated.append_value(header.updated_us);
        }
        if let Some(deleted) = &mut self.deleted {
            deleted.append_value(header.deleted);
        }
    }

    /// Rows so far.
    #[must_use]
    pub const fn rows(&self) -> usize {
        self.rows
    }

    /// Approximate bytes so far: those of the encoded rows, and of the defaults of columns that they are older than.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// The batch; its schema is the projected `table.arrow_schema()`.
    ///
    /// # Errors
    /// If the projection names a column that is not there, an earlier row failed, or a column that must not be NULL is.
    pub fn finish(mut self) -> Result<RecordBatch, RowError> {
        let schema = match &self.schema {
            Ok(schema) => Arc::clone(schema),
            Err(reason) => return Err(self.error(reason)),
        };
        if self.failed {
            return Err(self.error("an earlier row failed"));
        }
        let own: Vec<Option<ArrayRef>> =
            self.columns.iter_mut().map(|column| column.as_mut().map(|own| own.builder.finish())).collect();
        let seq = self.seq.as_mut().map(ArrayBuilder::finish);
        let updated = self.updated.as_mut().map(ArrayBuilder::finish);
        let deleted = self.deleted.as_mut().map(ArrayBuilder::finish);
        let arrays: Option<Vec<ArrayRef>> = self
            .outputs
            .iter()
            .map(|output| match output {
                Output::Own(index) => own[*index].clone(),
                Output::Seq => seq.clone(),
                Output::Updated => updated.clone(),
                Output::Deleted => deleted.clone(),
            })
            .collect();
        let arrays = arrays.ok_or_else(|| self.error("a projected column was not built"))?;
        batch(schema, arrays, self.rows).map_err(|error| self.error(&error.to_string()))
    }

    fn error(&self, reason: &str) -> RowError {
        RowError::Batch { table: self.table.clone(), reason: reason.to_owned() }
    }
}

/// Without columns a batch still has its number of rows.
fn batch(schema: Arc<Schema>, arrays: Vec<ArrayRef>, rows: usize) -> Result<RecordBatch, ArrowError> {
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    RecordBatch::try_new_with_options(schema, arrays, &options)
}

/// The builder of one column, or of the items of an ARRAY.
enum Builder {
    Boolean(BooleanBuilder),
    SmallInt(PrimitiveBuilder<Int16Type>),
    Int(PrimitiveBuilder<Int32Type>),
    BigInt(PrimitiveBuilder<Int64Type>),
    Float(PrimitiveBuilder<Float32Type>),
    Double(PrimitiveBuilder<Float64Type>),
    Decimal(PrimitiveBuilder<Decimal128Type>),
    Text(StringBuilder),
    Bytes(BinaryBuilder),
    Uuid(StringBuilder),
    Timestamp(PrimitiveBuilder<TimestampMicrosecondType>),
    Date(PrimitiveBuilder<Date32Type>),
    Time(PrimitiveBuilder<Time64MicrosecondType>),
    Array(Box<ListBuilder<Builder>>),
}

/// Runs `$body` on the Arrow builder inside `$self`, and `$list` on the one in its box.
macro_rules! each {
    ($self:expr, $builder:ident => $body:expr, $boxed:ident => $list:expr) => {
        match $self {
            Self::Boolean($builder) => $body,
            Self::SmallInt($builder) => $body,
            Self::Int($builder) => $body,
            Self::BigInt($builder) => $body,
            Self::Float($builder) => $body,
            Self::Double($builder) => $body,
            Self::Decimal($builder) => $body,
            Self::Text($builder) | Self::Uuid($builder) => $body,
            Self::Bytes($builder) => $body,
            Self::Timestamp($builder) => $body,
            Self::Date($builder) => $body,
            Self::Time($builder) => $body,
            Self::Array($boxed) => $list,
        }
    };
}

impl Builder {
    fn new(ty: &ColumnType) -> Self {
        match ty {
            ColumnType::Boolean => Self::Boolean(BooleanBuilder::new()),
            ColumnType::SmallInt => Self::SmallInt(PrimitiveBuilder::new()),
            ColumnType::Int => Self::Int(PrimitiveBuilder::new()),
            ColumnType::BigInt => Self::BigInt(PrimitiveBuilder::new()),
            ColumnType::Float => Self::Float(PrimitiveBuilder::new()),
            ColumnType::Double => Self::Double(PrimitiveBuilder::new()),
            ColumnType::Decimal { .. } => Self::Decimal(PrimitiveBuilder::new().with_data_type(ty.arrow())),
            ColumnType::Text | ColumnType::Json => Self::Text(StringBuilder::new()),
            ColumnType::Bytes => Self::Bytes(BinaryBuilder::new()),
            ColumnType::Uuid => Self::Uuid(StringBuilder::new()),
            ColumnType::Timestamp => Self::Timestamp(PrimitiveBuilder::new().with_data_type(ty.arrow())),
            ColumnType::Date => Self::Date(PrimitiveBuilder::new()),
            ColumnType::Time => Self::Time(PrimitiveBuilder::new()),
            ColumnType::Array(item) => {
                let list = ListBuilder::new(Self::new(item)).with_field(item.arrow_field("item", true));
                Self::Array(Box::new(list))
            }
        }
    }

    fn append(&mut self, cell: Cell<'_>, ty: &ColumnType) -> Result<(), RowError> {
        let Some(payload) = cell else {
            each!(self, builder => builder.append_null(), list => list.append_null());
            return Ok(());
        };
        match self {
            Self::Boolean(builder) => builder.append_value(row::boolean(payload)?),
            Self::SmallInt(builder) => append_fixed(builder, payload, ty, i16::from_le_bytes)?,
            Self::Int(builder) => append_fixed(builder, payload, ty, i32::from_le_bytes)?,
            Self::BigInt(builder) => append_fixed(builder, payload, ty, i64::from_le_bytes)?,
            Self::Float(builder) => append_fixed(builder, payload, ty, f32::from_le_bytes)?,
            Self::Double(builder) => append_fixed(builder, payload, ty, f64::from_le_bytes)?,
            Self::Decimal(builder) => append_fixed(builder, payload, ty, i128::from_le_bytes)?,
            Self::Text(builder) => builder.append_value(row::text(payload, ty)?),
            Self::Bytes(builder) => builder.append_value(payload),
            Self::Uuid(builder) => append_uuid(builder, row::fixed(payload, ty)?),
            Self::Timestamp(builder) => append_fixed(builder, payload, ty, i64::from_le_bytes)?,
            Self::Date(builder) => append_fixed(builder, payload, ty, i32::from_le_bytes)?,
            Self::Time(builder) => append_fixed(builder, payload, ty, i64::from_le_bytes)?,
            Self::Array(builder) => append_items(builder, payload, ty)?,
        }
        Ok(())
    }

    /// Appends a default, which is no cell of a row.
    fn append_value(&mut self, value: &Value, ty: &ColumnType) -> Result<(), RowError> {
        match (&mut *self, value) {
            (_, Value::Null) => each!(self, builder => builder.append_null(), list => list.append_null()),
            (Self::Boolean(builder), Value::Boolean(v)) => builder.append_value(*v),
            (Self::SmallInt(builder), Value::SmallInt(v)) => builder.append_value(*v),
            (Self::Int(builder), Value::Int(v)) => builder.append_value(*v),
            (Self::BigInt(builder), Value::BigInt(v)) => builder.append_value(*v),
            (Self::Float(builder), Value::Float(v)) => builder.append_value(*v),
            (Self::Double(builder), Value::Double(v)) => builder.append_value(*v),
            (Self::Decimal(builder), Value::Decimal(v)) => builder.append_value(*v),
            (Self::Text(builder), Value::Text(v) | Value::Json(v)) => builder.append_value(v),
            (Self::Bytes(builder), Value::Bytes(v)) => builder.append_value(v),
            (Self::Uuid(builder), Value::Uuid(v)) => append_uuid(builder, *v),
            (Self::Timestamp(builder), Value::Timestamp(v)) => builder.append_value(*v),
            (Self::Date(builder), Value::Date(v)) => builder.append_value(*v),
            (Self::Time(builder), Value::Time(v)) => builder.append_value(*v),
            (Self::Array(builder), Value::Array(items)) => {
                let ColumnType::Array(item) = ty else { return Err(RowError::Value(ty.clone())) };
                for value in items {
                    builder.values().append_value(value, item)?;
                }
                builder.append(true);
            }
            _ => return Err(RowError::Value(ty.clone())),
        }
        Ok(())
    }
}

fn append_fixed<T: ArrowPrimitiveType, const N: usize>(
    builder: &mut PrimitiveBuilder<T>,
    payload: &[u8],
    ty: &ColumnType,
    read: fn([u8; N]) -> T::Native,
) -> Result<(), RowError> {
    builder.append_value(read(row::fixed(payload, ty)?));
    Ok(())
}

fn append_uuid(builder: &mut StringBuilder, bytes: [u8; 16]) {
    let mut buffer = uuid::Uuid::encode_buffer();
    builder.append_value(uuid::Uuid::from_bytes(bytes).hyphenated().encode_lower(&mut buffer));
}

fn append_items(builder: &mut ListBuilder<Builder>, payload: &[u8], ty: &ColumnType) -> Result<(), RowError> {
    let ColumnType::Array(item) = ty else { return Err(RowError::Value(ty.clone())) };
    let mut cells = Cells::of_array(payload)?;
    while let Some(cell) = cells.next()? {
        builder.values().append(cell, item)?;
    }
    builder.append(true);
    Ok(())
}

/// What lets a [`ListBuilder`] build items of any type, lists included.
impl ArrayBuilder for Builder {
    fn len(&self) -> usize {
        each!(self, builder => ArrayBuilder::len(builder), list => ArrayBuilder::len(list.as_ref()))
    }

    fn finish(&mut self) -> ArrayRef {
        each!(self, builder => ArrayBuilder::finish(builder), list => ArrayBuilder::finish(list.as_mut()))
    }

    fn finish_cloned(&self) -> ArrayRef {
        each!(self, builder => ArrayBuilder::finish_cloned(builder), list => ArrayBuilder::finish_cloned(list.as_ref()))
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }

    fn into_box_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
