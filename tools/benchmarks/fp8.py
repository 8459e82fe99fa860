"""The effect of FP8 on a training curve, without a GPU: bf16 against emulated FP8, 200 steps of a small Llama.

The runs differ only in `precision`: `megalong train` trains the same random weights on the same bytes of this Python's
library sources in the same order. The noise of a batch is the same in all runs, so the ratio of losses, averaged over
the last 20 steps, shows the effect of rounding. The plot shows the curves, and below them the difference of each from
bf16 at every step.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import Report

STEPS, LAST, SEQUENCE, BATCH = 200, 20, 256, 4
DOCUMENT, DOCUMENTS = 4096, 400  # bytes
PICTURE = Path("fp8-loss.png")
PRECISION: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8 linears": {"fp8": "hybrid"},
    "fp8 linears and attention": {"fp8": "hybrid", "fp8_dot_product_attention": True},
}
COLOURS = {"bf16": "#000000", "fp8 linears": "#0072B2", "fp8 linears and attention": "#D55E00"}
Curves = dict[str, np.ndarray]


def run() -> Report:
    """Train; write `fp8-loss.png` in the current folder. The figures are losses of FP8 over those of bf16."""
    with tempfile.TemporaryDirectory() as folder:
        data = _write_bytes(Path(folder) / "sources")
        # One thread each and all at once, so that no core is idle during serial parts.
        with ThreadPoolExecutor(len(PRECISION)) as runs:
            curves = dict(
                zip(PRECISION, runs.map(lambda name: _train(Path(folder), data, name), PRECISION), strict=True)
            )
    _draw(curves, PICTURE)
    ends = {name: float(curve[-LAST:].mean()) for name, curve in curves.items()}
    figures = {
        "loss_ratio": round(ends["fp8 linears"] / ends["bf16"], 5),
        "loss_ratio_attention": round(ends["fp8 linears and attention"] / ends["bf16"], 5),
        "bf16_first_loss": round(float(curves["bf16"][0]), 4),
        "bf16_last_loss": round(ends["bf16"], 4),
    }
    return Report(figures, _table(curves, ends))


def _write_bytes(prefix: Path) -> Path:
    """An indexed dataset whose tokens are the bytes of Python's library sources."""
    from megalong.data.indexed_writer import IndexedDatasetWriter

    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [path for path in sorted(library.glob("*.py")) if path.stat().st_size > DOCUMENT]
    with IndexedDatasetWriter(prefix, np.uint16) as writer:
        for index in range(DOCUMENTS):
            content = sources[index % len(sources)].read_bytes()
            begin = index // len(sources) * DOCUMENT
            part = content[begin : begin + DOCUMENT]
            if part:
                writer.add_document(np.frombuffer(part, np.uint8).astype(np.uint16))
        writer.finish()
    return prefix


def _train(folder: Path, data: Path, name: str) -> np.ndarray:
    """The loss of every step."""
    run = folder / name.replace(" ", "-")
    config = run.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(_settings(run, data, PRECISION[name])))
    command = [sys.executable, "-m", "megalong", "train", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    losses = [float(loss) for loss in re.findall(r"\| loss ([\d.]+) \|", (run / "log.txt").read_text())]
    assert len(losses) == STEPS
    return np.array(losses)


def _settings(run: Path, data: Path, precision: dict[str, Any]) -> dict[str, Any]:
    return {
        "run": {"name": "fp8", "dir": str(run)},
        "model": {
            "architecture": {
                "hidden_size": 128,
                "ffn_hidden_size": 384,
                "num_layers": 4,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": 256,
                "max_position_embeddings": SEQUENCE,
                "rope": {"rope_theta": 10000.0},
            }
        },
        "data": {"seq_length": SEQUENCE, "mixture": [{"name": "python", "path": str(data), "weight": 1.0}]},
        "precision": {"params_dtype": "bf16", **precision},
        # bf16 is stable at this rate. At 1e-3 its curve jumps, and FP8, whose noise damps that, ends 2 % lower.
        "optimizer": {"lr": 4e-4, "min_lr": 4e-5, "warmup_iters": 20},
        "training": {"train_iters": STEPS, "micro_batch_size": BATCH, "global_batch_size": BATCH},
        "checkpoint": {"save_interval": STEPS},
        "logging": {"tensorboard": False, "position_buckets": False},
    }


def _draw(curves: Curves, path: Path) -> None:
    figure = Figure(figsize=(8, 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    steps = np.arange(1, STEPS + 1)
    for name, curve in curves.items():
        style = "-" if name == "bf16" else "--"
        above.plot(steps, curve, style, color=COLOURS[name], linewidth=1.5, label=name)
        if name != "bf16":
            below.plot(steps, 100 * (curve / curves["bf16"] - 1), color=COLOURS[name], linewidth=1.2, label=name)
    above.set_ylabel("loss (nats per byte)")
    above.set_title("bf16 and emulated FP8 (e4m3 forward, e5m2 backward, delayed scaling)")
    above.legend()
    below.axhspan(-1, 1, color="0.9", zorder=0, label="within 1 %")
    below.set_ylabel("loss against bf16 (%)")
    below.set_xlabel("step")
    below.legend(loc="upper right", fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path)


def _table(curves: Curves, ends: dict[str, float]) -> str:
    lines = [
        f"{STEPS} steps of {BATCH} x {SEQUENCE} bytes of Python sources, 4 layers of 128 channels, FP8 emulated on CPU",
        "",
        f"                            first   last {LAST}   against bf16   furthest after step {LAST}",
    ]
    for name, curve in curves.items():
        apart = np.abs(curve / curves["bf16"] - 1)[LAST:].max()
        lines.append(
            f"{name:<26} {curve[0]:7.4f}  {ends[name]:7.4f}      {ends[name] / ends['bf16'] - 1:+8.2%}   {apart:8.2%}"
        )
    return "\n".join([*lines, "", f"curves: {PICTURE}"])
