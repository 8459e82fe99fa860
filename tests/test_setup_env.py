"""`examples/setup_env.sh`: which environment a checkout's scripts use, and that another checkout's is not changed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A virtual environment whose pip says what it is asked for and does nothing."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    pip = next((tmp_path / "bare").glob("lib/python*/site-packages")) / "pip"
    pip.mkdir()
    (pip / "__init__.py").touch()
    (pip / "__main__.py").write_text("import sys\nprint('pip', *sys.argv[1:], file=sys.stderr)\n")
    return tmp_path / "bare"


class Clone:
    """A checkout as far as the script looks, with a `.venv` in which everything is installed."""

    def __init__(self, folder: Path, bare: Path) -> None:
        self.folder, self.venv = folder, folder / ".venv"
        (folder / "examples").mkdir(parents=True)
        for name in ("examples/setup_env.sh", "setup.py", "constraints.txt"):
            shutil.copy(ROOT / name, folder / name)
        shutil.copytree(bare, self.venv, symlinks=True)
        self.install(self.venv)

    def install(self, venv: Path, how: str = "editable") -> None:
        """What pip would leave of this checkout in `venv`, and the script's stamp."""
        packages = next(venv.glob("lib/python*/site-packages"))
        shutil.rmtree(packages / "megalong-0.1.0.dist-info", ignore_errors=True)
        (packages / "megalong-0.1.0.dist-info").mkdir()
        (packages / "megalong-0.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: megalong\n")
        if how == "editable":
            told = {"url": self.folder.as_uri(), "dir_info": {"editable": True}}
            (packages / "megalong-0.1.0.dist-info" / "direct_url.json").write_text(json.dumps(told))
        sums = subprocess.run(["cksum", "setup.py", "constraints.txt"], cwd=self.folder, capture_output=True, text=True)
        (venv / ".megalong-installed").write_text(f"cpu {sums.stdout}".rstrip() + f" {self.folder}\n")

    def source(self, active: Path | None) -> subprocess.CompletedProcess[str]:
        """Source the script under an active environment; its python is printed."""
        no_gpu = self.folder / "bin"
        no_gpu.mkdir(exist_ok=True)
        (no_gpu / "nvidia-smi").write_text("#!/bin/sh\nexit 1\n")
        (no_gpu / "nvidia-smi").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
        environment = {**kept, "PATH": f"{no_gpu}:{os.environ['PATH']}"}
        if active is not None:
            environment |= {"VIRTUAL_ENV": str(active), "PATH": f"{active / 'bin'}:{environment['PATH']}"}
        code = "set -euo pipefail; source examples/setup_env.sh; command -v python"
        return subprocess.run(["bash", "-c", code], cwd=self.folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def clones(tmp_path: Path, bare: Path) -> tuple[Clone, Clone]:
    return Clone(tmp_path / "first one", bare), Clone(tmp_path / "second", bare)


def state(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.mark.parametrize("how", ["editable", "copied"])
def test_an_environment_of_another_checkout_is_left_as_it_is(clones: tuple[Clone, Clone], how: str) -> None:
    first, second = clones
    first.install(first.venv, how)
    before = state(first.venv)
    done = second.source(active=first.venv)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(second.venv / "bin" / "python")
    (line,) = done.stderr.splitlines()
    where = first.folder if how == "editable" else first.venv
    assert line.startswith(f"set-up: the active environment {first.venv} has megalong of {where}")
    assert "is not changed; using" in line
    assert f"pip install -e {second.folder}" in line
    assert state(first.venv) == before


def test_a_checkouts_own_environments_are_used_without_a_word(clones: tuple[Clone, Clone], bare: Path) -> None:
    first, _ = clones
    first.install(bare)
    for active in (first.venv, bare, None):
        done = first.source(active)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.strip() == str((active or first.venv) / "bin" / "python")


@pytest.mark.parametrize("case", ["its own, pointed elsewhere by hand", "of a checkout that is gone", "bare"])
def test_what_is_changed_is_told(clones: tuple[Clone, Clone], bare: Path, case: str) -> None:
    """Whatever its stamp says: a hand may have installed another checkout since."""
    first, second = clones
    active = second.venv if case.startswith("its own") else bare
    if case != "bare":
        first.install(active)
    if case.startswith("of a checkout"):
        shutil.rmtree(first.folder)
    (active / ".megalong-installed").write_bytes((second.venv / ".megalong-installed").read_bytes())
    done = second.source(active)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(active / "bin" / "python")
    assert f"set-up: installing megalong and its dependencies into {active}" in done.stderr
    assert f"-e {second.folder}[test]" in done.stderr
    assert (f"{active} has megalong of {first.folder}" in done.stderr) == case.startswith("its own")
