"""The quickstart: from this machine's own text to a model with sixteen times the context, in minutes on two cores.

    texts ─▶ tokenizer ─▶ datasets ─▶ random Llama ─▶ import ─▶ pretrain at 256 tokens (DP 2)
          ─▶ extend to 4096 with YaRN (CP 2) ─▶ export ─▶ transformers agrees ─▶ perplexity by position
          ─▶ fine-tune on questions and answers (DP 2) ─▶ the same question before and after

The Llama is tiny and mostly reads Python, but the commands, formats and parallelism are those of an 8B model on a
cluster. After an interrupt, run the same command again to resume.
"""

from __future__ import annotations

import io
import json
import shutil
import signal
import sys
from pathlib import Path
from types import FrameType

import megalong
from megalong.checkpoint.folder import whole_checkpoints
from megalong.config.load import load_config
from megalong.config.rope import RopeSettings
from megalong.config.schema import Config
from megalong.data.indexed import IndexedDataset
from megalong.errors import UserError
from megalong.quickstart import chats, corpus, model
from megalong.quickstart.steps import Commands, Step, run_steps
from megalong.runtime.folders import file_aside, folder_aside

PROCESSES = "2"
HELD_OUT = "data/heldout_text_document"
MEASURED_SAMPLES = 32  # fewer where this Python's library is smaller
CONFIGS = ("pretrain.yaml", "extend.yaml", "sft.yaml")
BASE, UNTRAINED, EXTENDED, TUNED = "base", "base-yarn-untrained", "extended", "tuned"
ANSWER_TOKENS = "64"


def quickstart(output: str = "quickstart-run") -> None:
    """Run all steps in the folder `output`, except those that an earlier start has done.

    Raises:
        UserError: not started from a checkout, or this Python has no library sources.
        StepFailed: a command failed and has printed the reason.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # keeps our lines and those of the commands in order
    folder = Path(output)
    _copy_configs(folder)
    signal.signal(signal.SIGTERM, _end)  # the running command must be stopped too
    story = Story(folder)
    print(f"megalong quickstart: all files go to {folder}/. You can interrupt it at any time and start it again.")
    print(f"Commands are run in that folder: cd {folder}")
    story.report(run_steps(story.steps()))


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _copy_configs(folder: Path) -> None:
    """Copy the configurations to `folder`, unless an earlier start has done so."""
    source = Path(megalong.__file__).resolve().parents[1] / "examples" / "quickstart"
    for name in CONFIGS:
        if (folder / name).exists():
            continue
        if not (source / name).is_file():
            raise UserError(f"{source / name}: no such file; run the quickstart from a checkout of megalong")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / name)


class Story:
    """The steps, their results in `folder`, and the checks whether these exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.megalong = Commands(folder)
        self.pretrain, self.extend, self.tune = (load_config(folder / name)[0] for name in CONFIGS)

    def steps(self) -> list[Step]:
        """All steps in order."""
        length, longer = self.pretrain.data.seq_length, self.extend.data.seq_length
        there = self._is_there
        return [
            Step("collect the corpus", "Real text of this machine: Python's own sources and its language reference.",
                 lambda: there("corpus"), self.collect),
            Step("train a tokenizer", "A byte-level BPE on the training documents.",
                 lambda: there("tokenizer"), self.tokenizer),
            Step("tokenize", "Two domains to train on, and documents held out; <s> between documents.",
                 lambda: all(there(f"data/{name}_text_document.idx") for name in corpus.DOMAINS), self.tokenize),
            Step("make a random Llama", "A Hugging Face folder, as a download from the hub would be.",
                 lambda: there("random-llama"), self.random_llama),
            Step("import it", "From Hugging Face to a sharded checkpoint that any parallel layout can load.",
                 lambda: bool(whole_checkpoints(self.folder / "imported")), self.import_it),
            Step(f"pretrain at {length} tokens", "Two processes, half of every batch each (data parallel).",
                 lambda: self._trained(self.pretrain), lambda: self.train("pretrain.yaml")),
            Step(f"measure the base at {longer} tokens", f"It never saw more than {length}.",
                 lambda: self._measured(BASE), lambda: self.measure(BASE, "--checkpoint", "runs/base")),
            Step("measure the base with YaRN, untrained", "Its export with one change: config.json says YaRN.",
                 lambda: self._measured(UNTRAINED), self.measure_untrained),
            Step(f"extend to {longer} tokens with YaRN", "Two processes share every sequence (context parallel ring).",
                 lambda: self._trained(self.extend), lambda: self.train("extend.yaml")),
            Step("measure the extended model", "The same held-out sequences.",
                 lambda: self._measured(EXTENDED), lambda: self.measure(EXTENDED, "--checkpoint", "runs/extended")),
            Step("export it", "Back to Hugging Face's format, with YaRN in config.json.",
                 lambda: there("hf/extended"), lambda: self.export("extended")),
            Step("compare the export with transformers", "The same tokens, their model and ours.",
                 lambda: there("comparison.txt"), self.compare),
            Step("write conversations", "Questions about Python's functions and modules, answered by their docstrings.",
                 lambda: there("chats"), self.converse),
            Step("ask it", "A module that it has never seen. It continues the text: it was not trained to answer.",
                 lambda: there(f"answers/{EXTENDED}.txt"), lambda: self.ask(EXTENDED)),
            Step("fine-tune", "Packed conversations; only the tokens of answers are trained on.",
                 lambda: self._trained(self.tune), lambda: self.train("sft.yaml")),
            Step("ask it again", "The same question.",
                 lambda: there(f"answers/{TUNED}.txt"), lambda: self.ask(TUNED)),
        ]  # fmt: skip

    def collect(self) -> None:
        """Write the corpus."""
        with folder_aside(self.folder / "corpus") as folder:
            corpus.write_corpus(folder)

    def tokenizer(self) -> None:
        """Train and save the tokenizer."""
        with folder_aside(self.folder / "tokenizer") as folder:
            model.train_tokenizer(self.folder / "corpus", folder)

    def tokenize(self) -> None:
        """Preprocess the three sets of documents."""
        for name in corpus.DOMAINS:
            files = ["--input", f"corpus/{name}.jsonl", "--output-prefix", f"data/{name}"]
            self.megalong("data", "preprocess", *files, "--tokenizer", "tokenizer", "--separator", model.SEPARATOR)

    def random_llama(self) -> None:
        """Make the Hugging Face folder to start from."""
        with folder_aside(self.folder / "random-llama") as folder:
            model.make_random_llama(self.folder / "tokenizer", folder)

    def import_it(self) -> None:
        """Import the random Llama."""
        self.megalong("checkpoint", "import", "--hf", "random-llama", "--output", "imported")

    def train(self, config: str) -> None:
        """Start or resume training."""
        self.megalong("train", config, "--nproc", PROCESSES)

    def export(self, run: str) -> None:
        """Export a run's newest checkpoint to `hf/RUN`."""
        self.megalong("checkpoint", "export", "--checkpoint", f"runs/{run}", "--output", f"hf/{run}")

    def measure(self, name: str, *source: str) -> None:
        """Measure perplexity by position at the extended length."""
        length = self.extend.data.seq_length
        held = IndexedDataset(self.folder / HELD_OUT).num_tokens // length
        sizes = ["--seq-length", str(length), "--samples", str(min(MEASURED_SAMPLES, held))]
        self.megalong(
            "evaluate",
            "perplexity",
            *source,
            "--data",
            HELD_OUT,
            *sizes,
            "--output",
            f"evaluation/{name}",
            "--overwrite",
        )

    def measure_untrained(self) -> None:
        """Export the base, write the extension's RoPE into its config, and measure that."""
        if not self._is_there("hf/base"):
            self.export("base")
        if not self._is_there(f"hf/{UNTRAINED}"):
            assert self.extend.model.rope is not None
            _with_rope(self.folder / "hf" / "base", self.folder / "hf" / UNTRAINED, self.extend.model.rope)
        self.measure(UNTRAINED, "--hf", f"hf/{UNTRAINED}")

    def compare(self) -> None:
        """Compare logits of checkpoint and export; store the result as a sentence."""
        from megalong.quickstart.compare import compare_with_transformers

        comparison = compare_with_transformers(
            self.folder / "runs" / "extended",
            self.folder / "hf" / "extended",
            self.folder / HELD_OUT,
            self.extend.data.seq_length,
        )
        print(f"   {comparison}")
        (self.folder / "comparison.txt").write_text(str(comparison))

    def converse(self) -> None:
        """Write questions and answers."""
        with folder_aside(self.folder / "chats") as folder:
            chats.write_chats(self.folder / "corpus", folder)

    def ask(self, run: str) -> None:
        """Ask a run's newest checkpoint the question; store and print its answer."""
        asked = json.loads((self.folder / "chats" / chats.ASKED).read_text())
        answer = self.folder / "answers" / f"{run}.txt"
        how = ["--chat", "--prompt", asked["question"], "--max-new-tokens", ANSWER_TOKENS]
        with file_aside(answer) as aside:
            self.megalong("generate", "--checkpoint", f"runs/{run}", *how, output=aside)
            print(aside.read_text(encoding="utf-8"))

    def report(self, seconds: dict[str, float]) -> None:
        """Write and print the report."""
        from megalong.evaluation.perplexity import PerplexityResult
        from megalong.quickstart.report import Answers, write_report

        results = [
            PerplexityResult.load(self.folder / "evaluation" / name / "perplexity.json")
            for name in (BASE, UNTRAINED, EXTENDED)
        ]
        comparison = (self.folder / "comparison.txt").read_text()
        asked = json.loads((self.folder / "chats" / chats.ASKED).read_text())
        before, after = ((self.folder / "answers" / f"{run}.txt").read_text("utf-8") for run in (EXTENDED, TUNED))
        answers = Answers(asked["question"], asked["docstring"], before, after)
        write_report(self.folder, results, comparison, answers, self.pretrain.data.seq_length, seconds)

    def _is_there(self, name: str) -> bool:
        return (self.folder / name).exists()

    def _measured(self, name: str) -> bool:
        return self._is_there(f"evaluation/{name}/perplexity.json")

    def _trained(self, config: Config) -> bool:
        found = whole_checkpoints(self.folder / config.run.dir)
        return bool(found) and int(found[-1].name.removeprefix("step-")) >= config.training.train_iters


def _with_rope(source: Path, target: Path, rope: RopeSettings) -> None:
    """Copy a Hugging Face folder and write `rope` into the copy's `config.json`. The weights stay the same."""
    from megalong.hf.config import read_architecture, write_config

    config = json.loads((source / "config.json").read_text())
    with folder_aside(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
        changed = write_config(read_architecture(source).with_rope(rope), config)
        (folder / "config.json").write_text(json.dumps(changed, indent=2))
