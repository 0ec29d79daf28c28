"""Write into the pages the files and the differences that they name.

    python docs/hosts/diffs.py

A page names them in a comment before the block, <!-- file: example.py --> or
<!-- diff: before.py after.py -->, with paths relative to docs/examples.
"""

import difflib
import re
from pathlib import Path

PAGES = Path(__file__).parent
EXAMPLES = PAGES.parent / "examples"
BLOCK = re.compile(r"(<!-- (?:file|diff): (\S+)(?: (\S+))? -->\n\n)```.*?```", re.DOTALL)


def lines(name: str) -> list[str]:
    return EXAMPLES.joinpath(name).read_text(encoding="utf-8").splitlines()


def difference(before: str, after: str) -> list[str]:
    """Return what changes from one file to another, with two lines around it."""
    _, _, _, *found = difflib.unified_diff(lines(before), lines(after), lineterm="", n=2)
    return [" ..." if line.startswith("@@") else line for line in found]


def block(match: re.Match[str]) -> str:
    comment, first, second = match.groups()
    language, text = ("diff", difference(first, second)) if second else ("py", lines(first))
    return "\n".join([f"{comment}```{language}", *text, "```"])


def written(page: str) -> str:
    """Return a page with its blocks written anew."""
    return BLOCK.sub(block, page)


if __name__ == "__main__":
    for path in PAGES.glob("*.md"):
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
