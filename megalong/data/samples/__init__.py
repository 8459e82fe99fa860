"""From an indexed dataset to samples: documents, their order in an epoch, packs and mixtures, by number alone."""
