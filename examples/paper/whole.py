"""All experiments of this folder one after the other, and how long that took.

    python examples/paper/whole.py [--quick] [--data FOLDER]

What it is given goes to each script. A script that fails ends it. Results of a run that was cut are kept in
``OUT/.cache``, and used by the next; ``whole.json`` says whether that was empty at the start.
"""

import subprocess
import sys
from collections.abc import Sequence

from common import HERE, Clock, options, write

SCRIPTS = ("theory", "heads", "locater", "spreads", "failures", "positional", "carry_over")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status of the first script that failed, or 0."""
    given = sys.argv[1:] if argv is None else list(argv)
    opts, whole = options(__doc__ or "", given), Clock()
    kept = opts.out / ".cache"
    found: dict[str, object] = {
        "from_empty_cache": not kept.is_dir() or not any(kept.iterdir()),
        "scripts": {},
    }
    seconds: dict[str, float] = {}
    for name in SCRIPTS:
        clock = Clock()
        done = subprocess.run([sys.executable, str(HERE / f"{name}.py"), *given], check=False)
        if done.returncode:
            print(f"{name}.py ended with status {done.returncode}", file=sys.stderr)
            return done.returncode
        seconds[name] = clock.seconds()
    write("whole", found | {"scripts": seconds}, opts, whole)
    return 0


if __name__ == "__main__":
    sys.exit(main())
