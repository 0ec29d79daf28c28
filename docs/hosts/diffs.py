"""Write the differences that the pages show, from the files that they name.

    python docs/hosts/diffs.py

A page names two files in a comment before the block: <!-- diff: before.py after.py -->, with paths
relative to docs/examples.
"""

import difflib
import re
from pathlib import Path

PAGES = Path(__file__).parent
EXAMPLES = PAGES.parent / "examples"
BLOCK = re.compile(r"(<!-- diff: (\S+) (\S+) -->\n\n)```diff\n.*?```", re.DOTALL)


def difference(before: str, after: str) -> str:
    """Return what changes from one file to another, with two lines around it."""
    texts = [
        EXAMPLES.joinpath(name).read_text(encoding="utf-8").splitlines() for name in (before, after)
    ]
    _, _, _, *lines = difflib.unified_diff(*texts, lineterm="", n=2)
    return "\n".join(" ..." if line.startswith("@@") else line for line in lines)


def written(page: str) -> str:
    """Return a page with its blocks written anew."""
    return BLOCK.sub(lambda m: f"{m[1]}```diff\n{difference(m[2], m[3])}\n```", page)


if __name__ == "__main__":
    for path in PAGES.glob("*.md"):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
