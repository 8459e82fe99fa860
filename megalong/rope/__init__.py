"""Rotary positions: pair i of a head's channels is turned by `inv_freq[i] * position` radians.

A head of d channels has d/2 pairs, channel i paired with channel i + d/2 (the half-split order of Llama in
transformers). Pair 0 turns fastest, one radian a token; the last one hardly at all. A model reads further than it was
trained when the slow pairs are slowed down, so that they meet no angle they have never seen:

    scaling.py       the temperature that goes with a scaling, and the base that another changes
    frequencies.py   how fast each pair turns, for every `RopeSettings.type`
    rotary.py        exact angles for given positions, and the turning itself
    hf.py            the same settings in the words of a Hugging Face `config.json`

What needs torch is imported when it is first asked for: the settings of a model are read without it.
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
