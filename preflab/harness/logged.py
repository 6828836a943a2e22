"""Compare two folders that `lm_eval --log_samples --output_path FOLDER` wrote, wherever they were made."""

from pathlib import Path

from preflab.evaluation.contamination import TrainingText
from preflab.harness import report
from preflab.harness.contamination import contamination
from preflab.harness.metrics import SuiteResults, metrics, rows
from preflab.harness.results import ModelResults, add_results, figures_of
from preflab.harness.suites import Suite
from utils.artifacts import read_json
from utils.errors import UserError
from utils.provenance import sha256_of_files, shorten_paths


def compare_folders(args) -> SuiteResults:
    """The results of --compare: the first folder in the place of base, the second in that of tuned.

    Raises:
        UserError: a folder without results or samples, or no figure in both.
    """
    sides = {side: read_folder(Path(path)) for side, path in zip(("base", "tuned"), args.compare, strict=True)}
    base, tuned = sides["base"], sides["tuned"]
    shared = [task for task in base.results if task in tuned.results]
    if not shared:
        raise UserError(
            f"--compare: no task is in both folders ({', '.join(base.results)}; {', '.join(tuned.results)})"
        )
    suite = Suite("compare", "logged samples", "--compare", [{"task": task} for task in shared])
    left_out = sorted(set(base.results) ^ set(tuned.results))
    # Versions of lm_eval and of a task differ in metrics and filters.
    left_out += [f"{task}/{key}" for task in shared for key in sorted(figures_of(base, task) ^ figures_of(tuned, task))]
    suite.notes = [f"base: {args.compare[0]}; tuned: {args.compare[1]}."]
    suite.notes += [f"LEFT OUT, in one folder only: {', '.join(left_out)}."] if left_out else []
    if all(base.samples.get(task) == tuned.samples.get(task) for task in shared if task in base.samples):
        suite.notes.append("BOTH FOLDERS HAVE THE SAME ANSWERS to all requests.")
    base.lengths = {task: length for task, length in base.lengths.items() if task in tuned.lengths}
    settings = {
        "apply_chat_template": True in base.templates | tuned.templates,
        **dict.fromkeys(("limit", "num_fewshot", "batch_size", "unquantised")),
        "dtype": "as logged",
        "missing": {},
    }
    figures = rows(base, tuned, suite, args.seed)
    if not figures:
        raise UserError(f"--compare: no figure of a task is in both folders ({', '.join(left_out)})")
    return SuiteResults("logged samples, tuned against base", suite, sides, figures, {}, [], settings)


def read_folder(folder: Path) -> ModelResults:
    """The results and samples of a folder; of a task that was run several times, the latest run.

    Raises:
        UserError: no results or no samples, or results of several models.
    """
    # lm_eval writes them to a folder of the model's name inside the output path.
    paths = sorted(folder.rglob("results_*.json"), key=lambda path: path.stem)
    if not paths:
        raise UserError(f"--compare {folder}: no results_*.json; run lm_eval with --log_samples --output_path {folder}")
    side, models = ModelResults(), {}
    for path in paths:
        content = read_json(path)
        models[str(content.get("config", {}).get("model_args"))] = path
        seconds = content.get("total_evaluation_time_seconds")
        add_results(side, path, None, float(seconds) if seconds not in (None, "None") else 0.0)
    if len(models) > 1:
        raise UserError(
            f"--compare {folder}: has results of several models ({' and '.join(map(str, models.values()))})"
        )
    return side


def publish_comparison(stage, args) -> None:
    """Compare two folders of logged samples and write lm_eval.json, lm_eval.md and lm_eval.png."""
    training = TrainingText.read(args, args.checkpoints)
    results = compare_folders(args)
    if training:
        results.contamination = contamination(results, training, args.seed)
    names = [Path(path).name for path in args.compare]
    out = Path(args.output_dir or Path(args.eval_out) / "lm_eval_compare") / "-vs-".join(reversed(names))
    files = {
        side: sorted(Path(path).rglob("*_*.json*")) for side, path in zip(("base", "tuned"), args.compare, strict=True)
    }
    identity = {
        side: {"name": shorten_paths(path), "sha256": sha256_of_files(files[side])}
        for side, path in zip(files, args.compare, strict=True)
    }
    summary = out / "lm_eval.json"
    if summary.exists() and not args.overwrite and read_json(summary).get("model") != identity:
        raise UserError(
            f"{summary}: has a comparison of other samples; choose another folder with --output-dir, or replace it with"
            " --overwrite"
        )
    stage.publish(
        summary,
        identity,
        metrics(results),
        report.render(results),
        run={"run_name": out.name, "limit": None},
        seed=args.seed,
        summary_rows=results.rows,
        figure=lambda path: report.draw(path, results),
        files={out / "lm_eval.md": report.markdown(results)},
        settings=results.settings,
        **({"contamination": results.contamination} if training else {}),
        headers={name: side.headers for name, side in results.sides.items()},
        generated_characters={name: side.lengths for name, side in results.sides.items()},
        seconds={name: side.seconds for name, side in results.sides.items()},
    )
