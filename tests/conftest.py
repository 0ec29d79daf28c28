"""Options, profiles and the one workaround that the suite needs."""

import pytest
import torch
from hypothesis import settings

# lightly imports torchvision, whose wheels are built for CUDA and look for two operators that a CPU
# build of torch lacks (pytorch/vision #9077). Declaring them is enough for the import.
if not torch.cuda.is_available():
    _operators = torch.library.Library("torchvision", "DEF")
    _operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

# In CI every run draws the same examples; `make test-deep` looks further, and elsewhere each time.
settings.register_profile("ci", max_examples=40, deadline=None, derandomize=True, database=None)
settings.register_profile("deep", max_examples=1000, deadline=None)
settings.load_profile("ci")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="the device that the tests run on")
    parser.addoption("--dtype", default="float32", help="the dtype of tests that do not name one")


@pytest.fixture(scope="session")
def device(request):
    return torch.device(request.config.getoption("--device"))


@pytest.fixture(scope="session")
def dtype(request):
    return getattr(torch, request.config.getoption("--dtype"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
