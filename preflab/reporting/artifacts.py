"""The JSON artifacts of a run: which there are, and which are missing or damaged.

Numbers come from these files only. A file that cannot be read, or that lacks what its stage writes, is named with the
problem; it never becomes a figure.
"""

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from preflab.evaluation.run_list import read_runs
from preflab.evaluation.runs import Run
from utils.artifacts import RowFile, read_json
from utils.errors import UserError
from utils.markdown import visible

# The stages that train; their summary is train.json.
TRAINING = ("train", "sft", "reward_model")
# Where the summaries of a run are. lm_eval's own files, below base-* and tuned-*, are no summaries.
PATTERNS = ("*.json", "alpacaeval*/alpacaeval.json", "lm_eval/*/lm_eval.json")
# Files of these names are summaries, or once were: without their sections, they are damaged. `_LIMITN` may follow.
SUMMARIES = (
    "train",
    "preference_pairs",
    "reward_model",
    "win_rate",
    "battle",
    "perplexity",
    "alpacaeval",
    "human_eval",
    "merge",
    "gguf",
    "lm_eval",
    "release",
)


# The kinds of sections that the report reads, where a summary has them.
SECTIONS = {
    **dict.fromkeys(("claim", "text", "warning"), str),
    **dict.fromkeys(("matches", "rows"), list),
    **dict.fromkeys(("model", "data", "training", "plan", "start", "answers", "averages", "suite", "settings"), dict),
    **dict.fromkeys(("audit", "study", "length_bias", "counts", "generated_characters"), dict),
}
RUN = {
    **dict.fromkeys(("versions", "hardware", "peak_memory_gib"), dict),
    **dict.fromkeys(("wall_seconds", "world_size", "limit"), (int, float)),
    "command": list,
}


def part(content: dict, *keys: str) -> dict:
    """The object under `keys`, one inside the other; {} where it is missing or no object, as in a damaged file."""
    for key in keys:
        content = content.get(key) if isinstance(content, dict) else None
    return content if isinstance(content, dict) else {}


@dataclass
class Artifact:
    """One summary file.

    Attributes:
        stage: as its envelope names it, or as its file's name does where the file cannot be read.
        path: of the file.
        summary: its content, {} where it cannot be read.
        problem: what is wrong with it, or None.
    """

    stage: str
    path: Path
    summary: dict = field(default_factory=dict)
    problem: str | None = None

    def part(self, *keys: str) -> dict:
        """A section of the summary, or a section inside it."""
        return part(self.summary, *keys)

    @property
    def metrics(self) -> dict:
        """`{name: metric}`."""
        return self.part("metrics")

    @property
    def args(self) -> dict:
        """The arguments of the call."""
        return self.part("args")

    @property
    def run(self) -> dict:
        """What is needed to repeat it: commit, command, versions, hardware, time."""
        return self.part("run")

    @property
    def limit(self) -> float | None:
        """Rows of a trial (--limit), None for a full evaluation."""
        limit = self.run.get("limit")
        return limit if isinstance(limit, (int, float)) else None

    @property
    def suite(self) -> str | None:
        """The suite of an lm-eval summary."""
        suite = self.summary.get("suite")
        return str(suite["name"]) if isinstance(suite, dict) and suite.get("name") else None

    @cached_property
    def rows(self) -> list[dict]:
        """The rows file beside the summary; empty if there is none.

        Raises:
            UserError: a row is not valid JSON. Names the file.
        """
        name = "heldout_rows" if self.stage in TRAINING else f"{self.path.stem}_rows"
        return read_rows_file(self.path.with_name(f"{name}.jsonl"))

    def picture(self) -> Path | None:
        """The stage's picture, if there is one."""
        names = {"train": "dpo_training_curves", "sft": "sft_training_curves", "reward_model": "reward_training_curves"}
        path = self.path.with_name(f"{names.get(self.stage, self.path.stem)}.png")
        return path if path.is_file() else None


@dataclass
class RunArtifacts:
    """A run with everything its folder of results holds.

    Attributes:
        run: its state on disk.
        weights: the folder of its weights, which may not exist.
        artifacts: its summaries, in the order of the stages.
        others: further JSON files by stem (preflight, manifest), {} for one that is missing.
        problems: what could not be read, one sentence each.
        hashes: of files that its results name (`once`).
    """

    run: Run
    weights: Path
    artifacts: list[Artifact]
    others: dict[str, dict]
    problems: list[str]
    hashes: dict[tuple, str] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """Of the run."""
        return self.run.name

    @property
    def is_training(self) -> bool:
        """Whether a model was trained, or is being trained."""
        return bool(self.run.trains) or self.training is not None

    @property
    def training(self) -> Artifact | None:
        """train.json, if it can be read."""
        return next((a for a in self.artifacts if a.stage in TRAINING and not a.problem), None)

    def of_stage(self, stage: str, trials: bool = False) -> list[Artifact]:
        """Its readable summaries of a stage; without trials unless `trials`."""
        readable = [a for a in self.artifacts if a.stage == stage and not a.problem]
        return [a for a in readable if trials or a.limit is None or self.name.endswith(f"_LIMIT{a.limit}")]

    def once(self, compute: Callable, what) -> str:
        """`compute(what)`, a hash of files, computed once: most results of a run name the same data and adapter."""
        key = (compute, str(what))
        if key not in self.hashes:
            self.hashes[key] = compute(what)
        return self.hashes[key]

    def log(self) -> list[dict]:
        """The rows of train_log.jsonl. Raises UserError for a damaged row."""
        return read_rows_file(self.run.results / "train_log.jsonl")


def read_all(checkpoints: Path, eval_out: Path) -> list[RunArtifacts]:
    """Every run with weights or results, newest first."""
    runs = (read_artifacts(run, checkpoints / run.name) for run in read_runs(checkpoints, eval_out))
    # Folders of the report itself and of a merged model have neither a run nor a summary.
    return [run for run in runs if run.artifacts or run.problems or run.is_training or run.others]


def select(runs: list[RunArtifacts], names: list[str] | None, flag: str) -> list[RunArtifacts]:
    """The named runs in the order of `names`; all of them for None.

    Raises:
        UserError: no run has such a name.
    """
    if names is None:
        return runs
    by_name = {run.name: run for run in runs}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {near[0]}?" if near else "--list shows all runs"
            raise UserError(f"{flag} {visible(name)}: there is no such run with results; {hint}")
    return [by_name[name] for name in names]


def read_artifacts(run: Run, weights: Path) -> RunArtifacts:
    """Every artifact of a run."""
    paths = sorted({path for pattern in PATTERNS for path in run.results.glob(pattern)})
    artifacts, problems = [], []
    for path in paths:
        artifact = read_summary(path)
        if artifact:
            artifacts.append(artifact)
            problems += [f"{path}: {artifact.problem}"] if artifact.problem else []
    others = {}
    for name in ("preflight", "manifest"):
        path = run.results / f"{name}.json"
        if path.exists():
            try:
                content = read_json(path)
                others[name] = content if isinstance(content, dict) else {}
            except UserError as error:
                problems.append(str(error))
    order = {stage: number for number, stage in enumerate(ORDER)}
    artifacts.sort(key=lambda a: (order.get(a.stage, len(order)), a.limit is not None, str(a.path)))
    return RunArtifacts(run, weights, artifacts, others, problems)


# The stages in the order in which they are usually run.
ORDER = (
    "preference_pairs", "train", "sft", "reward_model", "reward_eval", "merge", "gguf", "win_rate", "perplexity",
    "battle", "alpacaeval", "human_eval_dump", "human_eval", "lm_eval", "release",
)  # fmt: skip


def read_summary(path: Path) -> Artifact | None:
    """A summary file, damaged or not; None for a file that is no summary."""
    stem = path.stem.split("_LIMIT")[0]
    try:
        content = read_json(path)
    except UserError as error:
        # Of other files (candidates, votes' keys), the page shows nothing that would be missed.
        return Artifact(stem, path, problem=str(error).removeprefix(f"{path}: ")) if stem in SUMMARIES else None
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        return Artifact(stem, path, problem="is no summary: it has no `stage`") if stem in SUMMARIES else None
    return Artifact(content["stage"], path, content, _problem(content))


def _problem(summary: dict) -> str | None:
    """Which section of a summary is missing or not what the envelope says."""
    for key in ("metrics", "args", "run"):
        if not isinstance(summary.get(key), dict):
            return f"has no section `{key}`"
    for place, section in ((summary, SECTIONS), (summary["run"], RUN)):
        for key, kind in section.items():
            if place.get(key) is not None and not isinstance(place[key], kind):
                return f"`{key}` is not of the kind that its stage writes"
    for name, metric in metrics_of(summary["metrics"]):
        if not isinstance(metric, dict) or "value" not in metric:
            return f"metric {name} has no value"
        if not isinstance(metric["value"], (int, float, type(None))):
            return f"metric {name}: {str(metric['value'])[:40]!r} is not a number"
    return None


def metrics_of(metrics: dict) -> Iterator[tuple[str, object]]:
    """(name, metric) of every metric; those of answers are grouped by model."""
    for name, content in metrics.items():
        if isinstance(content, dict) and content and all(isinstance(each, dict) for each in content.values()):
            yield from ((f"{name}/{key}", metric) for key, metric in content.items())
        else:
            yield name, content


def read_rows_file(path: Path) -> list[dict]:
    """The rows of a JSON-lines file, [] if it does not exist. Raises UserError, naming it, if it is damaged."""
    try:
        rows = RowFile(path).read()
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: a row cannot be read ({error})") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a row is not an object")
    return rows
