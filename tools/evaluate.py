"""`megalong evaluate` for people who work from a checkout: `python tools/evaluate.py perplexity ...`."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
