"""Hugging Face folders to Megatron parameters and back: weight names and layouts, reading, writing, config.json."""
