"""Positions that are skipped: which distances come, and where one reads of them."""

from pathlib import Path

import numpy as np
import pytest

from megalong import cli
from megalong.config.load import load_config
from megalong.config.mixture import Pose
from megalong.data.fingerprint import changes, fingerprint
from megalong.data.samples.pose import skipped_positions
from tests.data.samples.test_packed_samples import dataset

RUN = """
run: {{name: far, dir: {folder}/run}}
model: {{load: {{hf: nowhere}}}}
data: {{seq_length: 16, split: "80,20", mixture: [{{name: a, path: {folder}/a, weight: 1}}]}}
optimizer: {{lr: 1.0e-4}}
training: {{train_iters: 3, global_batch_size: 4}}
"""


def drawn_positions(length: int, target: int, chunks: int, seed: int, number: int) -> np.ndarray:
    """Of a sample whose documents see each other."""
    return skipped_positions(np.zeros(1, np.int64), length, Pose(target_length=target, chunks=chunks), seed, number)


@pytest.mark.parametrize("chunks", [2, 3, 8])
def test_all_distances_come(chunks: int) -> None:
    """The last position comes near the target, cuts are anywhere, and every distance is met."""
    drawn = np.array([drawn_positions(8, 64, chunks, 7, k) for k in range(2000)])
    assert drawn[:, -1].max() == 63
    met = {int(distance) for row in drawn for distance in np.abs(row[:, None] - row).ravel()}
    assert met == set(range(64))
    if chunks == 2:  # every place is cut as often, and the skip is uniform over 0 … 56
        np.testing.assert_allclose((np.diff(drawn, axis=1) > 1).mean(0), 56 / 57 / 7, rtol=0.2)
        counts = np.bincount(drawn[:, -1] - 7, minlength=57)
        assert ((counts - 2000 / 57) ** 2 / (2000 / 57)).sum() < 110  # chi-square of 56 degrees: 110 is past 1 in 10^5


def test_seed_and_sample_number_decide() -> None:
    drawn = {drawn_positions(100, 10**6, 2, seed, k).tobytes() for seed in (1, 2) for k in (0, 1, 2**32, 2**32 + 1)}
    assert len(drawn) == 8


def test_commands_and_fingerprint_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset(tmp_path / "a", [30] * 40)
    (run := tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    key = "data.pose.target_length=200"
    assert cli.main(["data", "plan", str(run)]) == 0
    assert "positions:" not in capsys.readouterr().out
    assert cli.main(["data", "plan", str(run), key]) == 0
    assert "2 chunks of each sample skip ahead to at most 199" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(run), key, "--samples", "1"]) == 0
    last = drawn_positions(16, 200, 2, 1234, 0)[-1]
    assert f" to {last:,}, " in capsys.readouterr().out
    assert last > 15
    before, after, other = (fingerprint(load_config(run, keys)[0]) for keys in ([], [key], [key, "data.pose.chunks=3"]))
    assert changes(before, after) == ["data.pose.target_length default → 200"]
    assert changes(after, other) == ["data.pose.chunks default → 3"]
