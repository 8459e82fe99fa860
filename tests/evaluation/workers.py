"""What ranks of the pool run for the evaluation tests."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from megalong.runtime import distributed
from megalong.runtime.grid import Grid


def position_means(hf: Path, data: Path, seq_length: int, samples: int) -> list[float | None]:
    """Mean loss by position of a Hugging Face folder, the world split over the context."""
    device = torch.device("cpu")
    distributed.start(device)  # before anything imports megatron
    from megalong.evaluation.measure import measure_losses
    from megalong.evaluation.source import find_model, open_held_out

    source = find_model(hf=hf)
    packed = open_held_out(str(data), seq_length, samples, source)
    distributed.set_grid(Grid(context=dist.get_world_size()))
    try:
        return measure_losses(source, packed, samples, device).means()
    finally:
        distributed.clear_grid()


def continuations(
    hf: Path | None, jobs: list[tuple[list[int], int, int]], checkpoint: Path | None = None
) -> list[list[int]]:
    """Greedy continuations by a Hugging Face folder or a checkpoint; a job is (prompt, new tokens, prefill chunk)."""
    distributed.start(torch.device("cpu"))
    from megalong.evaluation.generate import new_tokens
    from megalong.evaluation.measure import load_model
    from megalong.evaluation.source import find_model
    from megalong.model.build import unwrap

    distributed.set_grid(Grid())
    try:
        model = unwrap(load_model(find_model(checkpoint, hf))[0])
        return [list(new_tokens(model, ids, count, prefill_chunk=chunk)) for ids, count, chunk in jobs]
    finally:
        distributed.clear_grid()


def peak_bytes(hf: Path, seq_length: int) -> tuple[int, int]:
    """(Bytes of the model's weights, bytes that measuring one sample takes on top), as torch counts them."""
    device = torch.device("cpu")
    distributed.start(device)
    from megalong.attention.layout import TokenLayout
    from megalong.evaluation.buckets import PositionLoss
    from megalong.evaluation.forward import forward_losses
    from megalong.evaluation.measure import load_model
    from megalong.evaluation.source import find_model
    from tests.batches.whole import shard_samples

    distributed.set_grid(Grid())
    try:
        chunks = load_model(find_model(hf=hf))
        batch = shard_samples(torch.ones(1, seq_length + 1, dtype=torch.int64), TokenLayout(1), 0, device)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            forward_losses(chunks, [batch], PositionLoss(seq_length))
    finally:
        distributed.clear_grid()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return sum(one.numel() * one.element_size() for one in chunks[0].parameters()), peak


def next_logits(
    hf: Path | None, ids: list[int], checkpoint: Path | None = None, dtype: str | None = None
) -> list[float]:
    """Logits of the token behind `ids`, by a Hugging Face folder or a checkpoint, in the type it is computed in."""
    distributed.start(torch.device("cpu"))
    from megalong.evaluation.measure import load_model
    from megalong.evaluation.source import find_model
    from megalong.model.build import unwrap
    from megalong.model.kv_cache import KVCache

    distributed.set_grid(Grid())
    try:
        model = unwrap(load_model(find_model(checkpoint, hf, dtype))[0]).eval()
        with torch.no_grad():
            return model.next_logits(torch.tensor([ids]), KVCache(len(ids)))[0].float().tolist()
    finally:
        distributed.clear_grid()
