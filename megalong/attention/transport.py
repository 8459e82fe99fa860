"""How keys and values reach the queries of other context-parallel ranks, and how their gradients return.

    Alone       one rank, which has them already
    Ring        keys are passed from rank to rank; a rank holds two pieces at a time, for any group size
    AllGather   every rank receives all of them, in sequence order: one message, n pieces in memory

Ring, n = 4, rank 2:     step 0: own keys    1: rank 1's    2: rank 0's    3: rank 3's

While a piece is used, the next one is in transit. Backward goes round the ring again. The gradients of keys and values
travel one step behind the pieces, each rank adds its part in float32, and after the last step one more hop returns them
to their owner. They are summed in ring order, so the same run gives the same bits.

Two kinds of messages travel between the same ranks, pieces K and gradients G, and with two ranks the next rank is also
the previous one. Only their order distinguishes them, because NCCL has no tags: it matches the sends and receives of
two ranks in the order in which each issues them.

    every rank, n = 4    K0 | compute | G0 K1 | compute | G1 K2 | compute | G2 | compute | G3

This order depends only on n, however few blocks a rank computes, so the i-th message of one rank is the i-th of its
neighbours. A hop's send and receive are issued as one group, so no rank waits for another to send first. NCCL runs all
hops of a communicator in turn on its own stream, and starts a hop once the work queued before it on the current stream
is done: G0 is sent complete, and K1 overlaps with the next piece's compute. Waiting for a hop blocks the current
stream, not the host; until then, both of its tensors are kept alive here. Gloo also matches messages of equal tag in
order, so tests on CPUs see what NCCL does.

The trade-off: the ring hides n-1 messages behind compute and needs n times less memory; gathering is faster if pieces
are so short that a message takes longer than the compute it hides behind.
Source: ring attention arXiv 2310.01889; gathering as in Llama 3's training, arXiv 2407.21783, section 3.3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megalong.attention.order import from_sequence_order, to_sequence_order
from megalong.attention.plan import AttentionPlan

# torch 2.13 renamed these and warns about the old names on every call.
_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_scatter_sum = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


# Given a source and its pair, computes this rank's part of the pair's gradient. Returns a function that adds this part
# to a float32 tensor of the pair's shape.
Share = Callable[[int | None, torch.Tensor], Callable[[torch.Tensor], None]]


class Transport(Protocol):
    """A pair is keys and values, `[2, m, b, g, d]`; its source is the rank that it belongs to, this rank's own first.

    Source None means the keys of the whole sequence in order. All ranks of a group call the same methods in the same
    order.
    """

    rank: int
    size: int

    def pieces(self, pair: torch.Tensor, plan: AttentionPlan) -> Iterator[tuple[int | None, torch.Tensor]]:
        """Every source with its pair; `pair` is this rank's own."""

    def gradient(self, pair: torch.Tensor, plan: AttentionPlan, share: Share) -> torch.Tensor:
        """The gradient of this rank's own pair, float32: the sum of all ranks' parts, computed by `share`."""


class Alone:
    """A group of one rank."""

    rank, size = 0, 1

    def pieces(self, pair: torch.Tensor, plan: AttentionPlan) -> Iterator[tuple[int | None, torch.Tensor]]:
        """This rank's own pair."""
        yield 0, pair

    def gradient(self, pair: torch.Tensor, plan: AttentionPlan, share: Share) -> torch.Tensor:
        """See `Transport`."""
        add, total = share(0, pair), torch.zeros_like(pair, dtype=torch.float32)
        add(total)
        return total


@dataclass(frozen=True)
class _Arrival:
    """A pending receive, and the tensor being sent, which must stay alive until the send is done."""

    requests: list[Any]
    incoming: torch.Tensor
    outgoing: torch.Tensor

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Arrival:
        """An arrival without a transfer: this rank's own tensor."""
        return cls([], tensor, tensor)

    def wait(self) -> torch.Tensor:
        for request in self.requests:
            request.wait()
        return self.incoming


class Ring:
    """Passes pairs to the next rank of `group`."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pieces(self, pair: torch.Tensor, plan: AttentionPlan) -> Iterator[tuple[int | None, torch.Tensor]]:
        """Every rank's pair in turn; while one is used, the next is in transit."""
        for step in range(self.size):
            arrival = self._pass_on(pair) if step + 1 < self.size else _Arrival.of(pair)
            yield (self.rank - step) % self.size, pair
            pair = arrival.wait()

    def gradient(self, pair: torch.Tensor, plan: AttentionPlan, share: Share) -> torch.Tensor:
        """See `Transport`. Waits for the sum of the previous ranks only after this rank's part is computed."""
        returning = _Arrival.of(torch.zeros_like(pair, dtype=torch.float32))
        for source, current in self.pieces(pair, plan):
            add, total = share(source, current), returning.wait()
            add(total)
            returning = self._pass_on(total)
        return returning.wait()

    def _pass_on(self, tensor: torch.Tensor) -> _Arrival:
        """Start sending `tensor` to the next rank and receiving the same from the previous one."""
        incoming = torch.empty_like(tensor)
        following, preceding = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        send = dist.P2POp(dist.isend, tensor, group=self.group, group_peer=following)
        receive = dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=preceding)
        return _Arrival(dist.batch_isend_irecv([send, receive]), incoming, tensor)


class AllGather:
    """Gives every rank of `group` all keys, in forward and again in backward, and reduce-scatters their gradients.

    `joined`: number of context-parallel ranks whose tokens are on each rank of the group.
    """

    def __init__(self, group: dist.ProcessGroup, joined: int = 1) -> None:
        self.group, self.joined = group, joined
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def pieces(self, pair: torch.Tensor, plan: AttentionPlan) -> Iterator[tuple[int | None, torch.Tensor]]:
        """One pair: all keys."""
        yield None, self._gathered(pair, plan)

    def gradient(self, pair: torch.Tensor, plan: AttentionPlan, share: Share) -> torch.Tensor:
        """See `Transport`."""
        whole = self._gathered(pair, plan)
        add, total = share(None, whole), torch.zeros_like(whole, dtype=torch.float32)
        add(total)
        by_rank = from_sequence_order(total, plan, slice(None), self.joined, dim=1)
        by_rank = by_rank.unflatten(1, (self.size, -1)).transpose(0, 1).flatten(0, 1)
        own = torch.empty_like(by_rank[:2])
        _scatter_sum(own, by_rank, group=self.group)
        return own

    def _gathered(self, pair: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
        gathered = pair.new_empty((self.size * 2, *pair.shape[1:]))
        _gather(gathered, pair.contiguous(), group=self.group)
        by_rank = gathered.unflatten(0, (self.size, 2)).transpose(0, 1).flatten(1, 2)
        return to_sequence_order(by_rank, plan, slice(None), self.joined, dim=1)
