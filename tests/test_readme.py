"""The README is true: its commands exist, its configuration table is the schema's, its files are there."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from megalong.cli import build_parser
from megalong.config.load import load_config
from megalong.config.rope import RopeSettings
from megalong.config.schema import Config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
COMMAND = r"`megalong ((?:[a-z][a-z-]* ?\b)+)"


def configuration_table() -> str:
    """Section by section, every key with its default, as the README shows it; prints when a test finds it changed."""
    lines = ["| section | keys, with their defaults where they have one |", "| --- | --- |"]
    sections = {name: field.annotation for name, field in Config.model_fields.items() if name != "task"}
    for name, section in {**sections, "model.rope": RopeSettings}.items():
        assert isinstance(section, type)
        assert issubclass(section, BaseModel)
        keys = [_key(key, field) for key, field in section.model_fields.items()]
        lines.append(f"| `{name}` | {', '.join(keys)} |")
    return "\n".join(lines)


def _key(name, field):
    if field.is_required() or field.default is None:
        return f"`{name}`"
    return f"`{name}: {yaml.safe_dump(field.default, default_flow_style=True).splitlines()[0]}`"


def test_the_configuration_table_is_the_schemas():
    assert configuration_table() in README, f"put this into README.md:\n{configuration_table()}"


@pytest.mark.parametrize("command", sorted(set(re.findall(COMMAND, README))))
def test_every_command_exists(command, capsys):
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([*command.split(), "--help"])
    assert end.value.code == 0


def test_every_flag_of_a_command_exists(capsys):
    for command, rest in re.findall(COMMAND + r"([^`]*)`", README):
        with pytest.raises(SystemExit):
            build_parser().parse_args([*command.split(), "--help"])
        known = capsys.readouterr().out
        for flag in re.findall(r"--[a-z-]+", rest):
            assert flag in known, f"megalong {command} has no {flag}"


def test_every_file_it_names_is_there():
    named = re.findall(r"(?:examples|slurm|tests|tools|megalong)/[\w./{},-]*\w\.(?:sh|yaml|png|py|sbatch)", README)
    for name in named:
        choices = re.search(r"\{(.+)\}", name)
        for choice in choices[1].split(",") if choices else [""]:
            file = re.sub(r"\{.+\}", choice, name)
            assert (ROOT / file).is_file(), file
    assert len(named) > 5


def test_every_folder_of_the_package_is_in_the_map():
    tree = README[README.index("    megalong/\n") :]
    for folder in (ROOT / "megalong").iterdir():
        if (folder / "__init__.py").is_file():
            assert re.search(rf"^      {folder.name}/ ", tree, re.MULTILINE), folder.name


def test_the_configuration_it_shows_is_valid(tmp_path):
    start = README.index("    task: pretrain\n")
    block = README[start:].split("\n\n")[0]
    (tmp_path / "run.yaml").write_text("\n".join(line[4:] for line in block.splitlines()))
    (config,) = load_config(tmp_path / "run.yaml")
    assert config.data_parallel_size(256) == 8
