"""`megalong train` for people who work from a checkout: `python tools/train.py CONFIG.yaml [section.key=value ...]`."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
