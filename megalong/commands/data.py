"""`megalong data …`: tokenize a corpus, merge datasets, inspect one, show what a run will read."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalong.commands.parsing import add_config, add_overwrite, command, count, group
from megalong.errors import UserError

if TYPE_CHECKING:
    from megalong.config.schema import Config


def add_data(commands: Any) -> None:
    family = group(commands, "data", "tokenize a corpus; inspect datasets")
    _add_preprocess(family)
    parser = command(family, "merge", "merge datasets of one tokenizer, such as the shards of a corpus", _run_merge)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, in order; or a folder")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    about = "show what an indexed dataset contains, or what a run trains on, sample by sample"
    parser = command(family, "inspect", about, _run_inspect)
    parser.add_argument(
        "prefix", metavar="PREFIX|CONFIG.yaml", help="path of the .bin and .idx without their suffix, or a run's file"
    )
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="for a CONFIG.yaml")
    parser.add_argument(
        "--samples", type=count, default=3, metavar="N", help="samples to show of a CONFIG.yaml (%(default)s)"
    )
    parser.add_argument(
        "--documents", type=count, default=3, metavar="N", help="documents to show of a PREFIX (%(default)s)"
    )
    parser.add_argument("--tokenizer", metavar="DIR", help="Hugging Face folder, to show text instead of ids")
    parser.add_argument("--png", metavar="FILE", help="plot the lengths of documents to this file")
    add_overwrite(parser)
    about = "show how evenly context-parallel ranks share a run's attention, for each token layout"
    parser = command(family, "balance", about, _run_balance)
    add_config(parser)
    parser.add_argument("--samples", type=count, default=8, metavar="N", help="number of samples (%(default)s)")
    parser.add_argument("--png", metavar="FILE", help="plot the tokens and the work of each rank to this file")
    add_overwrite(parser)
    parser = command(family, "plan", "show what a run will read: domains, lengths, repeats, cuts", _run_plan)
    add_config(parser)
    parser.add_argument("--png", metavar="FILE", help="plot tokens by length and the content of samples to this file")
    add_overwrite(parser)


def _add_preprocess(family: Any) -> None:
    parser = command(family, "preprocess", "convert text files to an indexed dataset", _run_preprocess)
    add = parser.add_argument
    add(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help=".jsonl, .txt (.gz, .zst), .parquet; folders, wildcards",
    )
    add("--output-prefix", required=True, metavar="P", help="writes P_KEY_document.bin and .idx")
    add("--tokenizer", "--tokenizer-model", required=True, metavar="DIR", help="Hugging Face folder")
    add("--json-keys", nargs="+", default=["text"], metavar="KEY", help="JSON fields or columns to tokenize (text)")
    add("--append-eod", action="store_true", help="end every document with the end-of-text token")
    add("--separator", metavar="TEXT", help="token or text between documents, such as <s>")
    add("--separator-position", choices=["between", "before"], default="between", help="(%(default)s)")
    add("--workers", type=count, metavar="N", help="processes (default: one per core that this job may use)")
    add("--on-error", choices=["fail", "skip"], default="fail", help="bad records: skip collects them (%(default)s)")
    add("--group-by", metavar="KEY", help="join records with equal KEY, such as a repository, to one document")
    add("--group-path", default="path", metavar="KEY", help="sort the records of a group by this key (%(default)s)")
    add("--shard", metavar="I/N", help="shard I of N, counted from 1, for one task of a SLURM array")
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="benchmarks; documents that share text with them are contaminated",
    )
    add("--decontaminate-action", choices=["drop", "report"], default="drop", help="on such documents (%(default)s)")
    add("--decontaminate-ngram", type=count, default=13, metavar="N", help="shared words in a row (%(default)s)")
    add(
        "--encoder",
        choices=["gigatoken", "tokenizers"],
        default="gigatoken",
        help="gigatoken is used only where it is exact (%(default)s)",
    )


def _run_preprocess(options: argparse.Namespace) -> int:
    from megalong.data.corpus.preprocess import preprocess

    preprocess(
        inputs=options.input,
        output_prefix=options.output_prefix,
        tokenizer=options.tokenizer,
        json_keys=options.json_keys,
        append_eod=options.append_eod,
        separator=options.separator,
        separator_position=options.separator_position,
        workers=options.workers,
        on_error=options.on_error,
        group_by=options.group_by,
        group_path=options.group_path,
        shard=options.shard,
        decontaminate=options.decontaminate,
        decontaminate_action=options.decontaminate_action,
        decontaminate_ngram=options.decontaminate_ngram,
        encoder=options.encoder,
    )
    return 0


def _run_merge(options: argparse.Namespace) -> int:
    from megalong.data.merge import merge

    merge(options.input, options.output_prefix)
    return 0


def is_config(argument: str) -> bool:
    """Whether the argument of `data inspect` is a run's file, not a dataset's prefix."""
    return argument.endswith((".yaml", ".yml"))


def _run_inspect(options: argparse.Namespace) -> int:
    if is_config(options.prefix):
        from megalong.data.inspect_samples import inspect_samples

        if options.png is not None:
            options.parser.error(
                "--png plots a dataset's lengths; give a PREFIX, or use megalong data plan CONFIG.yaml"
            )
        inspect_samples(options.prefix, options.overrides, options.samples, options.tokenizer, _conversations)
        return 0
    if options.overrides:
        options.parser.error(
            f"unknown argument {options.overrides[0]}; one argument too many: only a CONFIG.yaml has keys"
        )
    from megalong.data.inspect import inspect

    inspect(
        options.prefix,
        documents=options.documents,
        tokenizer=options.tokenizer,
        png=options.png,
        overwrite=options.overwrite,
    )
    return 0


def _conversations(config: "Config", samples: int, tokenizer: str | None) -> Iterator[str]:
    from megalong.sft.inspect import conversation_blocks
    from megalong.sft.samples import ConversationSamples
    from megalong.training.start import find_start

    folder = tokenizer or config.sft.tokenizer or find_start(config).assets
    if folder is None:
        raise UserError("sft.tokenizer: the initial model has none; write sft.tokenizer: DIR")
    opened = ConversationSamples.open(config, "train", folder, Path(config.run.dir) / "index")
    return conversation_blocks(opened, folder, samples)


def _run_balance(options: argparse.Namespace) -> int:
    from megalong.planning.balance import balance

    balance(options.config, options.overrides, samples=options.samples, png=options.png, overwrite=options.overwrite)
    return 0


def _run_plan(options: argparse.Namespace) -> int:
    from megalong.planning.data_plan import plan

    plan(options.config, options.overrides, png=options.png, overwrite=options.overwrite)
    return 0
