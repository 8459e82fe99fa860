"""Rotary positions: pair i of a head's channels is rotated by `inv_freq[i] * position` radians.

A head of d channels has d/2 pairs, channel i with channel i + d/2 (the half-split order of Llama in transformers). Pair
0 rotates fastest, one radian per token; the last one hardly at all. To read longer texts than a model was trained on,
the slow pairs are slowed down further, so that no angle is new to them:

    scaling.py       the temperature of yarn, and the changed base of ntk
    frequencies.py   each pair's frequency, for every `RopeSettings.type`
    rotary.py        exact angles for given positions, and the rotation itself
    hf.py            the same settings in a Hugging Face `config.json`

Functions that need torch are imported on first use, so a model's settings can be read without it.
"""

from typing import TYPE_CHECKING, Any

from megalong.rope.hf import from_hf, to_hf
from megalong.rope.scaling import temperature

if TYPE_CHECKING:
    from megalong.rope.frequencies import inverse_frequencies
    from megalong.rope.rotary import apply_rotary, cos_sin

__all__ = ["apply_rotary", "cos_sin", "from_hf", "inverse_frequencies", "temperature", "to_hf"]


def __getattr__(name: str) -> Any:
    if name == "inverse_frequencies":
        from megalong.rope.frequencies import inverse_frequencies

        return inverse_frequencies
    if name in ("apply_rotary", "cos_sin"):
        from megalong.rope import rotary

        return getattr(rotary, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
