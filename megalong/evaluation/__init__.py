"""Measure the benefit of long context: losses by position, tables and plots."""
