"""What every section of the configuration has in common.

Strict: `"4"` is not a number and `1` is not a boolean, so a quoting mistake is an error instead of a guess. Frozen: a
configuration cannot change after it has been checked. Unknown keys are refused: otherwise a typo in an optional key
would train for a week with the default.
"""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all sections: unknown keys refused, no type conversion, no NaN, immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, protected_namespaces=()
    )
