"""Rows of a parquet file, a few megabytes at a time, through pyarrow.

The footer is read when the corpus is split into parts, so a truncated file is reported before any work. A damaged page
is reported by file when it is reached. Only this module imports pyarrow, so a corpus without tables does not load it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from megalong.errors import UserError

ROWS = 1024  # read at once: at 4 KB a text, 4 MB a column


@dataclass(frozen=True)
class Unreadable:
    """A value that cannot be read, and why."""

    why: str


def row_group_sizes(path: str) -> list[int]:
    """Bytes on disk of each row group.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _reading(path):
        footer = _opened(path).metadata
        groups = [footer.row_group(group) for group in range(footer.num_row_groups)]
        return [sum(group.column(c).total_compressed_size for c in range(group.num_columns)) for group in groups]


def number_of_rows(path: str) -> int:
    """Rows of the whole file.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _reading(path):
        return int(_opened(path).metadata.num_rows)


def text_columns(path: str) -> list[str]:
    """Columns that contain text, also inside lists, structs or maps.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _reading(path):
        return [field.name for field in _opened(path).schema_arrow if _holds_text(field.type)]


def columns(path: str) -> list[str]:
    """All columns.

    Raises:
        UserError: not a parquet file, or a truncated one.
    """
    with _reading(path):
        return list(_opened(path).schema_arrow.names)


def rows(path: str, first: int, end: int, keys: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
    """(row number from 1 in the file, values of `keys`) of row groups [first, end).

    Values of a text column are raw bytes, which may not be UTF-8. Lists, structs and maps become Python objects, or
    `Unreadable` if they contain text that is not UTF-8. A time too fine for Python becomes the stored number.

    Raises:
        UserError: a column is missing or occurs twice, or the file is damaged.
    """
    with _reading(path):
        file = _opened(path)
        _refuse_unclear(path, file.schema_arrow.names, keys)
        row = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for batch in file.iter_batches(ROWS, row_groups=list(range(first, end)), columns=list(keys), use_threads=False):
            columns = [_values(batch.column(batch.schema.get_field_index(key))) for key in keys]
            for values in zip(*columns, strict=True):
                row += 1
                yield row, list(values)


def text_rows(path: str, first: int, end: int, keys: Sequence[str]) -> Iterator[tuple[int, list[bytes | None]]]:
    """`rows` of text columns: each value is its raw bytes, or None for a null.

    Raises:
        UserError: as `rows`, or a column has another type. That is a wrong key, not a bad row: no row could be used.
    """
    with _reading(path):
        types = {field.name: field.type for field in _opened(path).schema_arrow}
    for key in keys:
        if key in types and not _is_text(types[key]):
            others = [name for name, kind in types.items() if _is_text(kind)]
            raise UserError(
                f"{path}: column {key!r} is of type {types[key]}, not text; give a column of text (there are: "
                f"{', '.join(others) or 'none'}) or write {key!r} as text"
            )
    yield from rows(path, first, end, keys)


def _refuse_unclear(path: str, names: Sequence[str], keys: Sequence[str]) -> None:
    for key in keys:
        if key not in names:
            raise UserError(f"{path}: no column {key!r} (there are: {', '.join(names)}); set --json-keys")
        if names.count(key) > 1:
            raise UserError(f"{path}: {names.count(key)} columns are called {key!r}; rename all but one")


def _opened(path: str) -> Any:
    import pyarrow.parquet  # type: ignore[import-untyped]

    return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)


def _is_text(kind: Any) -> bool:
    """Whether a column contains text, or bytes that may be text: of any width, as views, dictionaries or JSON."""
    from pyarrow import types

    kind = _storage_type(kind)
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    # null: the type that polars and pandas write for a column without any value
    return _is_string(kind) or types.is_null(kind) or any(is_kind(kind) for is_kind in binary)


def _is_string(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _storage_type(kind: Any) -> Any:
    """The value type of a dictionary, or the storage type of an extension type such as JSON."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        return _storage_type(kind.value_type)
    is_text = isinstance(kind, pyarrow.BaseExtensionType) and not pyarrow.types.is_fixed_size_binary(kind.storage_type)
    return _storage_type(kind.storage_type) if is_text else kind


def _holds_text(kind: Any) -> bool:
    kind = _storage_type(kind)
    inner = [kind.field(place).type for place in range(kind.num_fields)]
    return _is_string(kind) or any(map(_holds_text, inner))


def _values(column: Any) -> list[Any]:
    import pyarrow

    if isinstance(column.type, pyarrow.BaseExtensionType) and _storage_type(column.type) != column.type:
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if _is_string(column.type):
        column = column.cast(pyarrow.large_binary())
    try:
        return list(column.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, OverflowError, KeyError):
        return [_value(scalar) for scalar in column]


def _value(scalar: Any) -> Any:
    """One value of a column that has values which Python cannot represent."""
    try:
        return scalar.as_py(maps_as_pydicts="strict")
    except UnicodeDecodeError as error:
        return Unreadable(f"not UTF-8 ({error.reason})")
    except KeyError as error:
        return Unreadable(f"a map contains a key twice ({error})")
    except (ValueError, OverflowError):
        return _parts_of(scalar)


def _parts_of(scalar: Any) -> Any:
    """A value that contains a time outside Python's range or precision; such a time is left as a number."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar):
        return {name: _value(inner) for name, inner in scalar.items()}
    if isinstance(scalar, pyarrow.ListScalar):
        return [_value(inner) for inner in scalar]
    return scalar.value


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Report pyarrow's errors as one line."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: broken parquet file ({reason}); fetch the file again") from None
