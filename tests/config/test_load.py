"""Reading: YAML's traps, overrides, stages, and the way back to text."""

from pathlib import Path

import pytest
import yaml

from megalong.config.load import load_config
from megalong.config.text import config_text, dump_config, parse_yaml
from megalong.errors import UserError


def test_defaults_fill_what_the_file_leaves_out(load):
    config = load()
    assert (config.task, config.run.seed, config.parallel.tensor_model_parallel_size) == ("pretrain", 1234, 1)
    assert (config.optimizer.adam_beta1, config.optimizer.adam_beta2, config.optimizer.adam_eps) == (0.9, 0.95, 1e-8)
    assert [(d.name, d.path, d.weight) for d in config.data.mixture] == [
        ("books", "data/books", 0.3),
        ("code", "data/code", 0.7),
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1e6), ("1E+6", 1e6), ("+1.5e6", 1.5e6), ("-.5e-3", -5e-4), ("5.", 5.0), ("1_000", 1000), ("0x10", 16),
        ("010", "010"), ("4:00:00", "4:00:00"), ("1:30.5", "1:30.5"), ("0", 0), ("-7", -7), ("8192.0", 8192.0),
    ],
)  # fmt: skip
def test_a_number_is_what_it_looks_like(text, value):
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


def test_whole_lengths_may_be_fractions_in_a_rope_section(load):
    rope = load(
        "model.rope={type: yarn, factor: 4, original_max_position_embeddings: 8192.0, rope_theta: 1e6}"
    ).model.rope
    assert (rope.original_max_position_embeddings, rope.rope_theta, rope.factor) == (8192, 1e6, 4.0)
    assert type(rope.original_max_position_embeddings) is int


@pytest.mark.parametrize("spelling", ["3e-5", "3.0e-5", "3E-5", "3.e-5", ".3e-4", "0.00003", "+3e-5", "30_0e-7"])
def test_every_spelling_of_a_float_is_a_float(load, spelling):
    assert load(f"optimizer.lr={spelling}").optimizer.lr == pytest.approx(3e-5, rel=1e-12)


def test_whole_numbers_serve_as_floats_but_not_the_other_way(load):
    assert load("optimizer.weight_decay=1").optimizer.weight_decay == 1.0
    with pytest.raises(UserError, match=r"train_iters: 100\.0 is not a whole number; write 100"):
        load("training.train_iters=1e2")


def test_overrides_win_and_are_yaml(load):
    config = load(
        "parallel.sequence_parallel=true",
        "parallel.tensor_model_parallel_size=2",
        "data.separator=<s>",
        "model.rope.factor=32",
        "data.mixture=[{name: one, path: a b, weight: 1}]",
        "evaluation={interval: 5}",
        "data.separator=null",
    )
    assert config.parallel.sequence_parallel is True
    assert config.data.separator is None
    assert (config.model.rope.type, config.model.rope.factor) == ("yarn", 32.0)
    assert [domain.path for domain in config.data.mixture] == ["a b"]
    assert config.evaluation.interval == 5


def test_an_overridden_source_of_weights_replaces_the_files(load):
    load_section = load("model.load.checkpoint=runs/other").model.load
    assert (load_section.hf, load_section.checkpoint) == (None, "runs/other")


def test_text_and_back(load, tmp_path):
    config = load("data.separator=<s>", "optimizer.lr=1.25e-7")
    path = tmp_path / "deep" / "config.yaml"
    dump_config(config, path)
    assert path.read_text() == config_text(config)
    assert yaml.safe_load(path.read_text())["optimizer"]["lr"] == 1.25e-7
    assert load_config(path) == [config]
    assert [entry.name for entry in path.parent.iterdir()] == ["config.yaml"]


def test_a_failed_dump_leaves_the_old_file(load, tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("whole")
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        dump_config(load(), path)
    assert path.read_text() == "whole"
    assert not list(tmp_path.glob("*.tmp-*"))


STAGES = """
stages:
  - {name: short, training: {train_iters: 20}}
  - {name: long, data: {seq_length: 65536}, model: {rope: {factor: 64}}, optimizer: {warmup_iters: 0}}
  - {name: other, model: {load: {checkpoint: runs/elsewhere}}}
"""


def test_stages_override_key_by_key_and_follow_each_other(run_file):
    run_file.write_text(run_file.read_text() + STAGES)
    short, long, other = load_config(run_file, ["optimizer.lr=1e-4"])
    assert [s.run.name for s in (short, long, other)] == ["small-short", "small-long", "small-other"]
    assert [s.run.dir for s in (short, long, other)] == [
        "runs/small/01-short",
        "runs/small/02-long",
        "runs/small/03-other",
    ]
    assert [s.training.train_iters for s in (short, long, other)] == [20, 10, 10]
    assert [s.data.seq_length for s in (short, long, other)] == [4096, 65536, 4096]
    assert [s.optimizer.warmup_iters for s in (short, long, other)] == [2, 0, 2]
    assert [s.optimizer.lr for s in (short, long, other)] == [1e-4] * 3
    assert short.model.load.hf == "llama"
    assert (long.model.load.checkpoint, long.model.rope.type, long.model.rope.factor) == (
        "runs/small/01-short",
        "yarn",
        64.0,
    )
    assert (other.model.load.hf, other.model.load.checkpoint) == (None, "runs/elsewhere")


def test_a_later_stage_takes_weights_not_a_random_start(run_file):
    text = run_file.read_text().replace(
        "load: {hf: llama}",
        "architecture: {hidden_size: 64, ffn_hidden_size: 128, num_layers: 2, num_attention_heads: 4, "
        "num_query_groups: 2, vocab_size: 515, max_position_embeddings: 256, rope: {rope_theta: 10000}}",
    )
    run_file.write_text(text + "stages: [{name: a}, {name: b}]\n")
    first, second = load_config(run_file)
    assert first.model.architecture.kv_channels == 16
    assert second.model.architecture is None
    assert second.model.load.checkpoint == first.run.dir


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("stages: {}", "must be a list of stages"),
        ("stages: []", "must be a list of stages"),
        ("stages: [{data: {seq_length: 8}}]", r"stages\[0\]: needs a name"),
        ("stages: [{name: a}, {name: a}]", r"stages\[1\]: the name a is taken"),
        ("stages: [{name: a, run: {dir: x}}]", "run.dir: follows from the stage's name"),
        ("stages: [{name: a, trainig: {}}]", "stage a: trainig: unknown key; did you mean training?"),
        ("stages: [{name: a}, {name: b, data: {seq_length: 1k}}]", "stage b: data.seq_length: '1k' .* write 1024"),
    ],
)
def test_wrong_stages(run_file, stages, message):
    run_file.write_text(run_file.read_text() + stages + "\n")
    with pytest.raises(UserError, match=message):
        load_config(run_file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: [", "line 2: .*"),
        ("run: {name: a, name: b}", "line 1: key name appears twice"),
        ("a: 1\nb: 2\na: 3\n", "line 3: key a appears twice"),
        ("1: x", "line 1: key 1 is not text"),
        ("", "has no sections"),
        ("- a", "has no sections"),
        ("a: *b", "undefined alias 'b'"),
        ("a: 2025-99-99", "cannot read it as YAML"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("\tx: 1", "cannot start any token"),
    ],
)
def test_text_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=message) as caught:
        load_config(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(UserError, match="cannot read it"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read it"):
        load_config(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foo", "command line: foo: not understood; write section.key=value"),
        ("=3", "not understood"),
        ("optimizer..lr=3", "not understood"),
        ("stages.a.data=3", "stages are set in the file"),
        ("optimizer.lr=[", "command line: optimizer.lr, line 1"),
        ("lr=3", "command line: lr: unknown key; did you mean optimizer.lr?"),
        ("modle.rope=3", "command line: modle: unknown key; did you mean model?"),
    ],
)
def test_wrong_overrides(load, override, message):
    with pytest.raises(UserError, match=message):
        load(override)
