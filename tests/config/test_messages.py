"""Every mistake is one line: where, key, value, what is allowed, what to write instead."""

import re

import pytest

from megalong.config.load import load_config
from megalong.errors import UserError

MADE_UP = "data.mixture=[{{name: a, path: p, weight: 1, synthetic: {{{}}}}}]"

# override -> what the message must say, after "command line: "
WRONG = {
    "training.train_iter=3": "training.train_iter: unknown key; did you mean train_iters?",
    "data.tensor_model_parallel_size=2": "unknown key; did you mean parallel.tensor_model_parallel_size?",
    "parallel.zzz=2": "parallel.zzz: unknown key; this section has: tensor_model_parallel_size, ",
    "model.rope.beta=4": "model.rope.beta: unknown key; did you mean beta_",
    "data.mixture=[{name: a, path: p, wieght: 1}]": "data.mixture[0].wieght: unknown key; did you mean weight?",
    "data.mixture=[{name: a, path: p}]": "data.mixture[0].weight: is missing",
    "data.mixture=[{name: a, path: p, weight: 0}]": "data.mixture[0].weight: 0 is out of range; it must be > 0",
    MADE_UP.format("task: neddle"): "data.mixture[0].synthetic.task: 'neddle' is not one of 'needle', 'multi_key', "
    "'variable_tracking', 'word_count' or 'related'; did you mean needle?",
    "data.mixture=[]": "data.mixture: is an empty list",
    "data.mixture=books": "data.mixture: 'books' is not a list",
    "data.mixture=[books]": "data.mixture[0]: 'books' is not a section",
    "data.seq_length=1M": "data.seq_length: '1M' is not a whole number; write 1048576",
    "data.seq_length=128k": "'128k' is not a whole number; write 131072",
    "data.seq_length=1.5 Mi": "'1.5 Mi' is not a whole number; write 1572864",
    "data.seq_length=4096.0": "4096.0 is not a whole number; write 4096",
    'data.seq_length="4096"': "'4096' is not a whole number; write it without quotes",
    "data.seq_length=long": "'long' is not a whole number",
    "run.seed=99999999999999999999": "run.seed: 99999999999999999999 is out of range; it must be < 4294967296",
    "data.seq_length=0": "data.seq_length: 0 is out of range; it must be >= 1",
    "data.separator=3": "data.separator: 3 is not text; write it in quotes",
    "optimizer.lr='3e-5'": "optimizer.lr: '3e-5' is not a number; write it without quotes",
    "data.seq_length=8192.0": "data.seq_length: 8192.0 is not a whole number; write 8192",
    "data.seq_length=1e6": "data.seq_length: 1000000.0 is not a whole number; write 1000000",
    "training.train_iters=010": "training.train_iters: '010' is not a whole number; write it without leading zeros",
    "model.rope={type: yarn, factor: 4, original_max_position_embeddings: 8192.5}": (
        "model.rope.original_max_position_embeddings: 8192.5 is not a whole number"
    ),
    "optimizer.lr=fast": "optimizer.lr: 'fast' is not a number",
    "optimizer.lr=.nan": "optimizer.lr: nan is not a finite number",
    "optimizer.lr=-1e-5": "optimizer.lr: -1e-05 is out of range; it must be > 0",
    "optimizer.adam_beta2=1": "optimizer.adam_beta2: 1 is out of range; it must be < 1",
    "parallel.sequence_parallel=1": "parallel.sequence_parallel: 1 is not a boolean; write true or false",
    "parallel=8": "parallel: 8 is not a section",
    "model.rope.type=yarm": "model.rope.type: 'yarm' is not one of 'none', 'linear', 'ntk', 'yarn' or 'llama3'; "
    "did you mean yarn?",
    "model.rope.factor=0.5": "model.rope.factor: 0.5 is out of range; it must be >= 1",
    "run.name=a/b": "run.name: 'a/b' is not a valid name",
    "run.dir=": "run.dir: None is not text",
    "task=finetune": "task: 'finetune' is not one of 'pretrain'",
    "attention={window_size: 4, window_attn_skip_freq: often}": "window_attn_skip_freq: 'often' is not a whole number",
    "attention={window_size: 4, window_attn_skip_freq: 0}": "window_attn_skip_freq: 0 is out of range; it must be >= 1",
    "attention={window_size: 4, window_attn_skip_freq: [1, 2]}": "window_attn_skip_freq: 2 is not one of 0 or 1",
    "attention={window_size: 4, window_attn_skip_freq: []}": "window_attn_skip_freq: is an empty list; add an entry",
    "training=": "training: None is not a section",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_told_in_one_line(load, override):
    with pytest.raises(UserError, match=re.escape(WRONG[override])) as caught:
        load(override)
    message = str(caught.value)
    assert message.startswith("command line: ")
    assert "\n" not in message
    assert "pydantic" not in message


# override -> message of a rule inside one section
CONTRADICTIONS = {
    "attention.window_attn_skip_freq=2": "window_attn_skip_freq without window_size",
    "optimizer.min_lr=1": "min_lr 1 is above lr 3e-05",
    "model.rope.type=none": "factor 16 has no effect with type none",
    "model.rope.beta_fast=0.5": "beta_fast 0.5 must be above beta_slow 1",
    "model.rope={type: llama3, factor: 8, high_freq_factor: 1}": "high_freq_factor 1 must be above low_freq_factor 1",
    "model.load={hf: a, checkpoint: b}": "give exactly one source",
    "model.load=": "nothing to start from",
    "data.mixture=[{name: a, path: p, weight: 1}, {name: a, path: q, weight: 1}]": "mixture names a twice",
    MADE_UP.format("task: needle, needles: 4"): "needles is not read by task needle: write task: multi_key, or leave",
    MADE_UP.format("task: related, loss: answer"): "loss answer with task related, which has no answers",
    MADE_UP.format("task: related, min_length: 9"): "min_length is not read by task related",
    MADE_UP.format("task: needle, min_length: 4097"): "synthetic.min_length 4097 is above data.seq_length 4096",
    "data.split=a": 'split "a" must be two numbers',
    "data.split=98,1,1": 'split "98,1,1" must be two numbers',
    "data.split=0,1": 'split "0,1" needs a positive share for training',
    "data.split=99,nan": 'split "99,nan" needs a positive share',
}


@pytest.mark.parametrize("override", CONTRADICTIONS)
def test_keys_of_a_section_that_contradict_each_other(load, override):
    with pytest.raises(UserError, match=re.escape(CONTRADICTIONS[override])):
        load(override)


def test_the_file_is_named_for_what_the_file_says(run_file):
    run_file.write_text(run_file.read_text().replace("lr: 3e-5", "lr: quick"))
    with pytest.raises(UserError, match=re.escape(f"{run_file}: optimizer.lr: 'quick' is not a number")):
        load_config(run_file, ["training.train_iters=20"])


def test_a_typo_is_told_before_the_key_it_leaves_missing(run_file):
    run_file.write_text(run_file.read_text().replace("train_iters", "train_itres"))
    with pytest.raises(UserError, match=r"training\.train_itres: unknown key; did you mean train_iters\?"):
        load_config(run_file)


def test_a_missing_section_names_what_it_needs(run_file):
    kept = [line for line in run_file.read_text().splitlines() if not line.startswith("training")]
    run_file.write_text("\n".join(kept))
    with pytest.raises(UserError, match="training: is missing and has no default; add it with train_iters, global_bat"):
        load_config(run_file)
