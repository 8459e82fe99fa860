"""`megalong quickstart`: the whole pipeline in minutes, on this machine's own text. See `story.py`."""

from megalong.quickstart.story import quickstart

__all__ = ["quickstart"]
