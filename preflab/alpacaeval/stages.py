"""The work of run_alpacaeval_local.py: both models answer, the judge compares with the reference, and is audited.

Each stage reads its input from files in the run's AlpacaEval folder, so that every stage can run on its own.
"""

from pathlib import Path

from preflab.alpacaeval import panel
from preflab.alpacaeval.files import (
    annotate,
    ensure_same_judge,
    outputs_hash,
    read_annotations,
    read_origin,
    read_outputs,
    write_annotations,
    write_outputs,
)
from preflab.alpacaeval.package import PackageEvaluator, clf_prompt, shipped_evaluators
from preflab.data.prompts import Prompt
from preflab.evaluation.trained_prompts import key_of, trained_prompts
from preflab.evaluation.two_models import TwoModels
from preflab.judging.answers import (
    answer_all,
    answer_notes,
    answerable,
    base_and_tuned,
    engine_name,
    ensure_answers_differ,
)
from preflab.judging.audit_run import audit_judges, labelled_pairs
from preflab.judging.judges import make_judge
from preflab.judging.panel import Panel, close
from preflab.models.vllm_engine import choose_engine
from utils.artifacts import read_json, write_json
from utils.cache import measured_work
from utils.errors import UserError
from utils.stage import print_main

SIDES = ("base", "tuned")
CONTROLS = ("longer", "random")


def generate(comparison, args, reference: list[dict], folder: Path) -> None:
    """Answer every instruction with base and tuned; write model_outputs_<side>.json."""
    c, models = comparison.args, TwoModels(comparison)
    prompts = [Prompt(row["messages"], row["source"]) for row in reference]
    answering = base_and_tuned(models, args)
    # Refused instructions are an error here: AlpacaEval's rate is defined over all of its instructions.
    _, refused = answerable(answering, prompts)
    if refused:
        raise UserError(
            f"the chat template refuses {refused} of {len(prompts)} instructions; remove these from --reference"
        )
    sampling = args.sampling(c.seed)
    engine, answers, work = choose_engine(args.engine, models, [model.base for model in answering]), {}, {}
    for model in answering:
        with measured_work(f"answers-{model.name}") as entry:
            answers[model.name] = answer_all(model, prompts, sampling, c, engine, args.vllm_args)
        work[model.name] = {**entry, "of": len(prompts)}
    # Before any file is written, so that no outputs of a wrongly loaded model remain.
    ensure_answers_differ(answers, comparison)
    for model in answering:
        made = {"engine": engine_name(model, engine), **about_work(work[model.name])}
        origin = {**model.identity, **sampling, **made, "notes": answer_notes(answers[model.name])}
        write_outputs(folder, model.name, comparison.names[model.name], reference, answers[model.name], origin)
    # Frees the GPU for a local judge.
    models.unload()


def report_files(stage: str, folder: Path) -> None:
    """Print where the files of --stage generate or judge are, and what follows."""
    if stage in ("generate", "judge"):
        following = "judge" if stage == "generate" else "score"
        print_main(f"stage {stage}: its files are in {folder}; next: the same command with --stage {following}")


def load_judges(args, comparison_args) -> list:
    """The judges under AlpacaEval's own prompt or --judge_prompt, or one named evaluator that the package ships."""
    # Names with a colon are this project's judges (hf:MODEL); reading the package's folder would cost an import.
    shipped = [name for name in args.judges if ":" not in name and name in shipped_evaluators()]
    if shipped and len(args.judges) > 1:
        raise UserError(f"--judge {shipped[0]}: an evaluator of alpaca-eval judges alone; a panel is of other judges")
    if shipped and args.judge_prompt:
        raise UserError(f"--judge_prompt: the evaluator {shipped[0]} of alpaca-eval has its own prompt")
    return [PackageEvaluator(shipped[0])] if shipped else judges_and_controls(args, comparison_args)[0]


def judges_and_controls(args, c) -> tuple[list, list]:
    """(the judges of --judge, the controls)."""
    prompt, options = args.judge_prompt or clf_prompt(), args.judge_options(c)
    controls = [make_judge(name, "", options) for name in CONTROLS if [name] != args.judges]
    return [make_judge(spec, prompt, options) for spec in args.judges], controls


def judge_outputs(comparison, args, judges: list, reference: list[dict], folder: Path) -> None:
    """Judge both models' outputs against the reference and audit the judge; all files are written at the end.

    The control judges `longer` and `random` get the same questions. Several judges are a panel of those that pass their
    audit (of all, where none does); each has its own annotations too, as `base_judge1`, `tuned_judge2`, ...
    """
    c, models = comparison.args, TwoModels(comparison)
    controls = [make_judge(name, "", args.judge_options(c)) for name in CONTROLS]
    judge_audit, judge, members = None, judges[0], {}
    if len(judges) > 1:
        # Before the judging, because it decides who has a vote.
        judge_audit = _audit(comparison, args, judges, controls)
        passed = {name for name, member in (judge_audit or {}).get("members", {}).items() if member["passed"]}
        voting = [each for each in judges if each.name in passed] or judges
        judge = Panel(voting, c.eval_out, c.overwrite)
        members = {"judges": [each.name for each in judges], "voting": [each.name for each in voting]}
    named = {f"judge{number}": each for number, each in enumerate(judges, 1)} if members else {}
    files = {}
    # A judge after the other, and the panel last: its verdicts are theirs, from the cache.
    for name, current in {**named, "": judge, **{each.name: each for each in controls}}.items():
        for side in models.sides:
            # The expected origin guards a separate --stage judge against outputs of another model or other sampling.
            expected = {**models.answering_identity(side), **args.sampling(c.seed)}
            outputs = read_outputs(folder, side, reference, expected)
            with measured_work("judgements") as entry:
                annotations = annotate(current, reference, outputs, args.order, c.eval_out, c.overwrite)
            entry["of"] = 0 if current.instant else sum(len(row["orders"]) for row in annotations)
            origin = {
                "judge": current.identity(),
                "order": args.order,
                "reference_sha256": outputs_hash(reference),
                "outputs_sha256": outputs_hash(outputs),
                **about_work(entry),
                **({"panel": members} if members and not name else {}),
            }
            # Controls as `base_longer`, `tuned_random`, ...
            files[f"{side}_{name}" if name else side] = (annotations, origin)
        # A vLLM judge holds the GPU's memory until it is closed.
        if name in named:
            close([current])
    if not members:
        judge_audit = _audit(comparison, args, judges, controls)
    close([judge])
    # Written together, so that an interrupted call leaves no mixture of two judges.
    for name, (annotations, origin) in files.items():
        write_annotations(folder, name, annotations, origin)
    if judge_audit:
        write_json(folder / "judge_audit.json", judge_audit)


def _audit(comparison, args, judges: list, controls: list) -> dict | None:
    if not args.audit_limit:
        return None
    return audit_judges(labelled_pairs(comparison, args), judges, controls, comparison.args)


def read_judged(folder: Path, with_audit: bool) -> tuple[dict, dict, dict | None]:
    """(annotations of both sides, those of controls and of a panel's judges, the judge audit or None), of one judge.

    Raises UserError where a file is missing, damaged, or of another judge, order, reference or set of answers.
    """
    members = read_origin(folder / f"annotations_{SIDES[0]}.json").get("panel", {}).get("judges", [])
    further = [*CONTROLS, *(f"judge{number}" for number in range(1, len(members) + 1))]
    names = [*SIDES, *(f"{side}_{name}" for side in SIDES for name in further)]
    annotations = {name: read_annotations(folder / f"annotations_{name}.json") for name in names}
    audit_file = folder / "judge_audit.json"
    judge_audit = read_json(audit_file) if audit_file.exists() and with_audit else None
    # Before scoring: stages may have been run at different times with different judges.
    ensure_same_judge(folder, annotations, judge_audit)
    sides = {side: annotations.pop(side) for side in SIDES}
    return sides, annotations, judge_audit


def panel_section(folder: Path, annotations: dict[str, list[dict]], about: dict, seed: int) -> dict:
    """`preflab.alpacaeval.panel.panel_section` of the files in `folder`; `annotations`: those beside the panel's."""
    names = [name for name in annotations if name.partition("_")[2].startswith("judge")]
    origins = {name: read_origin(folder / f"annotations_{name}.json") for name in names}
    return panel.panel_section({name: annotations[name] for name in names}, origins, about, seed)


def trained_instructions(comparison, reference: list[dict]) -> dict:
    """How many instructions are prompts that the compared models were trained on: `{count, of, first}`.

    None is left out: AlpacaEval's rates are defined over all of its instructions.
    """
    trained = trained_prompts(comparison)
    seen = [row["source"] for row in reference if key_of(Prompt(row["messages"], row["source"])) in trained]
    return {"count": len(seen), "of": len(reference), "first": seen[0] if seen else None}


def origins(folder: Path) -> tuple[dict, dict]:
    """What made the files: (models of the outputs, judges of the annotations), by side."""
    models = {side: read_origin(folder / f"model_outputs_{side}.json") for side in SIDES}
    judges = {side: read_origin(folder / f"annotations_{side}.json") for side in SIDES}
    return models, judges


def about_work(entry: dict) -> dict:
    """The keys of an .about.json file that say how long its content took to make, from `measured_work`."""
    return {"seconds": round(entry["seconds"], 1), "work": entry}


def work(models: dict, judges: dict) -> dict:
    """`{phase: {seconds, computed, of}}` of answers and judging, as far as the .about.json files have them."""
    phases = {
        **{f"answers of {side}": origin.get("work") for side, origin in models.items()},
        **{f"judging {side}": origin.get("work") for side, origin in judges.items()},
    }
    return {name: entry for name, entry in phases.items() if entry}


def timings(models: dict, judges: dict, judge_audit: dict | None, scoring: float) -> dict:
    """Seconds per stage, from the call that wrote each file; cached work of an earlier call is not included."""
    return {
        **{f"answers of {side}": origin.get("seconds") for side, origin in models.items()},
        **{f"judging {side}": origin.get("seconds") for side, origin in judges.items()},
        "audit": judge_audit["seconds"] if judge_audit else None,
        "scoring": round(scoring, 1),
    }
