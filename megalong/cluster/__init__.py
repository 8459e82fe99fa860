"""What a run needs of the machines it is sent to."""
