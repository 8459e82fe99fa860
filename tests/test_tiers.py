"""The choice of slow tests: what a change may touch, and thirds that together are all the others."""

from __future__ import annotations

import pytest

from tests.tiers import ROOT, SINCE, THIRDS, Change, current_change, slow_files, subjects, taken

RESTART = ROOT / "tests" / "data" / "corpus" / "test_restart.py"
MATRIX = ROOT / "tests" / "training" / "test_matrix.py"


def _taken(*changed, turn=0):
    return taken(slow_files(), Change("abc", frozenset(changed), turn))


def test_every_slow_test_has_its_turn():
    turns = [_taken(turn=turn) for turn in range(THIRDS)]
    assert sorted(path for turn in turns for path in turn) == slow_files()
    assert {why for turn in turns for why in turn.values()} == {"in turn"}
    assert RESTART in slow_files()


def test_what_a_change_may_touch_is_taken():
    """The file itself, its package's modules, its imports, its helpers, and what its worker processes import."""
    for turn in range(THIRDS):
        for changed in ("tests/data/corpus/test_restart.py", "megalong/data/corpus/any.py", "megalong/data/indexed.py"):
            assert _taken(changed, turn=turn)[RESTART] == "touched"
        for changed in ("tests/pool.py", "tests/llama.py", "tests/training/workers.py", "megalong/training/loop.py"):
            assert _taken(changed, turn=turn)[MATRIX] == "touched"
    assert "megalong.training.setup" in subjects(MATRIX)


def test_what_it_does_not_touch_waits_for_its_turn():
    for changed in ("README.md", "megalong/quickstart/story.py"):
        assert sum(RESTART in _taken(changed, turn=turn) for turn in range(THIRDS)) == 1


def test_the_change_is_what_git_says(monkeypatch):
    change = current_change()
    if change is None:
        pytest.skip("git has no history here")
    monkeypatch.setenv(SINCE, "HEAD")
    now = current_change()
    assert now.turn == change.turn
    assert now.files <= change.files
    monkeypatch.setenv(SINCE, "no such commit")
    assert current_change() is None
