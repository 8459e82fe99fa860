"""What ranks do in the tests of ring attention."""

import torch
import torch.distributed as dist

from megalong.attention.layout import ZigzagLayout
from megalong.attention.ring import ring_attention
from tests.attention.reference import Case, random_case

Shape = tuple[int, int, int, int, int]  # tokens a chunk, batch, groups, group size, head dimension


def attend(case: Case, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] of ring attention."""
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    out = ring_attention(leaves[0], leaves[1], leaves[2], case.scale, group)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def shares(cases: list[tuple[int, Shape, torch.dtype]]) -> list[list[torch.Tensor]]:
    """This rank's part of every case, one after the other on the same group."""
    results = []
    for seed, (chunk, batch, groups, group_size, head_dim), dtype in cases:
        length = 2 * dist.get_world_size() * chunk
        case = random_case(seed, length, batch, groups, group_size, head_dim, dtype)
        mine = case.on(ZigzagLayout(dist.get_world_size()).indices(length, dist.get_rank()))
        results.append(attend(mine, dist.group.WORLD))
    return results


def repeat(times: int, chunk: int) -> bool:
    """Whether `times` runs on different data, under uneven load, each give the bits of their second run."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    same = True
    for seed in range(times):
        case = random_case(100 * seed + dist.get_rank(), 2 * chunk, 1, 2, 2, 8, torch.float32)
        first = attend(case, dist.group.WORLD)
        torch.randn(int(torch.randint(1, 200_000, (), generator=generator)))  # ranks drift apart
        second = attend(case, dist.group.WORLD)
        same = same and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return same


def in_two_subgroups() -> list[torch.Tensor]:
    """Ranks 0, 2 and ranks 1, 3 attend to different sequences: group ranks are not global ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    which, place = dist.get_rank() % 2, dist.get_rank() // 2
    case = random_case(40 + which, 32, 1, 2, 2, 8, torch.float32)
    return attend(case.on(ZigzagLayout(2).indices(32, place)), groups[which])


def two_layers_at_once() -> list[torch.Tensor]:
    """Two attentions in one graph, as in a model: backward of one follows backward of the other."""
    case = random_case(60, 48, 2, 2, 2, 8, torch.float32)
    mine = case.on(ZigzagLayout(dist.get_world_size()).indices(48, dist.get_rank()))
    leaves = [t.clone().requires_grad_() for t in (mine.q, mine.k, mine.v)]
    hidden = ring_attention(leaves[0], leaves[1], leaves[2], case.scale, dist.group.WORLD)
    out = ring_attention(hidden, leaves[1], leaves[2], case.scale, dist.group.WORLD)
    return [out.detach(), *torch.autograd.grad(out, leaves, mine.grad)]
