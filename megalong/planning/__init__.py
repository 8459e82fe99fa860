"""What a run will do, said before it runs: its data, and how evenly its ranks share the work."""
