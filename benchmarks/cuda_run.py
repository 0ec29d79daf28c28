"""Run on a GPU what decides the paths, the tests, and the benchmark, in eight minutes at most.

    make bench-cuda                                # all parts, on this machine's GPU
    make bench-cuda RUN=python3                    # with a torch of its own, installing nothing
    make bench-cuda ARGS="--parts paths tests"     # half of it

Each part is a process with a limit, and all share one: a part that hangs is stopped with all that
it has started, keeps the rows and the lines that it has written, and the next part goes on. The
exit status is 1 if any part failed or was stopped. The folder gets seven files: cuda.csv and
cuda-paths.csv, one row after the other; cuda.png; tests.txt and tests-compiled.txt; log.txt, with
all that the benchmarks print; and summary.txt, which is also printed.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
TOGETHER = 470  # seconds of all parts
PER_TEST = 60
# Tests of benchmarks, examples and hosts run scripts; those of processes have no device.
LEFT_OUT = ("benchmarks", "docs", "examples", "experiments", "hosts", "package")
IMPORTANT = "inductor and (info_nce or equivariance or CAREloss)"


class Part(NamedTuple):
    """A command with its limit in seconds, and the file that gets what it prints."""

    command: list[str]
    limit: float
    output: str


def parts(folder: Path, options: argparse.Namespace) -> dict[str, Part]:
    """Return all parts, in the order in which they run: first what decides, then what is right."""
    quick = ["--quick"] if options.quick else []

    def benchmark(script: str, *more: str) -> list[str]:
        device = ["--device", options.device]
        return [sys.executable, str(HERE / script), *device, *quick, *more]

    def tests(limit: int, output: str, *more: str) -> Part:
        command = [sys.executable, "-m", "pytest", "--device", options.device, "-q", "-rfE"]
        command += ["-p", "no:cacheprovider", "--tb=short", "--maxfail=60", "--durations=10"]
        # A new card may make torch warn of what no test is about.
        command += ["-W", "default::UserWarning", *plugins(options.processes), *more]
        return Part(command, limit, output)

    rows = str(folder / "cuda.csv")
    ignored = [f"--ignore=tests/test_{name}.py" for name in LEFT_OUT]
    compiled = ["tests/test_transforms.py", "tests/test_rotation_derivatives.py", "-k", IMPORTANT]
    usual = ["-k", options.only or "not inductor", *ignored, "tests"]
    paths = benchmark("cuda_paths.py", "--csv", str(folder / "cuda-paths.csv"))
    found = {
        "paths": Part(paths, 130, "log.txt"),
        "tests": tests(150, "tests.txt", *usual),
    }
    limits = {"step": 35, "CARE": 60, "NT-Xent": 100}
    limits |= {"nearest_orthogonal": 40, "fit_rotation": 30, "few rows": 20}
    for name, limit in limits.items():
        command = benchmark("cuda.py", "--csv", rows, "--sections", name)
        found[name] = Part(command, limit, "log.txt")
    figure = benchmark("cuda.py", "--csv", rows, "--figure", str(folder / "cuda.png"), "--sections")
    found["figure"] = Part(figure, 20, "log.txt")
    found["compiled"] = tests(90, "tests-compiled.txt", *compiled)
    return found


def plugins(processes: int) -> Iterator[str]:
    """Yield the options of pytest's plugins that are installed: processes, and limits of tests."""
    if importlib.util.find_spec("xdist"):
        yield from ("--numprocesses", str(processes), "--dist", "worksteal")
    if importlib.util.find_spec("pytest_timeout"):
        yield from ("--timeout", str(PER_TEST))


def run(part: Part, folder: Path, limit: float) -> str:
    """Run a part, stop it and all that it has started at the limit, and say how it ended."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_COMPILE_THREADS": "2",
    }
    with (folder / part.output).open("a") as file:
        print("$", *part.command, file=file, flush=True)
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            env=environment,
            start_new_session=True,  # a group of its own, so that all of it can be stopped
        )
        try:
            status = process.wait(limit)
            ended = "passed" if status == 0 else f"FAILED with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"STOPPED after {limit:.0f} s"
        finally:  # also what a part has left behind, and where this run is interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:  # in a call of the driver that nothing can stop
            ended += ", and did not end"
    return ended


def count(path: Path) -> int:
    """Return the number of rows of a CSV file, without its header."""
    return max(0, len(path.read_text().splitlines()) - 1) if path.exists() else 0


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    return lines[-1][:200] if lines else ""


def main() -> None:
    accepted = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    accepted.add_argument("--folder", type=Path, default=HERE.parent / "build" / "cuda")
    accepted.add_argument("--device", default="cuda")
    accepted.add_argument("--quick", action="store_true", help="the smallest sizes")
    accepted.add_argument("--processes", type=int, default=8, help="that share the tests")
    accepted.add_argument("--only", help="an expression of pytest for the tests that run")
    accepted.add_argument("--parts", nargs="+", help="by default all")
    options = accepted.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():  # of an earlier run, to which rows would be added
        old.unlink()
    found = parts(folder, options)
    if unknown := set(options.parts or ()) - found.keys():
        accepted.error(f"--parts must be of {', '.join(found)}, got {', '.join(unknown)}")
    end = time.monotonic() + TOGETHER
    failed = False
    with (folder / "summary.txt").open("w") as summary:
        for name in options.parts or found:
            begin = time.monotonic()
            limit = min(found[name].limit, end - begin)
            ended = run(found[name], folder, limit) if limit > 1 else "LEFT OUT: no time is left"
            failed = failed or ended != "passed"
            rows = {x: count(folder / x) for x in ("cuda.csv", "cuda-paths.csv")}
            output = folder / found[name].output
            line = f"{name}: {ended} after {time.monotonic() - begin:.0f} s; rows so far: "
            line += ", ".join(f"{n} in {x}" for x, n in rows.items())
            if output.name != "log.txt" or ended != "passed":
                line += f"; {last_line(output)}"
            for file in (sys.stdout, summary):
                print(line, file=file, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
