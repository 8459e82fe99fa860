"""`megalong data balance`: its figures counted pair by pair, its picture, its refusals."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megalong.attention.layout import TokenLayout, tokens_of
from megalong.config.load import load_config
from megalong.config.resolved import padded_length
from megalong.data.samples.sampler import PackedSamples
from megalong.errors import UserError
from megalong.planning.balance import balance
from megalong.planning.shares import KINDS, shares
from tests.attention.reference import visible
from tests.llama import make_dataset, make_llama

LENGTH, RANKS = 192, 4


@pytest.fixture
def run(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(
        f"""
run: {{name: small, dir: {tmp_path}/run}}
model: {{load: {{hf: {make_llama(tmp_path / "hf")}}}}}
data: {{seq_length: {LENGTH}, packing: masked, mixture: [{{name: a, path: {make_dataset(tmp_path / "d")}, weight: 1}}]}}
parallel: {{context_parallel_size: {RANKS}}}
optimizer: {{lr: 1.0e-4}}
training: {{train_iters: 1, global_batch_size: 1}}
"""
    )
    return file


def counted(run: Path, kind: str, window: int | None) -> float:
    """The fullest rank's pairs over the mean, mean over two samples, from the mask itself."""
    packed = PackedSamples([_Domain("a", str(run.parent / "d"))], LENGTH, 1234, "99,1")
    shares = []
    for k in range(2):
        starts = packed.row(k).starts
        starts = starts[starts < LENGTH]
        seen = visible(LENGTH, starts, window).numpy().sum(1)
        runs = TokenLayout(RANKS, kind, window).runs(LENGTH, starts)  # type: ignore[arg-type]
        pairs = [seen[tokens_of(held)].sum() for held in runs]
        shares.append(max(pairs) / np.mean(pairs))
    return float(np.mean(shares))


class _Domain:
    def __init__(self, name: str, path: str) -> None:
        self.name, self.path, self.weight, self.lengths = name, path, 1.0, None


@pytest.mark.parametrize("window", [None, 9])
def test_figures_are_those_of_the_mask(run: Path, window: int | None, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = [f"attention.window_size={window}"] if window else []
    balance(str(run), overrides, samples=2)
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    for kind in KINDS:
        assert lines[kind].split()[1] == f"{counted(run, kind, window):.3f}"
    assert [kind for kind in KINDS if "this run's" in lines[kind]] == ["balanced"]


def test_samples_are_as_long_as_the_run_pads_them(run: Path) -> None:
    """Sequence parallelism needs more than two chunks a rank: 192 tokens on 4 x 7 ranks become 224."""
    (config,) = load_config(str(run), ["parallel.tensor_model_parallel_size=7", "parallel.sequence_parallel=true"])
    assert shares(config, 1)[2] == padded_length(config) == 224


def test_the_picture_shows_every_rank(run: Path, tmp_path: Path) -> None:
    balance(str(run), samples=1, png=str(tmp_path / "pictures" / "b.png"))
    with Image.open(tmp_path / "pictures" / "b.png") as picture:
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert len([count for count, _ in colours if count > 2000]) >= RANKS + 1  # the ranks' and white


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (["parallel.context_parallel_size=1"], {}, "nothing to share"),
        ([], {"samples": 0}, "--samples 0"),
        ([], {"png": "/proc/none/b.png"}, "--png: /proc/none/b.png cannot be written"),
    ],
)
def test_refusals(run: Path, overrides: list[str], options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        balance(str(run), overrides, **options)  # type: ignore[arg-type]
