"""Settings of the environment, and a GPU for every process; GPUs are made up."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from megalong import cli
from megalong.errors import UserError
from megalong.runtime import distributed, gpus
from megalong.training import launch
from tests.llama import make_dataset, make_llama, run_settings

SEGMENTS = "expandable_segments:True"
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_torch_version", lambda: "2.11.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("2.6.0+cu124", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.10.1", "PYTORCH_CUDA_ALLOC_CONF"),
        ("2.11.0+cu130", "PYTORCH_ALLOC_CONF"),
        ("3.0.0a0+git1234", "PYTORCH_ALLOC_CONF"),
        ("", "PYTORCH_CUDA_ALLOC_CONF"),  # the one that every version reads
    ],
)
def test_the_allocator_is_told_by_the_name_that_torch_reads(
    version: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "_torch_version", lambda: version)
    assert gpus.missing_settings({"HOME": "/"}) == {name: SEGMENTS, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_setting_of_the_user_stays_under_either_name(name: str) -> None:
    environment = {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    gpus.set_environment(environment)
    assert environment == {name: "max_split_size_mb:512", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}


def test_the_version_of_torch_is_told_without_importing_it() -> None:
    assert gpus._torch_version() == str(torch.__version__)
    script = "import sys; from megalong import cli; cli.set_environment(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr


def test_every_command_begins_with_the_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (gpus.CONNECTIONS, gpus.ALLOCATOR, gpus.OLD_ALLOCATOR):
        monkeypatch.setenv(name, "")  # is put back afterwards
        monkeypatch.delenv(name)
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert gpus.missing_settings(gpus.os.environ) == {}


def test_more_processes_than_gpus_are_refused(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus.refuse_more_processes(2)
    with pytest.raises(UserError, match=r"^3 processes on \S+, where torch sees 2 GPUs, .*start at most 2 on a node"):
        gpus.refuse_more_processes(3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(UserError, match=r"sees 2 GPUs \(CUDA_VISIBLE_DEVICES is '4,5'\)"):
        gpus.refuse_more_processes(3)


def test_without_gpus_any_number_of_processes_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    gpus.refuse_more_processes()
    assert distributed.choose_device() == torch.device("cpu")


def test_a_process_of_a_launcher_is_given_its_own_gpu_or_refused(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.choose_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in range(4):  # those that have one as well: the run cannot begin without the others
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(UserError, match="4 processes") as refused:
            distributed.choose_device()
        assert refused.value.speaker == "node"
    assert distributed.choose_device("cpu") == torch.device("cpu")


def test_whoever_knows_of_a_mistake_tells_it_once(
    two_gpus: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Two nodes of two GPUs and three processes each, then ranks that were started without their number."""

    def told(rank: int, local: int) -> str:
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        arguments = ["evaluate", "perplexity", "--hf", str(tmp_path), "--data", "x", "--seq-length", "8"]
        assert cli.main(arguments) == 2
        return capsys.readouterr().err

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    said = [told(rank, rank % 3) for rank in range(6)]
    assert [bool(text) for text in said] == [True, False, False, True, False, False]
    assert "3 processes on" in said[3]
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert "3 processes on" in told(2, 2)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_train_refuses_before_it_starts_processes(
    device: str, two_gpus: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = run_settings(tmp_path / "run", make_llama(tmp_path / "hf"), make_dataset(tmp_path / "data"))
    tree["runtime"] = {**tree.get("runtime", {}), "device": device}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    started: list[int] = []
    monkeypatch.setattr(launch, "run_local", lambda arguments, nproc: started.append(nproc) or 0)
    status = cli.main(["train", str(tmp_path / "run.yaml"), "--nproc", "4", "training.global_batch_size=8"])
    assert (status, started) == ((2, []) if device == "auto" else (0, [4]))
    assert ("4 processes on" in capsys.readouterr().err) == (device == "auto")


def test_a_thread_uses_the_gpu_that_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    gpus.use(torch.device("cpu"))
    assert used == []
    gpus.use(torch.device("cuda", 3))
    assert used == [torch.device("cuda", 3)]
