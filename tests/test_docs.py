"""The site: it builds without warnings, needs no network, and everything in it can be reached."""

import html
import importlib.util
import inspect
import re
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import care_loss

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
pytestmark = pytest.mark.xdist_group("docs")  # one build for all tests
MODULES = ("actions", "distributed", "functional", "metrics", "rotation", "sphere", "views")


class Page(HTMLParser):
    """What a page refers to, and what in it can be referred to."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded, self.anchors, self.images = [], [], set(), []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.anchors |= {attrs[key] for key in ("id", "name") if attrs.get(key)}
        if tag == "a" and "href" in attrs:
            self.links.append(attrs["href"])
        elif tag == "link" and "href" in attrs and attrs.get("rel") != "canonical":
            self.loaded.append(attrs["href"])
        elif attrs.get("src"):
            self.loaded.append(attrs["src"])
        if tag == "img":
            self.images.append((attrs.get("src"), attrs.get("alt", "")))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder with the site."""
    folder = tmp_path_factory.mktemp("site")
    build = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    # The tutorial is executed by `make docs`; before that, its language is not known.
    build += ["-D", "nb_execution_mode=off", "-D", "suppress_warnings=myst-nb.lexer"]
    command = [sys.executable, *build, "-d", str(folder / "cache"), str(DOCS)]
    result = subprocess.run([*command, str(folder / "html")], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    return folder / "html"


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
    }


def resolve(site, page, target):
    """The file in the site, and the anchor, that a link on a page leads to."""
    parts = urlsplit(target)
    path = (site / page).parent / unquote(parts.path) if parts.path else site / page
    return path.resolve(), unquote(parts.fragment)


def is_external(target):
    return bool(urlsplit(target).scheme or urlsplit(target).netloc)


def test_links_lead_to_pages_and_anchors_that_exist(site, pages):
    broken = []
    for name, page in pages.items():
        for target in page.links:
            if not is_external(target):
                path, anchor = resolve(site, name, target)
                other = pages.get(path.relative_to(site).as_posix())
                known = other is None or not anchor or anchor in other.anchors
                if not path.exists() or not known:
                    broken.append((name, target))
    assert not broken


def test_links_to_other_sites_are_well_formed(pages):
    for name, page in pages.items():
        for target in filter(is_external, page.links):
            parts = urlsplit(target)
            assert parts.scheme == "https", (name, target)
            assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.hostname), (name, target)


def test_pages_load_nothing_from_the_network(site, pages):
    for name, page in pages.items():
        for target in page.loaded:
            if not target.startswith("data:"):
                assert not is_external(target), (name, target)
                assert resolve(site, name, target)[0].exists(), (name, target)


def test_formulas_are_set_by_a_script_in_the_site(site):
    text = (site / "mathematics.html").read_text(encoding="utf-8")
    assert text.count("\\[") > 5
    assert re.search(r'<script[^>]*src="_static/tex-svg\.js', text)
    assert "$$" not in text


def test_images_have_a_text(pages):
    images = [image for page in pages.values() for image in page.images]
    assert len({source for source, _ in images}) > 3
    assert [source for source, text in images if len(text) < 20] == []


def test_every_page_is_two_clicks_from_the_start(site, pages):
    distance = {"index.html": 0}
    queue = ["index.html"]
    for name in queue:
        for target in pages[name].links:
            if not is_external(target):
                other = resolve(site, name, target)[0].relative_to(site).as_posix()
                if other in pages and other not in distance:
                    distance[other] = distance[name] + 1
                    queue.append(other)
    assert distance.keys() | {"genindex.html", "search.html"} >= pages.keys()
    assert max(distance.values()) <= 2


def public_names():
    """All public functions and classes, by the names under which users know them."""
    for name in set(care_loss.__all__) - set(MODULES) - {"RECIPES"}:
        yield f"care_loss.{name}", getattr(care_loss, name)
    for module in (getattr(care_loss, name) for name in MODULES):
        listed = getattr(module, "__all__", None)
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            public = name in listed if listed else own and not name.startswith("_")
            if public and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{module.__name__}.{name}", value


def text_of(markup):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", markup)).split())


def test_the_reference_has_every_public_name_with_its_defaults(site):
    signatures = {}
    for path in (site / "api").glob("*.html"):
        page = path.read_text(encoding="utf-8")
        for name, text in re.findall(r'<dt [^>]*id="([\w.]+)">(.*?)</dt>', page, re.DOTALL):
            signatures[name] = text_of(text)
    overview = (site / "api" / "index.html").read_text(encoding="utf-8")
    names = dict(public_names())
    assert len(names) > 40
    for name, value in names.items():
        assert name in signatures, name
        assert f"#{name}" in overview, name
        for parameter in inspect.signature(value).parameters.values():
            if isinstance(parameter.default, (bool, int, float, str, type(None))):
                default = str(parameter.default)
                default = f"'{default}'" if isinstance(parameter.default, str) else default
                found = re.search(
                    rf"\b{parameter.name}: [^=]+ = {re.escape(default)}", signatures[name]
                )
                assert found, (name, parameter.name, signatures[name])


def test_the_search_index_knows_the_pages(site):
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(")
    for word in ("placebo", "procrust", "bfloat16", "fit_rotation"):
        assert word in index, word


def test_addresses_that_do_not_exist_yet_are_not_invented(pages):
    hosts = defaultdict(set)
    for page in pages.values():
        for target in filter(is_external, page.links):
            hosts[urlsplit(target).hostname].add(target)
    assert not [url for url in hosts["github.com"] if "care_loss" in url or "care-loss" in url]
    assert not [host for host in hosts if "readthedocs" in host and "care" in host]


def script(name):
    """A script of the documentation, as a module."""
    specification = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_committed_results():
    written = script("tables").written
    marked = 0
    for page in (ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        marked += text.count("<!-- table: ")
        assert written(text) == text, f"{page.name}: run python docs/tables.py"
    assert marked == len(script("tables").TABLES)


def test_a_table_that_differs_from_its_result_is_seen():
    text = "<!-- table: versions -->\n\n| library | version |\n| --- | --- |\n| roma | 0 |\n\nMore."
    found = script("tables").written(text)
    assert "| roma | 0 |" not in found
    assert found.endswith("|\n\nMore.")


def test_the_figures_are_drawn_by_their_script(tmp_path):
    command = [sys.executable, str(DOCS / "figures.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True)
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == 4
    assert all((DOCS / name).exists() for name in drawn)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_colours_of_figures_can_be_seen_on_light_and_dark():
    style = (DOCS / "style.mplstyle").read_text(encoding="utf-8")
    colours = set(re.findall(r"\b[0-9a-f]{6}\b", style))
    assert len(colours) > 5
    for colour in colours:
        for background in ("ffffff", "131416"):
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) > 3, (colour, background)
