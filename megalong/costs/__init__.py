"""What training costs, worked out from a configuration alone: operations, and what devices can do of them; no torch."""
