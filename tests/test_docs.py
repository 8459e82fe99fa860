"""README, CONTRIBUTING and docs/ are true: commands, flags, files, links, keys and configurations exist."""

import re
import shlex
from pathlib import Path

import pytest

from megalong.cli import build_parser
from megalong.config.load import load_config
from megalong.config.schema import Config
from megalong.config.text import parse_yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
TEXT = "\n".join(page.read_text() for page in PAGES)
COMMAND = r"megalong ((?:[a-z][a-z-]*\b ?)+)"
CODE = re.compile(r"`[^`\n]+`|^ {4,}.*$", re.MULTILINE)
COMMANDS = sorted({found for code in CODE.findall(TEXT) for found in re.findall(rf"^[` ]*{COMMAND}", code)})


def _help(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        build_parser().parse_args([*command.split(), "--help"])
    assert end.value.code == 0, command
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    _help(command, capsys)


def test_the_commands_are_found() -> None:
    assert len(COMMANDS) > 12


def test_every_flag_of_a_command_exists(capsys: pytest.CaptureFixture[str]) -> None:
    checked = 0
    for code in CODE.findall(TEXT):
        for command, rest in re.findall(rf"^[` ]*{COMMAND}([^`#]*)", code):
            known = _help(command, capsys)
            for flag in re.findall(r"--[a-z-]+", rest):
                assert flag in known, f"megalong {command} has no {flag}"
                checked += 1
    assert checked > 20


def test_whole_commands_are_understood() -> None:
    """Indented lines that begin with `megalong` parse as they stand."""
    lines = [line.split("#")[0] for line in re.findall(r"^    (megalong .*)$", TEXT, re.MULTILINE)]
    for line in lines:
        build_parser().parse_args(shlex.split(line)[1:])
    assert len(lines) > 15


def test_every_configuration_in_a_command_is_there_or_the_readers_own() -> None:
    for name in re.findall(r"(?:examples|slurm)/[\w./-]+\.(?:yaml|sbatch)", TEXT):
        assert (ROOT / name).is_file(), name


def test_every_file_is_there() -> None:
    named = re.findall(
        r"(?:examples|slurm|tests|tools|megalong|docs)/[\w./{},-]*\w\.(?:sh|yaml|png|py|sbatch|md)", TEXT
    )
    for name in named:
        choices = re.search(r"\{(.+)\}", name)
        for choice in choices[1].split(",") if choices else [""]:
            file = re.sub(r"\{.+\}", choice, name)
            assert (ROOT / file).is_file(), file
    assert len(named) > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, heading = target.partition("#")
        assert not file or (page.parent / file).is_file(), target
        if heading:
            other = (page.parent / file if file else page).read_text()
            headings = [
                line.lstrip("# ").lower().replace(" ", "-") for line in other.splitlines() if line.startswith("#")
            ]
            assert heading in headings, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_page_is_reachable_from_the_readme(page: Path) -> None:
    name = str(page.relative_to(ROOT))
    assert page == PAGES[0] or f"({name})" in README


def test_every_key_exists() -> None:
    """`section.key` in backticks is a key of the configuration."""
    sections = Config.model_fields
    found = [
        (section, key)
        for section, key in re.findall(r"`(\w+)\.(\w+)(?:: [^`]*)?`", TEXT)
        if section in sections and key not in ("py", "yaml")
    ]
    for section, key in found:
        known = sections[section].annotation.model_fields  # type: ignore[union-attr]
        assert key in known, f"{section}.{key}"
    assert len(found) > 10


def test_architecture_names_files_that_exist() -> None:
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) != 2:
            continue
        folder = "data"
        for name in re.findall(r"`([\w/*]+(?:\.py|/))`", cells[1]):
            path = name.removeprefix("megalong/").rstrip("/")
            whole = path if "/" in name.rstrip("/") else f"{folder}/{path}"
            folder = whole.rpartition("/")[0] or folder
            assert list((ROOT / "megalong").glob(whole)), name


def test_every_folder_of_the_package_is_in_the_map() -> None:
    tree = README[README.index("    megalong/\n") :]
    for folder in (ROOT / "megalong").iterdir():
        if (folder / "__init__.py").is_file():
            assert re.search(rf"^      {folder.name}/ ", tree, re.MULTILINE), folder.name


def _indented_blocks(page: Path) -> list[str]:
    blocks = re.findall(r"(?:^    .*\n)+", page.read_text(), re.MULTILINE)
    return ["\n".join(line[4:] for line in block.splitlines()) for block in blocks]


EXAMPLE = next(block for block in _indented_blocks(PAGES[0]) if block.startswith("task: pretrain"))
CONFIGURATIONS = [
    pytest.param(block, id=f"{page.stem}-{number}")
    for page in PAGES
    for number, block in enumerate(_indented_blocks(page))
    if block.split(":")[0] in Config.model_fields
]


@pytest.mark.parametrize("block", CONFIGURATIONS)
def test_every_configuration_shown_is_valid(block: str) -> None:
    """A part of one replaces the sections of the README's."""
    part = parse_yaml(block, "docs")
    tree = {**parse_yaml(EXAMPLE, "README"), **part}
    tree["data"] = {"seq_length": 1048576, **tree["data"]}
    if part.get("task", "pretrain") == "pretrain":
        tree["data"] = {**parse_yaml(EXAMPLE, "README")["data"], **tree["data"]}
    tree["model"] = {"load": {"hf": "x"}, **tree["model"]}
    Config.model_validate(tree)


def test_the_readmes_configuration_fits_256_gpus(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(EXAMPLE)
    (config,) = load_config(tmp_path / "run.yaml")
    assert config.data_parallel_size(256) == 8


def test_the_configurations_are_found() -> None:
    assert len(CONFIGURATIONS) > 8


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170
