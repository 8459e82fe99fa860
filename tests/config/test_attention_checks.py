"""What a backend and a precision cannot do is refused with the reason and what to write, which then passes."""

import re

import pytest
from pydantic import ValidationError

from megalong.config.architecture import Architecture
from megalong.config.attention_checks import Machine, attention_backend, check_fp8_model, check_machine
from megalong.config.rope import RopeSettings
from megalong.errors import UserError

CPU, HOPPER, BLACKWELL = Machine(), Machine((9, 0), True), Machine((10, 0), True)
BARE_HOPPER, AMPERE, ADA = Machine((9, 0), False), Machine((8, 0), True), Machine((8, 9), True)

ENGINE = "attention.backend=transformer_engine"
TORCH = "attention.backend=torch"
CP2 = "parallel.context_parallel_size=2"
MASKED = "data.packing=masked"
HYBRID = "precision.fp8=hybrid"
FP8_ATTENTION = "precision.fp8_dot_product_attention=true"
TENSORWISE = "precision.fp8_recipe=tensorwise"
WINDOW = "attention.window_size=64"


@pytest.mark.parametrize(
    ("overrides", "message", "mend"),
    [
        ([FP8_ATTENTION], "write fp8: hybrid", [HYBRID]),
        ([HYBRID, "precision.params_dtype=fp32"], "write params_dtype: bf16", ["precision.params_dtype=bf16"]),
        ([HYBRID, FP8_ATTENTION, WINDOW], "leave window_size out", ["attention.window_size=null"]),
        ([ENGINE, "runtime.device=cpu"], "needs a GPU, and runtime.device is cpu", [TORCH]),
        ([ENGINE, "precision.params_dtype=fp32"], "computes in bf16", ["precision.params_dtype=bf16"]),
        ([ENGINE, CP2, MASKED], "write layout: per_document_zigzag", ["attention.layout=per_document_zigzag"]),
        ([ENGINE, CP2, "attention.layout=balanced"], "write layout: zigzag", ["attention.layout=zigzag"]),
        ([ENGINE, CP2, "data.seq_length=4098"], "not a multiple of 4", ["data.seq_length=4100"]),
        (
            [ENGINE, CP2, "parallel.tensor_model_parallel_size=3", "parallel.sequence_parallel=true"],
            "data.seq_length 4096 is not a multiple of 12",
            ["data.seq_length=4104"],
        ),
        ([ENGINE, CP2, WINDOW], "exchange: auto with attention.window_size 64", ["attention.exchange=all_gather"]),
        (
            [ENGINE, CP2, WINDOW, "attention.exchange=ring"],
            "write exchange: all_gather",
            ["attention.exchange=ulysses"],
        ),
    ],
)
def test_what_no_machine_can_do(load, overrides, message, mend):
    with pytest.raises((UserError, ValidationError), match=re.escape(message)):
        load(*overrides)
    load(*overrides, *mend)


@pytest.mark.parametrize(
    ("machine", "overrides", "message", "mend"),
    [
        (CPU, [ENGINE], "needs a GPU, and there is none here", ["attention.backend=auto"]),
        (BARE_HOPPER, [ENGINE], "needs the package transformer-engine", [TORCH]),
        (BARE_HOPPER, [HYBRID], "install it, or write fp8: null", ["precision.fp8=null"]),
        (AMPERE, [HYBRID], "compute capability 8.0) has no FP8", ["precision.fp8=null"]),
        (ADA, [HYBRID, FP8_ATTENTION], "needs 9.0", ["precision.fp8_dot_product_attention=false"]),
        (HOPPER, [HYBRID, FP8_ATTENTION, MASKED], "no document masks", ["data.packing=naive"]),
        (HOPPER, [HYBRID, FP8_ATTENTION, CP2, "data.seq_length=4098"], "write 4100", ["data.seq_length=4100"]),
        (HOPPER, [HYBRID, FP8_ATTENTION, TORCH], "write backend: transformer_engine", [ENGINE]),
        (HOPPER, [HYBRID, FP8_ATTENTION, TENSORWISE], "delayed scaling only", ["precision.fp8_recipe=delayed"]),
    ],
)
def test_what_this_machine_cannot_do(load, machine, overrides, message, mend):
    with pytest.raises(UserError, match=re.escape(message)):
        check_machine(load(*overrides), machine)
    check_machine(load(*overrides, *mend), machine)


def test_what_is_fine(load):
    """Without a GPU FP8 is emulated in every recipe; Blackwell, and the environment, know other recipes."""
    for overrides in ([HYBRID], [HYBRID, FP8_ATTENTION, TENSORWISE], [HYBRID, FP8_ATTENTION, CP2, MASKED]):
        check_machine(load(*overrides), CPU)
    check_machine(load(HYBRID, FP8_ATTENTION, TENSORWISE), BLACKWELL)
    check_machine(load(HYBRID, FP8_ATTENTION, TENSORWISE), Machine((9, 0), True, "DelayedScaling"))
    check_machine(load(MASKED, CP2), BARE_HOPPER)


def test_auto_is_transformer_engine_where_only_it_can(load):
    assert attention_backend(load(), HOPPER) == "torch"
    assert attention_backend(load(HYBRID), HOPPER) == "torch"
    assert attention_backend(load(HYBRID, FP8_ATTENTION), HOPPER) == "transformer_engine"
    assert attention_backend(load(HYBRID, FP8_ATTENTION), CPU) == "torch"
    assert attention_backend(load(ENGINE), HOPPER) == "transformer_engine"


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"kv_channels": 64}, [FP8_ATTENTION], "heads of 128 channels only, and the model's have 64"),
        ({"hidden_size": 1000}, [], "hidden_size is 1000, and FP8 matrices need multiples of 16"),
        (
            {"ffn_hidden_size": 1040},
            ["parallel.tensor_model_parallel_size=2"],
            "/ tensor parallel is 520",
        ),
    ],
)
def test_what_fp8_cannot_do_with_a_model(load, changes, overrides, message):
    shape = {
        "hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 2, "num_attention_heads": 8, "num_query_groups": 8,
        "kv_channels": 128, "vocab_size": 512, "max_position_embeddings": 4096,
        "rope": RopeSettings(rope_theta=1e4),
    }  # fmt: skip
    config = load(HYBRID, *overrides)
    check_fp8_model(config, HOPPER, Architecture(**shape))
    wrong = Architecture(**shape | changes)
    with pytest.raises(UserError, match=re.escape(message)):
        check_fp8_model(config, HOPPER, wrong)
    check_fp8_model(config, CPU, wrong)
    if "kv_channels" in changes:
        check_fp8_model(config, BLACKWELL, wrong)
