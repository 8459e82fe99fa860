"""From files of text to an indexed dataset: found, cut into parts, tokenized, put together; a kill loses no part."""
