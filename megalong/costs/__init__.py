"""The cost of training from a configuration alone: its operations, and the peak of devices. Needs no torch."""
