"""Which files a corpus is made of: those named, and those found in folders and by wildcards.

    corpus/books.jsonl                     taken
    corpus/more -> /elsewhere/more         walked, as any folder: corpora are often put together from links
    corpus/.ipynb_checkpoints/books.jsonl  left out: hidden, as .git, .cache, ._books.jsonl
    corpus/_temporary/0/part.parquet       left out: the half of a Spark job; so are __MACOSX and the like
    corpus/again.jsonl -> books.jsonl      left out: a file is taken once, whatever its names

Nothing is left out silently, and whatever is named itself is taken, hidden or not. What a walk cannot look into (a
folder without permission, a link to nothing) ends it: a corpus must not be smaller than it looks.
"""

from __future__ import annotations

import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from glob import glob, has_magic
from pathlib import Path

from megalong.errors import UserError

# Folders of tools, never of a corpus: half-written output of Spark, logs of Delta tables, what macOS packs along.
TOOLS = {"_temporary", "_delta_log", "_spark_metadata", "__MACOSX", "__pycache__"}
NAMED = 3  # paths that a line names

Say = Callable[[str], None]
Identity = tuple[int, ...] | str


class Listing:
    """Files of a corpus, in the order in which they are asked for.

    Args:
        endings: names of files that folders are searched for, in lower case.

    Attributes:
        files: what was found.
    """

    def __init__(self, endings: tuple[str, ...]) -> None:
        self.files: list[Path] = []
        self._endings = endings
        self._taken: dict[Identity, Path] = {}
        self._hidden: list[Path] = []
        self._again: list[tuple[Path, Path]] = []

    def add(self, name: str) -> None:
        """Take the file `name`; of a folder, all it holds in depth; of a wildcard, all it matches: in sorted order.

        Raises:
            UserError: there is nothing, or something that cannot be looked at.
        """
        path = Path(name)
        if path.is_dir():
            found = self._in_folder(path)
            if not found:
                raise UserError(
                    f"--input: the folder {name} holds none of {', '.join(self._endings)}{self._but_hidden()}; name "
                    "files instead"
                )
        elif not path.exists() and has_magic(name):
            found = self._matches(name)
            if not found:
                raise UserError(f"--input: no file matches {name!r}{self._but_hidden()}; check the wildcard")
        elif path.is_file():
            found = [path]
        else:
            raise UserError(f"--input: {name} does not exist or is no file; check the path")
        self._take(found)

    def tell(self, say: Say) -> None:
        """Say what was left out, and what may be there twice, a line for each kind."""
        if self._hidden:
            say(f"left out as hidden: {_counted(self._hidden)}; name one itself to have it read")
        if self._again:
            again = [f"{path} is {first}" for path, first in self._again]
            say(f"left out as other names of files already taken: {_counted(again)}")
        for same in self._likely_twice():
            say(f"{' and '.join(map(str, same))} may hold the same text; name the one you want if they do")

    def _in_folder(self, root: Path) -> list[Path]:
        """Files of a folder, each of its folders walked once, under its own name rather than that of a link."""
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
            elif "**" not in pattern:  # which has looked into all folders
                found += self._in_folder(path)
        return found

    def _take(self, found: Sequence[Path]) -> None:
        """Take what is not taken under another name, a file's own name rather than that of a link."""
        own = {_identity(path): path for path in sorted(found, key=lambda path: (path.is_symlink(), path))[::-1]}
        for path in found:
            one = _identity(path)
            first = self._taken.setdefault(one, own[one])
            if first is path:
                self.files.append(path)
            else:
                self._again.append((path, first))

    def _likely_twice(self) -> Iterator[list[Path]]:
        """Files of one folder whose names differ in their endings only: a file beside its packed or converted self."""
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
        raise UserError(f"--input: {path} is no file, or a link to nothing; delete it or mend it")
    return path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"--input: the folder {folder} cannot be read ({error.strerror}); check it") from None


def _identity(path: Path) -> Identity:
    """What is the same for all names of a file or folder; size and time besides, for inodes that are not unique."""
    status = path.stat()
    if not status.st_ino:  # a file system without
        return os.path.realpath(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _counted(names: Sequence[object]) -> str:
    return f"{len(names):,} ({', '.join(map(str, names[:NAMED]))}{', …' if len(names) > NAMED else ''})"
