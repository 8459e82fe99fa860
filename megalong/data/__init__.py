"""From text to the tokens that a step trains on. Nothing here imports torch, so data commands start fast.

The path of a token:
    corpus/       sources → records → encoder → assemble          text files to an indexed dataset, once
    indexed.py    the dataset; indexed_writer.py writes it
    samples/      splitting → length_rules → epochs → stream, or whole_documents → blending → sampler
                                                                  a dataset to sample k, on every rank
    synthetic/    streams of synthetic samples: joined documents, tasks
"""

from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.samples.sampler import PackedSamples

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "PackedSamples"]
