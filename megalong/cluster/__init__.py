"""What a run needs on its machines."""
