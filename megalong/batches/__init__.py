"""From samples to a rank's micro-batches: their order, the rank's tokens of each, and prefetching."""
