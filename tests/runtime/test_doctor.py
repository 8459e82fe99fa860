"""What the doctor says about packages that are missing, broken or not what their name says."""

import importlib.metadata
import json
import sys
from pathlib import Path

import pytest

import megalong
from megalong.runtime import doctor


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """Pretend that exactly these packages are installed: a version each, and the folders of their modules."""

    def pretend(versions: dict[str, str], *folders: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr(importlib.metadata, "version", version)
        for folder in folders:
            (tmp_path / folder).mkdir(parents=True)
            package = tmp_path / folder.split("/")[0]
            (package / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "apex", raising=False)

    return pretend


def test_nothing_is_installed(installed):
    installed({})
    rows = dict(doctor.report())
    assert rows["torch"] == "missing: pip install torch"
    assert rows["transformer-engine"].startswith("not installed; optional")
    assert rows["GPU"] == "none that torch can use"


def test_pypis_apex_is_not_nvidias(installed):
    installed({"apex": "0.9.10.dev0"}, "apex/lib")
    rows = dict(doctor.report())
    assert rows["apex"] == "0.9.10.dev0, but this is PyPI's web toolkit, not NVIDIA's: pip uninstall apex"
    assert not doctor.is_nvidia_apex()


def test_nvidias_apex_is_used(installed):
    installed({"apex": "0.1"}, "apex/multi_tensor_apply")
    rows = dict(doctor.report())
    assert rows["apex"] == "0.1, NVIDIA's"
    assert doctor.is_nvidia_apex()


def test_the_running_megalong_is_told_apart_from_an_installed_one(tmp_path, monkeypatch):
    root = Path(megalong.__file__).parents[1]
    told = doctor.report()[1]
    assert told[0] == "  megalong"
    assert told[1].startswith(f"{megalong.__version__}, checkout {root}")
    info = tmp_path / "site" / "megalong-0.0.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megalong\n")
    other = (tmp_path / "an other").as_uri()
    (info / "direct_url.json").write_text(json.dumps({"url": other, "dir_info": {"editable": True}}))
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert doctor.report()[1][1] == (
        f"{megalong.__version__}, checkout {root} (this environment has {tmp_path}/an other installed)"
    )
    (info / "direct_url.json").write_text(json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}}))
    assert doctor.report()[1][1] == f"{megalong.__version__}, checkout {root}"
