"""``python -m tools.coverage``."""

import sys

from tools.coverage.command import run

if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], "python -m tools.coverage"))
