"""The examples for other libraries: they run with these, and the pages show what they change."""

import importlib.util
import os
import re
import runpy
import subprocess
import sys
import warnings
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


@pytest.mark.parametrize("name", ["lightning_before", "lightning_care"])
def test_lightly_trains_with_lightning(name, lightly_loss, tmp_path, monkeypatch, capsys):
    pytest.importorskip("pytorch_lightning")
    monkeypatch.chdir(tmp_path)  # where Lightning writes its logs
    monkeypatch.setattr("sys.argv", [f"{name}.py"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        runpy.run_path(str(EXAMPLES / "lightly" / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "100%" in printed
    assert "loss=" in printed
    assert ("equivariance=" in printed) == (name == "lightning_care")


TWO_PROCESSES = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import load_torchvision
load_torchvision()
import importlib.util
spec = importlib.util.spec_from_file_location("example", {example!r})
example = importlib.util.module_from_spec(spec)
spec.loader.exec_module(example)
from care_loss.functional import info_nce_loss

class Watched(example.SimCLR):
    def training_step(self, batch, batch_index):
        (x0, x1, chunks), _, _ = batch
        with torch.no_grad():
            self.eval()  # so that both forwards are the same
            z0, z1 = self(x0), self(x1)
            base = self.criterion.forward_components(z0, z1, chunks=chunks).base
            whole = [self.all_gather(z).flatten(0, 1) for z in (z0, z1)]
            expected = info_nce_loss(*whole, temperature=0.5)
            self.train()
        with open(f"rank{{self.global_rank}}.txt", "a") as file:
            print(f"{{base:.6f}} {{expected:.6f}}", file=file)
        return super().training_step(batch, batch_index)

example.SimCLR = Watched
if __name__ == "__main__":
    example.main()
"""


def test_two_processes_of_lightning_log_the_info_nce_of_the_global_batch(lightly_loss, tmp_path):
    pytest.importorskip("pytorch_lightning")
    script = tmp_path / "two.py"
    example = EXAMPLES / "lightly" / "lightning_care.py"
    tests = Path(__file__).parent
    script.write_text(TWO_PROCESSES.format(tests=str(tests), example=str(example)))
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), "--devices", "2"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    ranks = [(tmp_path / f"rank{rank}.txt").read_text().split() for rank in (0, 1)]
    assert len(ranks[0]) == 2 * 4  # 512 images, 64 for each of two processes
    assert ranks[0] == ranks[1]
    for base, whole in zip(ranks[0][::2], ranks[0][1::2], strict=True):
        assert float(base) == pytest.approx(float(whole), abs=2e-6)
