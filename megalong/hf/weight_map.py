"""The weight map: which rows and columns of Hugging Face tensors make up a Megatron parameter.

The map is data (`EMBEDDING`, `LAYER`, `FINAL_NORM`, `OUTPUT`) and is read in both directions. A local parameter (one
tensor-parallel rank's shard) is a list of `Piece`s: `length` rows (dim 0) or columns (dim 1) of a Hugging Face tensor
from `hf_start` on are the parameter's rows or columns from `local_start` on. Import copies Hugging Face → parameter by
these pieces and export copies back by the same ones, so the two cannot disagree.

A row of the map has a kind, which says how Megatron-Core shards the parameter:

    whole       every rank has all of it
    columns     row-parallel: each rank has a contiguous range of the input features
    vocabulary  rows of the padded vocabulary; padding has no piece: zero on import, dropped on export
    gate_up     column-parallel: the rank's rows of each tensor, stacked: [gate; up] per rank
    qkv         column-parallel: one query group after the other, each with its rows of every tensor

Example of qkv: 4 query heads, 2 query groups, head size 8, one rank:

    linear_qkv rows   0..15  q heads 0, 1     16..23  k head 0     24..31  v head 0      (group 0)
                     32..47  q heads 2, 3     48..55  k head 1     56..63  v head 1      (group 1)

A tied model has one table; the last pipeline stage's `output_layer` is then a copy of the embedding.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megalong.config.architecture import Architecture
from megalong.errors import UserError

Size = Literal["hidden", "ffn", "queries", "keys", "vocabulary"]
Kind = Literal["whole", "columns", "vocabulary", "gate_up", "qkv"]


@dataclass(frozen=True)
class Tensor:
    """A Hugging Face tensor; a vector if `columns` is None."""

    name: str
    rows: Size
    columns: Size | None = None


@dataclass(frozen=True)
class Row:
    """A Megatron parameter and the Hugging Face tensors that make it up."""

    parameter: str
    kind: Kind
    tensors: tuple[Tensor, ...]


EMBEDDING = Row(
    "embedding.word_embeddings.weight", "vocabulary", (Tensor("model.embed_tokens.weight", "vocabulary", "hidden"),)
)
FINAL_NORM = Row("decoder.final_layernorm.weight", "whole", (Tensor("model.norm.weight", "hidden"),))
OUTPUT = Row("output_layer.weight", "vocabulary", (Tensor("lm_head.weight", "vocabulary", "hidden"),))
# Names within a layer, after `decoder.layers.N.` in Megatron and `model.layers.N.` in Hugging Face.
LAYER = (
    Row("input_layernorm.weight", "whole", (Tensor("input_layernorm.weight", "hidden"),)),
    Row(
        "self_attention.linear_qkv.weight",
        "qkv",
        (
            Tensor("self_attn.q_proj.weight", "queries", "hidden"),
            Tensor("self_attn.k_proj.weight", "keys", "hidden"),
            Tensor("self_attn.v_proj.weight", "keys", "hidden"),
        ),
    ),
    Row("self_attention.linear_proj.weight", "columns", (Tensor("self_attn.o_proj.weight", "hidden", "queries"),)),
    Row("pre_mlp_layernorm.weight", "whole", (Tensor("post_attention_layernorm.weight", "hidden"),)),
    Row(
        "mlp.linear_fc1.weight",
        "gate_up",
        (Tensor("mlp.gate_proj.weight", "ffn", "hidden"), Tensor("mlp.up_proj.weight", "ffn", "hidden")),
    ),
    Row("mlp.linear_fc2.weight", "columns", (Tensor("mlp.down_proj.weight", "hidden", "ffn"),)),
)
_LAYER_NAME = re.compile(r"decoder\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Piece:
    """`length` rows (`dim` 0) or columns (`dim` 1) shared by a Hugging Face tensor and a local parameter."""

    tensor: str
    dim: int
    hf_start: int
    local_start: int
    length: int


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of one tensor-parallel rank: its shape and the pieces that fill it (the rest is padding)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def layer_parameter_names(layer: int) -> list[str]:
    """Local names of the parameters of decoder layer `layer` (counted within its pipeline stage)."""
    return [f"decoder.layers.{layer}.{row.parameter}" for row in LAYER]


def local_names(architecture: Architecture) -> list[str]:
    """Names of all parameters of the whole model on one pipeline stage, in the order of the forward pass."""
    layers = [name for layer in range(architecture.num_layers) for name in layer_parameter_names(layer)]
    names = [EMBEDDING.parameter, *layers, FINAL_NORM.parameter]
    return names if architecture.tie_word_embeddings else [*names, OUTPUT.parameter]


def local_layer(name: str) -> int | None:
    """The layer number in a local parameter name; None for embedding, final norm and output layer."""
    match = _LAYER_NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def local_parameter(
    name: str, architecture: Architecture, tp_rank: int = 0, tp_size: int = 1, layer_offset: int = 0
) -> LocalParameter:
    """The shard of the parameter `name` on rank `tp_rank` of `tp_size`.

    `layer_offset` is added to the layer number in `name` (layers before this pipeline stage). Raises KeyError for a
    name that is not a parameter of the model, UserError if `tp_size` does not divide the model.
    """
    check_tensor_parallel(architecture, tp_size)
    row, prefix = _find(name, architecture, layer_offset)
    pieces = tuple(_pieces(row, prefix, architecture, tp_rank, tp_size))
    sizes = _sizes(architecture)
    rows = sum(sizes[tensor.rows] for tensor in row.tensors)
    if row.kind == "whole":
        return LocalParameter((rows,), pieces)
    columns = sizes[row.tensors[0].columns or "hidden"]
    if row.kind == "columns":
        return LocalParameter((rows, columns // tp_size), pieces)
    if row.kind == "vocabulary":
        rows = architecture.padded_vocab_size
    return LocalParameter((rows // tp_size, columns), pieces)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the forward pass."""
    sizes = _sizes(architecture)
    rows = [("", EMBEDDING)]
    rows += [(f"model.layers.{layer}.", row) for layer in range(architecture.num_layers) for row in LAYER]
    rows += [("", FINAL_NORM)] if architecture.tie_word_embeddings else [("", FINAL_NORM), ("", OUTPUT)]
    return {
        f"{prefix}{tensor.name}": tuple(sizes[size] for size in (tensor.rows, tensor.columns) if size)
        for prefix, row in rows
        for tensor in row.tensors
    }


def hf_sources(architecture: Architecture) -> Iterator[tuple[str, list[tuple[str, Piece]]]]:
    """For each Hugging Face tensor, the pieces that make it up, in its order, with their TP=1 parameter's name."""
    sources: dict[str, list[tuple[str, Piece]]] = {name: [] for name in hf_shapes(architecture)}
    for name in local_names(architecture):
        for piece in local_parameter(name, architecture).pieces:
            sources[piece.tensor].append((name, piece))
    for tensor, pieces in sources.items():
        yield tensor, sorted(pieces, key=lambda source: source[1].hf_start)


def check_tensor_parallel(architecture: Architecture, tp_size: int) -> None:
    """Raise UserError if `tp_size` does not divide heads, query groups, MLP or vocabulary."""
    shared = {
        "num_query_groups": architecture.num_query_groups,
        "num_attention_heads": architecture.num_attention_heads,
        "ffn_hidden_size": architecture.ffn_hidden_size,
        "padded_vocab_size": architecture.padded_vocab_size,
    }
    for key, value in shared.items():
        if value % tp_size:
            raise UserError(
                f"parallel.tensor_model_parallel_size = {tp_size}: it does not divide the model's {key} = {value}; "
                "choose a divisor"
            )


def _find(name: str, architecture: Architecture, layer_offset: int) -> tuple[Row, str]:
    """The row of a local parameter, and the prefix of its Hugging Face tensors."""
    match = _LAYER_NAME.fullmatch(name)
    rows: tuple[Row, ...]
    if match is not None:
        rows, prefix, within = LAYER, f"model.layers.{int(match.group(1)) + layer_offset}.", match.group(2)
    else:
        rows, prefix, within = (EMBEDDING, FINAL_NORM, OUTPUT), "", name
    for row in rows:
        if row.parameter == within:
            return (EMBEDDING if row is OUTPUT and architecture.tie_word_embeddings else row), prefix
    raise KeyError(f"{name} is not in the weight map")


def _sizes(architecture: Architecture) -> dict[Size, int]:
    return {
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "queries": architecture.num_attention_heads * architecture.kv_channels,
        "keys": architecture.num_query_groups * architecture.kv_channels,
        "vocabulary": architecture.vocab_size,
    }


def _pieces(row: Row, prefix: str, architecture: Architecture, tp_rank: int, tp_size: int) -> Iterator[Piece]:
    """The pieces of one rank's shard."""
    sizes = _sizes(architecture)
    first = row.tensors[0]
    if row.kind == "whole":
        yield Piece(prefix + first.name, 0, 0, 0, sizes[first.rows])
    elif row.kind == "columns":
        assert first.columns is not None
        shard = sizes[first.columns] // tp_size
        yield Piece(prefix + first.name, 1, tp_rank * shard, 0, shard)
    elif row.kind == "vocabulary":
        shard = architecture.padded_vocab_size // tp_size
        start = tp_rank * shard
        length = min(start + shard, architecture.vocab_size) - start
        if length > 0:  # else the rank has only padding
            yield Piece(prefix + first.name, 0, start, 0, length)
    else:
        # Blocks of rows: one per rank with gate_up, one per query group with qkv.
        blocks = architecture.num_query_groups // tp_size if row.kind == "qkv" else 1
        local_start = 0
        for block in range(tp_rank * blocks, (tp_rank + 1) * blocks):
            for tensor in row.tensors:
                length = sizes[tensor.rows] // (blocks * tp_size)
                yield Piece(prefix + tensor.name, 0, block * length, local_start, length)
                local_start += length
