"""The optimizer's parameter groups at a resume: the configuration's values over the checkpoint's.

Megatron-Core keeps a group's hyper-parameters (`max_lr`, `min_lr`, `betas`, `eps`, `weight_decay`, …) in the state of
the optimizer, and loading that state puts the saved ones back: 0.16 in silence, 0.19 with a KeyError where one has
changed, because it finds groups by them. So before a state is loaded its groups get the values of the present ones,
which the configuration made; only `step`, the count of updates, is the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# What a group is, whatever its rates are: Megatron-Core 0.16 finds a group by these.
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_STATE = ("params", "step")

Group = dict[str, Any]


def use_configured(state: Any, present: Sequence[Group]) -> None:
    """Give the parameter groups within a loaded optimizer `state` the hyper-parameters of the `present` ones."""
    configured = {_identity(group): group for group in present}
    for saved in _groups_in(state):
        own = configured.get(_identity(saved))
        if own is None:
            continue  # Megatron-Core says that there is no such group
        kept = {key: saved[key] for key in _STATE if key in saved}
        saved.clear()
        saved.update({key: value for key, value in own.items() if key not in _STATE}, **kept)


def _identity(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _IDENTITY)


def _groups_in(state: Any) -> Iterator[Group]:
    """Those of every optimizer in `state`, whichever of Megatron-Core's classes has written it."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key == "param_groups":
            yield from value
        elif key != "state" and key != "param_state":
            yield from _groups_in(value)
