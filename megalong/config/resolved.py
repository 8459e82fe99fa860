"""A configuration for one model, one machine and one number of processes: every `auto` is decided here, once.

Training, the checks before it and every report about a run use this result. It is written to `RUN/resolved.json`,
beside `config.yaml`. Needs no torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megalong.config.architecture import Architecture
from megalong.config.attention_checks import ENGINE, Machine, attention_backend
from megalong.config.exchange import Exchange, choose_exchange
from megalong.config.schema import Config
from megalong.runtime.folders import file_aside
from megalong.runtime.grid import Grid

FILE = "resolved.json"


@dataclass(frozen=True)
class Resolved:
    """A configuration without `auto`.

    Attributes:
        world: number of processes.
        grid: how they share the model; its `heads` are the exchange's.
        exchange: how context-parallel ranks share attention, and why.
        backend: of attention, torch or transformer_engine.
        token_layout: which tokens each context-parallel rank has.
        padded_length: tokens of a sample, padding included.
        replicas: data-parallel size.
        micro_batches: per rank and step.
    """

    world: int
    grid: Grid
    exchange: Exchange
    backend: str
    token_layout: str
    padded_length: int
    replicas: int
    micro_batches: int


def resolve(config: Config, architecture: Architecture, machine: Machine, world: int) -> Resolved:
    """Decide every `auto` of `config`.

    Args:
        architecture: of the model as it is trained.
        machine: of the processes.
        world: number of processes.

    Raises:
        UserError: `world` is not a whole number of replicas, or the model's heads cannot be shared as configured.
    """
    exchange, training = exchange_of(config, architecture), config.training
    replicas = config.data_parallel_size(world)
    return Resolved(
        world=world,
        grid=replace(config.grid, heads=exchange.heads_size),
        exchange=exchange,
        backend=attention_backend(config, machine),
        token_layout=config.token_layout,
        padded_length=padded_length(config),
        replicas=replicas,
        micro_batches=training.global_batch_size // (training.micro_batch_size * replicas),
    )


def dump(resolved: Resolved, run: Path) -> None:
    """Write `RUN/resolved.json`."""
    with file_aside(run / FILE) as aside:
        aside.write_text(json.dumps(asdict(resolved), indent=2) + "\n", encoding="utf-8")


def exchange_of(config: Config, architecture: Architecture) -> Exchange:
    """How context-parallel ranks share attention; the machine and the number of replicas do not matter.

    Raises:
        UserError: the model's heads cannot be shared as configured.
    """
    attention, grid = config.attention, config.grid
    return choose_exchange(
        attention.exchange,
        attention.ulysses_size,
        grid.context,
        config.data.seq_length // grid.context,
        architecture.num_attention_heads // grid.tensor,
        architecture.num_query_groups // grid.tensor,
        copies_keys=attention.backend != ENGINE,
    )


def padded_length(config: Config) -> int:
    """`data.seq_length`, rounded up to what context parallelism, sequence parallelism and FP8 divide evenly."""
    return padded(config.data.seq_length, layout_multiple(config.grid.context), config.length_multiple)


def padded(length: int, *multiples: int) -> int:
    """`length` rounded up to a multiple of all of `multiples`."""
    whole = math.lcm(*multiples)
    return -(-length // whole) * whole


def layout_multiple(ranks: int) -> int:
    """A sequence on `ranks` context-parallel ranks must be a multiple of this: each rank has two equal chunks."""
    return 1 if ranks == 1 else 2 * ranks
