"""The modules are the functions, with their arguments remembered."""

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
from torch import nn

from care_loss import CAREloss, EquivarianceLoss, InfoNCELoss, RotationContrastLoss
from care_loss.functional import (
    alignment_loss,
    cross_fitted,
    equivariance_loss,
    info_nce_loss,
)

MODULES = [
    InfoNCELoss(0.07, reduction="none"),
    EquivarianceLoss(7, scale="authors", reduction="none"),
    CAREloss(
        temperature=0.07, equivariance_weight=1.5, chunks=7, shared_views=True, scale="authors"
    ),
    CAREloss(chunks=2, shared_views=True, base_loss=alignment_loss),
    RotationContrastLoss(temperature=0.07, chunks=1, special=False),
    RotationContrastLoss(chunks=1, base_loss=alignment_loss),
]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda m: type(m).__name__)


@pytest.fixture
def views(device, dtype):
    return torch.randn(4, 12, 5, device=device).to(dtype)


def defaults(callable_):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(callable_).parameters.items()
        if parameter.default is not parameter.empty
    }


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (InfoNCELoss, info_nce_loss),
        (EquivarianceLoss, equivariance_loss),
        (CAREloss, info_nce_loss),
        (CAREloss, equivariance_loss),
        (RotationContrastLoss, info_nce_loss),
        (RotationContrastLoss, cross_fitted),
    ],
)
def test_defaults_are_those_of_the_functions(module, function):
    remembered, computed = defaults(module), defaults(function)
    shared = remembered.keys() & computed.keys() - {"chunks"}  # those of a module come by the call
    assert shared
    assert {name: remembered[name] for name in shared} == {name: computed[name] for name in shared}


def test_signatures_are_the_published_ones():
    def words(callable_):
        kinds = inspect.Parameter
        return " ".join(
            name + (":" if parameter.kind is kinds.KEYWORD_ONLY else "")
            for name, parameter in inspect.signature(callable_).parameters.items()
        )

    assert words(CAREloss) == (
        "temperature: equivariance_weight: "
        "chunks: shared_views: scale: base_loss: gather_distributed:"
    )
    assert defaults(CAREloss) == {
        "temperature": 0.5,
        "equivariance_weight": 10.0,
        "chunks": None,
        "shared_views": False,
        "scale": "mean",
        "base_loss": None,
        "gather_distributed": False,
    }
    assert words(CAREloss.forward) == "self z1 z2 equivariant1 equivariant2 chunks:"
    assert words(CAREloss.forward_components) == words(CAREloss.forward)
    assert CAREloss(chunks=2, shared_views=True).forward_components(
        *torch.eye(4).expand(2, 4, 4)
    )._fields == ("loss", "base", "equivariance")
    settings = "temperature: chunks: special: base_loss: gather_distributed:"
    assert words(RotationContrastLoss) == settings
    assert words(RotationContrastLoss.forward) == "self z z_turned chunks:"
    assert words(cross_fitted) == "z z_turned chunks: special:"
    assert words(InfoNCELoss) == "temperature reduction: gather_distributed:"
    assert words(EquivarianceLoss) == "chunks scale: reduction:"
    assert words(EquivarianceLoss.forward) == "self z1 z2 chunks:"
    assert words(info_nce_loss) == "z1 z2 temperature: negatives: reduction:"
    assert words(equivariance_loss) == "z1 z2 chunks: scale: reduction:"


def test_info_nce_is_the_function(views):
    expected = info_nce_loss(views[0], views[1], temperature=0.07, reduction="none")
    assert torch.equal(InfoNCELoss(0.07, reduction="none")(views[0], views[1]), expected)


def test_equivariance_is_the_function_with_the_chunks_of_the_batch(views, device):
    loss = EquivarianceLoss(3, scale="authors")
    for chunks in (None, 5, torch.arange(12, device=device) // 4):
        expected = equivariance_loss(
            views[0], views[1], chunks=3 if chunks is None else chunks, scale="authors"
        )
        assert torch.equal(loss(views[0], views[1], chunks=chunks), expected)


def test_care_is_base_plus_weighted_equivariance(views, device):
    module = CAREloss(temperature=0.2, equivariance_weight=2.5, chunks=3, scale="authors")
    for chunks in (None, 5, torch.arange(12, device=device) // 4):
        parts = module.forward_components(*views, chunks=chunks)
        base = info_nce_loss(views[0], views[1], temperature=0.2)
        equivariance = equivariance_loss(
            views[2], views[3], chunks=3 if chunks is None else chunks, scale="authors"
        )
        assert torch.equal(parts.base, base)
        assert torch.equal(parts.equivariance, equivariance)
        assert torch.equal(parts.loss, base + 2.5 * equivariance)
        assert torch.equal(module(*views, chunks=chunks), parts.loss)


def test_two_shared_views_serve_both_terms(views):
    z1, z2 = views[:2]
    shared = CAREloss(chunks=3, shared_views=True)
    assert torch.equal(shared(z1, z2), CAREloss(chunks=3)(z1, z2, z1, z2))


def test_the_equivariant_pair_may_have_another_size(views, device):
    e1, e2 = torch.randn(2, 31, 9, device=device)
    parts = CAREloss(chunks=4).forward_components(views[0], views[1], e1, e2)
    assert torch.equal(parts.base, info_nce_loss(views[0], views[1]))
    assert torch.equal(parts.equivariance, equivariance_loss(e1, e2, chunks=4))


def test_a_base_loss_gets_the_raw_rows_in_place_of_info_nce(views):
    def base(z1, z2):
        assert z1 is z[0]
        assert z2 is z[1]
        return (z1 * z2).float().sum()

    z = [view.clone() for view in views]
    module = CAREloss(chunks=4, base_loss=base)
    assert torch.equal(module.forward_components(*z).base, (z[0] * z[1]).float().sum())


def test_a_base_loss_with_parameters_is_trained_and_saved(views):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(()))

        def forward(self, z1, z2):
            return self.factor * alignment_loss(z1, z2)

    module = CAREloss(chunks=4, base_loss=Scaled()).to(views.device)
    module(*views).backward()
    assert module.base_loss.factor.grad != 0
    assert list(module.state_dict()) == ["base_loss.factor"]


def test_both_parts_carry_gradient(views):
    z = views.float().requires_grad_()
    CAREloss(chunks=4)(*z).backward()
    assert (z.grad.flatten(1).norm(dim=1) > 0).all()


@every_module
def test_modules_have_no_state_and_load_old_checkpoints(module):
    assert not list(module.parameters())
    assert not list(module.buffers())
    assert module.state_dict() == {}
    module.load_state_dict({}, strict=True)


@every_module
def test_modules_survive_copying_and_pickling(module, views):
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(views[0], views[1]), module(views[0], views[1]))
        assert repr(twin) == repr(module)


@every_module
def test_the_repr_names_every_argument_and_builds_the_module_again(module):
    text = repr(module)
    replaces_info_nce = getattr(module, "base_loss", None) is not None
    for name in inspect.signature(type(module)).parameters:
        if name in ("temperature", "gather_distributed"):
            assert (f"{name}=" in text) != replaces_info_nce or isinstance(module, EquivarianceLoss)
        elif name != "base_loss" or replaces_info_nce:
            assert f"{name}=" in text
    if getattr(module, "base_loss", None) is None:
        again = eval(text, {type(module).__name__: type(module)})
        assert repr(again) == text
        assert {k: v for k, v in vars(again).items() if not k.startswith("_")} == {
            k: v for k, v in vars(module).items() if not k.startswith("_")
        }


def test_a_base_loss_that_is_a_module_is_printed_as_a_child():
    assert "(base_loss): InfoNCELoss(" in repr(CAREloss(chunks=2, base_loss=InfoNCELoss()))


@pytest.mark.parametrize("module", [InfoNCELoss, EquivarianceLoss, CAREloss])
def test_plain_values_from_a_configuration_file_are_enough(module, views):
    options = {"temperature": 0.2, "chunks": 4, "scale": "authors", "shared_views": True}
    options["equivariance_weight"] = 0.01
    known = inspect.signature(module).parameters
    config = json.loads(json.dumps({k: v for k, v in options.items() if k in known}))
    assert module(**config)(views[0], views[1]).isfinite()


def test_changed_attributes_are_used_from_then_on(views):
    module = CAREloss(chunks=4, shared_views=True)
    module.temperature, module.equivariance_weight, module.chunks = 0.1, 2.0, 2
    expected = CAREloss(temperature=0.1, equivariance_weight=2.0, chunks=2, shared_views=True)
    assert torch.equal(module(views[0], views[1]), expected(views[0], views[1]))


def test_gathering_without_other_processes_changes_nothing(views):
    z1, z2 = views[:2]
    gathering = InfoNCELoss(gather_distributed=True)
    assert torch.equal(gathering(z1, z2), InfoNCELoss()(z1, z2))
    care = CAREloss(chunks=4, shared_views=True, gather_distributed=True)
    assert torch.equal(care(z1, z2), CAREloss(chunks=4, shared_views=True)(z1, z2))


# A learned temperature


def test_a_learned_temperature_is_a_parameter_with_the_gradient_of_the_function(views):
    for module in (InfoNCELoss, CAREloss):
        loss = module(temperature=nn.Parameter(torch.tensor(0.2))).to(views.device)
        (learned,) = loss.parameters()
        assert learned is loss.temperature
        assert learned.device.type == views.device.type
        found = loss(*views, chunks=4) if module is CAREloss else loss(*views[:2])
        found.backward()
        t = learned.detach().clone().requires_grad_()
        base = info_nce_loss(views[0], views[1], temperature=t)
        base.backward()
        expected = base + 10 * equivariance_loss(views[2], views[3], chunks=4)
        assert torch.equal(found, expected if module is CAREloss else base)
        assert torch.equal(learned.grad, t.grad)
        assert t.grad != 0


def test_a_step_of_an_optimizer_changes_the_loss(views):
    loss = InfoNCELoss(nn.Parameter(torch.tensor(0.2, device=views.device)))
    first = loss(*views[:2])
    first.backward()
    torch.optim.SGD(loss.parameters(), lr=1e-3).step()
    assert loss(*views[:2]) < first


def test_a_learned_temperature_is_saved_loaded_copied_and_pickled(views):
    for module in (InfoNCELoss, CAREloss):
        loss = module(temperature=nn.Parameter(torch.tensor(0.2)))
        file = io.BytesIO()
        torch.save(loss.state_dict(), file)
        file.seek(0)
        loaded = module(temperature=nn.Parameter(torch.tensor(0.7)))
        loaded.load_state_dict(torch.load(file, weights_only=True))
        for twin in (loaded, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert isinstance(twin.temperature, nn.Parameter)
            assert twin.temperature is not loss.temperature
            assert repr(twin) == repr(loss)


def test_a_tensor_that_is_no_parameter_is_used_as_it_is(views):
    given = torch.tensor(0.2, requires_grad=True)
    loss = InfoNCELoss(given).to(views.device, torch.float64)
    assert loss.temperature is given
    assert not loss.state_dict()
    loss(*views[:2]).backward()
    assert given.grad != 0
    with torch.no_grad():
        given.fill_(0.7)
    assert torch.equal(loss(*views[:2]), info_nce_loss(*views[:2], temperature=given))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_learned_temperature_of_a_half_type(half, views):
    loss = InfoNCELoss(nn.Parameter(torch.tensor(0.07))).to(views.device, half)
    assert loss.temperature.dtype == half
    for z in (views.to(half), views.float()):
        value = loss(*z[:2])
        expected = info_nce_loss(*z[:2].float(), temperature=loss.temperature.item())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected)
        with torch.autocast(views.device.type, torch.bfloat16):
            assert torch.equal(loss(*z[:2]), value)
    value.backward()
    t = loss.temperature.detach().float().requires_grad_()
    info_nce_loss(*views.float()[:2], temperature=t).backward()
    torch.testing.assert_close(loss.temperature.grad, t.grad.to(half), rtol=0.01, atol=0)


def test_the_repr_of_a_temperature_that_is_a_tensor_is_short():
    for temperature, text in (
        (nn.Parameter(torch.tensor(0.07)), "temperature=Parameter(0.07)"),
        (torch.tensor(0.07), "temperature=tensor(0.07)"),
        (nn.Parameter(torch.tensor(0.07, device="meta")), "temperature=Parameter(...)"),
    ):
        for module in (InfoNCELoss, CAREloss):
            assert text in repr(module(temperature=temperature))


def test_a_number_may_become_a_parameter_later(views):
    loss = InfoNCELoss(0.2)
    loss.temperature = nn.Parameter(torch.tensor(0.3, device=views.device))
    assert list(loss.state_dict()) == ["temperature"]
    assert torch.equal(loss(*views[:2]), info_nce_loss(*views[:2], temperature=loss.temperature))


@pytest.mark.parametrize("groups", [2, 3])
def test_the_loss_of_several_groups_and_its_gradient_are_the_sum_of_their_parts(groups, device):
    views = torch.randn(2 + groups, 24, 6, dtype=torch.float64, device=device)
    z1, z2, *turned = (view.requires_grad_() for view in views)
    chunks = [4, torch.arange(24, device=device) % 3, 7][:groups]
    weights = [10.0, 3.0, 0.5][:groups]
    loss = InfoNCELoss()(z1, z2)
    for e, cut, weight in zip(turned, chunks, weights, strict=True):
        loss = loss + weight * EquivarianceLoss()(z1, e, chunks=cut)
    found = torch.autograd.grad(loss, [z1, z2, *turned])

    base = info_nce_loss(z1, z2)
    first, second = torch.autograd.grad(base, [z1, z2])
    value, expected = base, []
    for e, cut, weight in zip(turned, chunks, weights, strict=True):
        part = equivariance_loss(z1, e, chunks=cut)
        of_z1, of_e = torch.autograd.grad(part, [z1, e])
        value, first = value + weight * part, first + weight * of_z1
        expected.append(weight * of_e)
    torch.testing.assert_close(loss, value)
    torch.testing.assert_close(found, (first, second, *expected))

    # CAREloss has room for one group; a loss for each of the others is added to it.
    care = CAREloss(equivariance_weight=weights[0])(z1, z2, z1, turned[0], chunks=chunks[0])
    for e, cut, weight in zip(turned[1:], chunks[1:], weights[1:], strict=True):
        care = care + weight * EquivarianceLoss()(z1, e, chunks=cut)
    torch.testing.assert_close(care, loss)
