"""Mistakes that new users make, and what they see: each a sentence that names the cure.

What no code can see without waiting for a device is on the page docs/mistakes.md, with the advice
that prevents it.
"""

import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from test_errors import assert_refused

from care_loss import RECIPES, CAREloss, EquivarianceLoss, InfoNCELoss
from care_loss.functional import (
    alignment_loss,
    equivariance_loss,
    info_nce_loss,
    uniformity_loss,
)
from care_loss.rotation import fit_rotation, nearest_orthogonal
from care_loss.sphere import normalize, slerp
from care_loss.views import SharedAugmentCollate, assert_shared, shared_views

Z = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
FOUR = Z, -Z, Z.flip(-1), Z.roll(1, 0)


def photo(width, height, seed=0):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image.fromarray(pixels)


ImageOps = pytest.importorskip("PIL.ImageOps")
# Sizes that photographs of ImageNet have.
SIZES = [(500, 375), (375, 500), (500, 333), (640, 480), (500, 375), (250, 187), (768, 1024)]
PHOTOS = [photo(*size, seed=k) for k, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def augment(torchvision):
    t = torchvision.transforms
    return t.Compose(
        [
            t.RandomResizedCrop(32, scale=(0.08, 1.0)),
            t.RandomHorizontalFlip(),
            t.ColorJitter(0.4, 0.4, 0.4, 0.1),
            t.ToTensor(),
        ]
    )


# Views


def test_images_of_different_sizes_before_a_random_crop(augment):
    batch = [(image, 0) for image in PHOTOS] * 8
    collate = SharedAugmentCollate(augment, chunks=4)
    sentence = "`transform` must draw the same random numbers for all images of a chunk, got"
    # The rejection loop differs in some draws only.
    assert_refused(lambda: [collate(batch) for _ in range(20)], sentence)
    assert_refused(lambda: [collate(batch) for _ in range(20)], "of size (500, 375) RGB and (")
    assert_refused(lambda: assert_shared(augment, PHOTOS, batched=False), "Bring the images to one")


def test_images_of_one_size_share_everything(augment, torchvision):
    t = torchvision.transforms
    same = t.Compose([t.Resize(64), t.CenterCrop(64)])
    batch = [(same(image), k) for k, image in enumerate(PHOTOS)]
    for _ in range(20):
        (_, _, chunks), _ = SharedAugmentCollate(augment, chunks=2)(batch)
    assert chunks == 2
    assert_shared(augment, batch[0][0], batched=False)
    assert_shared(augment, [image for image, _ in batch], batched=False)
    # Without a crop that is drawn anew for other shapes, the sizes do not matter.
    jitter = t.Compose([t.Resize((32, 32)), t.ColorJitter(0.4, 0.4, 0.4, 0.1), t.ToTensor()])
    SharedAugmentCollate(jitter, chunks=2)([(image, 0) for image in PHOTOS])


def test_transforms_of_tensors(torchvision):
    t = torchvision.transforms.v2
    augment = t.Compose([t.RandomResizedCrop(16), t.RandomHorizontalFlip(), t.ColorJitter(0.4)])
    images = torch.rand(8, 3, 24, 24)
    assert_shared(augment, images[0])
    view1, view2, chunks = shared_views(images, augment, chunks=2)
    assert view1.shape == view2.shape == (8, 3, 16, 16)
    assert chunks == 2


def test_assert_shared_with_a_photograph_and_without_batched_false(augment):
    sentence = (
        "`image` must be a torch.Tensor, got PIL.Image.Image: convert it to a tensor, or pass"
    )
    assert_refused(lambda: assert_shared(augment, PHOTOS[0]), sentence)
    assert_refused(lambda: assert_shared(augment, PHOTOS[0]), "batched=False")


def test_a_transform_of_single_images_given_to_shared_views(augment):
    with pytest.raises((TypeError, ValueError)):  # torchvision's own, before ours can speak
        shared_views(torch.rand(4, 3, 32, 32), augment, chunks=2)


def test_a_transform_that_returns_nan():
    def nan(image):
        return image * torch.rand(()) + math.nan

    sentence = "`transform` must return finite values, got NaN or infinity in 64 of 64 views"
    assert_refused(lambda: assert_shared(nan, torch.rand(3, 8, 8)), sentence)


def test_a_transform_whose_outputs_change_their_size():
    def crop(images):
        return images[..., : 4 + int(torch.randint(4, ()))]

    sentence = "`transform` must return views of one size, got sizes (3, 8, 4) and (3, 8, "
    images = torch.rand(32, 3, 8, 8)
    batch = [(image, 0) for image in images]
    assert_refused(lambda: assert_shared(crop, images[0]), sentence)
    assert_refused(lambda: assert_shared(crop, images[0], batched=False), sentence)
    assert_refused(lambda: shared_views(images, crop, chunks=16), sentence)
    assert_refused(lambda: SharedAugmentCollate(crop, chunks=16)(batch), sentence)
    ordinary = SharedAugmentCollate(lambda x: x, chunks=16, ordinary=crop)
    assert_refused(lambda: ordinary(batch), sentence)


def test_a_transform_that_returns_one_tensor_again_and_again():
    memory = torch.empty(4, 3)

    def stacked(images):
        return memory.copy_(images * torch.rand(()))

    def single(image):
        return memory[0].copy_(image * torch.rand(()))

    sentence = "`transform` must return a new tensor at every call, got one that it returned before"
    assert_refused(lambda: shared_views(torch.ones(8, 3), stacked, chunks=2), sentence)
    batch = [(torch.ones(3), 0)] * 4
    assert_refused(lambda: SharedAugmentCollate(single, chunks=2)(batch), sentence)
    # Images may be returned as they are.
    same = torch.ones(3)
    SharedAugmentCollate(lambda x: x, chunks=2, ordinary=lambda x: x)([(same, 0)] * 4)
    shared_views(torch.ones(8, 3), lambda x: x, chunks=2)


def test_transforms_that_are_none_of_that_kind():
    for transform in ("flip", [1, 2], (abs, abs, abs), ()):
        sentence = "must be a callable that maps one image to a tensor, or a pair of such, got "
        assert_refused(lambda t=transform: SharedAugmentCollate(t, chunks=2), sentence)
        call = lambda t=transform: SharedAugmentCollate(abs, chunks=2, ordinary=t)  # noqa: E731
        assert_refused(call, sentence)


def test_forwards_that_contradict_the_transforms():
    def collate(transform=abs, **settings):
        return lambda: SharedAugmentCollate(transform, chunks=2, **settings)

    for forwards in (1, 5, 0, "3", 3.0, True, [3], torch.tensor(3)):
        for ordinary in (None, abs):
            sentence = "`forwards` must be 2, 3 or 4, got "
            assert_refused(collate(ordinary=ordinary, forwards=forwards), sentence)
    for forwards in (3, 4):
        sentence = f"`ordinary` must be given when forwards={forwards}, got None: pass the"
        assert_refused(collate(forwards=forwards), sentence)
    sentence = "`ordinary` must be left out when forwards=2, got builtin_function_or_method: both"
    assert_refused(collate(ordinary=abs, forwards=2), sentence)
    for pair in ((abs, abs), [abs, abs]):
        sentence = (
            f"`transform` must be a single callable when forwards=3, got {type(pair).__name__} of "
            "length 2: only one view is shared"
        )
        assert_refused(collate(pair, ordinary=abs, forwards=3), sentence)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    ("transform", "error"),
    [
        (lambda picture: to_tensor(picture.convert("L").convert("RGB")), "AttributeError"),
        (lambda picture: to_tensor(ImageOps.invert(picture)), "OSError"),
        (lambda array: torch.from_numpy(array) * 2, "TypeError"),
    ],
    ids=["a method of PIL images", "a function of PIL images", "a function of NumPy arrays"],
)
def test_a_transform_of_images_given_an_ordinary_view(transform, error):
    batch = [(photo(8, 8), k) for k in range(4)]
    collate = SharedAugmentCollate(transform, chunks=2, ordinary=to_tensor, forwards=3)
    sentence = (
        "`transform` must take the tensor that `ordinary` returned when forwards=3, got "
        f"{error} from a call with torch.float32 of shape (3, 8, 8) on cpu: leave out its ToTensor"
    )
    assert_refused(lambda: collate(batch), sentence)
    with pytest.raises(TypeError) as raised:
        collate(batch)
    assert type(raised.value.__cause__).__name__ == error  # nothing is hidden
    # If the dataset yields tensors, the error is that of the transform itself.
    with pytest.raises((AttributeError, OSError, TypeError)) as raised:
        SharedAugmentCollate(transform, chunks=2, ordinary=torch.clone, forwards=3)(
            [(to_tensor(image), k) for image, k in batch]
        )
    assert "forwards" not in str(raised.value)


def test_torchvisions_transforms_of_pil_images_in_three_forwards(torchvision):
    t = torchvision.transforms
    batch = [(image, k) for k, image in enumerate(PHOTOS)]  # of different sizes
    ordinary = t.Compose([t.RandomResizedCrop(16), t.RandomHorizontalFlip(), t.ToTensor()])
    jitter = t.ColorJitter(0.4, 0.4, 0.4, 0.5)
    through_pil = t.Compose([t.ToPILImage(), jitter, t.ToTensor()])
    for transform in (jitter, through_pil):
        collate = SharedAugmentCollate(transform, chunks=2, ordinary=ordinary, forwards=3)
        (x1, x2, turned, chunks), _ = collate(batch)
        assert x1.shape == x2.shape == turned.shape == (7, 3, 16, 16)
        assert chunks == 2
    with_to_tensor = t.Compose([jitter, t.ToTensor()])
    collate = SharedAugmentCollate(with_to_tensor, chunks=2, ordinary=ordinary, forwards=3)
    sentence = (
        "`transform` must take the tensor that `ordinary` returned when forwards=3, got TypeE"
    )
    assert_refused(lambda: collate(batch), sentence)
    same = t.Compose([t.ToPILImage(), t.ToTensor()])  # loses nothing of 8 bits
    collate = SharedAugmentCollate(same, chunks=2, ordinary=ordinary, forwards=3)
    (x1, _, turned, _), _ = collate(batch)
    assert torch.equal(turned, x1)


def test_ordinary_views_that_are_no_tensors():
    def rotate(picture):
        return picture.rotate(90)

    batch = [(photo(8, 8), k) for k in range(4)]
    for forwards in (3, 4):
        collate = SharedAugmentCollate(to_tensor, chunks=2, ordinary=rotate, forwards=forwards)
        sentence = "`ordinary` must map an image to a tensor, got PIL.Image.Image: end it with a"
        assert_refused(lambda c=collate: c(batch), sentence)


def test_draws_of_a_shared_view_that_depend_on_the_image():
    def transform(view):  # draws more often for some views
        return view * (0.5 + torch.rand(2 if view.mean() > 0.5 else 1)[-1])

    batch = [(torch.full((3, 4, 4), k / 3), k) for k in range(4)]
    collate = SharedAugmentCollate(transform, chunks=1, ordinary=torch.clone, forwards=3)
    sentence = "`transform` must draw the same random numbers for all images of a chunk, got"
    assert_refused(lambda: collate(batch), sentence)


def test_a_transform_that_rarely_does_anything():
    def rarely(image):
        return image.flip(-1) if torch.rand(()) < 0.1 else image

    for _ in range(10):
        assert_shared(rarely, torch.rand(3, 8, 8), batched=False)
    assert_refused(lambda: assert_shared(rarely, [], batched=False), "pass at least one.")


def test_another_default_device():
    with torch.device("meta"):
        collate = SharedAugmentCollate(lambda x: x * 2, chunks=2)
        (view1, _, chunks), _ = collate([(Z[k], "label") for k in range(4)])
    assert view1.shape == (4, 4)
    assert chunks == 2


def test_a_transform_for_each_view():
    def scale(low):
        return lambda image: image * (low + torch.rand(()))

    pair = scale(10), scale(20)
    collate = SharedAugmentCollate(pair, chunks=2, ordinary=pair)
    (x1, x2, a1, a2, _), _ = collate([(torch.ones(3), 0)] * 4)
    for first, second in ((x1, x2), (a1, a2)):
        assert ((first >= 10) & (first <= 11)).all()
        assert ((second >= 20) & (second <= 21)).all()


def test_lightlys_transforms_as_the_readme_says(torchvision):
    lightly = pytest.importorskip("lightly.transforms")
    transform = lightly.SimCLRTransform(input_size=32).transforms
    same = torchvision.transforms.Resize((40, 40))
    batch = [(same(image), k) for k, image in enumerate(PHOTOS)]
    collate = SharedAugmentCollate(transform, chunks=2, ordinary=transform)
    pickle.dumps(collate)  # as spawned workers need it
    (_, _, a1, _, chunks), _ = collate(batch)
    assert a1.shape == (7, 3, 32, 32)
    assert chunks == 2


# Chunks


def test_chunks_forgotten_everywhere():
    sentence = "`chunks` must be given in the call or in the constructor, got neither: pass the"
    assert_refused(lambda: CAREloss()(*FOUR), sentence)
    assert_refused(lambda: EquivarianceLoss()(Z, -Z), sentence)


def test_views_of_8_chunks_beside_a_loss_of_4():
    view1, view2, chunks = shared_views(Z, lambda x: x * torch.rand(4), chunks=8)
    loss = CAREloss(chunks=4, shared_views=True)
    parts = loss.forward_components(view1, view2, chunks=chunks)  # the views win
    torch.testing.assert_close(parts.equivariance, equivariance_loss(view1, view2, chunks=8))


def test_ids_as_a_list_an_array_or_the_third_positional_argument():
    ids = torch.arange(16) // 4
    for given in (ids.tolist(), ids.numpy(), tuple(ids.tolist())):
        sentence = "convert the ids with torch.as_tensor(), and pass them in the call"
        assert_refused(lambda c=given: CAREloss()(*FOUR, chunks=c), sentence)
    loss = CAREloss(shared_views=True)
    for given in (ids, 4, ids.tolist(), ids.numpy()):
        assert_refused(lambda c=given: loss(Z, -Z, c), "loss(z1, z2, chunks=chunks).")


def test_sample_indices_as_ids():
    sentence = "pass the id of the chunk of each row, not the index of the sample."
    assert_refused(lambda: CAREloss()(*FOUR, chunks=torch.arange(16)), sentence)
    transform = lambda x: x * torch.rand(())  # noqa: E731
    assert_refused(lambda: shared_views(Z, transform, chunks=torch.arange(16)), sentence)
    compiled = torch.compile(equivariance_loss, fullgraph=True, backend="eager")
    assert_refused(lambda: compiled(Z, -Z, chunks=torch.arange(16)), sentence)
    traced_ids = traced(lambda *x: equivariance_loss(*x[:2], chunks=x[2]), Z, -Z, Z[:, 0].long())
    assert traced_ids(Z, -Z, torch.arange(16)).isnan()  # where ids are not read


def test_ids_in_the_constructor():
    sentence = "Ids of rows are a tensor, and belong in the call, with their batch."
    for module in (CAREloss, EquivarianceLoss):
        assert_refused(lambda m=module: m(chunks=torch.arange(16) // 4), sentence)


def traced(loss, *inputs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and warns of shapes
        return torch.jit.trace(loss, inputs)


def test_ids_in_a_traced_function():
    def loss(z1, z2, ids):
        gap = equivariance_loss(z1, z2, chunks=ids)
        return gap + info_nce_loss(z1, z2) + uniformity_loss(z1) + alignment_loss(z1, z2)

    found = traced(loss, Z, -Z, torch.arange(16) // 4)
    for n in (16, 10):
        ids, z = torch.arange(n) // 5, Z[:n]
        torch.testing.assert_close(found(z, z.square(), ids), loss(z, z.square(), ids))


def test_a_traced_function_that_would_keep_sizes_or_values():
    sentence = "must not be recorded by torch.jit.trace, got a trace, which would return wrong"
    for loss in (
        lambda x, y: equivariance_loss(x, y, chunks=2),
        CAREloss(chunks=2, shared_views=True),
        lambda x, y: fit_rotation(x, y).rotation,
        lambda x, y: nearest_orthogonal(x.mT @ y),
    ):
        assert_refused(lambda f=loss: traced(f, Z, -Z), sentence)


# Losses


def test_four_views_with_shared_views():
    sentence = "`equivariant1` and `equivariant2` must be left out when shared_views=True"
    assert_refused(lambda: CAREloss(chunks=4, shared_views=True)(*FOUR), sentence)


def test_two_views_without_shared_views():
    sentence = "must be given unless shared_views=True"
    assert_refused(lambda: CAREloss(chunks=4)(Z, -Z), sentence)


def test_a_base_loss_given_as_a_class():
    sentence = "create the module first, as in base_loss=Loss()."
    assert_refused(lambda: CAREloss(chunks=4, base_loss=InfoNCELoss), sentence)
    assert_refused(lambda: CAREloss(chunks=4, base_loss=InfoNCELoss), "the class InfoNCELoss")


def test_a_temperature_that_a_base_loss_would_not_use():
    sentence = "`temperature` must be left out when `base_loss` is given, got one"
    assert_refused(lambda: CAREloss(temperature=0.1, chunks=4, base_loss=alignment_loss), sentence)
    moco = RECIPES["imagenet100-moco"]
    assert_refused(lambda: CAREloss(**moco, base_loss=alignment_loss), sentence)
    assert "temperature" not in repr(CAREloss(chunks=4, base_loss=alignment_loss))


@pytest.mark.parametrize("value", ["false", "true", 0, 1, None])
def test_words_and_numbers_for_true_and_false(value):
    sentence = f"must be True or False, got {type(value).__name__}"
    assert_refused(lambda: CAREloss(chunks=4, shared_views=value), f"`shared_views` {sentence}")
    for module in (InfoNCELoss, CAREloss):
        call = lambda m=module: m(gather_distributed=value)  # noqa: E731
        assert_refused(call, f"`gather_distributed` {sentence}")


def test_numpy_numbers_are_numbers():
    loss = CAREloss(
        temperature=np.float32(0.25), equivariance_weight=np.float64(0.5), chunks=np.int64(4)
    )
    assert (loss.temperature, loss.equivariance_weight, loss.chunks) == (0.25, 0.5, 4)
    assert type(loss.chunks) is int
    assert CAREloss(shared_views=np.bool_(True)).shared_views is True
    assert repr(loss) == repr(CAREloss(temperature=0.25, equivariance_weight=0.5, chunks=4))
    assert torch.equal(
        loss(*FOUR), CAREloss(temperature=0.25, equivariance_weight=0.5, chunks=4)(*FOUR)
    )
    assert torch.equal(loss(*FOUR, chunks=np.int32(2)), loss(*FOUR, chunks=2))


def test_numpy_numbers_are_positions_on_a_path():
    x, y = normalize(Z), normalize(-Z.flip(-1)).requires_grad_()
    for t in (np.float32(0.25), np.float64(0.25)):
        assert torch.equal(slerp(x, y, t), slerp(x, y, 0.25))


def test_the_output_of_a_model_that_returns_several():
    for output in ((Z, Z), {"projection": Z}):
        sentence = "pick one output of the model."
        assert_refused(lambda z=output: CAREloss(chunks=4)(z, Z, Z, Z), sentence)
        assert_refused(lambda z=output: InfoNCELoss()(Z, z), sentence)


def test_a_base_loss_from_a_configuration_file():
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(torch.nn.Module, "loss")
    config = {
        "class_path": "care_loss.CAREloss",
        "init_args": {
            "chunks": 4,
            "base_loss": {"class_path": "care_loss.InfoNCELoss", "init_args": {"temperature": 0.1}},
        },
    }
    built = parser.instantiate(parser.parse_object({"loss": config})).loss
    assert isinstance(built, CAREloss)
    assert isinstance(built.base_loss, InfoNCELoss)
    torch.testing.assert_close(built(*FOUR), CAREloss(temperature=0.1, chunks=4)(*FOUR))


def test_a_weight_that_follows_a_schedule():
    loss = CAREloss(chunks=4)
    for step in range(3):
        loss.equivariance_weight = 0.3 * step / 2
        parts = loss.forward_components(*FOUR)
        torch.testing.assert_close(parts.loss, parts.base + 0.3 * step / 2 * parts.equivariance)
    loss.equivariance_weight = -1
    assert_refused(lambda: loss(*FOUR), "`equivariance_weight` must be a finite number >= 0")


def test_a_schedule_does_not_recompile_at_every_step():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    loss = CAREloss(chunks=4)
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for step in range(10):
        loss.equivariance_weight = 0.1 * step
        torch.testing.assert_close(compiled(*FOUR), loss(*FOUR))
    assert len(graphs) <= 3  # a constant, a number that may change, and perhaps 0


@pytest.mark.parametrize("loss", [CAREloss(), EquivarianceLoss(chunks=2), InfoNCELoss()])
def test_embeddings_changed_in_place_before_backward_are_an_error(loss):
    views = [z.clone().requires_grad_() for z in FOUR[: 4 if isinstance(loss, CAREloss) else 2]]
    embeddings = [2 * z for z in views]
    options = {"chunks": 2} if isinstance(loss, CAREloss) else {}
    value = loss(*embeddings, **options)
    with torch.no_grad():
        embeddings[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_the_default_weight_is_for_one_scale_and_no_setting_is_positional():
    sentence = "`equivariance_weight` must be given with scale='authors', got none"
    assert_refused(lambda: CAREloss(chunks=4, scale="authors"), sentence)
    given = CAREloss(chunks=4, scale="authors", equivariance_weight=float("10"))
    assert given.equivariance_weight == CAREloss(chunks=4).equivariance_weight == 10
    with pytest.raises(TypeError, match="positional"):
        CAREloss(10)  # which was the temperature
