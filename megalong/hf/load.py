"""Fill a rank's parameters from a Hugging Face folder, in place.

Each rank reads only the rows and columns that it owns, one piece at a time, so the extra memory is one piece for any
model size. `copy_` casts to the parameter's dtype and moves to its device. Afterwards every parameter of the module has
been filled exactly once, and the rows that pad the vocabulary are zero.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from megalong.config.architecture import Architecture
from megalong.config.lora import is_adapter
from megalong.errors import UserError
from megalong.hf.weight_map import LocalParameter, Piece, layer_parameter_names, local_layer, local_parameter
from megalong.runtime.distributed import grid, place


class WeightSource(Protocol):
    """Where weights come from: `HFReader` or `RandomWeights`."""

    @property
    def folder(self) -> Path | str:
        """Its name in messages."""

    def read(self, name: str, dim: int = 0, start: int = 0, length: int | None = None) -> torch.Tensor:
        """`length` rows (`dim` 0) or columns (`dim` 1) of the Hugging Face tensor `name` from `start` on."""


def fill(chunks: Sequence[nn.Module], source: WeightSource, architecture: Architecture) -> None:
    """Fill this rank's part of a model from `source`, under any TP × PP × CP.

    Args:
        chunks: as `model.build.build_model` returns them.

    Raises:
        UserError: see `load_into`.
    """
    tensor, ranks = place().tensor, grid().tensor
    for chunk in chunks:
        load_into(chunk, source, architecture, tensor, ranks, chunk.first_layer)  # type: ignore[arg-type]


def load_into(
    module: nn.Module | Mapping[str, torch.Tensor],
    source: WeightSource,
    architecture: Architecture,
    tp_rank: int = 0,
    tp_size: int = 1,
    layer_offset: int = 0,
) -> None:
    """Fill every parameter of `module` (or of a mapping name → tensor) from `source`, but no adapters.

    `module` is one pipeline chunk without wrappers; its parameters have the names of megalong.hf.weight_map.
    `layer_offset` is the number of layers before it. Raises UserError if the source does not fit `architecture` or
    `tp_size` does not divide it, RuntimeError if the module's parameters are not those of this Llama.
    """
    named = module.named_parameters() if isinstance(module, nn.Module) else module.items()
    parameters = {name: parameter for name, parameter in named if not is_adapter(name)}
    layouts = {name: local_parameter(name, architecture, tp_rank, tp_size, layer_offset) for name in parameters}
    _check_parameters(parameters, layouts, architecture, layer_offset)
    with torch.no_grad():
        for name, layout in layouts.items():
            _fill(parameters[name], layout, source)


def _fill(parameter: torch.Tensor, layout: LocalParameter, source: WeightSource) -> None:
    """Copy the pieces; zero the parameter first if they do not cover it (vocabulary padding)."""
    if sum(piece.length for piece in layout.pieces) < _extent(layout):
        parameter.zero_()
    for piece in layout.pieces:
        _copy(parameter, piece, source)


def _copy(parameter: torch.Tensor, piece: Piece, source: WeightSource) -> None:
    """Read one piece and put it where it belongs."""
    values = source.read(piece.tensor, piece.dim, piece.hf_start, piece.length)
    target = parameter.narrow(piece.dim, piece.local_start, piece.length)
    if values.shape != target.shape:
        raise UserError(
            f"{source.folder}: tensor {piece.tensor} gives {list(values.shape)}, but {list(target.shape)} is needed; "
            "use config.json and weights of the same release"
        )
    target.copy_(values)


def _extent(layout: LocalParameter) -> int:
    """Rows or columns of the parameter, along the dimension its pieces run in."""
    return layout.shape[layout.pieces[0].dim] if layout.pieces else layout.shape[0]


def _check_parameters(
    parameters: Mapping[str, torch.Tensor],
    layouts: Mapping[str, LocalParameter],
    architecture: Architecture,
    layer_offset: int,
) -> None:
    """Check that shapes match, that every layer has all six parameters and that no layer is past the last."""
    for name, layout in layouts.items():
        if tuple(parameters[name].shape) != layout.shape:
            raise RuntimeError(f"{name} has shape {list(parameters[name].shape)}, its layout {list(layout.shape)}")
    layers = {layer for layer in map(local_layer, parameters) if layer is not None}
    if layers and max(layers) + layer_offset >= architecture.num_layers:
        raise RuntimeError(f"layer {max(layers)} + offset {layer_offset} is past the last of {architecture.num_layers}")
    for layer in layers:
        missing = [name for name in layer_parameter_names(layer) if name not in parameters]
        if missing:
            raise RuntimeError(f"the module lacks {missing[0]}: its layers are not those of megalong.hf.weight_map")
