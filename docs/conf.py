"""How Sphinx builds the site: `make docs`."""

from importlib.metadata import metadata
from importlib.util import find_spec
from typing import Any

from sphinx.application import Sphinx

import care_loss

# project.urls of pyproject.toml: "Repository" and "Documentation" are absent until they exist.
URLS = dict(url.split(", ") for url in metadata("care_loss").get_all("Project-URL") or [])

project = "care_loss"
author = "the authors of care_loss"
release = version = care_loss.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["examples"]

# Pages are Markdown that GitHub shows as well.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
source_suffix = {".md": "myst-nb"}

# The tutorial is executed by each build, so that its outputs are those of this version.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # warnings have the paths of the machine

# The reference comes from the docstrings, in which single backticks mean code.
default_role = "code"
# A heading of its own: "Returns: The loss, >= 0: ..." would take what is before a colon for a type.
napoleon_custom_sections = ["Returns"]
napoleon_use_ivar = True
autodoc_default_options = {"members": True, "member-order": "bysource"}
autosummary_generate = False
autodoc_typehints = "signature"
maximum_signature_line_length = 80
python_use_unqualified_type_names = True
add_module_names = False
nitpicky = True
# Names of other libraries, to whose pages a build without network cannot link.
nitpick_ignore_regex = [("py:.*", r"(?!care_loss\b).*")]

html_theme = "furo"
html_title = f"care_loss {release}"
html_baseurl = URLS.get("Documentation", "")
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_domain_indices = False
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_theme_options: dict[str, Any] = {}
if "Repository" in URLS:
    html_theme_options["source_repository"] = URLS["Repository"]
    html_theme_options["source_branch"] = "main"
    html_theme_options["source_directory"] = "docs/"

# Formulas are set by one file of MathJax, which is copied into the site: it needs no network.
(mathjax,) = find_spec("sphinx-mathjax-offline").submodule_search_locations  # type: ignore[union-attr]
html_static_path.append(f"{mathjax}/static/mathjax/tex-svg.js")
mathjax_path = "tex-svg.js"


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out fields of named tuples, which the docstrings of these describe."""
    alias = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    return True if alias or name == "extra_repr" else None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-skip-member", skip)
