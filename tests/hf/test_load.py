"""Filling parameters from a folder, against whole tensors read with safetensors itself."""

import pytest
import torch
from safetensors.torch import load_file

from megalong.config.architecture import Architecture
from megalong.errors import UserError
from megalong.hf.load import load_into
from megalong.hf.reader import HFReader
from megalong.hf.weight_map import local_names, local_parameter
from tests.hf.conftest import MakeLlama, architecture_of
from tests.hf.test_weight_map import fill


def empty_parameters(architecture: Architecture, rank: int = 0, size: int = 1) -> dict[str, torch.Tensor]:
    """A rank's parameters full of NaN, so that nothing left unfilled can pass."""
    shapes = {name: local_parameter(name, architecture, rank, size).shape for name in local_names(architecture)}
    return {name: torch.full(shape, float("nan")) for name, shape in shapes.items()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_is_filled_with_its_share(make_llama: MakeLlama, size: int, tied: bool) -> None:
    folder = make_llama(shard_size="40KB", tie_word_embeddings=tied)
    hf = {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    architecture = architecture_of(tie_word_embeddings=tied)
    for rank in range(size):
        parameters = empty_parameters(architecture, rank, size)
        with HFReader(folder) as reader:
            load_into(parameters, reader, architecture, rank, size)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, fill(name, architecture, hf, rank, size)), name


def test_a_pipeline_stage_reads_its_own_layers(make_llama: MakeLlama) -> None:
    folder, architecture = make_llama(), architecture_of()
    stage = {k: v for k, v in empty_parameters(architecture).items() if k.startswith("decoder.layers.0.")}
    with HFReader(folder) as reader:
        load_into(stage, reader, architecture, layer_offset=2)
        norm = reader.read("model.layers.2.input_layernorm.weight")
    assert torch.equal(stage["decoder.layers.0.input_layernorm.weight"], norm)


def test_weights_are_cast_to_the_parameters_dtype(make_llama: MakeLlama) -> None:
    folder, architecture = make_llama(), architecture_of()
    parameters = {name: tensor.bfloat16() for name, tensor in empty_parameters(architecture).items()}
    with HFReader(folder) as reader:
        load_into(parameters, reader, architecture)
        down = reader.read("model.layers.0.mlp.down_proj.weight")
    assert torch.equal(parameters["decoder.layers.0.mlp.linear_fc2.weight"], down.bfloat16())


def test_modules_that_are_not_this_llama_are_bugs(make_llama: MakeLlama) -> None:
    architecture = architecture_of()
    with HFReader(make_llama()) as reader:
        incomplete = empty_parameters(architecture)
        del incomplete["decoder.layers.1.mlp.linear_fc1.weight"]
        with pytest.raises(RuntimeError, match=r"lacks decoder.layers.1.mlp.linear_fc1"):
            load_into(incomplete, reader, architecture)
        with pytest.raises(KeyError, match="a strange name"):
            load_into({"a strange name": torch.zeros(1)}, reader, architecture)
        with pytest.raises(RuntimeError, match="past the last"):
            load_into(empty_parameters(architecture), reader, architecture, layer_offset=1)
        wrong = {**empty_parameters(architecture), "decoder.final_layernorm.weight": torch.zeros(47)}
        with pytest.raises(RuntimeError, match=r"final_layernorm.weight has shape \[47\]"):
            load_into(wrong, reader, architecture)


def test_a_folder_of_another_shape_is_the_users_mistake(make_llama: MakeLlama) -> None:
    architecture = architecture_of(hidden_size=56)
    with HFReader(make_llama()) as reader, pytest.raises(UserError, match="same release"):
        load_into(empty_parameters(architecture), reader, architecture)
