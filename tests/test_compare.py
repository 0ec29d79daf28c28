"""Comparing encoders: the same draws for all, differences with their errors, one conclusion."""

import inspect
import math

import pytest
import torch
from reports import Noisy, points, turn
from torch import nn

from care_loss.metrics import _compare, compare, equivariance_report
from care_loss.metrics._tables import Estimate

ENCODERS = {"ours": Noisy(0.1), "placebo": Noisy(0.3), "control": Noisy(0.5)}


def compared(encoders=None, baseline="control", n=60, samples=6, **options):
    return compare(
        encoders or ENCODERS,
        points(n, 4),
        {"turn": turn},
        baseline=baseline,
        samples=samples,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def comparison():
    return compared()


def conclusion(comparison):
    text = str(comparison)
    return " ".join(text[text.index("turn: ") :].split())


def test_each_report_is_that_of_its_encoder_alone(comparison):
    for name, encoder in ENCODERS.items():
        alone = equivariance_report(
            encoder, points(60, 4), {"turn": turn}, samples=6, progress=False
        )
        assert str(comparison.reports[name]) == str(alone)
    assert comparison.to_dict()["baseline"] == "control"
    assert comparison.to_dict()["reports"]["ours"] == comparison.reports["ours"].to_dict()


@pytest.mark.parametrize("figure", ["gap_ratio", "share_above_chance", "displacement"])
def test_errors_of_one_figure_follow_from_its_draws(comparison, figure):
    row = comparison.reports["ours"].row("turn")
    squares = [x.var() / len(x) for x in row.by_draw[figure]]
    assert row.figures[figure].error == pytest.approx(sum(squares).sqrt().item(), rel=1e-9)


def test_a_difference_has_the_error_that_repeated_measurements_have():
    # Both encoders see the same draws, and react alike: their figures vary together.
    encoders = {"ours": Noisy(0.3), "control": Noisy(0.32)}
    repeated = [compared(encoders, seed=seed, samples=16, n=40) for seed in range(12)]
    for figure in ("gap_ratio", "share_above_chance"):
        found = [comparison.difference("ours", "turn", figure) for comparison in repeated]
        spread = torch.tensor([x.mean for x in found]).std().item()
        error = sum(x.error for x in found) / len(found)
        assert 0.5 * spread < error < 2 * spread
        alone = repeated[0].reports["ours"].row("turn").figures[figure].error
        assert error < 0.5 * math.sqrt(2) * alone  # that of independent draws


def test_the_difference_to_itself_is_exactly_zero(comparison):
    difference = comparison.difference("control", "turn", "gap_ratio")
    assert difference[:2] == (0, 0)


def test_the_table_has_a_line_for_each_encoder_and_fits():
    text = str(compared(ENCODERS | {"a name that is far too long for its column": Noisy(0.9)}))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 88
    assert [line.split()[0] for line in lines if line.startswith(tuple(ENCODERS))] == [*ENCODERS]
    assert "over draws, not over trainings" in text
    rows = [line.split() for line in lines if line.startswith(tuple(ENCODERS))]
    assert {row[0]: row[2][:2] for row in rows} == {"ours": "-0", "placebo": "-0", "control": "ba"}


def test_the_conclusion_names_order_and_figures(comparison):
    sentence = conclusion(comparison)
    ours = comparison.reports["ours"].row("turn").figures["gap_ratio"].mean
    assert "'ours' (equivariant) is more equivariant than the baseline 'control'" in sentence
    assert f"gap ratio {ours:.3f} against " in sentence
    # The placebo is the stronger control here, though it is not the one that was named.
    assert "'placebo' is nearer to 'ours' than the baseline" in sentence
    assert "nearer" not in conclusion(compared(baseline="placebo"))


@pytest.mark.parametrize("names", ["abc", "cba", "bac", "bca"])
def test_the_stronger_control_is_named_whatever_the_names_are(names):
    ours, placebo, control = names
    encoders = {control: Noisy(0.5), ours: Noisy(0.1), placebo: Noisy(0.3)}
    comparison = compared(encoders, baseline=control)
    gap = comparison.reports[placebo].row("turn").figures["gap_ratio"].mean
    told = f"'{placebo}' is nearer to '{ours}' than the baseline, with a gap ratio of {gap:.3f}"
    assert told in conclusion(comparison)


def test_an_encoder_that_is_no_evidence_does_not_silence_the_next():
    encoders = {"first": length, "second": Noisy(0.1), "control": Noisy(0.5)}
    sentence = conclusion(compared(encoders))
    assert "'first' is no evidence" in sentence
    assert "'second' (equivariant) is more equivariant than the baseline" in sentence


def test_a_worse_encoder_and_an_equal_one_are_called_so():
    sentence = conclusion(compared({"worse": Noisy(0.6), "control": Noisy(0.3)}))
    assert "is less equivariant than the baseline" in sentence
    sentence = conclusion(compared({"same": Noisy(0.3), "control": Noisy(0.3)}))
    assert "'same' (partly equivariant) is not clearly different from the baseline" in sentence


def test_figures_that_contradict_each_other_are_no_gain(comparison, monkeypatch):
    differences = {"gap_ratio": Estimate(-0.1, 0.01), "share_above_chance": Estimate(-0.1, 0.01)}
    monkeypatch.setattr(
        _compare.Comparison, "difference", lambda self, n, t, figure: differences[figure]
    )
    assert "is neither more nor less equivariant than the baseline" in conclusion(comparison)


def length(x):  # which no turn changes
    return torch.cat([x.norm(dim=1, keepdim=True), torch.ones_like(x[:, :1])], 1)


def near_one_point(x):  # but for a twentieth, which turns
    return torch.cat([torch.full_like(x[:, :1], 20), x], 1)


@pytest.mark.parametrize(
    ("encoder", "verdict"),
    [
        (length, "invariant ("),
        (lambda x: torch.ones_like(x), "collapsed ("),
        (near_one_point, "collapsed ("),
        (lambda x: near_one_point(5 * x), "near collapse (mean norm 0.9"),
    ],
)
def test_an_encoder_that_ignores_or_collapses_is_never_a_gain(encoder, verdict):
    sentence = conclusion(compared({"ours": encoder, "control": Noisy(0.5)}))
    assert f"'ours' is no evidence: it is {verdict}" in sentence
    assert "more equivariant" not in sentence


def test_a_baseline_that_ignores_the_transformation_asks_for_another():
    sentence = conclusion(compared({"ours": Noisy(0.1), "control": length}))
    assert "The baseline is invariant: do its views contain 'turn'?" in sentence
    sentence = conclusion(compared({"ours": Noisy(0.1), "control": lambda x: torch.ones_like(x)}))
    assert "nothing can be concluded, as 'control' is collapsed (" in sentence


def test_a_fixed_transformation_is_compared_by_its_share():
    encoders = {"ours": nn.Identity(), "control": Noisy(0.5)}
    comparison = compare(
        encoders, points(100, 4), {"flip": torch.neg}, baseline="control", progress=False
    )
    assert "'ours' (equivariant) is more equivariant than" in str(comparison)
    assert math.isnan(comparison.difference("ours", "flip", "gap_ratio").mean)


def test_the_html_is_escaped():
    page = compared({"a < b": Noisy(0.1), "control": Noisy(0.5)})._repr_html_()
    assert "a &lt; b" in page
    assert page.count("<table>") == page.count("</table>") == 1


@pytest.mark.parametrize(
    ("encoders", "baseline", "error", "sentence"),
    [
        (
            {"ours": Noisy(0.1)},
            "ours",
            TypeError,
            "at least two names to encoders, got \\['ours'\\]",
        ),
        ([Noisy(0.1), Noisy(0.2)], "ours", TypeError, "at least two names to encoders, got list"),
        ({"a": Noisy(0.1), "b": 3}, "a", TypeError, "`encoder` must be a callable"),
        (ENCODERS, "other", ValueError, "must be one of the names .*'control'.*, got 'other'"),
        (ENCODERS, None, ValueError, "must be one of the names .*, got None"),
    ],
)
def test_without_a_control_there_is_no_comparison(encoders, baseline, error, sentence):
    with pytest.raises(error, match=sentence):
        compared(encoders, baseline)
    with pytest.raises(TypeError, match="baseline"):
        compare(ENCODERS, points(10, 4), {"turn": turn})


def test_a_comparison_has_the_defaults_of_a_report():
    ours, of_reports = (inspect.signature(f).parameters for f in (compare, equivariance_report))
    for name in ("samples", "batch_size", "seed"):
        assert ours[name].default == of_reports[name].default
    assert (ours["samples"].default, ours["seed"].default) == (16, 0)
