"""The report of the quickstart: a table, a plot, and the list of all files.

`report.md` and `perplexity.png` are written to the quickstart's folder; the terminal shows the same text.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megalong.evaluation.perplexity import PerplexityResult, perplexity_table
from megalong.evaluation.plots import plot_perplexity
from megalong.runtime.folders import file_aside

PLACES = {
    "corpus/": "the texts: code, prose, and held-out documents of both",
    "tokenizer/": "the byte-level BPE tokenizer, Hugging Face format",
    "data/": "tokens: Megatron's .bin and .idx",
    "random-llama/": "the untrained Llama, Hugging Face format",
    "imported/": "the same as a checkpoint for any TP/PP layout",
    "runs/base/": "pretraining: config, log, checkpoints, TensorBoard",
    "runs/extended/": "the extension: the same",
    "hf/": "exports for transformers: base and extended",
    "chats/": "questions and answers to train on, and the question asked",
    "runs/tuned/": "fine-tuning: config, log, checkpoints, TensorBoard",
    "answers/": "what the model says before and after fine-tuning",
    "evaluation/": "perplexity by position of each model, as JSON, table and plot",
}


@dataclass(frozen=True)
class Answers:
    """A question, the docstring that answers it, and what the model says before and after fine-tuning."""

    question: str
    docstring: str
    before: str
    after: str

    @property
    def lines(self) -> list[str]:
        """Their lines in the report."""
        texts = {"the docstring": self.docstring, "before fine-tuning": self.before, "after fine-tuning": self.after}
        return [
            f"A question about a module that it never saw: {self.question}",
            "",
            *(f"- {name}: `{' '.join(text.split()) or '(nothing)'}`" for name, text in texts.items()),
        ]


def write_report(
    folder: Path,
    results: list[PerplexityResult],
    comparison: str,
    answers: Answers,
    original_length: int,
    seconds: dict[str, float],
) -> None:
    """Write `folder/report.md` and `folder/perplexity.png`, and print the report.

    Args:
        results: models in the order to show them, all measured on the same sequences; the last is the extended one.
        comparison: result of the comparison of the export with transformers.
        answers: the question, and the answers before and after fine-tuning.
        original_length: tokens of context that the base model was trained on.
        seconds: time of each step that was done in this start.
    """
    factor = results[-1].seq_length // original_length
    title = f"Perplexity by position before and after extending the context ×{factor}"
    plot_perplexity(results, folder / "perplexity.png", title=title, original_length=original_length)
    text = _text(folder, results, comparison, answers, original_length, seconds)
    with file_aside(folder / "report.md") as aside:
        aside.write_text(text, encoding="utf-8")
    print(text)


def _text(
    folder: Path,
    results: list[PerplexityResult],
    comparison: str,
    answers: Answers,
    original_length: int,
    seconds: dict[str, float],
) -> str:
    first, last = results[0], results[-1]
    places = [f"    {folder / name!s:40} {what}" for name, what in PLACES.items()]
    times = [f"    {title:60} {value:6.0f} s" for title, value in seconds.items()]
    return "\n".join(
        [
            f"# From {original_length} to {last.seq_length} tokens of context",
            "",
            f"Perplexity of {last.samples} held-out samples of {last.seq_length} tokens, by position:",
            "",
            perplexity_table(results),
            "",
            "![perplexity by position](perplexity.png)",
            "",
            *_sentences(first, last, original_length),
            "",
            f"The export, read by transformers: {comparison}.",
            "",
            *answers.lines,
            "",
            "All files:",
            "",
            *places,
            f"    {folder / 'perplexity.png'!s:40} the plot",
            "",
            "The curves of all runs:",
            "",
            f"    tensorboard --logdir {folder / 'runs'}",
            "",
            *(["Time by step:", "", *times, ""] if times else []),
        ]
    )


def _sentences(first: PerplexityResult, last: PerplexityResult, original_length: int) -> list[str]:
    """The table in words: both models inside the trained length and at the far end."""
    inside = first.edges.index(original_length) - 1
    base, extended = first.perplexity, last.perplexity
    values = base[inside], base[-1], extended[inside], extended[-1]
    assert all(value is not None for value in values)
    near, far, near_after, far_after = values
    return [
        f"- {first.name}: {near:.1f} just inside its {original_length} tokens, {far:.1f} at the end of "
        f"{last.seq_length}: {far / near:.1f} times worse.",  # type: ignore[operator]
        f"- {last.name}: {near_after:.1f} and {far_after:.1f}: {far_after / near_after:.2f} times.",  # type: ignore[operator]
    ]
