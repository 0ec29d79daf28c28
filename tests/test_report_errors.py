"""The report: every error names what is wrong and in which transformation."""

import pytest
import torch
from reports import IMAGES, points, quiet, turn
from torch import nn
from torch.utils.data import DataLoader

GENERATOR = torch.Generator().manual_seed(0)


def own_generator(x):
    return x * torch.rand((), generator=GENERATOR, dtype=x.dtype)


BAD = {
    "an encoder that is a class": (
        {"encoder": nn.Identity},
        TypeError,
        "`encoder` must be a callable",
    ),
    "a list of transformations": (
        {"transformations": [turn]},
        TypeError,
        "`transformations` must be a mapping",
    ),
    "no transformations": ({"transformations": {}}, TypeError, "with at least one"),
    "a transformation that is no callable": (
        {"transformations": {"t": 3}},
        TypeError,
        "must map names to callables of images .*'t': int 3",
    ),
    "few draws": ({"samples": 3}, ValueError, "`samples` must be an int >= 4, got int 3"),
    "no batches": ({"batch_size": 0}, ValueError, "`batch_size` must be an int >= 1"),
    "a seed of another type": ({"seed": 0.5}, ValueError, "`seed` must be an int >= 0"),
    "progress of another type": ({"progress": "yes"}, TypeError, "`progress` must be True or"),
    "a list of images": (
        {"images": [torch.ones(3)]},
        TypeError,
        "`images` must be a tensor .* or a torch.utils.data.DataLoader, got list",
    ),
    "three images": ({"images": IMAGES[:3]}, ValueError, "at least 4 images, got 3"),
    "no images": ({"images": IMAGES[:0]}, ValueError, "must contain images"),
    "no embeddings": (
        {"encoder": lambda x: None},
        ValueError,
        r"`encoder` must map 20 images to embeddings \(20, D\).* got NoneType for the clean images",
    ),
    "feature maps": (
        {"encoder": lambda x: x[:, :, None, None]},
        ValueError,
        r"got torch.float64 of shape \(20, 4, 1, 1\) on cpu for the clean images: use .flatten",
    ),
    "embeddings without dimensions": (
        {"encoder": lambda x: x[:, :0]},
        ValueError,
        r"to embeddings \(20, D\), .* got torch.float64 of shape \(20, 0\) on cpu",
    ),
    "NaN embeddings": (
        {"encoder": lambda x: x / 0},
        ValueError,
        "must return finite embeddings, got NaN or infinity for 20 of 20 .* the clean images",
    ),
    "NaN images": (
        {"transformations": {"bright": lambda x: x * torch.rand(()) / 0}},
        ValueError,
        r"transformations\['bright'\] must return finite images",
    ),
    "NaN embeddings under a transformation": (
        {
            "transformations": {"dark": lambda x: 0 * x},
            "encoder": lambda x: x / x.norm(dim=1, keepdim=True),
        },
        ValueError,
        "finite embeddings, got NaN or infinity for 20 of 20 .* transformation 'dark'",
    ),
    "draws for each image": (
        {"transformations": {"noise": lambda x: x + torch.randn_like(x)}},
        ValueError,
        r"transformations\['noise'\] must draw one augmentation for all images",
    ),
    "a generator of its own": (
        {"transformations": {"own": own_generator}},
        ValueError,
        r"transformations\['own'\] must draw from the generators of torch",
    ),
    "draws that depend on the number of images": (
        {"transformations": {"t": lambda x: x * torch.rand(len(x) + 1, dtype=x.dtype)[-1]}},
        ValueError,
        r"transformations\['t'\] must draw the same for any number of images",
    ),
    "fewer images": (
        {"transformations": {"t": lambda x: x[1:]}},
        ValueError,
        r"transformations\['t'\] must map a tensor of 32 images to a tensor of 32 images",
    ),
    "more images": (
        {"transformations": {"t": lambda x: torch.cat((x, x[:1]))}},
        ValueError,
        r"transformations\['t'\] must map a tensor of 32 images to a tensor of 32 images",
    ),
    "arrays of NumPy": (
        {"transformations": {"t": lambda x: x.numpy()}},
        ValueError,
        r"transformations\['t'\] must map a tensor .* to a tensor of 32 images, got numpy.ndarray",
    ),
    "a transform that converts": (
        {"transformations": {"t": lambda x: x.float()}},
        ValueError,
        r"transformations\['t'\] must keep the dtype of the images, torch.float64, got",
    ),
    "sizes that differ from draw to draw": (
        {"transformations": {"t": lambda x: x[:, : int(torch.randint(1, 5, ()))]}},
        ValueError,
        r"transformations\['t'\] must map a tensor of images .* with one size",
    ),
    "a transform of single images": (
        {"transformations": {"t": lambda x: x.convert("L")}},
        ValueError,
        r"transformations\['t'\] must map a tensor of images .* got AttributeError",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_with_its_transformation(case):
    options, kind, message = BAD[case]
    arguments = {"encoder": nn.Identity(), "images": IMAGES, "transformations": {"turn": turn}}
    with pytest.raises(kind, match=message):
        quiet(**(arguments | options))


def test_four_images_are_enough_for_a_report():
    assert "too few images" in str(quiet(nn.Identity(), points(4, 4), {"turn": turn}, samples=4))


def test_a_loader_of_something_else_and_a_missing_row():
    loader = DataLoader([{"image": image} for image in IMAGES], batch_size=4)
    with pytest.raises(TypeError, match="a batch must be a tensor of images"):
        quiet(nn.Identity(), loader, {"turn": turn})
    report = quiet(nn.Identity(), IMAGES, {"turn": turn}, samples=4)
    with pytest.raises(KeyError, match=r"the report has .*turn"):
        report.row("hue")


def test_a_row_that_is_not_there_is_asked_for_by_its_name():
    report = quiet(lambda x: x, points(40, 4), {"turn": turn}, samples=4)
    with pytest.raises(KeyError, match=r"got \('tur', None, 'clean'\): the report has"):
        report.row("tur")
