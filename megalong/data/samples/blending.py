"""Which domain sample k comes from: Megatron's greedy blending.

With shares w_i that sum to 1 and c_i samples of domain i so far, sample k is from the domain that is furthest behind,

    argmax_i  w_i · max(k, 1) - c_i        (the first such domain wins a tie)

so that after any k every domain is within about one sample of its share. Shares 0.7 and 0.3: 0 1 0 0 1 0 0 1 0 0 ...

The choice depends on all earlier choices, so they are kept in a table that grows when a higher k is needed: 10 bytes
per sample and about a second per million samples. Any k is then one look-up. Every rank builds the same table.
"""

from threading import Lock

import numpy as np


class Blend:
    """The domain of every sample and the sample's number within that domain.

    Args:
        weights: positive shares, one per domain; they are normalised.
    """

    def __init__(self, weights: list[float]) -> None:
        shares = np.asarray(weights, np.float64)
        self.shares: list[float] = (shares / shares.sum()).tolist()
        self._counts = [0] * len(weights)
        self._domains = np.empty(0, np.int16)
        self._indices = np.empty(0, np.int64)
        self._extending = Lock()

    def of(self, k: int) -> tuple[int, int]:
        """(domain, number within the domain) of sample k >= 0."""
        if k >= len(self._domains):
            self._extend(k + 1)
        return int(self._domains[k]), int(self._indices[k])

    def counts(self, samples: int) -> np.ndarray:
        """int64 [domains]: how many of the first `samples` samples come from each domain."""
        self._extend(samples)
        return np.bincount(self._domains[:samples], minlength=len(self.shares)).astype(np.int64)

    def _extend(self, wanted: int) -> None:
        with self._extending:  # loader threads call this concurrently
            have = len(self._domains)
            if wanted <= have:
                return
            size = max(wanted, 2 * have, 1024)
            domains, indices = self._choose(have, size)
            # `_domains` last: `of` reads both as soon as `_domains` is long enough.
            self._indices = np.concatenate([self._indices, np.asarray(indices, np.int64)])
            self._domains = np.concatenate([self._domains, np.asarray(domains, np.int16)])

    def _choose(self, first: int, end: int) -> tuple[list[int], list[int]]:
        shares, counts = self.shares, self._counts
        domains, indices = [], []
        for k in range(first, end):
            position = float(max(k, 1))
            behind = [share * position - count for share, count in zip(shares, counts, strict=True)]
            domain = behind.index(max(behind))
            domains.append(domain)
            indices.append(counts[domain])
            counts[domain] += 1
        return domains, indices
