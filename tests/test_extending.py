"""What docs/extending.md says is enough: a toy family, a toy RoPE type and a toy kind of sample, added from here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megalong.config.rope import RopeSettings
from megalong.data.samples.sample import Sample
from megalong.hf import family
from megalong.hf.config import read_architecture, write_config
from megalong.hf.family import FAMILIES, Family
from megalong.rope import frequencies, hf
from tests.llama import VOCABULARY, make_dataset, make_llama, run_settings
from tests.pool import WorkerPool
from tests.training.gradients import plain_llama

HERE = "tests.test_extending"

# --- a family: Llama's layers under another name, with another default ------------------------------------------------
TOY = Family(
    "ToyForCausalLM",
    {**family._DEFAULTS, "rms_norm_eps": 1e-4},
    read=lambda config: {},
    can_describe=lambda architecture: architecture.window_size is None,
    write=lambda architecture: {"toy_version": 1},
)


def toy_logits(*arguments: Any) -> np.ndarray:
    from tests.model.workers import logits

    with patch.dict(FAMILIES, {"toy": TOY}):
        return logits(*arguments)


def test_a_family_is_read_computed_and_written(
    tmp_path: Path, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_llama(tmp_path / "hf", rms_norm_eps=1e-4)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (2, 24)).tolist()
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor(tokens)).logits.double()
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), "model_type": "toy"}
    del config["rms_norm_eps"]
    file.write_text(json.dumps(config))

    for ours in pool.run(2, f"{HERE}:toy_logits", str(folder), list(range(24)), tokens, {"tensor": 2}):
        assert np.abs(ours - theirs.numpy()).max() <= 1e-4
    monkeypatch.setitem(FAMILIES, "toy", TOY)
    written = write_config(read_architecture(folder), config)
    names = ("model_type", "architectures", "toy_version", "rms_norm_eps")
    assert [written[name] for name in names] == ["toy", ["ToyForCausalLM"], 1, 1e-4]


# --- a RoPE type: positions count for less ----------------------------------------------------------------------------
class ToyRope(RopeSettings):
    """Step 1 in place: the name is allowed."""

    type: Literal["none", "linear", "ntk", "yarn", "llama3", "slower"] = "none"  # type: ignore[assignment]


def test_a_rope_type_turns_and_is_spelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the speed is transformers' linear scaling by two."""

    def slower(rope: RopeSettings, head_dim: int) -> torch.Tensor:
        return frequencies.SCALINGS["none"](rope, head_dim) / rope.factor

    monkeypatch.setitem(frequencies.SCALINGS, "slower", slower)
    monkeypatch.setitem(hf.FIELDS, "slower", ("factor",))
    monkeypatch.setattr(hf, "RopeSettings", ToyRope)
    rope = ToyRope(type="slower", rope_theta=10000.0, factor=2.0)
    scaling = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    theirs = LlamaRotaryEmbedding(LlamaConfig(head_dim=16, rope_parameters=scaling)).inv_freq
    assert torch.equal(frequencies.inverse_frequencies(rope, 16), theirs)
    written = hf.to_hf(rope, 64, 16)
    assert written["rope_parameters"] == {"rope_type": "slower", "rope_theta": 10000.0, "factor": 2.0}
    assert hf.from_hf(written) == rope


# --- a kind of sample: two documents that count, each in its own steps ------------------------------------------------
class Counting:
    """In sample k a third counts up from k by ones, the rest by twos; neither sees the other."""

    def __init__(self, seq_length: int) -> None:
        self.seq_length = seq_length

    def documents(self, k: int) -> Iterator[np.ndarray]:
        """Its documents' tokens."""
        first = self.seq_length // 3
        yield (k + np.arange(first)) % VOCABULARY
        yield (k + 2 * np.arange(self.seq_length + 1 - first)) % VOCABULARY

    def read(self, k: int) -> Sample:
        """See `SampleSource`."""
        return Sample(np.concatenate([*self.documents(k)]), np.array([0, self.seq_length // 3]), self.seq_length + 1)

    def describe(self, samples: int) -> Sequence[object]:
        """See `SampleSource`."""
        return [f"counting: {samples} samples"]

    def prepare(self, first: int, last: int) -> None:
        """See `SampleSource`."""


def counting_run(settings: dict[str, Any]) -> list[dict[str, Any]]:
    from megalong.training import loop
    from tests.training.workers import _Records, _session

    def opened(config: Any, *_: Any) -> Counting:
        return Counting(config.data.seq_length)

    with patch.object(loop, "open_samples", opened), _session(settings) as session:
        records = _Records()
        loop.Trainer(session, records).run()
        return records.kept


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"context_parallel_size": 2})], ids=["one", "CP2"])
def test_a_kind_of_sample_is_trained_on(world: int, parallel: dict[str, int], tmp_path: Path, pool: WorkerPool) -> None:
    """The first step's loss is the mean over the documents' tokens, each document read alone by transformers."""
    llama = make_llama(tmp_path / "hf")
    settings = run_settings(tmp_path / "run", llama, make_dataset(tmp_path / "data"), parallel=parallel)
    settings["data"]["packing"] = "masked"
    settings["training"]["train_iters"] = 3
    model, losses = plain_llama(llama), []
    for k in range(settings["training"]["global_batch_size"]):
        for document in Counting(settings["data"]["seq_length"]).documents(k):
            tokens = torch.tensor(document)[None]
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none"))
    expected = torch.cat(losses).mean()
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for records in pool.run(world, f"{HERE}:counting_run", settings):
        assert [record["step"] for record in records] == [1, 2, 3]
        assert records[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
        assert records[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-5)
