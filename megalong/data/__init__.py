"""From text to the tokens a step trains on, in numpy only: every command that touches data starts in a blink.

The way of a token:
    corpus/       sources → records → encoder → assemble          text files to an indexed dataset, once
    indexed.py    the dataset; indexed_writer.py writes it
    samples/      splitting → length_rules → epochs → stream, or whole_documents → blending → sampler
                                                                  a dataset to sample k, on every rank
    synthetic/    streams whose samples are made up: joined documents, tasks
"""

from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.sampler import PackedSamples

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "PackedSamples"]
