"""The optimizer's parameter groups at a resume: configured values replace the checkpoint's.

Megatron-Core stores a group's hyper-parameters (`max_lr`, `min_lr`, `betas`, `eps`, `weight_decay`, …) in the state of
the optimizer, and loading that state restores the saved values. 0.16 does so silently; 0.19 raises a KeyError if one
has changed, because it identifies groups by them. So before a state is loaded, its groups get the values of the current
groups, which come from the configuration. Only `step`, the number of updates, stays the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Megatron-Core 0.16 identifies a group by these.
_IDENTITY = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_STATE = ("params", "step")

Group = dict[str, Any]


def use_configured(state: Any, current: Sequence[Group]) -> None:
    """Give the parameter groups in a loaded optimizer `state` the hyper-parameters of the `current` ones."""
    configured = {_identity(group): group for group in current}
    for saved in _groups_in(state):
        own = configured.get(_identity(saved))
        if own is None:
            continue  # Megatron-Core reports the unknown group
        kept = {key: saved[key] for key in _STATE if key in saved}
        saved.clear()
        saved.update({key: value for key, value in own.items() if key not in _STATE}, **kept)


def _identity(group: Group) -> tuple[Any, ...]:
    return tuple(group.get(key) for key in _IDENTITY)


def _groups_in(state: Any) -> Iterator[Group]:
    """The parameter groups of every optimizer in `state`, for any of Megatron-Core's optimizer classes."""
    if not isinstance(state, dict):
        return
    for key, value in state.items():
        if key == "param_groups":
            yield from value
        elif key != "state" and key != "param_state":
            yield from _groups_in(value)
