"""Returns freed heap memory to the system.

After a vocabulary of 128,000 entries is loaded, glibc keeps 50 MB of small freed blocks. A process that then forks
workers would keep them once per worker. Other C libraries have no such call, and do not need it.
"""

import ctypes

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Return the free memory in the C library's heap to the system, if the library can."""
    if _trim is not None:
        _trim(0)
