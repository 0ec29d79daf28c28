"""The paper and the authors' arithmetic in float64 NumPy: slow, obvious, one loop a sum.

Equation numbers are those of Gupta et al., ICLR 2024 (arXiv 2306.13924), where it numbers them.
"""

import numpy as np


def unit(z):
    z = np.asarray(z, dtype=np.float64)
    return z / np.linalg.norm(z, axis=-1, keepdims=True)


def info_nce(z1, z2, temperature):
    """InfoNCE over the 2N rows of two views, a value an anchor, (2, N).

    The authors' -log(pos / (pos + sum of neg)), as log(1 + sum of neg / pos).
    """
    z = np.concatenate([unit(z1), unit(z2)])
    n = len(z1)
    loss = np.empty(2 * n)
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        ratio = 0.0
        for j in range(2 * n):
            if j not in (i, partner):
                ratio += np.exp((z[i] @ z[j] - z[i] @ z[partner]) / temperature)
        loss[i] = np.log1p(ratio)
    return loss.reshape(2, n)


def info_nce_with_queue(z1, z2, queue, temperature):
    """InfoNCE of MoCo (He et al., 2020, equation 1), a value an anchor, (N,)."""
    anchors, positives, queue = unit(z1), unit(z2), unit(queue)
    loss = np.empty(len(anchors))
    for i, (anchor, positive) in enumerate(zip(anchors, positives, strict=True)):
        ratio = sum(np.exp((anchor @ other - anchor @ positive) / temperature) for other in queue)
        loss[i] = np.log1p(ratio)
    return loss


def equivariance_of_chunk(u, v):
    """Equation 3 for one chunk: the mean over i != j of squared differences of inner products."""
    n = len(u)
    total = 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total += (u[i] @ u[j] - v[i] @ v[j]) ** 2
    return total / (n * (n - 1))


def authors_equivariance_of_chunk(u, v):
    """The published code: twice the mean over i of || row i of the gap without column i ||^2."""
    gap = u @ u.T - v @ v.T
    rows = [np.delete(gap[i], i) for i in range(len(u))]
    return 2 * np.mean([np.linalg.norm(row) ** 2 for row in rows])


OF_CHUNK = {"mean": equivariance_of_chunk, "authors": authors_equivariance_of_chunk}


def equivariance(z1, z2, chunks, scale="mean"):
    """A value a chunk, cut as numpy.array_split (and torch.tensor_split) cut."""
    u, v = unit(z1), unit(z2)
    count = min(chunks, len(u) // 2)
    pairs = zip(np.array_split(u, count), np.array_split(v, count), strict=True)
    return np.array([OF_CHUNK[scale](*pair) for pair in pairs])


def equivariance_by_id(z1, z2, ids, scale="mean"):
    """The mean over the ids that two rows or more have."""
    u, v, ids = unit(z1), unit(z2), np.asarray(ids)
    members = [ids == chunk for chunk in np.unique(ids)]
    return np.mean([OF_CHUNK[scale](u[m], v[m]) for m in members if m.sum() > 1])


def in_modal_consistency(image, text):
    """CyCLIP (Goel et al., 2022), the in-modal term: (1/N) sum_j sum_k, with the pairs j = k."""
    u, v = unit(image), unit(text)
    n = len(u)
    return sum((u[j] @ u[k] - v[j] @ v[k]) ** 2 for j in range(n) for k in range(n)) / n


def uniformity(z, t):
    """Wang and Isola (2020), section 4.1, without the pairs i = j."""
    z = unit(z)
    n = len(z)
    pairs = [np.exp(-t * np.sum((z[i] - z[j]) ** 2)) for i in range(n) for j in range(n) if i != j]
    return np.log(np.mean(pairs))


def alignment(z1, z2, alpha):
    """Wang and Isola (2020), section 4.1."""
    return np.mean(np.linalg.norm(unit(z1) - unit(z2), axis=-1) ** alpha)


def nearest_orthogonal(m, special=False):
    """The orthogonal matrix nearest to `m`, where it is unique (Schönemann, 1966)."""
    u, _, vh = np.linalg.svd(m)
    if special and np.linalg.det(u @ vh) < 0:
        u[:, -1] *= -1
    return u @ vh


def fit_rotation(x, y, w, special=False, eta=0.0):
    """The orthogonal map from the rows of x to those of y, pulled towards the identity by eta."""
    m = np.zeros((x.shape[1], x.shape[1]))
    for row, image, weight in zip(x, y, w, strict=True):
        m += weight * np.outer(row, image)
    return nearest_orthogonal(m + eta * np.linalg.norm(m) * np.eye(len(m)), special)


def cross_fitted(z, z_turned, ids, special=True):
    """Each unit row under the map that fits the other half of the rows with its id."""
    u, v = unit(z), unit(z_turned)
    result = np.empty_like(u)
    for chunk in np.unique(ids):
        (rows,) = np.nonzero(np.asarray(ids) == chunk)
        for half, other in ((rows[::2], rows[1::2]), (rows[1::2], rows[::2])):
            rotation = fit_rotation(u[other], v[other], np.ones(len(other)), special)
            for i in half:
                result[i] = u[i] @ rotation
    return result


def fit_similarity(x, y, w, special=False, scaled=True):
    """The rotation, scale and translation from the rows of x to those of y (Umeyama, 1991)."""
    mean_x = sum(weight * row for row, weight in zip(x, w, strict=True)) / sum(w)
    mean_y = sum(weight * row for row, weight in zip(y, w, strict=True)) / sum(w)
    rotation = fit_rotation(x - mean_x, y - mean_y, w, special)
    product, spread = 0.0, 0.0
    for row, image, weight in zip(x - mean_x, y - mean_y, w, strict=True):
        product += weight * np.dot(row @ rotation, image)
        spread += weight * np.dot(row, row)
    scale = product / spread if scaled else 1.0
    return rotation, scale, mean_y - scale * mean_x @ rotation


def paired(z, z_transformed, order):
    """Unit rows, those of z in another order where one is given."""
    u, v = unit(z), unit(z_transformed)
    return (u if order is None else u[order]), v


def held_out(u, *steps, special=False):
    """Each row under the maps that fit the rows of the other parity."""
    result = np.empty_like(u)
    for i in range(len(u)):
        others = [j for j in range(len(u)) if j % 2 != i % 2]
        row = u[i]
        for v in steps:
            row = row @ fit_rotation(u[others], v[others], np.ones(len(others)), special)
        result[i] = row
    return result


def distance(x, y):
    """The root mean squared distance of rows."""
    return np.sqrt(np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)]))


def wahba_error(z, z_transformed, order=None, special=False):
    u, v = paired(z, z_transformed, order)
    return distance(held_out(u, v, special=special), v)


def relative_equivariance(z, z_transformed, order=None):
    """The paper's gamma (section 4), as a ratio of means."""
    u, v = paired(z, z_transformed, order)
    top, bottom = [], []
    for i in range(len(u)):
        for j in range(len(u)):
            if i != j:
                change = np.sum((v[i] - v[j]) ** 2) - np.sum((u[i] - u[j]) ** 2)
                moved = np.sum((v[i] - u[i]) ** 2) + np.sum((v[j] - u[j]) ** 2)
                top.append(change**2)
                bottom.append(moved**2)
    return np.mean(top) / np.mean(bottom)


def ranks(z, z_transformed, order=None):
    """The rank of the transformed row among all, for the prediction from the other half."""
    u, v = paired(z, z_transformed, order)
    predicted = held_out(u, v)
    result = []
    for i in range(len(u)):
        distances = [np.linalg.norm(predicted[i] - candidate) for candidate in v]
        nearer = sum(other < distances[i] - 1e-9 for other in distances)
        as_near = sum(abs(other - distances[i]) <= 1e-9 for other in distances)
        result.append(nearer + (as_near + 1) / 2)
    return np.array(result)
