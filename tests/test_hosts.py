"""The examples for other libraries: they run with these, and the pages show what they change."""

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
EXAMPLES = DOCS / "examples"
PAGES = sorted((DOCS / "hosts").glob("*.md"))


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_differences_on_the_pages_are_those_of_the_files(page):
    diffs = load(DOCS / "hosts" / "diffs.py")
    text = page.read_text(encoding="utf-8")
    assert diffs.BLOCK.search(text)
    assert diffs.written(text) == text
    added = [block.count("\n+") for block in re.findall(r"```diff\n.*?```", text, re.DOTALL)]
    assert added
    assert diffs.written(text.replace("\n+", "\n +", 1)) == text  # and this test can fail


@pytest.mark.parametrize("name", ["before", "two_forwards", "three_forwards", "four_forwards"])
def test_lightly_trains_with_each_form(name, lightly_loss, capsys):
    torch.manual_seed(0)
    found = runpy.run_path(str(EXAMPLES / "lightly" / f"{name}.py"))
    printed = re.findall(r"^loss (\d+\.\d+)", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 4  # 512 images in batches of 128
    assert all(0 < float(value) < 10 for value in printed)
    if name != "before":
        loss, base, gap = (found[part].item() for part in ("loss", "base", "equivariance"))
        assert gap > 0
        assert loss == pytest.approx(base + found["criterion"].equivariance_weight * gap)
    if name == "two_forwards":
        z0, z1 = found["z0"].detach(), found["z1"].detach()
        theirs = lightly_loss.NTXentLoss(temperature=0.5)(z0, z1).item()
        assert base == pytest.approx(theirs, abs=1e-6)
