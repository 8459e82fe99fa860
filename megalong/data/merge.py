"""`megalong data merge`: joins datasets in the given order, such as shards of a SLURM array or years of a crawl.

Tokens are copied file by file inside the kernel, the index is rewritten, and the counts of the sidecars are summed. The
merged shards of a corpus are therefore, byte for byte, what one run would have written.

IDs mean nothing without their tokenizer, so datasets are only merged if their sidecars name the same tokenizer (and the
same separator, which the merged sidecar records). Megatron-LM's datasets have no sidecar; they merge with each other.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalong.data.indexed import IndexedDataset, data_path
from megalong.data.indexed_writer import SLICE, Entries, IndexedDatasetWriter
from megalong.data.progress import Progress
from megalong.data.token_ids import same_ids
from megalong.errors import UserError

ENDINGS = (".idx", ".bin", ".json")
SAME = ("tokenizer", "vocabulary_size", "separator", "key", "grouped_by")
ADDED_UP = ("empty_documents", "bad_records", "contaminated_documents")
COUNTED = ("format", "documents", "tokens", "dtype")


def merge(inputs: Sequence[str], output_prefix: str) -> str:
    """Merge the datasets `inputs` into `output_prefix`, which is returned.

    Args:
        inputs: prefixes, or their files (`P_*.idx`, expanded by the shell), or folders of datasets.

    Raises:
        UserError: a dataset cannot be read, they do not match, or the output is one of them.
    """
    prefixes = _prefixes(inputs)
    if Path(output_prefix).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise UserError(f"--output-prefix: {output_prefix} is one of the datasets to merge; give another one")
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    _refuse_mismatch(datasets)
    progress = Progress(sum(dataset.num_tokens for dataset in datasets) * datasets[0].dtype.itemsize)
    with IndexedDatasetWriter(output_prefix, datasets[0].dtype) as writer:
        for dataset in datasets:
            writer.add_file(data_path(dataset.prefix), _entries(dataset))
            progress.update(writer.num_tokens * writer.dtype.itemsize, writer.num_documents)
        progress.finish()
        writer.finish(_merged([dataset.sidecar for dataset in datasets], writer))
    print(
        f"{output_prefix}: {writer.num_documents:,} documents, {writer.num_tokens:,} tokens of {len(datasets)} datasets"
    )
    return output_prefix


def _prefixes(inputs: Sequence[str]) -> list[str]:
    """The prefix of each dataset once, in the order of first mention."""
    found: dict[str, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            indices = sorted(index for index in path.glob("*.idx") if not index.name.startswith("."))
            if not indices:
                raise UserError(f"--input: the folder {name} contains no .idx; name datasets by their prefix")
            found.update((str(index.with_suffix("")), None) for index in indices)
        else:
            is_file = path.suffix in ENDINGS and path.is_file()
            found[str(path.with_suffix("")) if is_file else name] = None
    if len(found) == 0:
        raise UserError("--input: no dataset given; name at least one by its prefix")
    return list(found)


def _refuse_mismatch(datasets: Sequence[IndexedDataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        if (first.sidecar is None) != (other.sidecar is None):
            bare = other.prefix if other.sidecar is None else first.prefix
            raise UserError(
                f"--input: {bare} has no sidecar (.json), so nothing shows whether its tokenizer is that of the "
                "others; merge datasets of one tool"
            )
        if first.dtype != other.dtype:
            raise UserError(
                f"--input: {first.prefix} contains {first.dtype} and {other.prefix} {other.dtype}: their vocabularies "
                "differ; tokenize them with one tokenizer"
            )
        for name in SAME:
            if name == "tokenizer" and _same_tokenizer(first, other):
                continue
            ours, theirs = (_compared(name, dataset.sidecar or {}) for dataset in (first, other))
            if ours != theirs:
                raise UserError(
                    f"--input: {first.prefix} and {other.prefix} differ in their {name.replace('_', ' ')} "
                    f"({_shown(ours)}, {_shown(theirs)}); merge what was preprocessed alike"
                )


def _same_tokenizer(first: IndexedDataset, other: IndexedDataset) -> bool:
    """Whether both record a tokenizer, and the two give the same IDs."""
    ours, theirs = ((dataset.sidecar or {}).get("tokenizer") for dataset in (first, other))
    return isinstance(ours, dict) and isinstance(theirs, dict) and bool(same_ids(ours, theirs))


def _compared(name: str, sidecar: dict[str, Any]) -> Any:
    """The value that must be equal. Tokenizers are compared by fingerprint, not by path."""
    value = sidecar.get(name)
    return value.get("sha256") if name == "tokenizer" and isinstance(value, dict) else value


def _shown(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else repr(value)


def _entries(dataset: IndexedDataset) -> Iterator[Entries]:
    """The index of a dataset, in batches of documents."""
    for start in range(0, dataset.num_documents, SLICE):
        bounds = dataset.document_indices[start : start + SLICE + 1]
        sequences = dataset.lengths[bounds[0] : bounds[-1]]
        ends = np.concatenate([[0], np.cumsum(sequences, dtype=np.int64)])
        yield sequences, np.diff(bounds), np.diff(ends[bounds - bounds[0]])


def _merged(sidecars: Sequence[dict[str, Any] | None], writer: IndexedDatasetWriter) -> dict[str, Any] | None:
    if sidecars[0] is None:
        return None
    about = {name: value for name, value in sidecars[0].items() if name not in COUNTED}
    for name in ADDED_UP:
        about[name] = sum((sidecar or {}).get(name, 0) for sidecar in sidecars)
    return about | {"length_histogram": writer.histogram.buckets()}
