"""The examples for other libraries: they run in these, and the pages show what they change."""

import csv
import importlib.util
import math
import os
import random
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from care_loss import CAREloss, InfoNCELoss
from care_loss.metrics import EquivarianceMonitor
from care_loss.views import SharedAugmentCollate, assert_shared, shared_views

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "docs" / "examples"
PAGES = sorted((ROOT / "docs" / "hosts").glob("*.md"))
SOLO_LEARN = ROOT / "build" / "solo-learn"
LOSS = re.compile(r"\b(loss|InfoNCE)\W+\d+\.\d+")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_class(module, name):
    return getattr(importlib.import_module(module), name)


@pytest.fixture
def needs(torchvision):
    """Skip a test of a host that is not installed; `make test-hosts` installs all of them."""

    def skip_without(*names):
        for name in names:
            if importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed: make test-hosts")

    return skip_without


@pytest.fixture
def solo_learn(needs, monkeypatch):
    """The clone of solo-learn, which has no release that installs, ready to be imported."""
    needs("hydra", "lightning", "timm", "wandb")
    if not SOLO_LEARN.exists():
        pytest.skip("there is no clone of solo-learn in build/solo-learn: make test-hosts")
    monkeypatch.syspath_prepend(str(SOLO_LEARN))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield SOLO_LEARN


@pytest.fixture
def run(needs, monkeypatch, tmp_path, capsys):
    """Run an example in an empty folder; return its variables, and the lines with its losses."""

    def run_example(path, *arguments):
        torch.manual_seed(0)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [str(path), *arguments])
        monkeypatch.setenv("COLUMNS", "200")  # the progress bar of rich in one line
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the advice of the hosts
            found = runpy.run_path(str(path), run_name="__main__")
        printed = re.split("[\r\n]+", "".join(capsys.readouterr()))
        lines = [line for line in printed if LOSS.search(line)]
        print(*lines[-4:], sep="\n")  # what the log of make test-hosts shows
        return found, lines

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where two processes share the tests and the cores, they would wait
    yield run_example
    torch.set_num_threads(threads)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_the_differences_on_the_pages_are_those_of_the_files(page):
    diffs = load(ROOT / "docs" / "hosts" / "diffs.py")
    text = page.read_text(encoding="utf-8")
    assert diffs.written(text) == text
    changed = text.replace("\n+", "\n +", 1)
    assert diffs.written(changed) == text  # so this test can fail


def blocks(language):
    """Return all blocks of a language on the pages, as parameters of a test."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```", re.DOTALL | re.MULTILINE)
    return [
        pytest.param(page.stem, block, id=f"{page.stem}{number}")
        for page in PAGES
        for number, block in enumerate(pattern.findall(page.read_text(encoding="utf-8")))
    ]


@pytest.mark.parametrize(("page", "block"), blocks("diff"))
def test_a_host_needs_few_new_lines(page, block):
    added = sum(line.startswith("+") for line in block.splitlines())
    assert 0 < added <= (10 if page == "solo-learn" else 12)


def test_the_plug_in_for_solo_learn_is_short():
    text = (EXAMPLES / "solo_learn" / "care.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 33


@pytest.mark.parametrize(("page", "block"), blocks("python"))
def test_the_code_on_the_pages_runs(page, block, needs, monkeypatch, tmp_path):
    needs(*set(re.findall(r"^(?:import|from) (\w+)", block, re.MULTILINE)))
    monkeypatch.chdir(tmp_path)
    namespace = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(block, page, "exec"), namespace)
    assert namespace.get("loss", torch.zeros(())).isfinite()


LIGHTLY = ["before", "two_forwards", "three_forwards", "moco_care", "barlow_care"]
LIGHTLY += [  # make test-hosts runs these too
    pytest.param(name, marks=pytest.mark.deep)
    for name in ("four_forwards", "moco_before", "barlow_before")
]


@pytest.mark.parametrize("name", LIGHTLY)
def test_lightly_trains_with_each_form(name, run, lightly_loss):
    found, lines = run(EXAMPLES / "lightly" / f"{name}.py")
    assert len(lines) == 2  # 128 images in batches of 64
    if name.endswith("before"):
        return
    loss, base, gap = (found[part].item() for part in ("loss", "base", "equivariance"))
    assert gap > 0
    assert loss == pytest.approx(base + found["criterion"].equivariance_weight * gap)
    if name == "two_forwards":
        z0, z1 = found["z0"].detach(), found["z1"].detach()
        theirs = lightly_loss.NTXentLoss(temperature=0.5)(z0, z1).item()
        assert base == pytest.approx(theirs, abs=1e-6)


def test_lightly_trains_with_the_rotation_contrast(run):
    found, lines = run(EXAMPLES / "lightly" / "rotation_contrast.py")
    assert len(lines) == 2  # 128 images in batches of 64
    assert found["share"] < 1
    # An untrained network makes all rows alike: then it is log(2N - 1).
    assert found["loss"].item() == pytest.approx(math.log(127), abs=0.3)


@pytest.mark.parametrize("name", ["lightning_before", "lightning_care", "lightning_rotation"])
def test_lightly_trains_with_lightning(name, needs, run):
    needs("lightly", "pytorch_lightning")
    _, lines = run(EXAMPLES / "lightly" / f"{name}.py")
    assert ("equivariance" in lines[-1]) == (name == "lightning_care")
    assert ("share" in lines[-1]) == (name == "lightning_rotation")


NESTED = [("before", None), ("care", None), ("care", "lightly.loss.BarlowTwinsLoss")]


@pytest.mark.parametrize(("name", "nested"), NESTED)
def test_hydra_constructs_the_views_and_the_loss(name, nested, needs, run):
    needs("hydra", "lightly")
    options = [f"+loss.base_loss._target_={nested}", "~loss.temperature"] if nested else []
    _, lines = run(EXAMPLES / "hydra" / f"{name}.py", "--config-name", name, *options)
    assert len(lines) == 2
    assert all(("equivariance" in line) == (name == "care") for line in lines)


@pytest.mark.parametrize(("name", "nested"), NESTED)
def test_lightning_cli_constructs_the_views_and_the_loss(name, nested, needs, run):
    needs("lightly", "pytorch_lightning", "jsonargparse")
    folder = EXAMPLES / "lightning_cli"
    options = ["fit", "--config", str(folder / f"{name}.yaml")]
    options += ["--model.criterion.base_loss", nested] if nested else []
    _, lines = run(folder / f"{name}.py", *options)
    assert ("equivariance" in lines[-1]) == (name == "care")


@pytest.mark.parametrize("name", ["before", "care", "adapter"])
def test_pytorch_metric_learning_trains(name, needs, run):
    needs("pytorch_metric_learning")
    found, lines = run(EXAMPLES / "pytorch_metric_learning" / f"{name}.py")
    assert len(lines) == (1 if name == "adapter" else 2)
    if name == "adapter":
        z1, z2, care = found["z1"], found["z2"], found["care"]
        both, labels = torch.cat([z1, z2]), found["labels"]
        assert torch.equal(care(both, labels), care.criterion(z1, z2))
        with pytest.raises(ValueError, match="neither a miner nor reference embeddings"):
            care(both, labels, ref_emb=both.clone(), ref_labels=labels)
        for wrong in (torch.arange(128), None):
            with pytest.raises(ValueError, match="needs labels of which the second half repeats"):
                care(both, wrong)


@pytest.mark.parametrize("name", ["before", "care"])
def test_the_trainer_of_transformers_trains(name, needs, run):
    needs("transformers", "accelerate")
    _, lines = run(EXAMPLES / "transformers" / f"{name}.py")
    assert len([line for line in lines if "loss" in line]) == 2
    assert any("equivariance" in line for line in lines) == (name == "care")


SITE = """
import sys
sys.path.append({tests!r})
from conftest import load_torchvision
load_torchvision()
"""


@pytest.mark.parametrize(
    ("script", "name", "processes"),
    [
        ("main_pretrain.py", "simclr", 1),
        ("care.py", "care", 1),
        ("care.py", "care", 2),
        ("rotation_contrast.py", "care", 2),
    ],
)
def test_solo_learn_trains(script, name, processes, solo_learn, tmp_path):
    folder, site = EXAMPLES / "solo_learn", tmp_path / "site"
    for path in (solo_learn / "main_pretrain.py", solo_learn / "solo", *folder.iterdir()):
        (tmp_path / path.name).symlink_to(path)
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": f"{site}:{tmp_path}", "OMP_NUM_THREADS": "1"}
    command = [script, "--config-path", str(folder), "--config-name", f"{name}.yaml"]
    if script == "rotation_contrast.py":
        command += ["method_kwargs.chunks=1"]
    if processes > 1:
        command += ["strategy=ddp", f"devices='{processes}'"]
    for arguments in (["random_images.py"], command):
        result = subprocess.run(
            [sys.executable, "-W", "ignore", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
        )
        assert result.returncode == 0, result.stderr
    with open(tmp_path / "lightning_logs" / "version_0" / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train_class_loss_step"]]
    assert len(rows) == 4 // processes  # 256 images, 64 for each process
    if name == "simclr":
        assert all(float(row["train_nce_loss_step"]) > 0 for row in rows)
        return
    # An untrained network makes all rows alike: then it is log(2N - 1) for the N rows of all.
    alike = pytest.approx(math.log(128 * processes - 1), abs=0.3)
    if script == "rotation_contrast.py":
        assert float(rows[0]["train_loss"]) == alike
        assert all(float(row["train_share"]) < 1 for row in rows)
        return
    for row in rows:
        loss, base, gap = (float(row[f"train_{part}"]) for part in ("loss", "base", "equivariance"))
        print(f"loss {loss:.4f}, base {base:.4f}, equivariance {gap:.4f}")
        assert gap > 0
        assert loss == pytest.approx(base + 10 * gap)
    assert float(rows[0]["train_base"]) == alike


def test_the_configurations_on_the_page_construct_a_nested_base_loss(needs):
    needs("jsonargparse", "lightly", "yaml")
    hydra, cli = (param.values[1] for param in blocks("yaml"))
    load_yaml = load_class("yaml", "safe_load")
    parser = load_class("jsonargparse", "ArgumentParser")()
    parser.add_subclass_arguments(torch.nn.Module, "criterion")
    losses = [parser.instantiate(parser.parse_object(load_yaml(cli)["model"])).criterion]
    if importlib.util.find_spec("hydra"):
        losses.append(load_class("hydra.utils", "instantiate")(load_yaml(hydra)["loss"]))
    for loss in losses:
        assert type(loss.base_loss).__name__ == "BarlowTwinsLoss"
        assert loss.shared_views


# Transforms: what tests/test_mistakes.py has for torchvision, for the others


def image(size=40):
    return torch.rand(3, size, size)


def test_kornia_shares_only_with_same_on_batch(needs):
    needs("kornia")
    import kornia.augmentation as K

    assert_shared(K.ColorJiggle(0.4, 0.4, 0.4, 0.1, same_on_batch=True), image())
    with pytest.raises(ValueError, match="must draw one augmentation for all images of a chunk"):
        assert_shared(K.ColorJiggle(0.4, 0.4, 0.4, 0.1), image())
    pipeline = K.AugmentationSequential(
        K.RandomHorizontalFlip(same_on_batch=True), K.RandomHue((-0.5, 0.5), p=1)
    )
    with pytest.raises(ValueError, match="must draw one augmentation for all images of a chunk"):
        assert_shared(pipeline, image())


def test_albumentations_shares_only_with_a_seed_in_every_call(needs):
    needs("albumentations")
    import albumentations as A

    pipeline = A.Compose([A.ColorJitter(hue=0.1, p=1), A.ToTensorV2()])

    def unseeded(x):
        return pipeline(image=x.permute(1, 2, 0).numpy())["image"]

    def seeded(x):
        pipeline.set_random_seed(random.getrandbits(32))
        return unseeded(x)

    with pytest.raises(ValueError, match="must draw one augmentation for all images of a chunk"):
        assert_shared(unseeded, image(), batched=False)
    assert_shared(seeded, image(), batched=False)


def test_torchvision_transforms_only_the_first_of_a_list_of_tensors(torchvision):
    jitter = torchvision.transforms.v2.ColorJitter(0.4, 0.4, 0.4)

    def listed(images):
        return torch.stack(jitter(list(images)))

    images = torch.rand(4, 3, 8, 8)
    assert torch.equal(listed(images)[1:], images[1:])  # the trap, in silence
    with pytest.raises(ValueError, match="must draw one augmentation for all images of a chunk"):
        assert_shared(listed, images[0])
    with pytest.raises(ValueError, match=r"must be a tensor of shape .*, got list: stack the"):
        shared_views(list(images), jitter, chunks=2)


def test_a_seed_inside_a_transform_is_refused(torchvision):
    jitter = torchvision.transforms.v2.ColorJitter(0.4, 0.4, 0.4)

    def seeded(x):
        torch.manual_seed(0)
        return jitter(x)

    for batched in (True, False):
        with pytest.raises(ValueError, match="must draw a new augmentation for each view"):
            assert_shared(seeded, image(), batched=batched)


def test_torchvision_v1_draws_once_for_a_tensor(torchvision):
    t = torchvision.transforms
    augment = t.Compose([t.RandomResizedCrop(16), t.ColorJitter(0.4, 0.4, 0.4, 0.5)])
    assert_shared(augment, image())


def test_kornia_in_the_data_loader_keeps_the_dimensions(needs):
    needs("kornia")
    import kornia.augmentation as K

    for check in (
        lambda transform: assert_shared(transform, image(), batched=False),
        lambda transform: SharedAugmentCollate(transform, chunks=1)([(image(), 0)] * 2),
    ):
        check(K.ColorJiggle(0.4, keepdim=True))
        with pytest.raises(ValueError, match="With kornia, set keepdim=True"):
            check(K.ColorJiggle(0.4))


@pytest.mark.parametrize("temperature", [0.1, 0.5])
@pytest.mark.parametrize("library", ["lightly", "pytorch_metric_learning", "solo"])
def test_info_nce_equals_that_of(library, temperature, needs, request):
    z1, z2 = torch.randn(2, 128, 64)
    z2 = z1 + z2  # as embeddings of two views of the same images
    if library == "lightly":
        needs("lightly")
        theirs = load_class("lightly.loss", "NTXentLoss")(temperature=temperature)(z1, z2)
    elif library == "solo":
        request.getfixturevalue("solo_learn")
        function = load_class("solo.losses.simclr", "simclr_loss_func")
        theirs = function(torch.cat([z1, z2]), torch.arange(128).repeat(2), temperature)
    else:
        needs("pytorch_metric_learning")
        loss = load_class("pytorch_metric_learning.losses", "NTXentLoss")(temperature=temperature)
        theirs = load_class("pytorch_metric_learning.losses", "SelfSupervisedLoss")(loss)(z1, z2)
    assert InfoNCELoss(temperature)(z1, z2).item() == pytest.approx(theirs.item(), abs=1e-6)


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
        (x0, x1, chunks), _ = batch
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


def test_two_processes_of_lightning_log_the_info_nce_of_the_global_batch(needs, tmp_path):
    needs("lightly", "pytorch_lightning")
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
    assert len(ranks[0]) == 2 * 2  # 128 images, 32 for each of two processes
    assert ranks[0] == ranks[1]
    for base, whole in zip(ranks[0][::2], ranks[0][1::2], strict=True):
        assert float(base) == pytest.approx(float(whole), abs=2e-6)


# Watching a training


@pytest.fixture
def watched():
    """Held-out clouds, how to turn them, and a monitor that is due at steps 0 and 2 of 4."""

    def turn(clouds):
        angle = 2 * math.pi * torch.rand(())
        c, s = angle.cos(), angle.sin()
        return clouds @ torch.stack([c, s, -s, c]).view(2, 2)

    return turn, EquivarianceMonitor(torch.randn(64, 8, 2), {"turn": turn}, every=2)


def encode():
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))


def test_lightning_logs_what_the_monitor_measures(needs, watched, tmp_path):
    needs("pytorch_lightning")
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

    turn, monitor = watched
    callback = load(EXAMPLES / "lightning_monitor.py").WatchEquivariance(monitor)
    criterion = CAREloss(shared_views=True)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder = encode()

        def forward(self, x):
            assert x.dtype is torch.float32
            return self.encoder(x)

        def training_step(self, batch, batch_index):
            *views, chunks = shared_views(batch, turn, chunks=4)
            return criterion(*map(self, views), chunks=chunks)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the advice of Lightning
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            accumulate_grad_batches=2,
            logger=CSVLogger(tmp_path),
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(8 * 16, 8, 2), 16))
    (path,) = tmp_path.rglob("metrics.csv")
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [0, 2]  # of four steps, with two batches each
    assert all(0 < float(row["turn/gap_ratio"]) < 2 for row in rows)


def test_the_trainer_of_transformers_logs_what_the_monitor_measures(needs, watched, tmp_path):
    needs("transformers", "accelerate")
    from transformers import Trainer, TrainingArguments

    turn, monitor = watched
    criterion = CAREloss(shared_views=True)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encode()

        def forward(self, clouds, labels):
            *views, chunks = shared_views(clouds, turn, chunks=4)
            return {"loss": criterion(*map(self.encoder, views), chunks=chunks)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    dataset = [{"clouds": cloud, "labels": 0} for cloud in torch.randn(8 * 16, 8, 2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the advice of the Trainer
        model = Model()
        trainer = Trainer(model, arguments, train_dataset=dataset)
        watch = load(EXAMPLES / "transformers_monitor.py").WatchEquivariance
        trainer.add_callback(watch(trainer, model.encoder, monitor))
        trainer.train()
    rows = [row for row in trainer.state.log_history if "turn/gap_ratio" in row]
    assert [row["step"] for row in rows] == [0, 2]  # of four steps, with two batches each
    assert all(0 < row["turn/gap_ratio"] < 2 for row in rows)
