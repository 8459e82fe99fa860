"""Conversations for the fine-tuning stage: questions about Python's standard library, answered by its docstrings.

    What does the function textwrap.dedent(text) do?
    Remove any common leading whitespace from every line in `text`.

Sources are parsed, never imported. Modules that were held out of pretraining are held out here too: the question that
the quickstart asks before and after fine-tuning is about one of them.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

from megalong.quickstart.corpus import library_sources

SHORTEST, LONGEST = 16, 240  # characters of an answer
CHATS, ASKED = "train.jsonl", "asked.json"
Pair = tuple[str, str]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def questions(module: str, source: str) -> list[Pair]:
    """(question, answer) for a module, its public classes, functions and methods that have a docstring."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about invalid escapes in old code
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return []
    asked = [(f"What is the module {module} for?", tree), *_inside(module, tree)]
    pairs = [(question, _first_paragraph(node)) for question, node in asked]
    return [(question, answer) for question, answer in pairs if SHORTEST <= len(answer) <= LONGEST]


def _inside(owner: str, node: ast.Module | ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef | _Function]]:
    for child in node.body:
        if not isinstance(child, ast.ClassDef | _Function) or child.name.startswith("_"):
            continue
        name = f"{owner}.{child.name}"
        if isinstance(child, ast.ClassDef):
            yield f"What is the class {name}?", child
            yield from _inside(name, child)
        else:
            kind = "method" if isinstance(node, ast.ClassDef) else "function"
            yield f"What does the {kind} {name}({', '.join(_arguments(child))}) do?", child


def _arguments(function: _Function) -> list[str]:
    found = function.args
    return [one.arg for one in (*found.posonlyargs, *found.args, *found.kwonlyargs) if one.arg not in ("self", "cls")]


def _first_paragraph(node: ast.Module | ast.ClassDef | _Function) -> str:
    """A docstring up to its first empty line, as one line; empty without a docstring."""
    text = ast.get_docstring(node) or ""
    return " ".join(text.split("\n\n")[0].split())


def write_chats(corpus: Path, folder: Path) -> None:
    """Write `folder/train.jsonl`, and `folder/asked.json`: the question that is asked, and its answer.

    Args:
        corpus: the folder that `write_corpus` wrote; no question in train.jsonl is about its held-out texts.
    """
    with (corpus / "heldout.jsonl").open(encoding="utf-8") as lines:
        held_out = {json.loads(line)["text"] for line in lines}
    train: list[Pair] = []
    unseen: list[Pair] = []
    for module, text in library_sources().items():
        (unseen if text in held_out else train).extend(questions(module, text))
    answered = {question for question, _ in train}
    records = [{"prompt": question, "completion": answer} for question, answer in train]
    (folder / CHATS).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    question, answer = min((pair for pair in unseen if pair[0] not in answered), key=_preference)
    (folder / ASKED).write_text(json.dumps({"question": question, "docstring": answer}), encoding="utf-8")
    print(f"{len(train):,} questions and answers to train on, for example:")
    for question, answer in train[:: max(1, len(train) // 3)][:3]:
        print(f"   {question}\n      {answer}")


def _preference(pair: Pair) -> tuple[bool, bool, int, str]:
    """Sort key: functions first, then docstrings of at least 40 characters, then the shortest question."""
    question, answer = pair
    return not question.startswith("What does the function"), len(answer) < 40, len(question), question
