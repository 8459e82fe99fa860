"""A run by the commands a user types: train, save in the background, resume, export, evaluate, generate.

The model has heads of 128 channels and samples of 1024 tokens in bf16, so that on Hopper its attention is cuDNN's.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.gpu.harness import Trial
from tests.gpu.steps.commands import megalong
from tests.llama import make_dataset, make_llama, run_settings

SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 128}  # fmt: skip
SAVED, LAST = 5, 10
NEAR = 2e-2  # nats: held-out loss in bf16 beside transformers' in float32


def run(trial: Trial) -> None:
    """All of it, on files in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        config, tree = _config(trial, here)
        first = megalong("train", config, f"training.train_iters={SAVED}", "optimizer.lr_schedule=constant")
        trial.check("train ends with 0", first.returncode == 0, _end(first.stderr))
        trial.check("the first half is saved", _checkpoints(here) == [SAVED], str(_checkpoints(here)))
        second = megalong("train", config, "optimizer.lr_schedule=constant")
        trial.check("the resumed run ends with 0", second.returncode == 0, _end(second.stderr))
        trial.check("it says that it resumed", "resumed from" in second.stderr)
        trial.check("the second half is saved", _checkpoints(here) == [SAVED, LAST], str(_checkpoints(here)))
        held_out = re.findall(r"held-out ([0-9.]+)", second.stderr)
        trial.figure("held-out loss", float(held_out[-1]) if held_out else None, headline=True)
        export = megalong("checkpoint", "export", "--checkpoint", str(here / "run"), "--output", str(here / "out"))
        trial.check("export ends with 0", export.returncode == 0, _end(export.stderr))
        with trial.part("transformers agrees"):
            theirs = _transformers_loss(here / "out", tree, trial.device)
            trial.figure("transformers' loss of the export", theirs, headline=True)
            trial.check("it is the run's", abs(theirs - float(held_out[-1])) < NEAR)
        _evaluate(trial, here, tree["data"]["seq_length"])
        _generate(trial, here)


def _config(trial: Trial, here: Path) -> tuple[str, dict[str, Any]]:
    length = trial.size(1024, 64)
    shape = {**SHAPE, "max_position_embeddings": length}
    if trial.rehearse:
        shape |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    tree = run_settings(
        here / "run",
        make_llama(here / "hf", **shape),
        make_dataset(here / "data", documents=800),
        runtime={"device": trial.device.type},
        precision={"params_dtype": "bf16"},
        memory={"recompute": "full"},
        evaluation={"interval": SAVED, "iters": 1},
        checkpoint={"save_interval": SAVED, "async_save": True},
    )
    tree["data"]["seq_length"] = length
    config = here / "run.yaml"
    config.write_text(yaml.safe_dump(tree))
    return str(config), tree


def _checkpoints(here: Path) -> list[int]:
    """Steps of the run that have a whole checkpoint."""
    from megalong.checkpoint.folder import read_meta, whole_checkpoints

    return sorted(read_meta(path).step for path in whole_checkpoints(here / "run"))


def _transformers_loss(folder: Path, tree: dict[str, Any], device: torch.device) -> float:
    """Mean loss of the exported model on the run's held-out batch."""
    from transformers import LlamaForCausalLM

    from megalong.config.schema import Config
    from megalong.data.samples.sampler import PackedSamples

    config = Config.model_validate(tree)
    data = config.data
    samples = PackedSamples(data.mixture, data.seq_length, config.run.seed, data.split, "validation")
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    losses = []
    for index in range(config.training.global_batch_size):
        row = torch.from_numpy(samples.row(index).tokens[:]).to(device)
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
    return float(torch.stack(losses).mean())


def _evaluate(trial: Trial, here: Path, length: int) -> None:
    done = megalong(
        "evaluate", "perplexity", "--checkpoint", str(here / "run"), "--data", str(here / "data"),
        "--seq-length", str(length), "--samples", "2", "--output", str(here / "perplexity"),
    )  # fmt: skip
    trial.check("evaluate ends with 0", done.returncode == 0, _end(done.stderr))


def _generate(trial: Trial, here: Path) -> None:
    _save_tokenizer(here / "out")
    done = megalong("generate", "--hf", str(here / "out"), "--prompt", "w7 w8 w9", "--max-new-tokens", "8")
    trial.check("generate ends with 0", done.returncode == 0, _end(done.stderr))
    trial.check("it says something", bool(re.search(r"w\d", done.stdout)), done.stdout[-100:])


def _save_tokenizer(folder: Path) -> None:
    """A word for every token of the model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w2"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="w0", eos_token="w1").save_pretrained(folder)


def _end(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1][-300:] if lines else ""
