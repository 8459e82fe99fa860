"""Adapters beside Megatron-Core's parallel linear layers, one A and B for each Hugging Face module (LoRA).

Megatron fuses q, k, v and gate, up; `peft` has an adapter for each. So a fused layer has several adapters and adds each
one's output to the rows of its module (hf/weight_map.py):

    linear_qkv, per query group  [ q heads | k head | v head ]        linear_fc1  [ gate | up ]

Under tensor parallelism the large side is split, and the side of width `rank` is communicated:

                     A                    B                    communication
    column-parallel  whole on every rank  rows of the rank     A x: gathered over tokens, with sequence parallelism
    row-parallel     columns of the rank  whole on every rank  A x: summed over ranks

With sequence parallelism the whole matrix sees only this rank's tokens. It is marked `sequence_parallel`, so
Megatron-Core sums its gradient over the tensor-parallel group, as for the norms.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megalong.config.lora import ATTENTION, Module, is_adapter
from megalong.model.config import LlamaConfig
from megalong.model.cpu_bf16 import linear
from megalong.runtime.megatron import mark_as_slice

Weights = tuple[torch.Tensor, torch.Tensor]


# Hugging Face modules in a fused layer, in the layer's order.
MODULES_OF: dict[str, tuple[Module, ...]] = {
    "linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "linear_proj": ("o_proj",),
    "linear_fc1": ("gate_proj", "up_proj"),
    "linear_fc2": ("down_proj",),
}


def module_rows(place: str, config: LlamaConfig) -> tuple[int, dict[str, int]]:
    """(number of blocks, rows per block by module) in this rank's part of a fused layer.

    `place` is linear_qkv (a block is a query group) or linear_fc1 (one block).
    """
    ranks = config.tensor_model_parallel_size
    if place == "linear_fc1":
        share = (config.ffn_hidden_size or 0) // ranks
        return 1, {"gate_proj": share, "up_proj": share}
    groups, head = config.num_query_groups or 1, config.kv_channels or 1
    queries = config.num_attention_heads // groups * head
    return groups // ranks, {"q_proj": queries, "k_proj": head, "v_proj": head}


def with_adapters(base: type, place: str, config: LlamaConfig) -> type | ModuleSpec:
    """The linear layer at `place`: `base`, with adapters beside it if `config.lora` targets a module of it.

    Args:
        base: a column-parallel class for linear_qkv and linear_fc1, a row-parallel class for linear_proj and
            linear_fc2, of Megatron-Core, Transformer Engine or ours.
    """
    if config.lora is None or not set(config.lora.target_modules) & set(MODULES_OF[place]):
        return base
    kind = LoraColumnParallel if place in ("linear_qkv", "linear_fc1") else LoraRowParallel
    return ModuleSpec(module=_composed(kind, base), params={"place": place})


@functools.cache
def _composed(kind: type[LoraLinear], base: type) -> type:
    return type(f"Lora{base.__name__}", (kind, base), {"__doc__": f"{base.__name__} with adapters."})


class LoraLinear(torch.nn.Module):
    """Adapters of one linear layer, a mix-in to put before its class. They compute in their own type, also beside FP8.

    Attributes:
        lora_A, lora_B: by the Hugging Face name of the module.
    """

    columns: bool  # whether tensor-parallel ranks split the input (A's columns); otherwise the output (B's rows)
    weight: torch.Tensor

    def merged(self) -> torch.Tensor:
        """The weight with its adapters added, computed in float32."""
        raise NotImplementedError

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """The layer's own entries, and those of the adapters with their split."""
        own = {
            f"{table}.{name}": weights
            for table in ("lora_A", "lora_B")
            for name, weights in getattr(self, table).items()
        }
        adapters = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {name: 1 if self.columns else 0 for name in own if name.startswith("lora_A") == self.columns},
            sharded_offsets,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            dp_cp_group=(metadata or {})["dp_cp_group"],
        )
        return {**super().sharded_state_dict(prefix, sharded_offsets, metadata), **adapters}  # type: ignore[misc]

    def _create_adapters(self, config: LlamaConfig, inputs: int, outputs: dict[str, int]) -> None:
        """Create A [rank, inputs] and B [outputs, rank] of each module, with this rank's sizes."""
        assert config.lora is not None
        assert config.lora.rank is not None
        rank, self.scale = config.lora.rank, config.lora.scale
        self._gathers = config.sequence_parallel
        self.lora_A = torch.nn.ParameterDict({name: _empty(config, rank, inputs) for name in outputs})
        self.lora_B = torch.nn.ParameterDict({name: _empty(config, rows, rank) for name, rows in outputs.items()})
        cut, whole = (self.lora_A, self.lora_B) if self.columns else (self.lora_B, self.lora_A)
        for name in outputs:
            mark_as_slice(cut[name], 1 if self.columns else 0)
            whole[name].sequence_parallel = config.sequence_parallel


class LoraColumnParallel(LoraLinear):
    """Adapters of `linear_qkv` or `linear_fc1`.

    Args:
        place: which of the two it is.
    """

    columns = False

    def __init__(self, input_size: int, output_size: int, *, config: LlamaConfig, place: str, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        assert config.lora is not None
        self.blocks, self.rows = module_rows(place, config)
        self.targets = [name for name in self.rows if name in config.lora.target_modules]
        self._create_adapters(config, input_size, {name: self.blocks * self.rows[name] for name in self.targets})

    def forward(self, input_: torch.Tensor, *arguments: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """See the layer's class. [s, b, in] to [s, b, out/TP]; with sequence parallelism the input has s/TP tokens."""
        out, bias = super().forward(input_, *arguments, **options)
        down = linear(input_, torch.cat([self.lora_A[name] for name in self.targets])) * self.scale
        if self._gathers:
            down = gather_from_sequence_parallel_region(down)
        else:
            down = copy_to_tensor_model_parallel_region(down)
        narrow = dict(zip(self.targets, down.chunk(len(self.targets), -1), strict=True))
        parts = [
            linear(narrow[name], self.lora_B[name]).unflatten(-1, (self.blocks, rows))
            if name in narrow
            else out.new_zeros(*out.shape[:-1], self.blocks, rows)
            for name, rows in self.rows.items()
        ]
        return out + torch.cat(parts, -1).flatten(-2), bias

    def merged(self) -> torch.Tensor:
        """The weight with its adapters added, computed in float32."""
        total = self.weight.detach().float()
        blocks = total.view(self.blocks, -1, total.shape[-1])
        first = 0
        for name, rows in self.rows.items():
            if name in self.targets:
                update = self.scale * (self.lora_B[name].detach().float() @ self.lora_A[name].detach().float())
                blocks[:, first : first + rows] += update.unflatten(0, (self.blocks, rows))
            first += rows
        return total


class LoraRowParallel(LoraLinear):
    """The adapter of `linear_proj` (o_proj) or `linear_fc2` (down_proj).

    Args:
        place: which of the two it is.
    """

    columns = True

    def __init__(self, input_size: int, output_size: int, *, config: LlamaConfig, place: str, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        (self.target,) = MODULES_OF[place]
        self._create_adapters(config, input_size // config.tensor_model_parallel_size, {self.target: output_size})

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """See the layer's class. [s, b, in/TP] to [s, b, out]; with sequence parallelism the output has s/TP tokens."""
        out, bias = super().forward(input_)
        down = linear(input_, self.lora_A[self.target]) * self.scale
        if self._gathers:
            down = reduce_scatter_to_sequence_parallel_region(down)
        else:
            down = reduce_from_tensor_model_parallel_region(down)
        return out + linear(down, self.lora_B[self.target]), bias

    def merged(self) -> torch.Tensor:
        """The weight with its adapter added, computed in float32."""
        a, b = (table[self.target].detach().float() for table in (self.lora_A, self.lora_B))
        return self.weight.detach().float() + self.scale * (b @ a)


@dataclass(frozen=True)
class Adapter:
    """This rank's part of one module's adapter.

    `module` is its Hugging Face name (`model.layers.3.self_attn.q_proj`), A `[rank, in]`, B `[out, rank]`.
    Tensor-parallel ranks split A's columns if `columns`, else B's rows.
    """

    module: str
    a: torch.nn.Parameter
    b: torch.nn.Parameter
    columns: bool

    def fill(self, source: Callable[[str, tuple[int, int], tuple[int, int]], Weights]) -> None:
        """Copy this rank's part of the matrices that `source(module, shape of A, shape of B)` returns."""
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rank = parallel_state.get_tensor_model_parallel_rank()
        (depth, width), height = self.a.shape, self.b.shape[0]
        whole = (width * ranks, height) if self.columns else (width, height * ranks)
        a, b = source(self.module, (depth, whole[0]), (whole[1], depth))
        with torch.no_grad():
            self.a.copy_(a.chunk(ranks, 1)[rank] if self.columns else a)
            self.b.copy_(b if self.columns else b.chunk(ranks, 0)[rank])


def adapters(chunk: Any) -> Iterator[Adapter]:
    """Every adapter of a `LlamaModel`, in the order of the forward pass."""
    for number, layer in enumerate(chunk.decoder.layers):
        for adapted in layer.modules():
            if not isinstance(adapted, LoraLinear):
                continue
            for name, a in adapted.lora_A.items():
                part = "self_attn" if name in ATTENTION else "mlp"
                module = f"model.layers.{chunk.first_layer + number}.{part}.{name}"
                yield Adapter(module, a, adapted.lora_B[name], adapted.columns)


def random_adapters(seed: int) -> Callable[[str, tuple[int, int], tuple[int, int]], Weights]:
    """A source of new adapters: A uniform within 1/√in as in `peft`, B zero; the same for any grid."""

    def draw(module: str, a_shape: tuple[int, int], b_shape: tuple[int, int]) -> Weights:
        generator = torch.Generator().manual_seed(zlib.crc32(module.encode(), seed))
        bound = 1 / math.sqrt(a_shape[1])
        return torch.empty(a_shape).uniform_(-bound, bound, generator=generator), torch.zeros(b_shape)

    return draw


def freeze_base(chunk: torch.nn.Module) -> None:
    """Train only the adapters.

    The embedding's output is made to require a gradient although the embedding is frozen: a recomputed layer whose
    inputs require none would compute none for the adapters inside it.
    """
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    embedding = getattr(chunk, "embedding", None)
    if embedding is not None:
        embedding.register_forward_hook(_require_gradient)


def merged_parameters(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All weights of a model by local name, with adapters merged into their base weights; in the weights' type."""
    found = {name: parameter.detach() for name, parameter in chunk.named_parameters() if not is_adapter(name)}
    for name, module in chunk.named_modules():
        if isinstance(module, LoraLinear):
            weight = found[f"{name}.weight"]
            found[f"{name}.weight"] = module.merged().to(weight.dtype)
    return found


def _require_gradient(module: torch.nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
    return output.requires_grad_() if torch.is_grad_enabled() else output


def _empty(config: LlamaConfig, rows: int, columns: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(rows, columns, dtype=config.params_dtype, device=torch.cuda.current_device()))
