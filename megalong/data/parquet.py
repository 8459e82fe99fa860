"""Rows of a parquet file, a few megabytes at a time, through pyarrow.

The footer is read when the corpus is cut into parts, so a truncated file is told before any work; a damaged page is
told where it is met, by file and row group. pyarrow is imported here alone: a corpus without tables starts without it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from megalong.errors import UserError

ROWS = 1024  # read at once: at 4 KB a text, 4 MB a column


def row_group_sizes(path: str) -> list[int]:
    """Bytes on disk of each row group.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _told(path):
        footer = _opened(path).metadata
        groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
        return [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]


def number_of_rows(path: str) -> int:
    """Rows of the whole file.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _told(path):
        return int(_opened(path).metadata.num_rows)


def text_columns(path: str) -> list[str]:
    """Columns of text.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    import pyarrow  # type: ignore[import-untyped]

    with _told(path):
        texts = (pyarrow.string(), pyarrow.large_string())
        return [field.name for field in _opened(path).schema_arrow if field.type in texts]


def columns(path: str) -> list[str]:
    """All columns.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _told(path):
        return list(_opened(path).schema_arrow.names)


def rows(path: str, first: int, end: int, keys: Sequence[str]) -> Iterator[tuple[int, list[bytes | Any]]]:
    """(row number from 1 in the file, values of `keys`) of row groups [first, end); text comes as raw bytes.

    Raises:
        UserError: a column is not there, or the file is damaged.
    """
    with _told(path):
        file = _opened(path)
        names = file.schema_arrow.names
        for key in keys:
            if key not in names:
                raise UserError(f"{path}: no column {key!r} (there are: {', '.join(names)}); set --json-keys")
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for batch in file.iter_batches(ROWS, row_groups=list(range(first, end)), columns=list(keys), use_threads=False):
            columns = [_values(batch.column(batch.schema.get_field_index(key))) for key in keys]
            for values in zip(*columns, strict=True):
                row += 1
                yield row, list(values)


def _opened(path: str) -> Any:
    import pyarrow.parquet  # type: ignore[import-untyped]

    return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)


def _values(column: Any) -> list[Any]:
    """Texts as bytes, not yet known to be UTF-8; whatever else there is, as Python sees it."""
    import pyarrow

    kinds = {pyarrow.string(): pyarrow.binary(), pyarrow.large_string(): pyarrow.large_binary()}
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return list((column.cast(kinds[column.type]) if column.type in kinds else column).to_pylist())


@contextmanager
def _told(path: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: broken parquet file ({reason}); fetch the file again") from None
