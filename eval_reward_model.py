"""Evaluate a reward model or another scorer on labelled answers: accuracy, calibration, best of n.

    python eval_reward_model.py --scorer rm:checkpoints/quickstart-rm   # its run's held-out pairs
    python eval_reward_model.py --scorer rm:Skywork/Skywork-Reward-V2-Qwen3-0.6B \\
        --dataset_name allenai/reward-bench --split filtered --benchmark rewardbench
    python eval_reward_model.py --scorer rm:checkpoints/mine \\
        --dataset_name allenai/reward-bench-2 --split test --benchmark rewardbench2
    python eval_reward_model.py --scorer rm:checkpoints/mine --against rm:checkpoints/other \\
        --dataset_name my_pairs.jsonl                                   # paired comparison of two
    python eval_reward_model.py --scorer rm:checkpoints/quickstart-rm \\
        --best_of eval_out/quickstart-sppo-iter1-pairs                  # reward against KL
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        eval_reward_model.py --scorer rm:checkpoints/mine

Question: does it score the better answer higher, more often than length alone would, and does it
know how sure it is? Writes reward_model.json, reward_model_rows.jsonl and reward_model.png to
eval_out/<run_name>/.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  scorer    --scorer rm:MODEL|pair:MODEL|judge:JUDGE|FILE.py:FUNCTION|longer|shorter|random
            (rm: a hub id, a folder, or a run of train_reward_model.py)
            --against SCORER (a second one: agreement, and the paired difference)
            --scorer_dtype float32|bfloat16|float16
            --judge_prompt FILE [configs/judges/pairwise.yaml]
  data      --dataset_name ID|FILE|FOLDER   --split NAME [test]
            (default: the test split of the scorer's run)   --category_key COLUMN
            rows: pairs in any format, or lists of texts in chosen and rejected (RewardBench 2)
            --benchmark rewardbench|rewardbench2: that benchmark's own averages   --limit N
  best of n --best_of FOLDER|FILE|ID: samples.jsonl of generate_preference_pairs.py, or rows with
            several answers   --best_of_split NAME [train]   --most N [16]
  run       --run_name NAME (default: of the scorer)   --batch_tokens N   --batch_size N
            --seed N [42]   --overwrite   --list (all runs)

Rows whose prompt the scorer's run was trained on are left out. Scores are cached as they are
computed: after an interruption, the same command continues.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from preflab.evaluation.arguments import HELP_OF_VLLM_ARGS, DatasetArguments, ModelArguments, OutputArguments
from preflab.evaluation.run_list import print_runs
from preflab.models.vllm_environment import parse_args
from utils.artifacts import all_arguments, changed_arguments, check_writable, describe_changes, read_json
from utils.artifacts import with_limit_suffix as with_limit
from utils.cli import check_name, option
from utils.errors import UserError, is_main_process, run
from utils.secrets_in_text import without_secrets
from utils.stage import start

# Arguments that change results by rounding at most.
NOT_IN_IDENTITY = {"batch_size", "batch_tokens", "overwrite", "eval_out", "trust_remote_code", "run_name"}


@dataclass
class RewardEvalArguments(ModelArguments, DatasetArguments, OutputArguments):
    """The flags of this script."""

    scorer: str | None = option("Scorer to evaluate (see --help).")
    against: str | None = option("A second scorer: agreement with it, and the paired difference of accuracies.")
    scorer_dtype: str | None = option(
        "Precision of a local scorer (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    vllm_args: list[str] | None = option(HELP_OF_VLLM_ARGS)
    judge_prompt: str = option("YAML file with the prompt of judge:... scorers.", "configs/judges/pairwise.yaml")
    dataset_name: str | None = option("Labelled answers: hub id, file or folder (default: the scorer's run's).")
    split: str = option("Split of --dataset_name.", "test")
    category_key: str | None = option("Column of the category (default: subset, else category).")
    benchmark: str | None = option(
        "Also average the subsets as this benchmark does.", choices=["rewardbench", "rewardbench2"]
    )
    best_of: str | None = option("Several answers per prompt, for the curve of best-of-n sampling.")
    best_of_split: str = option("Split of --best_of.", "train")
    most: int = option("Largest n of the best-of-n curve.", 16)
    limit: int | None = option("Use only the first rows; adds LIMIT to every file name.")
    seed: int = option("Seed of resampling and of the control `random`.", 42)
    run_name: str | None = option("Name of the folder of the results (default: of the scorer).")


def check(args) -> None:
    """Raise UserError for arguments that leave nothing to evaluate."""
    if args.scorer is None:
        raise UserError("--scorer is missing: e.g. rm:checkpoints/quickstart-rm, rm:HUB_ID, or the control longer")
    if args.against == args.scorer:
        raise UserError(f"--against {args.against}: is --scorer itself; name another scorer")
    for key in ("limit", "batch_size", "batch_tokens", "most"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    parse_args(args.vllm_args)
    if args.benchmark and not args.dataset_name:
        raise UserError(
            f"--benchmark {args.benchmark}: needs its rows, --dataset_name allenai/{HUB_NAMES[args.benchmark]}"
        )


HUB_NAMES = {"rewardbench": "reward-bench --split filtered", "rewardbench2": "reward-bench-2 --split test"}


def default_name(scorer: str) -> str:
    """The name of a run's folder, or of a scorer without the characters that a file name cannot have."""
    kind, _, rest = without_secrets(scorer).partition(":")
    return re.sub(r"[^\w.-]+", "-", Path(rest).name if rest and kind in ("rm", "pair") else scorer).strip("-.")


def ensure_same_evaluation(args, path: Path) -> None:
    """Raise UserError if `path` holds the results of another evaluation, unless --overwrite is given."""
    if args.overwrite or not path.exists():
        return
    before, now = read_json(path).get("args", {}), all_arguments([args])
    changed = changed_arguments(before, now, NOT_IN_IDENTITY, defaults=now)
    if changed:
        raise UserError(
            f"{path} holds another evaluation ({describe_changes(before, now, changed)}): choose another --run_name,"
            " or --overwrite it"
        )


def main():
    stage, args = start("reward_eval", __doc__, RewardEvalArguments, runs_bare=False, listing=print_runs)
    check(args)

    from preflab.models.loading import default_batch_tokens
    from preflab.rewards import evaluation
    from utils.distributed import join_processes

    args.run_name = args.run_name or default_name(args.scorer)
    check_name(args.run_name)
    args.batch_tokens = args.batch_tokens or default_batch_tokens()
    path = Path(args.eval_out) / args.run_name / f"{with_limit('reward_model', args.limit)}.json"
    check_writable(path.parent, "--eval_out")
    join_processes()
    ensure_same_evaluation(args, path)
    scorers = evaluation.make_scorers(args)
    data = evaluation.load(args)
    scored = evaluation.score(args, scorers, data)
    if not is_main_process():
        return
    metrics, sections = evaluation.metrics_of(args, scored, data)
    name = without_secrets(args.scorer)
    stage.publish(
        path,
        {"scorers": {scorer.name: scorer.identity() for scorer in scorers}},
        metrics | evaluation.flat(sections),
        evaluation.report(name, args, metrics, sections, data),
        run={"run_name": args.run_name, "limit": args.limit},
        seed=args.seed,
        rows=scored.rows,
        figure=lambda file: evaluation.figure(file, name, args, metrics, sections, scored),
        best_of=sections["best_of"],
        failures=dict(Counter(sections["failures"])),
        data=data.facts,
    )


if __name__ == "__main__":
    run(main, "lower --batch_tokens or use --scorer_dtype bfloat16, then run the same command again to continue")
