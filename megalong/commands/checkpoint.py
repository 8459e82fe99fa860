"""`megalong checkpoint …`, and `import-hf` and `export-hf`, which are other names for two of its commands."""

import argparse
from typing import Any

from megalong.commands.parsing import add_dtype, command, group, step


def add_checkpoint(commands: Any) -> None:
    family = group(commands, "checkpoint", "import, export and verify checkpoints")
    add_import(family, "import")
    add_export(family, "export")
    verify = command(family, "verify", "read checkpoints and report damage", _run_verify)
    verify.add_argument("folder", metavar="DIR", help="a run's folder (all its steps), or one step's")


def _run_verify(options: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from megalong.checkpoint.folder import find_checkpoint, read_meta, verify, whole_checkpoints

    run = Path(options.folder)
    damaged = False
    for step_folder in whole_checkpoints(run) or [find_checkpoint(run)]:
        lines = verify(step_folder)
        damaged = damaged or bool(lines)
        for line in lines:
            print(line, file=sys.stderr)
        if lines:
            continue
        if read_meta(step_folder).checksums:
            print(f"{step_folder}: as written")
        else:
            print(f"{step_folder}: no checksums (written by an earlier version); its files have the recorded sizes")
    return 2 if damaged else 0


def add_import(commands: Any, name: str) -> None:
    parser = command(commands, name, "convert a Hugging Face folder to a checkpoint for any layout", _run_import)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder of a Llama")
    parser.add_argument("--output", required=True, metavar="CKPT", help="folder to write")


def _run_import(options: argparse.Namespace) -> int:
    from megalong.hf.convert import import_hf

    import_hf(hf=options.hf, output=options.output)
    return 0


def add_export(commands: Any, name: str) -> None:
    parser = command(commands, name, "convert a checkpoint to a Hugging Face folder", _run_export)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    parser.add_argument("--step", type=step, metavar="N", help="step of the run (default: the last)")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    add_dtype(parser, "type of the weights")
    parser.add_argument("--adapter", action="store_true", help="only the adapters, in peft's format, not merged")
    parser.add_argument(
        "--base", metavar="NAME", help="base model for --adapter (default: the model that the run started from)"
    )


def _run_export(options: argparse.Namespace) -> int:
    from megalong.hf.convert import export_adapter, export_hf

    where = {"checkpoint": options.checkpoint, "step": options.step, "output": options.output, "dtype": options.dtype}
    if options.adapter:
        export_adapter(**where, base=options.base)
    elif options.base is not None:
        options.parser.error("--base is written into an adapter's configuration; add --adapter, or leave --base out")
    else:
        export_hf(**where)
    return 0
