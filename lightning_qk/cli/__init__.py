"""The command ``lightning-qk``. It may import everything."""

from lightning_qk.cli.command import main

__all__ = ["main"]
