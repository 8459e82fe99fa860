"""`megalong checkpoint …`, and `import-hf` and `export-hf`, which are two of its commands by another name."""

import argparse
from typing import Any

from megalong.commands.parsing import add_dtype, command, group, step


def add_checkpoint(commands: Any) -> None:
    family = group(commands, "checkpoint", "bring weights in from Hugging Face and back out")
    add_import(family, "import")
    add_export(family, "export")
    verify = command(family, "verify", "read checkpoints and say what is damaged", _run_verify)
    verify.add_argument("folder", metavar="DIR", help="a run's folder (all its steps), or one step's")


def _run_verify(options: argparse.Namespace) -> int:
    import sys
    from pathlib import Path

    from megalong.checkpoint.folder import find_checkpoint, read_meta, verify, whole_checkpoints

    run = Path(options.folder)
    damaged = False
    for step_folder in whole_checkpoints(run) or [find_checkpoint(run)]:
        told = verify(step_folder)
        damaged = damaged or bool(told)
        for line in told:
            print(line, file=sys.stderr)
        if told:
            continue
        if read_meta(step_folder).checksums:
            print(f"{step_folder}: as written")
        else:
            print(f"{step_folder}: no checksums, an earlier version wrote it; its files have the sizes written down")
    return 2 if damaged else 0


def add_import(commands: Any, name: str) -> None:
    parser = command(commands, name, "turn a Hugging Face folder into a checkpoint any layout can load", _run_import)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder of a Llama")
    parser.add_argument("--output", required=True, metavar="CKPT", help="folder to write")


def _run_import(options: argparse.Namespace) -> int:
    from megalong.hf.convert import import_hf

    import_hf(hf=options.hf, output=options.output)
    return 0


def add_export(commands: Any, name: str) -> None:
    parser = command(commands, name, "turn a checkpoint into a Hugging Face folder", _run_export)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    parser.add_argument("--step", type=step, metavar="N", help="step of the run; the last one where not given")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    add_dtype(parser, "type of the weights")
    parser.add_argument("--adapter", action="store_true", help="the adapters alone, as peft has them, not merged")
    parser.add_argument("--base", metavar="NAME", help="base that --adapter names; the model the run started from")


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
