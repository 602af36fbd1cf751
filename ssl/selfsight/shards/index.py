"""The index of a shard: one Parquet row per sample, in the order of the shard, with all that is known of its bytes."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from selfsight.errors import UserError
from selfsight.files import publish

if TYPE_CHECKING:
    import pyarrow as pa

# Name → Arrow type, and what it means.
COLUMNS = {
    "sample": "uint64",  # global ordinal
    "key": "string",  # of the WebDataset sample: the ordinal in twelve digits
    "source": "string",  # where it came from: source name / name inside it
    "member_offset": "uint64",  # of the first tar header of the sample's members in the shard
    "data_offset": "uint64",
    "size": "uint64",  # bytes of the image file
    "end": "uint64",  # where the next sample begins; the shard's last one ends with the file
    "crc32c": "uint32",  # of the image file
    "extent_crc32c": "uint32",  # of all bytes from member_offset to end: headers, files, padding, the archive's end
    "sha256": "binary[32]",
    "width": "uint32",  # as stored, before the EXIF orientation turns it
    "height": "uint32",
    "format": "string",  # Pillow's name of the true format
    "mode": "string",  # Pillow's, as stored
    "frames": "uint32",
    "progressive": "bool",
    "exif_orientation": "uint8",  # 1–8
    "label": "int64",  # null in an unlabelled corpus
}


def schema() -> "pa.Schema":
    import pyarrow as pa

    kinds = {"binary[32]": pa.binary(32), "bool": pa.bool_()}
    return pa.schema([(name, kinds.get(kind) or pa.type_for_alias(kind)) for name, kind in COLUMNS.items()])


def write_index(path: Path, rows: list[dict[str, Any]]) -> None:
    """Publishes the index of one shard; the same rows give the same bytes (for one version of pyarrow)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows, schema=schema())
    with publish(path) as f:
        pq.write_table(table, f, compression="zstd", row_group_size=65536)


def read_index(file: bytes, name: str, rows: int, columns: list[str] | None = None) -> "pa.Table":
    """The index of a shard of `rows` samples, all of it or some columns, from the bytes of the file called `name`.

    Raises UserError where it is not that.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(pa.BufferReader(file)).read(columns, use_threads=False)
    except (OSError, pa.ArrowException) as e:
        raise UserError(f"{name} cannot be read ({e}): run `selfsight corpus verify`") from None
    if table.num_rows != rows or set(table.column_names) != set(columns or COLUMNS):
        raise foreign_index(name)
    return table


def foreign_index(name: str) -> UserError:
    return UserError(f"{name} is not the index of its shard: run `selfsight corpus verify`")
