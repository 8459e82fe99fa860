"""Curves read back with TensorBoard's own reader; FLOPs against torch's counter and published throughput."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from megalong.config.architecture import Architecture
from megalong.config.rope import RopeSettings
from megalong.config.schema import Config
from megalong.training.console import RemainingTime, amount, duration
from megalong.training.flops import flops_per_token, matrix_entries, mean_flops_per_token
from megalong.training.hardware import Peak
from megalong.training.health import Health
from megalong.training.metrics import Metrics, StepRecord

ARCHITECTURE = Architecture(
    hidden_size=64,
    ffn_hidden_size=96,
    num_layers=2,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=300,
    max_position_embeddings=128,
    rope=RopeSettings(rope_theta=10000.0),
)
LLAMA_8B = Architecture(
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_layers=32,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    rope=RopeSettings(rope_theta=500000.0),
)


@pytest.fixture
def config(tmp_path):
    return Config.model_validate(
        {
            "run": {"name": "t", "dir": str(tmp_path)},
            "model": {"architecture": ARCHITECTURE.model_dump()},
            "data": {"seq_length": 128, "mixture": [{"name": "a", "path": "a", "weight": 1.0}]},
            "optimizer": {"lr": 1e-3},
            "training": {"train_iters": 10, "global_batch_size": 2},
        }
    )


@pytest.fixture
def open_metrics(config, tmp_path, monkeypatch):
    monkeypatch.setattr("megalong.training.metrics.device_peak", lambda device: Peak(1e9, "a test"))

    def opened(start_step=0, is_writer=True, **others):
        return Metrics(
            config,
            tmp_path,
            start_step,
            is_writer,
            architecture=ARCHITECTURE,
            world_size=2,
            device=torch.device("cpu"),
            **others,
        )

    return opened


def record(step, loss=2.0, **others):
    seconds = {"data": 0.1, "forward_backward": 0.3, "optimizer": 0.1, "checkpoint": 5.0}
    return StepRecord(step, loss, 1e-3, 256, 256 * step, seconds, **others)


def curves(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_a_resume_leaves_no_zigzag(open_metrics, tmp_path):
    first = open_metrics()
    for step in range(1, 8):
        first.log_step(record(step, loss=10 + step, validation_loss=1.0 if step == 7 else None))
    first.close()
    second = open_metrics(start_step=5)  # the checkpoint of step 5; steps 6 and 7 are done again
    for step in range(6, 11):
        second.log_step(record(step, loss=20 + step))
    second.close()
    events = curves(tmp_path)
    loss = events.Scalars("loss/train")
    assert [e.step for e in loss] == list(range(1, 11))
    assert [e.value for e in loss] == [11, 12, 13, 14, 15, 26, 27, 28, 29, 30]
    assert events.Scalars("loss/validation") == []  # belonged to the forgotten step 7


def test_every_promised_curve_is_there(open_metrics, tmp_path):
    metrics = open_metrics()
    metrics.log_step(record(1, gradient_norm=0.5, validation_loss=1.9, position_losses=[2.5, None]))
    metrics.close()
    events = curves(tmp_path)
    values = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert values["speed/tokens_per_s"] == pytest.approx(256 / 0.5)  # saving is not part of the step
    assert values["speed/tokens_per_s_per_gpu"] == pytest.approx(128 / 0.5)
    assert values["speed/mfu"] == pytest.approx(256 * flops_per_token(ARCHITECTURE, 128) / 1e9, rel=1e-5)
    assert values["memory/peak_gib"] > 0
    assert values["progress/consumed_tokens"] == 256
    assert values["loss_by_position/0-64"] == 2.5
    assert "loss_by_position/64-128" not in values
    assert values["time/forward_backward"] == pytest.approx(0.3)
    split = {name for name in values if name.startswith("time/")}
    assert split == {"time/data", "time/forward_backward", "time/optimizer", "time/checkpoint"}
    assert {"loss/train", "loss/validation", "schedule/learning_rate", "schedule/gradient_norm"} <= values.keys()


def test_rates_are_of_all_tokens_and_what_is_learnt_is_told_apart(open_metrics, tmp_path, megalong_log):
    """256 tokens in half a second, 64 learnt, 128 padding: 512 tok/s and the FLOPs of them all."""
    metrics = open_metrics()
    metrics.log_step(record(1, learnt_tokens=64, padding_tokens=128, document_lengths=[64, 64]))
    metrics.log_step(record(2, learnt_tokens=255))
    metrics.close()
    lines = [one.getMessage() for one in megalong_log.records]
    assert " | 512 tok/s (128 learnt, 50 % padding) | MFU " in lines[0]
    assert " | 512 tok/s | MFU " in lines[1]
    events = curves(tmp_path)
    first = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert first["speed/tokens_per_s"] == 512
    assert first["speed/learnt_tokens_per_s"] == 128
    assert first["speed/padding_share"] == 0.5
    assert first["speed/mfu"] == pytest.approx(256 * flops_per_token(ARCHITECTURE, 64) / 1e9, rel=1e-5)


def test_loss_comes_first_and_health_last(open_metrics, tmp_path):
    """TensorBoard orders groups of curves by name."""
    metrics = open_metrics()
    held_out = {"validation_loss": 1.9, "validation_position_losses": [1.0, 2.0]}
    metrics.log_step(record(1, gradient_norm=0.5, position_losses=[2.5, 2.0], **held_out))
    metrics.log_health(1, Health({"goodput": 0.9, "restarts": 1}, [0.1, 0.2]))
    metrics.close()
    events = curves(tmp_path)
    names = sorted(events.Tags()["scalars"])
    assert names[:2] == ["loss/train", "loss/validation"]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in [*names, *sorted(events.Tags()["histograms"])]))
    assert groups[:2] == ["loss", "loss_by_position"]
    assert groups[-1] == "z_health"


def test_times_are_per_step_whatever_the_log_interval(open_metrics, tmp_path):
    metrics = open_metrics(start_step=5)
    metrics.log_step(record(10))
    metrics.close()
    events = curves(tmp_path)
    assert events.Scalars("time/forward_backward")[0].value == pytest.approx(0.3 / 5)
    assert events.Scalars("time/checkpoint")[0].value == pytest.approx(5.0)


def test_what_the_guard_did_is_in_the_curves(open_metrics, tmp_path):
    metrics = open_metrics()
    metrics.log_event(7, "skip", "loss nan")
    metrics.close()
    events = curves(tmp_path)
    assert [event.step for event in events.Scalars("guard/skip")] == [7]
    assert b"loss nan" in events.Tensors("guard/events/text_summary")[0].tensor_proto.string_val[0]


def test_the_resolved_config_is_kept_as_text(open_metrics, tmp_path):
    open_metrics().close()
    events = curves(tmp_path)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    train_iters: 10\n" in text
    assert "a test" in text


def test_other_ranks_write_nothing(open_metrics, tmp_path, caplog):
    metrics = open_metrics(is_writer=False)
    metrics.log_step(record(1))
    metrics.flush()
    metrics.close()
    assert not (tmp_path / "tensorboard").exists()
    assert not caplog.records


def test_the_console_line(open_metrics, megalong_log):
    seconds = iter([0.0, 30.0])
    metrics = open_metrics(clock=lambda: next(seconds))
    metrics.log_step(record(3))
    metrics.log_step(record(4, gradient_norm=0.812, validation_loss=1.5))
    first, second = (r.getMessage() for r in megalong_log.records)
    assert first.startswith("step 3/10 (30 %) | loss 2.0000 | lr 1.0e-03 | 512 tok/s | MFU ")
    assert "ETA" not in first
    assert second.startswith("step 4/10 (40 %) | loss 2.0000 | held-out 1.5000 | lr 1.0e-03 | norm 0.81 | ")
    assert second.endswith("| ETA 3m00s")


def test_a_wrong_number_of_buckets_is_refused(open_metrics):
    with pytest.raises(ValueError, match="zip"):
        open_metrics().log_step(record(1, position_losses=[1.0]))


def test_remaining_time_forgets_old_pace():
    moments = iter([0.0, 100.0, *(100.0 + step for step in range(1, 40))])
    remaining = RemainingTime(100, lambda: next(moments))
    left = [remaining.after(step) for step in range(1, 40)]
    assert left[0] is None
    assert left[1] == pytest.approx(100 * 98)
    assert left[-1] == pytest.approx(100 - 39)


@pytest.mark.parametrize(
    ("seconds", "text"), [(45, "45s"), (130, "2m10s"), (11100, "3h05m"), (187200, "2d04h"), (59.7, "1m00s")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(987, "987"), (12345, "12.3K"), (4.2e6, "4.20M"), (1.05e9, "1.05B")])
def test_amounts(value, text):
    assert amount(value) == text


def test_masked_documents_cost_what_each_costs_alone(open_metrics, tmp_path):
    metrics = open_metrics()
    metrics.log_step(record(1, document_lengths=[100, 28, 100, 28]))
    metrics.close()
    alone = (100 * flops_per_token(ARCHITECTURE, 100) + 28 * flops_per_token(ARCHITECTURE, 28)) / 128
    assert mean_flops_per_token(ARCHITECTURE, [100, 28]) == pytest.approx(alone)
    assert curves(tmp_path).Scalars("speed/mfu")[0].value == pytest.approx(256 * alone / 1e9, rel=1e-5)


def test_flops_equal_torchs_own_count():
    """torch counts the full attention square; ours counts the causal half."""
    a = ARCHITECTURE
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=300, attn_implementation="eager"))
    tokens = torch.randint(300, (1, 128))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    causal_saving = 6 * a.num_layers * 128 * a.num_attention_heads * a.kv_channels
    per_token = counter.get_total_flops() / 128
    assert per_token == pytest.approx(flops_per_token(a, 128) + causal_saving, rel=2e-3)


@pytest.mark.parametrize(("window", "frequency"), [(7, None), (100, 2), (128, None), (500, None), (16, (0, 1))])
def test_windowed_layers_attend_to_fewer_pairs(window, frequency):
    """Counted pair by pair in the mask; ours leaves half a key of the diagonal out, in every layer."""
    a, place = ARCHITECTURE.with_window(window, frequency), torch.arange(128)
    distance = place[:, None] - place
    pairs = sum(int(((distance >= 0) & (distance < (w or 128))).sum()) for w in a.layer_windows)
    expected = 6 * matrix_entries(a) + 12 * a.num_attention_heads * a.kv_channels * pairs / 128
    half_a_key = 12 * a.num_attention_heads * a.kv_channels * a.num_layers / 2
    assert abs(expected - flops_per_token(a, 128)) <= half_a_key
    assert flops_per_token(a, 128) < flops_per_token(ARCHITECTURE, 128) or window >= 128


@pytest.mark.parametrize(
    ("tokens_per_second", "length", "mfu"), [(217, 2**20, 0.19), (181, 2**21, 0.31), (84, 2**22, 0.28)]
)
def test_mfu_of_published_long_context_runs(tokens_per_second, length, mfu):
    """UltraLong's tokens/s per H100 and the utilization derived from them in two digits."""
    ours = tokens_per_second * flops_per_token(LLAMA_8B, length) / 989e12
    assert ours == pytest.approx(mfu, abs=0.005)


def test_matrices_of_an_8b_model():
    embedding = 128256 * 4096
    assert matrix_entries(LLAMA_8B) + embedding == pytest.approx(8.03e9, rel=1e-3)
    assert math.isclose(flops_per_token(LLAMA_8B, 8192), 45e9 + 6.4e9, rel_tol=0.01)
