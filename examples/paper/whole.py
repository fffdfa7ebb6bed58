"""All experiments of this folder one after the other, and how long that took.

    python examples/paper/whole.py [--quick] [--data FOLDER]

What it is given goes to each script; a script that fails ends it. What was trained before it was cut is kept in
``OUT/.cache``, with the time that it took: the next call goes on, and ``whole.json`` has the sum.
"""

import json
import subprocess
import sys
from collections.abc import Sequence

from common import HERE, Clock, options, write

SCRIPTS = ("theory", "heads", "failures", "positional", "spreads", "carry_over", "locater")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the first script that failed, or 0."""
    given = sys.argv[1:] if argv is None else list(argv)
    opts, whole = options(__doc__ or "", given), Clock()
    kept = opts.out / ".cache" / "whole.json"
    found = {"from_empty_cache": not kept.parent.is_dir(), "goes": 0, "done": [], "seconds": {}}
    if kept.is_file():
        found = json.loads(kept.read_text())
    found["goes"] += 1
    for name in SCRIPTS:
        if name in found["done"]:
            continue
        clock, before, status = Clock(), found["seconds"].get(name, 0.0), None
        try:
            status = subprocess.run(
                [sys.executable, str(HERE / f"{name}.py"), *given], check=False
            ).returncode
        finally:
            found["seconds"][name] = before + clock.seconds()
            found["done"] += [name] if status == 0 else []
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(found))
        if status:
            print(f"{name}.py ended with status {status}", file=sys.stderr)
            return status
    del found["done"]
    write("whole", found, opts, whole)
    kept.unlink()  # the next call is a new run, of what the cache does not have
    return 0


if __name__ == "__main__":
    sys.exit(main())
