"""4M tokens against a vocabulary of 128K: 5.4e11 logits, 250 times what int32 can count.

A real layer of Llama 3.1 8B with embedding, head and loss goes forward and backward over all of it in one process, on
fake tensors: shapes, types and operators are real, memory and time are not. Whatever indexes or counts must be int64.
"""

from tests.pool import WorkerPool

TOKENS, VOCABULARY = 1 << 22, 128256


def test_nothing_counts_in_int32(pool: WorkerPool) -> None:
    (report,) = pool.run(1, "tests.model.workers:fake_step", TOKENS, VOCABULARY)
    assert report["largest"] == TOKENS * VOCABULARY > 2**31
    assert report["losses"] == (1, TOKENS)
    assert report["without gradient"] == []
    assert report["narrow integers"] == {}
