"""A tokenizer that is almost another one."""

import json


def with_two_ids_swapped(content: str) -> str:
    """The text of a tokenizer.json with the ids of its two last tokens exchanged."""
    whole = json.loads(content)
    vocabulary = whole["model"]["vocab"]
    first, second = list(vocabulary)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    return json.dumps(whole)
