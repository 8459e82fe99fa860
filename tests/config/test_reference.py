"""`docs/configuration.md` is what the schema says, and every key has a meaning and a valid example."""

from pathlib import Path

import pytest
from pydantic import BaseModel, TypeAdapter

from megalong.config.reference import meaning, reference, sections
from megalong.config.text import parse_yaml

PAGE = Path(__file__).parents[2] / "docs/configuration.md"
KEYS = [pytest.param(section, key, id=f"{name}.{key}") for name, section in sections() for key in section.model_fields]


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == reference(), "python -m megalong.config.reference > docs/configuration.md"


def test_all_sections_are_there() -> None:
    names = [name for name, _ in sections()]
    for name in (
        "run",
        "model.rope",
        "model.load",
        "data.mixture.lengths",
        "data.mixture.synthetic",
        "sft.sources",
        "slurm",
    ):
        assert name in names
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_a_key_has_a_meaning_and_where_it_has_no_default_a_valid_example(section: type[BaseModel], key: str) -> None:
    field = section.model_fields[key]
    text, example = meaning(section, key)
    assert text.endswith((".", ")")) or example is not None
    if field.is_required() or field.default is None:
        assert example is not None, f"{section.__name__}.{key}"
    if example is None:
        return
    value = parse_yaml(example, key)
    trial = type("Trial", (section.__base__,), {"__annotations__": {key: field.rebuild_annotation()}, key: field})
    assert isinstance(trial, type)
    TypeAdapter(trial).validate_python({key: value})
    with pytest.raises(ValueError):  # noqa: PT011
        TypeAdapter(trial).validate_python({key: object()})
