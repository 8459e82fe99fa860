"""Read and write YAML without the traps of YAML 1.1.

PyYAML reads `3e-5` as text (its float needs a dot and a signed exponent), `010` as 8 and `4:00:00` as 14400, and it
silently keeps the second of two equal keys. Here every usual spelling of a number is a number, everything else is not,
and a duplicate key is refused with its line.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.runtime.folders import file_aside


class _Loader(yaml.SafeLoader):
    """SafeLoader that knows exponents and refuses duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str" and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"key {key.value} is not text", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key.value} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in (_INT, _FLOAT)]
    for first, known in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    _INT, re.compile(r"^[-+]?(?:0|[1-9][0-9_]*|0b[01_]+|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, source: str) -> Any:
    """Read YAML; a `UserError` names `source`, the line and the problem."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: {error.problem or error.context}; fix the YAML there") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{source}: cannot read it as YAML: {' '.join(str(error).split())}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The sections of a configuration file; `UserError` if it cannot be read or has no sections."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file; give the path of a YAML") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read it as a YAML text file: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: has no sections; a configuration starts with lines such as `run:` and `model:`")
    return tree


def config_text(config: Config) -> str:
    """The resolved configuration as YAML, defaults included; reading it gives an equal `Config`."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def dump_config(config: Config, path: str | Path) -> None:
    """Write `config_text` to a temporary file and rename it to `path`, so a file that exists is complete."""
    with file_aside(Path(path)) as aside:
        aside.write_text(config_text(config), encoding="utf-8")
