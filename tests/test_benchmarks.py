"""The benchmarks at small sizes, and the claims of failures."""

import csv
import importlib
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.xdist_group("benchmarks")  # which import the libraries of rivals
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(name, *options):
    """Run a benchmark as a user does, in a process of its own; return what it prints."""
    # torch warns of its own use of TorchScript when inductor is first used.
    warnings = ["-W", "error", "-W", "ignore::DeprecationWarning:torch.jit._script"]
    command = [sys.executable, *warnings, str(BENCHMARKS / name), *options]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def here(monkeypatch, capsys):
    """The same in this process, where the libraries of the rivals are imported once for all."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def run_here(name, *options):
        path = str(BENCHMARKS / name)
        monkeypatch.setattr(sys, "argv", [path, *options])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    yield run_here
    torch.set_num_threads(threads)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_similarities_are_timed_beside_their_rivals(tmp_path, here):
    path = tmp_path / "similarity.csv"
    here("similarity.py", "--quick", "--csv", str(path))
    rows = read(path)
    contenders = {"care_loss", "care_loss, the rotation alone", "roma", "Umeyama with autograd"}
    assert {row["contender"] for row in rows} == contenders
    assert all(float(row["ms"]) > 0 for row in rows)
    committed = read(BENCHMARKS / "results" / "similarity-cpu.csv")
    assert committed[0].keys() == rows[0].keys()


def test_actions_are_timed_beside_bare_products(tmp_path, here):
    path = tmp_path / "actions.csv"
    here("actions.py", "--quick", "--rounds", "2", "--csv", str(path))
    rows = read(path)
    names = ["products and decompositions", "care_loss", "two products", "pose", "invariants"]
    assert [row["contender"] for row in rows] == names
    assert all(float(row["ms"]) > 0 for row in rows)
    assert read(BENCHMARKS / "results" / "actions-cpu.csv")[0].keys() == rows[0].keys()


def test_rotations_are_timed_beside_their_rivals(tmp_path, device, here):
    path = tmp_path / "procrustes.csv"
    printed = here("procrustes.py", "--quick", "--device", str(device), "--csv", str(path))
    rows = read(path)
    contenders = {row["contender"] for row in rows}
    assert {"floor: the product", "SVD", "care_loss", "care_loss, SO(D)", "roma"} <= contenders
    assert all(contender in printed for contender in contenders)
    ours = [row for row in rows if row["contender"].startswith("care_loss")]
    assert all(float(row["ms"]) > 0 for row in rows)
    for row in ours:
        if row["direction"] == "forward":
            assert float(row["orthogonality"]) < 8
            assert float(row["excess"]) < 1e-6
        else:
            assert float(row["finite gradients"]) == 1


@pytest.mark.deep
def test_the_failures_in_full_are_those_of_the_committed_results(tmp_path):
    path = tmp_path / "failures.csv"
    run("failures.py", "--csv", str(path))  # which fails if a result is not as described
    fits = {row["library"]: row for row in read(path) if "16 rows" in row["case"]}
    assert fits["care_loss"]["result"] == fits["roma"]["result"] == "right"


def test_others_fail_where_it_is_said_and_care_loss_does_not(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("GEOMSTATS_BACKEND", "pytorch")
    failures = importlib.import_module("failures")
    # The backward of roma takes a Jacobian of 128**4 entries: half of the time of all cases.
    monkeypatch.delitem(failures.FEW_ROWS, "roma")
    path = tmp_path / "failures.csv"
    monkeypatch.setattr(sys, "argv", ["failures.py", "--csv", str(path)])
    failures.main()
    rows = read(path)
    assert all(row["result"] == "right" for row in rows if row["library"] == "care_loss")
    assert len({row["case"] for row in rows if row["library"] == "care_loss"}) > 15
    failed = {row["library"] for row in rows if row["result"] != "right"}
    assert {"SVD with autograd", "authors", "lightly", "roma", "SciPy", "torchmetrics"} <= failed
    assert all(row["promise"] for row in rows)


def test_the_sphere_keeps_its_bounds_beside_its_rivals(tmp_path, here):
    path = tmp_path / "errors.csv"
    printed = here("sphere.py", "--quick", "--errors", str(path))
    assert "copy of the inputs" in printed
    rows = read(path)
    found = {(row["question"], row["dtype"], row["angle"]): row for row in rows}
    itself = found["distance of a point to itself", "float32", "0"]
    assert float(itself["care_loss"]) == 0
    assert float(itself["acos, clamped"]) > 1e-4


def test_ways_to_give_chunks_are_timed(tmp_path, here):
    path = tmp_path / "chunks.csv"
    here("chunks.py", "--quick", "--csv", str(path))
    ratios = {row["given as"]: float(row["ratio"]) for row in read(path)}
    assert ratios["a number"] == 1
    assert len(ratios) == 5


def contenders_of(name, tmp_path, device, run, *options):
    path = tmp_path / "results.csv"
    printed = run(name, "--quick", "--device", str(device), "--csv", str(path), *options)
    rows = read(path)
    assert all(row["contender"] in printed for row in rows)
    assert all(row["commit"] and row["torch"] and row["device"] for row in rows)
    return {row["contender"]: row for row in rows}


COMPILED = "torch.compile of plain"


@pytest.mark.parametrize(
    ("name", "rivals"),
    [
        ("contrastive.py", {"authors", "lightly", "pytorch-metric-learning", "plain autograd"}),
        ("equivariance.py", {"authors", "plain autograd"}),
        ("care.py", {"authors", "plain autograd", "torch.compile of care_loss"}),
    ],
)
def test_losses_are_timed_beside_their_rivals_and_a_floor(name, rivals, tmp_path, device, here):
    found = contenders_of(name, tmp_path, device, here, "--rounds", "2")
    assert rivals | {COMPILED, "care_loss", "matrix products alone"} <= set(found)
    assert float(found["authors"]["ratio"]) == 1
    assert all(float(row["ms"]) > 0 for row in found.values())


def test_measures_are_timed(tmp_path, device, here):
    found = contenders_of("metrics.py", tmp_path, device, here, "--rounds", "2")
    assert {"wahba_error", "scipy, a loop", "equivariance_report"} <= set(found)
    assert all(float(row["ms"]) > 0 for row in found.values())


def test_the_measures_of_many_draws_took_less_than_ten_seconds():
    rows = read(BENCHMARKS / "results" / "metrics-cpu.csv")
    (row,) = [r for r in rows if r["draws"] == "64" and r["contender"] == "equivariance_report"]
    assert (row["images"], row["D"], row["threads"]) == ("2000", "128", "2")
    assert float(row["ms"]) < 10_000  # which docs/measures.md says is about 7 s
    assert round(float(row["ms"]) / 1000) == 7


def test_a_monitor_is_timed_beside_a_training_step(tmp_path, device, here):
    found = contenders_of("monitor.py", tmp_path, device, here, "--rounds", "2")
    assert set(found) == {"training step", "monitor call"}
    assert 0 < float(found["monitor call"]["of an epoch"]) < 1


def test_a_call_of_the_monitor_took_less_than_three_percent_of_an_epoch():
    rows = read(BENCHMARKS / "results" / "monitor-cpu.csv")
    found = {int(row["D"]): float(row["of an epoch"]) for row in rows if "call" in row["contender"]}
    assert set(found) == {32, 128}
    assert all(share < 0.03 for share in found.values())
    page = (BENCHMARKS.parent / "docs" / "measures.md").read_text(encoding="utf-8")
    for d, share in found.items():
        assert f"{100 * share:.1f} % (D = {d})" in page


MATRIX = 4 * 512**2 / 2**20  # megabytes of all scores


def test_the_memory_of_one_contender_is_measured(device):
    printed = run("memory.py", "--device", str(device), "--one", "plain autograd", "256", "128")
    assert float(printed) > MATRIX


@pytest.mark.deep
def test_memory_is_measured_in_a_process_of_each_contender(tmp_path, device):
    found = contenders_of("memory.py", tmp_path, device, run)
    assert set(found) == {"authors", "lightly", "plain autograd", COMPILED, "care_loss"}
    assert float(found["plain autograd"]["MB"]) > MATRIX


def test_operations_are_counted(tmp_path, device, here):
    path = tmp_path / "operations.csv"
    here("operations.py", "--quick", "--device", str(device), "--csv", str(path))
    found = {(row["loss"], row["contender"]): row for row in read(path)}
    assert int(found["CARE", "authors"]["operations"]) > 4000
    assert int(found["CARE", "authors"]["waiting"]) > 30
    assert int(found["CARE", "care_loss"]["operations"]) <= 120
    assert int(found["CARE", "care_loss"]["waiting"]) == 0


def test_digits_are_counted_beside_rivals(tmp_path, device, here):
    path = tmp_path / "precision.csv"
    here("precision.py", "--device", str(device), "--rounds", "2", "--csv", str(path))
    found = {(row["loss"], row["at"], row["contender"]): row for row in read(path)}
    assert float(found["InfoNCE", "0.0125", "care_loss"]["gradient"]) < 1e-4
    for rival in ("authors", "lightly", "plain autograd"):
        assert float(found["InfoNCE", "0.0125", rival]["gradient"]) > 0.1
    assert float(found["equivariance", "0.0001", "care_loss"]["value"]) < 1e-2
    assert float(found["equivariance", "0.0001", "products of the columns"]["value"]) > 0.1


def test_two_threads_are_compared_with_one(tmp_path):
    path = tmp_path / "threads.csv"
    run("threads.py", "--quick", "--csv", str(path))
    rows = read(path)
    assert {row["policy"] for row in rows} == {"default", "passive"}
    assert {row["load"] for row in rows} == {"idle", "one core busy"}
    assert len(rows) == 2 * 2 * 3 * 2
    assert all(float(row["ms"]) > 0 for row in rows)
    assert all(float(row["ratio"]) == 1 for row in rows if row["at once"] == "1")


def test_a_whole_step_is_timed_with_each_loss(tmp_path, device):
    found = contenders_of("step.py", tmp_path, device, run, "--rounds", "2")
    assert {"lightly", "care_loss, two forwards"} == set(found)
    assert all(float(row["images/s"]) > 0 < float(row["MB"]) for row in found.values())


def test_the_run_for_gpus_works_on_a_cpu(tmp_path):
    fits = ["nearest_orthogonal", "fit_rotation", "few rows"]
    parts = ["paths", "tests", "step", "CARE", "NT-Xent", *fits, "figure"]
    options = ["--device", "cpu", "--quick", "--processes", "1", "--folder", str(tmp_path)]
    options += ["--only", "default_device and slerp"]
    printed = run("cuda_run.py", *options, "--parts", *parts)
    assert [line.split(":")[0] for line in printed.splitlines()] == parts
    assert printed.count(": passed after") == len(parts)
    assert printed == (tmp_path / "summary.txt").read_text()
    assert " passed" in (tmp_path / "tests.txt").read_text()
    assert (tmp_path / "cuda.png").stat().st_size > 10_000
    assert len(list(tmp_path.iterdir())) <= 8

    rows = read(tmp_path / "cuda.csv")
    sections = {"ceilings", "NT-Xent", "CARE", "equivariance", "nearest_orthogonal"}
    assert {row["section"] for row in rows} == sections | {"fit_rotation", "few rows", "step"}
    ours = [row for row in rows if row["contender"] == "care_loss"]
    assert all(float(row["µs_low"]) <= float(row["µs"]) <= float(row["µs_high"]) for row in ours)
    errors = [row for row in ours if row["section"] in ("NT-Xent", "CARE", "equivariance")]
    assert len(errors) == 5
    assert all(float(row["error"]) < 1e-5 > float(row["gradient error"]) / 1000 for row in errors)
    half = {r["contender"]: r["products"] for r in rows if r["embeddings"] == "bfloat16"}
    assert half["care_loss"] == "float32"
    assert half["plain autograd"] == "bfloat16"

    paths = read(tmp_path / "cuda-paths.csv")
    assert {row["section"] for row in paths} == {
        *("steps", "values", "solvers", "determinant", "dense", "polar")
    }
    assert all(row["note"] == "right" for row in paths if row["section"] == "determinant")
    assert {row["contender"] for row in paths if row["section"] == "dense"} > {"dense"}


@pytest.fixture
def cuda_run(monkeypatch):
    """The module benchmarks/cuda_run.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("cuda_run")


def test_a_part_that_hangs_is_stopped_and_keeps_what_it_has_written(tmp_path, cuda_run):
    child = f"import time; time.sleep(5); open({str(tmp_path / 'child')!r}, 'w')"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); "
    code += "print('a row'); time.sleep(60)"
    part = cuda_run.Part([sys.executable, "-c", code], 60, "log.txt")
    start = time.monotonic()
    assert cuda_run.run(part, tmp_path, 2) == "STOPPED after 2 s"
    assert time.monotonic() - start < 20
    time.sleep(5)
    assert not (tmp_path / "child").exists()  # what it had started is stopped as well
    part = cuda_run.Part([sys.executable, "-c", "import sys; sys.exit(3)"], 60, "log.txt")
    assert cuda_run.run(part, tmp_path, 60) == "FAILED with status 3"
    assert "a row\n" in (tmp_path / "log.txt").read_text()


def test_a_run_for_gpus_goes_on_after_a_part_that_fails(tmp_path, cuda_run, monkeypatch, capsys):
    def part(code):
        return cuda_run.Part([sys.executable, "-c", code], 60, "log.txt")

    found = {"one": part("import time; time.sleep(60)"), "two": part("assert 0, 'why'")}
    found["three"] = part("")
    monkeypatch.setattr(cuda_run, "parts", lambda *_: found)
    monkeypatch.setattr(sys, "argv", ["cuda_run.py", "--folder", str(tmp_path)])
    monkeypatch.setattr(cuda_run, "TOGETHER", 10)
    found["one"] = found["one"]._replace(limit=2)
    with pytest.raises(SystemExit) as ended:
        cuda_run.main()
    assert ended.value.code == 1
    one, two, three = capsys.readouterr().out.splitlines()
    assert one.startswith("one: STOPPED after 2 s")
    assert two.startswith("two: FAILED with status 1")
    assert "AssertionError: why" in two
    assert three.startswith("three: passed")
    monkeypatch.setattr(cuda_run, "TOGETHER", 1)  # nothing begins when the time of all is over
    with pytest.raises(SystemExit):
        cuda_run.main()
    assert "three: LEFT OUT" in capsys.readouterr().out


def test_what_is_measured_on_a_gpu_says_why_it_is_not(measuring):
    def fails():
        raise ValueError("a message\nof two lines")

    reason = "failed with ValueError: a message of two lines"
    assert measuring.timed(fails, "cpu") == {"note": reason}
    calls = []
    found = measuring.timed(lambda: calls.append(0), "cpu", budget=0)
    assert len(calls) == 6  # two, one for the memory, and three that are timed
    assert found.keys() == {"MB", "µs", "µs_low", "µs_high"}
    assert measuring.answer("a-program-that-nobody-has") == ""


@pytest.fixture
def measuring(monkeypatch):
    """The module benchmarks/measuring.py."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measuring")


def test_the_figures_are_drawn_from_the_results(tmp_path):
    figure, ratios, table = (tmp_path / name for name in ("speed.png", "ratios.png", "growth.csv"))
    run("figures.py", "--figure", str(figure), "--ratios", str(ratios), "--csv", str(table))
    assert min(path.stat().st_size for path in (figure, ratios)) > 10_000
    assert read(table) == read(BENCHMARKS / "results" / "growth.csv")


def test_processes_are_measured_beside_their_rivals(tmp_path):
    path = tmp_path / "distributed.csv"
    printed = run("distributed.py", "--quick", "--rounds", "2", "--csv", str(path))
    found = {row["contender"]: row for row in read(path)}
    assert all(name in printed for name in found)
    assert {"care_loss", "lightly", "open_clip", "open_clip, local_loss"} <= found.keys()
    n, d = 256, 128
    expected = {"care_loss": 2 * n * d * 4 + 32 * n + 32, "lightly": 6 * n * d * 4}  # W - 1 = 1
    for name, received in expected.items():
        assert float(found[name]["KB"]) == pytest.approx(received / 1000, abs=0.06)
    run("distributed.py", "--calculate", "--csv", str(path))
    committed = BENCHMARKS / "results" / "distributed-calculated.csv"
    assert path.read_text() == committed.read_text()


def test_contenders_with_a_queue_compute_the_same(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    negatives = importlib.import_module("negatives")
    monkeypatch.setattr(negatives, "ROWS", 50)
    calls = negatives.calls(6, 4, device="cpu", dtype=torch.float64)
    assert calls.pop(negatives.FLOOR)().shape == (6, 4)
    expected = calls["MoCo's form"]()
    for call in calls.values():
        torch.testing.assert_close(call(), expected)
