"""From text to a model others can load, every step a job of the project's own under a real SLURM of two nodes."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from megalong import cli
from megalong.data.indexed import IndexedDataset
from tests.llama import make_llama
from tests.sft.chats import chats, make_tokenizer, write_lines
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ROOT, Jobs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SMALL = ("--cpus-per-task=1", "--mem=1G")


def write_config(file: Path, **sections: object) -> str:
    tree = {
        "precision": {"params_dtype": "fp32"},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 10, "global_batch_size": 4},
        "runtime": {"device": "cpu"},
        "slurm": {"gpus_per_node": 0, "cpus_per_node": 2, "time": "30", "lead_minutes": 5},
        **sections,
    }
    file.write_text(yaml.safe_dump(tree))
    return str(file)


def test_from_text_to_a_hugging_face_folder(
    cluster: Cluster, environment: dict[str, str], sources: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """preprocess (array) → merge → import → `megalong slurm --submit --chain`: pretrain → SFT → export."""
    folder = sources / "chain"
    folder.mkdir()
    jobs = Jobs(cluster, environment, folder)
    llama = make_tokenizer(make_llama(folder / "llama", max_position_embeddings=192), "chatml")
    text = [{"text": text} for text in pydoc_data.topics.topics.values()]
    for number in range(4):
        write_lines(folder / f"corpus-{number}.jsonl", text[number::4])
    write_lines(folder / "chats.jsonl", [{"messages": one} for one in chats(60)])

    words = ["--input", *(str(folder / f"corpus-{n}.jsonl") for n in range(4)), "--tokenizer", str(llama)]
    words += ["--output-prefix", str(folder / "data"), "--workers", "1"]
    array = jobs.submit("preprocess.sbatch", *words, options=("--array=1-2", *SMALL))
    merge = f'"$MEGALONG_PYTHON" -m megalong data merge --input "{folder}"/data_shard_*_text_document.idx '
    merge += f'--output-prefix "{folder}/data_text_document"'
    merged = cluster.sbatch(
        f"--output={folder}/merge.out", f"--dependency=afterok:{array}", *SMALL, "--wrap", merge, **environment
    )
    weights = ["--hf", str(llama), "--output", str(folder / "imported")]
    imported = jobs.submit("import.sbatch", *weights, options=(f"--dependency=afterok:{merged}", *SMALL))
    jobs.finish(imported)
    assert IndexedDataset(str(folder / "data_text_document")).num_documents == len(text)

    pretrain = write_config(
        folder / "pretrain.yaml",
        run={"name": "pretrain", "dir": str(folder / "pretrain")},
        model={"load": {"checkpoint": str(folder / "imported")}},
        data={"seq_length": 64, "mixture": [{"name": "a", "path": str(folder / "data_text_document"), "weight": 1.0}]},
    )
    sft = write_config(
        folder / "sft.yaml",
        task="sft",
        run={"name": "sft", "dir": str(folder / "sft")},
        model={"load": {"checkpoint": str(folder / "pretrain")}},
        data={"seq_length": 192, "packing": "best_fit"},
        sft={"sources": [{"name": "chats", "path": str(folder / "chats.jsonl")}]},
    )
    for name, value in {**environment, **cluster.environment, "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    assert cli.main(["slurm", pretrain, "--nodes", "2", "--submit", "--chain", sft]) == 0
    submitted = [line.split(": job ") for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in submitted] == ["pretrain", "sft", "sft-export"]
    jobs.finish(submitted[-1][1], seconds=300)
    assert {cluster.state(job) for _, job in submitted} == {"COMPLETED"}

    exported = folder / "sft" / "hf"
    model, before = (AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32) for one in (exported, llama))
    changed = [(new - old).abs().max().item() for new, old in zip(model.parameters(), before.parameters(), strict=True)]
    assert min(changed) > 0
    tokenizer = AutoTokenizer.from_pretrained(exported)
    ids = tokenizer.apply_chat_template(chats(1)[0], return_tensors="pt", return_dict=True)["input_ids"]
    losses = [one(ids, labels=ids).loss.item() for one in (model, before)]
    assert losses[0] < losses[1]
