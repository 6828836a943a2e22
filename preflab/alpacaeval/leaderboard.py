"""A local judge against a leaderboard's: published judgements of AlpacaEval (GPT-4 Turbo's) serve as labels.

Two questions: does the judge agree on single instructions more than `longer` does, and does it rank the models alike?
"""

from pathlib import Path

import numpy as np

from preflab.alpacaeval.files import read_annotations
from preflab.data.pair_rows import Pair
from preflab.judging.audit import audit_items
from preflab.judging.audit_run import audit_judges
from preflab.judging.judge_prompt import Judge, Verdict
from preflab.judging.judges import judge_all
from utils.artifacts import metric
from utils.errors import UserError
from utils.provenance import sha256_of_files, shorten_paths
from utils.stage import Report, fits_terminal
from utils.stats import bootstrap, rank_correlation, share
from utils.tables import cell, estimate
from utils.tables import render as render_table

# A rank correlation of two models is 1 or -1.
FEWEST_MODELS = 3


def read_labels(paths: list[str], most: int, seed: int) -> tuple[list[dict], dict]:
    """The judgements of several models' answers on the same sample of instructions, and what was read.

    Args:
        paths: one annotations file per model. most: number of instructions.

    Raises:
        UserError: a file that cannot be read, two files of one model or of different judges, or none in common.
    """
    files = {path: read_annotations(Path(path)) for path in paths}
    models, judges = {}, set()
    for path, rows in files.items():
        model = str(rows[0]["generator_2"])
        if model in models:
            raise UserError(f"--audit_annotations {path}: judges {model}, as {models[model]} does; give one per model")
        models[model] = path
        judges |= {str(row["annotator"]) for row in rows}
    if len(judges) > 1:
        raise UserError(f"--audit_annotations: judgements of several judges ({', '.join(sorted(judges))}); give one's")
    common = sorted(set.intersection(*({row["instruction"] for row in rows} for rows in files.values())))
    if not common:
        raise UserError("--audit_annotations: the files have no instruction in common")
    chosen = set(common if len(common) <= most else np.random.default_rng(seed).choice(common, most, replace=False))
    labels, left_out = [], {"no_verdict": 0, "tie": 0, "identical": 0}
    for model, path in models.items():
        for row in files[path]:
            if row["instruction"] not in chosen:
                continue
            if row["preference"] is None or row["output_1"] == row["output_2"]:
                left_out["no_verdict" if row["preference"] is None else "identical"] += 1
                continue
            labels.append({**row, "model": model})
    about = {
        "judge": judges.pop(),
        "models": list(models),
        "instructions": len(chosen),
        "files": {shorten_paths(path): sha256_of_files([Path(path)]) for path in paths},
        "left_out": left_out,
    }
    return labels, about


def labelled(rows: list[dict], about: dict) -> tuple[list[Pair], list[dict]]:
    """(pairs whose better answer the label names, their rows); ties have none and are counted in `left_out`."""
    decided = [row for row in rows if row["preference"] != 1.5]
    about["left_out"]["tie"] = len(rows) - len(decided)
    pairs = []
    for row in decided:
        outputs = (row["output_1"], row["output_2"])
        better, worse = outputs if row["preference"] < 1.5 else outputs[::-1]
        messages = [{"role": "user", "content": row["instruction"]}]
        pairs.append(Pair(better, worse, messages, source=f"{row['model']}: {row['instruction'][:60]!r}"))
    return pairs, decided


def compare_with_labels(paths: list[str], judges: list[Judge], controls: list[Judge], args, c) -> dict:
    """Audit the judges on published judgements.

    Args:
        args: audit_limit, the number of instructions. c: eval_out, overwrite, seed.

    Returns:
        about: what was read; audit: from `audit_judges`; metrics; models: `{model: {label, judge: win rate}}`;
        rows: one per labelled pair.
    """
    labels, about = read_labels(paths, args.audit_limit, c.seed)
    pairs, rows = labelled(labels, about)
    if not pairs:
        raise UserError("--audit_annotations: no judgement names a better answer")
    text = f"judgements of {about['judge']} on {', '.join(about['models'])}"
    audit = audit_judges((pairs, text, about), judges, controls, c)
    items = audit_items(pairs)
    # Of every judge on the answer of the model, from 0 to 1, mean of both orders. The verdicts are cached.
    scores = {j.name: _scores(judge_all(j, items, c.eval_out), rows) for j in [*judges, *controls]}
    preference = np.array([row["preference"] - 1 for row in rows])
    models = {
        model: {"label": _rate(preference, rows, model, c.seed)}
        | {name: _rate(values, rows, model, c.seed) for name, values in scores.items()}
        for model in about["models"]
    }
    metrics = {"labels_for_reference": share(preference < 0.5, c.seed, groups=_instructions(rows))}
    for name, values in scores.items():
        prefix = "" if name == judges[0].name else f"{name}_"
        metrics[f"{prefix}agreement"] = _agreement(values, preference, rows, c.seed)
        metrics[f"{prefix}preference_correlation"] = _correlation(values, preference, rows, c.seed)
        if len(about["models"]) >= FEWEST_MODELS:
            metrics[f"{prefix}rank_correlation"] = _ranks(values, preference, rows, about["models"], c.seed)
    written = [
        {**{k: row[k] for k in ("instruction", "model", "preference")},
         "judges": {name: None if np.isnan(values[k]) else float(values[k]) for name, values in scores.items()}}
        for k, row in enumerate(rows)
    ]  # fmt: skip
    return {"about": about, "audit": audit, "metrics": metrics, "models": models, "rows": written,
            "names": [judge.name for judge in [*judges, *controls]]}  # fmt: skip


def _scores(verdicts: list[Verdict], rows: list[dict]) -> np.ndarray:
    """The judge's score of the model's answer in each pair, shape (pairs,); NaN without a verdict in both orders."""
    scores = []
    for k, row in enumerate(rows):
        first, second = (verdict.first for verdict in verdicts[2 * k : 2 * k + 2])
        if first is None or second is None:
            scores.append(np.nan)
            continue
        better = (first + 1 - second) / 2
        # The better answer by the label is the model's, output_2, or the reference's.
        scores.append(better if row["preference"] > 1.5 else 1 - better)
    return np.array(scores)


def _instructions(rows: list[dict]) -> list[str]:
    return [row["instruction"] for row in rows]


def _rate(values: np.ndarray, rows: list[dict], model: str, seed: int) -> dict:
    chosen = np.array([row["model"] == model for row in rows]) & ~np.isnan(values)
    return share(values[chosen], seed) if chosen.any() else metric(None)


def _agreement(values: np.ndarray, preference: np.ndarray, rows: list[dict], seed: int) -> dict:
    """Mean score of the answer that the label prefers."""
    judged = ~np.isnan(values)
    right = np.where(preference > 0.5, values, 1 - values)[judged]
    groups = [text for text, known in zip(_instructions(rows), judged, strict=True) if known]
    return share(right, seed, groups=groups) if len(right) else metric(None)


def _correlation(values: np.ndarray, preference: np.ndarray, rows: list[dict], seed: int) -> dict:
    """Spearman's correlation of the judge's score and the label's preference over all pairs."""
    judged = ~np.isnan(values)
    table = np.stack([values[judged], preference[judged]], 1)
    groups = [text for text, known in zip(_instructions(rows), judged, strict=True) if known]
    return bootstrap(table, seed, 500, statistic=rank_correlation, bca=False, groups=groups)


def _ranks(values: np.ndarray, preference: np.ndarray, rows: list[dict], models: list[str], seed: int) -> dict:
    """Spearman's correlation of the models' win rates under judge and labels; instructions are resampled."""
    places = {text: k for k, text in enumerate(dict.fromkeys(_instructions(rows)))}
    # Shape (instructions, models, 2): the judge's score and the label's preference, NaN without a judgement.
    table = np.full((len(places), len(models), 2), np.nan)
    for row, value, label in zip(rows, values, preference, strict=True):
        if not np.isnan(value):
            table[places[row["instruction"]], models.index(row["model"])] = value, label

    def statistic(resampled):
        sums = np.nansum(resampled.reshape(-1, len(models), 2), 0)
        counts = (~np.isnan(resampled.reshape(-1, len(models), 2))).sum(0)
        return rank_correlation(sums / np.maximum(counts, 1))

    return bootstrap(table.reshape(len(places), -1), seed, 500, statistic=statistic, bca=False)


@fits_terminal
def render(result: dict, title: str) -> Report:
    """The table of judges, the win rates of the models under each, the audit and its verdict."""
    m, about, names = result["metrics"], result["about"], result["names"]
    lines = [("", *_headings(names))]
    keys = {
        "agreement": ("agreement with labels, %", 100, 1),
        "preference_correlation": ("rank correlation, pairs", 1, 2),
        "rank_correlation": ("rank correlation, models", 1, 2),
    }
    for key, (label, scale, digits) in keys.items():
        values = [m.get(key if k == 0 else f"{name}_{key}") for k, name in enumerate(names)]
        if values[0]:
            lines.append((label, *(estimate(value, scale, digits) for value in values)))
    rates = [("win rate against the reference, %", "labels", *_headings(names))]
    rates += [(model, *(cell(of[key], 100) for key in ("label", *names))) for model, of in result["models"].items()]
    left_out = ", ".join(f"{reason.replace('_', ' ')} {count}" for reason, count in about["left_out"].items() if count)
    models = "1 model" if len(about["models"]) == 1 else f"{len(about['models'])} models"
    notes = [
        f"Labels: {about['judge']}, {about['instructions']} instructions, {models};"
        f" {estimate(m['labels_for_reference'], 100)}% of the labels prefer the reference."
        + (f" Left out: {left_out}." if left_out else ""),
    ]
    if len(about["models"]) < FEWEST_MODELS:
        notes.append(f"No correlation over models: it needs files of at least {FEWEST_MODELS} models.")
    audit = result["audit"]
    verdict = audit["verdict"]
    blocks = [render_table(title, lines), *notes, render_table("models", rates), audit["table"], verdict]
    return Report("\n\n".join(blocks), verdict)


def _headings(names: list[str]) -> list[str]:
    """Column headings: judges by number where there are several, controls by name."""
    judges = [name for name in names if name not in ("longer", "random")]
    heading = {name: "judge" if len(judges) == 1 else f"judge {k}" for k, name in enumerate(judges, 1)}
    return [heading.get(name, name) for name in names]
