"""Two trainings in one run.dir: the second is refused; what only reads goes on; a killed one resumes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalong import cli
from megalong.checkpoint.folder import whole_checkpoints
from megalong.training import events
from tests.llama import make_dataset, make_llama
from tests.ranks import end_ranks, finish, start_ranks
from tests.training.test_processes import ENDLESS, configuration, wait_for


@pytest.mark.slow
def test_a_second_training_is_refused_until_the_first_has_ended(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    sources = make_llama(tmp_path / "llama", num_hidden_layers=2), make_dataset(tmp_path / "data")
    file = configuration(tmp_path, sources, ENDLESS, checkpoint={"save_interval": 2})
    ranks = start_ranks(["train", str(file)], 2, log)
    try:
        wait_for(lambda: bool(whole_checkpoints(run)))
        (run / "REQUEUE").touch()  # as if it were just leaving
        for more in ([], ["--nproc", "2"]):
            assert cli.main(["train", str(file), *more]) == 2
            assert f"(process {ranks[0].pid} on host " in capfd.readouterr().err
        assert (run / "REQUEUE").exists()
        export = ["checkpoint", "export", "--checkpoint", str(run), "--output", str(tmp_path / "out")]
        assert finish(start_ranks(export, 1, tmp_path / "export.log")) == [0]
        assert all(rank.is_alive() for rank in ranks)
    finally:
        end_ranks(ranks)
    assert (run / "lock").exists()
    step = int(whole_checkpoints(run)[-1].name[5:])
    last = start_ranks(["train", str(file), f"training.train_iters={step + 1}", "data.allow_change=true"], 2, log)
    assert finish(last) == [0, 0], log.read_text()
    assert [event["kind"] for event in events.read(run) if event["kind"] != "save"] == ["start", "resume", "finish"]
    assert not (run / "lock").exists()
