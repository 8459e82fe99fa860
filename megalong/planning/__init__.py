"""Reports about a run before it starts: its data, and how evenly its ranks share the work."""
