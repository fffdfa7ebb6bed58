"""``python -m lightning_qk.cli`` is the command ``lightning-qk``."""

import sys

from lightning_qk.cli import main

if __name__ == "__main__":
    sys.exit(main())
