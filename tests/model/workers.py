"""What a rank of the worker pool runs in the model tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalong.config.rope import RopeSettings
from megalong.runtime import distributed
from megalong.runtime.grid import Grid


def logits(
    hf: str,
    positions: list[int],
    tokens: list[list[int]],
    parallel: dict[str, int],
    rope: dict[str, Any] | None = None,
    window: tuple[int, int | None] | None = None,
) -> np.ndarray:
    """Full-vocabulary logits [b, s, V] of our model with the weights of `hf`, float64 for the comparison's sake.

    Context-parallel ranks return their shard's rows in shard order; the caller puts them back.
    `rope` overrides the folder's positions, as `model.rope` does, `window` (size and skip frequency) its windows.
    """
    device = torch.device("cpu")
    distributed.start(device)
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from megalong.attention.layout import TokenLayout, tokens_of
    from megalong.attention.plan import make_plan
    from megalong.hf.config import read_architecture
    from megalong.hf.load import load_into
    from megalong.hf.reader import HFReader
    from megalong.model.attention_inputs import AttentionInputs
    from megalong.model.build import build_model
    from megalong.model.config import ModelSettings

    layout = Grid(**parallel)
    distributed.set_grid(layout)
    try:
        override = RopeSettings(**rope) if rope else None
        architecture = read_architecture(Path(hf)).with_rope(override).with_window(*window or (None,))
        (model,) = build_model(architecture, ModelSettings(grid=layout, params_dtype=torch.float32))
        load_into(
            model, HFReader(Path(hf)), architecture, parallel_state.get_tensor_model_parallel_rank(), layout.tensor
        )
        plan = make_plan(TokenLayout(layout.context), len(positions))
        rows = tokens_of(plan.sequences[0].shards[parallel_state.get_context_parallel_rank()].runs)
        inputs = AttentionInputs(positions=torch.tensor(positions)[None, rows], plan=plan)
        with torch.no_grad():
            out: Any = model(torch.tensor(tokens)[:, rows], None, inputs)
            whole = gather_from_tensor_model_parallel_region(out)
        return whole[..., : architecture.vocab_size].double().numpy()
    finally:
        distributed.clear_grid()


def bf16_losses(hf: str, tokens: list[list[int]], parallel: dict[str, int], capability: str) -> dict[str, Any]:
    """Forward and backward of a bf16 model on a CPU that is said to have `capability`.

    Returns:
        losses: float32 [b, s], of every token but the first.
        gradients: of all weights, by their local names; with sequence parallelism where there is tensor parallelism.
        classes: of the linear layers.
    """
    distributed.start(torch.device("cpu"))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    from megalong.attention.layout import TokenLayout
    from megalong.attention.plan import make_plan
    from megalong.hf.config import read_architecture
    from megalong.hf.load import load_into
    from megalong.hf.reader import HFReader
    from megalong.model.attention_inputs import AttentionInputs
    from megalong.model.build import build_model
    from megalong.model.config import ModelSettings

    layout = Grid(**parallel)
    distributed.set_grid(layout)
    try:
        architecture = read_architecture(Path(hf))
        settings = ModelSettings(layout, sequence_parallel=layout.tensor > 1, params_dtype=torch.bfloat16)
        with patch.object(torch.backends.cpu, "get_cpu_capability", lambda: capability):
            (model,) = build_model(architecture, settings)
            rank = parallel_state.get_tensor_model_parallel_rank()
            load_into(model, HFReader(Path(hf)), architecture, rank, layout.tensor)
            samples = torch.tensor(tokens)
            length = samples.shape[1] - 1
            inputs = AttentionInputs(positions=torch.arange(length)[None], plan=make_plan(TokenLayout(1), length))
            losses = model(samples[:, :-1], samples[:, 1:], inputs)
            losses.mean().backward()
        linears = (ColumnParallelLinear, RowParallelLinear)
        classes = {type(module).__name__ for module in model.modules() if isinstance(module, linears)}
        gradients = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
        return {"losses": losses.detach(), "gradients": gradients, "classes": sorted(classes)}
    finally:
        distributed.clear_grid()


def fp8_linears(tensor_parallel: int, sequence_parallel: bool) -> dict[str, Any]:
    """Two steps of a column- and a row-parallel FP8 layer, one feeding the other: outputs [s, b, k] and scales."""
    distributed.start(torch.device("cpu"))
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    from megalong.config.architecture import Architecture
    from megalong.model.build import mark_tensor_parallel
    from megalong.model.config import ModelSettings, transformer_config
    from megalong.model.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, refresh_scales

    layout = Grid(tensor=tensor_parallel)
    distributed.set_grid(layout)
    try:
        shape: dict[str, Any] = {"hidden_size": 16, "ffn_hidden_size": 32, "num_layers": 1, "num_attention_heads": 2}
        architecture = Architecture(
            **shape, num_query_groups=2, vocab_size=8, max_position_embeddings=8, rope=RopeSettings(rope_theta=1e4)
        )
        settings = ModelSettings(layout, sequence_parallel, torch.bfloat16, fp8="hybrid")
        config = transformer_config(architecture, settings)
        options: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "skip_bias_add": True}
        up: Any = Fp8ColumnParallelLinear(16, 32, gather_output=False, **options)
        down: Any = Fp8RowParallelLinear(32, 16, input_is_parallel=True, **options)
        generator = torch.Generator().manual_seed(7)
        rank = parallel_state.get_tensor_model_parallel_rank()

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).bfloat16()

        mark_tensor_parallel(torch.nn.ModuleList([up, down]))
        with torch.no_grad():
            up.weight.copy_(normal(32, 16).chunk(tensor_parallel)[rank])
            down.weight.copy_(normal(16, 32).chunk(tensor_parallel, 1)[rank])
        outputs = []
        for _ in range(2):
            whole, grad = normal(6, 2, 16), normal(6, 2, 16)
            local = whole.chunk(tensor_parallel)[rank] if sequence_parallel else whole
            out = down(up(local.requires_grad_())[0])[0]
            if sequence_parallel:
                out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
            out.backward(grad)
            outputs.append(out.detach())
            refresh_scales([up, down])
        marks = [(layer.weight.tensor_model_parallel, layer.weight.partition_dim) for layer in (up, down)]
        return {"outputs": outputs, "marks": marks, "scales": [layer.scaling.scales.tolist() for layer in (up, down)]}
    finally:
        distributed.clear_grid()


def fp8_lora_layer(place: str, target_modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """One layer under emulated FP8 (tensorwise) with adapters, in one process, on inputs drawn at random.

    Returns:
        input, grad, weight, output, and of each adapter `A.NAME` and `B.NAME`; gradients as `d NAME`. `merged` is the
        weight with adapters. Bf16, `merged` float32.
    """
    distributed.start(torch.device("cpu"))
    from megatron.core.transformer.spec_utils import build_module

    from megalong.config.architecture import Architecture
    from megalong.config.lora import Lora
    from megalong.model.backend import backend_of
    from megalong.model.config import ModelSettings, transformer_config
    from megalong.model.lora import with_adapters

    distributed.set_grid(Grid())
    try:
        architecture = Architecture(
            hidden_size=16, ffn_hidden_size=32, num_layers=1, num_attention_heads=4, num_query_groups=2, kv_channels=4,
            vocab_size=8, max_position_embeddings=8, rope=RopeSettings(rope_theta=1e4),
        )  # fmt: skip
        lora = Lora(rank=3, alpha=6.0, target_modules=target_modules)  # type: ignore[arg-type]
        config = transformer_config(
            architecture,
            ModelSettings(params_dtype=torch.bfloat16, fp8="hybrid", fp8_recipe="tensorwise", lora=lora),
        )
        backend = backend_of(config)
        options: dict[str, Any] = {"config": config, "init_method": None, "bias": False, "skip_bias_add": True}
        if place in ("linear_qkv", "linear_fc1"):
            base, options = backend.column, {**options, "gather_output": False}
            sizes = (16, 32) if place == "linear_qkv" else (16, 64)
        else:
            base, options = backend.row, {**options, "input_is_parallel": True}
            sizes = (16, 16) if place == "linear_proj" else (32, 16)
        layer: Any = build_module(with_adapters(base, place, config), *sizes, **options)
        assert isinstance(layer, base)
        torch.manual_seed(5)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.normal_(std=0.3)
        layer.weight.requires_grad_(False)
        input = torch.randn(6, 2, sizes[0]).bfloat16().requires_grad_()
        output = layer(input)[0]
        grad = torch.randn_like(output)
        output.backward(grad)
        assert input.grad is not None
        found = {"input": input, "grad": grad, "weight": layer.weight, "output": output, "d input": input.grad}
        for letter, table in (("A", layer.lora_A), ("B", layer.lora_B)):
            for name, parameter in table.items():
                found |= {f"{letter}.{name}": parameter, f"d {letter}.{name}": parameter.grad}
        return {name: tensor.detach() for name, tensor in found.items()} | {"merged": layer.merged()}
    finally:
        distributed.clear_grid()


def fake_step(tokens: int, vocabulary: int) -> dict[str, Any]:
    """Forward and backward of one Llama 8B layer over `tokens` fake tokens: what shapes and types there were."""
    distributed.start(torch.device("cpu"))
    from torch._subclasses.fake_tensor import FakeTensorMode

    from megalong.attention.layout import TokenLayout
    from megalong.config.architecture import Architecture
    from megalong.model import swiglu
    from megalong.model.attention_inputs import AttentionInputs
    from megalong.model.config import ModelSettings, transformer_config
    from megalong.model.llama import LlamaModel
    from megalong.rope import rotary
    from tests.batches.whole import shard_samples

    architecture = Architecture(
        num_layers=1, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8,
        kv_channels=128, vocab_size=vocabulary, max_position_embeddings=tokens, norm_epsilon=1e-5,
        tie_word_embeddings=False, rope=RopeSettings(rope_theta=500000.0),
    )  # fmt: skip
    distributed.set_grid(Grid())
    # Tiles keep real temporaries in the cache; here they would only be thousands of calls.
    whole = patch.multiple(rotary, CPU_TILE_ELEMENTS=1 << 62), patch.multiple(swiglu, TILE_ELEMENTS={"cpu": 1 << 62})
    try:
        with whole[0], whole[1], FakeTensorMode(allow_non_fake_inputs=True), _Watch() as watch:
            model = LlamaModel(
                transformer_config(architecture, ModelSettings(params_dtype=torch.bfloat16)), architecture
            )
            batch = shard_samples(torch.zeros(1, tokens + 1, dtype=torch.int64), TokenLayout(), 0)
            losses: Any = model(batch.tokens, batch.labels, AttentionInputs.of(batch))
            (losses * batch.loss_mask).sum().backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        return {
            "largest": watch.largest,
            "losses": tuple(losses.shape),
            "without gradient": missing,
            "narrow integers": watch.narrow,
        }
    finally:
        distributed.clear_grid()


class _Watch(TorchDispatchMode):
    """Sees every operation: the most elements a tensor has, and which operations make integers below int64."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.narrow: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.dtype in (torch.int8, torch.int16, torch.int32):
                    self.narrow[str(func)] = str(tensor.dtype)
        return out


def given_shard(context_rank: int) -> list[np.ndarray]:
    """Tokens, positions and loss mask of one of two context-parallel ranks; the first row skips 100 positions."""
    distributed.start(torch.device("cpu"))
    from megalong.attention.layout import TokenLayout
    from tests.batches.whole import shard_samples

    samples = torch.arange(9).repeat(2, 1)
    positions = torch.arange(8).repeat(2, 1)
    positions[0, 4:] += 100
    targets = torch.zeros(2, 9, dtype=torch.bool)
    targets[0, 3:5] = targets[1, 8] = True
    batch = shard_samples(samples, TokenLayout(2, "zigzag"), context_rank, positions=positions, targets=targets)
    return [batch.tokens.numpy(), batch.positions.numpy(), batch.loss_mask.numpy()]


def padded_shard(tokens: int, ranks: int) -> dict[str, Any]:
    """Every rank's share of one masked sample of `tokens` tokens, and how often its angles were computed."""
    distributed.start(torch.device("cpu"))
    from megalong.attention.layout import TokenLayout
    from megalong.model import attention_inputs
    from tests.batches.whole import shard_samples

    samples, starts = torch.arange(tokens + 1)[None], np.array([0], np.int64)
    shards = [shard_samples(samples, TokenLayout(ranks), rank, documents=[starts]) for rank in range(ranks)]
    inputs = attention_inputs.AttentionInputs.of(shards[0])
    with patch.object(attention_inputs, "cos_sin", wraps=attention_inputs.cos_sin) as made:
        for _ in range(3):  # a layer each, with a tensor of its own
            inputs.rotary(torch.ones(4))
    return {
        "counted": sum(float(shard.loss_mask.sum()) for shard in shards),
        "positions": max(int(shard.positions.max()) for shard in shards),
        "lengths": {shard.tokens.shape[1] for shard in shards},
        "made": made.call_count,
    }


def adam() -> str:
    """The class of Megatron-Core's Adam on this machine."""
    distributed.start(torch.device("cpu"))
    from megatron.core import optimizer

    return str(optimizer.Adam.__name__)
