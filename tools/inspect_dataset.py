"""`megalong data inspect` for people who work from a checkout: `python tools/inspect_dataset.py PREFIX`."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "inspect", *sys.argv[1:]]))
