"""The work of run_alpacaeval_local.py: both models answer, the judge compares with the reference, and is audited.

Each stage reads its input from files in the run's AlpacaEval folder, so that every stage can run on its own.
"""

from pathlib import Path

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


def load_judge(args, comparison_args):
    """The judge under AlpacaEval's own prompt or --judge_prompt, or a named evaluator that the package ships."""
    # Names with a colon are this project's judges (hf:MODEL); reading the package's folder would cost an import.
    if ":" not in args.judge and args.judge in shipped_evaluators():
        if args.judge_prompt:
            raise UserError(f"--judge_prompt: the evaluator {args.judge} of alpaca-eval has its own prompt")
        return PackageEvaluator(args.judge)
    return make_judge(args.judge, args.judge_prompt or clf_prompt(), args.judge_options(comparison_args))


def judges_and_controls(args, c) -> tuple[list, list]:
    """(the judges of --judge, the controls)."""
    prompt, options = args.judge_prompt or clf_prompt(), args.judge_options(c)
    controls = [make_judge(name, "", options) for name in CONTROLS if [name] != args.judges]
    return [make_judge(spec, prompt, options) for spec in args.judges], controls


def judge_outputs(comparison, args, judge, reference: list[dict], folder: Path) -> None:
    """Judge both models' outputs against the reference and audit the judge; all files are written at the end.

    The control judges `longer` and `random` get the same questions.
    """
    c, models = comparison.args, TwoModels(comparison)
    controls = [make_judge(name, "", args.judge_options(c)) for name in CONTROLS]
    files = {}
    for side in models.sides:
        # The expected origin guards a separate --stage judge against outputs of another model or other sampling.
        outputs = read_outputs(folder, side, reference, {**models.answering_identity(side), **args.sampling(c.seed)})
        for current in (judge, *controls):
            with measured_work("judgements") as entry:
                annotations = annotate(current, reference, outputs, args.order, c.eval_out, c.overwrite)
            entry["of"] = 0 if current.instant else sum(len(row["orders"]) for row in annotations)
            origin = {
                "judge": current.identity(),
                "order": args.order,
                "reference_sha256": outputs_hash(reference),
                "outputs_sha256": outputs_hash(outputs),
                **about_work(entry),
            }
            # Controls as `base_longer`, `tuned_random`, ...
            files[side if current is judge else f"{side}_{current.name}"] = (annotations, origin)
    judge_audit = audit_judges(labelled_pairs(comparison, args), [judge], controls, c) if args.audit_limit else None
    # A vLLM judge holds the GPU's memory until it is closed.
    if hasattr(judge, "close"):
        judge.close()
    # Written together, so that an interrupted call leaves no mixture of two judges.
    for name, (annotations, origin) in files.items():
        write_annotations(folder, name, annotations, origin)
    if judge_audit:
        write_json(folder / "judge_audit.json", judge_audit)


def read_judged(folder: Path, with_audit: bool) -> tuple[dict, dict, dict | None]:
    """(annotations of both sides, those of the control judges, the judge audit or None), all of one judge.

    Raises UserError where a file is missing, damaged, or of another judge, order, reference or set of answers.
    """
    names = [*SIDES, *(f"{side}_{control}" for side in SIDES for control in CONTROLS)]
    annotations = {name: read_annotations(folder / f"annotations_{name}.json") for name in names}
    audit_file = folder / "judge_audit.json"
    judge_audit = read_json(audit_file) if audit_file.exists() and with_audit else None
    # Before scoring: stages may have been run at different times with different judges.
    ensure_same_judge(folder, annotations, judge_audit)
    sides = {side: annotations.pop(side) for side in SIDES}
    return sides, annotations, judge_audit


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
