"""The package as a whole: what imports what, what it needs, what the documents say."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import care_loss

PACKAGE = Path(care_loss.__file__).parent
ROOT = Path(__file__).parent.parent
# A module imports from layers below its own only; the lowest come first.
LAYERS = (
    ("_characters", "_checks", "_chunks", "_rng", "_numerics", "recipes"),
    ("_polar", "_report_checks", "_view_checks"),
    ("_few_rows",),
    ("_autograd.__init__", "_autograd.paths", "_autograd.unit_rows"),
    ("_autograd.gram_gap", "_autograd.info_nce", "rotation", "sphere", "views"),
    ("_autograd.queue",),
    ("_autograd.operators",),
    ("_moments", "functional", "metrics._sampling", "metrics._tables"),
    ("actions._action", "actions._spherical", "distributed", "metrics._measures"),
    ("actions._fit", "actions._highest"),
    ("actions._circle", "actions._so3"),
    ("actions.__init__",),
    ("metrics._frequencies", "metrics._report", "modules"),
    ("metrics._compare", "metrics._monitor"),
    ("metrics.__init__",),
    ("__init__",),
)
LAYER = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(source):
    """The modules that a source file imports, those of the package as 'care_loss.name'."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "care_loss":
                found |= {f"care_loss.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_imports_are_found_in_every_form():
    source = "import numpy as np, care_loss.views\nfrom care_loss import sphere\n"
    source += "def f():\n    from care_loss.modules import CAREloss\n"
    expected = {"numpy", "care_loss.views", "care_loss.sphere", "care_loss.modules"}
    assert imports(source) == expected


def room(path):
    """The name of a module below care_loss, with dots where it lies in a folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def test_imports_point_down():
    files = {room(path): path for path in PACKAGE.rglob("*.py")}
    assert files.keys() == LAYER.keys()
    for name, path in files.items():
        inside = {m for m in imports(path.read_text()) if m.startswith("care_loss.")}
        for other in {m.removeprefix("care_loss.") for m in inside}:
            level = LAYER.get(other, LAYER.get(f"{other}.__init__"))
            assert level < LAYER[name], f"{name} imports {other}"


def test_hyperparameters_of_functions_are_keyword_only():
    names = ["actions", "distributed", "functional", "metrics", "rotation", "sphere", "views"]
    for module in (importlib.import_module(f"care_loss.{name}") for name in names):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or not function.__module__.startswith(module.__name__):
                continue
            for parameter in inspect.signature(function).parameters.values():
                optional = parameter.default is not parameter.empty
                expected = parameter.KEYWORD_ONLY if optional else parameter.POSITIONAL_OR_KEYWORD
                assert parameter.kind in (expected, parameter.KEYWORD_ONLY), (name, parameter.name)


def test_private_names_stay_in_their_module():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != "care_loss":
                assert not [a.name for a in node.names if a.name.startswith("_")], path.name


def may_import(path):
    """What a module may import from outside: the report, a progress bar too."""
    optional = {"tqdm"} if room(path) == "metrics._sampling" else set()
    return sys.stdlib_module_names | {"torch"} | optional


def test_only_torch_and_the_standard_library_are_imported():
    for path in PACKAGE.rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path.read_text())} - {"care_loss"}
        assert outside <= may_import(path), path.name


def run_without(module, code):
    """Run code in an interpreter in which a module cannot be imported."""
    block = f"import sys; sys.modules[{module!r}] = None; "
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", block + code], capture_output=True, text=True
    )


@pytest.mark.parametrize("module", ["numpy", "tqdm", "triton", "torchvision"])
def test_the_package_works_without(module):
    code = (
        "import torch, care_loss; "
        "z = torch.randn(2, 8, 4, requires_grad=True); "
        "care_loss.CAREloss(chunks=2, shared_views=True)(*z).backward(); "
        "care_loss.views.SharedAugmentCollate(lambda x: x, chunks=1)([(z[0, 0], 0)] * 2)"
    )
    result = run_without(module, code)
    assert result.returncode == 0, result.stderr
    result = run_without(module, f"import {module}; {code}")  # this test can fail
    assert f"import of {module} halted" in result.stderr


def test_the_package_is_typed_and_versioned():
    assert (PACKAGE / "py.typed").exists()
    assert re.fullmatch(r"\d+\.\d+\.\d+", care_loss.__version__)
    assert all(hasattr(care_loss, name) for name in care_loss.__all__)


def test_every_public_function_has_types_and_a_docstring():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                function = ("forward", "setup_context", "backward", "jvp", "vmap")
                inherited = node.name in (*function, "extra_repr")
                assert ast.get_docstring(node) or inherited, f"{path.name}: {node.name}"
            if isinstance(node, ast.FunctionDef):
                assert node.returns is not None, f"{path.name}: {node.name}"


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
HOSTS = ROOT / "docs" / "hosts"  # what their pages need, tests/test_hosts.py knows
DOCUMENTS = [
    page
    for page in PAGES
    if "```python" in page.read_text(encoding="utf-8") and HOSTS not in page.parents
]


def blocks(document):
    text = document.read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def test_the_readme_has_code_to_run():
    assert "README.md" in [document.name for document in DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_code_in_the_documents_runs(document):
    namespace = {}
    for block in blocks(document):
        exec(compile(block, document.name, "exec"), namespace)
    assert namespace.get("loss", torch.zeros(())).isfinite()
    assert document.name != "README.md" or {"loss", "report"} <= namespace.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text  # nothing is left to be filled in
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
