"""Save and restore the states of all generators that a forward pass may use."""

from __future__ import annotations

from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """A copy of the state of every generator of this rank."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    tracker = {name: state.clone() for name, state in get_cuda_rng_tracker().get_states().items()}
    states = {"torch": torch.get_rng_state(), "tracker": tracker}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore(states: dict[str, Any]) -> None:
    """Restore all generators from the result of `random_states`."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    torch.set_rng_state(states["torch"])
    get_cuda_rng_tracker().set_states(states["tracker"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
