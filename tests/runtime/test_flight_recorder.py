"""What torch is told about recording collectives; that it then dumps them needs GPUs."""

from pathlib import Path

import pytest

from megalong.runtime.flight_recorder import record_collectives

NAMES = (
    "TORCH_FR_BUFFER_SIZE",
    "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE",
    "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
    "TORCH_NCCL_DUMP_ON_TIMEOUT",
)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment of our own, in which none of the variables is set."""
    import os

    mine = {name: value for name, value in os.environ.items() if name not in NAMES}
    monkeypatch.setattr(os, "environ", mine)
    return mine


def test_both_spellings_are_set_and_a_users_own_is_kept(tmp_path: Path, environment: dict[str, str]) -> None:
    environment["TORCH_FR_BUFFER_SIZE"] = "7"
    record_collectives(tmp_path / "run", 100)
    assert [environment[name] for name in NAMES] == ["7", "100", *[str(tmp_path / "run/nccl/rank_")] * 2, "1"]
    assert (tmp_path / "run" / "nccl").is_dir()


def test_zero_events_ask_for_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    record_collectives(tmp_path / "run", 0)
    assert not any(name in environment for name in NAMES)
    assert not (tmp_path / "run").exists()
