"""From samples to a rank's micro-batches: in which order, which tokens of each, read ahead of the step."""
