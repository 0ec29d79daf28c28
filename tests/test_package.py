"""The package as a whole: what imports what, what it needs, what the documents say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import care_loss

PACKAGE = Path(care_loss.__file__).parent
ROOT = Path(__file__).parent.parent
ALLOWED = {
    "__init__": {
        "distributed",
        "functional",
        "metrics",
        "modules",
        "recipes",
        "rotation",
        "sphere",
        "views",
    },
    "modules": {"_checks", "_chunks", "distributed", "functional"},
    "functional": {
        "_checks",
        "_chunks",
        "_kernels.gram_gap",
        "_kernels.info_nce",
        "_kernels.paths",
        "_numerics",
        "sphere",
    },
    "metrics.__init__": {
        "metrics._frequencies",
        "metrics._measures",
        "metrics._report",
        "metrics._tables",
    },
    "metrics._measures": {
        "_checks",
        "_kernels.paths",
        "_numerics",
        "functional",
        "rotation",
        "sphere",
    },
    "metrics._frequencies": {"_checks", "_numerics", "metrics._measures"},
    "metrics._sampling": {"_checks", "_draws"},
    "metrics._tables": {"_checks"},
    "metrics._report": {
        "_checks",
        "metrics._measures",
        "metrics._sampling",
        "metrics._tables",
        "rotation",
    },
    "views": {"_checks", "_chunks", "_draws"},
    "rotation": {"_checks", "_numerics"},
    "distributed": {
        "_checks",
        "_kernels.info_nce",
        "_kernels.paths",
        "_kernels.unit_rows",
        "_numerics",
        "functional",
    },
    "recipes": set(),
    "sphere": {"_checks", "_kernels.unit_rows", "_numerics"},
    "_kernels.__init__": set(),
    "_kernels.gram_gap": {"_kernels.paths", "_kernels.unit_rows", "_numerics"},
    "_kernels.info_nce": {"_kernels.paths", "_kernels.unit_rows", "_numerics"},
    "_kernels.paths": set(),
    "_kernels.unit_rows": set(),
    "_numerics": set(),
    "_chunks": set(),
    "_checks": set(),
    "_draws": set(),
}


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
    assert files.keys() == ALLOWED.keys()
    for name, path in files.items():
        inside = {m for m in imports(path.read_text()) if m.split(".")[0] == "care_loss"}
        assert {m.removeprefix("care_loss.") for m in inside} <= ALLOWED[name], name


def test_private_names_stay_in_their_module():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module != "care_loss":
                assert not [a.name for a in node.names if a.name.startswith("_")], path.name


def may_import(path):
    """What a module may import from outside: triton in the kernels only, and a progress bar."""
    if room(path).startswith("_kernels."):
        return sys.stdlib_module_names | {"torch", "triton"}
    optional = {"tqdm"} if room(path) == "metrics._sampling" else set()
    return sys.stdlib_module_names | {"torch"} | optional


def test_only_torch_and_the_standard_library_are_imported():
    for path in PACKAGE.rglob("*.py"):
        outside = {name.split(".")[0] for name in imports(path.read_text())} - {"care_loss"}
        assert outside <= may_import(path), path.name
    assert "triton" in may_import(PACKAGE / "_kernels" / "gram_triton.py")
    assert "triton" not in may_import(PACKAGE / "functional.py")


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


def lines_of_code(source):
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    strings = [
        node.body[0]
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
    ]
    documentation = {n for string in strings for n in range(string.lineno, string.end_lineno + 1)}
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in documentation
        for number, line in enumerate(source.splitlines(), 1)
    )


LINES_OF_CODE = {  # at most; what has no entry may have 30
    "_checks": 725,
    "_chunks": 60,
    "_draws": 45,
    "_kernels.gram_gap": 165,
    "_kernels.info_nce": 245,
    "_kernels.paths": 45,
    "_numerics": 40,
    "distributed": 205,
    "functional": 156,
    "metrics.__init__": 40,
    "metrics._frequencies": 50,
    "metrics._measures": 140,
    "metrics._report": 250,
    "metrics._sampling": 195,
    "metrics._tables": 140,
    "modules": 160,
    "rotation": 312,
    "sphere": 200,
    "views": 150,
}


def test_every_module_stays_small():
    assert (
        lines_of_code('"""Doc."""\n\n# why\nx = 1\n\ndef f():\n    """Doc."""\n    return 1\n') == 3
    )
    for path in PACKAGE.rglob("*.py"):
        lines = lines_of_code(path.read_text())
        assert lines <= LINES_OF_CODE.get(room(path), 30), f"{path.name}: {lines} lines of code"


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


def test_the_readmes_first_example_is_short_and_has_one_statement_per_line():
    first = blocks(ROOT / "README.md")[0]
    assert sum(bool(line.strip()) for line in first.splitlines()) <= 16
    statements = [n for n in ast.walk(ast.parse(first)) if isinstance(n, ast.stmt)]
    assert len({statement.lineno for statement in statements}) == len(statements)
    assert not any(isinstance(n, ast.Expr) and isinstance(n.value, ast.Tuple) for n in statements)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_between_the_pages_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert "{{" not in text  # nothing is left to be filled in
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
