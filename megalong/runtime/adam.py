"""AdamW with the interface that Megatron-Core expects of Transformer Engine's and apex's `FusedAdam`.

If neither is installed, Megatron-Core falls back to `torch.optim.AdamW`, which stores `step` once per parameter; its
distributed optimizer then cannot load what it saved (`KeyError: 'step'`). `FusedAdam` stores `step` in the parameter
group. This class does the same with torch's own fused kernel (CPU and CUDA), so that saving, resharding and loading
follow the same path as on a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101) whose step count lives in `param_groups[i]["step"]`.

    Args:
        params: parameters or parameter groups, fp32.
        adam_w_mode: part of FusedAdam's signature; must be True, because only decoupled weight decay is implemented.
    """

    def __init__(self, params: Iterable[Any], *, adam_w_mode: bool = True, **options: Any) -> None:
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False: only decoupled weight decay is implemented; leave it True")
        super().__init__(params, **options)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Bypass torch's AdamW, which looks for `step` in every parameter's state."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; all groups advance together."""
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None and p.numel() > 0]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        states = [self._state_of(p) for p in params]
        beta1, beta2 = group["betas"]
        # `adamw` adds one to each count before it uses it. One tensor for all: on a GPU each would be a launch.
        counts = torch.full((len(params),), group["step"] - 1, dtype=torch.float32, device=params[0].device)
        adamw(
            params,
            [p.grad for p in params],  # type: ignore[misc]
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            list(counts.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state
