"""The action of a circle, fitted: what holds for every planted representation."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rotations import slope_of_other_bases
from strategies import orthogonal, seeds

from care_loss import _moments
from care_loss._polar import polar_by_products
from care_loss.actions import CircleAction, _fit, fit_circle
from care_loss.rotation import fit_rotation

PI = math.pi
METHODS = ["rotation", "apply", "parts", "pose", "invariants", "bispectrum", "canonical"]
METHODS += ["interpolate"]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(t):
    return 2 * PI / t * torch.arange(t, dtype=torch.float64)


def random_angles(t, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 * PI * torch.rand(t, dtype=torch.float64, generator=generator)


def wrap(angle):
    return torch.remainder(angle + PI, 2 * PI) - PI


def planted(multiplicity, *, without=0, seed=0):
    """An action in a random basis, with so many directions without embeddings."""
    width = multiplicity[0] + 2 * sum(multiplicity[1:])
    return CircleAction(orthogonal(width + without, seed)[:, :width], multiplicity)


@st.composite
def actions(draw, *, max_d=32, max_k=5, moves=False):
    """Planted actions for D from 2 to 32."""
    counts = draw(st.lists(st.integers(0, 3), min_size=1, max_size=max_k + 1))
    assume(2 <= counts[0] + 2 * sum(counts[1:]) <= max_d)
    assume(not moves or any(counts[1:]))
    room = max_d - counts[0] - 2 * sum(counts[1:])
    return planted(counts, without=draw(st.integers(0, min(room, 4))), seed=draw(seeds))


def rows(action, n, seed=0):
    """Embeddings in the subspace of the action."""
    return normal(n, action.basis.shape[1], seed=seed) @ action.basis.mT


def fitted(z, turned, angles, **settings):
    """Fit without the warnings, which have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit_circle(z, turned, angles, **settings)


def assert_counts(action, expected):
    found, wanted = action.multiplicity.tolist(), list(expected)
    size = max(len(found), len(wanted))
    assert found + [0] * (size - len(found)) == wanted + [0] * (size - len(wanted))


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


@given(actions(), st.integers(0, 6), st.integers(0, 8), seeds)
def test_uniform_angles_give_back_what_was_planted(plant, more_angles, more_rows, seed):
    t = max(3, 2 * len(plant.multiplicity) - 1) + more_angles
    z, angles = rows(plant, 2 * len(plant.basis) + more_rows, seed), uniform(t)
    action = fitted(z, plant.apply(z, angles.unsqueeze(-1)), angles)
    assert_counts(action, plant.multiplicity.tolist())
    others = random_angles(7, seed)
    close(action.rotation(others), plant.rotation(others), 1e-10)
    if action.explained.isfinite():
        assert abs(action.explained - 1) < 1e-8
        assert abs(action.explained_free - 1) < 1e-8


@given(actions(max_d=16), st.integers(4, 12), seeds)
def test_random_angles_give_back_what_was_planted(plant, more_angles, seed):
    angles = random_angles(4 * len(plant.multiplicity) + more_angles, seed)
    z = rows(plant, 2 * len(plant.basis), seed + 1)
    action = fitted(z, plant.apply(z, angles.unsqueeze(-1)), angles)
    assert_counts(action, plant.multiplicity.tolist())
    close(action.rotation(angles), plant.rotation(angles), 1e-8)


@given(actions(max_d=16), seeds)
def test_given_multiplicities_are_used(plant, seed):
    angles = uniform(2 * len(plant.multiplicity) + 1)
    z = rows(plant, 2 * len(plant.basis), seed)
    turned = plant.apply(z, angles.unsqueeze(-1))
    action = fitted(z, turned, angles, multiplicity=plant.multiplicity)
    assert action.multiplicity.tolist() == plant.multiplicity.tolist()
    close(action.rotation(angles), plant.rotation(angles), 1e-9)


@given(actions(), seeds)
def test_rotations_are_orthogonal_and_compose(action, seed):
    a, b = random_angles(2, seed)
    close(action.rotation(a) @ action.rotation(b), action.rotation(a + b), 1e-12)
    r = action.rotation(a)
    close(r.mT @ r, torch.eye(len(r), dtype=r.dtype), 1e-12)
    z = normal(5, len(r), seed=seed)  # with what lies outside of the subspace
    close(action.apply(z, a), z @ r, 1e-12)
    basis = torch.eye(len(r), dtype=r.dtype) - action.basis @ action.basis.mT
    close(basis @ action.apply(z, a).mT, basis @ z.mT, 1e-12)


@given(actions(), seeds)
def test_parts_turn_by_their_frequency_and_keep_the_length(action, seed):
    z, g = rows(action, 6, seed), random_angles(6, seed)
    before, after = action.parts(z), action.parts(action.apply(z, g))
    close(before[0], after[0], 1e-12)
    for k in before.keys() - {0}:
        c = torch.view_as_complex(before[k]) * torch.exp(1j * k * g).unsqueeze(-1)
        close(torch.view_as_real(c), after[k], 1e-12)
    total = sum(part.square().flatten(1).sum(-1) for part in before.values())
    close(total, z.square().sum(-1), 1e-10)


@given(actions(moves=True), seeds)
def test_the_pose_is_the_angle_of_the_turn(action, seed):
    z, g = normal(8, len(action.basis), seed=seed), random_angles(8, seed)
    pose = action.pose(z, action.apply(z, g))
    divisor = math.gcd(*[k for k, m in enumerate(action.multiplicity.tolist()) if m])
    close(wrap(divisor * (pose.element - g)), torch.zeros(8, dtype=torch.float64), 1e-8)
    assert ((pose.element > -PI / divisor - 1e-12) & (pose.element <= PI / divisor)).all()
    assert (pose.gap == 0).all() == (divisor > 1)


@given(actions(moves=True), seeds)
def test_invariants_and_canonical_are_the_same_for_all_states(action, seed):
    z, g = normal(8, len(action.basis), seed=seed), random_angles(8, seed)
    turned = action.apply(z, g)
    for order in (2, 3):
        close(action.invariants(z, order=order), action.invariants(turned, order=order), 1e-9)
    close(action.canonical(z), action.canonical(turned), 1e-8)
    close(action.canonical(action.canonical(z)), action.canonical(z), 1e-8)
    close(action.invariants(action.canonical(z)), action.invariants(z), 1e-9)


def test_invariants_of_other_images_differ():
    action = planted([1, 2, 1])
    z1, z2 = normal(2, 7)
    assert (action.invariants(z1) - action.invariants(z2)).abs().max() > 0.1
    # Turn one frequency alone: order 2 does not see it, the bispectrum does.
    alone = CircleAction(action.basis[:, 5:], [0, 0, 1]).apply(z1, torch.tensor(1.0).double())
    close(action.invariants(alone), action.invariants(z1), 1e-12)
    change = action.invariants(alone, order=3) - action.invariants(z1, order=3)
    assert change.abs().max() > 0.1


@pytest.mark.parametrize(
    "multiplicity", [[1, 1], [0, 0, 1, 1], [2, 1, 1, 2, 1], [0, 0, 2, 0, 1], [0, *[1] * 8]]
)
def test_the_pose_is_never_a_local_optimum(multiplicity):
    action = planted(multiplicity, without=1)
    z1, z2 = normal(2, 2000, len(action.basis))
    pose = action.pose(z1, z2)
    angles = 2 * PI / 720 * torch.arange(720, dtype=torch.float64)
    values = torch.stack([(action.apply(z1, g) * z2).sum(-1) for g in angles])
    reached = (action.apply(z1, pose.element) * z2).sum(-1)
    assert (reached >= values.amax(0) - 1e-12).all()
    # The gap is the distance of the next peak of the grid, relative to the range.
    peaks = (values >= values.roll(1, 0)) & (values > values.roll(-1, 0))
    two = torch.where(peaks, values, -torch.inf).topk(2, 0).values
    expected = (two[0] - two[1]) / (values.amax(0) - values.amin(0))
    # A peak that is flatter than the grid of the pose shows is not counted.
    assert ((pose.gap - expected.clamp(max=1)).abs() < 0.03).double().mean() > 0.995


@given(actions(moves=True), seeds)
def test_the_pose_is_equivariant(action, seed):
    z1, z2 = normal(2, 8, len(action.basis), seed=seed)
    a, b = random_angles(16, seed).view(2, 8)
    before, after = action.pose(z1, z2), action.pose(action.apply(z1, a), action.apply(z2, b))
    divisor = math.gcd(*[k for k, m in enumerate(action.multiplicity.tolist()) if m])
    change = wrap(divisor * (after.element - before.element - b + a)).abs()
    clear = (before.gap > 1e-6) | (divisor > 1)
    # Flat peaks are known less exactly.
    assert (change[clear] < 1e-6).all()
    close(before.gap, after.gap, 0.03)


def test_the_gradient_of_the_pose_is_that_of_differences():
    action = planted([1, 1, 1, 1], without=1)
    z = normal(2, 6, 8, seed=3)
    assert (action.pose(*z).gap > 0.01).any()
    clear = action.pose(*z).gap > 0.01
    z = z[:, clear].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: action.pose(x, y).element, tuple(z))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("parts", "pose")])
def test_derivatives(name):
    action = planted([1, 2, 1])
    z, g = normal(2, 4, 7, seed=1).requires_grad_(), random_angles(4).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, g: call(action, name, z, g), (z, g))


def call(action, name, z, g):
    z1, z2 = z
    if name == "bispectrum":
        return action.invariants(z1, order=3)
    if name == "parts":
        return tuple(action.parts(z1).values())
    arguments = {"rotation": (g,), "apply": (z1, g), "pose": (z1, z2), "interpolate": (z1, z2, g)}
    return getattr(action, name)(*arguments.get(name, (z1,)))


def noisy(x, sigma, seed):
    """Add noise of this length, relative to that of each row."""
    length = x.norm(dim=-1, keepdim=True)
    return x + sigma * length * normal(*x.shape, seed=seed) / x.shape[-1] ** 0.5


def test_errors_fall_as_the_noise():
    plant, angles = planted([2, 1, 1, 2], without=2), uniform(36)
    z = rows(plant, 200)
    turned = plant.apply(z, angles.unsqueeze(-1))
    errors = []
    for sigma in (1e-1, 1e-2, 1e-3):
        action = fit_circle(noisy(z, sigma, 1), noisy(turned, sigma, 2), angles)
        assert_counts(action, [2, 1, 1, 2])
        # Noise hides a little of the subspace, whose complement stands still.
        errors.append(float((action.rotation(angles) - plant.rotation(angles)).norm()))
    assert errors[0] < 1
    for larger, smaller in pairwise(errors):
        assert 5 < larger / smaller < 20


@pytest.mark.parametrize("multiplicity", [[2, 1, 1, 2], [4, 2, 1, 2, 1]])
def test_multiplicities_are_right_under_noise(multiplicity):
    angles, wrong = uniform(36), 0
    for seed in range(50):
        width = multiplicity[0] + 2 * sum(multiplicity[1:])
        plant = planted(multiplicity, without=16 - width, seed=seed)
        z = rows(plant, 64, seed)
        turned = plant.apply(z, angles.unsqueeze(-1))
        action = fit_circle(noisy(z, 0.1, seed + 1), noisy(turned, 0.1, seed + 2), angles)
        found = action.multiplicity.tolist()
        wrong += found[: len(multiplicity)] != multiplicity or any(found[len(multiplicity) :])
    assert not wrong


def test_the_ascent_does_not_lessen_the_fit():
    plant, angles = planted([1, 1, 2]), uniform(12)
    z = rows(plant, 40)
    z1, z2 = noisy(z, 0.5, 1), noisy(plant.apply(z, angles.unsqueeze(-1)), 0.5, 2)
    action = fitted(z1, z2, angles, multiplicity=[1, 1, 2])
    assert 0.3 < action.explained < 1
    assert action.explained > action.explained_free  # it has fewer free numbers
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (z1, z2)]
    free = fit_rotation(unit[0].expand_as(unit[1]), unit[1], special=True).rotation
    assert slope_of_other_bases(action.rotation(angles), free) < 1e-10


def test_the_ascent_finds_the_fit_where_the_factor_of_the_gradient_does_not_exist(monkeypatch):
    plant, angles = planted([1, 2, 1]), uniform(12)
    z = rows(plant, 40)
    turned = plant.apply(z, angles.unsqueeze(-1)) + 0.01 * normal(12, 40, 7, seed=3)
    expected = fit_circle(z, turned, angles)
    failed = []

    def none_of_the_gradient(x, steps):
        """Those of G + 2 B have singular values of at least 1, those of G of at most 1."""
        failed.append(bool(torch.linalg.matrix_norm(x, 2) <= 1 + 1e-9))
        return (x, False) if failed[-1] else polar_by_products(x, steps)

    monkeypatch.setattr(_fit, "polar_by_products", none_of_the_gradient)
    found = fit_circle(z, turned, angles)
    assert sum(failed) > 2
    close(found.rotation(angles), expected.rotation(angles), 1e-9)


def test_the_share_of_the_subspace():
    plant, angles = planted([1, 1, 1]), uniform(12)
    z = rows(plant, 40) @ plant.basis * torch.tensor([1, 1, 1, 1e-2, 1e-2]) @ plant.basis.mT
    turned = plant.apply(z, angles.unsqueeze(-1))
    assert_counts(fit_circle(z, turned, angles), [1, 1, 1])
    assert_counts(fit_circle(z, turned, angles, subspace=0.95), [1, 1])


def test_weak_directions_above_rounding_are_kept_in_float32():
    plant = planted([1, 1])
    z = normal(64, 3) * torch.tensor([1e-4, 1, 1]) @ plant.basis.mT  # the fixed direction is weak
    z = z / z.norm(dim=-1, keepdim=True)
    angles = uniform(8)
    turned = plant.apply(z, angles.unsqueeze(-1)).float()
    assert_counts(fit_circle(z.float(), turned, angles), [1, 1])


def test_fits_of_many_turns_have_one_gain_by_a_reflection_each():
    scale = torch.tensor([3.0, 2.0, 1.5, 1.0], dtype=torch.float64)
    rotation = orthogonal(4, 1)
    rotation[:, 0] *= torch.linalg.det(rotation)
    cross = (scale * rotation).expand(2, 5, 4, 4).clone()
    found, gains = _moments.rotations_of(cross)
    close(found, rotation.expand_as(found), 1e-12)
    assert gains.equal(torch.zeros(2, 5, dtype=torch.float64))
    cross[1, 2, :, 3] *= -1  # the best rotation loses twice the smallest singular value
    found, gains = _moments.rotations_of(cross)
    close(torch.linalg.det(found), torch.ones(2, 5, dtype=torch.float64), 1e-12)
    expected = torch.zeros(2, 5, dtype=torch.float64)
    expected[1, 2] = 2
    close(gains, expected, 1e-12)


def test_unrelated_embeddings_explain_nothing_and_warn():
    with pytest.warns(UserWarning, match=r"explains -?0\.|frequency 0 only"):
        action = fit_circle(normal(80, 8), normal(12, 80, 8, seed=1), uniform(12))
    assert action.explained < 0.2


def test_embeddings_that_do_not_move_warn():
    z = normal(20, 4)
    with pytest.warns(UserWarning, match="frequency 0 only"):
        action = fit_circle(z, z.expand(5, 20, 4), uniform(5))
    assert action.multiplicity.tolist() == [4, 0, 0]
    assert action.explained.isnan()
    pose = action.pose(z, z)
    assert pose.element.isnan().all()
    assert (pose.gap == 0).all()
    assert action.pose(normal(3, 1, 4), normal(2, 4)).element.shape == (3, 2)
    close(action.canonical(z), z, 0)
    close(action.interpolate(z, z.flip(0), 0.5), z, 0)


def test_the_pose_is_nan_where_nothing_turns():
    action = CircleAction(torch.eye(5), [1, 1, 1])
    z = torch.eye(5)
    # z[0] is fixed; z[1] and z[3] have no frequency in common.
    nothing = action.pose(z[:2], z[[0, 3]])
    assert nothing.element.isnan().all()
    assert (nothing.gap == 0).all()
    assert action.pose(z[1], torch.zeros(5)).element.isnan()
    assert action.pose(z[1] * torch.nan, z[1]).element.isnan()
    assert action.pose(z[1], z[1]).element == 0


@given(actions(moves=True), seeds)
def test_interpolation_goes_along_the_group(action, seed):
    z1, z2 = normal(2, 5, len(action.basis), seed=seed)
    element = action.pose(z1, z2).element
    close(action.interpolate(z1, z2, 0), z1, 1e-12)
    close(action.interpolate(z1, z2, 1.0), action.apply(z1, element), 1e-12)
    half = action.interpolate(z1, z2, torch.tensor(0.5))
    close(action.apply(half, element / 2), action.interpolate(z1, z2, 1), 1e-12)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(name, dtype):
    exact = planted([1, 1, 2])
    action = CircleAction(exact.basis.float(), [1, 1, 2])
    z, g = normal(2, 6, 7).to(dtype), random_angles(6).to(dtype)
    found, expected = call(action, name, z, g), call(exact, name, z.double(), g.double())
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == (torch.float32 if name == "rotation" else dtype)
        scale = theirs.abs().max().clamp_min(1)
        close(ours.double(), theirs, float(4 * torch.finfo(ours.dtype).eps * scale) + 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_leading_dimensions_and_empty_batches(name):
    action = planted([1, 1, 2])
    z, g = normal(2, 2, 3, 7), random_angles(6).view(2, 3)
    found, each = call(action, name, z, g), call(action, name, z[:, 1], g[1])
    empty = call(action, name, z[:, :0], g[:0])
    if isinstance(found, torch.Tensor):
        found, each, empty = (found,), (each,), (empty,)
    for whole, part, none in zip(found, each, empty, strict=True):
        close(whole[1], part, 1e-12)
        assert none.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("name", METHODS)
def test_compiles_into_one_graph(name):
    action = planted([1, 1, 2])
    z, g = normal(2, 6, 7), random_angles(6)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda z, g: call(action, name, z, g), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(z, g), call(action, name, z, g))


def test_state_dict():
    plant = planted([1, 1, 1])
    z, angles = rows(plant, 20), uniform(5)
    action = fit_circle(z, plant.apply(z, angles.unsqueeze(-1)), angles)
    other = planted([1, 1, 1], seed=1)
    other.load_state_dict(action.state_dict())
    close(other.rotation(angles), action.rotation(angles), 0)
    close(other.explained, action.explained, 0)
    close(copy.deepcopy(action).rotation(angles), action.rotation(angles), 0)
    with pytest.raises(ValueError, match=r"must be \[3, 1\].*got \[1, 1, 1\]"):
        planted([3, 1]).load_state_dict(action.state_dict())
    made = CircleAction(action.basis, action.multiplicity)
    assert made.explained.isnan()
    assert repr(made) == "CircleAction(dim=5, multiplicity=[1, 1, 1])"
    assert not list(made.parameters())


def turns(t=6, n=16, d=4):
    plant, angles = planted([d - 2, 1]), uniform(t)
    z = rows(plant, n)
    return z, plant.apply(z, angles.unsqueeze(-1)), angles


def test_a_sign_that_no_rotation_explains_is_an_error():
    z, turned, angles = turns()
    sign = torch.tensor([-1.0, 1, 1, 1], dtype=z.dtype)
    with pytest.raises(ValueError, match="got reflections: for 6 of the 6 turns tried"):
        fit_circle(z, turned * sign, angles)
    turned[1::2] *= sign  # a direction that changes its sign with each step
    with pytest.raises(ValueError, match="got reflections: for 3 of the 6 turns tried"):
        fit_circle(z, turned, angles)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"angles": uniform(1), "turned": 1}, r"shape \(T,\) with T >= 3, got \(1,\)"),
        ({"angles": uniform(5)}, r"`z_turned` must be .* \(5, 16, 4\), got"),
        ({"angles": uniform(6) * torch.nan}, "`angles` must be finite"),
        ({"angles": uniform(6) / 1000}, "circle, or 4 random ones.* condition .*: spread them"),
        ({"multiplicity": [2, 0, 0, 1]}, "at least 7 different angles .* or 12 random ones, got 6"),
        ({"rows": 7}, "at least 8 rows.*got 7: pass more samples"),
        ({"z": torch.nan}, "must be finite, got NaN"),
        ({"z": 0.0}, "other than 0"),
        ({"dtype": torch.float32}, "`z_turned` must be torch.float32"),
        ({"subspace": 1.5}, r"share in \(0, 1\]"),
        ({"subspace": 0.9, "multiplicity": [2, 1]}, "got both"),
        ({"multiplicity": [4, 1]}, "at most 4 directions.*got 6"),
        ({"multiplicity": [2, -1]}, "integers >= 0"),
        ({"multiplicity": [2, 0, 0, 1]}, "frequencies up to 3.*pass 1 more"),
        ({"multiplicity": 3}, "integers >= 0"),
    ],
)
def test_bad_turns(change, message):
    z, turned, angles = turns()
    change = dict(change)
    angles = change.pop("angles", angles)
    turned = turned[: change.pop("turned", 6), : change.get("rows", 16)]
    z = z[: change.pop("rows", 16)]
    factor = change.pop("z", 1.0)
    z, turned = (z * factor).to(change.pop("dtype", z.dtype)), turned * factor
    with pytest.raises(ValueError, match=message):
        fit_circle(z, turned, angles, **change)


def test_bad_arguments_of_methods():
    action = CircleAction(torch.eye(3), [1, 1])
    z, g = torch.randn(4, 3), torch.zeros(4)
    with pytest.raises(ValueError, match=r"`z` must have shape \(\*, 3\), got \(4, 2\)"):
        action.apply(z[:, :2], g)
    wide = CircleAction(torch.eye(300, 3), [1, 1])  # ints above 256 are equal, not the same
    assert wide.apply(z @ torch.eye(3, 300), g).shape == (4, 300)
    with pytest.raises(TypeError, match="`g` must be a torch"):
        action.rotation(1.0)
    with pytest.raises(ValueError, match="leading dimensions that broadcast"):
        action.apply(z, torch.zeros(3))
    with pytest.raises(ValueError, match="the same dtype"):
        action.pose(z, z.double())
    with pytest.raises(ValueError, match="`order` must be 2 or 3, got int 4"):
        action.invariants(z, order=4)
    with pytest.raises(TypeError, match="`t` must be a number"):
        action.interpolate(z, z, "half")
    with pytest.raises(ValueError, match=r"shape \(D, 3\) with D >= 3"):
        CircleAction(torch.eye(4), [1, 1])
    with pytest.raises(ValueError, match="orthonormal columns"):
        CircleAction(2 * torch.eye(3), [1, 1])
