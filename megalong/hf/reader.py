"""Reading a Hugging Face checkpoint's tensors without loading it: every rank takes its own rows or columns.

Files are memory-mapped through `safetensors.safe_open`; `read` touches only the asked-for range, so eight ranks that
each read an eighth of a 16 GB checkpoint touch 2 GB each, and no rank ever holds a whole one. Only safetensors is
read: a `pytorch_model.bin` is a pickle, and loading one runs whatever code it carries.

`check` compares the files with config.json before anything is filled, so that a wrong or half-downloaded folder is
one line at the start and not a half-filled model.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megalong.config.architecture import Architecture
from megalong.errors import UserError
from megalong.hf.layout import hf_shapes

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HFReader:
    """Tensors of one Hugging Face folder, by name.

    Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists. Raises UserError where files
    are missing, truncated or not safetensors. Use it as a context manager, or call `close`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        index = self.folder / INDEX_FILE
        if index.is_file():
            self._open_shards(index)
        elif (self.folder / SINGLE_FILE).is_file():
            self._file_of = dict.fromkeys(self._open(SINGLE_FILE), SINGLE_FILE)
        else:
            raise UserError(_nothing_to_read(self.folder))

    def __enter__(self) -> "HFReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the mapped files."""
        self._files.clear()

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the folder."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; UserError where there is none."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of tensor `name`; UserError for anything but fp32, bf16 and fp16."""
        stored = self._slice(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(
                f"{self._path_of(name)}: tensor {name} is stored as {stored}; quantized checkpoints cannot be trained, "
                "use the model's bf16, fp16 or fp32 release"
            )
        return DTYPES[stored]

    def widest_dtype(self, names: Iterable[str]) -> torch.dtype:
        """The dtype that holds all of the tensors without losing a bit (bf16 and fp16 together need fp32)."""
        found = {self.dtype(name) for name in names}
        return found.pop() if len(found) == 1 else torch.float32

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> torch.Tensor:
        """`length` rows (`dim` 0) or columns (`dim` 1) of tensor `name` from `start` on, as stored, on the CPU.

        The result may be a view of the mapped file: copy from it, do not write to it.
        """
        stop = None if length is None else start + length
        window = slice(start, stop) if dim == 0 else (slice(None), slice(start, stop))
        part: torch.Tensor = self._slice(name)[window]
        return part

    def check(self, architecture: Architecture) -> None:
        """Compare names, shapes and dtypes with `architecture`; UserError names the first that does not fit."""
        wanted = hf_shapes(architecture)
        for name, shape in wanted.items():
            self.dtype(name)
            if self.shape(name) != shape:
                raise UserError(
                    f"{self._path_of(name)}: tensor {name} has shape {list(self.shape(name))}, config.json says "
                    f"{list(shape)}; take config.json and weights from the same release"
                )
        extra = [name for name in self.names if name not in wanted and not self._harmless(name, architecture)]
        if extra:
            raise UserError(
                f"{self._path_of(extra[0])}: tensor {extra[0]} (one of {len(extra)}) belongs to no plain Llama; "
                "only Llama checkpoints without biases, adapters or quantization are read"
            )

    def _harmless(self, name: str, architecture: Architecture) -> bool:
        """Tensors that add nothing: old rotary tables, and a tied model's spelled-out copy of the embedding."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        if name != "lm_head.weight" or not architecture.tie_word_embeddings:
            return False
        if not self._same(name, "model.embed_tokens.weight"):
            raise UserError(
                f"{self._path_of(name)}: lm_head.weight differs from the embedding although config.json ties them; "
                "set tie_word_embeddings to false in config.json"
            )
        return True

    def _same(self, first: str, second: str, rows: int = 4096) -> bool:
        """Whether two tensors are equal, compared a few rows at a time."""
        if self.shape(first) != self.shape(second):
            return False
        starts = range(0, self.shape(first)[0], rows)
        return all(torch.equal(self.read(first, 0, at, rows), self.read(second, 0, at, rows)) for at in starts)

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            hint = " (set tie_word_embeddings to true in config.json if the model ties it)"
            raise UserError(
                f"{self.folder}: tensor {name} is in none of the files; the download is incomplete or config.json is "
                f"another model's{hint if name == 'lm_head.weight' else ''}"
            )
        return self._files[self._file_of[name]].get_slice(name)

    def _path_of(self, name: str) -> Path:
        return self.folder / self._file_of[name]

    def _open(self, file: str) -> list[str]:
        """Map one file; returns the names of its tensors."""
        path = self.folder / file
        if not path.is_file():
            raise UserError(f"{path}: this shard is listed in {INDEX_FILE} but missing; download it again")
        try:
            self._files[file] = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: truncated or not a safetensors file ({error}); download it again") from error
        return list(self._files[file].keys())

    def _open_shards(self, index: Path) -> None:
        """Map every shard the index lists and check that it holds what the index promises."""
        weight_map = _read_index(index)
        held = {file: set(self._open(file)) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in held[file]:
                raise UserError(f"{index}: lists tensor {name} in {file}, which does not hold it; download both again")
        self._file_of = weight_map


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map (tensor name → file name in the same folder)."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r}); download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map must be a table of tensor name to file name; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: {file!r} is not the name of a file beside the index; download it again")
    return weight_map


def _nothing_to_read(folder: Path) -> str:
    """Why a folder without safetensors cannot be read, and what to do."""
    if not folder.is_dir():
        return f"{folder}: no such folder; give the folder of a Hugging Face checkpoint (config.json, *.safetensors)"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: holds only pytorch_model.bin (a pickle, which can run code when loaded); convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give the folder of a Hugging Face checkpoint"
