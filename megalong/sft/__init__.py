"""Conversations: from files through the chat template to packed samples whose targets are the assistant's tokens.

formats.py   four formats read as one
template.py  text and tokens
mask.py      which tokens are targets
prepare.py   tokenizes everything once, into a cache that all ranks read
samples.py   packed by best fit, masked from each other
"""
