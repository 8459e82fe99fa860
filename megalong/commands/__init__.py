"""The commands of `megalong`, one file a family: what each is asked, and which function answers."""
