"""Checkpoints: one folder a step, written aside and published by a rename, loadable under any layout."""
