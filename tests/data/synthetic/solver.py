"""Answers to the tasks, found in nothing but their text, as a reader would; none of the code that made them."""

import re
from collections import Counter


def solve(text: str) -> str:
    """The answer to the question at the end of `text`, which the rest of it holds."""
    body, _, question = text.rpartition("\n\nQuestion: ")
    if asked := re.match(r"what is the code of the (\w+ \w+),", question):
        notes = re.findall(rf"\nNote to keep in mind: the code of the {asked[1]} is (\d+)\.\n", body)
        assert len(notes) == 1, notes
        return str(notes[0])
    if asked := re.match(r"which registers hold (\d+) ", question):
        return ", ".join(_registers(body, asked[1]))
    if asked := re.match(r"which (?:(\d+) words|word) of five or more letters", question):
        counts: Counter[str] = Counter()
        word = ""
        for character in body.lower() + " ":
            if character.isalpha():
                word += character
            else:
                counts[word] += len(word) >= 5
                word = ""
        found = sorted((-count, word) for word, count in counts.items() if count)
        return ", ".join(word for _, word in found[: int(asked[1] or 1)])
    raise AssertionError(question)


def _registers(body: str, value: str) -> list[str]:
    """Executed line by line, as a machine with registers would."""
    held: dict[str, str] = {}
    for line in body.split("\n"):
        if told := re.fullmatch(r"Register (\w+) is set to (\d+)\.", line):
            held[told[1]] = told[2]
        elif told := re.fullmatch(r"Register (\w+) receives what register (\w+) holds\.", line):
            held[told[1]] = held[told[2]]
    return [register for register, now in held.items() if now == value]
