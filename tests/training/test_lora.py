"""Adapters against `peft`: gradients under every layout, what is read and written, and a run that resumes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from megalong.checkpoint.folder import find_checkpoint
from megalong.config.schema import Config
from megalong.errors import UserError
from megalong.hf.adapter import read_adapter_config
from megalong.training.start import find_start
from tests.evaluation.test_generate import greedy_of_transformers
from tests.llama import VOCABULARY, make_dataset, make_llama, run_settings
from tests.training.gradients import global_batches, plain_llama, plain_loss

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SOME = ("q_proj", "v_proj", "up_proj", "down_proj")  # fused layers of which a part has no adapter
KINDS: dict[str, dict[str, Any]] = {
    "all": {"rank": 4, "alpha": 12.0, "rs": False, "target_modules": ALL},
    "some, rs": {"rank": 5, "alpha": 12.0, "rs": True, "target_modules": SOME},
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A model, a dataset, and adapters that peft made, B drawn at random so that every gradient is one."""
    folder = tmp_path_factory.mktemp("lora")
    hf, data = make_llama(folder / "hf"), make_dataset(folder / "data")
    for name, lora in KINDS.items():
        torch.manual_seed(3)
        model = get_peft_model(
            plain_llama(hf),
            LoraConfig(
                r=lora["rank"],
                lora_alpha=lora["alpha"],
                use_rslora=lora["rs"],
                target_modules=list(lora["target_modules"]),
            ),
        )
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
        model.save_pretrained(folder / name)
    return hf, data, folder


def settings_of(sources, run: Path, kind: str, parallel: dict[str, Any] | None = None, **sections: Any):
    hf, data, folder = sources
    lora = {**KINDS[kind], "load": str(folder / kind)}
    return run_settings(run, hf, data, lora=lora, parallel=parallel or {}, **sections)


def peft_gradients(sources, kind: str, batch: torch.Tensor) -> dict[str, np.ndarray]:
    hf, _, folder = sources
    model = PeftModel.from_pretrained(plain_llama(hf), folder / kind, is_trainable=True)
    plain_loss(model, batch).backward()
    return {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one process": (1, {}, {}),
    "recompute": (1, {}, {"memory": {"recompute": "full"}}),
    "TP2": (2, {"tensor_model_parallel_size": 2}, {}),
    "TP2 SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}, {"memory": {"recompute": "full"}}),
    "CP2": (2, {"context_parallel_size": 2}, {}),
    "PP2 interleaved": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
        {},
    ),
    "PP2": (2, {"pipeline_model_parallel_size": 2}, {"memory": {"recompute": "full"}}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_pefts(kind, layout, sources, pool, tmp_path):
    world, parallel, sections = LAYOUTS[layout]
    # Not shared out: each rank is to hold every sum.
    settings = settings_of(sources, tmp_path, kind, {**parallel, "use_distributed_optimizer": False}, **sections)
    expected = peft_gradients(sources, kind, next(global_batches(settings)))
    seen = set()
    for slices in pool.run(world, "tests.training.gradients:adapter_gradients", settings):
        for one in slices:
            theirs = expected[one.tensor]
            theirs = theirs.take(range(one.start, one.start + one.values.shape[one.dim]), one.dim)
            assert np.abs(theirs).max() > 1e-5, one.tensor
            assert np.abs(one.values - theirs).max() <= 1e-5 * max(1.0, np.abs(theirs).max()), one.tensor
            assert np.abs(one.values - theirs).max() <= 1e-4 * np.abs(theirs).max(), one.tensor
            seen.add(one.tensor)
    assert seen == set(expected)


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


def test_a_run_learns_resumes_and_leaves_as_adapter_and_merged(sources, pool, tmp_path):
    """Four steps under TP 2 with a stop, against peft's own four steps of AdamW on one process."""
    settings = settings_of(
        sources, tmp_path / "run", "some, rs", {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        training={"train_iters": 4}, checkpoint={"save_interval": 2},
        optimizer={"lr": 1e-2, "lr_schedule": "constant", "min_lr": 0.0, "warmup_iters": 0, "clip_grad": 1.0},
    )  # fmt: skip
    pool.run(2, "tests.training.workers:train_run", settings, 3)
    again = {**settings, "parallel": {"pipeline_model_parallel_size": 2}}
    (resumed, _) = pool.run(2, "tests.training.workers:train_run", again)
    assert resumed["started"] == 2
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    pool.run(1, "tests.training.workers:export_both", str(tmp_path / "run"), str(adapter), str(merged))

    hf, _, folder = sources
    theirs = PeftModel.from_pretrained(plain_llama(hf), folder / "some, rs", is_trainable=True)
    learning = [parameter for parameter in theirs.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(learning, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    for batch in global_batches(settings):
        adam.zero_grad()
        plain_loss(theirs, batch).backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        adam.step()

    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (2, 48)))
    expected = logits(theirs, tokens)
    ours = logits(PeftModel.from_pretrained(plain_llama(hf), adapter), tokens)
    assert (ours - expected).abs().max() <= 1e-3
    assert (logits(plain_llama(hf), tokens) - expected).abs().max() > 0.1
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    assert (logits(whole, tokens) - ours).abs().max() <= 1e-4
    prompt = tokens[0, :20].tolist()
    (generated,) = pool.run(
        1, "tests.evaluation.workers:continuations", None, [(prompt, 30, 8)], find_checkpoint(tmp_path / "run")
    )
    assert generated == [greedy_of_transformers(merged, prompt, 30)]
    assert json.loads((adapter / "adapter_config.json").read_text())["use_rslora"] is True


def test_a_run_in_fp8_leaves_as_adapter_and_merged(sources, pool, tmp_path):
    settings = settings_of(
        sources, tmp_path / "run", "all",
        training={"train_iters": 3}, precision={"params_dtype": "bf16", "fp8": "hybrid"},
        optimizer={"lr": 1e-2, "lr_schedule": "constant", "min_lr": 0.0, "warmup_iters": 0},
    )  # fmt: skip
    pool.run(1, "tests.training.workers:train_run", settings)
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    pool.run(1, "tests.training.workers:export_both", str(tmp_path / "run"), str(adapter), str(merged))
    hf, _, folder = sources
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, VOCABULARY, (2, 48)))
    beside = logits(PeftModel.from_pretrained(plain_llama(hf), adapter), tokens)
    whole = logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), tokens)
    before = logits(PeftModel.from_pretrained(plain_llama(hf), folder / "all"), tokens)
    moved = (beside - before).norm()
    assert (whole - beside).norm() <= 0.2 * moved  # the base and the merged weights are rounded to bf16
    assert moved >= 0.05 * before.norm()


def test_fresh_adapters_change_nothing_and_do_not_depend_on_the_layout(sources, pool, tmp_path):
    hf, data, _ = sources
    lora = {"rank": 4, "target_modules": ALL}
    plain = run_settings(tmp_path / "plain", hf, data)
    one = run_settings(tmp_path / "one", hf, data, lora=lora)
    two = run_settings(
        tmp_path / "two", hf, data, lora=lora, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True}
    )
    (base,) = pool.run(1, "tests.training.workers:train_steps", plain, 1)
    (single,) = pool.run(1, "tests.training.workers:train_steps", one, 3)
    (double, _) = pool.run(2, "tests.training.workers:train_steps", two, 3)
    replicas = run_settings(tmp_path / "replicas", hf, data, lora=lora)
    (data_parallel, _) = pool.run(2, "tests.training.workers:train_steps", replicas, 3)
    assert single["loss"] == pytest.approx(data_parallel["loss"], rel=1e-5)
    assert single["norm"] == pytest.approx(data_parallel["norm"], rel=1e-5)
    assert single["loss"][0] == pytest.approx(base["loss"][0], rel=1e-6)
    assert single["loss"] == pytest.approx(double["loss"], rel=1e-5)
    assert single["norm"] == pytest.approx(double["norm"], rel=1e-5)
    assert single["loss"][2] != pytest.approx(single["loss"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"r": None}, "adapter_config.json is damaged"),
        ({"use_dora": True}, "has use_dora 'True', which is not read"),
        ({"bias": "all"}, "has bias 'all', which is not read"),
        ({"target_modules": ["lm_head"]}, r"LORA adapter of \['lm_head'\]; only LORA on q_proj"),
    ],
)
def test_what_is_no_plain_lora_is_told(changed, message, sources, tmp_path):
    folder = shutil.copytree(sources[2] / "all", tmp_path / "adapter")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(UserError, match=message) as error:
        read_adapter_config(folder)
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_adapters(sources, pool, tmp_path):
    """Weights of a run with adapters start another such run; without, with others or with two sources it is refused."""
    hf, data, folder = sources
    lora = {**KINDS["all"], "load": str(folder / "all")}
    first = run_settings(tmp_path / "first", hf, data, lora=lora, training={"train_iters": 3})
    pool.run(1, "tests.training.workers:train_run", first)
    load = {"load": {"checkpoint": str(tmp_path / "first")}}
    second = run_settings(tmp_path / "second", hf, data, lora=KINDS["all"], model=load)
    (losses,) = pool.run(1, "tests.training.workers:train_steps", second, 1)
    (fresh,) = pool.run(1, "tests.training.workers:train_steps", run_settings(tmp_path, hf, data), 1)
    assert losses["loss"][0] != pytest.approx(fresh["loss"][0], rel=1e-3)
    for changed, message in [
        ({}, "has rank 4, .* says no adapters; write the same, or start"),
        ({**KINDS["all"], "alpha": 13.0}, "alpha 12, .* says rank 4, alpha 13"),
        (lora, "has adapters of its own; drop one"),
    ]:
        with pytest.raises(UserError, match=message):
            find_start(Config.model_validate(run_settings(tmp_path / "third", hf, data, lora=changed, model=load)))
    with pytest.raises(UserError, match=r"lora: .*first.* says no adapters"):
        find_start(Config.model_validate(run_settings(tmp_path / "first", hf, data)))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4, "alpha": 12.0, "load": "nowhere"}, "lora.load: nowhere has no adapter_config.json"),
        ({"rank": 8, "alpha": 12.0, "load": "all"}, "lora.load: .*all has rank 4, .*lora says rank 8"),
        ({"rank": 4, "alpha": 12.0, "rs": True, "load": "all"}, "has rank 4, alpha 12, rs false.* says .*rs true"),
    ],
)
def test_an_adapter_that_does_not_fit_is_told(lora, message, sources, tmp_path):
    hf, data, folder = sources
    if lora["load"] == "all":
        lora = {**lora, "load": str(folder / "all")}
    with pytest.raises(UserError, match=message) as error:
        find_start(Config.model_validate(run_settings(tmp_path, hf, data, lora=lora)))
    assert "\n" not in str(error.value)
