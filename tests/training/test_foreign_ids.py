"""An id that the model does not have, in a dataset that does not tell its vocabulary, met by one rank in mid-run."""

from pathlib import Path

import numpy as np
import yaml

from megalong.batches.order import SampleOrder
from megalong.cli import main
from megalong.config.schema import Config
from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.sampler import PackedSamples
from tests.llama import VOCABULARY, make_dataset, make_llama, run_settings
from tests.ranks import finish, start_ranks

STEP, RANK = 1, 1  # whose sample holds it


def look_at_little() -> None:
    """As of a dataset of terabytes, only a small part is looked at before the run."""
    from megalong.data import indexed

    indexed.CHECKED_BLOCKS, indexed.CHECKED_AT_ONCE = 1, 64


def test_one_line_names_it_before_the_run_or_when_its_sample_comes(tmp_path: Path, capfd) -> None:  # type: ignore[no-untyped-def]
    data = IndexedDataset(make_dataset(tmp_path / "good"))
    settings = run_settings(tmp_path / "run", make_llama(tmp_path / "hf", num_hidden_layers=1), tmp_path / "bad")
    config = Config.model_validate(settings)
    training = config.training
    order = SampleOrder(0, training.global_batch_size, training.micro_batch_size, RANK, 2, None)
    mixture = [config.data.mixture[0].model_copy(update={"path": str(tmp_path / "good")})]
    packed = PackedSamples(mixture, config.data.seq_length, config.run.seed, config.data.split)
    stream, (k, *_) = (
        packed.streams[0],
        order.samples(STEP * training.global_batch_size // training.micro_batch_size // 2),
    )
    # A token in the middle of that sample, by its place in the stream.
    place = stream.place_of(k) * 64 + 30
    epoch, first = stream.epochs.around(place)
    order_of_epoch = stream.order(epoch)
    ends = np.cumsum(data.document_lengths[order_of_epoch])
    nth = int(np.searchsorted(ends, place - first, side="right"))
    document = int(order_of_epoch[nth])
    token = int(place - first - ends[nth] + data.document_lengths[document])
    with IndexedDatasetWriter(tmp_path / "bad", np.uint16) as writer:
        for other in range(data.num_documents):
            tokens = data.document(other).copy()
            if other == document:
                tokens[token] = VOCABULARY  # the first row of the padding
            writer.add_document(tokens)
        writer.finish()
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    said = f"document {document} contains the id {VOCABULARY} (token {token} of it), but there are {VOCABULARY} ids"

    capfd.readouterr()
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "run" / "checkpoints").exists()

    little = "tests.training.test_foreign_ids:look_at_little"
    statuses = finish(start_ranks(["train", str(tmp_path / "run.yaml")], 2, tmp_path / "log", little))
    log = (tmp_path / "log").read_text()
    assert statuses[RANK] == 2, log
    (line,) = [line for line in log.splitlines() if line.startswith("megalong: error: ")]
    assert said in line
