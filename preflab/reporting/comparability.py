"""On what a figure was made: data, base model and settings. Figures that differ in one of them are not comparable."""

import json
from dataclasses import dataclass
from pathlib import Path

from preflab.reporting.artifacts import TRAINING, Artifact, part
from preflab.reporting.findings import not_held_out

LENGTHS = ("max_length", "max_prompt_length", "prompt_format", "chat_template_path")
ANSWERS = ("max_new_tokens", "temperature", "top_p", "seed")
# Arguments that change a stage's figures, beside the data and the models.
SETTINGS = {
    "train": (*LENGTHS, "beta"),
    "sft": ("max_length", "chat_template_path", "loss_on"),
    "reward_model": ("max_length", "prompt_format", "chat_template_path"),
    "win_rate": (*LENGTHS, "beta"),
    "perplexity": (*LENGTHS, "window", "stride", "bos"),
    "battle": ("judge", "judge_prompt", *ANSWERS),
    "alpacaeval": ("judge", "judge_prompt", "order", *ANSWERS),
    "human_eval": (),
    "lm_eval": ("num_fewshot", "apply_chat_template", "batch_size", "dtype"),
}
# Values that say nothing, left out of the text of a basis.
HIDDEN = ("None", "", "yes")
# Losses without a reference model have no beta that scales log-ratios; rewards of two betas have other units.
UNIT_OF_REWARDS = "beta"
# What a figure of a tuned model is measured against.
BASE, WEIGHTS, NOTHING = "base", "weights", "nothing"


@dataclass(frozen=True)
class Basis:
    """On what a figure was made. Two figures are comparable where all of this is equal.

    Attributes:
        data: (short text, what identifies them).
        base: the same of the base model, with the adapter on it.
        weights: the same without the adapter.
        settings: (name, value) of the settings that count.
    """

    data: tuple[str, str]
    base: tuple[str, str]
    weights: tuple[str, str]
    settings: tuple[tuple[str, str], ...]

    def differs(self, other: "Basis", against: str = BASE) -> list[str]:
        """What differs from `other`, in words; empty if the figures are comparable.

        Args:
            against: what the figure is measured against: BASE (rewards, KL, battles), WEIGHTS (losses per token, which
                need one tokenizer) or NOTHING (answers judged against a reference, tasks).
        """
        reasons = []
        models = {BASE: [("base model", self.base, other.base)], WEIGHTS: [("model", self.weights, other.weights)]}
        for name, mine, its in (("data", self.data, other.data), *models.get(against, [])):
            if mine[1] != its[1]:
                # Two hashes of one name: the name alone would not show that they differ.
                same_name = mine[0] == its[0]
                shown = [f"{text} ({identity[:8]})" if same_name else text for text, identity in (mine, its)]
                reasons.append(f"other {name}: {shown[0]}, not {shown[1]}")
        mine, theirs = dict(self.settings), dict(other.settings)
        keys = dict.fromkeys([*mine, *theirs])
        changed = [(k, mine.get(k), theirs.get(k)) for k in keys if mine.get(k) != theirs.get(k)]
        return reasons + [f"other setting: {key} {value}, not {its}" for key, value, its in changed]

    def text(self) -> str:
        """All of it on one line."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings if value not in HIDDEN)
        return f"{self.data[0]}; base {self.base[0]}" + (f"; {settings}" if settings else "")


def basis_of(artifact: Artifact, rewards: bool = False) -> Basis:
    """On what the figures of an artifact were made.

    Args:
        rewards: of figures in units of rewards (beta × nats), which also depend on beta.
    """
    args = artifact.args
    values = {**args, **({} if artifact.stage != "lm_eval" else artifact.part("settings"))}
    if artifact.stage == "alpacaeval":
        values["order"] = artifact.summary.get("order")
    keys = [key for key in SETTINGS.get(artifact.stage, ()) if rewards or key != UNIT_OF_REWARDS]
    # A judge under the same name may have other weights.
    judge = artifact.part("model").get("judge")
    settings = [(key, str(values.get(key))) for key in keys]
    settings.append(("held out", "no" if not_held_out(artifact) else "yes"))
    if isinstance(judge, dict):
        settings += [("judge's weights", str(judge.get("weights_sha256") or judge.get("revision"))[:12])]
    return Basis(_data(artifact), *_base(artifact), tuple(settings))


def _data(artifact: Artifact) -> tuple[str, str]:
    data, args, stage = artifact.part("data"), artifact.args, artifact.stage
    if stage in TRAINING:
        section = part(data, "test")
        return _sources(section, "rows"), _identity(section)
    if stage == "win_rate":
        return _sources(data, "rows"), _identity(data)
    if stage == "perplexity":
        pairs, texts = part(data, "pairs"), args.get("text_file") or args.get("text_dataset") or []
        texts = [texts] if isinstance(texts, str) else texts
        size = artifact.part("metrics", "text_bytes").get("value")
        shown = [
            *([_sources(pairs, "rows")] if pairs else []),
            *([f"text {', '.join(map(str, texts))}"] if texts else []),
        ]
        return " and ".join(shown), json.dumps([_identity(pairs), texts, size])
    if stage == "lm_eval":
        rows = artifact.summary.get("rows") or []
        tops = [part(row) for row in rows if part(row).get("top")]
        tasks = sorted(f"{row.get('task')} {row.get('version')} {row.get('n')}" for row in tops)
        return f"suite {artifact.suite}", json.dumps([artifact.suite, tasks])
    if stage == "alpacaeval":
        n = artifact.part("metrics", "base_unparsed").get("n")
        return f"{n} instructions of {args.get('reference')}", json.dumps([args.get("reference"), n])
    if stage == "human_eval":
        # Votes of one study are never those of another one.
        study = str(artifact.part("study").get("study"))
        return f"votes of study {study[:8]}", study
    return _sources(data, "prompts"), _identity(data)


def _sources(section: dict, unit: str) -> str:
    """`120 rows of data/quickstart_prefs test`."""
    names = []
    for source in _of(section):
        split = f" {source['split']}" if source.get("split") else ""
        names.append(f"{source.get('name')}{split}")
    count = section.get("pairs") or section.get("conversations") or section.get("prompts") or section.get("rows")
    return f"{count if isinstance(count, int) else ''} {unit} of {', '.join(names) or 'unknown data'}".strip()


def _of(section: dict) -> list[dict]:
    """The sources of a section of `data`."""
    return [source for source in section.get("sources") or [] if isinstance(source, dict)]


def _identity(section: dict) -> str:
    """The hash of the rows as read; without it, the hashes of the files."""
    if section.get("text_sha256"):
        return str(section["text_sha256"])
    files = [(s.get("sha256") or s.get("revision"), s.get("split"), s.get("rows")) for s in _of(section)]
    return json.dumps([files, section.get("prompts")])


def _base(artifact: Artifact) -> tuple[tuple[str, str], tuple[str, str]]:
    """(the base with its adapter, the base alone), each as short text and what identifies it."""
    model = artifact.part("model")
    start = artifact.part("start")
    base = model if artifact.stage in TRAINING else part(model, "base")
    adapter = base.get("adapter_sha256")
    name = weights = Path(str(base.get("name", "?"))).name
    # The reference of a run that continues an adapter is the model with that adapter.
    if artifact.stage in TRAINING and start.get("use") == "continue":
        adapter, name = start.get("adapter_sha256"), f"{name} + {Path(str(start.get('adapter'))).name}"
    version = base.get("weights_sha256") or base.get("revision") or base.get("name")
    kind = [base.get("dtype"), base.get("quantized")]
    return (name, json.dumps([version, adapter, kind])), (weights, json.dumps([version, kind]))
