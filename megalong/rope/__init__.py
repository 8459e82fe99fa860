"""Rotary positions: pair i of a head's channels is turned by `inv_freq[i] * position` radians.

A head of d channels has d/2 pairs, channel i paired with channel i + d/2 (the half-split order of Llama in
transformers). Pair 0 turns fastest, one radian a token; the last one hardly at all. A model reads further than it was
trained when the slow pairs are slowed down, so that they meet no angle they have never seen:

    frequencies.py   how fast each pair turns, for every `RopeSettings.type`, and the temperature that goes with it
    rotary.py        exact angles for given positions, and the turning itself
    hf.py            the same settings in the words of a Hugging Face `config.json`
"""

from megalong.rope.frequencies import inverse_frequencies, temperature
from megalong.rope.hf import from_hf, to_hf
from megalong.rope.rotary import apply_rotary, cos_sin

__all__ = ["apply_rotary", "cos_sin", "from_hf", "inverse_frequencies", "temperature", "to_hf"]
