"""Which Hugging Face rows and columns a Megatron parameter is made of: one table, read in both directions.

A local parameter (one tensor-parallel rank's share) is a list of `Piece`s. A piece says: `length` rows (dim 0) or
columns (dim 1) of the Hugging Face tensor from `hf_start` on are the rows or columns of the parameter from
`local_start` on. Import copies Hugging Face → parameter along the pieces, export copies back along the same ones,
so the two cannot disagree.

Example: 4 query heads, 2 query groups, head size 8, tensor-parallel size 1. Megatron's fused QKV interleaves per group

    linear_qkv rows   0..15  q heads 0, 1     16..23  k head 0     24..31  v head 0      (group 0)
                     32..47  q heads 2, 3     48..55  k head 1     56..63  v head 1      (group 1)

so it is six pieces of q_proj, k_proj and v_proj; with two ranks each has one group, three pieces. `linear_fc1` holds
`[gate; up]` per rank, not the halves of one stacked matrix. The embedding's rows past the true vocabulary have no
piece: zero on import, dropped at export.

A tied model keeps one table; the last pipeline stage's `output_layer` is then a copy of the embedding.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megalong.config.architecture import Architecture
from megalong.errors import UserError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LAYER_PARAMETERS = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.weight",
    "mlp.linear_fc2.weight",
)


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
    """A parameter of one tensor-parallel rank: its shape and the pieces that fill it (rest is padding)."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


def layer_parameter_names(layer: int) -> list[str]:
    """Local names of the six parameters of decoder layer `layer` (counted within its pipeline stage)."""
    return [f"decoder.layers.{layer}.{name}" for name in _LAYER_PARAMETERS]


def local_names(architecture: Architecture) -> list[str]:
    """Names of all parameters of the whole model on one pipeline stage, in the order of the forward pass."""
    names = ["embedding.word_embeddings.weight"]
    for layer in range(architecture.num_layers):
        names += layer_parameter_names(layer)
    names.append("decoder.final_layernorm.weight")
    return names if architecture.tie_word_embeddings else [*names, "output_layer.weight"]


def local_layer(name: str) -> int | None:
    """The layer number inside a local parameter name, None for embedding, final norm and output layer."""
    match = _LAYER.fullmatch(name)
    return int(match.group(1)) if match else None


def local_parameter(
    name: str, architecture: Architecture, tp_rank: int = 0, tp_size: int = 1, layer_offset: int = 0
) -> LocalParameter:
    """The share of rank `tp_rank` of `tp_size` in the parameter `name`.

    `layer_offset` is added to the layer number in `name` (layers before this pipeline stage).
    Raises KeyError for a name that is no Llama parameter, UserError where `tp_size` does not divide the model.
    """
    check_tensor_parallel(architecture, tp_size)
    match = _LAYER.fullmatch(name)
    if match is None:
        return _outer_parameter(name, architecture, tp_rank, tp_size)
    prefix = f"model.layers.{int(match.group(1)) + layer_offset}."
    return _layer_parameter(match.group(2), prefix, architecture, tp_rank, tp_size)


def hf_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint, in the order of the forward pass."""
    vocabulary = (architecture.vocab_size, architecture.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": vocabulary}
    for layer in range(architecture.num_layers):
        shapes.update(_hf_layer_shapes(f"model.layers.{layer}.", architecture))
    shapes["model.norm.weight"] = (architecture.hidden_size,)
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    return shapes


def hf_sources(architecture: Architecture) -> Iterator[tuple[str, list[tuple[str, Piece]]]]:
    """For each Hugging Face tensor, the pieces that make it up (with their TP=1 parameter's name), in its own order."""
    sources: dict[str, list[tuple[str, Piece]]] = {name: [] for name in hf_shapes(architecture)}
    for name in local_names(architecture):
        for piece in local_parameter(name, architecture).pieces:
            sources[piece.tensor].append((name, piece))
    for tensor, pieces in sources.items():
        yield tensor, sorted(pieces, key=lambda source: source[1].hf_start)


def check_tensor_parallel(architecture: Architecture, tp_size: int) -> None:
    """Raise UserError where `tp_size` ranks cannot share heads, query groups, MLP or vocabulary evenly."""
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


def _outer_parameter(name: str, architecture: Architecture, tp_rank: int, tp_size: int) -> LocalParameter:
    """Embedding, final norm or output layer."""
    if name == "decoder.final_layernorm.weight":
        return _whole("model.norm.weight", architecture.hidden_size)
    if name == "embedding.word_embeddings.weight" or (
        name == "output_layer.weight" and architecture.tie_word_embeddings
    ):
        return _vocabulary("model.embed_tokens.weight", architecture, tp_rank, tp_size)
    if name == "output_layer.weight":
        return _vocabulary("lm_head.weight", architecture, tp_rank, tp_size)
    raise KeyError(f"{name} is not a parameter of a Llama")


def _layer_parameter(name: str, prefix: str, architecture: Architecture, tp_rank: int, tp_size: int) -> LocalParameter:
    """One of the six parameters of the layer whose Hugging Face names start with `prefix`."""
    hidden = architecture.hidden_size
    heads_width = architecture.num_attention_heads * architecture.kv_channels
    match name:
        case "input_layernorm.weight":
            return _whole(f"{prefix}input_layernorm.weight", hidden)
        case "pre_mlp_layernorm.weight":
            return _whole(f"{prefix}post_attention_layernorm.weight", hidden)
        case "self_attention.linear_qkv.weight":
            return _qkv(prefix, architecture, tp_rank, tp_size)
        case "self_attention.linear_proj.weight":
            return _columns(f"{prefix}self_attn.o_proj.weight", hidden, heads_width, tp_rank, tp_size)
        case "mlp.linear_fc1.weight":
            return _gate_up(prefix, architecture, tp_rank, tp_size)
        case "mlp.linear_fc2.weight":
            return _columns(f"{prefix}mlp.down_proj.weight", hidden, architecture.ffn_hidden_size, tp_rank, tp_size)
    raise KeyError(f"decoder layer parameter {name} is not a parameter of a Llama")


def _whole(tensor: str, size: int) -> LocalParameter:
    """A vector that every rank holds whole."""
    return LocalParameter((size,), (Piece(tensor, 0, 0, 0, size),))


def _columns(tensor: str, rows: int, columns: int, tp_rank: int, tp_size: int) -> LocalParameter:
    """A row-parallel linear layer: each rank holds a contiguous range of the input features."""
    share = columns // tp_size
    return LocalParameter((rows, share), (Piece(tensor, 1, tp_rank * share, 0, share),))


def _vocabulary(tensor: str, architecture: Architecture, tp_rank: int, tp_size: int) -> LocalParameter:
    """A rank's rows of the padded vocabulary; a rank that holds nothing but padding has no piece."""
    share = architecture.padded_vocab_size // tp_size
    start = tp_rank * share
    length = min(start + share, architecture.vocab_size) - start
    pieces = (Piece(tensor, 0, start, 0, length),) if length > 0 else ()
    return LocalParameter((share, architecture.hidden_size), pieces)


def _qkv(prefix: str, architecture: Architecture, tp_rank: int, tp_size: int) -> LocalParameter:
    """Query groups of the rank, one after the other: the group's query heads, its key head, its value head."""
    head = architecture.kv_channels
    queries = architecture.num_attention_heads // architecture.num_query_groups * head
    share = architecture.num_query_groups // tp_size
    pieces = []
    for local_group in range(share):
        group, start = tp_rank * share + local_group, local_group * (queries + 2 * head)
        pieces += [
            Piece(f"{prefix}self_attn.q_proj.weight", 0, group * queries, start, queries),
            Piece(f"{prefix}self_attn.k_proj.weight", 0, group * head, start + queries, head),
            Piece(f"{prefix}self_attn.v_proj.weight", 0, group * head, start + queries + head, head),
        ]
    return LocalParameter((share * (queries + 2 * head), architecture.hidden_size), tuple(pieces))


def _gate_up(prefix: str, architecture: Architecture, tp_rank: int, tp_size: int) -> LocalParameter:
    """`[gate_r; up_r]`: the rank's rows of both projections, stacked."""
    share = architecture.ffn_hidden_size // tp_size
    gate = Piece(f"{prefix}mlp.gate_proj.weight", 0, tp_rank * share, 0, share)
    up = Piece(f"{prefix}mlp.up_proj.weight", 0, tp_rank * share, share, share)
    return LocalParameter((2 * share, architecture.hidden_size), (gate, up))


def _hf_layer_shapes(prefix: str, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's nine tensors."""
    hidden, ffn, head = architecture.hidden_size, architecture.ffn_hidden_size, architecture.kv_channels
    queries, keys = architecture.num_attention_heads * head, architecture.num_query_groups * head
    return {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}self_attn.q_proj.weight": (queries, hidden),
        f"{prefix}self_attn.k_proj.weight": (keys, hidden),
        f"{prefix}self_attn.v_proj.weight": (keys, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}mlp.gate_proj.weight": (ffn, hidden),
        f"{prefix}mlp.up_proj.weight": (ffn, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, ffn),
    }
