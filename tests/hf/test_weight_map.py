"""The layout table against Megatron's layout stated independently: reshapes and concatenations of whole tensors."""

import pytest
import torch

from megalong.config.architecture import Architecture
from megalong.errors import UserError
from megalong.hf.weight_map import hf_shapes, hf_sources, local_names, local_parameter
from tests.hf.conftest import architecture_of


def full_tensors(architecture: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_shapes(architecture).items()}


def fill(
    name: str, architecture: Architecture, hf: dict[str, torch.Tensor], rank: int = 0, size: int = 1
) -> torch.Tensor:
    """A rank's parameter, from the table."""
    layout = local_parameter(name, architecture, rank, size)
    parameter = torch.zeros(layout.shape)
    for piece in layout.pieces:
        source = hf[piece.tensor].narrow(piece.dim, piece.hf_start, piece.length)
        parameter.narrow(piece.dim, piece.local_start, piece.length).copy_(source)
    return parameter


def megatron_full(architecture: Architecture, hf: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The TP=1 parameters of a layer, by reshaping instead of by table."""
    groups, head, hidden = architecture.num_query_groups, architecture.kv_channels, architecture.hidden_size
    prefix = f"model.layers.{layer}."
    q, k, v = (hf[f"{prefix}self_attn.{name}_proj.weight"].view(groups, -1, head, hidden) for name in ("q", "k", "v"))
    return {
        "self_attention.linear_qkv.weight": torch.cat([q, k, v], dim=1).reshape(-1, hidden),
        "self_attention.linear_proj.weight": hf[f"{prefix}self_attn.o_proj.weight"],
        "mlp.linear_fc1.weight": torch.cat([hf[f"{prefix}mlp.gate_proj.weight"], hf[f"{prefix}mlp.up_proj.weight"]]),
        "mlp.linear_fc2.weight": hf[f"{prefix}mlp.down_proj.weight"],
        "input_layernorm.weight": hf[f"{prefix}input_layernorm.weight"],
        "pre_mlp_layernorm.weight": hf[f"{prefix}post_attention_layernorm.weight"],
    }


def join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """The whole parameter from the ranks' shares, as Megatron shards each kind."""
    if "layernorm" in name:
        assert all(torch.equal(part, parts[0]) for part in parts)
        return parts[0]
    if "linear_fc1" in name:
        gates, ups = zip(*(part.chunk(2) for part in parts), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(parts, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("groups", [4, 8])
def test_every_rank_gets_its_share_of_megatrons_layout(size: int, groups: int) -> None:
    architecture = architecture_of(num_query_groups=groups)
    hf = full_tensors(architecture)
    for layer in range(architecture.num_layers):
        for name, whole in megatron_full(architecture, hf, layer).items():
            local = f"decoder.layers.{layer}.{name}"
            parts = [fill(local, architecture, hf, rank, size) for rank in range(size)]
            assert torch.equal(join(name, parts), whole), local


@pytest.mark.parametrize("size", [1, 2, 4])
def test_vocabulary_515_is_padded_with_zeros(size: int) -> None:
    architecture = architecture_of()
    hf = full_tensors(architecture)
    for name, tensor in (
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        ("output_layer.weight", "lm_head.weight"),
    ):
        table = torch.cat([fill(name, architecture, hf, rank, size) for rank in range(size)])
        assert table.shape[0] == 640
        assert torch.equal(table[:515], hf[tensor])
        assert not table[515:].any()


def test_a_rank_of_pure_padding_has_no_piece() -> None:
    layout = local_parameter("output_layer.weight", architecture_of(vocab_size=30), 3, 4)
    assert layout.pieces == ()
    assert layout.shape == (32, 48)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 8])
def test_export_undoes_import(tied: bool, groups: int) -> None:
    architecture = architecture_of(tie_word_embeddings=tied, num_query_groups=groups)
    hf = full_tensors(architecture)
    local = {name: fill(name, architecture, hf) for name in local_names(architecture)}
    back = {
        tensor: torch.cat(
            [local[name].narrow(p.dim, p.local_start, p.length) for name, p in sources], sources[0][1].dim
        )
        for tensor, sources in hf_sources(architecture)
    }
    assert list(back) == list(hf)
    assert all(torch.equal(back[name], hf[name]) for name in hf)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_every_tensor_without_overlap(size: int) -> None:
    architecture = architecture_of()
    covered = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in hf_shapes(architecture).items()}
    for rank in range(size):
        for name in local_names(architecture):
            for piece in local_parameter(name, architecture, rank, size).pieces:
                covered[piece.tensor].narrow(piece.dim, piece.hf_start, piece.length).add_(1)
    for name, count in covered.items():
        assert bool((count == (size if "norm" in name else 1)).all()), name


def test_a_tied_output_layer_of_the_last_stage_copies_the_embedding() -> None:
    architecture = architecture_of(tie_word_embeddings=True)
    assert local_parameter("output_layer.weight", architecture) == local_parameter(
        "embedding.word_embeddings.weight", architecture
    )


def test_layer_numbers_are_local_to_the_pipeline_stage() -> None:
    layout = local_parameter("decoder.layers.0.mlp.linear_fc2.weight", architecture_of(), layer_offset=2)
    assert layout.pieces[0].tensor == "model.layers.2.mlp.down_proj.weight"


def test_names_that_are_no_llamas_are_bugs_and_bad_sizes_are_the_users() -> None:
    with pytest.raises(KeyError, match="linear_qkv"):
        local_parameter("decoder.layers.0.self_attention.linear_qkv.bias", architecture_of())
    with pytest.raises(UserError, match=r"tensor_model_parallel_size = 8.*num_query_groups = 4"):
        local_parameter("output_layer.weight", architecture_of(), 0, 8)
