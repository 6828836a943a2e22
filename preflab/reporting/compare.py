"""N runs against a named baseline: paired differences from the rows of their artifacts, and Holm over all of them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from preflab.evaluation.rewards import prompts_of
from preflab.reporting.artifacts import Artifact, RunArtifacts
from preflab.reporting.comparability import BASE, NOTHING, WEIGHTS, basis_of
from preflab.reporting.findings import doubt_about_judge, not_held_out
from preflab.reporting.stages import Table, title_of
from utils.errors import UserError
from utils.stats import bootstrap, direction, holm, mcnemar, mean_test, of_sums, pairwise_correct, share
from utils.tables import cell, difference, estimate, p_value

NOT_EVALUATED = "not evaluated"


@dataclass
class Values:
    """The rows of one figure of one run.

    Attributes:
        keys: what each row is of, equal for the same row of another run.
        rows: shape (n,), or (n, 2) for a ratio of sums.
        groups: the prompt of each row, or None.
    """

    keys: list
    rows: np.ndarray
    groups: list | None = None


@dataclass(frozen=True)
class Kind:
    """How a figure is computed from its rows.

    Attributes:
        label: with its unit.
        values: (artifact) gives its rows; KeyError where the artifact does not have them.
        of: share (right or wrong), outcome (won, tied or lost, or a preference between), mean, ratio or task.
        higher: whether more is better; None where neither is.
        rewards: whether it is in units of rewards.
        against: what it is measured against (preflab.reporting.comparability).
    """

    label: str
    values: Callable[[Artifact], Values] = field(repr=False)
    of: str = "mean"
    scale: float = 1
    digits: int = 1
    higher: bool | None = None
    rewards: bool = False
    against: str = BASE


@dataclass
class Line:
    """One run in the table of a figure.

    Attributes:
        reason: why it has no figure, or one that is not comparable.
        doubt: why its figure supports no claim.
    """

    run: str
    value: dict | None = None
    change: dict | None = None
    p: float | None = None
    p_holm: float | None = None
    reason: str | None = None
    doubt: str | None = None

    @property
    def comparable(self) -> bool:
        """Whether it has a difference from the baseline."""
        return self.change is not None


@dataclass
class Compared:
    """A figure of every run, the baseline's first."""

    kind: Kind
    stage: str
    basis: str
    lines: list[Line]

    def verdict(self, line: Line) -> str:
        """better, worse, changed or no claim, by interval and Holm-corrected test."""
        if not line.comparable:
            return "not comparable"
        if line.doubt:
            return "no claim"
        way = direction(line.change, line.p_holm if line.p_holm is not None else 1.0)
        if not way:
            return "no claim"
        if self.kind.higher is None:
            return "higher" if way > 0 else "lower"
        return "better" if (way > 0) == self.kind.higher else "worse"


# ------------------------------------------------------------------------------------------------------------- figures


def _pair_values(column: Callable[[dict], np.ndarray]) -> Callable[[Artifact], Values]:
    """Rows of held-out pairs: a value per pair from their columns."""

    def values(artifact: Artifact) -> Values:
        rows = artifact.rows
        if not rows:
            raise KeyError("rows")
        columns = {key: np.array([row[key] for row in rows], float) for key in PAIR_COLUMNS}
        return Values([(row.get("where"), row["row"]) for row in rows], column(columns), prompts_of(rows))

    return values


def _margins(column: Callable[[np.ndarray], np.ndarray]) -> Callable[[Artifact], Values]:
    """Rows of a reward model's held-out pairs: a value per pair from their margins."""

    def values(artifact: Artifact) -> Values:
        rows = artifact.rows
        if not rows:
            raise KeyError("rows")
        margins = np.array([row["margin"] for row in rows], float)
        return Values([(row.get("where"), row["row"]) for row in rows], column(margins), prompts_of(rows))

    return values


PAIR_COLUMNS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "margin")
_REWARDS = (
    Kind(
        "reward accuracy, % (ties half)",
        _pair_values(lambda c: pairwise_correct(c["margin"], np.zeros(len(c["margin"])))),
        "share", 100, 1, True,
    ),
    Kind(
        "likelier answer is chosen, %",
        _pair_values(lambda c: pairwise_correct(c["chosen"], c["rejected"])),
        "share", 100, 1, True, against=WEIGHTS,
    ),
    Kind("reward margin, beta x nats", _pair_values(lambda c: c["margin"]), "mean", 1, 3, True, True),
    Kind("log-prob of chosen, nats", _pair_values(lambda c: c["chosen"]), "mean", 1, 2, against=WEIGHTS),
    Kind("log-prob of rejected, nats", _pair_values(lambda c: c["rejected"]), "mean", 1, 2, against=WEIGHTS),
)  # fmt: skip


def _ratio_values(select: Callable[[dict], tuple | None]) -> Callable[[Artifact], Values]:
    """Rows of (sum, tokens) for a ratio of sums; `select` gives (key, sum, tokens) of a row, or None."""

    def values(artifact: Artifact) -> Values:
        rows = [(row, selected) for row in artifact.rows if (selected := select(row)) is not None]
        if not rows:
            raise KeyError("rows")
        keys = [key for _, (key, _, _) in rows]
        groups = prompts_of([row for row, _ in rows])
        return Values(keys, np.array([[total, tokens] for _, (_, total, tokens) in rows], float), groups)

    return values


def _answer_nll(side: str):
    def select(row: dict) -> tuple | None:
        if row.get("set") != "pairs":
            return None
        return (row.get("where"), row["row"]), row[f"nll_response_{side}_tuned"], row[f"tokens_response_{side}"]

    return select


def _text_nll(row: dict) -> tuple | None:
    if row.get("set") != "text":
        return None
    return (row.get("where"), row["document"], row["window"]), row["nll_tuned"], row["tokens"]


def _kl(row: dict) -> tuple | None:
    if "kl_chosen" not in row:
        return None
    return (row.get("where"), row["row"]), row["kl_chosen"], row["tokens_response_chosen"]


def _conversation_nll(row: dict) -> tuple | None:
    return (row.get("where"), row["row"]), row["nll_tuned"], row["tokens"]


def _battle_values(artifact: Artifact) -> Values:
    """Outcomes of tuned against base, 1 for a win; prompts without a verdict are left out."""
    judged = [r for r in artifact.rows if {r["a"], r["b"]} == {"tuned", "base"} and r["consistent"] is not None]
    if not judged:
        raise KeyError("rows of tuned against base")
    wins = [row["consistent"] if row["a"] == "tuned" else 1 - row["consistent"] for row in judged]
    return Values([(row["where"], row["prompt"]) for row in judged], np.array(wins, float))


def _alpacaeval_values(artifact: Artifact) -> Values:
    """Preferences of the tuned model against the reference, from 0 to 1."""
    from preflab.alpacaeval.files import read_annotations
    from preflab.alpacaeval.package import prompt_groups

    judged = [row for row in read_annotations(artifact.path.with_name("annotations_tuned.json")) if row["preference"]]
    if not judged:
        raise KeyError("annotations")
    wins = np.array([row["preference"] - 1 for row in judged], float)
    return Values([row["instruction"] for row in judged], wins, prompt_groups(judged))


KINDS = {
    "train": _REWARDS,
    "sft": (Kind("loss, nats per token", _ratio_values(_conversation_nll), "ratio", 1, 4, False, against=WEIGHTS),),
    "reward_model": (
        Kind(
            "reward model: chosen ranked higher, %",
            _margins(lambda m: pairwise_correct(m, np.zeros(len(m)))),
            "share",
            100,
            1,
            True,
            against=NOTHING,
        ),
        Kind("reward model: margin, log-odds", _margins(lambda m: m), "mean", 1, 3, True, against=NOTHING),
    ),
    "win_rate": _REWARDS,
    "perplexity": (
        Kind("loss of chosen, nats per token", _ratio_values(_answer_nll("chosen")), "ratio", 1, 4, against=WEIGHTS),
        Kind(
            "loss of rejected, nats per token", _ratio_values(_answer_nll("rejected")), "ratio", 1, 4, against=WEIGHTS
        ),
        Kind("loss of plain text, nats per token", _ratio_values(_text_nll), "ratio", 1, 4, False, against=WEIGHTS),
        Kind("KL(tuned || base), nats per token", _ratio_values(_kl), "ratio", 1, 4),
    ),
    "battle": (Kind("wins against base under the judge, %", _battle_values, "outcome", 100, 1, True),),
    "alpacaeval": (
        Kind("wins against the reference, %", _alpacaeval_values, "outcome", 100, 1, True, against=NOTHING),
    ),
}


# ---------------------------------------------------------------------------------------------------------- comparison


def compare(runs: list[RunArtifacts], baseline: RunArtifacts, seed: int) -> list[Compared]:
    """Every figure that the baseline and at least one run have rows of, with Holm's correction over all tests.

    Args:
        runs: without the baseline, in the order to show them in.
        seed: of resampling.
    """
    repeated = _repeated(baseline)
    figures = [
        compared
        for stage, kinds in KINDS.items()
        for artifact in baseline.of_stage(stage, trials=True)[:1]
        if stage not in repeated
        for kind in kinds
        if (compared := _compare_figure(kind, artifact, baseline, runs, seed))
    ]
    figures += [
        compared for artifact in baseline.of_stage("lm_eval") for compared in _lm_eval(artifact, baseline, runs, seed)
    ]
    tested = [line for figure in figures for line in figure.lines if line.p is not None]
    for line, corrected in zip(tested, holm([line.p for line in tested]), strict=True):
        line.p_holm = corrected
    return figures


def _repeated(baseline: RunArtifacts) -> set[str]:
    """The stages whose figures another one has too: those of eval_win_rate.py on the run's own held-out pairs."""
    # Counting a figure twice would double the number of tests that Holm's correction is for.
    bases = {stage: [basis_of(a).data for a in baseline.of_stage(stage)[:1]] for stage in ("train", "win_rate")}
    return {"win_rate"} if bases["train"] and bases["train"][0][1] in [data[1] for data in bases["win_rate"]] else set()


def _compare_figure(kind: Kind, first: Artifact, baseline: RunArtifacts, runs: list[RunArtifacts], seed: int):
    """The figure of the baseline and of all runs; None where the baseline does not have it."""
    ours, problem = _values(kind, first)
    if ours is None:
        # A damaged file of the baseline is named among the problems of its run.
        return None
    basis, lines = basis_of(first, kind.rewards), [Line(baseline.name, _estimate(kind, ours, seed))]
    for run in runs:
        artifact = next(iter(run.of_stage(first.stage, trials=True)), None)
        values, problem = _values(kind, artifact) if artifact else (None, NOT_EVALUATED)
        if values is None:
            lines.append(Line(run.name, reason=problem))
            continue
        line = Line(run.name, _estimate(kind, values, seed))
        line.doubt = doubt_about_judge(first) or doubt_about_judge(artifact)
        differs = basis_of(artifact, kind.rewards).differs(basis, kind.against)
        trained_on = not_held_out(first) or not_held_out(artifact)
        if trained_on:
            differs.append(trained_on)
        if artifact.limit != first.limit:
            differs.append(f"other rows: --limit {artifact.limit}, not {first.limit}")
        if not differs and values.keys != ours.keys:
            values, paired = _shared(values, ours)
            if paired is None:
                differs.append("other rows under the same data: not the same rows have a figure")
        else:
            paired = ours
        if differs:
            line.reason = "; ".join(differs)
        else:
            line.change, line.p = _difference(kind, values, paired, seed)
        lines.append(line)
    return Compared(kind, title_of(first), basis.text(), lines) if len(lines) > 1 else None


def _shared(a: Values, b: Values) -> tuple[Values, Values | None]:
    """Both on the rows that both have (a judge may lack a verdict on some); None for fewer than half of them."""
    place = {key: k for k, key in enumerate(b.keys)}
    both = [(k, place[key]) for k, key in enumerate(a.keys) if key in place]
    if 2 * len(both) < max(len(a.keys), len(b.keys)):
        return a, None
    return tuple(
        Values([v.keys[k] for k in index], v.rows[list(index)], v.groups and [v.groups[k] for k in index])
        for v, index in zip((a, b), zip(*both, strict=True), strict=True)
    )


def _values(kind: Kind, artifact: Artifact) -> tuple[Values | None, str | None]:
    try:
        return kind.values(artifact), None
    except UserError as error:
        return None, str(error)
    except KeyError as error:
        return None, f"{artifact.path}: no {error.args[0]} of this figure"
    except (TypeError, ValueError) as error:
        return None, f"{artifact.path}: its rows are not as the stage writes them ({error})"


def _estimate(kind: Kind, values: Values, seed: int) -> dict:
    if kind.of in ("share", "outcome"):
        return share(values.rows, seed, groups=values.groups)
    if kind.of == "ratio":
        return of_sums(values.rows, seed=seed, groups=values.groups)
    return bootstrap(values.rows, seed, groups=values.groups)


def _difference(kind: Kind, a: Values, b: Values, seed: int) -> tuple[dict, float]:
    """(metric of a - b, p-value): paired by row, prompts resampled as one unit."""
    groups = a.groups
    if kind.of == "ratio":
        change = np.stack([a.rows[:, 0] - b.rows[:, 0], a.rows[:, 1]], 1)
        return of_sums(change, seed=seed, groups=groups), mean_test(change[:, 0], groups, seed)
    both = np.stack([a.rows, b.rows], 1)
    if kind.of == "share":
        return share(both, seed, groups=groups), mcnemar(*both.T, groups)
    # Ties are many among outcomes, and McNemar's test would drop them.
    p = mean_test(both[:, 0] - both[:, 1], groups, seed)
    return (share if kind.of == "outcome" else bootstrap)(both, seed, groups=groups), p


def _lm_eval(first: Artifact, baseline: RunArtifacts, runs: list[RunArtifacts], seed: int) -> Iterator[Compared]:
    """The tasks of a suite, paired over the documents that the harness logged for the tuned models."""
    # Its import takes seconds.
    from preflab.harness.metrics import rows
    from preflab.harness.suites import Suite

    ours, problem = _logged(first)
    basis = basis_of(first)
    tables: dict[tuple, Compared] = {}
    others = [(run, next((a for a in run.of_stage("lm_eval") if a.suite == first.suite), None)) for run in runs]
    for key, row in _by_figure(first.summary.get("rows")).items():
        if row["top"]:
            kind = Kind(
                f"{row['alias']}: {row['metric']}, {row['filter']}", None, "task", 1, 4, row["higher"], against=NOTHING
            )
            lines = [Line(baseline.name, row["tuned"] | {"ci95": row["tuned"].get("ci95")})]
            tables[key] = Compared(kind, title_of(first), basis.text(), lines)
    for run, artifact in others:
        differs, figures = [NOT_EVALUATED], {}
        if artifact:
            theirs, its_problem = _logged(artifact)
            differs = basis_of(artifact).differs(basis, NOTHING) or [text for text in (problem, its_problem) if text]
            figures = _by_figure(artifact.summary.get("rows"))
        paired = {}
        if not differs:
            suite = Suite("compare", "", "", [{"task": task} for task in ours.results])
            paired = _by_figure(rows(ours, theirs, suite, seed))
        for key, table in tables.items():
            line = Line(run.name, figures[key]["tuned"] if key in figures else None)
            row = paired.get(key)
            if row is None or row["p"] is None:
                line.reason = "; ".join(differs) or (row and row["note"]) or NOT_EVALUATED
            else:
                line.change, line.p = row["difference"], row["p"]
            table.lines.append(line)
    yield from tables.values()


def _by_figure(rows: list[dict] | None) -> dict[tuple, dict]:
    """Rows of a suite by task, metric and filter."""
    return {(row["task"], row["metric"], row["filter"]): row for row in rows or []}


def _logged(artifact: Artifact):
    """(the harness's results of the tuned model, None), or (None, what is missing)."""
    from preflab.harness.results import ModelResults, add_results

    side, paths = ModelResults(), sorted(artifact.path.parent.glob("tuned-*/**/results_*.json"))
    newest = {path.parent: path for path in paths}
    if not newest:
        return None, f"{artifact.path.parent}: the harness's samples are missing"
    try:
        for path in newest.values():
            add_results(side, path, None, 0.0)
    except (UserError, KeyError, ValueError) as error:
        return None, str(error)
    return side, None


HEAD = ("value [95% interval]", "difference [95% interval]", "p", "p, Holm", "verdict")


def stage_tables(figures: list[Compared]) -> list[Table]:
    """One table per stage: under each figure the baseline and the runs that are comparable with it."""
    tables: dict[tuple, Table] = {}
    for compared in figures:
        kind, lines = compared.kind, []
        for number, line in enumerate(compared.lines):
            value = _shown(kind, line.value)
            if number == 0:
                lines.append((f"{line.run} (baseline)", value, "", "", "", ""))
            elif line.comparable:
                change = difference(line.change, None, kind.scale, kind.digits)
                lines.append((line.run, value, change, p_value(line.p), p_value(line.p_holm), compared.verdict(line)))
        if len(lines) > 1:
            key = (compared.stage, compared.basis)
            doubts = list(dict.fromkeys(line.doubt for line in compared.lines if line.doubt))
            doubted = f". No claim: {'; '.join(doubts)}" if doubts else ""
            empty = Table([("run", *HEAD)], compared.stage, f"on {compared.basis}{doubted}")
            tables.setdefault(key, empty).lines += [(kind.label,), *lines]
    return list(tables.values())


def _shown(kind: Kind, value: dict | None) -> str:
    if value is None:
        return "-"
    return (estimate if value["ci95"] else cell)(value, kind.scale, kind.digits)


def left_out(figures: list[Compared]) -> Table | None:
    """The runs that are not comparable with the baseline, by stage, with the reason: never in the others' column."""
    figures_of: dict[tuple, list[str]] = {}
    for compared in figures:
        for line in compared.lines[1:]:
            if not line.comparable:
                shown = f"{compared.kind.label}: {_shown(compared.kind, line.value)}"
                figures_of.setdefault((compared.stage, line.run, line.reason or ""), []).append(shown)
    lines = [
        (stage, run, reason, "-" if reason == NOT_EVALUATED else "; ".join(shown))
        for (stage, run, reason), shown in figures_of.items()
    ]
    return Table([("stage", "run", "why it is not compared", "its figures"), *lines]) if lines else None
