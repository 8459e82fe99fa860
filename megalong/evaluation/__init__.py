"""Measuring what long context is worth: losses by position, tables and pictures."""
