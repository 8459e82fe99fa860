"""What a run records of each step: one record (record.py), which goes to every sink (sinks.py)."""
