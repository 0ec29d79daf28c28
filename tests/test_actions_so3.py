"""The action of rotations of space, fitted: what holds for every planted representation."""

import copy
import math
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rotations import slope_of_other_bases
from strategies import orthogonal, seeds

from care_loss._characters import nearest_counts
from care_loss.actions import SO3Action, fit_so3
from care_loss.actions._highest import matrix_of, quaternion_of, starts
from care_loss.actions._so3 import _Rotations
from care_loss.actions._spherical import couplings, wigner
from care_loss.rotation import fit_rotation, random_orthogonal

METHODS = ["rotation", "apply", "parts", "pose", "invariants", "canonical", "interpolate"]


def normal(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def rotations(*shape, seed=0):
    """Uniform rotations of space: normal quaternions have uniform directions."""
    q = normal(*shape, 4, seed=seed)
    return matrix_of(q / q.norm(dim=-1, keepdim=True))


def angle(a, b):
    """The angle between rotations, exact for small ones: the chord is √8 sin(angle / 2)."""
    return 2 * ((a - b).flatten(-2).norm(dim=-1) / math.sqrt(8)).clamp(max=1).asin()


def turn(axis, theta):
    """The rotation of rows about a coordinate axis, by the exponential of its generator."""
    generator = torch.zeros(3, 3, dtype=torch.float64)
    a, b = (axis + 1) % 3, (axis + 2) % 3
    generator[a, b], generator[b, a] = theta, -theta
    return torch.linalg.matrix_exp(generator)


def width(multiplicity):
    return sum((2 * degree + 1) * m for degree, m in enumerate(multiplicity))


def planted(multiplicity, *, without=0, seed=0):
    """An action in a random basis, with so many directions without embeddings."""
    d = width(multiplicity)
    return SO3Action(orthogonal(d + without, seed)[:, :d], multiplicity)


@st.composite
def actions(draw, *, max_d=64, moves=False):
    """Planted actions up to degree 3."""
    counts = [draw(st.integers(0, 4)), *(draw(st.integers(0, 3)) for _ in range(3))]
    assume(2 <= width(counts) <= max_d)
    assume(not moves or any(counts[1:]))
    without = draw(st.integers(0, min(max_d - width(counts), 4)))
    return planted(counts, without=without, seed=draw(seeds))


def rows(action, n, seed=0):
    """Embeddings in the subspace of the action."""
    return normal(n, action.basis.shape[1], seed=seed) @ action.basis.mT


def fitted(z, turned, g, **settings):
    """Fit without the warnings, which have tests of their own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fit_so3(z, turned, g, **settings)


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=True)


def stabiliser_is_trivial(action):
    """Whether generic coordinates of an action are moved by every rotation."""
    _, one, two, three = action.multiplicity.tolist()
    return one >= 2 or three >= 1 or two >= 2 or (one and two)


def test_wigner_matrices_are_a_representation():
    g, h = rotations(40, seed=1), rotations(40, seed=2)
    squares = couplings(6)
    found = [wigner(x, squares) for x in (g, h, g @ h)]
    close(found[0][0], g, 0)
    for degree, (first, second, both) in enumerate(zip(*found, strict=True), 1):
        assert first.shape == (40, 2 * degree + 1, 2 * degree + 1)
        close(first @ second, both, 4e-15)
        close(first @ first.mT, torch.eye(2 * degree + 1, dtype=g.dtype).expand_as(first), 8e-15)
        cosine = (g.diagonal(dim1=-2, dim2=-1).sum(-1) - 1) / 2
        theta = cosine.clamp(-1, 1).acos()
        character = 1 + 2 * sum((k * theta).cos() for k in range(1, degree + 1))
        # Near a half turn or none, the angle has half of the digits.
        close(first.diagonal(dim1=-2, dim2=-1).sum(-1), character, 1e-12)


def harmonics(x):
    """Real harmonics of degree 1 and 2 in the order and with the signs of e3nn."""
    x, y, z = x.unbind(-1)
    root = math.sqrt(3)
    two = (root * x * z, root * x * y, y * y - (x * x + z * z) / 2)
    two += (root * y * z, root * (z * z - x * x) / 2)
    return torch.stack((x, y, z), -1), torch.stack(two, -1)


def test_harmonics_turn_by_the_wigner_matrices():
    x, g = normal(20, 3), rotations(20)
    for before, after, d in zip(
        harmonics(x),
        harmonics((x.unsqueeze(-2) @ g).squeeze(-2)),
        wigner(g, couplings(2)),
        strict=True,
    ):
        close((before.unsqueeze(-2) @ d).squeeze(-2), after, 1e-14)
    # About the polar axis y, the harmonics m and -m turn by m times the angle.
    theta = 0.7
    for degree, d in enumerate(wigner(turn(1, theta), couplings(6)), 1):
        expected = torch.eye(2 * degree + 1, dtype=torch.float64)
        for m in range(1, degree + 1):
            i, j = degree - m, degree + m
            expected[i, i] = expected[j, j] = math.cos(m * theta)
            expected[i, j], expected[j, i] = -math.sin(m * theta), math.sin(m * theta)
        close(d, expected, 1e-14)


@pytest.fixture
def float64():
    """The default dtype in which e3nn makes its constants."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_conventions_are_those_of_e3nn(float64):
    o3 = pytest.importorskip("e3nn.o3")
    x, g = normal(20, 3), rotations(20)
    for degree, d in enumerate(wigner(g, couplings(6)), 1):
        before, after = (
            o3.spherical_harmonics(degree, points, False, normalization="norm")
            for points in (x, (x.unsqueeze(-2) @ g).squeeze(-2))
        )
        close((before.unsqueeze(-2) @ d).squeeze(-2), after, 1e-11)
        close(o3.Irrep(degree, 1).D_from_matrix(g), d, 1e-12)


def test_wigner_matrices_have_derivatives():
    g = rotations(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: tuple(wigner(g, couplings(3))), g)


def test_quaternions_of_rotations():
    g = torch.cat((rotations(50), torch.stack([turn(axis, math.pi) for axis in range(3)])))
    q = quaternion_of(torch.cat((g, torch.eye(3, dtype=g.dtype).unsqueeze(0))))
    assert (q[:, 0] >= 0).all()
    close(matrix_of(q)[:-1], g, 4e-15)


@settings(max_examples=10)
@given(actions(), st.integers(126, 150), st.integers(0, 8), seeds)
def test_random_rotations_give_back_what_was_planted(plant, t, more_rows, seed):
    z, g = rows(plant, 2 * len(plant.basis) + more_rows, seed), rotations(t, seed=seed)
    action = fitted(z, plant.apply(z, g.unsqueeze(1)), g)
    assert action.multiplicity.tolist() == plant.multiplicity.tolist()
    others = rotations(7, seed=seed + 1)
    close(action.rotation(others), plant.rotation(others), 1e-8)
    if action.explained.isfinite():
        assert abs(action.explained - 1) < 1e-8
        assert abs(action.explained_free - 1) < 1e-8


@settings(max_examples=10)
@given(actions(max_d=24), seeds)
def test_given_multiplicities_are_used(plant, seed):
    g = rotations(100, seed=seed)  # too few to look for degree 3 among others, at random
    z = rows(plant, 2 * len(plant.basis), seed)
    turned = plant.apply(z, g.unsqueeze(1))
    counts = plant.multiplicity.tolist()
    action = fitted(z, turned, g, multiplicity=counts[: 1 + max(k for k in range(4) if counts[k])])
    close(action.rotation(g), plant.rotation(g), 1e-8)


def test_rotations_up_to_a_lower_degree_are_enough_for_it():
    plant, g = planted([2, 2]), rotations(16)
    z = rows(plant, 20)
    turned = plant.apply(z, g.unsqueeze(1))
    assert fit_so3(z, turned, g, max_degree=1).multiplicity.tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"at least 84 .*got 16.*pass 68 more"):
        fit_so3(z, turned, g)
    assert fit_so3(z, turned, g, multiplicity=[2, 2]).explained > 0.999


@settings(max_examples=10)
@given(actions(), seeds)
def test_rotations_are_orthogonal_and_compose(action, seed):
    a, b = rotations(2, seed=seed)
    close(action.rotation(a) @ action.rotation(b), action.rotation(a @ b), 1e-12)
    r = action.rotation(a)
    close(r.mT @ r, torch.eye(len(r), dtype=r.dtype), 1e-12)
    z = normal(5, len(r), seed=seed)  # with what lies outside of the subspace
    close(action.apply(z, a), z @ r, 1e-12)
    outside = torch.eye(len(r), dtype=r.dtype) - action.basis @ action.basis.mT
    close(outside @ action.apply(z, a).mT, outside @ z.mT, 1e-12)


@settings(max_examples=10)
@given(actions(), seeds)
def test_parts_turn_by_their_degree_and_keep_the_length(action, seed):
    z, g = rows(action, 6, seed), rotations(6, seed=seed)
    before, after = action.parts(z), action.parts(action.apply(z, g))
    close(before[0], after[0], 1e-12)
    for degree in before.keys() - {0}:
        close(before[degree] @ wigner(g, couplings(3))[degree - 1], after[degree], 1e-12)
    total = sum(part.square().flatten(1).sum(-1) for part in before.values())
    close(total, z.square().sum(-1), 1e-10)


@settings(max_examples=10)
@given(actions(moves=True), seeds)
def test_the_pose_is_the_rotation_of_the_turn(action, seed):
    z, g = normal(8, len(action.basis), seed=seed), rotations(8, seed=seed)
    turned = action.apply(z, g)
    pose = action.pose(z, turned)
    close(action.apply(z, pose.element), turned, 1e-8)
    close(torch.linalg.det(pose.element), torch.ones(8, dtype=z.dtype), 1e-12)
    assert ((pose.gap >= 0) & (pose.gap <= 1)).all()
    if stabiliser_is_trivial(action):
        assert (angle(pose.element, g) < 1e-8).all()
        assert (pose.gap > 0).all()
    else:
        assert (pose.gap < 1e-12).all()


@pytest.mark.parametrize("multiplicity", [[0, 2], [0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]])
def test_the_pose_of_a_turn_is_never_a_local_optimum(multiplicity):
    action = planted(multiplicity)
    z, g = normal(2500, len(action.basis), seed=5), rotations(2500, seed=6)
    assert (angle(action.pose(z, action.apply(z, g)).element, g) < 1e-8).all()


@pytest.mark.parametrize("multiplicity", [[0, 1], [0, 0, 1], [0, 1, 1], [1, 1, 1, 2]])
def test_the_pose_of_unrelated_embeddings_is_the_best_of_many(multiplicity):
    action = planted(multiplicity, without=1)
    z1, z2 = normal(2, 200, len(action.basis), seed=2)
    pose = action.pose(z1, z2)
    reached = (action.apply(z1, pose.element) * z2).sum(-1)
    for g in rotations(400, seed=1).split(50):
        assert (reached >= (action.apply(z1, g.unsqueeze(1)) * z2).sum(-1).amax(0)).all()
    # It is a maximum: nothing near it is higher.
    for axis in range(3):
        for theta in (-1e-3, 1e-3):
            near = (action.apply(z1, pose.element @ turn(axis, theta)) * z2).sum(-1)
            assert (near <= reached + 1e-12).all()


@settings(max_examples=10)
@given(actions(moves=True, max_d=40), seeds)
def test_the_pose_is_equivariant(action, seed):
    z1, z2 = normal(2, 8, len(action.basis), seed=seed)
    a, b = rotations(2, 8, seed=seed)
    before, after = action.pose(z1, z2), action.pose(action.apply(z1, a), action.apply(z2, b))
    clear = before.gap > 0.01
    difference = angle(after.element, a.mT @ before.element @ b)[clear]
    # Flat optima are known less exactly.
    assert (difference < 1e-6).all()


def test_the_gap_says_how_unique_the_pose_is():
    vector, tensor = planted([0, 1]), planted([0, 0, 1])
    for action in (vector, tensor):  # any turn about the vector, and three half turns
        z = normal(2, 20, len(action.basis))
        assert (action.pose(*z).gap < 1e-12).all()
    two = planted([0, 2])
    z1, z2 = normal(2, 20, 6)
    assert (two.pose(z1, z2).gap == 1).all()  # two vectors have one optimum only
    # Two parallel vectors leave a turn about them free.
    parallel = torch.cat((z1[:, :3], 2 * z1[:, :3]), -1) @ two.basis.mT
    assert (two.pose(parallel, z2).gap == 0).all()
    # An optimum that is nearly as good: a vector, and one of degree 3 that is small.
    action = planted([0, 0, 1, 1])
    scale = torch.tensor([1.0] * 5 + [0.01] * 7, dtype=torch.float64)
    z = normal(20, 12) * scale @ action.basis.mT
    gap = action.pose(z, z).gap
    assert ((gap > 0) & (gap < 1e-3)).all()


@settings(max_examples=10)
@given(actions(moves=True, max_d=40), seeds)
def test_invariants_and_canonical_are_the_same_for_all_states(action, seed):
    z, g = normal(8, len(action.basis), seed=seed), rotations(8, seed=seed)
    turned = action.apply(z, g)
    close(action.invariants(z), action.invariants(turned), 1e-8)
    counts = action.multiplicity.tolist()
    assert action.invariants(z).shape[-1] == counts[0] + sum(m * (m + 1) // 2 for m in counts[1:])
    close(action.canonical(z), action.canonical(turned), 1e-8)
    close(action.canonical(action.canonical(z)), action.canonical(z), 1e-8)
    close(action.invariants(action.canonical(z)), action.invariants(z), 1e-8)


def test_invariants_of_other_images_differ():
    action = planted([1, 2, 1])
    z1, z2 = normal(2, len(action.basis))
    assert (action.invariants(z1) - action.invariants(z2)).abs().max() > 0.1
    assert (action.canonical(z1) - action.canonical(z2)).abs().max() > 0.1


@settings(max_examples=10)
@given(actions(moves=True, max_d=40), seeds)
def test_interpolation_goes_along_the_group(action, seed):
    z1, z2 = normal(2, 5, len(action.basis), seed=seed)
    element = action.pose(z1, z2).element
    close(action.interpolate(z1, z2, 0), z1, 1e-12)
    close(action.interpolate(z1, z2, 1.0), action.apply(z1, element), 1e-12)
    # Half of the way is a rotation whose square is the pose: the unit quaternion in the middle.
    q = quaternion_of(element) + torch.tensor([1.0, 0, 0, 0], dtype=z1.dtype)
    root = matrix_of(q / q.norm(dim=-1, keepdim=True))
    close(root @ root, element, 1e-12)
    close(action.interpolate(z1, z2, torch.tensor(0.5)), action.apply(z1, root), 1e-10)
    each = action.interpolate(z1, z2, torch.tensor([0.0, 0.25, 0.5, 1, 2]).double())
    close(each[1], action.interpolate(z1[1], z2[1], 0.25), 1e-12)
    close(each[4], action.apply(z1[4], element[4] @ element[4]), 1e-10)


def test_interpolation_by_a_half_turn():
    action, z = planted([0, 2]), normal(6)
    for axis in range(3):
        turned = action.apply(z, turn(axis, math.pi - 1e-9))
        quarters = [turn(axis, sign * math.pi / 2) for sign in (1, -1)]
        half = action.interpolate(z, turned, 0.5)
        nearest = min(float((half - action.apply(z, q)).abs().max()) for q in quarters)
        assert nearest < 1e-6


def call(action, name, z, g):
    z1, z2 = z
    if name == "parts":
        return tuple(action.parts(z1).values())
    t = g[..., 0, 0]
    arguments = {"rotation": (g,), "apply": (z1, g), "pose": (z1, z2), "interpolate": (z1, z2, t)}
    return getattr(action, name)(*arguments.get(name, (z1,)))


def test_the_gradient_of_the_pose_is_that_of_differences():
    action = planted([1, 1, 1, 1], without=1)
    z = normal(2, 5, len(action.basis), seed=3)
    clear = action.pose(*z).gap > 0.01
    assert clear.sum() > 2
    z = z[:, clear][:, :2].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, y: action.pose(x, y).element, tuple(z), fast_mode=True
    )


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("parts", "pose")])
def test_derivatives(name):
    action = planted([1, 2, 1])
    z, g = normal(2, 2, 12, seed=1).requires_grad_(), rotations(2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, g: call(action, name, z, g), (z, g), fast_mode=True)


def test_the_gradient_of_a_canonical_vector_does_not_follow_its_direction():
    action = SO3Action(torch.eye(3).double(), [0, 1])  # its pose is never unique
    z = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(action.canonical, z)
    (gradient,) = torch.autograd.grad(action.canonical(z).sum(), z)
    close(torch.linalg.cross(gradient, z.detach()), torch.zeros(4, 3).double(), 1e-9)


def noisy(x, sigma, seed):
    """Add noise of this length, relative to that of each row."""
    length = x.norm(dim=-1, keepdim=True)
    return x + sigma * length * normal(*x.shape, seed=seed) / x.shape[-1] ** 0.5


def error(plant, n, sigma, seed=0):
    """How far the rotations are from the planted ones, fitted with noise on both sides."""
    g, z = rotations(144, seed=seed + 7), rows(plant, n, seed)
    turned = noisy(plant.apply(z, g.unsqueeze(1)), sigma, seed + 2)
    action = fit_so3(noisy(z, sigma, seed + 1), turned, g)
    assert action.multiplicity.tolist() == plant.multiplicity.tolist()
    return float((action.rotation(g) - plant.rotation(g)).square().mean().sqrt())


def test_errors_fall_as_the_noise_and_the_root_of_the_rows():
    plant = planted([3, 1, 1, 0])
    errors = [error(plant, 100, sigma) for sigma in (1e-1, 1e-2, 1e-3)]
    assert errors[0] < 0.1
    for larger, smaller in pairwise(errors):
        assert 8 < larger / smaller < 12.5
    means = [sum(error(plant, n, 0.01, seed) for seed in range(6)) / 6 for n in (50, 200, 800)]
    for larger, smaller in pairwise(means):
        assert 1.5 < larger / smaller < 2.7


@pytest.mark.parametrize("multiplicity", [[3, 2, 1, 0], [1, 1, 1, 1], [6, 0, 2, 0]])
def test_multiplicities_are_right_under_noise(multiplicity):
    g = rotations(144, seed=3)
    for seed in range(12):
        plant = planted(multiplicity, without=16 - width(multiplicity), seed=seed)
        z = rows(plant, 64, seed)
        turned = noisy(plant.apply(z, g.unsqueeze(1)), 0.1, seed + 2)
        action = fit_so3(noisy(z, 0.1, seed + 1), turned, g)
        assert action.multiplicity.tolist() == multiplicity


def test_features_are_orthonormal():
    features = _Rotations(rotations(20_000), 2).features(2)
    close(features.mT @ features / 20_000, torch.eye(35, dtype=torch.float64), 0.06)


def test_the_basis_is_the_nearest_one():
    plant, g = planted([1, 1, 1]), rotations(60)
    z = rows(plant, 40)
    z1, z2 = noisy(z, 0.5, 1), noisy(plant.apply(z, g.unsqueeze(1)), 0.5, 2)
    action = fitted(z1, z2, g, multiplicity=[1, 1, 1])
    assert 0.3 < action.explained < 1
    assert action.explained > action.explained_free  # it has fewer free numbers
    # No other basis nearby comes nearer to the rotations that fit each turn.
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (z1, z2)]
    free = fit_rotation(unit[0].expand_as(unit[1]), unit[1], special=True).rotation
    least = (action.rotation(g) - free).square().sum()
    for seed in range(8):
        step = 1e-4 * normal(9, 9, seed=seed)
        for skew in (step - step.mT, step.mT - step):
            other = SO3Action(torch.linalg.matrix_exp(skew) @ action.basis, [1, 1, 1])
            assert (other.rotation(g) - free).square().sum() > least
    assert slope_of_other_bases(action.rotation(g), free) < 1e-10


@given(st.lists(st.floats(-1, 3), min_size=3, max_size=3), st.integers(1, 14))
def test_multiplicities_are_the_nearest_of_all(coefficients, d):
    def distance(counts):
        sizes = zip(counts, coefficients, (1, 3, 5), strict=True)
        return sum(size * abs(count - found) for count, found, size in sizes)

    found = nearest_counts(torch.tensor(coefficients, dtype=torch.float64), (1, 3, 5), d).tolist()
    assert found[0] + 3 * found[1] + 5 * found[2] == d
    assert min(found) >= 0
    every = [(d - 3 * a - 5 * b, a, b) for a in range(d // 3 + 1) for b in range(d // 5 + 1)]
    best = min(distance(counts) for counts in every if counts[0] >= 0)
    assert distance(found) <= best + 1e-9


def test_unrelated_embeddings_explain_nothing_and_warn_once():
    with pytest.warns(UserWarning, match=r"explains -?0\.|degree 0 only") as caught:
        action = fit_so3(normal(80, 8), normal(144, 80, 8, seed=1), rotations(144))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert action.explained.nan_to_num() < 0.2


def test_embeddings_that_do_not_move_warn():
    z = normal(20, 4)
    with pytest.warns(UserWarning, match="fit_so3 found degree 0 only"):
        action = fit_so3(z, z.expand(90, 20, 4), rotations(90), max_degree=2)
    assert action.multiplicity.tolist() == [4, 0, 0]
    assert action.explained.isnan()
    pose = action.pose(z, z)
    assert pose.element.shape == (20, 3, 3)
    assert pose.element.isnan().all()
    assert (pose.gap == 0).all()
    close(action.canonical(z), z, 0)
    close(action.interpolate(z, z.flip(0), 0.5), z, 0)
    close(action.rotation(rotations(2)), torch.eye(4, dtype=z.dtype).expand(2, 4, 4), 0)


def test_the_pose_is_nan_where_nothing_turns():
    action = SO3Action(torch.eye(9), [1, 1, 1])
    z = torch.eye(9)
    # z[0] is fixed; z[1] and z[4] have no degree in common.
    assert action.pose(z[:2], z[[0, 4]]).element.isnan().all()
    assert action.pose(z[1], torch.zeros(9)).element.isnan().all()
    assert action.pose(z[1] * torch.nan, z[1]).element.isnan().all()
    close(action.pose(z[1], z[1]).element, torch.eye(3), 1e-6)
    x = torch.stack((z[0], z[1])).requires_grad_()
    (gradient,) = torch.autograd.grad(action.canonical(x).sum(), x)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes(name, dtype):
    exact = planted([1, 2, 1])
    action = SO3Action(exact.basis.float(), [1, 2, 1])
    z, g = normal(2, 6, 12, seed=4).to(dtype), rotations(6).to(dtype)
    found, expected = call(action, name, z, g), call(exact, name, z.double(), g.double())
    if isinstance(found, torch.Tensor):
        found, expected = (found,), (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == (torch.float32 if name == "rotation" else dtype)
        scale = theirs.abs().max().clamp_min(1)
        close(ours.double(), theirs, float(4 * torch.finfo(ours.dtype).eps * scale) + 1e-5)


def test_a_fit_in_half_precision():
    plant, g = planted([1, 1, 1]), rotations(60)
    z = rows(plant, 40)
    half = [x.bfloat16() for x in (z, plant.apply(z, g.unsqueeze(1)), g)]
    action = fit_so3(*half, max_degree=2)
    assert action.multiplicity.tolist() == [1, 1, 1]
    assert action.basis.dtype == torch.float32
    close(action.rotation(g.float()).double(), plant.rotation(g), 0.02)


def test_matrices_may_have_rounding_errors():
    action, g = planted([1, 1, 1, 1]), rotations(20)
    r = action.rotation(g.half().double())
    close(r @ r.mT, torch.eye(16, dtype=r.dtype).expand_as(r), 1e-12)
    close(r, action.rotation(g), 0.01)


@pytest.mark.parametrize("name", METHODS)
def test_leading_dimensions_and_empty_batches(name):
    action = planted([1, 2, 1])
    z, g = normal(2, 2, 3, 12), rotations(2, 3)
    found, each = call(action, name, z, g), call(action, name, z[:, 1], g[1])
    empty = call(action, name, z[:, :0], g[:0])
    if isinstance(found, torch.Tensor):
        found, each, empty = (found,), (each,), (empty,)
    for whole, part, none in zip(found, each, empty, strict=True):
        # The range in a gap is that of values in float32.
        close(whole[1], part, 1e-6 if whole is getattr(found, "gap", None) else 1e-12)
        assert none.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "aot_eager") for name in METHODS), ("apply", "inductor")]
)
def test_compiles_into_one_graph(name, backend, monkeypatch):
    # Steps are unrolled, and take their time to compile: a few of each kind are enough.
    monkeypatch.setattr("care_loss.actions._highest.STEPS", (1, 1, 2))
    action = planted([1, 2, 1] if name == "pose" else [1, 2])
    z, g = normal(2, 6, len(action.basis)), rotations(6)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, g: call(action, name, z, g), fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(z, g), call(action, name, z, g))


def test_state_dict():
    plant = planted([1, 1, 1])
    z, g = rows(plant, 20), rotations(60)
    action = fit_so3(z, plant.apply(z, g.unsqueeze(1)), g, max_degree=2)
    assert action.state_dict().keys() == {"basis", "multiplicity", "explained", "explained_free"}
    other = planted([1, 1, 1], seed=1)
    other.load_state_dict(action.state_dict())
    close(other.rotation(g), action.rotation(g), 0)
    close(other.explained, action.explained, 0)
    close(copy.deepcopy(action).rotation(g), action.rotation(g), 0)
    with pytest.raises(ValueError, match=r"must be \[3, 1\].*got \[1, 1, 1\].*SO3Action\("):
        planted([3, 1]).load_state_dict(action.state_dict())
    assert SO3Action(action.basis, action.multiplicity).explained.isnan()
    assert repr(action) == "SO3Action(dim=9, multiplicity=[1, 1, 1])"
    assert not list(action.parameters())


def turns(t=40, n=16, d=4):
    plant, g = planted([d - 3, 1]), rotations(t)
    z = rows(plant, n)
    return z, plant.apply(z, g.unsqueeze(1)), g


def test_a_sign_that_no_rotation_explains_is_an_error():
    z, turned, g = turns()
    sign = torch.tensor([-1.0, 1, 1, 1], dtype=z.dtype)
    with pytest.raises(ValueError, match="got reflections: for 14 of the 14 turns tried"):
        fit_so3(z, turned * sign, g, max_degree=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": rotations(40)[0]}, r"`rotations` must have shape \(T, 3, 3\), got \(3, 3\)"),
        ({"g": torch.eye(4).expand(40, 4, 4)}, r"shape \(T, 3, 3\), got \(40, 4, 4\)"),
        ({"g": rotations(30)}, r"`z_turned` must be .* \(30, 16, 4\), got"),
        ({"g": rotations(40) * torch.nan}, "`rotations` must be finite"),
        ({"g": -rotations(40)}, "determinant of -1: reflections do not act"),
        ({"g": 2 * rotations(40)}, r"rotations of space, got an entry .* of 3: pass nearest"),
        ({"g": rotations(1).expand(40, 3, 3)}, "condition .*: pass more, or spread them"),
        (
            {"max_degree": 3},
            "up to degree 3: at least 84 .*, or 126 random ones, got 40.*: "
            "pass 44 more, or look for",
        ),
        ({"max_degree": 0}, r"`max_degree` must be an int in \[1, 6\], got int 0"),
        ({"max_degree": 7}, r"`max_degree` must be an int in \[1, 6\]"),
        ({"rows": 7}, "at least 8 rows.*got 7: pass more samples"),
        ({"z": torch.nan}, "must be finite, got NaN"),
        ({"z": 0.0}, "other than 0"),
        ({"dtype": torch.float32}, "`z_turned` must be torch.float32"),
        ({"subspace": 1.5}, r"share in \(0, 1\]"),
        ({"subspace": 0.9, "multiplicity": [1, 1]}, "got both"),
        ({"multiplicity": [4, 1]}, "at most 4 directions.*got 7"),
        ({"multiplicity": [2, -1]}, "integers >= 0.*each degree"),
        ({"multiplicity": 3}, "integers >= 0"),
    ],
)
def test_bad_turns(change, message):
    z, turned, g = turns()
    change = {"max_degree": 2} | change
    g, n = change.pop("g", g), change.pop("rows", 16)
    factor = change.pop("z", 1.0)
    turned = turned[:, :n] * factor
    z = (z[:n] * factor).to(change.pop("dtype", z.dtype))
    with pytest.raises(ValueError, match=message):
        fit_so3(z, turned, g, **change)


def test_bad_arguments_of_methods():
    action = SO3Action(torch.eye(4), [1, 1])
    z, g = torch.randn(4, 4), torch.eye(3)
    with pytest.raises(ValueError, match=r"`z` must have shape \(\*, 4\), got \(4, 2\)"):
        action.apply(z[:, :2], g)
    with pytest.raises(TypeError, match="`g` must be a torch"):
        action.rotation(1.0)
    with pytest.raises(ValueError, match=r"`g` must have shape \(\*, 3, 3\), got \(3,\)"):
        action.rotation(g[0])
    with pytest.raises(ValueError, match="determinant of -1: reflections do not act"):
        action.rotation(torch.stack((g, -g)))
    with pytest.raises(ValueError, match="leading dimensions that broadcast"):
        action.apply(z, g.expand(3, 3, 3))
    with pytest.raises(ValueError, match="the same dtype"):
        action.pose(z, z.double())
    with pytest.raises(ValueError, match="`order` must be 2, got int 3"):
        action.invariants(z, order=3)
    with pytest.raises(TypeError, match="`t` must be a number"):
        action.interpolate(z, z, "half")
    with pytest.raises(ValueError, match=r"shape \(D, 4\) with D >= 4"):
        SO3Action(torch.eye(3), [1, 1])
    with pytest.raises(ValueError, match="0 beyond degree 6"):
        SO3Action(torch.eye(15), [0] * 7 + [1])
    assert action.rotation(g * torch.nan).isnan().any()


@pytest.mark.parametrize("degree", [2, 3])
def test_the_starts_cover_all_rotations_evenly(degree):
    found, near = starts(degree)
    assert len(found) == 64 * degree**3
    torch.testing.assert_close(found @ found.mT, torch.eye(3).expand_as(found), rtol=0, atol=1e-5)
    # Each has the same share of the group: traces have the mean 0 and the variance 1.
    traces = found.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(traces.mean()) < 0.02
    assert abs(traces.square().mean() - 1) < 0.05
    # A neighbour is among the nearest, and no rotation is far from all.
    distance = (found.flatten(1) @ found.flatten(1).T).fill_diagonal_(-torch.inf)
    nearest = distance.topk(near.shape[1], dim=1).indices
    assert near.sort(1).values.equal(nearest.sort(1).values)
    others = random_orthogonal(3, batch_shape=(1000,), special=True)
    closest = (others.flatten(1) @ found.flatten(1).T).amax(1)
    angle = torch.acos(((closest - 1) / 2).clamp(-1, 1))
    assert angle.max() < 1.5 / degree
