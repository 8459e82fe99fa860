"""Find the weight files of a Hugging Face folder: those that transformers reads, or one line that says why not.

    model.safetensors                    one file; transformers uses it even if there is an index too
    model.safetensors.index.json         else the shards that it lists
    model.fp16.safetensors, *.bin, ...   never read by default, and not here

Two sets of weights in one folder are ambiguous: a single file and the shards of an index, or weights and an adapter,
which transformers would apply. Both are refused. An index without any of its shards is left over from an interrupted or
earlier download; it is ignored, as transformers does.
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
    """Tensor name → file, from the index; empty if `model.safetensors` contains everything.

    Raises:
        UserError: there are no weights, two sets of them, or an invalid index.
    """
    single, index = _is_there(folder / SINGLE_FILE), _is_there(folder / INDEX_FILE)
    if not single and not index:
        raise UserError(_nothing_to_read(folder))
    if _is_there(folder / ADAPTER_FILE):
        raise UserError(
            f"{folder}: contains a model and an adapter ({ADAPTER_FILE}), and transformers reads both; move the "
            "adapter to its own folder (and give that as lora.load)"
        )
    _refuse_named_weights(folder)
    if not single:
        return _read_index(folder / INDEX_FILE)
    if index:
        _refuse_second_set(folder)
    return {}


def _refuse_second_set(folder: Path) -> None:
    """Refuse a single file and an index if any other file that the index lists is there."""
    try:
        listed = set(_read_index(folder / INDEX_FILE).values())
    except UserError:
        listed = set()
    others = sorted(file for file in listed - {SINGLE_FILE} if _is_there(folder / file))
    if others:
        raise UserError(
            f"{folder}: contains two sets of weights, {SINGLE_FILE} (which transformers reads) and the shards of "
            f"{INDEX_FILE}, such as {others[0]}; delete the outdated set"
        )
    if listed - {SINGLE_FILE}:
        log.warning("%s: %s lists shards that are not there; only %s is read", folder, INDEX_FILE, SINGLE_FILE)


def _refuse_named_weights(folder: Path) -> None:
    """Refuse `transformers_weights` in config.json, which makes transformers read another file."""
    try:
        named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("transformers_weights")
    except (OSError, ValueError, AttributeError):
        return  # reported where config.json is read
    if named not in (None, SINGLE_FILE):
        raise UserError(
            f"{folder}/config.json: transformers_weights = {json.dumps(named)[:60]}: only {SINGLE_FILE} or "
            f"{INDEX_FILE} is read; rename that file and drop the key"
        )


def _read_index(path: Path) -> dict[str, str]:
    """The index's weight_map (tensor name → file name in the same folder)."""
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a safetensors index ({error!r}); download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path}: weight_map must map tensor names to file names; download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise UserError(f"{path}: {file!r} is not the name of a file beside the index; download it again")
    return weight_map


def _is_there(path: Path) -> bool:
    """Whether there is a file, or a broken link, which is reported when it is opened."""
    return path.is_file() or path.is_symlink()


def _nothing_to_read(folder: Path) -> str:
    """Why a folder without safetensors cannot be read, and what to do."""
    if folder.is_file():
        return f"{folder}: a file; give the folder that contains it (config.json, *.safetensors)"
    if not folder.is_dir():
        return f"{folder}: no such folder; give the folder of a Hugging Face checkpoint (config.json, *.safetensors)"
    if _is_there(folder / ADAPTER_FILE):
        return f"{folder}: contains an adapter, not a model; give its base here, and this folder as lora.load"
    if any(folder.glob("pytorch_model*.bin*")):
        return (
            f"{folder}: contains only pytorch_model.bin (a pickle, which can run code when loaded); convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW, safe_serialization=True)"
        )
    others = sorted(path.name for kind in ("*.safetensors", "*.gguf", "*.pth") for path in folder.glob(kind))
    if others:
        return (
            f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there, only {others[0]} ({len(others)} such), "
            "another format, a variant or a part; give the complete folder of the model's Hugging Face release"
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give the folder of a Hugging Face checkpoint"
