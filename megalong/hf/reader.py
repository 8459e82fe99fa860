"""Read a Hugging Face checkpoint's tensors without loading it: every rank reads only its own rows or columns.

Files are memory-mapped by `safetensors.safe_open`. `read` touches only the requested range: eight ranks that each read
an eighth of a 16 GB checkpoint touch 2 GB each, and no rank ever holds a whole one. Only safetensors is read: a
`pytorch_model.bin` is a pickle, and loading one runs any code in it.

`check` compares the files with config.json before any parameter is filled, so a wrong or half-downloaded folder gives
one line at the start, not a half-filled model.
"""

from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megalong.config.architecture import Architecture
from megalong.errors import UserError
from megalong.hf.tensor_file import open_tensors
from megalong.hf.weight_files import INDEX_FILE, SINGLE_FILE, shards
from megalong.hf.weight_map import hf_shapes

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class HFReader:
    """Tensors of one Hugging Face folder, by name.

    Opens the files that `hf.weight_files` chooses, with all their tensors, listed or not. Raises UserError if files are
    missing, unreadable, truncated or not safetensors. Use it as a context manager, or call `close`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        listed = shards(self.folder)
        for file in sorted(set(listed.values())) or [SINGLE_FILE]:
            self._open(file, listed=bool(listed))
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise UserError(
                    f"{self.folder / INDEX_FILE}: lists tensor {name} in {file}, which does not contain it; download "
                    "both again"
                )

    def __enter__(self) -> "HFReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the mapped files."""
        self._files.clear()

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the folder."""
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of tensor `name`; UserError if the files do not contain it."""
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
        """The narrowest dtype that represents all the tensors exactly (bf16 and fp16 together need fp32)."""
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
        """Compare names, shapes and dtypes with `architecture`; UserError names the first mismatch."""
        wanted = hf_shapes(architecture)
        for name, shape in wanted.items():
            self.dtype(name)
            if self.shape(name) != shape:
                raise UserError(
                    f"{self._path_of(name)}: tensor {name} has shape {list(self.shape(name))}, config.json says "
                    f"{list(shape)}; use config.json and weights of the same release"
                )
        extra = [name for name in self.names if name not in wanted and not self._harmless(name, architecture)]
        if extra:
            raise UserError(
                f"{self._path_of(extra[0])}: tensor {extra[0]} (one of {len(extra)}) is not part of a plain Llama; "
                "only Llama checkpoints without biases, adapters or quantization are read"
            )

    def _harmless(self, name: str, architecture: Architecture) -> bool:
        """Whether a tensor adds nothing: an old rotary table, or a tied model's copy of the embedding."""
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

    def _open(self, file: str, listed: bool) -> None:
        """Map one file and record its tensors."""
        path = self.folder / file
        if listed and not path.is_file() and not path.is_symlink():
            raise UserError(f"{path}: this shard is listed in {INDEX_FILE} but missing; download it again")
        self._files[file] = open_tensors(path)
        for name in self._files[file].keys():  # noqa: SIM118 (a safe_open is no mapping)
            if name in self._file_of:
                raise UserError(
                    f"{self.folder}: tensor {name} is in {self._file_of[name]} and in {file}; delete the file that is "
                    "left over, or download all again"
                )
            self._file_of[name] = file
