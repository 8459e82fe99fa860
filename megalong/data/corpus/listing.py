"""Which files a corpus consists of: named files, and files found in folders and by wildcards.

    corpus/books.jsonl                     read
    corpus/more -> /elsewhere/more         walked like any folder: corpora are often assembled from links
    corpus/.ipynb_checkpoints/books.jsonl  left out: hidden, as .git, .cache, ._books.jsonl
    corpus/_temporary/0/part.parquet       left out: unfinished output of a Spark job; so are __MACOSX and the like
    corpus/again.jsonl -> books.jsonl      left out: a file is read once, whatever its names

Nothing is left out silently, and a file that is named itself is read even if it is hidden. A folder without permission
or a broken link is an error: a corpus must not be smaller than it looks.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from megalong.errors import UserError

# Folders that tools write: unfinished output of Spark, logs of Delta tables, macOS archive metadata, Python caches.
TOOLS = {"_temporary", "_delta_log", "_spark_metadata", "__MACOSX", "__pycache__"}
NAMED = 3  # paths named per line

Log = Callable[[str], None]
Identity = tuple[int, ...] | str


class Listing:
    """Files of a corpus, in the order in which they were added.

    Args:
        endings: endings of the file names that folders are searched for, in lower case.

    Attributes:
        files: the files found so far.
    """

    def __init__(self, endings: tuple[str, ...]) -> None:
        self.files: list[Path] = []
        self._endings = endings
        self._listed: dict[Identity, Path] = {}
        self._hidden: list[Path] = []
        self._other_names: list[tuple[Path, Path]] = []

    def add(self, name: str) -> None:
        """Add the file `name`, all files in a folder and its subfolders, or all that match a wildcard, sorted.

        Raises:
            UserError: nothing was found, or something cannot be read.
        """
        path = Path(name)
        if path.is_dir():
            found = self._in_folder(path)
            if not found:
                raise UserError(
                    f"--input: the folder {name} contains none of {', '.join(self._endings)}{self._but_hidden()}; name "
                    "files instead"
                )
        elif not path.exists() and has_magic(name):
            found = self._matches(name)
            if not found:
                raise UserError(f"--input: no file matches {name!r}{self._but_hidden()}; check the wildcard")
        elif path.is_file():
            found = [path]
        else:
            raise UserError(f"--input: {name} does not exist or is not a file; check the path")
        self._list(found)

    def log_left_out(self, log: Log) -> None:
        """Log what was left out, and what may be there twice, a line for each kind."""
        if self._hidden:
            log(f"left out as hidden: {_counted(self._hidden)}; name a file itself to read it")
        if self._other_names:
            again = [f"{path} is {first}" for path, first in self._other_names]
            log(f"left out as other names of the same files: {_counted(again)}")
        for same in self._likely_twice():
            log(f"{' and '.join(map(str, same))} may contain the same text; if so, name only one of them")

    def _in_folder(self, root: Path) -> list[Path]:
        """Files of a folder. Each subfolder is walked once, under its own name rather than a link's."""
        found: list[Path] = []
        seen: set[Identity] = set()
        folders, links = deque([root]), deque[Path]()
        while folders:
            folder = folders.popleft()
            if (one := _identity(folder)) not in seen:
                seen.add(one)
                for entry in _entries(folder):
                    path, is_folder = folder / entry.name, _is_folder(entry)
                    if not is_folder and not entry.name.lower().endswith(self._endings):
                        continue
                    if entry.name.startswith(".") or entry.name in TOOLS:
                        self._hidden.append(path)
                    elif is_folder:
                        (links if entry.is_symlink() else folders).append(path)
                    else:
                        found.append(_refuse_no_file(path))
            if not folders:
                folders, links = links, deque()
        return sorted(found)

    def _matches(self, pattern: str) -> list[Path]:
        found = []
        for path in sorted(map(Path, glob(pattern, recursive=True))):
            if TOOLS & set(path.parts) - set(Path(pattern).parts):
                self._hidden.append(path)
            elif not path.is_dir():
                found.append(path)
            elif "**" not in pattern:  # `**` has walked all folders already
                found += self._in_folder(path)
        return found

    def _list(self, found: Sequence[Path]) -> None:
        """List each file once, under its own name rather than a link's."""
        own = {_identity(path): path for path in sorted(found, key=lambda path: (path.is_symlink(), path))[::-1]}
        for path in found:
            one = _identity(path)
            first = self._listed.setdefault(one, own[one])
            if first is path:
                self.files.append(path)
            else:
                self._other_names.append((path, first))

    def _likely_twice(self) -> Iterator[list[Path]]:
        """Files of one folder whose names differ only in the ending: a file beside its compressed or converted copy."""
        alike: dict[Path, list[Path]] = defaultdict(list)
        for path in self.files:
            ending = next((end for end in sorted(self._endings, key=len)[::-1] if path.name.lower().endswith(end)), "")
            alike[path.with_name(path.name[: len(path.name) - len(ending)] or path.name)].append(path)
        yield from (same for same in alike.values() if len(same) > 1)

    def _but_hidden(self) -> str:
        return f" (left out as hidden: {_counted(self._hidden)})" if self._hidden else ""


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _refuse_no_file(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"--input: {path} is not a file, or is a broken link; delete it or fix it")
    return path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--input: the folder {folder} cannot be read ({error.strerror}); check it") from None


def _identity(path: Path) -> Identity:
    """Equal for all names of one file or folder. Includes size and time, because inodes may not be unique."""
    status = path.stat()
    if not status.st_ino:  # a file system without inodes
        return os.path.realpath(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _counted(names: Sequence[object]) -> str:
    return f"{len(names):,} ({', '.join(map(str, names[:NAMED]))}{', …' if len(names) > NAMED else ''})"
