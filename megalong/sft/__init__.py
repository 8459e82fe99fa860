"""Conversations: from files over the chat template to packed samples whose targets are the assistant's tokens.

formats.py  one shape for four formats  →  template.py  text and tokens  →  mask.py  which tokens are learnt
→  prepare.py  once, into a cache that all ranks read  →  samples.py  packed by best fit, masked from each other
"""
