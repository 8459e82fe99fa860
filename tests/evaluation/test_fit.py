"""What an evaluation takes, against torch's own count of memory, and what is said where there is less."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megalong import cli
from megalong.config.architecture import Architecture
from megalong.errors import UserError
from megalong.evaluation import command
from megalong.evaluation.fit import Need, need_of, refuse_what_cannot_fit
from megalong.evaluation.source import find_model
from tests.llama import make_dataset, make_llama
from tests.pool import WorkerPool

GIB = 2**30
LLAMA_8B = Architecture.model_validate(
    {
        "hidden_size": 4096,
        "ffn_hidden_size": 14336,
        "num_layers": 32,
        "num_attention_heads": 32,
        "num_query_groups": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope": {"type": "none", "rope_theta": 5e5},
    }
)


@pytest.mark.parametrize(
    ("dtype", "vocabulary", "tied"),
    [
        pytest.param(torch.float32, 4096, False, id="fp32"),
        pytest.param(torch.bfloat16, 4096, True, id="bf16-tied"),
        pytest.param(torch.bfloat16, 4097, False, id="bf16-padded"),
        pytest.param(torch.float32, 4097, False, id="fp32-padded"),
    ],
)
def test_the_need_is_what_torch_allocates(
    dtype: torch.dtype, vocabulary: int, tied: bool, tmp_path: Path, pool: WorkerPool
) -> None:
    """Exact but for vectors (norms in the weights, losses and positions in the rest); never more than is taken."""
    hf = make_llama(tmp_path / "hf", dtype=dtype, vocab_size=vocabulary, tie_word_embeddings=tied)
    length = 512
    ((weights, peak),) = pool.run(1, "tests.evaluation.workers:peak_bytes", hf, length)
    need = need_of(find_model(hf=hf).architecture)
    assert 0.998 * weights <= need.weights <= weights
    assert 0.97 * peak <= length * need.per_token <= peak


def test_an_8b_ends_near_80_000_tokens_on_80_gb() -> None:
    need = need_of(LLAMA_8B)
    assert need.weights == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert 79_000 < (80e9 - need.weights) / need.per_token < 83_000
    assert Need(100, 3).total(10, 4) == 100 + 3 * 3


def test_what_cannot_fit_is_refused_with_figures_and_what_to_write_instead() -> None:
    there = 79.1 * GIB
    refuse_what_cannot_fit(LLAMA_8B, 2**19, 8, there, on_gpu=True)
    expected = (
        r"--seq-length 1048576: measuring needs 109\.9 GiB on each of 8 GPU processes \(15\.0 of weights, 94\.9 of "
        r"logits\), and 79\.1 GiB are free there; start at least 12 processes.*--nproc 12.*--seq-length 708448 or less"
    )
    with pytest.raises(UserError, match=expected):
        refuse_what_cannot_fit(LLAMA_8B, 2**20, 8, there, on_gpu=True)
    for length, world in ((2**20, 12), (708448, 8)):  # what it says does fit
        refuse_what_cannot_fit(LLAMA_8B, length, world, there, on_gpu=True)
    with pytest.raises(UserError, match=r"start at least 12 "):
        refuse_what_cannot_fit(LLAMA_8B, 2**20, 11, there, on_gpu=True)
    with pytest.raises(UserError, match=r"14\.0 GiB are free there: each holds the whole model; use GPUs with more"):
        refuse_what_cannot_fit(LLAMA_8B, 64, 8, 14 * GIB, on_gpu=True)
    with pytest.raises(UserError, match=r"2 CPU processes .*write --seq-length \d+ or less, or use GPUs$"):
        refuse_what_cannot_fit(LLAMA_8B, 2**20, 2, 32 * GIB, on_gpu=False)


def test_the_command_refuses_before_it_reads_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, data, output = make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"), tmp_path / "out"
    (hf / "model.safetensors").write_bytes(b"not read")
    monkeypatch.setattr(command, "free_bytes", lambda device, local_world: 2**20)
    capsys.readouterr()  # transformers' progress of writing it
    arguments = ["--hf", str(hf), "--data", str(data), "--seq-length", "1024", "--samples", "1"]
    assert cli.main(["evaluate", "perplexity", *arguments, "--output", str(output)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if "warning: " not in line]
    assert len(said) == 1
    assert "--seq-length 1024: measuring needs 0.0 GiB on each of 1 CPU processes" in said[0]
    assert not output.exists()
