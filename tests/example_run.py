"""docs/example_run, recomputed from its committed rows by the current code.

    python tests/example_run.py      # rewrite metrics, claims, texts and pictures

Rows come from a run; everything else follows from them. tests/end_to_end/test_docs.py fails where a committed file
differs from what this file computes.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "example_run"
sys.path.insert(0, str(ROOT))

from utils.artifacts import dumps, write_json  # noqa: E402

SEED = 42
NOTE = "metrics, claim, text and pictures follow from the committed rows (python tests/example_run.py)"


def summary(name: str) -> dict:
    """A committed summary file."""
    return json.loads((EXAMPLE / f"{name}.json").read_text())


def rows(name: str) -> list[dict]:
    """Committed rows."""
    return [json.loads(line) for line in (EXAMPLE / f"{name}.jsonl").read_text().splitlines()]


def title_of(name: str) -> str:
    """The title of the printed report."""
    return summary(name)["text"].splitlines()[0].removeprefix("# ")


def reported(report, **sections) -> dict:
    """The sections of a summary that a report and its metrics fill."""
    return {**sections, "claim": report.verdict, "text": report.text}


def train() -> dict:
    from preflab.data.preferences import load_pairs
    from preflab.evaluation.rewards import reward_metrics
    from preflab.evaluation.surface_baseline import bag_of_words_scores
    from preflab.training import dpo_report

    sides = []
    for split in ("train", "test"):
        data = load_pairs([{"name": str(ROOT / "data/quickstart_prefs"), "split": split}])
        sides.append([(pair.chosen, pair.rejected) for pair in data.pairs])
    metrics = reward_metrics(rows("heldout_rows"), bag_of_words_scores(*sides), SEED)
    report = dpo_report.render(metrics, title_of("train"))
    return reported(report, metrics=metrics, warning=report.warning)


def win_rate() -> dict:
    from preflab.evaluation import win_rate_report
    from preflab.evaluation.reward_slices import calibration_bins, margins, slices, win_rate_metrics

    before, pairs = summary("win_rate"), rows("win_rate_rows")
    metrics = win_rate_metrics(pairs, before["args"]["beta"] or 0.1, before["data"]["dropped"], SEED)
    by_slice = slices(pairs, SEED)
    left_out = next(part for part in before["text"].split("\n\n") if "rows evaluated" in part).replace("\n", " ")
    report = win_rate_report.render(metrics, by_slice, before["length_bias"], None, title_of("win_rate"), left_out)
    bins = calibration_bins(margins(pairs), SEED)
    return reported(report, metrics=metrics, slices=by_slice, calibration=bins)


def perplexity() -> dict:
    from preflab.evaluation import perplexity_report
    from preflab.evaluation.perplexity import perplexity_metrics

    before, scored = summary("perplexity"), rows("perplexity_rows")
    of = {kind: [row for row in scored if row["set"] == kind] for kind in ("pairs", "text")}
    pairs = SimpleNamespace(
        rows=of["pairs"], data=SimpleNamespace(dropped=before["data"]["pairs"]["dropped"], rows=120)
    )
    metrics, _ = perplexity_metrics(pairs, SimpleNamespace(rows=of["text"]), False, SEED)
    left_out = next(part for part in before["text"].split("\n\n") if "rows evaluated" in part).replace("\n", " ")
    report = perplexity_report.render(metrics, before["length_bias"], title_of("perplexity"), left_out)
    return reported(report, metrics=metrics)


def battle() -> dict:
    from preflab.judging import battle_report
    from preflab.judging.battle_metrics import battle_sections

    before, judged = summary("battle"), rows("battle_rows")
    main, *controls = before["matches"][0]["judges"]
    answers = {"base": [row["answer_b"] for row in judged], "tuned": [row["answer_a"] for row in judged]}
    by_judge = {main: judged} | {name: [control_row(row, name) for row in judged] for name in controls}
    sections = battle_sections(by_judge, answers, [("tuned", "base")], ["base", "tuned"], SEED)
    # The rows hold one score per control, not what it gave in each order.
    for name in controls:
        for key in ("flip_rate", "first_slot_wins", "unparsed_verdicts", "identical_answers"):
            sections["matches"][0]["judges"][name][key] = before["matches"][0]["judges"][name][key]
            sections["metrics"][f"{name}_{key}"] = before["metrics"][f"{name}_{key}"]
    report = battle_report.render(sections, None, title_of("battle"), before["data"])
    return reported(report, **sections)


def control_row(row: dict, name: str) -> dict:
    """A battle's row under a control, of which the rows hold one score per prompt."""
    score = row["controls"][name]
    orders = [{"first": first, "label": "", "mass": None} for first in (score, 1 - score)]
    extra = {"orders": orders, "consistent": score, "average": score, "probability": None, "flipped": False}
    return {**row, **extra, "votes": [score * 2, 2]}


def sppo_trait() -> dict:
    from benchmarks.sppo_trait import compare

    curves = {label: np.array(values) for label, values in summary("sppo_trait")["letters"].items()}
    return {"metrics": compare(curves, curves["scored"][0, 0])[0]}


SUMMARIES = {"train": train, "win_rate": win_rate, "perplexity": perplexity, "battle": battle, "sppo_trait": sppo_trait}


def same(a, b) -> bool:
    """Whether two JSON values are equal up to rounding of numbers."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return (a is None) == (b is None) and (a is None or bool(np.isclose(a, b, rtol=1e-5, atol=1e-8)))
    return a == b


def recomputed(name: str) -> dict:
    """The recomputed sections of a summary, as JSON holds them."""
    return json.loads(dumps(SUMMARIES[name]()))


def draw(folder: Path) -> None:
    """Draw every picture of the example run into `folder`."""
    from benchmarks import sppo_trait
    from preflab.evaluation import perplexity_report, win_rate_report
    from preflab.harness import report as harness_report
    from preflab.judging.battle_report import battle_figure
    from preflab.training.curves import dpo_curves

    dpo_curves(folder / "dpo_training_curves.png", rows("train_log"), title_of("train"), summary("train")["warning"])
    ratios = summary("win_rate")
    win_rate_report.draw(folder / "win_rate.png", rows("win_rate_rows"), ratios["calibration"], title_of("win_rate"))
    scored = rows("perplexity_rows")
    of = [[row for row in scored if row["set"] == kind] for kind in ("pairs", "text")]
    perplexity_report.draw(folder / "perplexity.png", summary("perplexity")["metrics"], *of, title_of("perplexity"))
    battle_figure(folder / "battle.png", summary("battle"), title_of("battle"))
    harness = SimpleNamespace(rows=summary("lm_eval_quick")["rows"], title=title_of("lm_eval_quick"), alone=False)
    harness_report.draw(folder / "lm_eval_quick.png", harness)
    curves = {label: np.array(values) for label, values in summary("sppo_trait")["letters"].items()}
    sppo_trait.draw(folder / "sppo_trait.png", curves, "SPPO with a toy scorer that likes short words")


def rewrite() -> None:
    """Bring the committed files up to date with the code."""
    for name in SUMMARIES:
        content = summary(name)
        write_json(EXAMPLE / f"{name}.json", {**content, **recomputed(name), "recomputed": NOTE})
    draw(EXAMPLE)


if __name__ == "__main__":
    rewrite()
