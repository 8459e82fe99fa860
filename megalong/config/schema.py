"""A whole configuration: sections, and the rules that span them.

A `Config` is valid by itself once it exists. Rules that depend on the number of processes or on the model are checked
by `checks.check_world` and `checks.check_model`.

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
        """Replicas of the model on `world_size` processes; `UserError` if the layout does not divide it."""
        checks.check_replicas(self, world_size)
        return self.grid.replicas(world_size)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        checks.check_config(self)
        return self
