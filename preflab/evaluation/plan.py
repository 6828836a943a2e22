"""--plan: how many prompts a comparison needs, from a pilot: a small number of prompts, or an earlier result."""

import re
from pathlib import Path

from utils.artifacts import check_writable, metric, read_json
from utils.errors import UserError
from utils.power import pilot_from_record, plan_rows, plan_table, points
from utils.stage import Report, Stage, fits_terminal
from utils.tables import duration, number, paragraphs

# The metric that a stage's verdict is about; of a battle against an opponent, the difference.
METRICS = {
    "win_rate": ("win_rate_ties_half",),
    "battle": ("win_rate_difference", "win_rate"),
    "alpacaeval": ("difference_win_rate",),
    "human_eval": ("win_rate",),
}


def pilot_size(plan: str | None, limit: int | None) -> int | None:
    """The number of prompts of `--plan N`; None for a file or without --plan.

    Raises:
        UserError: not above 0, or --limit beside it.
    """
    if plan is None or not re.fullmatch(r"[+-]?[0-9]+", plan):
        return None
    if int(plan) < 1:
        raise UserError(f"--plan {plan}: must be a number of prompts above 0, or the JSON of an earlier result")
    if limit is not None:
        raise UserError(f"--plan {plan} with --limit {limit}: the plan's number is the limit of the pilot; give one")
    return int(plan)


def pilot_file(plan: str | None, limit: int | None) -> Path | None:
    """The file of `--plan FILE`; None for a number or without --plan."""
    if plan is None or pilot_size(plan, limit) is not None:
        return None
    if not Path(plan).expanduser().is_file():
        raise UserError(f"--plan {plan}: neither a number of prompts above 0 nor the JSON of an earlier result")
    return Path(plan).expanduser()


def plan_from_file(stage: Stage, path: Path, output_dir: str | None, seed: int) -> None:
    """Print the plan from an earlier result of this stage and write <stem>_plan.json.

    Raises:
        UserError: no such file, a result of another stage, or one without figures for a plan.
    """
    summary = read_json(path)
    if not isinstance(summary, dict) or summary.get("stage") != stage.name:
        other = summary.get("stage") if isinstance(summary, dict) else None
        raise UserError(f"--plan {path}: needs the summary of an earlier result ({stage.name}.json), not {other}")
    folder = check_writable(output_dir or path.parent, "--output_dir")
    try:
        publish_plan(stage, summary, folder / path.name, seed)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--plan {path}: not as the stage writes it ({error!r}); run the evaluation again") from None


def publish_plan(stage: Stage, summary: dict, path: Path, seed: int) -> None:
    """Print the plan that follows from a pilot's summary and write <stem>_plan.json.

    Args:
        path: of the pilot's summary.
    """
    name = next((name for name in METRICS[stage.name] if name in summary["metrics"]), None)
    record = (summary["metrics"][name] or {}).get("power") if name else None
    if not record:
        raise UserError(f"{path}: no figures for a plan; judge more prompts, or run the evaluation again")
    pilot, seconds = pilot_from_record(record), seconds_per_prompt(summary)
    if not (pilot.decided or pilot.deviation):
        raise UserError(f"{path}: the pilot's {pilot.n} {record['unit']} are all equal; use a larger pilot")
    # AlpacaEval's rates are percentages already.
    shown = (lambda x: f"{number(x, 1)} points") if stage.name == "alpacaeval" else points
    needed = pilot.needed(pilot.mean)
    rows = plan_rows(pilot, needed, seconds)
    plan = {"metric": name, "pilot": record, "seconds_per_unit": seconds, "rows": rows}
    report = render(plan, needed, shown, stage.name, summary.get("run", {}).get("run_name"))
    metrics = {f"detectable_{row['n']}": metric(row["detectable"], n=row["n"]) for row in rows}
    stage.publish(
        path.with_name(f"{path.stem}_plan.json"),
        summary.get("model", {}),
        metrics,
        report,
        run={"run_name": summary.get("run", {}).get("run_name"), "limit": summary.get("run", {}).get("limit")},
        seed=seed,
        plan=plan,
    )


@fits_terminal
def render(plan: dict, needed: int | None, shown, stage: str, run_name: str | None) -> Report:
    """The table and what to read from it.

    Args:
        plan: the artifact's section.
        needed: rows that the pilot's own difference needs.
        shown: formats a difference.
    """
    pilot, seconds = plan["pilot"], plan["seconds_per_unit"]
    n, unit = pilot["n"], pilot["unit"]
    title = f"{run_name or stage}: plan from a pilot of {n} {unit}"
    table = plan_table(plan["rows"], n, needed, unit, title, shown)
    ties = "" if pilot["ties"] is None else f" {pilot['ties']:.0%} of the pilot are ties."
    verdict = f"The pilot's own difference, {shown(pilot['observed'])}, needs about {needed:,} {unit}" if needed else ""
    time = duration(needed * seconds) if needed and seconds is not None else ""
    verdict += f" ({time})." if time else "." if needed else "The pilot shows no difference."
    notes = [
        f"Power 80% at a two-sided level of 5%.{ties} The pilot's difference itself is uncertain: choose the smallest"
        " difference that would matter, and take its row."
    ]
    if stage == "human_eval":
        notes.append("Time: one vote per prompt by one annotator, at the median of the votes so far.")
    elif seconds is None:
        notes.append("Time: not known, since the pilot's results were cached or given.")
    else:
        notes.append("Time: as the pilot's, on the same machine; loading a judge is included, so that more take less.")
    return Report("\n\n".join([table, paragraphs(*notes), verdict]), verdict)


def seconds_per_prompt(summary: dict) -> float | None:
    """Wall time per unit of a result, scaled to all of its work where a part was cached; None if it is not known."""
    metrics = summary["metrics"]
    if summary["stage"] == "human_eval":
        return metrics.get("seconds_median", {}).get("value")
    work = summary.get("work") or {}
    n = next(m["n"] for name in METRICS[summary["stage"]] if (m := metrics.get(name)))
    # Without a computed part nothing was measured; controls compute nothing.
    phases = [phase for phase in work.values() if phase["of"]]
    if not phases or not n or any(not phase["computed"] for phase in phases):
        return None
    return sum(phase["seconds"] * max(1.0, phase["of"] / phase["computed"]) for phase in phases) / n
