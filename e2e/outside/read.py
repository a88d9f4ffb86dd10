"""Prints the rows of one instance, read from its files alone as `docs/formats.md` describes them.

    read.py ROOT PREFIX      ROOT is a storage's folder, PREFIX an instance's folder below it

One line per row, sorted by primary key: the columns of `SELECT *`, as answers of the SQL API write them. It is written
from that page alone, so that it shows whether the page is enough; what the page does not say ends it.
"""

import base64
import datetime
import json
import pathlib
import re
import sys
import uuid

import pyarrow as pa
import pyarrow.parquet as pq
from pyroaring import BitMap

ARROW = {
    "BOOLEAN": pa.bool_(), "SMALLINT": pa.int16(), "INT": pa.int32(), "BIGINT": pa.int64(),
    "FLOAT": pa.float32(), "DOUBLE": pa.float64(), "TEXT": pa.string(), "JSON": pa.string(), "UUID": pa.string(),
    "BYTES": pa.binary(), "TIMESTAMP": pa.timestamp("us", "UTC"), "DATE": pa.date32(), "TIME": pa.time64("us"),
}  # fmt: skip


def item_type(type_name):
    """`t` of `ARRAY<t>`, else None."""
    return type_name[len("ARRAY<") : -1] if type_name.startswith("ARRAY<") else None


def arrow_type(type_name):
    if item := item_type(type_name):
        return pa.list_(pa.field("item", arrow_type(item)))
    if digits := re.fullmatch(r"DECIMAL\((\d+),(\d+)\)", type_name):
        return pa.decimal128(int(digits[1]), int(digits[2]))
    return ARROW[type_name]


def number(value):
    """A float as an answer has it: the fewest digits, exponents without plus and zeros."""
    special = {"nan": '"NaN"', "inf": '"Infinity"', "-inf": '"-Infinity"'}
    return special.get(repr(value)) or re.sub(r"e\+?(-?)0*", r"e\1", repr(value))


def answer(scalar, type_name):
    """The JSON of a value in answers."""
    if not scalar.is_valid:
        return "null"
    if item := item_type(type_name):
        return "[" + ",".join(answer(value, item) for value in scalar) + "]"
    if type_name in ("TIMESTAMP", "DATE", "TIME"):
        return str(scalar.value)
    if type_name == "FLOAT":  # by its text, because the fewest digits of a 64-bit number are more
        return number(float(scalar.cast(pa.string()).as_py()))
    value = scalar.as_py()
    if type_name in ("BIGINT", "JSON") or type_name.startswith("DECIMAL"):
        return {"BIGINT": '"{}"', "JSON": "{}"}.get(type_name, '"{:f}"').format(value)
    if type_name == "BYTES":
        value = base64.b64encode(value).decode()
    return number(value) if type_name == "DOUBLE" else json.dumps(value, ensure_ascii=False)


def literal(value, type_name):
    """The value of a literal's text, or of an item of a JSON array."""
    if value is None or type_name in ("TEXT", "JSON"):
        return value
    if item := item_type(type_name):
        assert item != "JSON", "the texts of an array's items are not kept here"
        items = json.loads(value, parse_float=str, parse_int=str) if isinstance(value, str) else value
        return [literal(each, item) for each in items]
    if type_name == "UUID":
        return str(uuid.UUID(value))
    if type_name == "BYTES":
        return bytes.fromhex(value[2:]) if value.startswith("\\x") else base64.b64decode(value)
    if type_name in ("TIMESTAMP", "DATE", "TIME") and re.fullmatch(r"-?\d+", value):
        return int(value)
    if type_name == "TIMESTAMP":
        time = datetime.datetime.fromisoformat(value.replace("Z", "+00:00"))
        return time if time.tzinfo else time.replace(tzinfo=datetime.timezone.utc)
    if type_name == "TIME":
        return datetime.time.fromisoformat(value)
    return pa.scalar(value).cast(arrow_type(type_name)).as_py()


def initial(column):
    """What a row shows whose file is older than the column."""
    expression = column.get("initial")
    if expression is None:
        return pa.scalar(None, arrow_type(column["type"]))
    text = expression["text"][0].strip()
    if len(text) > 1 and text[0] == text[-1] == "'":
        text = text[1:-1].replace("''", "'")
    return pa.scalar(literal(text, column["type"]), arrow_type(column["type"]))


def hidden(file):
    """Positions of the rows that are deleted, or replaced by a row of another file."""
    sets = [BitMap.deserialize(base64.b64decode(file[name])) for name in ("tombstones", "replaced") if name in file]
    return BitMap.union(*sets) if sets else BitMap()


def plain(scalar):
    """A key's value, as it sorts: times are numbers, and text is in the order of its bytes."""
    return scalar.value if hasattr(scalar, "value") else scalar.as_py()


def rows(root, manifest):
    """Key and line of every row."""
    columns = manifest["columns"]
    key = [next(at for at, column in enumerate(columns) if column["id"] == part) for part in manifest["key"]]
    for file in manifest["files"]:
        table = pq.ParquetFile(root / file["path"]).read()
        assert table.num_rows == file["rows"], f"{file['path']} has {table.num_rows} rows"
        gone = hidden(file)
        shown = table.take(pa.array([at for at in range(table.num_rows) if at not in gone], pa.int64()))
        cells = []
        for column in columns:
            if column["name"] in table.column_names:
                cell_type = shown.schema.field(column["name"]).type
                assert cell_type == arrow_type(column["type"]), f"{column['name']} is {cell_type} in {file['path']}"
                cells.append(shown[column["name"]])
            else:
                cells.append([initial(column)] * shown.num_rows)
        for row in zip(*cells):
            line = ",".join(answer(value, column["type"]) for value, column in zip(row, columns))
            yield tuple(plain(row[at]) for at in key), f"[{line}]"


def main():
    root, prefix = pathlib.Path(sys.argv[1]), sys.argv[2]
    manifest = json.loads((root / prefix / "_manifest.json").read_bytes())
    assert manifest["format"] == 1, f"format {manifest['format']} is not known here"
    found = sorted(rows(root, manifest))
    for (key, _), (other, _) in zip(found, found[1:]):
        assert key != other, f"{key} is there twice"
    sys.stdout.reconfigure(encoding="utf-8")
    for _, line in found:
        print(line)


main()
