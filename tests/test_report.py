"""The report: verdicts, controls and figures."""

import json
import math

import numpy as np
import pytest
import torch
from reports import FLOAT64, Noisy, flip, plane_turn, points, quiet, turn
from torch import nn

from care_loss import _rng, metrics
from care_loss.metrics import _report, _tables
from care_loss.metrics._sampling import UNSHARED_DRAWS
from care_loss.metrics._tables import Estimate
from care_loss.sphere import normalize

# Verdicts


@pytest.mark.parametrize("d", [2, 8])
def test_an_equivariant_encoder_has_no_error_and_says_so(d):
    report = quiet(nn.Identity(), points(64, d), {"turn": turn}, samples=6)
    assert [row.against for row in report.rows] == ["clean", "another draw"]
    for row in report.rows:
        assert row.verdict == "equivariant"
        figures = row.figures
        for error in ("gap_ratio", "wahba_error", "relative_equivariance", "mean_of_ratios"):
            assert abs(figures[error].mean) <= 1e-10, error
        assert figures["rotation_share"].mean >= 1 - 1e-10
        assert figures["mrr"].mean == 1
        assert figures["unshared_gap"].mean > 0.1
        assert figures["rotation_share"].shuffled < 0.3
        assert figures["shared_gap"].shuffled > 0.1
    clean = report.row("turn").figures
    assert clean["composition_error"].mean <= 1e-10
    assert clean["composition_from_direct"].mean <= 1e-10
    assert clean["composition_share"].mean >= 1 - 1e-10
    assert math.isnan(clean["cosine_spread"].mean) == (d != 2)


def test_a_low_share_of_few_images_is_no_verdict():
    figures = figures_with(gap_ratio=0.3, share_above_chance=0.2)
    for n, word in ((15, "too few"), (16, "too few"), (31, "too few"), (32, "not equivariant")):
        assert _report.verdict(figures, n, 8)[0].startswith(word)


def test_angles_need_twice_as_many_images_as_dimensions():
    for n, known in ((7, False), (8, True), (11, True)):
        row = quiet(nn.Identity(), points(n, 4), {"turn": turn}, samples=4).row("turn")
        assert row.angles.isnan().all() != known
        told = f"{n} images are fewer than 4 D = 16: the rotation share is too low"
        assert any(text.startswith(told) for text in row.warnings) == known


def test_the_share_above_chance_is_a_share_of_what_chance_leaves():
    for encoder in (Noisy(0.3), Noisy(0.6)):
        figures = quiet(encoder, points(60, 4), {"turn": turn}, samples=6).row("turn").figures
        share, above = figures["rotation_share"], figures["share_above_chance"]
        left = 1 - share.shuffled
        assert above.mean == pytest.approx((share.mean - share.shuffled) / left)
        assert above.error == pytest.approx(share.error / left)


def test_embeddings_without_a_direction_are_counted():
    images = points(40, 4)

    def encoder(x):
        return x * (x[:, :1] > images[:3, 0].max() - 1e-9)

    zeros = int((encoder(images) == 0).all(1).sum())
    assert 0 < zeros < 40
    row = quiet(encoder, images, {"turn": turn}, samples=4).row("turn")
    assert f"{zeros} embeddings are 0, and have no direction." in row.warnings


@pytest.mark.parametrize("n", [3, 4, 5, 8, 9, 30, 31])
def test_spaced_rows_come_from_both_halves(n):
    rows = _report._spaced(torch.arange(n).unsqueeze(-1), 4).flatten()
    steps = set(rows.diff().tolist())
    assert len(rows) <= 4
    assert rows[0] == 0
    assert len(steps) == 1
    assert steps.pop() % 2 == 1  # so even and odd rows alternate


def test_too_few_images_are_never_called_not_equivariant():
    for n, verdict in ((15, "too few images"), (16, "equivariant")):  # D = 8
        report = quiet(nn.Identity(), points(n, 8), {"turn": turn}, samples=4)
        assert {row.verdict for row in report.rows} == {verdict}
    text = str(quiet(nn.Identity(), points(15, 8), {"turn": turn}, samples=4))
    assert "15 images are too few for D = 8: measure at least 4 D = 32." in text
    assert "15 images" in text
    assert "not equivariant" not in text


def test_an_encoder_that_ignores_sharing_has_a_gap_ratio_of_1():
    def jitter(images):  # one displacement for all, which the encoder meets in its own way
        return images + torch.randn(images.shape[1:], dtype=images.dtype)

    report = quiet(Noisy(1.0), points(200, 4), {"jitter": jitter}, samples=8)
    row = report.row("jitter")
    assert row.figures["gap_ratio"].mean == pytest.approx(1, abs=0.2)
    assert row.verdict == "not equivariant"


def figures_with(**values):
    chosen = {
        "mean_norm": 0.1,
        "effective_rank": 5.0,
        "displacement": 1.0,
        "gap_ratio": 0.01,
        "share_above_chance": 0.99,
    } | values
    return {name: Estimate(value, 0.0, 1.0) for name, value in chosen.items()}


@pytest.mark.parametrize(
    ("name", "inside", "outside", "word", "otherwise"),
    [
        ("mean_norm", 0.991, 0.989, "collapsed", "equivariant"),
        ("displacement", 0.049, 0.051, "invariant", "nearly invariant"),
        ("displacement", 0.199, 0.201, "nearly invariant", "equivariant"),
        ("gap_ratio", 0.099, 0.101, "equivariant", "partly equivariant"),
        ("gap_ratio", 0.499, 0.501, "partly equivariant", "not equivariant"),
        ("share_above_chance", 0.901, 0.899, "equivariant", "partly equivariant"),
        ("share_above_chance", 0.501, 0.499, "partly equivariant", "not equivariant"),
    ],
)
def test_each_threshold_of_the_verdict(name, inside, outside, word, otherwise):
    for value, expected in ((inside, word), (outside, otherwise)):
        verdict, reason = _report.verdict(figures_with(**{name: value}), 100, 8)
        assert verdict == expected
        assert verdict != word or f"{value:.3f}" in reason


def verdict_of(encoder, transform=turn, n=120, d=4, **options):
    report = quiet(encoder, points(n, d), {"t": transform}, samples=6, **options)
    return report.row("t")


def crossing(make, figure, threshold, low, high, **options):
    """Verdicts on encoders whose figure is a little below and above a threshold, by bisection."""
    verdicts = {}  # of an encoder whose figure is below the threshold, and of one where it is not
    for _ in range(11):
        middle = (low + high) / 2
        row = verdict_of(make(middle), **options)
        value = figure(row.figures)
        below = value < threshold
        low, high = (middle, high) if below else (low, middle)
        if abs(value / threshold - 1) < 0.1:
            verdicts[below] = row.verdict
        if len(verdicts) == 2:
            break
    return [verdicts[True], verdicts[False]]


def test_an_encoder_just_below_and_just_above_each_threshold():
    def pulled(share):  # towards one point
        return lambda x: (1 - share) * normalize(x) + share * torch.eye(4, dtype=x.dtype)[0]

    def mean_norm(figures):
        return figures["mean_norm"].mean

    below, above = crossing(pulled, mean_norm, _report.MIN_COLLAPSED_NORM, 0.5, 0.999)
    assert above == "collapsed"
    assert below == "partly equivariant"  # what moves, though little, turns

    def small(share):  # what stays, and a share of what turns
        return lambda x: torch.cat([x[:, 4:], share * x[:, :4]], 1)

    def turn_half(x):
        return torch.cat([turn(x[:, :4]), x[:, 4:]], 1)

    def displacement(figures):
        return figures["displacement"].mean

    options = {"transform": turn_half, "d": 8}
    threshold = _report.MAX_INVARIANT_DISPLACEMENT
    found = crossing(small, displacement, threshold, 0.0, 0.5, **options)
    assert found == ["invariant", "nearly invariant"]
    threshold = _report.MAX_NEARLY_INVARIANT_DISPLACEMENT
    found = crossing(small, displacement, threshold, 0.0, 0.5, **options)
    assert found == ["nearly invariant", "equivariant"]

    def gap_ratio(figures):
        return figures["gap_ratio"].mean

    found = crossing(Noisy, gap_ratio, _report.EQUIVARIANT[0], 0.0, 1.0)
    assert found == ["equivariant", "partly equivariant"]
    found = crossing(Noisy, gap_ratio, _report.PARTLY[0], 0.0, 1.0)
    assert found == ["partly equivariant", "not equivariant"]


def test_an_encoder_just_above_and_just_below_each_share():
    class Cluttered(nn.Module):
        """Points, and beside them a share of an unrelated function of them in many dimensions."""

        def __init__(self, share):
            super().__init__()
            generator = torch.Generator().manual_seed(1)
            self.share = share
            self.first = torch.randn(4, 64, generator=generator, dtype=FLOAT64) * 3
            self.last = torch.randn(64, 60, generator=generator, dtype=FLOAT64)

        def forward(self, x):
            other = normalize(torch.sin(x @ self.first) @ self.last)
            return torch.cat([(1 - self.share) * normalize(x), self.share * other], 1)

    def above_chance(figures):
        return 1 - figures["share_above_chance"].mean  # which grows with the clutter

    found = crossing(Cluttered, above_chance, 0.1, 0.0, 0.5, n=260)
    assert found == ["equivariant", "partly equivariant"]
    found = crossing(Cluttered, above_chance, 0.5, 0.0, 0.7, n=260)
    assert found == ["partly equivariant", "not equivariant"]


# Controls and warnings


@pytest.mark.parametrize("mean", [0.75, 0.96])
def test_a_direction_that_all_embeddings_share_explains_nothing(mean):
    # All images start in one pose, which turns; what tells them apart is scrambled by each draw.
    generator = torch.Generator().manual_seed(0)
    content, pose = torch.randn(2, 4, 8, generator=generator, dtype=FLOAT64) * 9
    images = torch.cat([torch.eye(2, dtype=FLOAT64)[:1].expand(200, 2), points(200, 4)], 1)

    def turn_pose(x):
        return torch.cat([plane_turn(x[:, :2]), x[:, 2:]], 1)

    def scrambled(x):
        rest = normalize(torch.sin((x[:, 2:] @ content) * (x[:, :2] @ pose[:2])))
        return torch.cat([mean * x[:, :2], (1 - mean**2) ** 0.5 * rest], 1)

    row = quiet(scrambled, images, {"turn": turn_pose}).row("turn")
    assert row.figures["rotation_share"].mean > 0.5
    assert row.figures["share_above_chance"].mean < 0.1
    assert row.verdict == "not equivariant"


def test_few_images_do_not_make_an_encoder_look_less_equivariant():
    few = verdict_of(Wide(0.18), n=64, d=32)
    many = verdict_of(Wide(0.18), n=640, d=32)
    assert many.verdict == "equivariant"
    assert few.figures["rotation_share"].mean < 0.9
    assert few.verdict == "too few images"


class Wide(Noisy):
    def __init__(self, share):
        super().__init__(share, 32)
        self.first = self.first / 32**0.5


@pytest.mark.parametrize("output", [0.0, 1.0])
def test_dead_embeddings_are_collapsed(output):
    row = verdict_of(lambda x: torch.full((len(x), 3), output))
    assert row.verdict == "collapsed"
    assert any("embeddings are 0" in warning for warning in row.warnings) == (output == 0)


def test_draws_that_change_nothing_do_not_make_an_encoder_invariant():
    def rarely(x):
        return turn(x) if torch.rand(()) < 0.05 else x

    row = quiet(nn.Identity(), points(60, 4), {"rarely": rarely}, samples=40).row("rarely")
    assert row.verdict == "equivariant"
    assert row.figures["invariance_error"].mean > 0.5
    assert any("of 40 draws change no image" in warning for warning in row.warnings)


def test_one_draw_in_many_that_acts_is_enough_for_the_shares():
    z = points(60, 4).float()
    acted = torch.arange(40) == 3
    moved = z.expand(40, 60, 4).clone()
    moved[3] = turn(z)
    figures, _ = _report._figures(z, moved, acted, None)
    assert figures["rotation_share"].mean > 1 - 1e-6
    assert figures["invariance_error"].mean > 0.3


def test_a_mirror_is_no_rotation_and_has_no_angle():
    mirror = torch.tensor([1.0, -1.0], dtype=FLOAT64)
    row = verdict_of(nn.Identity(), lambda x: x * mirror, d=2)
    assert row.verdict == "equivariant"  # over O(D)
    assert row.angles.isnan().all()
    assert math.isnan(row.figures["angle"].mean)


def test_an_invariant_encoder_has_no_shares():
    def length(x):
        return torch.cat([x.norm(dim=1, keepdim=True) - 1.5, torch.ones_like(x[:, :1])], 1)

    row = verdict_of(length)
    assert row.verdict == "invariant"
    assert all(math.isnan(row.figures[f"{k}_share"].mean) for k in ("rotation", "linear"))
    assert any("invariant" in warning for warning in row.warnings)


def test_constant_embeddings_are_collapsed():
    row = verdict_of(lambda x: torch.ones(len(x), 3))
    assert row.verdict == "collapsed"
    assert row.figures["effective_rank"].mean == pytest.approx(1)
    assert str(quiet(lambda x: torch.ones(len(x), 3), points(20, 3), {"t": turn}))


def test_a_linear_map_is_told_apart_from_a_rotation():
    def stretch(x):  # of every direction, by its own random factor
        return x * torch.rand(x.shape[1], dtype=x.dtype).mul(3).exp()

    def encoder(x):  # almost linear in x, though it normalises
        return torch.cat([x, 100 * torch.ones_like(x[:, :1])], 1)

    row = verdict_of(encoder, stretch)
    assert row.figures["linear_share"].mean > row.figures["rotation_share"].mean + 0.2


def test_a_fixed_transformation_has_one_draw_and_no_unshared_control():
    report = quiet(nn.Identity(), points(40, 4), {"flip": flip, "turn": turn}, samples=4)
    row = report.row("flip")
    assert [r.transformation for r in report.rows] == ["flip", "turn", "turn"]
    assert row.draws == 1
    assert row.verdict == "equivariant"
    assert all(math.isnan(row.figures[name].mean) for name in ("gap_ratio", "unshared_gap"))
    assert "no unshared control" in report.full()
    assert math.isnan(row.figures["composition_share"].mean)  # two flips move nothing
    assert row.figures["composition_error"].mean < 1e-10
    assert all(
        estimate.error in (0, math.nan) or math.isnan(estimate.error)
        for estimate in row.figures.values()
    )


def test_the_identity_shows_nothing_of_the_encoder_and_the_report_says_so():
    def never(x):
        return x if torch.rand(()) < 1 else turn(x)

    report = quiet(
        nn.Identity(), points(40, 4), {"nothing": lambda x: x, "never": never}, samples=4
    )
    assert [row.verdict for row in report.rows] == ["no change", "no change"]
    assert [row.draws for row in report.rows] == [1, 1]
    assert "1 of 1 draws change no image" in str(report)
    assert math.isnan(report.row("nothing").figures["rotation_share"].mean)


def test_a_transformation_that_rarely_acts_is_measured_where_it_does():
    def rarely(x):
        return turn(x) if torch.rand(()) < 0.3 else x

    row = verdict_of(nn.Identity(), rarely)
    assert row.verdict == "equivariant"
    assert row.figures["rotation_share"].mean > 1 - 1e-10


# Figures


def test_the_angles_are_those_of_the_turns():
    angles = []

    def noted(x):
        angle = torch.rand((), dtype=FLOAT64) * 3
        angles.append(angle.item())
        c, s = angle.cos(), angle.sin()
        return x @ torch.stack([c, s, -s, c]).view(2, 2)

    row = verdict_of(nn.Identity(), noted, d=2)
    assert row.angles.shape == (6, 1)
    assert all(min(abs(a - b) for b in angles) < 1e-9 for a in row.angles[:, 0].tolist())
    assert row.figures["angle"].mean == pytest.approx(row.angles.mean().item())


def test_the_report_prints_one_short_table_with_reasons():
    names = {"turn": turn, "a name that is so long that it does not fit into its column": turn}
    report = quiet(Noisy(0.3), points(60, 4), names | {"same": lambda x: x}, samples=4)
    text = str(report)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 88
    row = report.row("turn")
    gap, share = row.figures["gap_ratio"], row.figures["share_above_chance"]
    assert f"{gap.mean:.3f} ± {gap.error:.3f}  {share.mean:.3f} ± {share.error:.3f}" in text
    assert f"  {row.verdict}: gap ratio {gap.mean:.3f} " in text
    assert "no change: no draw changed an image." in text
    assert "another draw" not in text
    heads = next(line for line in lines if "gap ratio" in line)
    (cells,) = [line for line in lines if line.startswith("turn")]
    assert cells[heads.index("gap ratio")] == "0"
    assert cells[heads.index("gap ratio") - 1] == " "


def test_two_outputs_have_a_line_each():
    report = quiet(lambda x: (x, x[:, :3]), points(60, 4), {"turn": turn}, samples=4)
    assert "turn, features" in str(report)
    assert "turn, projections" in str(report)


def test_scalars_are_flat_and_all_there():
    report = quiet(Noisy(0.3), points(60, 4), {"turn": turn, "same": lambda x: x}, samples=4)
    found = report.scalars("val/")
    names = ("gap_ratio", "share_above_chance", "displacement", "mean_norm", "effective_rank")
    assert list(found) == [f"val/{t}/{name}" for t in ("turn", "same") for name in names]
    assert all(type(value) is float for value in found.values())
    assert found["val/turn/gap_ratio"] == report.row("turn").figures["gap_ratio"].mean
    assert math.isnan(found["val/same/gap_ratio"])
    error = report.row("turn").figures["invariance_error"]
    assert found["val/turn/displacement"] == pytest.approx(error.mean / error.shuffled)


def test_the_full_report_prints_aligned_and_turns_into_numbers_and_html():
    report = quiet(Noisy(0.3), points(60, 4), {"turn": turn, "a < b": flip}, samples=4)
    lines = report.full().splitlines()
    heads = next(line for line in lines if line.startswith("transformation"))
    rows = [line for line in lines if line.startswith("turn")]
    for column in ("against", "verdict", "gap ratio", "rotation share"):
        assert heads.index(column) > 0
    assert all(row[heads.index("gap ratio") - 1] == " " for row in rows[:2])
    assert all(row[heads.index("gap ratio")] != " " for row in rows[:2])
    assert repr(report) == str(report)
    page = report._repr_html_()
    assert "a &lt; b" in page
    assert page.count("<table>") == page.count("</table>") > 1
    record = report.to_dict()
    json.dumps(record)
    row = record["rows"][0]
    assert row["gap_ratio"] == report.rows[0].figures["gap_ratio"].mean
    assert row["gap_ratio_standard_error"] > 0
    assert 0 < row["rotation_share"] < 1
    assert row["wahba_error_shuffled"] > row["wahba_error"]
    assert record["images"] == 60
    assert record["seed"] == 0
    assert record["samples"] == 4


def test_the_figures_are_the_measures_of_the_draws():
    seen = []

    def encoder(x):
        seen.append(x)
        return x

    images = points(40, 3)
    report = quiet(encoder, images, {"turn": turn}, samples=4)
    clean, *views = seen
    assert torch.equal(clean, images)
    del views[:3]  # the first batch once more, in halves, and the clean images
    assert len(views) == 4 + 2 + UNSHARED_DRAWS
    shared, twice = torch.stack([views[k] for k in (0, 2, 3, 5)]), torch.stack(views[1:5:3])
    own = torch.stack(views[6:])
    row, pair = report.rows
    for against, found in ((clean, row), (shared[::2], pair)):
        moved = shared if found is row else shared[1::2]
        values = metrics.wahba_error(against, moved)
        estimate = found.figures["wahba_error"]
        assert estimate.mean == pytest.approx(values.mean().item(), abs=1e-12)
        assert estimate.error == pytest.approx(values.std().item() / len(values) ** 0.5, abs=1e-12)
        for name in ("relative_equivariance", "invariance_error", "equivariance_error"):
            values = getattr(metrics, name)(against, moved, shuffled=True)
            key = "shared_gap" if name == "equivariance_error" else name
            if name != "relative_equivariance":  # whose mean over draws is a ratio of means
                expected = values.mean().item()
                assert found.figures[key].shuffled == pytest.approx(expected)
    gaps = metrics.equivariance_error(clean, own)
    assert row.figures["unshared_gap"].mean == pytest.approx(gaps.mean().item())
    gaps = metrics.equivariance_error(own[::2], own[1::2])
    assert pair.figures["unshared_gap"].mean == pytest.approx(gaps.mean().item())
    values = metrics.composition_error(clean, shared[::2], shared[1::2], twice)
    assert row.figures["composition_error"].mean == pytest.approx(values.mean().item(), abs=1e-12)
    # In the unshared views, every image has its own draw.
    assert metrics.wahba_error(images, own, held_out=False).min() > 0.3


def test_the_mean_of_ratios_leaves_out_pairs_near_the_identity_and_counts_them():
    z = normalize(points(40, 3))
    moved = z.clone()
    moved[20:] = normalize(z[20:] + 0.5 * points(20, 3, 1))  # half of the rows stay
    found = _report._mean_of_ratios(z, moved.unsqueeze(0))
    assert found["left out"].item() == pytest.approx(20 * 19 / (40 * 39), abs=0.01)
    assert found["ratios"].isfinite().all()


def test_the_gap_ratio_divides_means_and_its_error_has_both_parts():
    ratio = _report._quotient(Estimate(1.0, 0.1), Estimate(4.0, 0.2))
    assert ratio.mean == 0.25
    assert ratio.error == pytest.approx(0.25 * math.hypot(0.1, 0.05))
    values, wholes = points(50, 1)[:, 0] + 5, points(50, 1, 1)[:, 0] + 9
    found = _report._ratio(values, wholes)
    assert found.mean == pytest.approx((values.mean() / wholes.mean()).item())
    left_out = [
        ((values.sum() - a) / (wholes.sum() - b)).item()
        for a, b in zip(values, wholes, strict=True)
    ]
    jackknife = (49 * torch.tensor(left_out, dtype=FLOAT64).var(correction=0)).sqrt().item()
    assert found.error == pytest.approx(jackknife, rel=0.05)


@pytest.fixture(scope="module")
def sprites():
    """Images of five shapes of infinite dSprites in 36 orientations, with what they show."""
    dataset = pytest.importorskip("idsprites")
    with _rng.preserved():
        _rng.seed(0)
        shapes = dataset.InfiniteDSprites(
            img_size=32,
            shapes=5,
            color_range=["white"],
            scale_range=[1.0],
            orientation_range=np.arange(36) * np.pi / 18,
            position_x_range=[0.5],
            position_y_range=[0.5],
        )
        images, factors = zip(*shapes, strict=True)
    images = torch.as_tensor(np.stack(images))
    seen = [(f.shape_id, round(f.orientation * 18 / np.pi)) for f in factors]
    shown = {image.numpy().tobytes(): what for image, what in zip(images, seen, strict=True)}
    assert len(shown) == len(images) == 180  # no two are equal: the images tell what they show
    places = {what: place for place, what in enumerate(seen)}

    def read(batch):
        return [shown[image.numpy().tobytes()] for image in batch]

    def turned(batch):
        """All images turned by one random multiple of 10 degrees."""
        steps = int(torch.randint(1, 36, ()))
        return images[[places[shape, (k + steps) % 36] for shape, k in read(batch)]]

    return images, read, turned


# Images with known poses


def test_an_encoder_of_the_true_orientation_is_equivariant_with_the_right_angles(sprites):
    images, read, turned = sprites
    steps = []

    def noted(batch):
        view = turned(batch)
        ((_, before), *_), ((_, after), *_) = read(batch), read(view)
        steps.append((after - before) % 36)
        return view

    def orientation(batch):
        angle = torch.tensor([k for _, k in read(batch)]) * (torch.pi / 18)
        return torch.stack([angle.cos(), angle.sin()], -1)

    report = quiet(orientation, images, {"orientation": noted}, samples=8)
    row = report.row("orientation")
    assert {r.verdict for r in report.rows} == {"equivariant"}
    assert row.figures["gap_ratio"].mean < 1e-6
    assert row.figures["cosine_spread"].mean < 1e-6
    assert row.figures["composition_share"].mean > 1 - 1e-6
    expected = [min(k, 36 - k) * math.pi / 18 for k in steps]
    assert len(set(expected)) > 5
    found = row.angles[:, 0].tolist()
    assert all(min(abs(angle - other) for other in expected) < 1e-5 for angle in found)
    chords = [2 * math.sin(angle / 2) for angle in found]
    mean = row.figures["invariance_error"].mean
    assert mean == pytest.approx(sum(chords) / len(chords), abs=1e-5)


def test_an_encoder_of_the_class_alone_is_invariant(sprites):
    images, read, turned = sprites

    def shape(batch):
        return torch.eye(5)[[int(shape) for shape, _ in read(batch)]]

    row = quiet(shape, images, {"orientation": turned}, samples=8).row("orientation")
    assert row.verdict == "invariant"
    assert row.figures["invariance_error"].mean == 0
    assert math.isnan(row.figures["rotation_share"].mean)


def test_draws_that_change_nothing_do_not_contradict_the_verdict():
    def quarter_turns(x):
        return torch.rot90(x.unflatten(-1, (2, 2)), int(torch.randint(4, ())), (-2, -1)).flatten(-2)

    report = quiet(lambda x: x, points(60, 4), {"turns": quarter_turns}, samples=8)
    row = report.row("turns")
    assert row.verdict == "equivariant"
    (warning,) = row.warnings
    assert "draws change no image, and are left out of the displacement" in warning
    assert set(row.figures) == set(report.row("turns", against="another draw").figures)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"),
        (0.0049, "4.9e-03"),
        (-0.0049, "-4.9e-03"),
        (0.005, "0.005"),
        (1.5, "1.500"),
        (math.nan, ""),
    ],
)
def test_small_numbers_keep_two_digits(value, text):
    assert _tables._number(value) == text


def test_a_long_label_gets_the_room_that_the_numbers_leave():
    lines = _tables.text_table([["word " * 40, "x" * 20, "y" * 20]])
    room = _tables.WIDTH - 2 * 20 - 2 * 2
    assert all(room - len("word ") <= len(line) <= room for line in lines[:-1])
    assert len(lines[-1]) == _tables.WIDTH


def test_outputs_are_named_where_there_are_several():
    one = quiet(nn.Identity(), points(15, 4), {"turn": turn}, samples=4)
    two = quiet(lambda x: (x, x), points(15, 4), {"turn": turn}, samples=4)
    for report, several in ((one, False), (two, True)):
        assert any("output" in line for line in report.full().splitlines()) == several
        notes = [line for line in report.full().splitlines() if "15 images are fewer" in line]
        assert notes
        assert all(line.startswith("turn, clean, ") == several for line in notes if "clean" in line)
