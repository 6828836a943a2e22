"""The runs in the layout of the published comparison: AlpacaEval 2, Arena-Hard, GSM8K and MMLU, with lengths."""

from dataclasses import dataclass

from preflab.alpacaeval.package import LEADERBOARD_JUDGE
from preflab.alpacaeval.report import ALPACAEVAL_SIZE
from preflab.reporting.artifacts import Artifact, RunArtifacts, part
from preflab.reporting.stages import Table, lc_name
from utils.artifacts import read_published
from utils.errors import UserError
from utils.tables import cell, number

# (key of the published file, heading, digits).
COLUMNS = (
    ("ae_lc", "AE2 LC, %", 1),
    ("ae_wr", "AE2 win rate, %", 1),
    ("ae_length", "length", 0),
    ("ah", "Arena-Hard, %", 1),
    ("ah_length", "length", 0),
    ("gsm8k", "GSM8K, %", 1),
    ("gsm8k_length", "length", 0),
    ("mmlu", "MMLU, %", 1),
    ("mmlu_length", "length", 0),
)
SIDES = ("base", "tuned")
NOT_COMPARABLE = "≠"


@dataclass
class Cell:
    """One figure of a run.

    Attributes:
        text: as shown.
        reasons: why it is not comparable with the published column; () if it is.
        artifact: the summary that it is from.
        keys: of its value in the summary; of several, the figure is their mean.
        scale: from the summary's unit to the column's.
    """

    text: str
    reasons: tuple[str, ...] = ()
    artifact: Artifact | None = None
    keys: tuple[tuple, ...] = ()
    scale: float = 1


def read_comparison(path: str) -> dict:
    """The published rows. Raises UserError for a row that is not made of numbers under the columns' keys."""
    published = read_published(path)
    known = {key for key, _, _ in COLUMNS}
    for name, row in published["rows"].items():
        if not isinstance(row, dict) or not set(row) <= known:
            raise UserError(f"--published {path}: row {name} may only have {', '.join(sorted(known))}")
        for key, value in row.items():
            if not isinstance(value, (int, float, type(None))) or isinstance(value, bool):
                raise UserError(f"--published {path}: row {name}: {key} must be a number or null")
    return published


def published_table(runs: list[RunArtifacts], published: dict) -> Table | None:
    """Published models, then base and tuned of every run with such figures; None if no run has any.

    Figures that were made otherwise than the published ones have the mark ≠, and the note says why.
    """
    ours = [(f"{run.name}: {side}", cells) for run in runs for side in SIDES if (cells := cells_of(run, side))]
    if not ours:
        return None
    lines: list[tuple] = [("model", *(heading for _, heading, _ in COLUMNS))]
    lines.append((f"published: {published['source']}; {published['setting']}",))
    for name, row in published["rows"].items():
        lines.append((str(name), *(number(row.get(key), digits) for key, _, digits in COLUMNS)))
    reasons: dict[str, None] = {}
    comparable = not any(c.reasons for _, cells in ours for c in cells.values())
    lines.append(("these runs" + ("" if comparable else f"; {NOT_COMPARABLE}: not comparable with the column above"),))
    for name, cells in ours:
        shown = []
        for key, _, _ in COLUMNS:
            figure = cells.get(key)
            reasons |= dict.fromkeys(figure.reasons if figure else ())
            mark = f"{NOT_COMPARABLE} " if figure and figure.reasons else ""
            shown.append(f"{mark}{figure.text}" if figure else "-")
        lines.append((name, *shown))
    note = "" if comparable else f"{NOT_COMPARABLE} {'; '.join(reasons)}."
    return Table(lines, "Layout of the published comparison", note)


def cells_of(run: RunArtifacts, side: str) -> dict[str, Cell]:
    """The figures of one side of a run by column; empty if it has none. Trials are left out."""
    return _alpacaeval(run, side) | _arena_hard(run, side) | _generated(run, side)


def _alpacaeval(run: RunArtifacts, side: str) -> dict[str, Cell]:
    summaries = run.of_stage("alpacaeval")
    if not summaries or f"{side}_win_rate" not in summaries[0].metrics:
        return {}
    m, judge = summaries[0].metrics, str(summaries[0].args.get("judge"))
    count = part(m, "base_unparsed").get("n")
    judged = () if judge == LEADERBOARD_JUDGE else (f"AlpacaEval judged by {judge}",)
    instructions = () if count == ALPACAEVAL_SIZE else (f"AlpacaEval on {count} instructions, not {ALPACAEVAL_SIZE}",)
    name = lc_name(m)

    def of(kind: str) -> tuple:
        return summaries[0], (("metrics", f"{side}_{kind}", "value"),)

    cells = {"ae_wr": Cell(cell(m[f"{side}_win_rate"]), judged + instructions, *of("win_rate"))}
    if f"{side}_{name}" in m:
        minimal = ("the package's minimal length control",) if "minimal" in name else ()
        cells["ae_lc"] = Cell(cell(m[f"{side}_{name}"]), judged + instructions + minimal, *of(name))
    length = m.get(f"{side}_avg_length")
    if length:
        # Lengths do not depend on the judge, but they do on the instructions.
        cells["ae_length"] = Cell(number(length["value"], 0), instructions, *of("avg_length"))
    return cells


def _arena_hard(run: RunArtifacts, side: str) -> dict[str, Cell]:
    """Battles against a fixed opponent with published scores beside them (configs/battle_arena_hard.yaml)."""
    for artifact in run.of_stage("battle"):
        if "arena" not in str(artifact.args.get("published") or artifact.args.get("prompts")):
            continue
        matches = artifact.summary.get("matches") or []
        k, match = next(((k, m) for k, m in enumerate(matches) if m.get("a") == side), (None, {}))
        judge, figures = next(iter(match.get("judges", {}).items()), (None, {}))
        kind = "win_rate_votes" if figures.get("win_rate_votes") else "win_rate"
        score = figures.get(kind)
        if not score or match.get("b") in SIDES:
            continue
        place = ("matches", k, "judges", judge, kind, "value")
        reasons = (f"Arena-Hard judged by {artifact.args.get('judge')}",)
        tokens = artifact.part("answers").get(side, {}).get("tokens")
        of_length = ("Arena-Hard lengths in tokens of the run's tokenizer",)
        of = artifact, (("answers", side, "tokens", "value"),)
        length = {"ah_length": Cell(number(tokens["value"], 0), of_length, *of)} if tokens else {}
        return {"ah": Cell(cell(score, 100), reasons, artifact, (place,), 100), **length}
    return {}


def _generated(run: RunArtifacts, side: str) -> dict[str, Cell]:
    """GSM8K and MMLU of lm-eval's suite `generated`."""
    artifact = next((a for a in run.of_stage("lm_eval") if a.suite == "generated"), None)
    if artifact is None:
        return {}
    reasons = ("GSM8K and MMLU with lm-eval's prompts and parsing, their lengths in characters",)
    averages, cells = artifact.part("averages"), {}
    lengths = artifact.part("generated_characters").get(side) or {}
    for key, name in (("gsm8k", "GSM8K generated"), ("mmlu", "MMLU generated")):
        if side in averages.get(name, {}):
            cells[key] = Cell(cell(averages[name][side]), reasons, artifact, (("averages", name, side, "value"),))
        of_task = [task for task in lengths if task.startswith(key)]
        if of_task:
            mean = sum(lengths[task] for task in of_task) / len(of_task)
            places = tuple(("generated_characters", side, task) for task in of_task)
            cells[f"{key}_length"] = Cell(number(mean, 0), reasons, artifact, places)
    return cells
