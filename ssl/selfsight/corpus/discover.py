"""What a file or folder is, by looking at it: which files a folder holds, and what kind of container each one is."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".zip", ".parquet")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp", "bytes", "content", "image_bytes", "data")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_id", "target", "fine_label")


def walk(root: Path, exclude: Path | None = None) -> Iterator[tuple[str, str]]:
    """(path, relative path) of every file below `root` in one fixed order; links are followed, loops are not.

    A folder that is `exclude` is left out. Raises OSError where a folder cannot be read.
    """

    def visit(folder: str, relative: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above or (exclude is not None and os.path.realpath(folder) == str(exclude)):
            return
        with os.scandir(folder) as found:
            entries = sorted((e.name, _is_folder(e)) for e in found)
        for name, is_folder in entries:
            if is_folder:
                yield from visit(f"{folder}/{name}", f"{relative}{name}/", above | {here})
            else:
                yield f"{folder}/{name}", f"{relative}{name}"

    return visit(str(root), "", frozenset())


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def compression(path: Path) -> str | None:
    """gzip, bzip2 or xz by the first bytes, else None."""
    with open(path, "rb") as f:
        head = f.read(6)
    return next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None)


def opened_kind(path: str) -> str | None:
    """What kind of source a file inside a folder is opened as, None for the plain files of the folder."""
    if not path.lower().endswith(ARCHIVES):
        return None
    try:
        kind = kind_of_file(Path(path))
        return None if kind == "parquet" and image_column(Path(path)) is None else kind
    except OSError:
        return None


def kind_of_file(path: Path) -> str | None:
    """By content, since names lie: tar, compressed tar, zip, parquet; None for what is no container."""
    if not path.is_file():
        return None
    with open(path, "rb") as f:
        head = f.read(512)
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "zip"
    if head[257:262] == b"ustar":
        return "tar"
    named = path.name.lower().endswith(ARCHIVES)
    if compression(path):
        return "compressed tar" if named else None
    return "tar" if named and path.suffix.lower() == ".tar" else None


def image_column(path: Path) -> tuple[str, bool, str | None, list[str] | None] | None:
    """(image column, whether it is struct{bytes, path}, label column, class names) of a Parquet file, None without one.

    Raises OSError for a damaged file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open(path, "rb") as f:  # pyarrow takes no path that is not UTF-8
            schema = pq.read_schema(f)
    except pa.ArrowInvalid as e:
        raise OSError(f"{path} is damaged ({e}): fetch it again, or leave it out") from None
    found: list[tuple[str, bool]] = []
    for f in schema:
        if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0:
            found.append((f.name, True))
        elif pa.types.is_binary(f.type) or pa.types.is_large_binary(f.type):
            found.append((f.name, False))
    if not found:
        return None
    rank = {name: i for i, name in enumerate(IMAGE_COLUMNS)}
    column, struct = min(found, key=lambda c: (not c[1], rank.get(c[0].lower(), len(rank))))
    label = next((n for n in LABEL_COLUMNS if n in schema.names and _is_label(schema.field(n).type)), None)
    names = None
    try:  # datasets written by Hugging Face carry their class names along
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"] if label else None
    except (KeyError, TypeError, ValueError):
        pass
    return column, struct, label, names


def _is_label(kind) -> bool:
    import pyarrow as pa

    return pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
