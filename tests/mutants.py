"""Break modules in random ways, one at a time, and see whether a test fails.

    make mutants MODULE=sphere                     # 40; ARGS="--count 10 --seed 1" draws others
    make mutants MODULE="rotation _polar"          # modules that have their tests in common
    make mutants MODULE=sphere ARGS="--only 3 17"  # the mutants of these numbers alone

cosmic-ray makes the mutants, in a copy of the repository, and none in annotations.
The tests run once with the code as it is; then each mutant meets the tests that run the statement
it changes, the shortest first, up to a number of seconds in all (--seconds). One that no test
notices is printed: a test is missing, or it is equivalent to the code, and belongs into
equivalent_mutants.csv.
"""

import argparse
import ast
import csv
import difflib
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from shutil import copy

os.environ["OMP_NUM_THREADS"] = "1"
# Processes that are forked off have imported these; what tests import of care_loss, they import.
import hypothesis  # noqa: F401
import pytest
import torch  # noqa: F401
from cosmic_ray.mutating import use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from coverage import CoverageData

ROOT = Path(__file__).parent.parent
TESTS = {  # of modules, the tests that run in one process
    "_numerics": "paths sphere inference_mode devices autograd operators",
    "_chunks recipes functional modules "
    "_autograd/gram_gap _autograd/info_nce _autograd/paths _autograd/queue _autograd/unit_rows": (
        "chunks paths functional autograd theorems cross_fitted errors mistakes modules recipes "
        "precision gradients transforms"
    ),
    "_autograd/operators": "operators",
    "_polar _few_rows rotation": (
        "rotation rotation_derivatives rotation_group rotation_precision rotation_uniqueness "
        "similarity errors_geometry"
    ),
    "sphere": "sphere sphere_mean sphere_paths errors_geometry",
    "_characters _moments actions/_action actions/_circle actions/_fit actions/_highest "
    "actions/_so3 actions/_spherical": "actions actions_so3",
    "_rng": "rng",
    "_report_checks metrics/_compare metrics/_frequencies metrics/_measures "
    "metrics/_monitor metrics/_report metrics/_sampling metrics/_tables": (
        "metrics report report_errors report_sampling compare monitor watching actions theorems"
    ),
    "_checks _view_checks views": (
        "views errors errors_geometry mistakes report_errors rotation sphere"
    ),
    "distributed": "distributed distributed_errors distributed_torch",
}
COUNT, SEED = 40, 0
RESULTS = ROOT / "tests" / "mutants.csv"  # of these; docs/tables.py makes a table of them
# Those that change nothing that a test should see, and why.
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.csv"
ELSEWHERE = "_autograd/operators", "distributed"  # run by compilers and in other processes
MEMORY = 16 * 2**30  # bytes of addresses that the tests of a mutant may take
FORK = multiprocessing.get_context("fork")


class Recorder:
    """A plugin of pytest that writes how many seconds each test takes."""

    def __init__(self):
        self.seconds = {}

    def pytest_runtest_logreport(self, report):
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self):
        Path("seconds.json").write_text(json.dumps(self.seconds))


class Chosen:
    """A plugin of pytest that runs the tests of these names, in their order."""

    def __init__(self, names):
        self.place = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        kept = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(kept, key=lambda item: self.place[item.nodeid])


def copy_of_repository(folder: Path) -> None:
    listed = subprocess.check_output(("git", "ls-files"), cwd=ROOT, text=True).splitlines()
    for name in listed:
        if name.split("/")[0] in ("care_loss", "tests", "docs", "pyproject.toml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, folder / name)


def run_pytest(arguments, plugin, silent):
    os.setsid()  # so that the processes that tests start end with this one
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    # A mutant is as long as the code it replaces, and may be as old: it must not be kept.
    sys.dont_write_bytecode = silent
    if silent:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
    arguments = [*arguments, "-q", "-p", "no:cacheprovider"]
    # hypothesis is imported before pytest could rewrite its assertions
    arguments += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    os._exit(int(pytest.main(arguments, plugins=[plugin])))


def passes(arguments, plugin, limit=None, silent=True) -> bool:
    """Return whether the tests pass, within a limit in seconds, in a process of their own."""
    process = FORK.Process(target=run_pytest, args=(arguments, plugin, silent))
    process.start()
    process.join(limit)
    if late := process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
    return not late and process.exitcode == 0


def not_run(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the annotations, and what decorators say."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation:
            yield node.annotation
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from node.decorator_list
            if isinstance(node, ast.FunctionDef) and node.returns:
                yield node.returns


def span(node: ast.expr) -> tuple[tuple[int, int], tuple[int, int]]:
    return (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)


def drawn(module: str, count: int, seed: int) -> list:
    """Return random mutations of a module of the folder."""
    config, session = Path("mutants.toml"), Path("mutants.sqlite")
    session.unlink(missing_ok=True)
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "care_loss/{module}.py"\ntimeout = 1.0\ntest-command = ""\n'
        'excluded-modules = []\ndistributor.name = "local"\n'
    )
    command = sys.executable, "-m", "cosmic_ray.cli", "init", config.name, session.name
    subprocess.run(command, check=True)
    with use_db(session, WorkDB.Mode.open) as db:
        items = [item.mutations[0] for item in db.work_items]
    tree = ast.parse(Path("care_loss", f"{module}.py").read_text())
    spans = [span(node) for node in not_run(tree)]
    items = [one for one in items if not any(a <= one.start_pos < b for a, b in spans)]
    items.sort(key=lambda one: (one.start_pos, one.operator_name, str(one.operator_args)))
    return random.Random(seed).sample(items, min(count, len(items)))


class Lines:
    """Which tests run which statement of a module; `everything` where tests run it elsewhere."""

    def __init__(self, module, seconds):
        path = Path("care_loss", f"{module}.py")
        self.seconds = seconds
        self.everything = module in ELSEWHERE
        self.statements = [
            (node.lineno, node.end_lineno)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.stmt)
        ]
        data = CoverageData()
        data.read()
        found = data.contexts_by_lineno(str(path.resolve()))
        self.names = {
            line: {context.rsplit("|", 1)[0] for context in contexts}
            for line, contexts in found.items()
        }

    def tests(self, line: int, budget: float) -> list[str]:
        """Return the tests that run the innermost statement at a line, the shortest first."""
        around = [(last - first, first, last) for first, last in self.statements]
        _, first, last = min(one for one in around if one[1] <= line <= one[2])
        reached = [names for at, names in self.names.items() if first <= at <= last]
        found = set().union(*reached)
        if "" in found:  # run when the module is imported
            found = set().union(*self.names.values())
        if self.everything or not found:
            found = set(self.seconds)
        ordered = sorted(found & self.seconds.keys(), key=self.seconds.__getitem__)
        total = accumulate(self.seconds[name] for name in ordered)
        return [name for name, so_far in zip(ordered, total, strict=True) if so_far <= budget]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    modules = [module for group in TESTS for module in group.split()]
    parser.add_argument("modules", nargs="+", choices=modules, metavar="MODULE")
    parser.add_argument("--count", type=int, default=COUNT, help="how many mutants are drawn")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--seconds", type=float, default=60, help="of tests, for each mutant")
    parser.add_argument("--only", type=int, nargs="+", help="the numbers of those to be run")
    options = parser.parse_args()
    names = [
        name
        for group, tests in TESTS.items()
        if set(group.split()) & set(options.modules)
        for name in tests.split()
    ]
    files = [f"tests/test_{name}.py" for name in dict.fromkeys(names)]
    files += [f"care_loss/{module}.py" for module in options.modules]
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)  # where mutants are written, and tests import them
        copy_of_repository(Path())
        sys.path.insert(0, name)
        os.environ["PYTHONPATH"] = name
        coverage = "--cov=care_loss", "--cov-context=test", "--cov-report="
        if not passes([*files, *coverage], Recorder(), silent=False):
            parser.error("the tests fail without a mutant: mend them first")
        seconds = json.loads(Path("seconds.json").read_text())
        for module in options.modules:
            try_mutants(module, options, seconds)


def try_mutants(module: str, options: argparse.Namespace, seconds: dict[str, float]) -> None:
    """Run the tests of each mutant of a module, and print those that no test noticed."""
    path = Path("care_loss", f"{module}.py")
    lines, mutations = Lines(module, seconds), drawn(module, options.count, options.seed)
    with EQUIVALENT.open(newline="") as file:
        known = {
            (row["old"], row["new"]) for row in csv.DictReader(file) if row["module"] == module
        }
    numbers = options.only or range(1, len(mutations) + 1)
    equivalent = left = 0
    for number in numbers:
        mutation = mutations[number - 1]
        chosen = lines.tests(mutation.start_pos[0], options.seconds)
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
            compiled.unlink()
        before = path.read_text()
        with use_mutation(path, operator, mutation.occurrence):
            texts = before.splitlines(), path.read_text().splitlines()
            diff = list(difflib.unified_diff(*texts, lineterm="", n=0))
            old, new = ("\n".join(x[1:].strip() for x in diff[3:] if x[0] == sign) for sign in "-+")
            if (old, new) in known:
                equivalent += 1
                continue
            files = dict.fromkeys(one.split("::")[0] for one in chosen)
            survives = passes([*files, "-x"], Chosen(chosen), 60 + 3 * options.seconds)
        print(f"\r{number} of {len(mutations)} ", end="", flush=True, file=sys.stderr)
        if survives:
            left += 1
            print(f"\n{module}, number {number}, after {len(chosen)} tests:")
            print(*diff[2:], sep="\n", flush=True)
    killed = len(numbers) - left - equivalent
    print(f"\n{module}: {killed} killed, {equivalent} equivalent, {left} left", flush=True)
    if (options.count, options.seed, options.only) == (COUNT, SEED, None):
        record(module, (len(numbers), killed, equivalent))


def record(module: str, counts: tuple[int, int, int]) -> None:
    """Replace the row of a module in the committed results."""
    with RESULTS.open(newline="") as file:
        header, *rows = csv.reader(file)
    found = {row[0]: row for row in rows} | {module: [module, *map(str, counts)]}
    with RESULTS.open("w", newline="") as file:
        csv.writer(file).writerows([header, *(found[name] for name in sorted(found))])


if __name__ == "__main__":
    main()
