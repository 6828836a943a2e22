"""Does a trait that a scorer rewards grow over SPPO iterations, on prompts that no iteration trained on?

    python benchmarks/sppo_trait.py --png docs/example_run/sppo_trait.png --json docs/example_run/sppo_trait.json

Runs `run_sppo_iteration.sh` for every iteration of every seed, once with the toy scorer's scores (the trait is short
words, configs/scorers/plain_words.py) and once with the scores shuffled among each prompt's answers, which makes the
labels uninformative. After each iteration the model answers the 60 prompts of data/eval_prompts, --samples times.
Prints and writes the mean letters per word after each iteration, the change in each iteration, and the difference
between scored and shuffled labels, each with two 95% intervals and tests: over prompts, on the mean over seeds (how
much these models differ on other prompts), and over seeds, on the mean over prompts, by Student's t (how much other
training runs would). Results are stored in --folder, so an interrupted call continues.
"""

import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start

ROOT = Path(__file__).resolve().parent.parent
LABELS = ("scored", "shuffled")
UNITS = ("prompts", "seeds")


@dataclass
class TraitArguments:
    """Keys of this measurement."""

    name: str = option("Recipe: configs/<name>-iterT.yaml and configs/pairs/<name>.yaml.", "quickstart-sppo")
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3], metadata={"help": "Seeds of sampling and training."})
    iterations: int = option("Iterations of each seed.", 3)
    samples: int = option("Answers per held-out prompt after each iteration.", 4)
    prompts: int = option("Held-out prompts.", 60)
    pairs: str = option("Further flags of generate_preference_pairs.py.", "")
    train: str = option("Further flags of dpo_train_human_preference.py.", "")
    model: str | None = option("Model to use instead of the recipe's.")
    folder: str = option("Folder of runs and answers.", "checkpoints/sppo_trait")
    json: str | None = option("Write the figures here.")
    png: str | None = option("Draw the curve here.")


def recipe_of(args, label: str, seed: int) -> Path:
    """Write the recipe's YAML files for one seed and kind of labels to their own folder; return it."""
    import yaml

    folder = Path(args.folder) / f"{label}-{seed}"
    configs = folder / "configs"
    (configs / "pairs").mkdir(parents=True, exist_ok=True)
    sampling = yaml.safe_load((ROOT / "configs" / "pairs" / f"{args.name}.yaml").read_text())
    sampling["sampling_seeds"] = [1000 * seed + s for s in sampling["sampling_seeds"]]
    sampling |= {"shuffle_scores": seed} if label == "shuffled" else {}
    (configs / "pairs" / f"{args.name}.yaml").write_text(yaml.safe_dump(sampling))
    for t in range(1, args.iterations + 1):
        training = yaml.safe_load((ROOT / "configs" / f"{args.name}-iter{t}.yaml").read_text())
        training |= {"output_dir": str(folder), "eval_out": str(Path(args.folder) / "out"), "seed": seed}
        training |= {"dataset_name": str(Path(args.folder) / "out" / f"{label}-{seed}-iter{t}-pairs")}
        training |= {"run_name": f"{label}-{seed}-iter{t}", "disable_tqdm": True, "sample_prompts": 0}
        training |= {"model_name_or_path": args.model} if args.model else {}
        if t > 1:
            training["start_adapter"] = str(adapter_of(args, label, seed, t - 1))
        (configs / f"{args.name}-iter{t}.yaml").write_text(yaml.safe_dump(training))
    return configs


def adapter_of(args, label: str, seed: int, iteration: int) -> Path:
    """The folder of an iteration's adapter."""
    return Path(args.folder) / f"{label}-{seed}" / f"{label}-{seed}-iter{iteration}"


def iterate(args, label: str, seed: int) -> None:
    """Run all iterations of one seed through the shell script."""
    configs = recipe_of(args, label, seed)
    for t in range(1, args.iterations + 1):
        if (adapter_of(args, label, seed, t) / "README.md").exists():
            continue
        command = ["bash", str(ROOT / "run_sppo_iteration.sh"), str(t), "--name", args.name]
        command += ["--configs", str(configs.resolve()), "--pairs", args.pairs, "--train", args.train]
        started = time.monotonic()
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise UserError(f"{label}, seed {seed}, iteration {t}: {(errors or [done.stderr[-300:]])[0]}")
        print(f"{label}, seed {seed}, iteration {t}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)


def environment() -> dict:
    """This process's, with its Python as the one that the shell command takes."""
    import os

    return {**os.environ, "PYTHON": sys.executable}


# A burst of one letter ("Awwww...") weighs no more than a long word.
LONGEST = 15


def letters_per_word(text: str) -> float:
    """Mean letters per word in `text`, with at most LONGEST counted per word; LONGEST for a text without words."""
    words = [min(len(word), LONGEST) for word in re.findall(r"[^\W\d_]+", text)]
    return sum(words) / len(words) if words else LONGEST


def trait(args, prompts, adapter: Path | None):
    """Mean letters per word of each held-out prompt's answers, shape (prompts,)."""
    from types import SimpleNamespace

    import numpy as np
    import yaml

    from preflab.judging.answers import answer_each, policy_model

    sampling = yaml.safe_load((ROOT / "configs" / "pairs" / f"{args.name}.yaml").read_text())
    first = yaml.safe_load((ROOT / "configs" / f"{args.name}-iter1.yaml").read_text())
    fields = {
        "model_name_or_path": args.model or first["model_name_or_path"],
        "adapter_path": str(adapter) if adapter else None,
        "eval_out": str(Path(args.folder) / "out"),
        "batch_tokens": 2048,
        **dict.fromkeys(("model_revision", "dtype", "attn_implementation", "chat_template_path", "batch_size")),
        **dict.fromkeys(("trust_remote_code", "overwrite"), False),
    }
    generation_args = SimpleNamespace(**fields)
    settings = {key: sampling[key] for key in ("max_new_tokens", "temperature", "top_p")}
    seeded = [{**settings, "seed": 77 + s} for s in range(args.samples)]
    answers = answer_each(policy_model(generation_args), prompts, seeded, generation_args)
    return np.array([[letters_per_word(a["text"]) for a in sample] for sample in answers]).mean(0)


def draw(path, curves: dict, title: str) -> None:
    """Draw letters per word over iterations: a thin line per seed, a thick one for the mean with its interval."""
    import numpy as np

    from utils.plots import CHOSEN, NEUTRAL, figure, save
    from utils.stats import bootstrap

    fig, (ax,) = figure(1, 1, title)
    fig.set_size_inches(6.4, 4)
    for label, colour in zip(LABELS, (CHOSEN, NEUTRAL), strict=True):
        values = curves[label]
        for seed in values:
            ax.plot(range(seed.shape[0]), seed.mean(1), color=colour, alpha=0.35, lw=0.8)
        estimates = [bootstrap(step) for step in values.mean(0)]
        mean = np.array([m["value"] for m in estimates])
        error = np.abs(np.array([m["ci95"] for m in estimates]).T - mean)
        name = "ranked by the scorer" if label == "scored" else "scores shuffled"
        ax.errorbar(range(len(mean)), mean, error, color=colour, lw=2, marker="o", capsize=3, label=name)
    ax.set(
        title="Trait of the answers, 95% intervals",
        xlabel="iteration (0: the initial model)",
        ylabel="letters per word, held-out answers",
    )
    ax.set_xticks(range(len(mean)))
    ax.legend(frameon=False)
    save(fig, path)


def compare(curves: dict, base) -> tuple[dict, list[tuple]]:
    """(metrics, table lines): levels, changes per iteration, and scored against shuffled labels.

    Args:
        curves: letters per word by label, shape (seeds, iterations + 1, prompts).
        base: of the initial model, shape (prompts,).
    """

    from utils.artifacts import metric
    from utils.stats import bootstrap, mean_test
    from utils.tables import cell, difference

    def change_of(name: str, by_seed) -> tuple[str, str]:
        """Add the metrics of changes, shape (seeds, prompts); return the table's cells, over prompts and over seeds."""
        by_prompt, of_seeds = by_seed.mean(0), by_seed.mean(1)
        metrics[name], p = bootstrap(by_prompt), metric(mean_test(by_prompt), n=len(by_prompt))
        metrics[f"{name}_over_seeds"], p_seeds = over_seeds(of_seeds)
        metrics[f"p_{name}"], metrics[f"p_{name}_over_seeds"] = p, p_seeds
        metrics[f"{name}_by_seed"] = of_seeds.tolist()
        return difference(metrics[name], p, 1, 3), difference(metrics[f"{name}_over_seeds"], p_seeds, 1, 3)

    iterations = curves["scored"].shape[1] - 1
    metrics, lines = {}, [("letters per word, held-out answers", *LABELS)]
    lines.append(("initial model", *[cell(bootstrap(base), 1, 3)] * 2))
    for t in range(1, iterations + 1):
        for label, values in curves.items():
            metrics[f"{label}_letters_{t}"] = bootstrap(values.mean(0)[t])
        changes = [
            change_of(f"{label}_change_{t}", values[:, t] - values[:, t - 1]) for label, values in curves.items()
        ]
        by_seed = [metrics[f"{label}_change_{t}_by_seed"] for label in LABELS]
        lines.append((f"after iteration {t}", *(cell(metrics[f"{label}_letters_{t}"], 1, 3) for label in LABELS)))
        lines += [
            (f"  changed by, over {unit}", *cells)
            for unit, cells in zip(UNITS, zip(*changes, strict=True), strict=True)
        ]
        lines.append(("  of each seed", *(", ".join(f"{x:+.3f}" for x in seeds) for seeds in by_seed)))
    lines.append(("scored less shuffled", *(f"over {unit}" for unit in UNITS)))
    for t, name in [*((t, f"iteration {t}") for t in range(1, iterations + 1)), (0, "all iterations")]:
        # Over one iteration, and from the start to the end.
        before, after = (t - 1, t) if t else (0, iterations)
        scored, shuffled = (curves[label][:, after] - curves[label][:, before] for label in LABELS)
        lines.append((f"  {name}", *change_of(f"scored_minus_shuffled_{t or 'all'}", scored - shuffled)))
    return metrics, lines


def over_seeds(values) -> tuple[dict, dict]:
    """(mean of one value per seed with Student's interval, p-value of Student's t test that it is 0)."""
    from scipy.stats import ttest_1samp

    from utils.artifacts import metric

    if len(values) < 2:
        return metric(float(values.mean()), None, None, len(values)), metric(None, n=len(values))
    test = ttest_1samp(values, 0)
    ends = test.confidence_interval()
    stderr = float(values.std(ddof=1)) / len(values) ** 0.5
    return metric(float(values.mean()), stderr, (float(ends.low), float(ends.high)), len(values)), metric(
        float(test.pvalue), n=len(values)
    )


def main():
    stage, args = start("sppo_trait", __doc__, TraitArguments)

    import numpy as np

    from preflab.data.prompts import load_prompts
    from utils.artifacts import write_json
    from utils.distributed import join_processes
    from utils.provenance import run_record
    from utils.tables import render

    for key in ("iterations", "samples", "prompts"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    join_processes()
    source = {"name": str(ROOT / "data" / "eval_prompts" / "reference.jsonl"), "split": "test"}
    prompts, _ = load_prompts([source], limit=args.prompts)
    base = trait(args, prompts, None)

    # (seeds, iterations + 1, prompts) of each kind of labels.
    curves = {label: [] for label in LABELS}
    for seed in args.seeds:
        for label in LABELS:
            iterate(args, label, seed)
            after = [trait(args, prompts, adapter_of(args, label, seed, t)) for t in range(1, args.iterations + 1)]
            curves[label].append(np.stack([base, *after]))
    curves = {label: np.stack(values) for label, values in curves.items()}

    metrics, lines = compare(curves, base)
    title = f"{args.name}: {len(args.seeds)} seeds, {len(prompts)} held-out prompts, {args.samples} answers each"
    print(render(title, lines))
    if args.png:
        draw(args.png, curves, "SPPO with a toy scorer that likes short words")
    if args.json:
        values = {label: series.tolist() for label, series in curves.items()}
        record = run_record(min(args.seeds), stage.seconds)
        write_json(args.json, {"metrics": metrics, "letters": values, "args": args.__dict__, "run": record})


if __name__ == "__main__":
    run(main)
