"""Write the tables of the pages from the committed results.

    python docs/tables.py

A table follows a line `<!-- table: name -->`. A test compares the pages with what this writes.
"""

import csv
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from care_loss._autograd import paths
from care_loss._autograd.info_nce import MAX_SCORE
from care_loss.metrics import _report

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BENCHMARKS = ROOT / "benchmarks" / "results"
EXAMPLES = DOCS / "examples" / "results"
SEEDS = range(3)
WITH, WITHOUT = "SimCLR with the augmentation", "SimCLR without the augmentation"
SAME_STEPS = "SimCLR, as many steps"
THREE, FOUR, UNIFORMITY = "CARE, three forwards", "CARE, four forwards", "uniformity"
Row = dict[str, str]
Table = list[list[str]]  # the first line is the header
Cell = Callable[[Row], str]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n)(?:\n(?:\|.*\n)+)?\n?")


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def results(name: str, **wanted: str) -> list[Row]:
    """Return the rows of a benchmark, those that have what is wanted."""
    rows = read(BENCHMARKS / f"{name}.csv")
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def pivot(rows: list[Row], across: str, cell: Cell, *keys: str) -> Table:
    """Make a line of the rows that agree in the keys, with a column for each value of `across`."""
    found = dict.fromkeys(row[across] for row in rows)
    columns = sorted(found, key=lambda name: name != "care_loss")
    table = [[*keys, *columns]]
    for key in dict.fromkeys(tuple(row[k] for k in keys) for row in rows):
        cells = {row[across]: cell(row) for row in rows if tuple(row[k] for k in keys) == key}
        table.append([*key, *(cells.get(column, "") for column in columns)])
    return table


def listed(rows: list[Row], columns: dict[str, str]) -> Table:
    """Make a line of each row; the columns are given by their headers."""
    return [[*columns], *([row[name] for name in columns.values()] for row in rows)]


def same(*names: str) -> dict[str, str]:
    """Return columns whose headers are their names."""
    return {name: name for name in names}


# The rules of the code, with its constants. A line of the table ends with ";;".

VERDICTS = """
no change | no draw changed an image;;
collapsed | the mean norm is at least {collapsed} (nearly all embeddings point in one direction), or
all embeddings are 0;;
invariant | the displacement (the invariance error) is under {invariant:.0f} % of that of shuffled
rows; the shares are not given;;
nearly invariant | the displacement is under {nearly:.0f} % of that of shuffled rows: whether one
rotation explains so little says little;;
too few images | N < 2 D; or N < 4 D, and the gap ratio satisfies one of the next two conditions,
but the share does not;;
equivariant | gap ratio at most {gap}, and rotation share above chance at least {share};;
partly equivariant | gap ratio at most {partly_gap}, and rotation share above chance at least
{partly_share};;
not equivariant | otherwise"""
PATHS = """
InfoNCE | up to {few:,} rows of both views together ({many:,} on other devices than a CPU),
`reduction="mean"` | One matrix of all products is kept, and the gradient is found in the forward.;;
InfoNCE | more rows, or `reduction="none"` | Tiles on and above the diagonal, of {one} products
({several} for several threads, {device} on other devices), computed again in the backward. Memory
is proportional to N.;;
InfoNCE | a temperature below 1/{score}, or a tensor | As above, with a shift by the log-sum-exp,
which takes more time.;;
InfoNCE with a queue | always | Tiles of the queue, in one pass, which finds the gradient too. If
the queue requires a gradient: PyTorch operations with autograd.;;
equivariance | chunks of up to {longest} D rows, or float64 | Gram matrices of all chunks in one
batch, in float32; in float64 on a GPU, if PyTorch may round float32 products, and if rows
[nearly coincide](numerics.md#dtypes).;;
equivariance | longer chunks | Products of the D columns, in float64.;;
equivariance | chunks of two sizes | The same, once for each size.;;
equivariance with ids | ids on the CPU | The rows are sorted by id, then the same, once for each
size.;;
equivariance with ids | ids on a GPU | Tiles on and above the diagonal of the matrix of all pairs of
rows, in float64.;;
both | `torch.compile` | The same as above, as operators of `torch.library`.;;
both | tracing, exporting, `torch.func`, forward mode, second derivatives | The formula in PyTorch
operations, with matrices of all products. A backward with `create_graph=True` changes to it by
itself, and so does that of tiles with `is_grads_batched=True`."""


def filled(header: str, template: str, **numbers: object) -> Table:
    lines = " ".join(template.format(**numbers).split()).split(";;")
    return [line.strip().split(" | ") for line in (header, *lines)]


def mutants() -> Table:
    header = ["module", "sampled", "killed", "equivalent"]
    return [header, *([row[key] for key in header] for row in read(ROOT / "tests" / "mutants.csv"))]


def verdicts() -> Table:
    (gap, share), (partly_gap, partly_share) = _report.EQUIVARIANT, _report.PARTLY
    return filled(
        "verdict | condition",
        VERDICTS,
        collapsed=_report.MIN_COLLAPSED_NORM,
        invariant=100 * _report.MAX_INVARIANT_DISPLACEMENT,
        nearly=100 * _report.MAX_NEARLY_INVARIANT_DISPLACEMENT,
        gap=gap,
        share=share,
        partly_gap=partly_gap,
        partly_share=partly_share,
    )


def chosen_paths() -> Table:
    names = {"one": paths.TILE_ON_CPU, "several": paths.TILE_OF_THREADS, "device": paths.TILE}
    tiles = {name: " x ".join(f"{size:,}" for size in tile) for name, tile in names.items()}
    return filled(
        "loss | where | how it is computed",
        PATHS,
        few=paths.MAX_DENSE_ROWS_ON_CPU,
        many=paths.MAX_DENSE_ROWS,
        score=MAX_SCORE,
        longest=paths.MIN_ROWS_PER_DIMENSION,
        **tiles,
    )


# Speed


def duration(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.3g} ms"
    return f"{milliseconds / 1000:.1f} s"


def times(name: str, *keys: str, without: tuple[str, ...] = ()) -> Table:
    """The time of care_loss, and how many times as long the others take."""
    rows = [row for row in results(name) if row["contender"] not in without]
    ours = {
        tuple(row[k] for k in keys): float(row["ms"])
        for row in rows
        if row["contender"] == "care_loss"
    }

    def cell(row: Row) -> str:
        if row["contender"] == "care_loss":
            return duration(float(row["ms"]))
        return f"{float(row['ms']) / ours[tuple(row[k] for k in keys)]:.2g}"

    return pivot(rows, "contender", cell, *keys)


def memory() -> Table:
    def cell(row: Row) -> str:
        return "" if row["MB"] == "nan" else f"{float(row['MB']):,.0f}"

    return pivot(results("memory-cpu"), "contender", cell, "N", "D")


def negatives() -> Table:
    """The time with a queue in units of its products, and the memory at the peak."""

    def cell(row: Row) -> str:
        return f"{float(row['ratio']):.2f}, {row['MB']} MB"

    return pivot(results("negatives-cpu"), "contender", cell, "N", "D")


def operations() -> Table:
    return pivot(
        results("operations", chunks="16"), "contender", lambda row: row["operations"], "N", "loss"
    )


def threads() -> Table:
    """The ratio of two threads to one in the same conditions."""
    rows = [row for row in results("threads-cpu") if row["at once"] == "2"]
    return pivot(rows, "contender", lambda row: f"{float(row['ratio']):.2f}", "N", "load", "policy")


def gpu(section: str, *keys: str, memory: bool = False) -> Table:
    """The time of each contender on a GPU, and its memory at the peak."""

    def cell(row: Row) -> str:
        time = duration(float(row["µs"]) / 1000)
        return f"{time}, {float(row['MB']):,.0f} MB" if memory and row["MB"] else time

    rows = [row for row in results("cuda", section=section) if row["µs"]]
    return pivot(rows, "contender", cell, *keys)


def gpu_contrastive() -> Table:
    table = gpu("NT-Xent", "N", "D", "embeddings", "products", memory=True)
    # A contender that keeps bfloat16 has a line of its own, beside that of care_loss.
    joined: dict[tuple[str, ...], list[str]] = {}
    kept = ("", "256", "1024", "4096", "32768")
    for n, d, embeddings, products, *cells in table[1:]:
        if d in ("128", "2048") and n in kept:
            name = "TF32" if products == "TF32" else embeddings
            line = joined.setdefault((n, d, name), [""] * len(cells))
            line[:] = [new or old for new, old in zip(cells, line, strict=True)]
    return [["N", "D", "embeddings", *table[0][4:]], *([*key, *joined[key]] for key in joined)]


def solvers() -> Table:
    rows = [row for row in results("cuda-paths", section="solvers") if row["µs"]]
    rows = [row for row in rows if row["contender"] != "as in the code"]
    rows = [row | {"matrices": row["case"].replace("x", "of D =")} for row in rows]
    return pivot(rows, "contender", lambda row: duration(float(row["µs"]) / 1000), "matrices")


def processes() -> Table:
    columns = {"W": "W", "N": "N", "loss": "contender", "ms per step": "ms"}
    columns |= {"ratio of time": "ratio", "peak memory, MB": "MB", "received, KB": "KB"}
    return listed(results("distributed-cpu"), columns)


def calculated() -> Table:
    rows = results("distributed-calculated")
    return listed(rows, same(*rows[0]))


# Accuracy


def errors(row: Row) -> str:
    return f"{row['value']} / {row['gradient']}"


def temperatures(name: str) -> Table:
    rows = [row | {"temperature": row["at"]} for row in results(name, loss="InfoNCE")]
    return pivot(rows, "contender", errors, "temperature")


def near_the_minimum(n: str) -> Table:
    rows = results("precision-cpu", loss="equivariance", N=n)
    return pivot([row | {"noise": row["at"]} for row in rows], "contender", errors, "noise")


def distances() -> Table:
    libraries = ("care_loss", "acos", "acos, clamped", "geoopt", "geomstats", "scipy")
    rows = results("sphere-errors", question="distance, relative error")
    return listed(rows, same("dtype", "angle", *libraries))


def failures(subject: str) -> Table:
    def cell(row: Row) -> str:
        return row["error"] if row["result"] == "wrong" else row["result"]

    def question(row: Row) -> str:
        return f"**{row['case']}**<br>right: {row['right answer']}<br>promised: {row['promise']}"

    rows = results("failures", subject=subject)
    return pivot([row | {"case": question(row)} for row in rows], "library", cell, "case")


def versions() -> Table:
    found = {row["library"]: row["version"] for row in results("failures")}
    return [["library", "version"], *([name, release] for name, release in found.items())]


# Training


def seeds(path: str, columns: dict[str, str], *labels: str) -> Table:
    """Make a line of each arm, whose cells have all seeds."""
    runs = [read(EXAMPLES / f"{path}-seed{seed}.csv") for seed in SEEDS]
    table = [[*(labels or ("arm",)), *columns]]
    for rows in zip(*runs, strict=True):
        cells = [", ".join(row[name] for row in rows).strip(", ") for name in columns.values()]
        table.append([*(rows[0][label] for label in labels or ("arm",)), *cells])
    return table


# Experiments


def experiment(name: str, **wanted: str) -> list[Row]:
    """Return the rows of an experiment, of all seeds, those that have what is wanted."""
    rows = read(DOCS / "experiments" / "results" / f"{name}.csv")
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def spread(values: list[str]) -> str:
    """Return the range of the values that are defined, and of how many these are, if not all."""
    defined = [value for value in values if value != "nan"]
    if not defined:
        return "not defined"
    low, high = (pick(defined, key=float) for pick in (min, max))
    limits = low if low == high else f"{low} to {high}"
    return limits if len(defined) == len(values) else f"{limits} ({len(defined)} of {len(values)})"


def rounded(value: str) -> str:
    number = float(value) + 0.0  # which makes a zero of -0.0
    return f"{number:.2g}" if abs(number) < 1 else f"{number:.3g}"


def over_seeds(
    rows: list[Row], columns: dict[str, str], *labels: str, show: Callable[[str], str] = str
) -> Table:
    """Make a line of the rows with the same labels, whose cells have the range over the seeds."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[label] for label in labels), []).append(row)
    table = [[*labels, *columns]]
    for key, some in groups.items():
        cells = ([show(row[name]) for row in some] for name in columns.values())
        table.append([*key, *map(spread, cells)])
    return table


def bound() -> Table:
    table = [["trials", "number", "bound broken", "truth / bound, median", "largest"]]
    for name, applies in (("within the condition", "True"), ("outside of it", "False")):
        rows = [row for row in experiment("theory", part="bound") if row["applies"] == applies]
        broken = sum(row["holds"] == "False" for row in rows)
        ratios = [float(row["truth"]) / float(row["bound"]) for row in rows]
        middle, high = f"{statistics.median(ratios):.3f}", f"{max(ratios):.3f}"
        table.append([name, str(len(rows)), str(broken), middle, high])
    return table


T_QUANTILE = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
}  # of Student's distribution for 95 %, by degrees of freedom


def mean_and_interval(values: list[float], digits: int = 3) -> str:
    """Return the mean, and the half width of its 95 % interval, over seeds."""
    if any(map(math.isnan, values)):
        return "not defined"
    half = T_QUANTILE[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {half:.{digits}f}"


MEASURED = {"gap ratio": "gap_ratio", "loss, shared": "shared_gap", "loss, own": "unshared_gap"}
MEASURED |= {"rotation share": "rotation_share", "linear share": "linear_share"}
MEASURED |= {"composition": "composition_share", "rank": "effective_rank"}
MEASURED |= {"mean norm": "mean_norm", "kNN": "kNN"}


def arms_of(name: str) -> Table:
    return over_seeds(experiment(name), MEASURED, "arm", "forwards", show=rounded)


def against_controls(name: str) -> Table:
    """The difference of each arm and both of its controls, paired by seed."""
    rows = experiment(name)
    found = {(row["arm"], row["seed"]): row for row in rows}
    columns = {"gap ratio": "gap_ratio", "rotation share": "rotation_share"}
    columns |= {"composition": "composition_share", "kNN": "kNN"}
    table = [["arm", "minus", *columns]]
    for arm in (FOUR, THREE, UNIFORMITY, "CE-SSL", "CE-SSL, changes"):
        of_arm = [row for row in rows if row["arm"] == arm]
        for label, control in (("placebo", f"placebo of {arm}"), (WITHOUT,) * 2):
            differences = [
                [float(row[key]) - float(found[control, row["seed"]][key]) for row in of_arm]
                for key in columns.values()
            ]
            table.append([arm, label, *map(mean_and_interval, differences)])
    return table


def ordinary_views() -> Table:
    """The gap ratio and kNN of the main arms, in a line for each group."""
    shown = WITH, WITHOUT, FOUR, THREE, f"placebo of {THREE}"
    table = [["gap ratio; kNN", *shown]]
    for name in GROUPS:
        rows = experiment(f"arms-{name}")
        cells = []
        for arm in shown:
            some = [row for row in rows if row["arm"] == arm]
            values = [[float(row[c]) for row in some] for c in ("gap_ratio", "kNN")]
            cells.append("; ".join(mean_and_interval(v, 2) for v in values))
        table.append([name, *cells])
    return table


def weights_of(group: str) -> Table:
    rows = experiment(f"arms-{group}") + experiment(f"weights-{group}")
    rows = [row for row in rows if row["arm"] in (FOUR, THREE)]
    rows.sort(key=lambda row: (row["arm"], float(row["weight"])))
    columns = {"gap ratio": "gap_ratio", "rotation share": "rotation_share"}
    return over_seeds(
        rows, columns | {"mean norm": "mean_norm", "kNN": "kNN"}, "arm", "weight", show=rounded
    )


def integers(row: Row) -> list[int] | None:
    """Return the multiplicities, if all are within 0.1 of integers, and their intervals as well."""
    if max(float(value) for value in (row["from integers"], *row["interval"].split())) >= 0.1:
        return None
    return [round(float(value)) for value in row["multiplicities"].split()]


def verdict_on(row: Row) -> str:
    """Return which representation of SO(3) an encoder has, by counting, or why it has none."""
    found = integers(row)
    if found is None:
        return "no integers"
    # A tensor of rank l has one direction of each frequency from -l to l.
    counts = [m - higher for m, higher in zip(found, [*found[1:], 0], strict=True)]
    if not any(counts[1:]):
        return "no rotation"
    names = "scalar", "vector", *(f"tensor of rank {rank}" for rank in range(2, len(counts)))
    return ", ".join(f"{n} × {name}" for n, name in zip(counts, names, strict=True) if n)


def frequencies_of(row: Row) -> str:
    """Return which representation of the circle an encoder has, or why it has none."""
    found = integers(row)
    if found is None:
        return "no integers"
    directions = int(row["subspace"])
    if found[0] == directions:
        return "no rotation"
    higher = (directions - found[0]) // 2 - sum(found[1:])
    names = [f"{n} × frequency {k}" for k, n in enumerate(found) if n]
    return ", ".join([*names, f"{higher} × a higher one"] if higher else names)


def counted(rows: list[Row], verdict: Cell) -> str:
    found = Counter(map(verdict, rows)).most_common()
    return "<br>".join(f"{label}: {n}" for label, n in found)


def representations(name: str) -> Table:
    """The multiplicities of the first frequencies, a line for each seed, and their intervals."""
    rows = experiment(f"representation-{name}", dim="16")

    def lines(row: Row) -> str:
        values, widths = row["multiplicities"].split()[:4], row["interval"].split()[:4]
        return ", ".join(f"{v} ± {w}" for v, w in zip(values, widths, strict=True))

    table = [["arm", "multiplicities of 0, 1, 2, 3", "integers", "axes", "deviation", "shuffled"]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        some = [row for row in rows if row["arm"] == arm]
        moving = [found for row in some if (found := integers(row)) and any(found[1:])]
        columns = ("between axes", "deviation", "deviation, shuffled")
        ranges = [spread([rounded(row[column]) for row in some]) for column in columns]
        cells = "<br>".join(map(lines, some)), f"{len(moving)} of {len(some)}"
        table.append([arm, *cells, *ranges])
    return table


def dimensions(name: str, verdict: Cell = verdict_on) -> Table:
    """Which representations there are, for embeddings of several dimensions."""
    shown = [name for arm in (THREE, UNIFORMITY) for name in (arm, f"placebo of {arm}")]
    rows = [row for row in experiment(name) if row["arm"] in shown]
    table = [["D", "arm", "gap ratio", "rank", "directions with 95 %", "representation, seeds"]]
    for key in dict.fromkeys((row["dim"], row["arm"]) for row in rows):
        some = [row for row in rows if (row["dim"], row["arm"]) == key]
        columns = ("gap_ratio", "effective_rank", "subspace")
        ranges = [spread([rounded(row[column]) for row in some]) for column in columns]
        table.append([*key, *ranges, counted(some, verdict)])
    return table


def circles(name: str) -> Table:
    """What two-dimensional embeddings are, and which frequencies they have."""
    rows = experiment(f"circle-{name}")
    columns = {"gap ratio": "gap_ratio", "cosine spread": "cosine spread"}
    columns |= {"chance": "cosine spread, shuffled", "mean norm": "mean_norm", "kNN": "kNN"}
    table = over_seeds(rows, columns, "arm", show=rounded)
    table[0].append("representation, seeds")
    for line in table[1:]:
        line.append(counted([row for row in rows if row["arm"] == line[0]], frequencies_of))
    return table


def uses(columns: dict[str, str], digits: int = 2) -> Table:
    """Means and intervals of some columns, in lines for all data, and a column for each arm."""
    table = []
    for name in GROUPS:
        rows = experiment(f"uses-{name}")
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        for label, column in columns.items():
            if column in rows[0]:
                values = [[float(row[column]) for row in rows if row["arm"] == arm] for arm in arms]
                cells = [mean_and_interval(some, digits) for some in values]
                table.append([name, label, *cells])
    return [["data", "", *arms], *table]


def multiplicities() -> Table:
    """Which multiplicities the fits found, with the number of seeds."""
    table = []
    for name in GROUPS:
        rows = experiment(f"uses-{name}")
        arms = list(dict.fromkeys(row["arm"] for row in rows))
        kinds = {"circle": "multiplicities", "SO(3)": "any axis: multiplicities"}
        for label, column in kinds.items():
            if column in rows[0]:
                some = ([row for row in rows if row["arm"] == arm] for arm in arms)
                cells = [counted(x, lambda r, c=column: r[c].replace(" ", ", ")) for x in some]
                table.append([name, label, *cells])
    return [["data", "action of", *arms], *table]


def probes_of(name: str) -> Table:
    """R² of what a linear probe reads, and what the embeddings are."""
    columns = {"gap ratio": "gap_ratio", "mean norm": "mean_norm", "rank": "effective_rank"}
    columns |= same("kNN", "orientation", "doubled angle", "scale", "position", "brightness")
    return over_seeds(experiment(name), columns, "arm", show=rounded)


def several(*figures: str) -> Table:
    """Figures of the hue, the rotation and both in succession, and those of the embedding."""
    names = {"gap ratio": "gap_ratio", "above chance": "share_above_chance"}
    names |= {"displacement": "displacement"}
    columns = {
        f"{change}: {name}": f"{change}, {names[name]}"
        for name in figures
        for change in ("hue", "rotation", "both")
    }
    return over_seeds(experiment("several"), columns, "arm", show=rounded)


def several_embeddings() -> Table:
    columns = {"rank": "effective_rank", "mean norm": "mean_norm", "kNN": "kNN"}
    return over_seeds(experiment("several"), columns, "arm", "forwards", show=rounded)


def several_products() -> Table:
    columns = {"fitted to both": "fitted", "product": "product", "other order": "swapped"}
    columns |= {"product of other draws": "others"}
    return over_seeds(experiment("several"), columns, "arm", show=rounded)


def several_against_controls() -> Table:
    """The difference of an arm and each control, paired by seed."""
    found = {(row["arm"], row["seed"]): row for row in experiment("several")}
    table = [
        ["arm", "minus", "hue: gap ratio", "rotation: gap ratio", "both: gap ratio", "product"]
    ]
    columns = [f"{change}, gap_ratio" for change in ("hue", "rotation", "both")] + ["product"]
    for arm in ("separate views", "composed view"):
        for control in (f"placebo of {arm}", "SimCLR without both"):
            seeds = [seed for name, seed in found if name == arm]
            pairs = [(found[arm, seed], found[control, seed]) for seed in seeds]
            differences = [[float(x[c]) - float(y[c]) for x, y in pairs] for c in columns]
            table.append([arm, control, *map(mean_and_interval, differences)])
    return table


def losses_compared() -> Table:
    """Means and intervals of both ways to train, and the better of both controls of each."""
    table = [["data", "D", "arm", "gap ratio", "of the stronger control", "rotation share", "rank"]]
    for name in GROUPS:
        rows = experiment(f"contrast-{name}")
        for dim, arm in dict.fromkeys((row["dim"], row["arm"]) for row in rows):
            if arm not in (THREE, "rotation contrast"):
                continue

            def of(figure: str, arm: str = arm, dim: str = dim, rows: list[Row] = rows) -> str:
                some = [row for row in rows if (row["dim"], row["arm"]) == (dim, arm)]
                values = [float(row[figure]) for row in some]
                return mean_and_interval(values) if values else ""

            controls = [of("gap_ratio", other) for other in (f"placebo of {arm}", WITHOUT)]
            stronger = min(filter(None, controls), key=lambda cell: float(cell.split()[0]))
            table.append([name, dim, arm, of("gap_ratio"), stronger])
            table[-1] += [of("rotation_share"), of("effective_rank")]
    return table


def contrasts_of(name: str) -> Table:
    """The figures of all arms in 16 dimensions."""
    rows = experiment(f"contrast-{name}", dim="16")
    columns = {"gap ratio": "gap_ratio", "rotation share": "rotation_share"}
    columns |= {"composition": "composition_share", "rank": "effective_rank", "kNN": "kNN"}
    return over_seeds(rows, columns, "arm", show=rounded)


def contrast_variants(part: str, label: str) -> Table:
    """Other losses in place of InfoNCE, or other fits, on clouds."""
    table = [["D", label, "gap ratio", "rotation share", "rank", "kNN"]]
    rows = experiment(f"contrast-{part}-clouds")
    for dim, arm in dict.fromkeys((row["dim"], row["arm"]) for row in rows):
        if arm != "untrained":
            some = [row for row in rows if (row["dim"], row["arm"]) == (dim, arm)]
            columns = "gap_ratio", "rotation_share", "effective_rank", "kNN"
            cells = [mean_and_interval([float(row[c]) for row in some]) for c in columns]
            table.append([dim, arm, *cells])
    return table


def contrast_settings() -> Table:
    """Gap ratios, and the share of the displacement that rotations explain, of one seed."""
    rows = [
        row | {"data": f"{name}, D = {row['dim']}", "setting": row["arm"]}
        for name in ("clouds", "molecules", "sprites")
        for row in experiment(f"contrast-settings-{name}")
        if row["arm"] != "untrained"
    ]
    return pivot(
        rows,
        "data",
        lambda row: f"{rounded(row['gap_ratio'])}, {rounded(row['rotation_share'])}",
        "setting",
    )


def benefit_published() -> Table:
    """Accuracies in per cent, and differences from SimCLR that has seen as many images."""

    def accuracies(arm: str, weight: str, budget: str, feature: str, way: str) -> list[float]:
        wanted = {"arm": arm, "weight": weight, "budget": budget, "feature": feature}
        rows = experiment("benefit-published", **wanted)
        return [100 * float(row[f"as it is, {way}"]) for row in rows]

    of_arms = dict.fromkeys((row["arm"], row["weight"]) for row in experiment("benefit-published"))
    rivals = {
        header: accuracies(arm, "10.0", "100", "backbone", "probe")
        for header, arm in (("same steps", SAME_STEPS), ("same images", WITH))
    }
    table = [["arm", "weight", "probe", *rivals, "detectable", "after a quarter", "kNN"]]
    for arm, weight in of_arms:
        probe = accuracies(arm, weight, "100", "backbone", "probe")
        line = [arm, weight if "CARE" in arm else "", mean_and_interval(probe, 1)]
        for rival in rivals.values():
            differences = [a - b for a, b in zip(probe, rival, strict=True)]
            line.append(mean_and_interval(differences, 1) if any(differences) else "")
        line.append(f"{DETECTABLE * statistics.stdev(differences):.1f}" if line[-1] else "")
        for budget, way in (("25", "probe"), ("100", "kNN")):
            values = accuracies(arm, weight, budget, "backbone", way)
            line.append(mean_and_interval(values, 1))
        table.append(line)
    return table


def answers(part: str, arm: str, feature: str, question: str, budget: str = "100") -> list[float]:
    """Return an answer in per cent or in degrees, for seed 11, which chooses, and then the others.

    The names of feature and question are those of the file.
    """
    found = {
        row["seed"]: float(row[question] or "nan") * (1 if "error" in question else 100)
        for row in experiment(f"benefit-{part}", arm=arm, feature=feature, budget=budget)
    }
    return [found.pop("11", math.nan), *found.values()]


def best_of(
    part: str, question: str, features: tuple[str, ...], arms: tuple[str, ...], seeds: slice
) -> tuple[str, str]:
    """Return the arm and the feature with the best mean answer on some seeds."""
    found = {
        (arm, feature): statistics.mean(answers(part, arm, feature, question)[seeds])
        for arm in arms
        for feature in features
    }
    defined = {key: value for key, value in found.items() if not math.isnan(value)}
    return (min if "error" in question else max)(defined, key=lambda key: defined[key])


def benefit(part: str) -> Table:
    """The best arm and feature without CARE, and those with CARE that seed 11 chooses."""
    table = [["task", "without CARE", "with CARE", "difference", "minus placebo"]]
    for task, (question, features) in QUESTIONS.items():
        rival = best_of(part, question, features, (WITH, WITHOUT), slice(1, None))
        ours = best_of(part, question, features, CONTRASTED, slice(1))
        shown = [rival, ours, (f"placebo of {ours[0]}", ours[1])]
        others, values, control = (answers(part, *key, question)[1:] for key in shown)
        line = [task]
        for (arm, feature), some in ((rival, others), (ours, values)):
            label = "pose by the action" if "action" in question else feature
            line.append(f"{mean_and_interval(some, 1)}<br>{arm}, {label}")
        for base in (others, control):
            differences = [a - b for a, b in zip(values, base, strict=True)]
            line.append(mean_and_interval(differences, 1))
        table.append(line)
    return table


def report_and_answers(
    part: str, arm: str, questions: Iterable[tuple[str, str]], budgets: list[str]
) -> list[str]:
    """Return the gap ratio of an arm after the last budget, and answers after each of them."""
    rows = experiment(f"benefit-{part}", arm=arm, feature="embedding", budget=budgets[-1])
    gaps = [float(row["gap_ratio"]) for row in rows if row["seed"] != "11"]
    cells = [mean_and_interval(gaps, 2)]
    for key in questions:
        found = (answers(part, arm, *key, budget)[1:] for budget in budgets)
        cells += [mean_and_interval(values, 1) for values in found]
    return cells


def benefit_arms(part: str) -> Table:
    """What the report says of each arm, and two answers after a quarter of the images, and all."""
    rows = experiment(f"benefit-{part}")
    budgets = [budget for budget in ("25", "100") if any(row["budget"] == budget for row in rows)]
    names = {"25": ", a quarter of the images", "100": ""}
    questions = CLASS, TURN
    headers = [f"{ASKED[key]}{names[budget]}" for key in questions for budget in budgets]
    return [
        ["arm", "gap ratio", *headers],
        *(
            [arm, *report_and_answers(part, arm, questions, budgets)]
            for arm in dict.fromkeys(row["arm"] for row in rows)
        ),
    ]


def benefit_wrong() -> Table:
    """Where an assumption does not hold, beside rotations with as many images."""
    table = [["part", "arm", "gap ratio", *ASKED.values()]]
    for part in ("rotations", *WRONG):
        # Crops do not turn an image.
        questions = [key for key in ASKED if key != TURN or part != "crops"]
        for arm in dict.fromkeys(row["arm"] for row in experiment(f"benefit-{part}")):
            if arm in (WITH, WITHOUT, *CONTRASTED):
                cells = report_and_answers(part, arm, questions, ["25"])
                table.append([part, arm, *cells, *[""] * (len(ASKED) - len(questions))])
    return table


CLASS, FOUND_AGAIN = ("backbone", "any state, probe"), ("canonical", "found again")
TURN = ("embedding", "turn error, action")
ASKED = {CLASS: "class in any state", FOUND_AGAIN: "found again", TURN: "turn by the action"}
PLAIN = ("backbone", "embedding")
ALL_FEATURES = (*PLAIN, "invariants", "canonical")
QUESTIONS = {
    "class, images as they are": ("as it is, probe", ALL_FEATURES),
    "class, any state": ("any state, probe", ALL_FEATURES),
    "class, any state, by neighbours": ("any state, kNN", ALL_FEATURES),
    "class, any state, ten labels each": ("few labels", ALL_FEATURES),
    "the same image in another state": ("found again", ALL_FEATURES),
    "state, one of six": ("state", PLAIN),
    "class and state": ("class and state", PLAIN),
    "state, error in degrees": ("state error", PLAIN),
    "turn, error in degrees, labelled states": ("turn error", PLAIN),
    "turn, error in degrees, no labels": ("turn error, action", ("embedding",)),
}
CONTRASTED = (THREE, "rotation contrast")
WRONG = ("upright", "crops", "hue turned", "hue ignored")
# The difference that five seeds find in 80 of 100 cases at a level of 5 %, in units of the standard
# deviation of paired differences: the quantiles of Student's distribution, 2.776 + 0.941, over √5.
DETECTABLE = 1.66
NOT_GROUPS = ("crops", "stretches")
GROUPS = ("clouds", "molecules", "proteins", "sprites", "hues")
FEATURES = ("embedding", "invariants", "canonical")
FOUND = {"embedding": "found, embedding", "invariants": "found, invariants"}
FOUND |= {"after the pose": "found, aligned"}
POSES = {"angle, mean": "pose, mean", "angle, median": "pose, median"}
POSES |= {"angle by 72 fits, mean": "72 fits, mean", "angle by 72 fits, median": "72 fits, median"}
POSES |= {"rotation, mean": "any axis: pose, mean"}
POSES |= {"rotation, median": "any axis: pose, median"}
OF_SPACE = ("clouds", "molecules", "proteins")
MAX_PROBED_IMAGES = ("orientations", "similarities")
FREQUENCIES = {"multiplicities of the frequencies 0, 1, 2, ...": "multiplicities"}
FREQUENCIES |= {"deviation (rad)": "deviation"}
NEIGHBOURS = {"kNN, photograph": "kNN"}


TABLES: dict[str, Callable[[], Table]] = {
    "mutants": mutants,
    "verdict": verdicts,
    "paths": chosen_paths,
    "info-nce-times": partial(
        times, "contrastive-cpu", "N", "D", without=("pytorch-metric-learning",)
    ),
    "info-nce-memory": memory,
    "growth": lambda: pivot(results("growth"), "contender", lambda row: row["slope"], "quantity"),
    "equivariance-times": partial(
        times,
        "equivariance-cpu",
        "N",
        "D",
        "chunks",
        without=("care_loss, a leading dimension", "care_loss, second view detached"),
    ),
    "care-times": partial(
        times, "care-cpu", "N", "D", "chunks", without=("care_loss, chunks as ids",)
    ),
    "negatives": negatives,
    "rotation-contrast-times": partial(times, "rotation_contrast-cpu", "N", "D", "chunks"),
    "operations": operations,
    "step": lambda: listed(
        results("step-cpu"),
        {
            "loss": "contender",
            "images per second": "images/s",
            "memory at the peak, MB": "MB",
            "time / lightly's": "ratio",
        },
    ),
    "threads": threads,
    "gpu-care": partial(gpu, "CARE", "N", "D", "chunks", memory=True),
    "gpu-contrastive": gpu_contrastive,
    "gpu-step": lambda: listed(
        results("cuda", section="step"),
        {"loss": "contender", "images per second": "images/s", "memory at the peak, MB": "MB"},
    ),
    "gpu-solvers": solvers,
    "processes": processes,
    "processes-calculated": calculated,
    "temperatures": partial(temperatures, "precision-cpu"),
    "temperatures-bfloat16": partial(temperatures, "precision-cpu-bfloat16"),
    "near-the-minimum": partial(near_the_minimum, "256"),
    "near-the-minimum-long": partial(near_the_minimum, "2048"),
    "distances": distances,
    "failures-of-rotations": partial(failures, "rotations"),
    "failures-of-similarities": partial(failures, "similarities"),
    "failures-of-info-nce": partial(failures, "InfoNCE"),
    "failures-of-equivariance": partial(failures, "equivariance"),
    "versions": versions,
    "gap-ratios": partial(
        seeds,
        "photos",
        same("verdict", "gap ratio", "±")
        | {"loss, shared hues": "shared hues", "loss, own hues": "own hues"},
    ),
    "rotation-shares": partial(
        seeds,
        "photos",
        same("rotation share", "above chance", "linear share", "composition")
        | {"hue error (degrees)": "hue error"},
    ),
    "frequencies": partial(seeds, "photos", FREQUENCIES),
    "colour": partial(
        seeds,
        "photos",
        NEIGHBOURS
        | {"kNN, hue": "hue kNN", "same hue": "same hue", "same hue, turned": "same hue, turned"},
    ),
    "ordinary": partial(
        seeds,
        "ordinary",
        {
            "verdict": "verdict",
            "gap ratio": "gap_ratio",
            "share above chance": "share_above_chance",
            "linear share": "linear_share",
        },
        "arm",
        "transformation",
    ),
    "embedding": partial(seeds, "photos", same("effective rank", "mean norm")),
    "natural": partial(
        seeds,
        "natural/photos",
        same("verdict", "gap ratio", "rotation share", "composition") | NEIGHBOURS,
    ),
    "natural-frequencies": partial(seeds, "natural/photos", FREQUENCIES | same("mean norm")),
    "ordinary-views": ordinary_views,
    **{f"{name}-arms": partial(arms_of, f"arms-{name}") for name in GROUPS},
    **{f"{name}-controls": partial(against_controls, f"arms-{name}") for name in GROUPS},
    **{f"{name}-weights": partial(weights_of, name) for name in GROUPS},
    **{f"{name}-representation": partial(representations, name) for name in GROUPS},
    **{f"{name}-dimensions": partial(dimensions, f"representation-{name}") for name in OF_SPACE},
    **{
        f"{name}-dimensions": partial(dimensions, f"representation-{name}", frequencies_of)
        for name in ("sprites", "hues")
    },
    **{f"{name}-circle": partial(circles, name) for name in ("upright", "sprites", "hues")},
    "clouds-longer": partial(dimensions, "longer/representation-clouds"),
    "contrast": losses_compared,
    "contrast-settings": contrast_settings,
    "contrast-bases": partial(contrast_variants, "bases", "base loss"),
    "contrast-fits": partial(contrast_variants, "fits", "polar factor"),
    "benefit-published": benefit_published,
    "benefit-rotations": partial(benefit, "rotations"),
    "benefit-rotations-arms": partial(benefit_arms, "rotations"),
    "benefit-hues": partial(benefit, "hues"),
    "benefit-hues-arms": partial(benefit_arms, "hues"),
    "benefit-wrong": benefit_wrong,
    "benefit-cost": lambda: listed(
        experiment("benefit-cost"), same("part", "arm", "forwards", "images/s", "MB kept")
    ),
    **{f"contrast-{name}": partial(contrasts_of, name) for name in (*GROUPS, *NOT_GROUPS)},
    "uses-multiplicities": multiplicities,
    "uses-pose": partial(uses, POSES, 1),
    "uses-neighbours": partial(uses, {name: f"kNN, {name}" for name in FEATURES}),
    "uses-probe": partial(uses, {name: f"probe, {name}" for name in FEATURES}),
    "uses-found": partial(uses, FOUND),
    "uses-prediction": partial(uses, same("MRR", "hits@1")),
    **{f"{name}-probe": partial(probes_of, f"probe-{name}") for name in MAX_PROBED_IMAGES},
    "similarities-longer": partial(probes_of, "longer/probe-similarities"),
    "several-gaps": partial(several, "gap ratio"),
    "several-shares": partial(several, "above chance", "displacement"),
    "several-embeddings": several_embeddings,
    "several-products": several_products,
    "several-controls": several_against_controls,
    "theory-bound": bound,
    "theory-descent": lambda: over_seeds(
        experiment("theory", part="descent"),
        same("loss", "loss of all pairs", "residual"),
        "chunks",
        "n",
    ),
    "theory-reflection": lambda: over_seeds(
        experiment("theory", part="reflection"), same("loss", "residual", "residual, SO(D)"), "n"
    ),
    "theory-few-rows": lambda: over_seeds(
        experiment("theory", part="few rows"),
        {"fitted rows": "fitted", "other rows": "others"},
        "rows",
        "n",
    ),
    "moco": partial(
        seeds,
        "moco/moco",
        {
            "gap ratio": "gap ratio",
            "loss, shared hues": "shared hues",
            "rotation share": "rotation share",
            "kNN": "kNN",
        },
    ),
}


def written(text: str) -> str:
    """Return the text of a page with its tables."""

    def table(match: re.Match[str]) -> str:
        header, *lines = TABLES[match[2]]()
        rows = [header, ["---"] * len(header), *lines]
        lines_of_text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return f"{match[1]}\n{lines_of_text}\n"

    return MARKED.sub(table, text)


def main() -> None:
    for page in (ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
