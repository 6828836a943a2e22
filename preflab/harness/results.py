"""The harness's results of one model: its figures and logged samples, read from the files of lm_eval."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from preflab.harness.calls import Call
from preflab.models.generation import not_a_number
from utils.artifacts import metric, read_json
from utils.errors import UserError
from utils.provenance import shorten_paths


@dataclass
class ModelResults:
    """The harness's results for one model, all calls together, and its samples by task.

    Attributes:
        results: `{task: {"metric,filter": value}}`. subtasks: `{group: [task]}`.
        versions, shots, higher, configs: by task, as in the harness's results; higher: whether more is better.
        samples: `{task: {(filter, doc_id): sample}}`, see `_samples`.
        headers: the line above the harness's table, one per call.
        templates: whether a chat template was used; two values if the calls differ.
        lengths: mean characters of generated answers by task.
        questions: `{task: {doc_id: question}}`, see `question_of`.
    """

    results: dict = field(default_factory=dict)
    subtasks: dict = field(default_factory=dict)
    versions: dict = field(default_factory=dict)
    shots: dict = field(default_factory=dict)
    higher: dict = field(default_factory=dict)
    configs: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)
    headers: list = field(default_factory=list)
    templates: set = field(default_factory=set)
    lengths: dict = field(default_factory=dict)
    questions: dict = field(default_factory=dict)
    first_prompt: str = ""
    seconds: float = 0.0


def read_side(calls: list[Call]) -> ModelResults:
    """The newest results of every call of one model, and all its samples."""
    side = ModelResults()
    for call in calls:
        # lm_eval puts the time into the name: results_<time>.json.
        path = max(call.folder.glob("results_*.json"), key=lambda p: p.stat().st_mtime)
        add_results(side, path, call.shots, call.seconds)
    return side


def add_results(side: ModelResults, path: Path, shots: int | None, seconds: float) -> None:
    """Add one results file of the harness and the samples of the same run to a model's results."""
    report = read_json(path)
    # Groups have their aggregated figures in a separate section.
    side.results |= {**report["results"], **report.get("groups", {})}
    # Entries without subtasks are plain tasks.
    side.subtasks |= {k: v for k, v in report.get("group_subtasks", {}).items() if v}
    for name, key in (("versions", "versions"), ("shots", "n-shot"), ("higher", "higher_is_better")):
        getattr(side, name).update(report.get(key, {}))
    side.configs |= report["configs"]
    side.headers.append(_header(report, shots))
    side.templates.add(report.get("chat_template") is not None)
    side.seconds += seconds
    # The samples of the same run have the same time in their names.
    stamp = path.stem.removeprefix("results_")
    for task in report["configs"]:
        side.samples[task] = _samples(path.parent / f"samples_{task}_{stamp}.jsonl", side, task)


def _header(report: dict, shots: int | None) -> str:
    """The line that the harness prints above its table."""
    c = report["config"]
    sizes = ",".join(map(str, c.get("batch_sizes") or []))
    return (
        f"{c['model']} ({shorten_paths(c['model_args'])}), gen_kwargs: ({c['gen_kwargs']}), limit: {c['limit']},"
        f" num_fewshot: {shots}, batch_size: {c['batch_size']}{f' ({sizes})' if sizes else ''}"
    )


def _samples(path: Path, side: ModelResults, task: str) -> dict[tuple, dict]:
    """Read logged samples as `{(filter, doc_id): {document, prompt, values, options, answer}}`.

    document and prompt are the harness's hashes, values the metrics by name, options the number of answer options.
    Also updates the side's `lengths`, `questions` and `first_prompt`.
    """
    samples, lengths = {}, []
    # Lengths only for generated text: likelihood tasks log one pair of numbers per option.
    generated = side.configs[task].get("output_type") == "generate_until"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError:
        raise UserError(f"{path}: the harness's samples are missing; --overwrite runs the task again") from None
    for line in lines:
        if not line.strip():
            continue
        row = json.loads(line)
        side.questions.setdefault(task, {})[row["doc_id"]] = question_of(row.get("doc"), side.configs[task])
        # One response per request: one per answer option of a multiple-choice task, else one.
        answers = row["resps"]
        answer = json.dumps(answers)
        # Log-likelihoods are logged as text. A NaN compares as false everywhere, so it would count as wrong answers.
        if not generated and "nan" in answer.lower():
            raise UserError(f"{path}: document {row['doc_id']}: {not_a_number(task)}")
        # A task with several filters (strict-match, flexible-extract) logs each document once per filter.
        samples[row["filter"], row["doc_id"]] = {
            "document": row["doc_hash"],
            "prompt": row["prompt_hash"],
            # The document's figures before aggregation, the data of the paired tests.
            "values": {name: row[name] for name in row["metrics"] if name in row},
            "options": len(answers),
            "answer": answer,
        }
        if generated:
            lengths.append(len(str(answers[0][0])))
        if not side.first_prompt:
            side.first_prompt = str(row["arguments"]["gen_args_0"]["arg_0"])
    if lengths:
        side.lengths[task] = sum(lengths) / len(lengths)
    return samples


# Columns of a document that hold its question, in order of preference.
QUESTION_KEYS = (
    "question", "query", "problem", "prompt", "instruction", "goal", "question_stem", "ctx", "sentence", "inputs",
    "input", "text", "passage", "context", "premise",
)  # fmt: skip


def question_of(document, config: dict) -> str:
    """A document's question without instructions, examples and answer options, to be searched in training data.

    The column that the task names for lm-eval's own decontamination, else a column that usually holds the question,
    else all text of the document.
    """
    if not isinstance(document, dict):
        return document if isinstance(document, str) else ""
    named = str(config.get("doc_to_decontamination_query") or "").strip("{} ")
    for key in (named, *QUESTION_KEYS):
        if isinstance(document.get(key), str) and document[key].strip():
            return document[key]
    return " ".join(value for value in document.values() if isinstance(value, str))


def leaves(side: ModelResults, name: str) -> list[str]:
    """The tasks of a group and its subgroups; for a task, the task itself."""
    children = side.subtasks.get(name, [])
    # Groups of groups exist, e.g. mmlu, mmlu_stem and its subjects.
    return [leaf for child in children for leaf in leaves(side, child)] if children else [name]


def figures_of(side: ModelResults, name: str) -> set[str]:
    """The keys `metric,filter` of the figures that a task or group has."""
    keys = set()
    for key, value in side.results.get(name, {}).items():
        # `alias` and other entries have no comma.
        measure, _, filtered = key.partition(",")
        if filtered and not measure.endswith("_stderr") and isinstance(value, (int, float)):
            keys.add(key)
    return keys


def reported_figures(base: ModelResults, tuned: ModelResults, name: str, measure: str, filtered: str) -> dict:
    """`{base: metric, tuned: metric}`: the harness's own figure of a task or group, with its standard error."""
    reported = {}
    for side, model in (("base", base), ("tuned", tuned)):
        results = model.results.get(name, {})
        value, error = results.get(f"{measure},{filtered}"), results.get(f"{measure}_stderr,{filtered}")
        # lm_eval writes "N/A" where it has no standard error.
        reported[side] = metric(value, error if isinstance(error, (int, float)) else None)
    return reported
