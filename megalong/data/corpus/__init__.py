"""Text files to an indexed dataset: list, split into parts, tokenize, assemble. A kill loses no finished part."""
