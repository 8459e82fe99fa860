"""The published recipes against the paper's table (arXiv 2504.06214) and the rules of the layout."""

import math
from pathlib import Path

import pytest

from megalong.config.checks import check_model, check_world
from megalong.config.load import load_config
from megalong.config.rope import RopeSettings
from megalong.config.schema import Config
from tests.architectures import LLAMA_8B

RECIPES = Path(__file__).parents[1] / "examples" / "ultralong"
WORLD = 256
# length: (tokens, YaRN s, context parallel, data parallel, temperature of YaRN 0.1 ln(s) + 1 as tabulated)
PUBLISHED = {
    "1m": (1048576, 128, 4, 8, 1.4852),
    "2m": (2097152, 256, 16, 2, 1.5545),
    "4m": (4194304, 512, 16, 2, 1.6238),
}
LLAMA_31_8B = LLAMA_8B.model_copy(
    update={"rope": RopeSettings(type="llama3", rope_theta=500000.0, factor=8.0, original_max_position_embeddings=8192)}
)


def recipe(length: str) -> Config:
    (config,) = load_config(RECIPES / length / "cpt.yaml")
    return config


def test_there_is_a_recipe_for_each_published_length():
    assert sorted(path.parent.name for path in RECIPES.glob("*/cpt.yaml")) == sorted(PUBLISHED)


@pytest.mark.parametrize("length", PUBLISHED)
def test_published_numbers(length):
    tokens, factor, context, data, temperature = PUBLISHED[length]
    config = recipe(length)
    rope = config.model.rope
    assert config.data.seq_length == tokens
    assert (rope.type, rope.factor, rope.beta_fast, rope.beta_slow) == ("yarn", factor, 4, 1)
    assert rope.original_max_position_embeddings == 8192
    assert 0.1 * math.log(rope.factor) + 1 == pytest.approx(temperature, abs=1e-4)
    assert (rope.attention_factor, rope.mscale, rope.rope_theta) == (None, None, None)
    assert config.parallel.tensor_model_parallel_size == 8
    assert config.parallel.context_parallel_size == context
    assert config.data_parallel_size(WORLD) == data
    assert (config.optimizer.lr, config.optimizer.adam_beta1, config.optimizer.adam_beta2) == (3e-5, 0.9, 0.95)
    assert (config.data.separator, config.data.packing) == ("<s>", "naive")


def tokens_per_step(config):
    return config.training.global_batch_size * config.data.seq_length


@pytest.mark.parametrize("length", PUBLISHED)
def test_layout_holds_llama_31_8b_on_256_gpus(length):
    config = recipe(length)
    check_world(config, WORLD)
    check_model(config, LLAMA_31_8B)
    trained = LLAMA_31_8B.with_rope(config.model.rope)
    assert trained.max_position_embeddings == config.data.seq_length
    assert trained.rope.rope_theta == 500000.0


@pytest.mark.parametrize("length", PUBLISHED)
def test_a_run_is_about_a_billion_tokens(length):
    config = recipe(length)
    assert 0.95e9 < tokens_per_step(config) * config.training.train_iters < 1.3e9


def test_the_published_4m_run():
    training = recipe("4m").training
    assert (training.train_iters, training.global_batch_size) == (150, 2)


@pytest.mark.parametrize("length", PUBLISHED)
def test_every_number_says_where_it_comes_from(length):
    """A line that sets a number says published or chosen, beside it or on the line above."""
    lines = (RECIPES / length / "cpt.yaml").read_text().splitlines()
    for above, line in zip(["", *lines], lines, strict=False):
        code, _, comment = line.partition(" #")
        if any(char.isdigit() for char in code) and not line.lstrip().startswith(("#", "-")):
            assert "published" in comment + above or "chosen" in comment + above, line


def test_lora_recipes_hold():
    folder = RECIPES.parent / "lora"
    ((small,), (large,)) = (load_config(folder / name) for name in ("small.yaml", "8b-32k.yaml"))
    assert sorted(path.name for path in folder.iterdir()) == ["8b-32k.yaml", "small.yaml"]
    assert (small.lora.scale, large.lora.scale) == (2.0, 2.0)
    check_world(small, 1)
    check_world(large, 8)
    check_model(large, LLAMA_31_8B)


def test_the_prolong_recipe_holds():
    """64K at base 8e6, then 512K at base 1.28e8 with 64K packs beside: 20 billion tokens each."""
    first, second = load_config(RECIPES.parent / "prolong" / "cpt.yaml")
    for config, base, batch, length in ((first, 8e6, 4, 64), (second, 1.28e8, 8, 512)):
        check_world(config, 64)
        check_model(config, LLAMA_31_8B)
        assert (config.model.rope.rope_theta, config.data.seq_length) == (base, length * 1024)
        assert tokens_per_step(config) == batch * 2**20
        assert 20e9 < tokens_per_step(config) * config.training.train_iters < 21.1e9
        assert config.optimizer.min_lr == pytest.approx(config.optimizer.lr / 10)
        assert config.optimizer.warmup_iters == config.training.train_iters // 10
        assert sum(domain.weight for domain in config.data.mixture) == pytest.approx(1)
    assert {one.name: one.weight for one in second.data.mixture if one.seq_length is None} == {
        "code-512k": 0.15,
        "books-512k": 0.05,
    }
    assert {one.seq_length for one in second.data.mixture} == {None, 65536}


def test_fine_tuning_recipes_hold():
    """Published: batch 128, learning rate 5e-6, 8K tokens, TP 8 (UltraLong); 4M tokens x 250, 2e-5, 64K (ProLong)."""
    for length in PUBLISHED:
        (config,) = load_config(RECIPES / length / "sft.yaml")
        check_world(config, WORLD)
        check_model(config, LLAMA_31_8B)
        assert (config.training.global_batch_size, config.optimizer.lr, config.sft.max_length) == (128, 5e-6, 8192)
        assert config.model.load.checkpoint == recipe(length).run.dir
    (prolong,) = load_config(RECIPES.parent / "prolong" / "sft.yaml")
    check_world(prolong, 8)
    check_model(prolong, LLAMA_31_8B)
    assert tokens_per_step(prolong) == 4 * 2**20
    assert (prolong.training.train_iters, prolong.optimizer.lr, prolong.optimizer.min_lr) == (250, 2e-5, 2e-6)
