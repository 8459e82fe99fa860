"""What a run records of each step: one record (record.py), and the sinks that it goes to."""
