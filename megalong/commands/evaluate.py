"""`megalong evaluate …`: measure a model."""

import argparse
from typing import Any

from megalong.commands.parsing import add_dtype, add_overwrite, command, count, group


def add_evaluate(commands: Any) -> None:
    family = group(commands, "evaluate", "measure a model")
    parser = command(family, "perplexity", "perplexity by position in the sequence", _run_perplexity)
    add_models(parser)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--data", metavar="PREFIX", help="indexed dataset to read")
    text.add_argument(
        "--held-out", metavar="DOMAIN", help="held-out documents of the first run: of a domain of its mixture, or all"
    )
    parser.add_argument("--seq-length", type=count, required=True, metavar="N", help="tokens per sample")
    parser.add_argument("--samples", type=count, default=8, metavar="N", help="samples to average over (%(default)s)")
    add_dtype(parser)
    parser.add_argument("--nproc", type=count, metavar="N", help="context-parallel processes to start here")
    parser.add_argument(
        "--allow-other-tokenizer", action="store_true", help="allow a dataset of another tokenizer than the model's"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for table, numbers and plot")
    add_overwrite(parser)


def add_models(parser: argparse.ArgumentParser) -> None:
    """Models in the order of the command line, for `find_models`."""
    for option, metavar, about in (
        ("checkpoint", "CKPT_OR_RUN", "a run's folder, or one step's; may be repeated"),
        ("hf", "DIR", "Hugging Face folder; may be repeated"),
        ("rope", "YAML", "RoPE scaling of the model before it, such as '{type: yarn, factor: 4}'; if first, of all"),
    ):
        parser.add_argument(f"--{option}", dest="models", action=_Ordered, default=(), metavar=metavar, help=about)


class _Ordered(argparse.Action):
    """Collects (option, value) of several options in one list."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest), (self.option_strings[0][2:], values)))


def _run_perplexity(options: argparse.Namespace) -> int:
    from megalong.evaluation.command import perplexity

    if all(option == "rope" for option, _ in options.models):
        options.parser.error("one of the arguments --checkpoint --hf is required")
    perplexity(
        models=options.models,
        data=options.data,
        held_out=options.held_out,
        seq_length=options.seq_length,
        samples=options.samples,
        nproc=options.nproc,
        dtype=options.dtype,
        output=options.output,
        overwrite=options.overwrite,
        allow_other_tokenizer=options.allow_other_tokenizer,
    )
    return 0
