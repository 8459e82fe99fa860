"""Where a rank stands, against Megatron-Core's own arithmetic of ranks."""

from __future__ import annotations

import pytest

from megalong.runtime.grid import ORDER, Grid, Place


@pytest.mark.parametrize(
    ("sizes", "replicas"),
    [((1, 1, 1), 1), ((2, 2, 2), 1), ((8, 4, 1), 8), ((2, 3, 4), 5), ((4, 1, 2), 2), ((1, 2, 1), 3), ((3, 1, 1), 2)],
)
def test_ranks_of_a_dimension_are_megatrons(sizes: tuple[int, int, int], replicas: int) -> None:
    """Megatron-Core lists the ranks that differ in one dimension alone, in the order of their index there."""
    from megatron.core.parallel_state import RankGenerator

    grid = Grid(*sizes)
    world = grid.model_parallel_size * replicas
    assert grid.replicas(world) == replicas
    generator = RankGenerator(tp=grid.tensor, ep=1, dp=replicas, pp=grid.pipeline, cp=grid.context, order=ORDER)
    for token, name in (("tp", "tensor"), ("cp", "context"), ("dp", "data"), ("pp", "stage")):
        for ranks in generator.get_ranks(token):
            places = [grid.place(rank, world) for rank in ranks]
            assert [getattr(place, name) for place in places] == list(range(len(ranks)))
            others = [{**vars(place), name: 0} for place in places]
            assert others == others[:1] * len(ranks)


def test_the_docstrings_example() -> None:
    assert Grid(tensor=2, context=2, pipeline=2).place(5, 8) == Place(tensor=1, context=0, data=0, stage=1)
