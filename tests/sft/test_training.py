"""Fine-tuning on packed conversations is training on each alone, weighted by its tokens, whatever the layout.

The same for the other average, over conversations. The reference is plain transformers: its chat template, its
assistant mask, its Llama, one conversation at a time. The
global batch is a whole epoch, so that the reference knows nothing of packing.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from megalong.checkpoint.folder import find_checkpoint
from megalong.config.schema import Config
from megalong.sft.samples import ConversationSamples
from tests.llama import make_llama, run_settings
from tests.pool import WorkerPool
from tests.ranks import megalong
from tests.sft.chats import chats, make_tokenizer, write_lines
from tests.training.comparison import TOLERANCE, deviation
from tests.training.gradients import plain_llama

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP2xCP2": (4, {"tensor_model_parallel_size": 2, "context_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "DP2xCP2": (4, {"context_parallel_size": 2}),
}
SLOW = ("one process", "PP2", "DP2xCP2")


def sft_settings(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run on twelve chats in ChatML whose global batch is an epoch."""
    llama = make_llama(folder / "hf", max_position_embeddings=256)
    make_tokenizer(llama, "chatml")
    lines = write_lines(folder / "chats.jsonl", [{"messages": one} for one in chats(12)])
    settings = run_settings(folder / "run", llama, folder, **sections)
    settings["task"] = "sft"
    settings["data"] = {"seq_length": 163, "packing": "best_fit", "split": "1,0"}
    settings["sft"] = {"sources": [{"name": "chats", "path": str(lines)}]}
    config = Config.model_validate(settings)
    samples = ConversationSamples.open(config, "train", llama, folder / "run" / "index")
    settings["training"] = {"train_iters": 10, "global_batch_size": samples.describe(1)[-1].samples}
    return settings


@pytest.mark.parametrize("average", [pytest.param("tokens", marks=pytest.mark.slow), "conversations"])
@pytest.mark.parametrize("layout", ["TP2xCP2", *(pytest.param(one, marks=pytest.mark.slow) for one in SLOW)])
def test_a_packed_batch_is_its_conversations_one_by_one(
    layout: str, average: str, tmp_path: Path, pool: WorkerPool
) -> None:
    settings = sft_settings(tmp_path)
    assert settings["training"]["global_batch_size"] == 6
    settings["sft"]["loss_average"] = average
    llama = tmp_path / "hf"
    model, tokenizer = plain_llama(llama), AutoTokenizer.from_pretrained(llama)
    losses, read = [], 0
    for messages in chats(12):
        found = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, mask = torch.tensor([found["input_ids"]]), torch.tensor(found["assistant_masks"]).bool()
        read += tokens.shape[1]
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="none")[mask[1:]])
    assert len({len(each) for each in losses}) > 3
    loss = torch.cat(losses).mean() if average == "tokens" else torch.stack([each.mean() for each in losses]).mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    plain = {"loss": [loss.item()], "norm": [norm.item()]}
    world, parallel = LAYOUTS[layout]
    settings["parallel"] = parallel
    settings["training"]["micro_batch_size"] = 2 if world == 1 else 1
    ours = pool.run(world, "tests.sft.workers:sft_steps", settings, 1)
    assert deviation(ours, plain) <= TOLERANCE["fp32"]
    for rank in ours:
        assert rank["learnt"] == [sum(map(len, losses))]
        assert read - 6 <= rank["filled"][0] <= read  # a full sample's last token is predicted, and not read


def test_the_trainer_saves_resumes_under_another_layout_and_answers(tmp_path: Path, pool: WorkerPool) -> None:
    settings = sft_settings(tmp_path)
    settings["training"] |= {"train_iters": 4, "global_batch_size": 2}
    settings["checkpoint"] = {"save_interval": 2}
    settings["logging"] |= {"position_buckets": True}
    broken = settings | {"run": {"name": "b", "dir": str(tmp_path / "b")}}
    whole = pool.run(1, "tests.training.workers:train_run", settings)[0]["records"]
    pool.run(1, "tests.training.workers:train_run", broken, 3)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "b", other)
    resumed = pool.run(1, "tests.training.workers:train_run", broken)[0]
    assert resumed["started"] == 2
    assert [one["loss"] for one in resumed["records"]] == [one["loss"] for one in whole[2:]]
    moved = settings | {"run": {"name": "b", "dir": str(other)}, "parallel": LAYOUTS["TP2xCP2"][1]}
    for rank in pool.run(4, "tests.training.workers:train_run", moved):
        assert rank["started"] == 2
        assert [one["loss"] for one in rank["records"]] == pytest.approx([one["loss"] for one in whole[2:]], rel=1e-5)
    generate = ["generate", "--checkpoint", str(other), "--chat", "--prompt", "Who?", "--max-new-tokens", "5"]
    said = megalong(*generate)
    assert said.returncode == 0, said.stderr
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"]
    checkpoint = find_checkpoint(tmp_path / "b")
    ((wanted,),) = pool.run(1, "tests.evaluation.workers:continuations", None, [(prompt, 5, 64)], checkpoint)
    assert said.stdout == tokenizer.decode(wanted, skip_special_tokens=True) + "\n"
