"""What every section of the configuration has in common.

Strict: `"4"` is no number and `1` is no boolean, so that a quoting mistake is told instead of guessed. Frozen: a
configuration that has been checked stays as it was checked. Unknown keys are refused: a typo in an optional key would
otherwise train for a week with the default.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no type conversion, no NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
