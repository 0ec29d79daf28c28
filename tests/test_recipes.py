"""The published settings, against the paper's table and the authors' arithmetic."""

import pytest
import reference
import torch

from care_loss import RECIPES, CAREloss

# temperature, weight, chunks (paper, appendix), the rows that are cut, and weight * 2 (n - 1)
PUBLISHED = {
    "cifar10": (0.5, 0.01, 16, 256, 0.30),
    "cifar100": (0.5, 0.001, 4, 256, 0.126),
    "stl10": (0.5, 0.01, 8, 256, 0.62),
    "imagenet100-simclr": (0.2, 0.005, 4, 32, 0.07),
    "imagenet100-moco": (0.2, 0.01, 8, 32, 0.06),
}


def test_every_published_recipe_is_there():
    assert RECIPES.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_papers_settings(name):
    temperature, weight, chunks, _, _ = PUBLISHED[name]
    assert RECIPES[name] == {
        "temperature": temperature,
        "equivariance_weight": weight,
        "chunks": chunks,
        "scale": "authors",
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_give_the_value_of_the_authors_arithmetic(name, device):
    temperature, weight, chunks, rows, _ = PUBLISHED[name]
    views = torch.randn(4, rows, 16, dtype=torch.float64, device=device)
    z1, z2, e1, e2 = views.cpu().numpy()
    expected = (
        reference.info_nce(z1, z2, temperature).mean()
        + weight * reference.equivariance(e1, e2, chunks, "authors").mean()
    )
    assert CAREloss(**RECIPES[name])(*views).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_have_the_stated_weight_on_the_mean_scale(name, device):
    _, weight, chunks, rows, on_mean_scale = PUBLISHED[name]
    assert weight * 2 * (rows / chunks - 1) == pytest.approx(on_mean_scale, rel=0.01)
    recipe = dict(RECIPES[name], equivariance_weight=weight * 2 * (rows / chunks - 1))
    recipe["scale"] = "mean"
    views = torch.randn(4, rows, 16, dtype=torch.float64, device=device)
    torch.testing.assert_close(CAREloss(**recipe)(*views), CAREloss(**RECIPES[name])(*views))
