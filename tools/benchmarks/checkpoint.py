"""Saving and loading against the disk's own rate, and how long a step waits for an asynchronous save.

Two data-parallel ranks hold a small Llama in bf16 with its optimizer's state, and save it as a run does by default. In
each turn they save it synchronously, save it in the background, and write as many bytes to plain files, half each,
synced. Then they load it (with checksums) and read the same files, neither from the page cache. Seconds are those of
the slower rank. The first asynchronous save allocates memory that later ones reuse: the table shows it separately, with
the amount of memory. For comparison the table shows Megatron-Core's own code for a state that any layout can load; it
gathers the optimizer's state before it copies or writes anything.

Finally `megalong train --nproc 2` restarts the run from its last checkpoint. The time is measured from the command to
the end of the first step, minus the duration of the second step; loading is shown separately.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from benchmarks import Report

RANKS, TURNS = 2, 5
BLOCK = 1 << 24
SEQUENCE = 8  # so that a step takes little time: bf16 is slow on CPUs
HIDDEN, LAYERS, VOCABULARY = 1024, 10, 16384


def run() -> Report:
    """Measure in RANKS processes."""
    with tempfile.TemporaryDirectory() as name:
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        processes = [context.Process(target=_rank, args=(rank, port, name, results)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed")
        size, seconds, memory = results.get()
        restart, loading = _restart(Path(name))
    median = {what: statistics.median(many) for what, many in seconds.items()}
    figures = {
        "async_pause_share": round(median["pause"] / median["save"], 4),
        "save_share_of_disk": round(median["write"] / median["save"], 3),
        "load_share_of_disk": round(median["read"] / median["load"], 3),
        "restart_s": round(restart - loading, 1),
        "pause_share_of_gather": round(median["pause"] / median["gather"], 4),
        "save_memory_share": round(memory["first pause"] / size, 3),
        "gather_memory_share": round(memory["gather"] / size, 3),
    }
    line = f"restart: {restart:.1f} s to the beginning of the first step, {loading:.1f} s of it loading"
    return Report(figures, f"{_table(size, seconds)}\n\n{line}\n\n{_lines(figures)}")


def _lines(figures: dict[str, float]) -> str:
    return "\n".join(f"{name} {value}" for name, value in figures.items())


def _table(size: int, seconds: dict[str, list[float]]) -> str:
    names = {
        "save": "synchronous save",
        "pause": "background save: pause",
        "first pause": "first background save: pause",
        "whole": "background save: in total",
        "gather": "Megatron-Core's gather: pause",
        "write": "plain write and fsync",
        "load": "load and check",
        "read": "plain read",
    }
    lines = [
        f"{size / 1e6:,.0f} MB by {RANKS} ranks, {TURNS} turns; {os.cpu_count()} cores, load average "
        f"{os.getloadavg()[0]:.1f} at the end",
        "",
        f"{'':32}{'s':>8}{'range':>14}{'MB/s':>8}",
    ]
    for what, name in names.items():
        many = sorted(seconds[what])
        middle = statistics.median(many)
        lines.append(f"{name:32}{middle:8.2f}{f'{many[0]:.2f}-{many[-1]:.2f}':>14}{size / 1e6 / middle:8.0f}")
    return "\n".join(lines)


def _restart(folder: Path) -> tuple[float, float]:
    """Seconds from the command to the beginning of the first step (its end, less a step), and those of loading."""
    command = [sys.executable, "-m", "megalong", "train", str(folder / "run.yaml"), "--nproc", str(RANKS)]
    command.append("logging.log_interval=1")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    loading, ends = 0.0, [time.perf_counter()]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if found := re.search(r"resumed from .* in ([0-9.]+) s", line):
                loading = float(found[1])
            if re.search(r"\bstep \d+/", line):
                ends.append(time.perf_counter())
            if len(ends) == 3:
                process.kill()
                return 2 * ends[1] - ends[0] - ends[2], loading
    raise RuntimeError("the run did not start again")


def _rank(rank: int, port: int, name: str, results: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    from megalong.runtime import distributed

    torch.set_num_threads(1)
    distributed.start(torch.device("cpu"))
    try:
        measured = _measure(Path(name))
    finally:
        distributed.stop()
    if rank == 0:
        results.put(measured)


def _measure(folder: Path) -> tuple[int, dict[str, list[float]], dict[str, int]]:
    """Bytes of the checkpoint; then, by action, the seconds and the bytes of memory on all ranks."""
    import torch

    from megalong.checkpoint import store
    from megalong.checkpoint.folder import read_meta, whole_checkpoints
    from megalong.checkpoint.saver import Saver
    from megalong.checkpoint.verification import Verification
    from megalong.training import setup

    session = setup.set_up(_config(folder), torch.device("cpu"))
    for chunk in session.chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    session.optimizer.step()  # so that there is a state
    waits = session.config.checkpoint.model_copy(update={"async_save": False})
    savers = {"save": Saver(folder / "run", waits), "pause": session.saver}
    seconds: dict[str, list[float]] = {
        one: [] for one in ("save", "pause", "first pause", "whole", "gather", "write", "load", "read")
    }
    memory: dict[str, int] = {}

    def save(what: str) -> float:
        session.step += 1
        session.saver = savers[what]
        return _slowest(lambda: setup.save(session))

    def finish() -> None:
        saved = session.saver.finish()
        assert saved is not None
        assert saved.failure is None

    def gather() -> None:
        model = store._model_state(session.chunks)
        session.optimizer.sharded_state_dict(model, metadata={"distrib_optim_sharding_type": "fully_reshardable"})

    memory["first pause"] = _memory(lambda: seconds["first pause"].append(save("pause")))
    finish()
    memory["gather"] = _memory(lambda: seconds["gather"].append(_slowest(gather)))
    for _ in range(TURNS):
        seconds["save"].append(save("save"))
        finish()
        pause = save("pause")
        seconds["pause"].append(pause)
        seconds["whole"].append(pause + _slowest(finish))
        (checkpoint,) = whole_checkpoints(folder / "run")
        files = sorted(path for path in checkpoint.iterdir() if path.is_file())
        size = sum(path.stat().st_size for path in files)
        seconds["write"].append(_slowest(lambda: _write(folder, size // RANKS)))  # noqa: B023
        meta = read_meta(checkpoint)

        def load() -> None:
            checked = Verification(checkpoint)  # noqa: B023
            store.load_training(checkpoint, session.chunks, session.optimizer, session.scheduler, meta, checked)  # noqa: B023

        _forget(files)
        seconds["load"].append(_slowest(load))
        _forget(files)
        seconds["read"].append(_slowest(lambda: _read(files)))  # noqa: B023
    return size, seconds, memory


def _memory(work: Callable[[], Any]) -> int:
    """The peak increase in bytes of the memory of all ranks during `work`."""
    import torch
    import torch.distributed as dist

    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _resident("VmRSS")
    work()
    risen = torch.tensor([_resident("VmHWM") - before])
    dist.all_reduce(risen)
    return int(risen)


def _resident(what: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at the peak (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024


def _slowest(work: Callable[[], Any]) -> float:
    """Seconds of the slowest rank."""
    import torch
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    work()
    taken = torch.tensor([time.perf_counter() - started])
    dist.all_reduce(taken, dist.ReduceOp.MAX)
    return float(taken)


def _write(folder: Path, size: int) -> None:
    """Write `size` bytes of this rank to a file and sync it."""
    path, block = folder / f"plain-{os.environ['RANK']}", os.urandom(BLOCK)
    with path.open("wb", buffering=0) as file:
        for begin in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - begin)])
        os.fsync(file.fileno())
    path.unlink()


def _read(files: list[Path]) -> None:
    """Read this rank's share of `files`."""
    mine: list[Path] = []
    for place, path in enumerate(sorted(files, key=lambda one: -one.stat().st_size)):
        if place % RANKS == int(os.environ["RANK"]):
            mine.append(path)
    block = bytearray(BLOCK)
    for path in mine:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def _forget(files: list[Path]) -> None:
    """Ask the system to drop `files` from its page cache."""
    for path in files:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _config(folder: Path) -> Any:
    import numpy as np

    from megalong.config.schema import Config
    from megalong.data.indexed_writer import IndexedDatasetWriter

    if os.environ["RANK"] == "0":
        with IndexedDatasetWriter(folder / "data", np.uint16) as writer:
            writer.add_document(np.zeros(4096, np.uint16))
            writer.finish()
    import torch.distributed as dist

    dist.barrier()
    tree = {
        "run": {"name": "checkpoint", "dir": str(folder / "run")},
        "model": {"architecture": _architecture()},
        "data": {"seq_length": SEQUENCE, "mixture": [{"name": "a", "path": str(folder / "data"), "weight": 1.0}]},
        "optimizer": {"lr": 1e-4, "lr_schedule": "constant"},
        "training": {"train_iters": 100, "global_batch_size": RANKS},
        "checkpoint": {"keep_last": 1},
    }
    if os.environ["RANK"] == "0":
        (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return Config.model_validate(tree)


def _architecture() -> dict[str, Any]:
    return {
        "num_layers": LAYERS,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 3 * HIDDEN,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": HIDDEN // 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": SEQUENCE,
        "rope": {"rope_theta": 10000.0},
    }
