"""Giving freed memory back to the system.

Loading a vocabulary of 128,000 entries leaves 50 MB of small freed pieces with glibc, which keeps them for later; a
process that then forks workers would keep them once for each. Other C libraries have no such call, and no such need.
"""

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back_freed() -> None:
    """Return what is free inside the C library's heap, where that can be asked for."""
    if _trim is not None:
        _trim(0)
