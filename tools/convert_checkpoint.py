"""`megalong checkpoint import` and `megalong checkpoint export` as a script."""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main(["checkpoint", *sys.argv[1:]]))
