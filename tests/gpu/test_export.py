"""A run on the GPU through the commands a user types: train, resume, export; transformers agrees with its loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaForCausalLM

from megalong.config.schema import Config
from megalong.data.samples.sampler import PackedSamples
from tests.llama import make_dataset, make_llama, run_settings


def megalong(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megalong", *arguments], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_train_resume_and_export(tmp_path: Path) -> None:
    settings = run_settings(
        tmp_path / "run",
        make_llama(tmp_path / "hf"),
        make_dataset(tmp_path / "data"),
        runtime={"device": "cuda"},
        evaluation={"interval": 5, "iters": 2},
        checkpoint={"save_interval": 5},
    )
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    megalong("train", str(config), "training.train_iters=5", "optimizer.lr_schedule=constant")
    log = megalong("train", str(config), "optimizer.lr_schedule=constant")
    assert "resumed" in log
    megalong("checkpoint", "export", "--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    last = [line for line in log.splitlines() if "held-out" in line][-1]
    ours = float(last.split("held-out ")[1].split()[0])
    assert transformers_loss(tmp_path / "out", Config.model_validate(settings)) == pytest.approx(ours, abs=1e-3)


def transformers_loss(folder: Path, config: Config) -> float:
    """Mean loss of the exported model on the run's held-out batches."""
    data = config.data
    samples = PackedSamples(data.mixture, data.seq_length, config.run.seed, data.split, "validation")
    count = config.evaluation.iters * config.training.global_batch_size
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).cuda()
    losses = []
    for index in range(count):
        row = torch.from_numpy(samples.row(index).tokens[:]).cuda()
        with torch.no_grad():
            logits = model(row[None, :-1]).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), row[1:]))
    return float(torch.stack(losses).mean())
