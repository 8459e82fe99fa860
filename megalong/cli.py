"""The command line: what can be asked, and which function answers.

A command is declared in one `_add_...` function and answered by one `_run_...` function, which imports what it needs
when it is called. So `megalong --help` and `megalong data ...` start without torch, and a broken optional package
hurts only the command that uses it.

Exit status: 0 done; 2 the user's mistake, told in one line (under torchrun by rank 0 alone); 130 interrupted by hand;
1 anything else, with its traceback.
"""

import argparse
import difflib
import errno
import os
import select
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megalong import __version__
from megalong.errors import UserError

_STDOUT = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command (`sys.argv` where no arguments are given) and return its exit status."""
    try:
        options = _parse(arguments)
        status: int = options.run(options)
        sys.stdout.flush()
    except UserError as error:
        _tell(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        _tell(f"{error.filename or 'output'}: {error.strerror}; make room there, or write elsewhere")
        return 2
    return status


def _tell(message: str) -> None:
    """Print a user's mistake once: every rank of a run finds the same one."""
    if os.environ.get("RANK", "0") == "0":
        print(f"megalong: error: {message}", file=sys.stderr)


def _reader_is_gone() -> bool:
    """Whether stdout is the pipe that broke (`| head`), and not one between processes; if so, hush the exit."""
    poll = select.poll()
    poll.register(_STDOUT, 0)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
    return True


class _Formatter(argparse.HelpFormatter):
    """Help in two columns, with room for our longest command in the first."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)
        self._action_max_length = 14  # argparse measures commands without the indentation it gives them


class _Parser(argparse.ArgumentParser):
    """argparse with one-line errors, the nearest right command or option, and no abbreviations."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Formatter, **settings)

    def error(self, message: str) -> NoReturn:
        _tell(f"{message} (see {self.prog} --help)")
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if isinstance(action, argparse._SubParsersAction) and value not in action.choices:
            self.error(f"unknown command {value}; {_nearest(value, list(action.choices))}")
        super()._check_value(action, value)

    def options(self) -> list[str]:
        """Every option this command knows."""
        return [option for action in self._actions for option in action.option_strings]


def _nearest(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    options, rest = build_parser().parse_known_args(arguments)
    # argparse gives up on positional arguments after an option: `train run.yaml --nproc 2 optimizer.lr=1e-4`.
    if "overrides" in options:
        options.overrides = [*options.overrides, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        name = rest[0].partition("=")[0]
        hint = _nearest(name, options.parser.options()) if name.startswith("-") else "one argument too many"
        options.parser.error(f"unknown argument {rest[0]}; {hint}")
    return options


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; tests freeze its commands and options."""
    parser = _Parser(prog="megalong", description="Long-context training of Llama models in 3D parallel.")
    parser.add_argument("--version", action="version", version=f"megalong {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_quickstart(commands)
    _add_data(commands)
    _add_checkpoint(commands)
    _add_import(commands, "import-hf")
    _add_export(commands, "export-hf")
    _add_train(commands)
    _add_evaluate(commands)
    _command(commands, "doctor", "say what is installed and what will be used", _run_doctor)
    return parser


def _command(
    commands: Any, name: str, summary: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _group(commands: Any, name: str, summary: str) -> Any:
    return commands.add_parser(name, help=summary, description=summary).add_subparsers(
        metavar="COMMAND", required=True, parser_class=_Parser
    )


def _count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return number


def _step(text: str) -> int:
    """A whole number of at least 0: an imported checkpoint is step 0."""
    return 0 if text == "0" else _count(text)


def _add_quickstart(commands: Any) -> None:
    parser = _command(commands, "quickstart", "the whole story on this machine's own text, on CPU", _run_quickstart)
    parser.add_argument(
        "--output", default="quickstart-run", metavar="DIR", help="where everything is written (%(default)s)"
    )


def _run_quickstart(options: argparse.Namespace) -> int:
    from megalong.quickstart import quickstart

    quickstart(output=options.output)
    return 0


def _add_data(commands: Any) -> None:
    group = _group(commands, "data", "tokenize a corpus; look into a dataset")
    _add_preprocess(group)
    parser = _command(group, "merge", "join datasets of one tokenizer, such as the shards of a corpus", _run_merge)
    parser.add_argument("--input", nargs="+", required=True, metavar="PREFIX", help="datasets, in order; or a folder")
    parser.add_argument("--output-prefix", required=True, metavar="P", help="writes P.bin, P.idx and P.json")
    parser = _command(group, "inspect", "say what an indexed dataset holds", _run_inspect)
    parser.add_argument("prefix", metavar="PREFIX", help="path of the .bin and .idx without their endings")
    parser.add_argument("--documents", type=_count, default=3, metavar="N", help="documents to show (%(default)s)")
    parser.add_argument("--tokenizer", metavar="DIR", help="Hugging Face folder, to show text instead of numbers")
    parser.add_argument("--png", metavar="FILE", help="draw the lengths of documents there")
    about = "say how evenly context-parallel ranks share a run's attention, for each token layout"
    parser = _command(group, "balance", about, _run_balance)
    _add_config(parser)
    parser.add_argument("--samples", type=_count, default=8, metavar="N", help="samples to look at (%(default)s)")
    parser.add_argument("--png", metavar="FILE", help="draw where tokens lie and how full each rank is")
    parser = _command(group, "plan", "say what a run will see: domains, lengths, repeats, what is cut", _run_plan)
    _add_config(parser)
    parser.add_argument("--png", metavar="FILE", help="draw tokens by length and what samples hold")


def _add_preprocess(group: Any) -> None:
    parser = _command(group, "preprocess", "turn text files into an indexed dataset", _run_preprocess)
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
    add("--workers", type=_count, metavar="N", help="processes (one for each core this job may use)")
    add("--on-error", choices=["fail", "skip"], default="fail", help="at a bad record; skip gathers them (%(default)s)")
    add("--group-by", metavar="KEY", help="make records that share KEY, such as a repository, one document")
    add("--group-path", default="path", metavar="KEY", help="orders the records of a group (%(default)s)")
    add("--shard", metavar="I/N", help="the Ith of N shares, from 1, as one task of a SLURM array")
    add(
        "--decontaminate",
        nargs="+",
        default=[],
        metavar="FILE",
        help="benchmarks that documents must not share text with",
    )
    add("--decontaminate-action", choices=["drop", "report"], default="drop", help="for such documents (%(default)s)")
    add("--decontaminate-ngram", type=_count, default=13, metavar="N", help="words in a row that count (%(default)s)")
    add(
        "--encoder",
        choices=["gigatoken", "tokenizers"],
        default="gigatoken",
        help="gigatoken wherever exact (%(default)s)",
    )


def _run_preprocess(options: argparse.Namespace) -> int:
    from megalong.data.preprocess import preprocess

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


def _run_inspect(options: argparse.Namespace) -> int:
    from megalong.data.inspect import inspect

    inspect(options.prefix, documents=options.documents, tokenizer=options.tokenizer, png=options.png)
    return 0


def _run_balance(options: argparse.Namespace) -> int:
    from megalong.attention.balance import balance

    balance(options.config, options.overrides, samples=options.samples, png=options.png)
    return 0


def _run_plan(options: argparse.Namespace) -> int:
    from megalong.data.plan import plan

    plan(options.config, options.overrides, png=options.png)
    return 0


def _add_checkpoint(commands: Any) -> None:
    group = _group(commands, "checkpoint", "bring weights in from Hugging Face and back out")
    _add_import(group, "import")
    _add_export(group, "export")


def _add_import(commands: Any, name: str) -> None:
    parser = _command(commands, name, "turn a Hugging Face folder into a checkpoint any layout can load", _run_import)
    parser.add_argument("--hf", required=True, metavar="DIR", help="Hugging Face folder of a Llama")
    parser.add_argument("--output", required=True, metavar="CKPT", help="folder to write")


def _run_import(options: argparse.Namespace) -> int:
    from megalong.hf.convert import import_hf

    import_hf(hf=options.hf, output=options.output)
    return 0


def _add_export(commands: Any, name: str) -> None:
    parser = _command(commands, name, "turn a checkpoint into a Hugging Face folder", _run_export)
    parser.add_argument("--checkpoint", required=True, metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    parser.add_argument("--step", type=_step, metavar="N", help="step of the run; the last one where not given")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="type of the weights; as trained where not given"
    )


def _run_export(options: argparse.Namespace) -> int:
    from megalong.hf.convert import export_hf

    export_hf(checkpoint=options.checkpoint, step=options.step, output=options.output, dtype=options.dtype)
    return 0


def _add_train(commands: Any) -> None:
    parser = _command(commands, "train", "train, or resume training, as a configuration says", _run_train)
    _add_config(parser)
    parser.add_argument("--nproc", type=_count, metavar="N", help="start N processes here; not under torchrun")


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.yaml", help="the run, section by section")
    parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value", help="instead of the file's")


def _run_train(options: argparse.Namespace) -> int:
    from megalong.training.launch import train

    return train(options.config, options.overrides, nproc=options.nproc)


def _add_evaluate(commands: Any) -> None:
    group = _group(commands, "evaluate", "measure a model")
    parser = _command(group, "perplexity", "perplexity by position in the sequence", _run_perplexity)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", metavar="CKPT_OR_RUN", help="a run's folder, or one step's")
    source.add_argument("--hf", metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="indexed dataset to read")
    parser.add_argument("--seq-length", type=_count, required=True, metavar="N", help="tokens of a sample")
    parser.add_argument("--samples", type=_count, default=8, metavar="N", help="samples to average over (%(default)s)")
    parser.add_argument("--nproc", type=_count, metavar="N", help="context-parallel processes to start here")
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
        output=options.output,
    )
    return 0


def _run_doctor(options: argparse.Namespace) -> int:
    from megalong.runtime.doctor import doctor

    doctor()
    return 0
