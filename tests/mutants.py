"""Break a module in random ways, one at a time, and see whether its tests fail.

    make mutants MODULE=sphere            # 40 mutants; ARGS="--count 10 --seed 1" draws others

cosmic-ray makes the mutants, in a copy of the repository. A mutant that no test notices is printed:
it is equivalent to the code, or a test is missing. Mutants of `|` are left out, which stands in
annotations nearly always, and so are those of decorators.
"""

import argparse
import os
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TESTS = {  # the tests of each module, those that fail soonest first
    "_chunks": "functional autograd theorems cross_fitted errors transforms",
    "_checks": "errors errors_geometry mistakes functional",
    "_few_rows": "rotation rotation_precision rotation_derivatives rotation_uniqueness",
    "_polar": "rotation rotation_precision rotation_derivatives rotation_uniqueness",
    "_moments": "actions",
    "_autograd/gram_gap": "functional autograd precision gradients",
    "_autograd/info_nce": "functional autograd precision gradients",
    "_autograd/queue": "functional autograd precision gradients",
    "_autograd/unit_rows": "functional autograd precision",
    "actions/_circle": "actions",
    "functional": "functional theorems gradients errors cross_fitted",
    "metrics/_measures": "metrics theorems",
    "metrics/_report": "report report_errors report_sampling",
    "modules": "modules recipes errors",
    "rotation": "rotation rotation_group rotation_uniqueness similarity errors_geometry",
    "sphere": "sphere sphere_mean sphere_paths errors_geometry",
    "views": "views errors mistakes",
}
LEFT_OUT = "BitOr", "RemoveDecorator"
LIMIT = 180  # seconds for the tests of one mutant


def copy_of_repository(folder: Path) -> None:
    listed = subprocess.check_output(("git", "ls-files"), cwd=ROOT, text=True).splitlines()
    for name in listed:
        if name.split("/")[0] in ("care_loss", "tests", "docs", "pyproject.toml"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def drawn(module: str, folder: Path, count: int, seed: int) -> list:
    """Return random mutations of a module of a copy of the repository."""
    from cosmic_ray.work_db import WorkDB, use_db

    config, session = folder / "mutants.toml", folder / "mutants.sqlite"
    config.write_text(
        f'[cosmic-ray]\nmodule-path = "care_loss/{module}.py"\ntimeout = 1.0\ntest-command = ""\n'
        'excluded-modules = []\ndistributor.name = "local"\n'
    )
    command = sys.executable, "-m", "cosmic_ray.cli", "init", config.name, session.name
    subprocess.run(command, cwd=folder, check=True)
    with use_db(session, WorkDB.Mode.open) as db:
        items = [item.mutations for item in db.work_items]
    items = [one for one in items if not any(name in one[0].operator_name for name in LEFT_OUT)]
    items.sort(key=lambda one: (one[0].start_pos, one[0].operator_name, str(one[0].operator_args)))
    return random.Random(seed).sample(items, min(count, len(items)))


def main() -> None:
    from cosmic_ray.mutating import mutate_and_test
    from cosmic_ray.work_item import TestOutcome

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("module", choices=TESTS)
    parser.add_argument("--count", type=int, default=40, help="how many mutants are drawn")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    files = [f"tests/test_{name}.py" for name in TESTS[options.module].split()]
    tests = sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files
    command = shlex.join(tests)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_of_repository(folder)
        os.chdir(folder)  # where cosmic-ray changes the module, and tests import it
        subprocess.run(tests, check=True, stdout=subprocess.DEVNULL)
        mutations = drawn(options.module, folder, options.count, options.seed)
        survivors = []
        for number, mutation in enumerate(mutations, 1):
            result = mutate_and_test(mutation, command, LIMIT)
            print(f"\r{number} of {len(mutations)}", end="", flush=True, file=sys.stderr)
            if result.test_outcome != TestOutcome.KILLED:
                survivors.append(result.diff)
                print(f"\n{result.diff}", flush=True)
    killed = len(mutations) - len(survivors)
    print(f"\n{options.module}: {killed} of {len(mutations)} mutants killed, seed {options.seed}")


if __name__ == "__main__":
    main()
