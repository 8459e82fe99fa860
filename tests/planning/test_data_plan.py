"""What `data plan` says against what the samples of the run really hold."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from megalong import cli
from megalong.config.load import load_config
from megalong.data.length_plot import plot_lengths
from megalong.data.lengths import length_histogram
from megalong.data.samples.sampler import PackedSamples
from megalong.data.samples.splitting import documents_of_part
from megalong.errors import UserError
from megalong.hf.known import check_stages
from megalong.planning.data_plan import plan
from megalong.planning.data_plan_plot import plot_plan
from megalong.planning.stage_plan import Lengths, plan_stage
from tests.data.samples.test_packed_samples import dataset
from tests.llama import make_llama

LENGTHS = {"a": [40] * 30 + [9] * 60 + [3] * 40 + [70] * 12, "b": [20] * 50 + [95] * 16}
RUN = """
task: pretrain
run: {{name: long, dir: {folder}/run}}
model: {{load: {{hf: nowhere}}}}
data:
  seq_length: 32
  split: "80,20"
  mixture:
    - {{name: a, path: {folder}/a, weight: 3, lengths: {{drop_below: 5, below: 16, keep: 0.5, above: 35, repeat: 2}}}}
    - {{name: b, path: {folder}/b, weight: 1}}
optimizer: {{lr: 1.0e-4}}
training: {{train_iters: 60, global_batch_size: 4}}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, lengths in LENGTHS.items():
        dataset(tmp_path / name, lengths, first=0 if name == "a" else 10**6)
    (tmp_path / "run.yaml").write_text(RUN.format(folder=tmp_path))
    return tmp_path / "run.yaml"


def shown(run: Path, samples: int) -> tuple[PackedSamples, Counter[int]]:
    """Every token of the training stream and how often the first samples read it; tokens tell their document."""
    (config,) = load_config(run)
    data = config.data
    packed = PackedSamples(data.mixture, data.seq_length, config.run.seed, data.split)
    return packed, Counter(int(token) for k in range(samples) for token in packed.row(k).tokens[:-1])


def test_the_plan_is_what_the_samples_hold(run: Path) -> None:
    stage = plan_stage(load_config(run)[0])
    packed, tokens = shown(run, 240)
    a, b = stage.domains
    assert (a.share.samples, b.share.samples, stage.samples) == (180, 60, 240)
    assert sum(count for token, count in tokens.items() if token < 10**6) == a.share.tokens == 180 * 32
    seen = np.zeros(8)
    for token, count in tokens.items():
        if token < 10**6:
            seen[int(np.log2(LENGTHS["a"][token // 100]))] += count
    np.testing.assert_allclose(a.seen.tokens[:8], seen, atol=0.1 * seen.sum())
    assert a.seen.tokens.sum() == pytest.approx(180 * 32, rel=0.01)
    held = packed.streams[0].lengths[packed.streams[0].part_documents]
    assert (a.stored.documents.sum(), a.stored.tokens.sum()) == (len(held), held.sum())
    assert a.dropped == ((held < 5).sum(), held[held < 5].sum())
    assert a.held_out == 142 - len(held) == 28
    assert max(count for token, count in tokens.items() if token < 10**6) <= a.most_repeats
    assert max(count for token, count in tokens.items() if token >= 10**6) <= b.most_repeats <= b.share.epochs + 2


def test_pieces_and_cuts_are_counted_from_the_tokens(run: Path) -> None:
    """A document's tokens are consecutive numbers: a break in them is a border of documents."""
    stage = plan_stage(load_config(run)[0])
    packed, _ = shown(run, 0)
    longest, cut = [], 0
    for k in range(240):
        sample = packed.row(k).tokens[:]
        breaks = np.flatnonzero(np.diff(sample[:-1]) != 1) + 1
        longest.append(int(np.diff([0, *breaks, 32]).max()))
        lasts = {100 * n + length - 1 for n, length in enumerate(LENGTHS["a"])}
        lasts |= {10**6 + 100 * n + length - 1 for n, length in enumerate(LENGTHS["b"])}
        inside = sample[0] % 100 != 0, int(sample[-2]) not in lasts
        assert packed.row(k).cuts == inside
        cut += sum(inside)
    assert stage.longest.tolist() == longest
    assert stage.cut == pytest.approx(cut / 480)
    assert stage.padding == 0


@pytest.mark.parametrize("packing", ["best_fit", "whole"])
def test_waste_and_cuts_of_whole_documents_are_counted_from_the_samples(run: Path, packing: str) -> None:
    (config,) = load_config(run, [f"data.packing={packing}"])
    stage = plan_stage(config)
    data = config.data
    packed = PackedSamples(data.mixture, data.seq_length, config.run.seed, data.split, packing=packing)
    read = sum(packed.row(k).filled for k in range(240))
    assert stage.padding == pytest.approx(1 - read / (240 * 33))
    assert stage.padding > 0.01
    assert stage.cut == (0 if packing == "whole" else pytest.approx(np.mean([packed.row(k).cuts for k in range(240)])))
    tokens = {domain.share.name: domain.share.tokens for domain in stage.domains}
    assert tokens["a"] / tokens["b"] == pytest.approx(3, rel=0.03)
    if packing == "whole":
        assert stage.domains[0].dropped[0] > (np.array(LENGTHS["a"]) > 33).sum() * 0.6
        assert stage.longest.max() <= 20


def test_every_stage_is_printed_and_drawn(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.write_text(run.read_text() + "stages:\n  - {name: one, data: {seq_length: 16}}\n  - {name: two}\n")
    assert cli.main(["data", "plan", str(run), "training.train_iters=10", "--png", str(run.parent / "p.png")]) == 0
    text = capsys.readouterr().out
    assert "long-one: 10 steps of 4 samples of 16 tokens, 640 tokens in all, naive packing" in text
    assert "long-two: 10 steps of 4 samples of 32 tokens, 1,280 tokens in all" in text
    few = sum(LENGTHS["a"][n] < 5 for n in documents_of_part(142, "80,20", "train", "a"))
    assert f"never shown: {few} documents of a with {3 * few} tokens, dropped by its length rules" in text
    for name in ("one", "two"):
        with Image.open(run.parent / f"p-long-{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_what_the_run_would_refuse_the_plan_refuses(run: Path) -> None:
    with pytest.raises(UserError, match="leaves none for validation"):
        plan(str(run), ["data.split='99.9,0.1'", "evaluation.interval=5"])
    text = run.read_text()
    run.write_text(text.replace("repeat: 2", "repeat: 2, max_repeats: 3"))
    with pytest.raises(UserError, match="allows 3"):
        plan(str(run), ["training.train_iters=500"])
    run.write_text(text.replace(f"{run.parent}/b", "nowhere"))
    with pytest.raises(UserError, match="no dataset at 'nowhere'"):
        plan(str(run))


def drawn(monkeypatch: pytest.MonkeyPatch, draw: Callable[[], None]) -> Figure:
    """The figure that `draw` saves, laid out."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
    draw()
    figures[0].canvas.draw()
    return figures[0]


def assert_apart(texts: list[Text], figure: Figure) -> None:
    """No two of `texts` cover each other, and none reaches out of the picture."""
    boxes = [text.get_window_extent() for text in texts if text.get_text() and text.get_visible()]
    assert len(boxes) > 1
    assert not any(one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)


@pytest.mark.parametrize("longest", [64, 4096, 1 << 22])
@pytest.mark.parametrize("names", [["books", "code"], [f"a domain of a long name {n}" for n in range(14)]])
def test_labels_of_the_pictures_do_not_overlap(
    run: Path, monkeypatch: pytest.MonkeyPatch, longest: int, names: list[str]
) -> None:
    stage = plan_stage(load_config(run)[0])
    lengths = np.unique(np.geomspace(1, longest, 60).astype(np.int64))
    histogram = Lengths(np.zeros(63), np.zeros(63))
    np.add.at(histogram.documents, np.log2(lengths).astype(int), 1)
    np.add.at(histogram.tokens, np.log2(lengths).astype(int), lengths)
    domain = replace(stage.domains[0], stored=histogram, seen=histogram)
    domains = [replace(domain, share=replace(domain.share, name=name)) for name in names]
    data = stage.config.data.model_copy(update={"seq_length": longest})
    config = stage.config.model_copy(update={"data": data})
    large = replace(stage, config=config, domains=domains, longest=lengths)
    figure = drawn(monkeypatch, lambda: plot_plan(large, run.parent / "p.png"))
    (legend,) = figure.legends
    assert_apart([*figure.axes[0].get_xticklabels(), *legend.get_texts()], figure)
    assert_apart([*figure.axes[1].get_xticklabels(which="both"), *(axes.title for axes in figure.axes)], figure)
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)

    buckets = length_histogram(lengths)
    figure = drawn(monkeypatch, lambda: plot_lengths(buckets, "books", run.parent / "l.png"))
    assert_apart(figure.axes[0].get_xticklabels(), figure)


def test_positions_that_the_model_does_not_have_are_refused_as_in_training(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = make_llama(run.parent / "hf", max_position_embeddings=16)
    capsys.readouterr()
    assert cli.main(["data", "plan", str(run), f"model.load.hf={hf}"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megalong: error: data.seq_length 32: the model reads 16 positions, ")
    assert "write model.rope: {type: yarn, factor: 2}" in told
    check_stages(load_config(run, [f"model.load.hf={hf}", "model.rope={type: yarn, factor: 2}"]))
    stages = "stages:\n  - {name: one, data: {seq_length: 16}}\n  - {name: two, data: {seq_length: 64}}\n"
    run.write_text(run.read_text() + stages)
    assert cli.main(["data", "plan", str(run), f"model.load.hf={hf}"]) == 2
    assert "data.seq_length 64: the model reads 16 positions" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^data\.seq_length 64: the model reads 16 .* above 1e\+06"):  # raised once
        check_stages(load_config(run, [f"model.load.hf={hf}", "model.rope={rope_theta: 1e6}"]))
    check_stages(load_config(run))  # a model that is not here
    run.write_text(run.read_text().replace("64}", "64}, model: {rope: {rope_theta: 1e6}}"))
    check_stages(load_config(run, [f"model.load.hf={hf}"]))


def test_conversations_are_sent_to_the_command_that_shows_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = run.with_name("sft.yaml")
    sft.write_text(
        "{task: sft, run: {name: tuned, dir: x}, model: {load: {hf: nowhere}}, optimizer: {lr: 1.0e-4}, training: "
        "{train_iters: 1, global_batch_size: 1}, data: {seq_length: 8, packing: best_fit}, sft: {sources: [{name: a, "
        "path: a.jsonl}]}}"
    )
    assert cli.main(["data", "plan", str(sft)]) == 2
    told = capsys.readouterr().err
    assert (
        f"tuned has task sft, and data plan counts the documents of data.mixture only; see `megalong data inspect {sft}"
        in told
    )
