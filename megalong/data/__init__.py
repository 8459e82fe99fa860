"""From text to the tokens a step trains on, in numpy only: every command that touches data starts in a blink.

The way of a token, module by module:
    sources → tokenizer → preprocess → indexed_writer        text to a dataset, once
    indexed → splitting → length_rules → epochs → stream, or whole_documents → blending → sampler
                                                             a dataset to sample k, on every rank
    synthetic/                                               streams whose samples are made up: joined documents, tasks
"""

from megalong.data.indexed import IndexedDataset
from megalong.data.indexed_writer import IndexedDatasetWriter
from megalong.data.sampler import PackedSamples

__all__ = ["IndexedDataset", "IndexedDatasetWriter", "PackedSamples"]
