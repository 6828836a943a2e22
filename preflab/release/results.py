"""The results in three forms: tables of the card, the model index, and the hub's `.eval_results/*.yaml`."""

import math
from dataclasses import dataclass

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from preflab.models.public_names import public_source
from preflab.release.figures import MARK, Figure, figures_of, metric_at
from preflab.release.sources import Document, Sources, name_in, public_text
from preflab.reporting.artifacts import TRAINING, Artifact, RunArtifacts
from preflab.reporting.findings import doubt_about_judge
from preflab.reporting.stages import STAGES, title_of
from preflab.reporting.status import stale_reasons
from utils.markdown import visible
from utils.tables import markdown_table

# Benchmarks of the hub's leaderboards and their task ids, by lm-eval's task and metric.
BENCHMARKS = {
    "gsm8k": ("openai/gsm8k", "gsm8k", "exact_match"),
    "mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "exact_match"),
    "leaderboard_mmlu_pro": ("TIGER-Lab/MMLU-Pro", "mmlu_pro", "acc"),
    "leaderboard_gpqa_diamond": ("Idavidrein/gpqa", "diamond", "acc_norm"),
}
# What decides the value where a task has several filters.
FILTERS = ("strict-match", "custom-extract", "none")


@dataclass
class Section:
    """A stage's part of the card."""

    title: str
    question: str
    table: str
    claim: str
    judge: str | None
    note: str | None


def used(run: RunArtifacts) -> tuple[list[Artifact], list[str]]:
    """(the summaries whose figures the card shows, why the others are left out)."""
    shown, left_out = [], list(run.problems)
    for artifact in run.artifacts:
        if artifact.problem or artifact.stage not in STAGES:
            continue
        if artifact not in run.of_stage(artifact.stage):
            left_out.append(f"{artifact.path}: a trial (--limit {artifact.limit:g})")
            continue
        stale = stale_reasons(artifact, run)
        # Training's data may have changed since: the weights are still those of that training.
        if stale and artifact.stage not in TRAINING:
            left_out.append(f"{artifact.path}: stale: {'; '.join(stale)}")
            continue
        try:
            shown += [artifact] if figures_of(artifact) else []
        except (KeyError, TypeError, AttributeError) as error:
            left_out.append(f"{artifact.path}: is not as its stage writes it ({error!r})")
    return shown, left_out


def document_of(artifact: Artifact, run: RunArtifacts) -> Document:
    """A summary as the card's sources name it."""
    return Document(name_in(artifact.path, run.run.results), artifact.summary)


def section_of(artifact: Artifact, run: RunArtifacts, sources: Sources) -> Section:
    """One stage's table with its question and verdict."""
    document, sources.section = document_of(artifact, run), title_of(artifact)
    why = doubt_about_judge(artifact)
    lines = [["figure", "base", "tuned", "tuned - base", "p"]]
    for figure in figures_of(artifact):
        mark = f" {MARK}" if why and figure.judged else ""
        cells = [
            sources.estimate(document, *keys, scale=figure.scale, digits=figure.digits, sign=sign) + mark
            if metric_at(artifact.summary, keys)
            else "-"
            for keys, sign in ((figure.base, ""), (figure.tuned, ""), (figure.change, "+"))
        ]
        lines.append([sources.name(figure.label, document), *cells, _p(figure, artifact, document, sources)])
    # The verdict of training is at the top of the card.
    has_claim = artifact.summary.get("claim") and artifact.stage not in TRAINING
    claim = sources.text(document, "claim") if has_claim else ""
    judge = None
    if artifact.args.get("judge"):
        # Several are a panel.
        judges = artifact.args["judge"]
        judges = ", ".join(judges) if isinstance(judges, list) else str(judges)
        judge = sources.name(public_text(judges), document, "args", "judge")
    return Section(
        title=sources.name(title_of(artifact), document),
        question=STAGES[artifact.stage].question,
        table=markdown_table(lines),
        claim=claim,
        judge=judge,
        note=f"{MARK} {why}: these figures support no claim." if why else None,
    )


def _p(figure: Figure, artifact: Artifact, document: Document, sources: Sources) -> str:
    keys = figure.p or ()
    if metric_at(artifact.summary, keys):
        return sources.p(document, *keys, "value")
    # Of lm-eval's rows, the corrected p-value is a number.
    try:
        value = document.at(keys)
    except (KeyError, IndexError, TypeError):
        return "-"
    return sources.p(document, *keys) if keys and isinstance(value, (int, float)) else "-"


def model_index(shown: list[Artifact], run: RunArtifacts, sources: Sources) -> list[EvalResult]:
    """The tuned model's figures for the hub; those of a judge in doubt say so in their name."""
    sources.section = "model-index"
    results = []
    for artifact in shown:
        document, why = document_of(artifact, run), doubt_about_judge(artifact)
        test = (artifact.part("data").get("test") or artifact.part("data")).get("sources") or []
        data = visible(public_text(", ".join(map(public_source, test)))) or title_of(artifact)
        for figure in figures_of(artifact):
            metric = metric_at(artifact.summary, figure.tuned)
            if not figure.index or not math.isfinite(metric["value"]):
                continue
            value = float(metric["value"])
            sources.record(repr(value), "index", document, (*figure.tuned, "value"))
            doubtful = f" ({why})" if why and figure.judged else ""
            name = f"{figure.index.partition('/')[2] or figure.index}{doubtful}"
            task = figure.index.partition("/")[0] if artifact.stage == "lm_eval" else None
            results.append(
                EvalResult(
                    task_type="text-generation",
                    task_name=title_of(artifact),
                    dataset_type=task or data,
                    dataset_name=task or data,
                    metric_type=figure.index.rpartition("/")[2],
                    metric_name=name,
                    metric_value=value,
                )
            )
    return results


def eval_results(shown: list[Artifact], run: RunArtifacts, repository: str | None, sources: Sources) -> dict[str, str]:
    """`{file name: YAML}` of the hub's benchmarks that the tuned model was measured on, in percent."""
    sources.section = ".eval_results"
    files: dict[str, str] = {}
    for artifact in (a for a in shown if a.stage == "lm_eval"):
        document, rows = document_of(artifact, run), list(enumerate(artifact.summary.get("rows") or []))
        for task, (dataset, task_id, metric) in BENCHMARKS.items():
            matching = [(k, row) for k, row in rows if row["task"] == task and row["metric"] == metric]
            matching = [place for place in matching if place[1]["filter"] in FILTERS]
            matching.sort(key=lambda place: FILTERS.index(place[1]["filter"]))
            name = f"{dataset.partition('/')[2].lower()}.yaml"
            if not matching or matching[0][1]["tuned"]["value"] is None or name in files:
                continue
            k, row = matching[0]
            value = round(100 * row["tuned"]["value"], 4)
            sources.record(repr(value), "eval_results", document, ("rows", k, "tuned", "value"), scale=100, digits=4)
            shots = "" if row["shots"] is None else f"{row['shots']}-shot, "
            entry = EvalResultEntry(
                dataset_id=dataset,
                task_id=task_id,
                value=value,
                date=artifact.run.get("finished_utc"),
                source_url=f"https://huggingface.co/{repository}" if repository else None,
                source_name="Model card" if repository else None,
                notes=f"lm-evaluation-harness {task}, {shots}{row['filter']}",
            )
            files[name] = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files
