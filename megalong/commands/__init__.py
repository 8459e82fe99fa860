"""The commands of `megalong`, one file per group: the options of each, and the function that runs it."""
