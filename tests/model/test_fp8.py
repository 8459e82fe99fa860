"""Linear layers with FP8 operands against the same products of operands rounded by hand, and over two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.pool import WorkerPool

LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
OPERANDS = "tests.model.workers:fp8_linears"


def by_hand(tensor: torch.Tensor, dtype: torch.dtype, amax: float) -> torch.Tensor:
    """Rounded with the scale of `amax`, in float64."""
    scale = torch.tensor(LIMITS[dtype]) / torch.tensor(amax)
    return (tensor.float() * scale).clamp(-LIMITS[dtype], LIMITS[dtype]).to(dtype).double() / scale.double()


def magnitudes(*tensors: torch.Tensor) -> list[float]:
    return [float(tensor.detach().abs().max()) for tensor in tensors]


@pytest.mark.parametrize("name", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise"])
def test_products_of_rounded_operands(recipe: str, name: str) -> None:
    """Delayed: the second step has the scales of the first, whose own scale was 1."""
    from megalong.attention.fp8 import FORMATS
    from megalong.model.fp8 import DelayedScaling, TensorwiseScaling, fp8_linear

    formats = FORMATS[name]
    scaling: Any = DelayedScaling(formats) if recipe == "delayed" else TensorwiseScaling(formats)
    generator = torch.Generator().manual_seed(3)
    before = [1.0 * LIMITS[t] for t in (formats.forward, formats.forward, formats.backward)]  # a scale of 1
    for step in range(3):
        size = 10.0**step
        input = (size * torch.randn(5, 3, 16, generator=generator)).bfloat16().requires_grad_()
        weight = (0.02 * torch.randn(24, 16, generator=generator)).bfloat16().requires_grad_()
        grad = (1e-3 * size * torch.randn(5, 3, 24, generator=generator)).bfloat16()
        out = fp8_linear(input, weight, scaling)
        gradients = torch.autograd.grad(out, (input, weight), grad)
        seen = magnitudes(input, weight, grad)
        amax = before if recipe == "delayed" else seen
        x, w = (by_hand(t.detach(), formats.forward, a) for t, a in zip((input, weight), amax[:2], strict=True))
        g = by_hand(grad, formats.backward, amax[2])
        truth = (x @ w.t(), g @ w, torch.einsum("sbn,sbk->nk", g, x))
        for ours, theirs in zip((out, *gradients), truth, strict=True):
            assert ours.dtype == torch.bfloat16
            torch.testing.assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-6 * float(theirs.abs().max()))
        if recipe == "delayed":
            scaling.refresh()
            before = seen


def test_scales_change_only_between_steps_and_only_while_learning() -> None:
    from megalong.attention.fp8 import FORMATS
    from megalong.model.fp8 import DelayedScaling, fp8_linear

    scaling = DelayedScaling(FORMATS["hybrid"])
    input, weight = torch.full((2, 4), 2.0), torch.full((3, 4), 7.0)
    first = fp8_linear(input, weight, scaling)
    assert torch.equal(fp8_linear(input, weight, scaling), first)  # as recomputation does
    scaling.refresh()
    assert scaling.scales.tolist() == [224, 64, 1]  # no gradient was seen
    scaling.observed = False
    fp8_linear(1000 * input, weight, scaling)
    scaling.refresh()
    assert scaling.scales.tolist() == [224, 64, 1]


def test_a_dropped_step_leaves_the_scales_as_they_were() -> None:
    from megalong.attention.fp8 import FORMATS
    from megalong.model.fp8 import DelayedScaling

    scaling = DelayedScaling(FORMATS["hybrid"])
    for largest, dropped in ((3.0, False), (700.0, True)):
        scaling.scale(0, torch.tensor([largest]), FORMATS["hybrid"].forward)
        if dropped:
            scaling.forget()
        scaling.refresh()
    assert scaling.scales[0] == torch.finfo(FORMATS["hybrid"].forward).max / 3


# The rows of each module in a fused layer of two query groups of two heads of four channels, and 32 MLP channels.
ROWS: dict[str, dict[str, list[int]]] = {
    "linear_qkv": {"q_proj": [*range(8), *range(16, 24)], "v_proj": [*range(12, 16), *range(28, 32)]},
    "linear_proj": {"o_proj": list(range(16))},
    "linear_fc1": {"gate_proj": list(range(32)), "up_proj": list(range(32, 64))},
    "linear_fc2": {"down_proj": list(range(16))},
}


@pytest.mark.parametrize("place", ROWS)
def test_adapters_beside_a_rounded_product_are_not_rounded(place: str, pool: WorkerPool) -> None:
    (found,) = pool.run(1, "tests.model.workers:fp8_lora_layer", place, tuple(ROWS[place]))
    scale = 6.0 / 3
    input, weight = (by_hand(found[n], torch.float8_e4m3fn, *magnitudes(found[n])) for n in ("input", "weight"))
    rounded = by_hand(found["grad"], torch.float8_e5m2, *magnitudes(found["grad"]))
    x, grad = found["input"].double().requires_grad_(), found["grad"].double()
    merged = found["weight"].float()
    output, truth = input @ weight.t(), {"d input": rounded @ weight}
    for name, rows in ROWS[place].items():
        a, b = (found[f"{letter}.{name}"].double().requires_grad_() for letter in "AB")
        update = scale * (x @ a.t() @ b.t())
        output[..., rows] += update.detach()
        d_x, truth[f"d A.{name}"], truth[f"d B.{name}"] = torch.autograd.grad(update, (x, a, b), grad[..., rows])
        truth["d input"] += d_x
        merged[rows] += (scale * (b @ a)).float().detach()
    for name, theirs in {**truth, "output": output}.items():
        torch.testing.assert_close(found[name].double(), theirs, rtol=2**-6, atol=2**-6 * float(theirs.abs().max()))
    torch.testing.assert_close(found["merged"], merged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_delayed_scales_are_those_of_one_process(sequence_parallel: bool, pool: WorkerPool) -> None:
    """Two tensor-parallel ranks hold halves of the weights, and end with the scales and results of the whole."""
    (one,) = pool.run(1, OPERANDS, 1, False)
    for rank in pool.run(2, OPERANDS, 2, sequence_parallel):
        assert rank["scales"] == one["scales"]
        assert rank["marks"] == [(True, 0), (True, 1)]  # else the gradient norm would count one rank's part only
        assert all(scale != 1 for layer in one["scales"] for scale in layer)
        # The same rounded operands; sums over two ranks are of two bf16 numbers.
        for ours, whole in zip(rank["outputs"], one["outputs"], strict=True):
            torch.testing.assert_close(ours, whole, rtol=2**-6, atol=2**-6 * float(whole.abs().max()))
