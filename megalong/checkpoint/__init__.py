"""Checkpoints: one folder per step, written as `.tmp` and published by a rename, loadable under any layout."""
