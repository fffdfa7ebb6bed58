"""Put what the tutorial's jobs print into its page again: python docs/tutorial_output.py

Types the page's `bash` blocks that train in an empty folder, 80 columns wide, and replaces the `text` block behind
each. Takes three to ten minutes on two cores. The prose around the blocks has to be read again afterwards.
"""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).with_name("tutorial.md")
_BLOCKS = re.compile(
    r"(```bash\n(?P<typed>[^`]*lightning-qk fit[^`]*)```\n(?:(?!```)[\s\S])*?```text\n)(?P<printed>[\s\S]*?)```"
)
_BEGINNINGS = ("Attention health at step", "CollapseGuard: step")


def shown(output: str, before: str) -> str:
    """The part of an output that a block shows: from its first words on, to the report's path at most."""
    beginning = next(one for one in _BEGINNINGS if before.startswith(one))
    # A warning begins with where it comes from.
    lines = [line[line.find(beginning) :] if beginning in line else line for line in output.splitlines()]
    start = next(index for index, line in enumerate(lines) if line.startswith(beginning))
    if beginning != _BEGINNINGS[0]:
        return lines[start] + "\n"
    end = next(index for index, line in enumerate(lines) if index > start and line.startswith("Report:"))
    kept = lines[start:end]
    if "Report:" in before:
        kept.append(re.sub(r"(lightning-qk/)[^/]+/", r"\1…/", lines[end]))
    return "\n".join(line.rstrip() for line in kept) + "\n"


def main() -> None:
    """Run the jobs and write the page."""
    environment = os.environ | {"COLUMNS": "80", "WANDB_MODE": "offline"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    page = PAGE.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:

        def renewed(match: re.Match[str]) -> str:
            done = subprocess.run(
                ["bash", "-ec", match["typed"]],
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"expected the tutorial's job to run, got:\n{done.stdout[-3000:]}")
            return f"{match[1]}{shown(done.stdout, match['printed'])}```"

        page = _BLOCKS.sub(renewed, page)
    PAGE.write_text(page, encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
