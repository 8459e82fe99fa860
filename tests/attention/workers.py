"""What ranks do in the tests of context-parallel attention."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megalong.attention.exchange import ContextGroups, context_attention
from megalong.attention.kernels import CPU, BlockKernel
from megalong.attention.layout import Kind, TokenLayout
from megalong.attention.plan import AttentionPlan, make_plan
from tests.attention.reference import Case, random_case

ALONE = ContextGroups()


@dataclass(frozen=True)
class Setting:
    """One attention: its tensors, its documents and the way it is shared."""

    seed: int
    length: int
    groups: int
    group_size: int
    head_dim: int
    starts: tuple[tuple[int, ...], ...]  # of every row
    dtype: torch.dtype = torch.float32
    window: int | None = None
    kind: Kind = "zigzag"

    @property
    def rows(self) -> list[np.ndarray]:
        """First tokens of every row's documents."""
        return [np.array(row, np.int64) for row in self.starts]

    def case(self) -> Case:
        """The whole sequences."""
        return random_case(
            self.seed, self.length, len(self.starts), self.groups, self.group_size, self.head_dim, self.dtype
        )

    def plan(self, ranks: int) -> AttentionPlan:
        """On `ranks` ranks."""
        return make_plan(TokenLayout(ranks, self.kind, self.window), self.length, self.rows)


def attend(
    case: Case, plan: AttentionPlan, groups: ContextGroups = ALONE, window: int | None = None, kernel: BlockKernel = CPU
) -> list[torch.Tensor]:
    """[out, grad_q, grad_k, grad_v] of this rank's tokens."""
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    out = context_attention(leaves[0], leaves[1], leaves[2], plan, groups, kernel, case.scale, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]


def exchange_groups(exchange: str) -> ContextGroups:
    """The world shared as `exchange` says; `ring_2` has neighbourhoods of two that share heads."""
    world = dist.group.WORLD
    if dist.get_world_size() == 1:
        return ALONE
    if exchange in ("ring", "all_gather"):
        return ContextGroups(keys=world, transport=exchange)  # type: ignore[arg-type]
    if exchange == "ulysses":
        return ContextGroups(heads=world)
    size, ranks = 2, dist.get_world_size()
    heads = [dist.new_group(list(range(i, i + size))) for i in range(0, ranks, size)]
    keys = [dist.new_group(list(range(i, ranks, size))) for i in range(size)]
    rank = dist.get_rank()
    transport = "ring" if exchange == "ring_2" else "all_gather"
    return ContextGroups(heads[rank // size], keys[rank % size], transport)  # type: ignore[arg-type]


def shares(setting: Setting, exchanges: list[str]) -> list[list[torch.Tensor]]:
    """This rank's part of the attention, by each exchange."""
    plan = setting.plan(dist.get_world_size())
    mine = setting.case().on(plan, dist.get_rank())
    return [attend(mine, plan, exchange_groups(exchange), setting.window) for exchange in exchanges]


def repeat(times: int, length: int) -> bool:
    """Whether `times` runs on different data, under uneven load, each give the bits of their second run."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    groups = exchange_groups("ring")
    same = True
    for seed in range(times):
        setting = Setting(seed, length, 2, 2, 8, ((0, length // 3),))
        plan = setting.plan(dist.get_world_size())
        case = setting.case().on(plan, dist.get_rank())
        first = attend(case, plan, groups)
        torch.randn(int(torch.randint(1, 200_000, (), generator=generator)))  # ranks drift apart
        second = attend(case, plan, groups)
        same = same and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return same


def in_two_subgroups() -> list[torch.Tensor]:
    """Ranks 0, 2 and ranks 1, 3 attend to different sequences: group ranks are not global ranks."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    which, place = dist.get_rank() % 2, dist.get_rank() // 2
    setting = Setting(40 + which, 32, 2, 2, 8, ((0,),))
    plan = setting.plan(2)
    return attend(setting.case().on(plan, place), plan, ContextGroups(keys=groups[which]))


def two_layers_at_once(exchange: str) -> list[torch.Tensor]:
    """Two attentions in one graph, as in a model: backward of one follows backward of the other."""
    setting = Setting(60, 48, 4, 1, 8, ((0, 20), (0,)))
    plan, groups = setting.plan(dist.get_world_size()), exchange_groups(exchange)
    case = setting.case().on(plan, dist.get_rank())
    leaves = [t.clone().requires_grad_() for t in (case.q, case.k, case.v)]
    hidden = context_attention(leaves[0], leaves[1], leaves[2], plan, groups, CPU, case.scale)
    out = context_attention(hidden, leaves[1], leaves[2], plan, groups, CPU, case.scale)
    return [out.detach(), *torch.autograd.grad(out, leaves, case.grad)]
