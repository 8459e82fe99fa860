"""megalong: Megatron-style 3D-parallel pretraining for very long context."""

__version__ = "0.1.0"
