"""What decides the order of samples, as a small dict that is saved with every checkpoint.

A run's position in its data is one number k. It is meaningful only while sample k stays the same sample. Another
weight, length or seed, or a rewritten dataset, puts other samples under the same numbers: some documents are then seen
twice and others never, and no curve shows it. A resume therefore compares what decides the order:

    {"run.seed": 1234, "data.seq_length": 65536, "data.mixture": ["books"], "data.mixture.books.files": "3fa1…", …}

Every key of `data` counts except those that only say how samples are read. Defaults are left out, so a key that a later
version adds does not look like a change. Batch size and number of steps are not included: they change how many samples
a step uses, not which one is next. A dataset is identified by the size and modification time of its files and by its
sidecar, not by its path: a copy that keeps the times (`mv`, `cp -p`) is the same dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalong.data.corpus.sources import find_files
from megalong.data.indexed import data_path, index_path, sidecar_path
from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.config.schema import Config

READING = {
    "separator",
    "allow_change",
    "allow_other_tokenizer",
    "loader",
    "prefetch",
    "workers",
}  # keys of `data` that do not decide which sample comes next
Fingerprint = dict[str, Any]


def fingerprint(config: Config) -> Fingerprint:
    """What decides the order of `config`'s samples: JSON values by configuration key."""
    data = config.data.model_dump(mode="json", exclude_defaults=True, exclude=READING)
    found: Fingerprint = {"run.seed": config.run.seed}
    mixture = data.pop("mixture", [])
    found.update(_flat("data", data))
    found["data.mixture"] = [domain["name"] for domain in mixture]
    for domain in mixture:
        where = f"data.mixture.{domain['name']}"
        rest = {key: value for key, value in domain.items() if key not in ("name", "path")}
        found.update(_flat(where, rest))
        if (named := f"{where}.synthetic.tokenizer") in found:  # by content, since the folder may move
            found[named] = _tokenizer(found[named])
        if "path" in domain:
            found[f"{where}.files"] = dataset_digest(domain["path"])
    if config.task == "sft":
        sft = config.sft.model_dump(mode="json", exclude_defaults=True, exclude={"loss_average"})
        found["sft.sources"] = [source.name for source in config.sft.sources]
        for source in sft.pop("sources"):
            found[f"sft.sources.{source['name']}.files"] = _conversations(source.pop("path"))
            found.update(_flat(f"sft.sources.{source.pop('name')}", source))
        found.update(_flat("sft", sft))
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, key by key: `data.seq_length 4096 → 8192`. Empty if `before` is empty (an old checkpoint)."""
    if not before:
        return []
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    gone = {key for key in keys if key not in now or key not in before}
    listed = "data.mixture" in keys  # then the keys of added and removed domains need no lines of their own
    named = set(before.get("data.mixture", [])) ^ set(now.get("data.mixture", []))
    return [
        _change(key, before, now)
        for key in keys
        if not (listed and key in gone and any(key.startswith(f"data.mixture.{name}.") for name in named))
    ]


def _change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if key.endswith(".files"):
        return f"{key.removesuffix('.files')}: its files changed (size, modification time or sidecar)"
    return f"{key} {_shown(before, key)} → {_shown(now, key)}"


def _shown(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "default")
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)


def _flat(where: str, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(f"{where}.{key}", value)
        else:
            yield f"{where}.{key}", value


def _conversations(path: str) -> str:
    """Digest of a source's files. A missing file is reported later, when it is read."""
    try:
        files = find_files([path])
    except UserError:
        return ""
    listed = "".join(f"{Path(file.path).name} {file.size} {file.mtime_ns}\n" for file in files)
    return hashlib.sha256(listed.encode()).hexdigest()[:16]


def dataset_digest(prefix: str) -> str:
    """Digest of a dataset's files. A missing file is reported later, when the dataset is opened."""
    digest = hashlib.sha256()
    for path in (index_path(prefix), data_path(prefix), Path(prefix)):
        if path.is_file():
            status = path.stat()
            digest.update(f"{path.suffix} {status.st_size} {status.st_mtime_ns}\n".encode())
    if sidecar_path(prefix).is_file():
        digest.update(sidecar_path(prefix).read_bytes())
    return digest.hexdigest()[:16]


def _tokenizer(folder: str) -> str:
    """Digest of a tokenizer. A missing one is reported later, when it is read."""
    file = Path(folder) / "tokenizer.json" if Path(folder).is_dir() else Path(folder)
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""
