"""A bad step never changes the weights unnoticed: NaN and spikes put into running steps, on one rank of two."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest

from megalong.checkpoint.folder import find_checkpoint, read_meta, whole_checkpoints
from megalong.config.guard import Guard as Settings
from megalong.training import events
from megalong.training.guard import Guard, Report
from megalong.training.replay import compare
from tests.llama import make_dataset, make_llama, single_sample_settings
from tests.pool import RankError, WorkerPool
from tests.training.faults import Fault

RUN = "tests.training.faults:faulty_run"
TP2 = {"tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("guard")
    return make_llama(folder / "llama"), make_dataset(folder / "data")


def told(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in events.read(run) if event["kind"] == kind]


@pytest.mark.parametrize("parallel", [{}, TP2], ids=["dp2", "tp2"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_on_all_ranks(
    what: str, parallel: dict[str, Any], sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(
        run, *sources, parallel=parallel, training={"train_iters": 5}, optimizer={"warmup_iters": 1}
    )
    # Global batches of 4 samples: sample 9 belongs to step 3. Replicas take turns: of rank 1 are 9 and 11.
    ranks = pool.run(2, RUN, settings, [Fault(what, 9)])
    for rank in ranks:
        assert rank["outcome"] == "finished"
        assert rank["steps"] == [1, 2, 4, 5]
        digests = rank["digests"]
        assert digests[3] == digests[2]
        assert len(set(digests.values())) == 4
    (event,) = told(run, "skip")
    assert (event["at"], event["ranks"]) == (3, [1])
    assert event["samples"] == ([8, 9, 10, 11] if parallel else [9, 11])
    assert ("loss nan" if what == "loss" else "gradient norm nan") in event["what"]


@pytest.mark.parametrize(
    ("world", "after", "sections"),
    [
        pytest.param(2, {}, {}, id="dp2", marks=pytest.mark.slow),
        pytest.param(2, TP2, {}, id="dp2-to-tp2"),
        pytest.param(
            2, {}, {"checkpoint": {"optimizer": "dp_reshardable"}}, id="dp_reshardable", marks=pytest.mark.slow
        ),
        pytest.param(1, {}, {"parallel": {"use_distributed_optimizer": False}}, id="whole"),
        pytest.param(2, {}, {"lora": {"rank": 2, "target_modules": ["q_proj"]}}, id="adapters", marks=pytest.mark.slow),
        pytest.param(1, {}, {"precision": {"params_dtype": "bf16"}}, id="bf16", marks=pytest.mark.slow),
    ],
)
def test_a_save_before_any_step_was_learnt_can_be_gone_on_from(
    world: int,
    after: dict[str, Any],
    sections: dict[str, Any],
    sources: tuple[Path, Path],
    pool: WorkerPool,
    tmp_path: Path,
) -> None:
    """Step 1 is skipped, saved and all there is; what goes on from there is the run that never stopped."""

    def settings(name: str, iterations: int, **parallel: Any) -> dict[str, Any]:
        tree = single_sample_settings(tmp_path / name, *sources, training={"train_iters": iterations})
        for section, values in sections.items():
            tree.setdefault(section, {}).update(values)
        tree["parallel"].update(parallel)
        tree["checkpoint"]["save_interval"] = 1
        tree["optimizer"] |= {"lr_schedule": "constant", "warmup_iters": 0}
        return tree

    fault = [Fault("loss", 0, rank=0)]
    pool.run(world, RUN, settings("run", 1), fault)
    resumed = pool.run(world, RUN, settings("run", 3, **after), [])
    unbroken = pool.run(world, RUN, settings("unbroken", 3, **after), fault)
    for rank, other in zip(resumed, unbroken, strict=True):
        assert rank["digests"] == {step: other["digests"][step] for step in (2, 3)}


@pytest.mark.parametrize("place", [4, pytest.param(13, marks=pytest.mark.slow)])
def test_going_back_equals_a_run_that_never_had_the_batch(
    place: int, sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    """Also before the first save, and in a life that resumes afterwards."""

    def settings(name: str, iterations: int) -> dict[str, Any]:
        return single_sample_settings(
            tmp_path / name,
            *sources,
            training={"train_iters": iterations},
            optimizer={"lr_schedule": "constant"},
            checkpoint={"save_interval": 2},
            guard={"non_finite": "rollback"},
        )

    first = place // 4 * 4
    never = pool.run(2, RUN, settings("never", 8), [], list(range(first, first + 4)))
    gone_back = pool.run(2, RUN, settings("run", 5), [Fault("loss", place)])
    (event,) = told(tmp_path / "run", "rollback")
    assert (event["at"], event["ranks"]) == (first // 4 + 1, [1])
    # Again in the life that goes back, whose curves begin at the checkpoint.
    assert gone_back[0]["told"] == [(first // 4 + 1, "rollback", "loss nan")] * 2
    assert read_meta(find_checkpoint(tmp_path / "run")).guard["left_out"] == [[first, first + 4]]
    again = pool.run(2, RUN, settings("run", 8), [Fault("loss", place)])
    for rank, other in zip(again, never, strict=True):
        assert rank["digests"] == {step: other["digests"][step] for step in (6, 7, 8)}
    assert len(told(tmp_path / "run", "rollback")) == 1


def test_stop_saves_nothing_of_the_step(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(run, *sources, checkpoint={"save_interval": 1}, guard={"non_finite": "stop"})
    with pytest.raises(RankError, match=r"step 3: loss nan; rank 0, .*: this step is not saved"):
        pool.run(1, RUN, settings, [Fault("loss", 9, rank=0)])
    assert [path.name for path in whole_checkpoints(run)] == ["step-00000001", "step-00000002"]
    assert told(run, "stop")


def test_weights_that_are_beyond_help_end_the_run(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = single_sample_settings(run, *sources, optimizer={"lr": 1e30, "min_lr": 0.0, "warmup_iters": 0})
    with pytest.raises(RankError, match=r"step 5: .* 4 in a row \(guard.max_consecutive 3\)"):
        pool.run(1, RUN, settings, [])
    assert [event["at"] for event in told(run, "skip")] == [2, 3, 4]
    assert not whole_checkpoints(run)


def test_a_spike_is_skipped_and_a_replay_finds_the_rank_that_miscomputed(
    sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path
) -> None:
    guard = {"loss_spike": "skip", "window": 8, "replay": True}
    settings = single_sample_settings(tmp_path / "run", *sources, guard=guard)
    faults = [Fault("spike", 21), Fault("gradient", 29, once=True)]
    for rank in pool.run(2, RUN, settings, faults):
        assert rank["digests"][6] == rank["digests"][5]
        assert rank["digests"][8] == rank["digests"][7]
    spike, gradient = told(tmp_path / "run", "skip")
    assert (spike["at"], spike["ranks"]) == (6, [1])
    assert "is a spike" in spike["what"]
    assert "the same, bit for bit" in spike["replay"]
    assert (gradient["at"], gradient["ranks"]) == (8, [1])
    assert "differs on rank 1" in gradient["replay"]


def test_a_skipped_step_leaves_delayed_fp8_scales(sources: tuple[Path, Path], pool: WorkerPool, tmp_path: Path) -> None:
    """Nor do its magnitudes, which a spike makes 50 times what they should be, reach the scales of the step after."""
    settings = single_sample_settings(
        tmp_path / "run",
        *sources,
        guard={"loss_spike": "skip", "window": 8},
        training={"train_iters": 6},
        precision={"params_dtype": "bf16", "fp8": "hybrid"},
    )
    for rank in pool.run(2, RUN, settings, [Fault("spike", 21)]):
        assert rank["steps"] == [1, 2, 3, 4, 5]
        assert rank["digests"][6] == rank["digests"][5] != rank["digests"][4]


def report(step: int, loss: float, norm: float = 1.0) -> Report:
    return Report(step, [loss] * 2, [norm] * 2, [loss, 2 * loss], [norm, norm])


def test_spikes_are_told_from_noise_and_from_a_falling_loss() -> None:
    numbers = random.Random(1)
    guard = Guard(Settings(loss_spike="skip", gradient_spike="skip", window=16))
    step = 0
    for step in range(1, 200):
        loss, norm = 2 + 3 / step + numbers.gauss(0, 0.05), math.exp(numbers.gauss(0, 0.5))
        assert guard.judge(report(step, loss, norm)) is None
    guard = Guard(guard.settings, guard.state())
    event = guard.judge(report(step + 1, 4.0))
    assert event is not None
    assert (event.action, event.ranks) == ("skip", (1,))
    assert guard.judge(report(step + 2, 2.0, 1e4)) is not None
    assert guard.judge(report(step + 3, 2.0)) is None


def test_events_in_a_row_stop_also_across_going_back() -> None:
    guard = Guard(Settings(non_finite="rollback", max_consecutive=2))
    actions = []
    for _ in range(3):
        for step in range(4, 7):  # back to step 3 each time
            event = guard.judge(report(step, math.nan if step == 6 else 2.0))
            if event is not None:
                actions.append(event.action)
        after = Guard(guard.settings)
        after.carry_over(guard)
        guard = after
    assert actions == ["rollback", "rollback", "stop"]
    good = Guard(guard.settings)
    for step in range(1, 20):
        event = good.judge(report(step, math.nan if step % 2 else 2.0))
        assert event is None or event.action == "rollback"


def test_one_nan_is_as_good_as_another() -> None:
    assert "bit for bit" in compare([(math.nan, 1.0), (0.1, 2.0)], [(-math.nan, 1.0), (0.1, 2.0)])
    assert "differs on rank 1" in compare([(1.0, 1.0), (0.1, 2.0)], [(1.0, 1.0), (0.1, math.nextafter(2.0, 3.0))])
