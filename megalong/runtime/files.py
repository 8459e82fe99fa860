"""Say exactly why a file cannot be read: a file without read permission is not damaged, a folder is not missing."""

from __future__ import annotations

import os
from pathlib import Path

from megalong.errors import UserError

_DOWNLOAD = "download it again"


def why_unreadable(path: Path, error: OSError, again: str = _DOWNLOAD) -> str:
    """Why `path` cannot be opened, and what to do.

    Args:
        again: how to get the file again; used only if that would help.
    """
    if isinstance(error, PermissionError):
        return "this user may not read it (permission denied); ask its owner, or chmod +r it and its folders"
    if isinstance(error, FileNotFoundError) and path.is_symlink():
        return f"a link to {os.readlink(path)}, which is not there; {again}"
    if isinstance(error, FileNotFoundError):
        return f"no such file; {again}"
    if isinstance(error, IsADirectoryError):
        return f"a folder, not a file; {again}"
    return f"cannot be read ({error.strerror or error}); check the disk or its network mount"


def refuse_unreadable(path: Path, what: str = "", again: str = _DOWNLOAD) -> None:
    """Refuse a file that is missing or that this user cannot read.

    Args:
        what: put before the path in the message, such as "--tokenizer: ".

    Raises:
        UserError: with the reason.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"{what}{path}: {why_unreadable(path, error, again)}") from None


def refuse_unreadable_json(folder: Path, what: str = "") -> None:
    """`refuse_unreadable` for every JSON file of a folder, before a library reads them and blames their content."""
    for path in sorted(folder.glob("*.json")):
        refuse_unreadable(path, what)
