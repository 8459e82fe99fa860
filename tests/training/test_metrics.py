"""What a run records: curves read back with TensorBoard's own reader, the file of steps, the console's lines."""

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megalong.config.schema import Config
from megalong.costs.hardware import Peak
from megalong.runtime import json_lines
from megalong.training.health import Health
from megalong.training.metrics.console import RemainingTime
from megalong.training.metrics.record import StepRecord
from megalong.training.metrics.recorder import Recorder, open_recorder
from megalong.training.metrics.sinks import Console
from tests.architectures import TINY


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(
        {
            "run": {"name": "t", "dir": str(tmp_path)},
            "model": {"architecture": TINY.model_dump()},
            "data": {"seq_length": 128, "mixture": [{"name": "a", "path": "a", "weight": 1.0}]},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 10, "global_batch_size": 2},
        }
    )


@pytest.fixture
def opened(config, tmp_path):
    return lambda start_step=0: open_recorder(config, tmp_path, start_step, 2, Peak(1e9, "a test"))


def record(step, loss=2.0, **others):
    values = {
        "steps": 1,
        "learning_rate": 1e-3,
        "tokens": 256,
        "consumed_tokens": 256 * step,
        "seconds": {"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1, "checkpoint": 5.0},
        "world_size": 2,
        "flops_per_token": 3e5,
        "peak_memory": 3 << 29,
    }
    return StepRecord(step, loss=loss, **values | others)


def lines(folder):
    return json_lines.read(folder / "metrics.jsonl")


def curves(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_a_resume_leaves_no_zigzag(opened, tmp_path):
    first = opened()
    for step in range(1, 8):
        first.step(record(step, loss=10 + step, validation_loss=1.0 if step == 7 else None))
    first.close()
    second = opened(start_step=5)  # the checkpoint of step 5; steps 6 and 7 are done again
    for step in range(6, 11):
        second.step(record(step, loss=20 + step))
    second.close()
    events = curves(tmp_path)
    loss = events.Scalars("loss/train")
    assert [e.step for e in loss] == list(range(1, 11))
    assert [e.value for e in loss] == [11, 12, 13, 14, 15, 26, 27, 28, 29, 30]
    assert events.Scalars("loss/validation") == []  # belonged to the forgotten step 7
    written = lines(tmp_path)
    assert [values["step"] for values in written] == list(range(1, 11))
    assert [values["loss"] for values in written] == [11, 12, 13, 14, 15, 26, 27, 28, 29, 30]
    assert all("validation_loss" not in values for values in written)


def test_every_promised_curve_is_there(opened, tmp_path):
    recorder = opened()
    recorder.step(record(1, gradient_norm=0.5, validation_loss=1.9, position_losses={"0-64": 2.5, "64-128": None}))
    recorder.close()
    events = curves(tmp_path)
    values = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert values["speed/tokens_per_s"] == pytest.approx(256 / 0.5)  # saving is not part of the step
    assert values["speed/tokens_per_s_per_gpu"] == pytest.approx(128 / 0.5)
    assert values["speed/mfu"] == pytest.approx(256 * 3e5 / 1e9)
    assert values["memory/peak_gib"] == 1.5
    assert values["progress/consumed_tokens"] == 256
    assert values["loss_by_position/0-64"] == 2.5
    assert "loss_by_position/64-128" not in values
    assert values["time/forward_backward"] == pytest.approx(0.3)
    split = {name for name in values if name.startswith("time/")}
    assert split == {"time/data", "time/forward_backward", "time/optimizer", "time/checkpoint"}
    assert {"loss/train", "loss/validation", "schedule/learning_rate", "schedule/gradient_norm"} <= values.keys()


def test_rates_are_of_all_tokens_and_what_is_learnt_is_told_apart(opened, tmp_path, megalong_log):
    """256 tokens in half a second, 64 learnt, 128 padding: 512 tok/s and the FLOPs of them all."""
    recorder = opened()
    recorder.step(record(1, trained_tokens=64, padding_tokens=128))
    recorder.step(record(2, trained_tokens=255))
    recorder.close()
    lines = [one.getMessage() for one in megalong_log.records]
    assert " | 512 tok/s (128 learnt, 50 % padding) | MFU " in lines[0]
    assert " | 512 tok/s | MFU " in lines[1]
    events = curves(tmp_path)
    first = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert first["speed/tokens_per_s"] == 512
    assert first["speed/learnt_tokens_per_s"] == 128
    assert first["speed/padding_share"] == 0.5
    assert first["speed/mfu"] == pytest.approx(256 * 3e5 / 1e9)


def test_loss_comes_first_and_health_last(opened, tmp_path):
    """TensorBoard orders groups of curves by name."""
    recorder = opened()
    held_out = {"validation_loss": 1.9, "validation_position_losses": {"0-64": 1.0}}
    recorder.step(record(1, gradient_norm=0.5, position_losses={"0-64": 2.5}, **held_out))
    recorder.health(1, Health({"goodput": 0.9, "restarts": 1}, [0.1, 0.2]))
    recorder.close()
    events = curves(tmp_path)
    names = sorted(events.Tags()["scalars"])
    assert names[:2] == ["loss/train", "loss/validation"]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in [*names, *sorted(events.Tags()["histograms"])]))
    assert groups[:2] == ["loss", "loss_by_position"]
    assert groups[-1] == "z_health"


def test_times_are_per_step_whatever_the_log_interval(opened, tmp_path):
    recorder = opened(start_step=5)
    recorder.step(record(10, steps=5))
    recorder.close()
    events = curves(tmp_path)
    assert events.Scalars("time/forward_backward")[0].value == pytest.approx(0.3 / 5)
    assert events.Scalars("time/checkpoint")[0].value == pytest.approx(5.0)


KEYS = {
    "time", "step", "loss", "learning_rate", "consumed_tokens", "tokens", "learnt_tokens", "padding_tokens",
    "tokens_per_s", "tokens_per_s_per_gpu", "mfu", "peak_gib", "seconds",
}  # fmt: skip
MORE = {"validation_loss", "gradient_norm", "loss_by_position", "validation_loss_by_position"}


def test_the_file_of_steps_has_every_number_once(opened, tmp_path):
    """Its keys are those that docs/training.md lists; the numbers are those of the curves."""
    recorder = opened()
    recorder.step(record(1, trained_tokens=64, padding_tokens=128))
    by_position = {"position_losses": {"0-64": 2.5, "64-128": None}, "validation_position_losses": {"0-64": 1.5}}
    recorder.step(record(2, steps=2, gradient_norm=float("inf"), validation_loss=1.9, **by_position))
    recorder.close()
    first, second = lines(tmp_path)
    assert set(first) == KEYS
    assert set(second) == KEYS | MORE
    told = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert [key for key in KEYS | MORE if not re.search(rf"^\| [^|]*`{key}`[^|]* \|", told, re.MULTILINE)] == []
    assert (first["tokens"], first["learnt_tokens"], first["padding_tokens"]) == (256, 64, 128)
    assert (first["tokens_per_s"], first["tokens_per_s_per_gpu"], first["peak_gib"]) == (512, 256, 1.5)
    assert first["mfu"] == pytest.approx(256 * 3e5 / 1e9)
    assert second["seconds"] == {"data": 0.05, "forward_backward": 0.15, "optimizer": 0.05, "checkpoint": 5.0}
    assert (second["loss_by_position"], second["validation_loss_by_position"]) == ({"0-64": 2.5}, {"0-64": 1.5})
    assert second["gradient_norm"] == "inf"


def test_a_disk_that_takes_nothing_is_told_once_and_ends_nothing(opened, tmp_path, megalong_log):
    (tmp_path / "metrics.jsonl").mkdir()
    recorder = opened()
    recorder.step(record(1))
    recorder.step(record(2))
    recorder.close()
    told = [one.getMessage() for one in megalong_log.records if one.levelname == "WARNING"]
    assert told == [f"{tmp_path / 'metrics.jsonl'}: Is a directory; steps are not recorded there until the next start"]


def test_what_the_guard_did_is_in_the_curves(opened, tmp_path):
    recorder = opened()
    recorder.event(7, "skip", "loss nan")
    recorder.close()
    events = curves(tmp_path)
    assert [event.step for event in events.Scalars("guard/skip")] == [7]
    assert b"loss nan" in events.Tensors("guard/events/text_summary")[0].tensor_proto.string_val[0]


def test_the_resolved_config_is_kept_as_text(opened, tmp_path):
    opened().close()
    events = curves(tmp_path)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    train_iters: 10\n" in text
    assert "a test" in text


def test_without_sinks_nothing_is_written(tmp_path, caplog):
    recorder = Recorder()
    recorder.step(record(1))
    recorder.health(1, Health({}, []))
    recorder.event(1, "skip", "loss nan")
    recorder.flush()
    recorder.close()
    assert not list(tmp_path.iterdir())
    assert not caplog.records


def test_the_console_line(megalong_log):
    seconds = iter([0.0, 30.0])
    recorder = Console(RemainingTime(10, lambda: next(seconds)), Peak(1e9, "a test"))
    recorder.step(record(3))
    recorder.step(record(4, gradient_norm=0.812, validation_loss=1.5))
    first, second = (r.getMessage() for r in megalong_log.records)
    assert first.startswith("step 3/10 (30 %) | loss 2.0000 | lr 1.0e-03 | 512 tok/s | MFU ")
    assert "ETA" not in first
    assert second.startswith("step 4/10 (40 %) | loss 2.0000 | held-out 1.5000 | lr 1.0e-03 | norm 0.81 | ")
    assert second.endswith("| ETA 3m00s")


def test_remaining_time_forgets_old_pace():
    moments = iter([0.0, 100.0, *(100.0 + step for step in range(1, 40))])
    remaining = RemainingTime(100, lambda: next(moments))
    left = [remaining.after(step) for step in range(1, 40)]
    assert left[0] is None
    assert left[1] == pytest.approx(100 * 98)
    assert left[-1] == pytest.approx(100 - 39)
