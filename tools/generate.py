"""`megalong generate` for people who work from a checkout: `python tools/generate.py --hf DIR --prompt TEXT`."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["generate", *sys.argv[1:]]))
