"""`megalong evaluate …`: measure a model."""

import argparse
from typing import Any

from megalong.commands.parsing import add_dtype, command, count, group


def add_evaluate(commands: Any) -> None:
    family = group(commands, "evaluate", "measure a model")
    parser = command(family, "perplexity", "perplexity by position in the sequence", _run_perplexity)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    source.add_argument("--hf", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="indexed dataset to read")
    parser.add_argument("--seq-length", type=count, required=True, metavar="N", help="tokens of a sample")
    parser.add_argument("--samples", type=count, default=8, metavar="N", help="samples to average over (%(default)s)")
    add_dtype(parser)
    parser.add_argument("--nproc", type=count, metavar="N", help="context-parallel processes to start here")
    parser.add_argument(
        "--allow-other-tokenizer", action="store_true", help="for a dataset made with another than the model's"
    )
    parser.add_argument("--output", metavar="DIR", help="where to write the table and the plot")


def _run_perplexity(options: argparse.Namespace) -> int:
    from megalong.evaluation.command import perplexity

    perplexity(
        checkpoint=options.checkpoint,
        hf=options.hf,
        data=options.data,
        seq_length=options.seq_length,
        samples=options.samples,
        nproc=options.nproc,
        dtype=options.dtype,
        output=options.output,
        allow_other_tokenizer=options.allow_other_tokenizer,
    )
    return 0
