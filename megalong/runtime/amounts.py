"""Format durations, large numbers and times as text."""

import datetime


def duration(seconds: float) -> str:
    """`45s`, `2m10s`, `3h05m`, `2d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def amount(value: float) -> str:
    """Three digits and a letter: `987`, `12.3K`, `4.20M`, `1.05B`."""
    for limit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            scaled = value / limit
            return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f}{letter}"
    return f"{value:.0f}"


def utc_now(timespec: str = "milliseconds") -> str:
    """The current time in ISO 8601, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec=timespec)
