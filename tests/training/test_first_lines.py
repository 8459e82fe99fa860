"""What a run says of its model before the first step, against transformers' count and temperature; lengths too long."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megalong.config.rope import RopeSettings
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.hf.config import read_architecture, write_config
from megalong.training.activation_memory import layer_input_bytes, refuse_without_memory
from megalong.training.first_lines import model_line
from tests.llama import make_llama, run_settings

YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}


def config(tmp_path: Path, length: int, rope: dict[str, object] | None = None, **sections: dict[str, object]) -> Config:
    tree = run_settings(tmp_path / "run", tmp_path / "hf", tmp_path / "data", **sections)
    tree["data"]["seq_length"] = length
    tree["model"]["rope"] = rope
    return Config.model_validate(tree)


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_rope_temperature_and_positions(tied: bool, tmp_path: Path) -> None:
    architecture = read_architecture(make_llama(tmp_path / "hf", tie_word_embeddings=tied))
    count = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").num_parameters()
    assert model_line(config(tmp_path, 64), architecture) == (
        f"model: {count:,} parameters; rope unscaled, 64 positions, base 10000, attention temperature 1; samples use "
        "64 (data.seq_length)"
    )
    scaled = architecture.with_rope(RopeSettings.model_validate(YARN))
    written = AutoConfig.for_model(**write_config(scaled))
    temperature = ROPE_INIT_FUNCTIONS["yarn"](written, torch.device("cpu"))[1]
    assert model_line(config(tmp_path, 128, YARN), scaled) == (
        f"model: {count:,} parameters; rope yarn, factor 4 × 64 = 256 positions, base 10000, attention temperature "
        f"{temperature:.5g}; samples use 128 (data.seq_length)"
    )
    beyond = model_line(config(tmp_path, 512, YARN), scaled)
    assert beyond.endswith("samples use 512 (data.seq_length), beyond the model's length (model.allow_extrapolation)")


def test_a_slip_of_the_pen_is_told_before_anything_is_allocated(tmp_path: Path) -> None:
    architecture = read_architecture(make_llama(tmp_path / "hf"))
    fits = config(tmp_path, 64)
    # 2 samples * 64 tokens * 64 channels * 4 layers * 4 bytes
    assert layer_input_bytes(fits, architecture) == 2 * 64 * 64 * 4 * 4
    cut = config(tmp_path, 64, parallel={"context_parallel_size": 2, "pipeline_model_parallel_size": 4})
    assert layer_input_bytes(cut, architecture) == 2 * 64 * 64 * 4 * 4 / 8
    refuse_without_memory(fits, architecture, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"^data\.seq_length 10{11}: .* GiB; raise parallel\.context.* below (\d+)$"
    ) as error:
        refuse_without_memory(config(tmp_path, 10**11), architecture, torch.device("cpu"))
    below = int(str(error.value).rpartition(" ")[2])
    refuse_without_memory(config(tmp_path, below), architecture, torch.device("cpu"))
