"""Compare the logits of `transformers` on the export with ours on the checkpoint.

Both read the same held-out tokens, far beyond the original length, in fp32. transformers also multiplies position and
frequency in fp32, so its rotary angles are rounded, more so at larger positions; ours are exact. So transformers runs
twice: unchanged, and with angles in float64, which leaves only the order of fp32 additions as a difference.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megalong.evaluation.source import ModelSource, find_model, open_held_out

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Comparison:
    """The difference between two models' logits on the same tokens.

    Attributes:
        tokens: length of the sequence.
        largest_difference: largest |ours - theirs| of any logit, with transformers unchanged.
        with_exact_angles: the same with transformers' rotary angles in float64.
        deviation: standard deviation of the logits, as a scale.
        agreement: share of positions where the same token is most likely in both.
    """

    tokens: int
    largest_difference: float
    with_exact_angles: float
    deviation: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"logits at {self.tokens} positions differ by at most {self.largest_difference:.1e} (their standard "
            f"deviation is {self.deviation:.2f}; transformers rounds rotary angles to fp32, with exact angles it is "
            f"{self.with_exact_angles:.1e}); the most likely token is the same at {100 * self.agreement:.2f} % of them"
        )


def compare_with_transformers(run: Path, export: Path, data: Path, seq_length: int) -> Comparison:
    """Read the first held-out sample with the run's newest checkpoint and with its Hugging Face export, in fp32."""
    # The CPU adapter looks for a GPU; this comparison runs on the CPU even if there is one.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    source = find_model(run)
    sample = open_held_out(str(data), seq_length, 1, source).row(0)
    tokens = torch.from_numpy(sample.tokens[:][None])
    with torch.no_grad():
        theirs, exact = _their_logits(export, tokens[:, :-1])
        ours = _our_logits(source, tokens)
    return Comparison(
        tokens=seq_length,
        largest_difference=(ours - theirs).abs().max().item(),
        with_exact_angles=(ours - exact).abs().max().item(),
        deviation=theirs.std().item(),
        agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
    )


def _their_logits(export: Path, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of unchanged transformers, and with rotary angles in float64."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    unchanged = model(tokens).logits[0]
    model.model.rotary_emb.forward = partial(_exact_rotary, model.model.rotary_emb)
    return unchanged, model(tokens).logits[0]


def _exact_rotary(rotary: Any, hidden: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The result of transformers' rotary embedding, (cos, sin) [b, s, d], from angles in float64."""
    half = position_ids[..., None].double() * rotary.inv_freq.double()
    angles = half.repeat(1, 1, 2)
    scale = rotary.attention_scaling
    return (angles.cos() * scale).to(hidden.dtype), (angles.sin() * scale).to(hidden.dtype)


def _our_logits(source: ModelSource, sample: torch.Tensor) -> torch.Tensor:
    import torch

    from megalong.runtime.grid import Grid
    from megalong.runtime.world import world

    with world(torch.device("cpu"), Grid()):
        # These import Megatron-Core, for which the process must be prepared first.
        from megalong.attention.layout import TokenLayout
        from megalong.batches.context_shard import ContextShard
        from megalong.batches.micro_batch import make_micro_batch
        from megalong.data.samples.sample import Sample
        from megalong.evaluation.measure import load_model
        from megalong.model.attention_inputs import AttentionInputs

        model = load_model(source)[0].eval()
        whole = Sample(sample[0].numpy(), np.zeros(1, np.int64), sample.shape[1])
        batch = make_micro_batch([whole], ContextShard(TokenLayout(1)))
        logits = model(batch.tokens, None, AttentionInputs.of(batch))
        return logits[0, :, : source.architecture.vocab_size].float()
