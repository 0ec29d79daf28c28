"""Options, profiles, and the workaround that importing lightly needs."""

import importlib.util

import pytest
import torch
from hypothesis import settings

# In CI every run draws the same examples; `make test-deep` looks further, and elsewhere each time.
# It also runs the tests that are marked `deep`: the rest of a sweep of which others are a sample.
settings.register_profile("ci", max_examples=25, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile("ci")

# One registers a device in the process that imports it, the other needs cosmic-ray.
collect_ignore = ["pretend.py", "mutants.py"]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device of the tests; others are left out")
    parser.addoption("--dtype", default="float32", help="the dtype of tests that do not name one")


def pytest_configure(config):
    config.addinivalue_line("markers", "deep: run by make test-deep and on devices, not on a CPU")
    if config.getoption("--device") == "pretend":
        importlib.import_module("pretend")


def pytest_collection_modifyitems(config, items):
    name = config.getoption("--device")
    deep = config.getoption("--hypothesis-profile") == "deep"
    beyond = importlib.import_module("pretend").BEYOND if name == "pretend" else ()
    kept, left_out = [], []
    for item in items:
        if isinstance(item, pytest.DoctestItem):
            item.add_marker(pytest.mark.filterwarnings("error:the halves of chunks should have"))
        if name == "cpu":
            runs = deep or not item.get_closest_marker("deep")
        else:
            runs = "device" in getattr(item, "fixturenames", ())
        (left_out, kept)[runs and not any(word in item.nodeid for word in beyond)].append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


def load_torchvision():
    """Import torchvision with its transforms, its CUDA build beside a CPU build of torch too."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # It looks for two operators that a CPU build of torch lacks (pytorch/vision #9077).
        # Declaring them, for as long as the process lives, is enough to import it.
        global operators
        operators = torch.library.Library("torchvision", "DEF")
        operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    importlib.import_module("torchvision.transforms.v2")
    return importlib.import_module("torchvision")


@pytest.fixture(scope="session")
def torchvision():
    """The module torchvision, with its transforms."""
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return load_torchvision()


@pytest.fixture(scope="session")
def lightly_loss(torchvision):
    """The module lightly.loss."""
    if importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed")
    return importlib.import_module("lightly.loss")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Decide nothing from values, as where reading them makes the host wait."""
    monkeypatch.setattr("care_loss._autograd.gram_gap.reads_values", lambda _: False)


@pytest.fixture(scope="session")
def group_of(tmp_path_factory):
    """A function that returns the group of so many processes, started once."""
    processes = importlib.import_module("processes")  # imports distributed parts of torch
    groups = {}

    def get(world):
        if world not in groups:
            groups[world] = processes.Processes(world, tmp_path_factory.mktemp("group"))
        return groups[world]

    yield get
    for group in groups.values():
        group.close()


@pytest.fixture(params=[1, 2, 4], ids=lambda world: f"{world}processes")
def processes(request, group_of):
    return group_of(request.param)


@pytest.fixture
def two(group_of):
    return group_of(2)
