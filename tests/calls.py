"""Every public function of tensors, called with some: for tests of what holds for all of them."""

import torch
from torch import nn
from torch.func import functional_call

from care_loss import (
    CAREloss,
    EquivarianceLoss,
    InfoNCELoss,
    RotationContrastLoss,
    functional,
    metrics,
    rotation,
    sphere,
)
from care_loss.actions import CircleAction, SO3Action
from care_loss.views import augment_chunks, shared_views

Z1, Z2, Z3, Z4 = torch.randn(4, 12, 4, generator=torch.Generator().manual_seed(0))
UNIT = [sphere.normalize(z) for z in (Z1, Z2)]
T = torch.tensor(0.3)
IDS = torch.arange(12) % 5
LONG = torch.arange(12) % 2 * 7  # ids of chunks of six rows
WEIGHTS = torch.rand(12, generator=torch.Generator().manual_seed(0))
R = rotation.nearest_orthogonal(Z1[:4], special=True)
Z5, Z6 = torch.cat((Z1, Z2), 1), torch.cat((Z3, Z4), 1)
R8 = rotation.nearest_orthogonal(Z5[:8])
TURNS = rotation.nearest_orthogonal(torch.stack((Z1, Z2, Z3), 1)[..., :3], special=True)
CIRCLE = torch.linalg.matrix_exp(
    (2 * torch.pi / 8 * torch.arange(8.0))[:, None, None] * torch.tensor([[0.0, 1], [-1, 0]])
)


def action(basis):
    """An action of the circle whose frequencies are 0, 1 and not 2."""
    return CircleAction(basis, [2, 1])


def space(basis):
    """An action of rotations of space whose degrees are 1 and 2."""
    return SO3Action(basis, [0, 1, 1])


# Each call with the tensors that it is given. A tensor of one number may stay on the CPU.
CALLS = {
    "info_nce": (functional.info_nce_loss, Z1, Z2),
    "info_nce, learned": (lambda x, y, t: functional.info_nce_loss(x, y, temperature=t), Z1, Z2, T),
    "info_nce, none": (lambda x, y: functional.info_nce_loss(x, y, reduction="none"), Z1, Z2),
    "queue": (lambda x, y, q: functional.info_nce_loss(x, y, negatives=q), Z1, Z2, Z3),
    "queue, learned": (
        lambda x, y, q, t: functional.info_nce_loss(x, y, temperature=t, negatives=q),
        *(Z1, Z2, Z3, T),
    ),
    "equivariance": (lambda x, y: functional.equivariance_loss(x, y, chunks=3), Z1, Z2),
    "ids": (lambda x, y, ids: functional.equivariance_loss(x, y, chunks=ids), Z1, Z2, IDS),
    "cross_fitted": (lambda x, y: functional.cross_fitted(x, y, chunks=1), Z1, Z2),
    "cross_fitted, ids": (
        lambda x, y, ids: functional.cross_fitted(x[:, :3], y[:, :3], chunks=ids),
        *(Z1, Z2, LONG),
    ),
    "uniformity": (functional.uniformity_loss, Z1),
    "alignment": (functional.alignment_loss, Z1, Z2),
    "CAREloss": (CAREloss(chunks=3), Z1, Z2, Z3, Z4),
    "InfoNCELoss": (InfoNCELoss(), Z1, Z2),
    "InfoNCELoss, learned": (
        lambda x, y, t: functional_call(InfoNCELoss(nn.Parameter(T)), {"temperature": t}, (x, y)),
        *(Z1, Z2, T),
    ),
    "RotationContrastLoss": (RotationContrastLoss(chunks=1).forward_components, Z1, Z2),
    "EquivarianceLoss": (EquivarianceLoss(3), Z1, Z2),
    "fit_rotation": (rotation.fit_rotation, Z1, Z2),
    "fit_rotation, few rows": (rotation.fit_rotation, Z1[:2], Z2[:2]),
    "fit_rotation, weights": (
        lambda x, y, w: rotation.fit_rotation(x, y, weights=w, special=True),
        *(Z1, Z2, WEIGHTS),
    ),
    "fit_similarity": (rotation.fit_similarity, Z1, Z2),
    "fit_similarity, few rows": (rotation.fit_similarity, Z1[:3], Z2[:3]),
    "fit_similarity, weights": (
        lambda x, y, w: rotation.fit_similarity(x, y, weights=w, special=True, scaled=False),
        *(Z1, Z2, WEIGHTS),
    ),
    "nearest_orthogonal": (rotation.nearest_orthogonal, Z1[:4]),
    "rotation_angles": (rotation.rotation_angles, R),
    "rotation_distance": (rotation.rotation_distance, R, R.mT),
    "CircleAction.rotation": (lambda r, g: action(r).rotation(g), R, WEIGHTS),
    "CircleAction.apply": (lambda r, x, g: action(r).apply(x, g), R, Z1, WEIGHTS),
    "CircleAction.parts": (lambda r, x: list(action(r).parts(x).values()), R, Z1),
    "CircleAction.pose": (lambda r, x, y: action(r).pose(x, y), R, Z1, Z2),
    "CircleAction.invariants": (lambda r, x: action(r).invariants(x), R, Z1),
    "CircleAction.canonical": (lambda r, x: action(r).canonical(x), R, Z1),
    "CircleAction.interpolate": (lambda r, x, y: action(r).interpolate(x, y, 0.5), R, Z1, Z2),
    "SO3Action.rotation": (lambda r, g: space(r).rotation(g), R8, TURNS),
    "SO3Action.apply": (lambda r, x, g: space(r).apply(x, g), R8, Z5, TURNS),
    "SO3Action.parts": (lambda r, x: list(space(r).parts(x).values()), R8, Z5),
    "SO3Action.pose": (lambda r, x, y: space(r).pose(x, y), R8, Z5, Z6),
    "SO3Action.invariants": (lambda r, x: space(r).invariants(x), R8, Z5),
    "SO3Action.canonical": (lambda r, x: space(r).canonical(x), R8, Z5),
    "SO3Action.interpolate": (lambda r, x, y: space(r).interpolate(x, y, 0.5), R8, Z5, Z6),
    "normalize": (sphere.normalize, Z1),
    "geodesic_distance": (sphere.geodesic_distance, *UNIT),
    "slerp": (sphere.slerp, *UNIT, T),
    "slerp, several": (sphere.slerp, *UNIT, WEIGHTS),
    "expmap": (sphere.expmap, UNIT[0], Z2),
    "logmap": (sphere.logmap, *UNIT),
    "tangent_projection": (sphere.tangent_projection, UNIT[0], Z2),
    "parallel_transport": (sphere.parallel_transport, *UNIT, Z3),
    "frechet_mean": (lambda x, w: sphere.frechet_mean(x, weights=w), Z1, WEIGHTS),
    "frequencies": (
        lambda r, t: metrics.frequencies(r, t),
        *(CIRCLE, 2 * torch.pi / 8 * torch.arange(8)),
    ),
    "shared_views": (lambda x: tuple(shared_views(x, torch.neg, chunks=3)[:2]), Z1),
    "shared_views, ids": (lambda x, ids: tuple(shared_views(x, torch.neg, chunks=ids)), Z1, IDS),
    "augment_chunks": (lambda x: augment_chunks(x, torch.neg, chunks=3).view, Z1),
    "composition_error": (metrics.composition_error, Z1, Z2, Z3, Z4),
    "cosine_spread": (metrics.cosine_spread, Z1[:, :2], Z2[:, :2]),
    "effective_rank": (metrics.effective_rank, Z1),
    "equivariance_error": (metrics.equivariance_error, Z1, Z2),
    "invariance_error": (metrics.invariance_error, Z1, Z2),
    "mean_norm": (metrics.mean_norm, Z1),
    "relative_equivariance": (metrics.relative_equivariance, Z1, Z2),
    "rotation_share": (metrics.rotation_share, Z1, Z2),
    "transformed_retrieval": (metrics.transformed_retrieval, Z1, Z2),
    "wahba_error": (metrics.wahba_error, Z1, Z2),
}


def results(call, tensors, as_it_is=None):
    """All tensors that a call returns, and the gradients; one input, by place, may have none."""
    tensors = [
        x if i == as_it_is else x.detach().clone().requires_grad_(x.is_floating_point())
        for i, x in enumerate(tensors)
    ]
    found = call(*tensors)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    total = sum(x.sum() for x in found if x.requires_grad)
    leaves = [x for x in tensors if x.requires_grad]
    if not isinstance(total, int):
        found += [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]
    return found
