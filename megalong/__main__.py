"""`python -m megalong COMMAND`, so that `torchrun -m megalong train ...` works.

Guarded, because writers of checkpoints start processes that import this module again.
"""

import sys

from megalong.cli import main

if __name__ == "__main__":
    sys.exit(main())
