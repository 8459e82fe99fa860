"""`megalong data merge` for people who work from a checkout; Megatron-LM's tool has this name and these flags."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "merge", *sys.argv[1:]]))
