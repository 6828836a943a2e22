"""The steps of eval_reward_model.py: scorers, rows, scores, metrics, report."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from preflab.data.sources import reading
from preflab.evaluation.reward_slices import calibration_bins
from preflab.evaluation.rewards import prompts_of
from preflab.pairs.scorers import Scorer, make_scorer, scorer_options
from preflab.rewards import benchmarks, best_of_n, metrics
from preflab.rewards import report as reports
from preflab.rewards.labelled import LabelledData, held_out_sources, leave_out_trained, load_labelled
from utils.errors import UserError
from utils.secrets_in_text import without_secrets
from utils.stage import Report


@dataclass
class Scored:
    """The scores of all rows.

    Attributes:
        rows: of the scorer (`metrics.score_rows`).
        other: rows of the second scorer by number; None without one.
        failures: {reason: rows without scores}.
        samples: per prompt of --best_of: rewards, chars, and `other`, each of shape (samples,).
    """

    rows: list[dict]
    other: dict[int, dict] | None
    failures: Counter = field(default_factory=Counter)
    samples: list[dict] = field(default_factory=list)


def make_scorers(args) -> list[Scorer]:
    """The scorers of --scorer and --against. Raises UserError for one that cannot be made."""
    if "columns" in (args.scorer, args.against):
        raise UserError("--scorer columns: labelled answers hold no scores to read; name another scorer")
    return [make_scorer(spec, scorer_options(args)) for spec in (args.scorer, args.against) if spec]


def load(args) -> LabelledData:
    """The labelled rows, without those that a scorer's run was trained on."""
    if args.dataset_name:
        source = {"name": args.dataset_name, "config": args.dataset_config, "revision": args.dataset_revision}
        sources = [{**source, "split": args.split, **reading(args.columns, args.on_bad_row)}]
    else:
        sources = held_out_sources(args.scorer)
    data = load_labelled(sources, args.category_key, args.limit)
    leave_out_trained(data, [spec for spec in (args.scorer, args.against) if spec])
    if args.benchmark == "rewardbench" and any(len(item.answers) != 2 for item in data.items):
        raise UserError("--benchmark rewardbench: rows are pairs; these hold lists of answers: rewardbench2")
    if args.benchmark == "rewardbench2" and all(len(item.answers) == 2 for item in data.items):
        raise UserError("--benchmark rewardbench2: rows hold lists of answers; these are pairs: rewardbench")
    return data


def score(args, scorers: list[Scorer], data: LabelledData) -> Scored:
    """Score all rows, and the samples of --best_of, with all scorers; cached item by item.

    Raises:
        UserError: the scorer gave no score at all.
    """
    samples = best_of_n.read_samples(args.best_of, args.best_of_split, args.limit) if args.best_of else []
    items = [item.candidates() for item in data.items]
    # One call per scorer, so that its model is loaded once.
    results = [s.score([*items, *(item for item, _ in samples)], args.eval_out, args.overwrite) for s in scorers]
    own = results[0][: len(items)]
    rows = metrics.score_rows(data.items, own)
    failures = Counter(result for result in own if isinstance(result, str))
    if not rows:
        raise UserError(f"--scorer {without_secrets(args.scorer)}: no row has scores; the first: {own[0]}")
    other = None
    if len(results) > 1:
        other = {row["row"]: row for row in metrics.score_rows(data.items, results[1][: len(items)])}
    scored = Scored(rows, other, failures)
    for k, (item, order) in enumerate(samples, len(items)):
        of_prompt = [scorer_results[k] for scorer_results in results]
        if any(isinstance(result, str) for result in of_prompt):
            scored.failures.update(result for result in of_prompt if isinstance(result, str))
            continue
        columns = [[result.scores[i] for i in order] for result in of_prompt]
        chars = [len(item.answers[i]) for i in order]
        scored.samples.append(
            {"rewards": columns[0], "chars": chars, "other": columns[1] if len(columns) > 1 else None}
        )
    return scored


def metrics_of(args, scored: Scored, data: LabelledData) -> tuple[dict, dict]:
    """(metrics of pairs, {} where rows are lists; sections: categories, benchmark, best_of, other, failures)."""
    pairs = [row for row in scored.rows if "margin" in row]
    of_pairs = metrics.pair_metrics(pairs, scored.other, args.seed) if len(pairs) == len(scored.rows) else {}
    benchmark = {}
    if args.benchmark:
        average = benchmarks.reward_bench if args.benchmark == "rewardbench" else benchmarks.reward_bench_2
        benchmark = average(scored.rows, args.seed)
        if not benchmark:
            raise UserError(
                f"--benchmark {args.benchmark}: no row has one of its subsets (--category_key names the column)"
            )
    elif not of_pairs:
        benchmark = benchmarks.reward_bench_2(scored.rows, args.seed)
    sections = {
        "categories": metrics.category_metrics(pairs, args.seed) if of_pairs else {},
        "benchmark": benchmark,
        "best_of": best_of_n.curve(scored.samples, args.most, args.seed) if scored.samples else [],
        "other": without_secrets(args.against) if args.against else None,
        "failures": dict(scored.failures),
    }
    return of_pairs | {"scored_share": metrics.scored_share(len(data.items), len(scored.rows))}, sections


def flat(sections: dict) -> dict:
    """Categories and benchmark as metrics, `category/NAME` and `benchmark/NAME`."""
    named = (("category", sections["categories"]), ("benchmark", sections["benchmark"]))
    return {f"{kind}/{name}": m for kind, content in named for name, m in content.items()}


def report(name: str, args, of_pairs: dict, sections: dict, data: LabelledData) -> Report:
    """The printed report."""
    shown = {} if "reward_accuracy" not in of_pairs else of_pairs
    return reports.render(name, data_of(data), shown, sections, data.note, data.not_held_out)


def data_of(data: LabelledData) -> str:
    """The rows, in words."""
    names = ", ".join(dict.fromkeys(f"{s.get('name')} {s.get('split') or ''}".strip() for s in data.facts["sources"]))
    return f"{len(data.items)} rows of {names}"


def figure(path, name: str, args, of_pairs: dict, sections: dict, scored: Scored) -> None:
    """Draw the picture."""
    pairs = [row for row in scored.rows if "margin" in row] if "reward_accuracy" in of_pairs else []
    margin = np.array([row["margin"] for row in pairs])
    bins = calibration_bins(margin, args.seed, prompts_of(pairs)) if pairs else []
    reports.draw(path, name, of_pairs, bins, sections["best_of"], sections["categories"] or sections["benchmark"])
