"""The layout rules, against a brute-force reading of what each of them means."""

import itertools
import json
import re

import pytest
from pydantic import ValidationError

from megalong.config.architecture import Architecture
from megalong.config.checks import check_model, check_world
from megalong.config.rope import RopeSettings
from megalong.errors import UserError

SHAPE = {
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_layers": 6,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "vocab_size": 515,
    "max_position_embeddings": 256,
    "rope": RopeSettings(rope_theta=10000.0),
}

POSE = "data.pose.target_length=8192"
INTERLEAVED = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["runtime.watchdog_minutes=60"], "runtime.watchdog_minutes 60 is not below runtime.timeout_minutes 60"),
        (["guard.replay=true", "precision.fp8=hybrid"], "guard.replay true with precision.fp8_recipe delayed"),
        (["optimizer.warmup_iters=10"], "optimizer.warmup_iters 10 must be below training.train_iters 10"),
        (["training.micro_batch_size=3"], "global_batch_size 8 is not a multiple of training.micro_batch_size 3"),
        (["parallel.sequence_parallel=true"], "sequence_parallel needs parallel.tensor_model_parallel_size above 1"),
        (["evaluation.interval=5", "data.split=1,0"], 'data.split "1,0" leaves nothing for validation'),
        (["parallel.virtual_pipeline_model_parallel_size=2"], "pipeline_model_parallel_size is 1"),
        ([*INTERLEAVED, "parallel.batch_p2p_comm=true"], "parallel.batch_p2p_comm true"),
        ([*INTERLEAVED, "parallel.overlap_p2p_comm=false"], "batched sends pair wrongly"),
        (["parallel.overlap_p2p_comm=true"], "needs an interleaved pipeline"),
        (["parallel.overlap_param_gather=true"], "overlap_grad_reduce: true"),
        ([POSE, "task=sft", "sft.sources=[{name: a, path: b}]"], "data.pose is not read by task sft"),
        (["data.pose.target_length=4096"], "pose.target_length 4096 is not above data.seq_length 4096"),
        ([POSE, "data.pose.chunks=9", "data.seq_length=8"], "pose.chunks 9 is above data.seq_length 8"),
        ([POSE, "data.pose.chunks=1"], "data.pose.chunks: 1 is out of range; it must be >= 2"),
    ],
)
def test_rules_of_the_configuration_alone(load, overrides, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load(*overrides)


def test_an_interleaved_pipeline_fills_itself_with_micro_batches(load):
    config = load(*INTERLEAVED, "training.global_batch_size=6", "training.micro_batch_size=2")
    with pytest.raises(UserError, match=r"gives every rank 3 micro-batches, .* 2 stages .* write a multiple of 4"):
        check_world(config, 2)
    check_world(load(*INTERLEAVED, "training.micro_batch_size=2"), 2)


def test_an_odd_length_needs_no_context_parallelism(load):
    assert load("data.seq_length=4097").data.seq_length == 4097


@pytest.mark.parametrize("layout", list(itertools.product((1, 2, 3), (1, 2), (1, 2))))
def test_world_is_tp_cp_pp_dp_and_batches_come_out_even(load, layout):
    names = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    overrides = [f"parallel.{name}={size}" for name, size in zip(names, layout, strict=True)]
    config = load(*overrides, "training.micro_batch_size=2")
    per_replica = layout[0] * layout[1] * layout[2]
    for world in range(13):
        # a data-parallel size and a number of accumulated micro-batches exist: 2 * data * steps = 8
        replicas = [data for data in range(1, 13) if per_replica * data == world]
        fits = [data for data in replicas for steps in range(1, 9) if 2 * data * steps == 8]
        if fits:
            check_world(config, world)
            assert config.data_parallel_size(world) == fits[0]
            continue
        rule = "micro_batch_size 2 * data parallel" if replicas else f"{world} processes cannot hold whole replicas"
        with pytest.raises(UserError, match=re.escape(rule)):
            check_world(config, world)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ({}, {}, None),
        ({}, {"tensor": 4, "pipeline": 3}, None),
        (
            {"num_attention_heads": 4, "kv_channels": 8},
            {"tensor": 8},
            "8 does not divide the model's 4 attention heads",
        ),
        ({}, {"tensor": 8}, "tensor_model_parallel_size 8 does not divide the model's 4 KV groups"),
        ({"ffn_hidden_size": 98}, {"tensor": 4}, "98 MLP channels (ffn_hidden_size)"),
        (
            {"num_attention_heads": 9, "num_query_groups": 9, "kv_channels": 8, "ffn_hidden_size": 99},
            {"tensor": 3},
            "640 vocabulary rows",
        ),
        ({}, {"pipeline": 4}, "pipeline_model_parallel_size 4 does not divide the model's 6 layers"),
        ({}, {"pipeline": 4}, "sizes that fit: 1, 2, 3, 6 (on multiples of 1, 2, 3, 6 processes)"),
        (
            {"num_attention_heads": 9, "num_query_groups": 3, "kv_channels": 8, "vocab_size": 49152},
            {"tensor": 2},
            "sizes that fit: 1, 3 (on multiples of 1, 3 processes)",
        ),
        (
            {"num_query_groups": 2},
            {"tensor": 4, "pipeline": 3},
            "fit: 1, 2 (on multiples of 3, 6 processes)",
        ),
    ],
)
def test_the_layout_cuts_the_model_evenly(load, shape, layout, message):
    config = load(*(f"parallel.{name}_model_parallel_size={size}" for name, size in layout.items()))
    architecture = Architecture(**{**SHAPE, **shape})
    if message is None:
        check_model(config, architecture)
        return
    with pytest.raises(UserError, match=re.escape(message)):
        check_model(config, architecture)


def test_processes_that_hold_no_whole_replicas_are_told_what_does(load):
    config = load("parallel.tensor_model_parallel_size=4", "parallel.context_parallel_size=2")
    with pytest.raises(UserError) as error:
        check_world(config, 12)
    told = str(error.value)
    assert "start a multiple of 8 processes, such as 8 or 16" in told
    assert told.endswith("size under parallel (tensor_model_parallel_size 1, 2, 3; context_parallel_size 1)")
    with pytest.raises(UserError, match="such as 8, or lower"):
        check_world(config, 1)


@pytest.mark.parametrize(
    ("true", "padded"), [(1, 128), (128, 128), (129, 256), (515, 640), (128256, 128256), (32000, 32000), (32001, 32128)]
)
def test_vocabulary_is_padded_to_128_whatever_the_layout(true, padded):
    assert Architecture(**{**SHAPE, "vocab_size": true}).padded_vocab_size == padded


def test_head_dimension_follows_unless_given():
    assert Architecture(**SHAPE).kv_channels == 8
    assert Architecture(**SHAPE, kv_channels=32).kv_channels == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 7}, "hidden_size 64 is not a multiple of num_attention_heads 7"),
        ({"num_query_groups": 3}, "num_attention_heads 8 is not a multiple of num_query_groups 3"),
        ({"kv_channels": 7}, "kv_channels 7 must be even"),
        ({"rope": RopeSettings()}, "rope.rope_theta is required"),
        ({"rope": RopeSettings(type="yarn", factor=2, rope_theta=1e4)}, "rope.original_max_position_embeddings is req"),
        ({"hidden": 3}, "Extra inputs"),
        ({"window_attn_skip_freq": 2}, "window_attn_skip_freq without window_size"),
        ({"window_size": 4, "window_attn_skip_freq": [1, 0]}, "[1, 0] has 2 entries and the model 6 layers"),
    ],
)
def test_impossible_architectures(change, message):
    with pytest.raises(ValidationError, match=re.escape(message)):
        Architecture(**{**SHAPE, **change})


class TestWithRope:
    """`model.rope` over a checkpoint's own positions."""

    def test_theta_and_original_length_come_from_the_checkpoint(self):
        llama31 = Architecture(
            **{
                **SHAPE,
                "max_position_embeddings": 131072,
                "rope": RopeSettings(type="llama3", rope_theta=5e5, factor=8, original_max_position_embeddings=8192),
            }
        )
        yarn = llama31.with_rope(RopeSettings(type="yarn", factor=128, beta_fast=4))
        assert yarn.rope.rope_theta == 5e5
        assert yarn.rope.original_max_position_embeddings == 8192
        assert yarn.max_position_embeddings == 1048576
        assert (yarn.rope.type, yarn.rope.beta_fast) == ("yarn", 4.0)

    def test_a_model_never_scaled_counts_from_its_longest_position(self):
        scaled = Architecture(**SHAPE).with_rope(RopeSettings(type="linear", factor=4))
        assert (scaled.rope.original_max_position_embeddings, scaled.max_position_embeddings) == (256, 1024)

    def test_twice_is_once(self):
        override = RopeSettings(type="yarn", factor=16)
        once = Architecture(**SHAPE).with_rope(override)
        assert once.with_rope(override) == once
        assert Architecture.model_validate(once.model_dump()) == once

    def test_base_change_alone(self):
        changed = Architecture(**SHAPE).with_rope(RopeSettings(rope_theta=8e6))
        assert (changed.rope.type, changed.rope.rope_theta, changed.max_position_embeddings) == ("none", 8e6, 256)

    def test_nothing_asked_changes_nothing(self):
        model = Architecture(**SHAPE)
        assert model.with_rope(None) is model


class TestWithWindow:
    """`attention`'s window over a model's own."""

    @pytest.mark.parametrize(
        ("frequency", "windows"),
        [
            (None, (9, 9, 9, 9, 9, 9)),
            (1, (None, None, None, None, None, None)),
            (2, (9, None, 9, None, 9, None)),
            (4, (9, 9, 9, None, 9, 9)),
            (7, (9, 9, 9, 9, 9, 9)),
            ((1, 0, 0, 1, 1, 0), (9, None, None, 9, 9, None)),
        ],
    )
    def test_layer_by_layer(self, frequency, windows):
        model = Architecture(**SHAPE).with_window(9, frequency)
        assert model.layer_windows == windows
        assert model.widest_window == (None if None in windows else 9)
        assert Architecture.model_validate(json.loads(model.model_dump_json())) == model

    def test_the_override_replaces_both(self):
        model = Architecture(**SHAPE, window_size=9, window_attn_skip_freq=[1, 0, 0, 1, 1, 0])
        assert model.with_window(None) is model
        assert model.with_window(5).layer_windows == (5, 5, 5, 5, 5, 5)
        assert model.with_window(5, 3).with_window(5, 3) == model.with_window(5, 3)

    def test_a_model_that_was_written_without_windows_has_none(self):
        written = Architecture(**SHAPE).model_dump(exclude={"window_size", "window_attn_skip_freq"})
        model = Architecture.model_validate(written)
        assert model.layer_windows == (None,) * 6
        assert model.widest_window is None

    def test_a_pattern_for_another_model(self):
        with pytest.raises(UserError, match=r"^attention\.window_attn_skip_freq \[1, 0\] has 2 .* 6 layers; write one"):
            Architecture(**SHAPE).with_window(9, (1, 0))

    def test_the_loaded_models_window_is_checked_too(self, load):
        fp8 = load("precision.fp8=hybrid", "precision.fp8_dot_product_attention=true")
        engine = ["attention.backend=transformer_engine", "parallel.context_parallel_size=2"]
        windowed = Architecture(**SHAPE, window_size=9)
        with pytest.raises(UserError, match=r"with the model's window_size 9: .* fp8_dot_product_attention: false$"):
            check_model(fp8, windowed)
        with pytest.raises(UserError, match=r"exchange: auto with the model's window_size 9"):
            check_model(load(*engine), windowed)
        check_model(load(*engine, "attention.exchange=ulysses"), windowed)
        check_model(fp8, windowed.with_window(9, 1))
