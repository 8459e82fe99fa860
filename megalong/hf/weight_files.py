"""Which files of a Hugging Face folder hold its weights: those that transformers reads, or a line that says why not.

    model.safetensors                    one file; transformers takes it even where an index lies beside it
    model.safetensors.index.json         else the shards this lists
    model.fp16.safetensors, *.bin, ...   never read by default, and not here

Two sets of weights in one folder are two answers to what the model is: an index whose shards are there beside a single
file, or an adapter beside the weights, which transformers would apply. Both are refused. An index of which no shard is
left is what an interrupted or earlier download leaves behind, and is passed over, as transformers does.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from megalong.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
ADAPTER_FILE = "adapter_config.json"

log = logging.getLogger("megalong")


def shards(folder: Path) -> dict[str, str]:
    """Tensor name → file by the index; empty where `model.safetensors` holds everything.

    Raises:
        UserError: there are no weights, two sets of them, or an index that is none.
    """
    single, index = _is_there(folder / SINGLE_FILE), _is_there(folder / INDEX_FILE)
    if not single and not index:
        raise UserError(_nothing_to_read(folder))
    if _is_there(folder / ADAPTER_FILE):
        raise UserError(
            f"{folder}: holds a model and an adapter ({ADAPTER_FILE}), and transformers reads both; move the adapter "
            "to a folder of its own (and name it by lora.load)"
        )
    _refuse_named_weights(folder)
    if not single:
        return _read_index(folder / INDEX_FILE)
    if index:
        _refuse_second_set(folder)
    return {}


def _refuse_second_set(folder: Path) -> None:
    """With one file and an index: fine where nothing else that the index lists is there."""
    try:
        listed = set(_read_index(folder / INDEX_FILE).values())
    except UserError:
        listed = set()
    others = sorted(file for file in listed - {SINGLE_FILE} if _is_there(folder / file))
    if others:
        raise UserError(
            f"{folder}: holds two sets of weights, {SINGLE_FILE} (which transformers reads) and {others[0]} with what "
            f"else {INDEX_FILE} lists; delete the set that is out of date"
        )
    if listed - {SINGLE_FILE}:
        log.warning("%s: %s lists shards that are not there; %s is read alone", folder, INDEX_FILE, SINGLE_FILE)


def _refuse_named_weights(folder: Path) -> None:
    """`transformers_weights` in config.json sends transformers to another file."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return  # told where config.json is read
    if named not in (None, SINGLE_FILE):
        raise UserError(
            f"{folder}/config.json: transformers_weights = {json.dumps(named)[:60]}: only {SINGLE_FILE} or "
            f"{INDEX_FILE} is read; give that file this name and drop the key"
        )


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


def _is_there(path: Path) -> bool:
    """Also a link whose file is gone: what is wrong with it is told when it is opened."""
    return path.is_file() or path.is_symlink()


def _nothing_to_read(folder: Path) -> str:
    """Why a folder without safetensors cannot be read, and what to do."""
    if folder.is_file():
        return f"{folder}: a file; give the folder it lies in (config.json, *.safetensors)"
    if not folder.is_dir():
        return f"{folder}: no such folder; give the folder of a Hugging Face checkpoint (config.json, *.safetensors)"
    if _is_there(folder / ADAPTER_FILE):
        return f"{folder}: holds an adapter, not a model; give its base here, and this folder by lora.load"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: holds only pytorch_model.bin (a pickle, which can run code when loaded); convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)"
        )
    others = sorted(path.name for kind in ("*.safetensors", "*.gguf", "*.pth") for path in folder.glob(kind))
    if others:
        return (
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there, only {others[0]} ({len(others)} such), "
            "another format, a variant or a part; give the folder as the model's Hugging Face release has it"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give the folder of a Hugging Face checkpoint"
