"""Ids that a model does not have, in datasets that do not tell their vocabulary: named by document before they hurt."""

import json
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from megalong import cli
from megalong.config.schema import Config
from megalong.data import indexed
from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.sampler import PackedSamples
from megalong.data.vocabulary import model_vocabulary
from megalong.errors import UserError

IDS = 100  # of the model; its table has 128 rows, for it is padded
DOCUMENTS = [[1, 2, 3], [], [4, 5], [6] * 9, [7, 99]]


def write(prefix: Path, documents: list[list[int]], dtype: type = np.int32, **sidecar: object) -> Path:
    with IndexedDatasetWriter(prefix, dtype) as writer:
        for tokens in documents:
            writer.add_document(np.array(tokens, dtype))
        writer.finish(sidecar)
    if not sidecar:
        Path(f"{prefix}.json").unlink(missing_ok=True)  # as Megatron-LM's own
    return prefix


def samples(prefix: Path, packing: str = "naive") -> PackedSamples:
    domain = SimpleNamespace(name="a", path=str(prefix), weight=1.0, lengths=None)
    return PackedSamples([domain], 4, 1, "1,0", packing=packing, vocabulary=IDS)


@pytest.mark.parametrize(
    ("id", "dtype"),
    [*product([100, 127, 65_000], [np.uint16, np.int32, np.int64]), *product([-1], [np.int16, np.int32, np.int64])],
)
def test_the_document_and_the_token_are_named(tmp_path: Path, id: int, dtype: type) -> None:
    """Below 0, in the padding of the model's table, and far beyond it."""
    assert IndexedDataset(write(tmp_path / "good", DOCUMENTS, dtype)).refuse_ids_from(IDS) is None
    bad = [*DOCUMENTS[:3], [6] * 7 + [id, 6], *DOCUMENTS[4:]]
    dataset = IndexedDataset(write(tmp_path / "bad", bad, dtype))
    assert dataset.range_of_ids() == (min(id, 1), max(id, 99), 16)
    message = rf"bad: document 3 contains the id {id} \(token 7 of it\), but there are 100 ids"
    with pytest.raises(UserError, match=message):
        dataset.refuse_ids_from(IDS)


def test_documents_of_several_sequences_are_counted_as_documents(tmp_path: Path) -> None:
    """Megatron-LM can cut documents into sentences."""
    write(tmp_path / "a", [[1, 2], [3], [4, 5], [6, 500]])
    index = (tmp_path / "a.idx").read_bytes()
    bounds = np.array([0, 1, 4], "<i8")  # the second document is three sequences
    header = indexed.HEADER.pack(indexed.MAGIC, 1, 4, 4, len(bounds))
    (tmp_path / "a.idx").write_bytes(header + index[indexed.HEADER.size : -5 * 8] + bounds.tobytes())
    with pytest.raises(UserError, match=r"document 1 contains the id 500 \(token 4 of it\)"):
        IndexedDataset(tmp_path / "a").refuse_ids_from(IDS)


@pytest.mark.parametrize("packing", ["naive", "masked", "best_fit"])
def test_what_a_look_at_a_part_does_not_see_is_met_by_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str
) -> None:
    monkeypatch.setattr(indexed, "CHECKED_BLOCKS", 2)
    monkeypatch.setattr(indexed, "CHECKED_AT_ONCE", 16)
    bad = [[number % 90 + 1] * 6 for number in range(40)]
    bad[17][2] = IDS
    packed = samples(write(tmp_path / "a", bad), packing)
    packed.refuse_foreign_ids(IDS)
    free = PackedSamples(packed.mixture, 4, 1, "1,0", packing=packing)
    refused = []
    for k in range(60):
        if IDS in free.row(k).tokens[:]:
            with pytest.raises(UserError, match=r"a: document 17 contains the id 100 \(token 2 of it\)"):
                packed.row(k).tokens[:]
            with pytest.raises(UserError, match="document 17"):
                packed.read(k).copy_tokens(0, np.empty(5, np.int32))
            refused.append(k)
        else:
            np.testing.assert_array_equal(packed.row(k).tokens[:], free.row(k).tokens[:])
    assert refused
    bad[0][0] = bad[39][5] = -7  # both ends are among what is looked at
    with pytest.raises(UserError, match="document 0 contains the id -7"):
        samples(write(tmp_path / "b", bad)).refuse_foreign_ids(IDS)


def test_a_dataset_that_tells_its_vocabulary_is_believed(tmp_path: Path) -> None:
    packed = samples(write(tmp_path / "a", DOCUMENTS, vocabulary_size=IDS))
    packed.refuse_foreign_ids(IDS)
    assert packed.streams[0].dataset.ids is None
    larger = samples(write(tmp_path / "b", DOCUMENTS, vocabulary_size=IDS + 1))
    with pytest.raises(UserError, match="tokenized with a vocabulary of 101, but the model has 100"):
        larger.refuse_foreign_ids(IDS)


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_reports_of_a_run_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    run = {
        "task": "pretrain",
        "run": {"name": "r", "dir": str(tmp_path / "run")},
        "model": {"load": {"hf": str(tmp_path)}},
        "data": {"seq_length": 4, "split": "1,0", "mixture": [{"name": "a", "path": str(tmp_path / "a"), "weight": 1}]},
        "optimizer": {"lr": 1e-3},
        "training": {"train_iters": 2, "global_batch_size": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": IDS, **shape}))
    write(tmp_path / "a", DOCUMENTS)
    assert cli.main(["data", command, str(tmp_path / "run.yaml")]) == 0
    write(tmp_path / "a", [*DOCUMENTS, [127]])
    capsys.readouterr()
    assert cli.main(["data", command, str(tmp_path / "run.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'a'}: document 5 contains the id 127" in line


@pytest.mark.parametrize("id", [-3, 601])
def test_inspect_tells_the_range_and_refuses_a_tokenizer_of_fewer_ids(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], id: int
) -> None:
    write(tmp_path / "a", [[5, id, 9]])
    assert cli.main(["data", "inspect", str(tmp_path / "a")]) == 0
    assert f"ids        {min(id, 5)} to {max(id, 9)}\n" in capsys.readouterr().out
    assert cli.main(["data", "inspect", str(tmp_path / "a"), "--tokenizer", str(tokenizer_folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"document 0 contains the id {id} (token 1 of it)" in line


def test_the_models_vocabulary_is_found_without_torch(tmp_path: Path) -> None:
    """Of a Hugging Face folder, of a run by its newest whole step, and of one step; else None."""

    def found(**load: str) -> int | None:
        where = SimpleNamespace(**{"hf": None, "checkpoint": None, **load})
        return model_vocabulary(cast(Config, SimpleNamespace(model=SimpleNamespace(load=where, architecture=None))))

    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    for step, size in (("00000001", 8), ("00000012", 9), ("00000013.tmp", 10)):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "megalong.json").write_text(json.dumps({"architecture": {"vocab_size": size}}))
    assert found(hf=str(tmp_path)) == 7
    assert found(checkpoint=str(tmp_path)) == 9
    assert found(checkpoint=str(tmp_path / "checkpoints" / "step-00000001")) == 8
    assert found(hf=str(tmp_path / "nowhere")) is None
    assert found(checkpoint=str(tmp_path / "nowhere")) is None
