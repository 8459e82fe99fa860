"""Indexed datasets to samples: order of documents, packs and mixtures. Sample k follows from the number k alone."""
