"""Many blocks in one launch, on a CPU: the packing around FlashAttention's kernel, with the kernel written out plainly.

`plain_varlen` is what flash documents: sequences end to end by cumulative lengths, and a window counted from the
bottom right corner of each. No GPU is needed to see that blocks are cut, packed, masked and put back right.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalong.attention.kernels import TILED
from megalong.attention.layout import TokenLayout
from megalong.attention.mask import BlockMask
from megalong.attention.plan import make_plan
from megalong.attention.varlen import PackedBlocks, VarlenKernel, launches
from tests.attention import workers
from tests.attention.reference import assert_near, dense
from tests.attention.test_exchange import drawn_settings
from tests.attention.workers import Setting


def each(launch: PackedBlocks) -> list[tuple[slice, slice, BlockMask]]:
    """(queries, keys, mask) of every sequence in a launch, from what flash is told."""
    q_ends, k_ends, _, longest_keys = launch.bounds
    found = []
    for index in range(len(q_ends) - 1):
        q, k = (slice(int(ends[index]), int(ends[index + 1])) for ends in (q_ends, k_ends))
        corner, (left, right) = (k.stop - k.start) - (q.stop - q.start), launch.window
        if left >= 0 and right < 0:
            right = longest_keys  # flash's own rule, for all sequences of a launch
        found.append((q, k, BlockMask(None if right < 0 else corner + right, None if left < 0 else corner - left)))
    return found


def plain_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, launch: PackedBlocks, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [TILED.forward(q[i, None], k[j, None], v[j, None], mask, scale) for i, j, mask in each(launch)]
    return torch.cat([out[:, 0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], -1)


def plain_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    launch: PackedBlocks,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    parts = [
        TILED.backward(
            grad_out[i, None], q[i, None], k[j, None], v[j, None], out[i, None], lse[None, :, i], mask, scale
        )
        for i, j, mask in each(launch)
    ]
    return tuple(torch.cat([part[place][:, 0] for part in parts]) for place in range(3))


PLAIN = dataclasses.replace(TILED, varlen=VarlenKernel(plain_forward, plain_backward))  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(setting=drawn_settings(1))
def test_packed_blocks_are_attention(setting: Setting) -> None:
    ours = workers.attend(setting.case(), setting.plan(1), window=setting.window, kernel=PLAIN)
    assert_near(ours, dense(setting.case(), setting.rows, setting.window), setting.dtype)


@pytest.mark.parametrize("ranks", [2, 4])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed_blocks_of_every_source_are_what_each_computes_alone(ranks: int, data: st.DataObject) -> None:
    """Windows on several ranks make blocks of many queries and few keys, which is where flash's rule bites."""
    setting = data.draw(drawn_settings(2 * ranks))
    plan = setting.plan(ranks)
    q, k = (torch.randn(setting.length // ranks, 1, 2, 8) for _ in range(2))
    for rank, source in ((0, 1), (1, 0), (1, 1), (0, None)):
        keys = torch.randn(setting.length, 1, 2, 8) if source is None else k
        for _, blocks in plan.blocks(rank, source, setting.window):
            for launch in launches(blocks):
                packed = launch.on(torch.device("cpu"))
                i, j = packed.queries, packed.keys
                together = plain_forward(q[i, 0], keys[j, 0], keys[j, 0], packed, 0.3)
                alone = [TILED.forward(q[b.queries], keys[b.keys], keys[b.keys], b.mask, 0.3) for b in launch.blocks]
                torch.testing.assert_close(together[0], torch.cat([out[:, 0] for out, _ in alone]))
                torch.testing.assert_close(together[1], torch.cat([lse[0] for _, lse in alone], -1))


def test_a_hundred_documents_take_one_launch() -> None:
    starts = np.arange(0, 1000, 10)
    (_, blocks), = make_plan(TokenLayout(), 1000, [starts]).blocks(0, 0, None)  # fmt: skip
    assert len(blocks) == 100
    assert len(launches(blocks)) == 1


@pytest.mark.parametrize("source", [None, 0, 1])
@pytest.mark.parametrize("starts", [[0], [0, 3, 4, 40]])
def test_every_block_is_launched_once_and_no_query_twice_at_a_time(source: int | None, starts: list[int]) -> None:
    (_, blocks), = make_plan(TokenLayout(4), 64, [np.array(starts)]).blocks(0, source, 60)  # fmt: skip
    launched = [block for launch in launches(blocks) for block in launch.blocks]
    assert sorted(map(repr, launched)) == sorted(map(repr, blocks))
    for launch in launches(blocks):
        queries = torch.arange(16)[launch.on(torch.device("cpu")).queries]
        assert len(queries.unique()) == len(queries)
