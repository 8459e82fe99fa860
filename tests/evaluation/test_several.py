"""Several models on one text: each as transformers measures it, told apart by name, never written over one another."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from megalong.cli import main
from megalong.errors import UserError
from megalong.evaluation import plots
from megalong.evaluation.buckets import bucket_edges
from megalong.evaluation.perplexity import PerplexityResult, load_results
from megalong.evaluation.source import distinct_names, find_model, find_models, given_text, held_out_text, open_text
from tests.llama import make_dataset, make_llama, run_settings

LENGTH, SAMPLES = 256, 2
YARN = "{type: yarn, factor: 4, original_max_position_embeddings: 64}"


@pytest.fixture(scope="module")
def sources(tmp_path_factory, pool):
    """Two models that lie under the same name, a dataset, and a run of each of two datasets on the first."""
    folder = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(("one", "two")):
        make_llama(folder / name / "hf", seed=seed)
    data, other = make_dataset(folder / "data"), make_dataset(folder / "other", seed=1)
    tree = run_settings(
        folder / "runs" / "mine", folder / "one" / "hf", data, training={"train_iters": 2},
        optimizer={"warmup_iters": 1}, checkpoint={"save_interval": 1},
    )  # fmt: skip
    tree["data"]["mixture"].append({"name": "more", "path": str(other), "weight": 0.5})
    pool.run(1, "tests.training.workers:train_run", tree)
    (folder / "runs" / "mine" / "config.yaml").write_text(yaml.safe_dump(tree))
    return folder


def of_transformers(hf: Path, packed: Any, **config: Any) -> list[float]:
    model = AutoModelForCausalLM.from_pretrained(hf, **config)
    samples = torch.stack([torch.from_numpy(packed.row(k).tokens[:]) for k in range(SAMPLES)])
    with torch.no_grad():
        logits = model(samples[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), samples[:, 1:], reduction="none")
    return [losses[:, low:high].mean().item() for low, high in pairwise(bucket_edges(LENGTH))]


def measure(pool, *words: str | Path) -> tuple[int, str, str]:
    sizes = ("--seq-length", LENGTH, "--samples", SAMPLES)
    command = ["evaluate", "perplexity", *map(str, (*words, *sizes))]
    ((status, out, errors),) = pool.run(1, "tests.training.workers:command", command)
    return status, out, errors


def test_models_share_a_table_and_each_is_transformers(sources, pool, tmp_path) -> None:
    one, two, run, out = sources / "one/hf", sources / "two/hf", sources / "runs/mine", tmp_path / "out"
    models = ("--hf", one, "--hf", two, "--hf", one, "--rope", YARN, "--checkpoint", run)
    status, printed, errors = measure(pool, *models, "--data", sources / "data", "--output", out)
    assert status == 0, errors
    results = load_results(out / "perplexity.json")
    names = [result.name for result in results]
    assert names == ["one/hf", "two/hf", "one/hf (yarn × 4)", "runs/mine"]
    rows = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")]
    assert rows[2:] == names
    assert (out / "perplexity.md").read_text().strip() in printed
    assert "--data" in errors
    assert "was trained on it (data.mixture: only), so it is not held-out text; write --held-out only" in errors
    assert {result.text for result in results} == {"data (training data of mine)"}

    packed = open_text(given_text(str(sources / "data")), LENGTH, SAMPLES, find_model(hf=one))
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    scaled = {"rope_parameters": yarn, "max_position_embeddings": 256}
    expected = [of_transformers(one, packed), of_transformers(two, packed), of_transformers(one, packed, **scaled)]
    for result, losses in zip(results[:3], expected, strict=True):
        assert result.nll == pytest.approx(losses, rel=1e-5)
    assert results[2].nll != pytest.approx(expected[0], rel=1e-2)
    with pytest.raises(UserError, match=r"contains 4 models \(one/hf, two/hf, "):
        PerplexityResult.load(out / "perplexity.json")

    before = {path: path.read_bytes() for path in out.iterdir()}
    again = ("--hf", two, "--data", sources / "data", "--output", out)
    status, _, errors = measure(pool, *again)
    assert (status, errors.count("\n")) == (2, 1)
    assert f"--output: {out}/perplexity.json exists already; give another, or write --overwrite" in errors
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert measure(pool, *again, "--overwrite")[0] == 0
    assert PerplexityResult.load(out / "perplexity.json").text == "data"


def test_a_scaling_is_for_the_model_before_it_or_for_all(sources) -> None:
    one, two = str(sources / "one/hf"), str(sources / "two/hf")
    found = find_models([("rope", "{type: ntk, factor: 2}"), ("hf", one), ("hf", two), ("rope", "{rope_theta: 5.0e5}")])
    assert [source.architecture.rope.type for source in found] == ["ntk", "none"]
    assert found[1].architecture.rope.rope_theta == 5e5
    assert distinct_names(found) == ["hf (ntk × 2)", "hf (none, base 500000)"]


def test_names_tell_models_apart(sources, tmp_path) -> None:
    run = sources / "runs/mine"
    steps = sorted((run / "checkpoints").iterdir())
    twice = shutil.copytree(run, tmp_path / "runs" / "mine")
    models = [find_model(step) for step in steps] + [find_model(twice)]
    assert distinct_names(models[1:]) == [str(run.resolve()) + " step 2", str(twice.resolve()) + " step 2"]
    assert distinct_names(models[:2]) == ["mine step 1", "mine step 2"]
    assert distinct_names([models[0], models[0]]) == [f"{run.resolve()} step 1 (1)", f"{run.resolve()} step 1 (2)"]


def test_what_a_run_held_out_is_what_it_never_trained_on(sources, pool, tmp_path) -> None:
    run = sources / "runs/mine"
    models = [find_model(hf=sources / "two/hf"), find_model(run)]
    text = held_out_text("only", models)
    assert text.name == "held-out text of mine (only)"
    assert [dataset.path for dataset in text.datasets] == [str(sources / "data")]
    packed = open_text(text, LENGTH, 1, models[1])
    trained = open_text(given_text(str(sources / "data")), LENGTH, 1, models[1])
    kept = packed.streams[0].part_documents
    assert 0 < len(kept) < len(trained.streams[0].part_documents) / 5
    from megalong.data.samples.sampler import PackedSamples

    config = yaml.safe_load((run / "config.yaml").read_text())
    learnt = PackedSamples(text.datasets, 64, 1, config["data"]["split"], "train").streams[0].part_documents
    assert sorted([*kept.tolist(), *learnt.tolist()]) == list(range(60))
    words = ("--checkpoint", run, "--hf", sources / "two/hf", "--held-out", "all")
    status, _, errors = measure(pool, *words, "--output", tmp_path / "out")
    assert status == 0, errors
    assert "it is not known whether" in errors
    both = held_out_text("all", models)
    assert [(dataset.name, dataset.weight) for dataset in both.datasets] == [("only", 1.0), ("more", 0.5)]
    ours = load_results(tmp_path / "out/perplexity.json")[1]
    assert ours.text == both.name == "held-out text of mine"
    packed = open_text(both, LENGTH, SAMPLES, models[0])
    assert ours.nll == pytest.approx(of_transformers(sources / "two/hf", packed), rel=1e-5)
    with pytest.raises(UserError, match=r"--samples 50: the held-out text of mine has only \d samples of 256 tokens"):
        open_text(both, LENGTH, 50, models[0])
    with pytest.raises(UserError, match="has no such domain; write one of only, more, or all"):
        held_out_text("nothing", models)


def test_pictures_of_data_are_not_written_over(sources, tmp_path, capsys) -> None:
    picture = tmp_path / "p.png"
    command = ["data", "inspect", str(sources / "data"), "--png", str(picture)]
    assert main(command) == 0
    before = picture.read_bytes()
    assert main(command) == 2
    assert f"--png: {picture} exists already; give another, or write --overwrite" in capsys.readouterr().err
    assert picture.read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    config = tmp_path / "run.yaml"
    config.write_text((sources / "runs/mine/config.yaml").read_text())
    for words in (["data", "plan", str(config)], ["data", "balance", str(config), "parallel.context_parallel_size=2"]):
        assert main([*words, "--png", str(picture)]) == 2
        assert main([*words, "--png", str(picture), "--overwrite"]) == 0


def drawn(results: list[PerplexityResult], path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The axes of a picture as it is saved."""
    kept: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), save(self, *a, **k)))
    plots.plot_perplexity(results, path)
    return kept[0].axes[0]


def result(name: str, values: list[float | None], text: str = "books") -> PerplexityResult:
    nll = [None if value is None else float(np.log(value)) if value < 1e300 else 1e4 for value in values]
    return PerplexityResult(name, name, ["data/x"], 256, 2, [0, 64, 128, 256], nll, [1, 1, 1], text)


def test_the_axis_names_the_text_and_tells_small_differences(tmp_path, monkeypatch) -> None:
    axes = drawn([result("a", [3.6, 3.0, 2.6]), result("b", [3.5, 3.1, 2.61])], tmp_path / "p.png", monkeypatch)
    assert axes.get_ylabel() == "perplexity of books (lower is better)"
    low, high = axes.get_ylim()
    shown = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len([tick for tick in shown if 2.6 <= tick <= 3.6]) >= 5
    labels = [axes.yaxis.get_major_formatter()(tick, 0) for tick in shown]
    assert len(set(labels)) == len(labels)
    assert all(float(label) == pytest.approx(tick) for label, tick in zip(labels, shown, strict=True))
    ends = sorted(text.xy[1] for text in axes.texts)
    assert ends[1] / ends[0] > (high / low) ** 0.045  # written apart


def test_a_picture_holds_any_number_of_models_and_any_values(tmp_path, monkeypatch) -> None:
    many = [result(f"m{number}", [10.0 + number, 11, 12]) for number in range(9)]
    worst = result("worst", [None, 1e400, 1e400])
    axes = drawn([*many, worst, result("flat", [12.0, 12.0, 12.0])], tmp_path / "p.png", monkeypatch)
    assert len(axes.lines) == 11
    assert len({(line.get_color(), line.get_linestyle()) for line in axes.lines}) == 11
    assert "worst (infinite)" in [line.get_label() for line in axes.lines]
    drawn([worst], tmp_path / "q.png", monkeypatch)


@pytest.mark.parametrize("span", [1.001, 1.05, 1.4, 3, 4.9, 5.1, 11, 40, 800, 1e5, 1e9, 1e40])
@pytest.mark.parametrize("low", [1.0003, 2.57, 9.7, 4321.0])
def test_every_range_has_ticks(low: float, span: float) -> None:
    found = plots.ticks(low, low * span)
    assert 3 <= len(found) <= 13
    assert all(low <= tick <= low * span for tick in found)


def test_results_of_earlier_versions_are_read(tmp_path) -> None:
    result("a", [2.0, 2.0, 2.0]).save(tmp_path / "r.json")
    whole = json.loads((tmp_path / "r.json").read_text())
    del whole["text"]
    (tmp_path / "r.json").write_text(json.dumps(whole))
    assert PerplexityResult.load(tmp_path / "r.json").text == ""
