"""Which positions a run may train: each kind of rope against the length that its source states."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from megalong.config.architecture import Architecture
from megalong.config.load import load_config
from megalong.config.positions import check_positions, covered_positions, trained_architecture, trained_positions
from megalong.config.rope import RopeSettings
from megalong.config.schema import Config
from megalong.errors import UserError

ROOT = Path(__file__).parents[2]
SHAPE = {"hidden_size": 64, "ffn_hidden_size": 96, "num_layers": 6, "num_attention_heads": 8, "num_query_groups": 4}
PLAIN = Architecture(**SHAPE, vocab_size=49152, max_position_embeddings=8192, rope=RopeSettings(rope_theta=1e5))
LLAMA3 = {"type": "llama3", "rope_theta": 5e5, "original_max_position_embeddings": 8192}
LLAMA31 = PLAIN.model_copy(
    update={"max_position_embeddings": 131072, "rope": RopeSettings.model_validate({**LLAMA3, "factor": 8})}
)
LLAMA32 = LLAMA31.model_copy(update={"rope": RopeSettings.model_validate({**LLAMA3, "factor": 32})})
YARN4 = {"type": "yarn", "factor": 4, "rope_theta": 1e6, "original_max_position_embeddings": 32768}
QWEN_STYLE = PLAIN.model_copy(update={"max_position_embeddings": 40960, "rope": RopeSettings.model_validate(YARN4)})
DEEPSEEK = PLAIN.model_copy(
    update={"max_position_embeddings": 16384, "rope": RopeSettings(type="linear", rope_theta=1e5, factor=4)}
)
Load = Callable[..., Config]


@pytest.fixture
def asked(load: Load) -> Load:
    """A configuration without the rope of the file: `asked("data.seq_length=…", …)`."""
    return lambda *overrides: load("model={load: {hf: llama}, rope: null}", *overrides)


@pytest.mark.parametrize(
    ("source", "length", "rope"),
    [
        (PLAIN, 8192, None),
        (PLAIN, 32768, "{type: yarn, factor: 4}"),
        (PLAIN, 32768, "{type: linear, factor: 4, original_max_position_embeddings: 8192}"),
        (PLAIN, 30000, "{type: ntk, factor: 4}"),
        (PLAIN, 65536, "{rope_theta: 8e6}"),
        (LLAMA31, 131072, None),
        (LLAMA31, 131072, "{type: llama3, factor: 8, original_max_position_embeddings: 8192}"),
        (LLAMA31, 1048576, "{type: yarn, factor: 128, original_max_position_embeddings: 8192}"),
        (LLAMA31, 524288, "{type: yarn, factor: 4, original_max_position_embeddings: 131072}"),
        (LLAMA31, 8192, "{type: none}"),
        (LLAMA32, 131072, None),
        (QWEN_STYLE, 131072, None),
        (QWEN_STYLE, 131072, "{type: yarn, factor: 4, beta_fast: 4}"),
        (DEEPSEEK, 16384, None),
        (DEEPSEEK, 32768, "{type: yarn, factor: 8}"),
    ],
)
def test_covered(source: Architecture, length: int, rope: str | None, asked: Load) -> None:
    overrides = [f"model.rope={rope}"] if rope else []
    config = asked(f"data.seq_length={length}", *overrides)
    check_positions(config, source)
    trained = trained_architecture(config, source)
    assert covered_positions(trained) >= length
    assert trained_architecture(config, trained) == trained


@pytest.mark.parametrize(
    ("source", "length", "rope", "told"),
    [
        (PLAIN, 32768, None, "data.seq_length 32768: the model reads 8192 positions, * {type: yarn, factor: 4} *"),
        (PLAIN, 100000000, None, "data.seq_length 100000000: * factor: 12208} *"),
        (PLAIN, 32768, "{type: yarn, factor: 2}", "*covers 16384 positions, * write model.rope.factor: 4 *"),
        (PLAIN, 33000, "{type: linear, factor: 4}", "*covers 32768 positions, * write model.rope.factor: 5 *"),
        (PLAIN, 32768, "{type: yarn}", "model.rope: type yarn without factor, * write factor: 4"),
        (PLAIN, 8192, "{type: yarn}", "*the run needs only 8192, so leave model.rope out"),
        (PLAIN, 32768, "{type: llama3, beta_fast: 4}", "model.rope: type llama3 without factor, * write factor: 4"),
        (
            PLAIN,
            16384,
            "{type: yarn, factor: 4, original_max_position_embeddings: 4096}",
            "model.rope.original_max_position_embeddings 4096: * trained on 8192 positions * write 8192, *",
        ),
        (PLAIN, 8193, "{rope_theta: 1e5}", "data.seq_length 8193: the model reads 8192 *"),
        (PLAIN, 8193, "{rope_theta: 1e4}", "data.seq_length 8193: the model reads 8192 *"),
        (LLAMA31, 262144, None, "*factor 8 covers 131072 positions, * {type: yarn, factor: 32} *"),
        (LLAMA31, 131072, "{rope_theta: 5e5}", "*the model reads 8192 positions, * {type: yarn, factor: 16} *"),
        (LLAMA31, 32768, "{type: yarn, factor: 2, rope_theta: 8e6}", "*covers 16384 *.factor: 4 *"),
        (
            LLAMA31,
            32768,
            "{type: yarn, factor: 8, original_max_position_embeddings: 4096}",
            "* trained on 8192 positions before any scaling (131072 with its own rope llama3); write 8192*",
        ),
        (LLAMA32, 262144, None, "*covers 131072 positions*factor: 32} *"),
        (DEEPSEEK, 32768, None, "*factor 4 covers 16384 positions*factor: 8} *"),
    ],
)
def test_refused_with_what_to_write(
    source: Architecture, length: int, rope: str | None, told: str, asked: Load
) -> None:
    overrides = [f"model.rope={rope}"] if rope else []
    config = asked(f"data.seq_length={length}", *overrides)
    pattern = ".*".join(map(re.escape, told.split("*")))
    with pytest.raises(UserError, match=f"^{pattern}$") as error:
        check_positions(config, source)
    assert "\n" not in str(error.value)
    if "without factor" not in str(error.value):
        check_positions(asked("model.allow_extrapolation=true", f"data.seq_length={length}", *overrides), source)
    written = re.search(r"factor: (\d+)", str(error.value))
    if written is not None:
        check_positions(asked(f"data.seq_length={length}", f"model.rope={{type: yarn, factor: {written[1]}}}"), source)


def test_random_weights_read_what_their_architecture_promises(load: Load) -> None:
    def scratch(longest: int, rope: str, *more: str) -> None:
        shape = ", ".join(f"{key}: {value}" for key, value in SHAPE.items())
        model = f"{{{shape}, vocab_size: 64, max_position_embeddings: {longest}, rope: {rope}}}"
        config = load(f"model={{load: null, rope: null, architecture: {model}}}", *more)
        assert config.model.architecture is not None
        check_positions(config, config.model.architecture)

    yarn = "{type: yarn, rope_theta: 1e4, factor: %d, original_max_position_embeddings: 1024}"
    scratch(4096, "{rope_theta: 1e4}")
    scratch(1024, yarn % 4)
    scratch(1024, "{rope_theta: 1e4}", "model.rope={type: yarn, factor: 8, original_max_position_embeddings: 512}")
    with pytest.raises(
        UserError, match=r"reads 64 positions.*write model\.architecture\.max_position_embeddings: 4096,"
    ):
        scratch(64, "{rope_theta: 1e4}")
    with pytest.raises(UserError, match=r"max_position_embeddings: 4096 and model\.architecture\.rope\.factor: 4,"):
        scratch(1024, yarn % 2)
    with pytest.raises(UserError, match="reads 64 positions"):
        scratch(64, "{rope_theta: 1e4}", "model.rope={rope_theta: 1e6}")


def test_what_a_sample_uses(asked: Load) -> None:
    assert trained_positions(asked("data.seq_length=4096")) == (4096, "data.seq_length")
    pose = "data.pose={target_length: 16384}"
    assert trained_positions(asked(pose)) == (16384, "data.pose.target_length")
    with pytest.raises(UserError, match=r"^data\.pose\.target_length 16384: the model reads 8192"):
        check_positions(asked(pose), PLAIN)
    packs = "data.mixture=[{name: a, path: a, weight: 1, seq_length: 4096}]"
    assert trained_positions(asked("data.seq_length=32768", packs)) == (4096, "seq_length of data.mixture")
    one_of_two = packs.replace("]", ", {name: b, path: b, weight: 1}]")
    assert trained_positions(asked("data.seq_length=32768", one_of_two))[0] == 32768
    long = asked("data.seq_length=32768", one_of_two).model_copy(update={"task": "sft"})
    short = long.model_copy(update={"sft": long.sft.model_copy(update={"max_length": 8192})})
    assert [trained_positions(config)[0] for config in (long, short)] == [32768, 8192]
    check_positions(short, PLAIN)


def test_a_base_change_leaves_with_the_length_it_trained(asked: Load) -> None:
    config = asked("data.seq_length=65536", "model.rope={rope_theta: 8e6}")
    trained = trained_architecture(config, PLAIN)
    assert (trained.max_position_embeddings, trained.rope.rope_theta) == (65536, 8e6)
    check_positions(asked("data.seq_length=65536"), trained)
    assert trained_architecture(asked("data.seq_length=512", "model.rope={rope_theta: 8e6}"), PLAIN) == (
        PLAIN.with_rope(RopeSettings(rope_theta=8e6))
    )


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/**/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_the_recipes_are_covered(path: Path) -> None:
    """From the model each of them names, or the stage before it."""
    sources = {"Meta-Llama-3-8B-Instruct": PLAIN, "Llama-3.1-8B-Instruct": LLAMA31, "Llama-3.2-1B-Instruct": LLAMA32}
    base = PLAIN.model_copy(update={"max_position_embeddings": 524288, "rope": RopeSettings(rope_theta=1.28e8)})
    sources["Llama-3-8B-ProLong-512k-Base"] = base
    small = PLAIN.model_copy(update={"max_position_embeddings": 256})
    sources |= {
        "imported": small,
        "base": small,
        "extended": small.model_copy(update={"max_position_embeddings": 4096}),
    }
    sources |= {f"ultralong-{n}m": PLAIN.with_rope(RopeSettings(type="yarn", factor=128 * n)) for n in (1, 2, 4)}
    before: Architecture | None = None
    for config in load_config(path):
        load = config.model.load
        assert load is not None
        source = sources.get(Path(load.hf or load.checkpoint or "").name, before)
        assert source is not None, load
        check_positions(config, source)
        before = trained_architecture(config, source)
