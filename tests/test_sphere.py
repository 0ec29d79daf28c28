"""The one `normalize`."""

import pytest
import torch

from care_loss.sphere import normalize


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_any_length_become_unit_rows(dtype, device):
    limits = torch.finfo(dtype)
    directions = torch.randn(3, 64, dtype=torch.float64, device=device)
    directions /= directions.norm(dim=-1, keepdim=True)
    lengths = torch.tensor(
        [0.9 * limits.max, 1.0, 64 * limits.tiny], dtype=torch.float64, device=device
    )
    unit = normalize((lengths[:, None] * directions).to(dtype))
    assert unit.dtype == dtype
    # the shortest row has been rounded to subnormal numbers before it arrives
    torch.testing.assert_close(unit[:2].double(), directions[:2], rtol=4 * limits.eps, atol=0)
    assert (unit.double().norm(dim=-1) - 1).abs().max() < 4 * limits.eps


def test_a_zero_row_stays_zero_with_gradient_zero(device):
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], device=device, requires_grad=True)
    unit = normalize(x)
    unit.backward(torch.ones_like(x))
    assert not unit[0].any()
    assert not x.grad[0].any()
    assert x.grad[1].any()


def test_leading_dimensions_are_free_and_may_be_empty(device):
    x = torch.randn(2, 3, 5, device=device)
    assert torch.equal(normalize(x)[1, 2], normalize(x[1, 2]))
    assert normalize(x[:0]).shape == (0, 3, 5)
