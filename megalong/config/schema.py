"""A whole configuration: sections, and the rules that span them.

A tree that exists is valid as far as it can tell by itself. What depends on the number of processes or on the model
waits for `checks.check_world` and `checks.check_model`.

    world size = tensor parallel * context parallel * pipeline parallel * data parallel
    global batch = micro-batch * data parallel * micro-batches accumulated
"""

from typing import Self

from pydantic import model_validator

from megalong.config import checks
from megalong.config.sections import Sections


class Config(Sections):
    """A whole run, or one stage of it."""

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model on `world_size` processes; `UserError` where they do not come out even."""
        checks.check_replicas(self, world_size)
        return world_size // self.world_divisor

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        checks.check_config(self)
        return self
