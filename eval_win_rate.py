"""Win rate on held-out preference pairs, and battles of base against tuned: did training help?

    python eval_win_rate.py                                         # the latest run in checkpoints/
    python eval_win_rate.py --run_name gemma-2b-it-dpo                # any run in checkpoints/
    python eval_win_rate.py --base_model google/gemma-2b-it \\
        --adapter_path checkpoints/checkpoint-7000
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        eval_win_rate.py --run_name gemma-2b-it-dpo
    python eval_win_rate.py --battle --judge longer                   # answers, not rewards
    python eval_win_rate.py --config configs/battle_arena_hard.yaml   # Arena-Hard v0.1

Reward mode: the share of held-out pairs whose chosen answer has the higher implicit reward, beta ×
(log-prob under tuned - under base), compared with the base model's own ranking of the pairs. Writes
win_rate.json, win_rate_rows.jsonl and win_rate.png to eval_out/<run_name>/.

Battle mode (--battle): both models answer the same prompts, and a judge compares the answers in
both orders. Writes battle.json, battle_rows.jsonl and battle.png.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models   --run_name NAME | --base_model ID with --adapter_path FOLDER or --tuned_model ID
           --base_run NAME (a run in the base's place)   --list (all runs with state and figures)
           --dtype float32|bfloat16|float16 (default: as trained)   --load_in_4bit
           --attn_implementation NAME   --base_adapter FOLDER|none
  data     --dataset_name ID|FILE|FOLDER   --split NAME   --max_length N   --limit N
           default: what the tuned model's run held out, else UltraFeedback's test_prefs, 1024
           tokens
  reward   --beta X (default: the run's, else 0.1)
           --expected FILE (eval metrics that the trainer logged; must be reproduced within 1e-3)
  battle   --judge hf:MODEL|vllm:MODEL|openai:MODEL@URL|rm:MODEL|pair:MODEL|implicit:RUN|longer|
           random [hf:builtin:smollm2-135m-instruct]; several are a panel: each is audited, the
           majority of those that pass decides   --judge_prompt FILE [configs/judges/pairwise.yaml]
           --audit_dataset ID|FILE (labelled pairs; default for a panel: the held-out pairs)
           --audit_split NAME [test]   --audit_limit N [200]
           --stop_when POINTS (judge in random order until the win rate is known within these
           points, or is not 50%)
           --prompts ID|FILE   --prompts_split NAME [test]   --max_new_tokens N [256]
           --temperature X [0]   --top_p X [1]   --models name=FOLDER ...   --opponent_outputs FILE
           --published FILE   --contamination RUN|DATASET (win rate without prompts that are in
           its training data)   (base, tuned and --models may be openai:MODEL@URL, a server)
  plan     --plan N|FILE (N prompts are judged first, or an earlier result is read: prints prompts
           against detectable difference and time, and stops)
  run      --batch_tokens N   --batch_size N   --seed N [42]   --output_dir DIR | --output_json FILE
           --overwrite

Scores, answers and verdicts are cached as they are computed: after an interruption, the same
command continues.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import (
    DEFAULT_JUDGE,
    HELP_OF_PLAN,
    AuditedJudgeArguments,
    ComparisonArguments,
    ContaminationArguments,
)
from preflab.evaluation.run_list import print_runs
from utils.artifacts import read_published
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import start


@dataclass
class WinRateArguments(AuditedJudgeArguments, ContaminationArguments):
    """Arguments of this script."""

    battle: bool = option("Compare answers under a judge instead of implicit rewards.", False)
    beta: float | None = option("Scale of the implicit reward (default: the run's, else 0.1).")
    expected: str | None = option(
        "Eval metrics that the trainer logged: train_log.jsonl, trainer_state.json or eval_results.json."
    )
    expected_batch_size: int | None = option("per_device_eval_batch_size of --expected (default: the run's, else 8).")
    expected_processes: int | None = option("Number of processes of --expected (default: the run's, else 1).")
    length_bias_splits: list[str] | None = option("Further splits whose length bias is reported.")
    prompts: str | None = option(
        "Battle: hub id, file or hf:// file of prompts (default: the prompts of the held-out pairs)."
    )
    prompts_split: str = option("Battle: split of --prompts.", "test")
    prompts_config: str | None = option("Battle: configuration of --prompts.")
    category_key: str = option("Battle: column that names a prompt's category.", "category")
    models: list[str] | None = option("Battle: further models, name=PATH or name=openai:MODEL@URL each.")
    opponent_outputs: str | None = option("Battle: a file of answers that base and tuned are compared with.")
    published: str | None = option("Battle: YAML of published scores to print next to the results.")
    judge_prompt: str = option("Battle: YAML of the judge's prompt.", "configs/judges/pairwise.yaml")
    plan: str | None = option(HELP_OF_PLAN)
    stop_when: float | None = option(
        "Battle: judge prompts in random order until the win rate is known within these points, or is not 50%."
    )

    @property
    def audited(self) -> bool:
        """Whether the judge is audited: those of a panel are, one judge where labelled pairs are named."""
        return bool(self.audit_limit and (self.audit_dataset or len(self.judges) > 1))


def reward_mode(stage, models, args):
    """Win rate by implicit rewards: score, compute, publish."""
    from preflab.evaluation import reward_slices, trainer_metrics, win_rate_report
    from preflab.evaluation.held_out import left_out, length_bias
    from preflab.evaluation.rewards import implicit_rewards, prompts_of

    comparison, seed = models.comparison, models.comparison.args.seed
    # Read all files first, so that bad input fails before the weights are loaded.
    logged = trainer_metrics.read_trainer_evaluation(args, comparison)
    bias = length_bias(comparison, models.tokenizer, args.length_bias_splits or [])
    pairs = implicit_rewards(models, args.beta)
    # No collective operation follows: statistics and files are the work of rank 0.
    if not is_main_process():
        return
    metrics = reward_slices.win_rate_metrics(pairs.rows, args.beta, pairs.data.dropped, seed)
    slices = reward_slices.slices(pairs.rows, seed)
    bins = reward_slices.calibration_bins(reward_slices.margins(pairs.rows), seed, prompts_of(pairs.rows))
    expected = trainer_metrics.compare(pairs.rows, logged) if logged else None
    note = left_out(pairs.data, pairs.truncation)
    base_run, not_held_out = comparison.args.base_run, pairs.data.not_held_out
    heading = f"{comparison.title}, {len(pairs.rows)} {'' if not_held_out else 'held-out '}pairs"
    summary = stage.publish(
        comparison.path("win_rate", ".json"),
        models.describe(),
        metrics,
        win_rate_report.render(metrics, slices, bias, expected, comparison.title, note, not_held_out, base_run).noted(
            comparison.identical
        ),
        run=comparison.run_fields,
        seed=seed,
        rows=pairs.rows,
        figure=lambda path: win_rate_report.draw(path, pairs.rows, bins, heading),
        slices=slices,
        calibration=bins,
        length_bias=bias,
        expected=expected,
        scoring=pairs.speed,
        work={"scoring": reward_work(pairs)},
        data={**pairs.data.summary(), "truncation": pairs.truncation},
    )
    # After publishing, so that the table that shows the difference is printed and saved.
    if expected and not expected["agrees"]:
        raise UserError(f"--expected {args.expected}: the trainer's metrics are not reproduced (see the table above)")
    return summary


def reward_work(pairs) -> dict:
    """What was scored in this call, as `utils.cache.measured_work` has it."""
    sequences = 2 * len(pairs.rows)
    return {
        "seconds": pairs.speed["seconds"],
        "computed": sequences - pairs.speed["rows_kept_before"],
        "of": sequences,
    }


def battle_mode(stage, models, args):
    """Battles under a judge: answer, judge in both orders, compute, publish."""
    from preflab.evaluation.contamination import TrainingText
    from preflab.judging.audit_run import labelled_pairs
    from preflab.judging.battle_judging import judge_battle
    from preflab.judging.battle_metrics import battle_sections, battles_without_overlap, with_confidence_sequence
    from preflab.judging.battle_report import battle_figure, render
    from preflab.judging.battles import answer_prompts, judge_notes, make_judges
    from utils.cache import measured_work

    comparison, comparison_args = models.comparison, models.comparison.args
    # Files and judges first, so that bad input fails before the weights are loaded.
    published = read_published(args.published) if args.published else None
    training = TrainingText.read(args, comparison_args.checkpoints)
    judges, controls = make_judges(args, comparison_args)
    labelled = labelled_pairs(comparison, args) if args.audited else None
    if args.plan and not comparison.servers:
        # The pilot's time per prompt must not include loading the models.
        models.load()
    with measured_work("answers-") as answering:
        battle = answer_prompts(models, args)
    answering["of"] = len(battle.prompts) * len(battle.answering)
    judged = judge_battle(battle, judges, controls, labelled, args.stop_when, comparison_args)
    if not is_main_process():
        return
    by_judge, name = judged.by_judge, judged.judge
    battle.data["judge_notes"] = judge_notes(by_judge[name])
    sections = battle_sections(by_judge, battle.answers, battle.pairs, battle.names, comparison_args.seed)
    sections |= judged.sections
    if "stopping" in sections:
        with_confidence_sequence(sections, sections["stopping"])
    if training:
        overlap = battles_without_overlap(by_judge, battle.prompts, battle.pairs, training, comparison_args.seed)
        sections["contamination"] = overlap
    title = f"{comparison.name}: {battle.title}, judge {name}, both orders"
    # Base and tuned come first and are in `models.describe()`.
    further = {model.name: model.identity for model in battle.answering[len(models.sides) :]}
    return stage.publish(
        comparison.path("battle", ".json"),
        {**models.describe(), "others": further, "judge": judged.identity},
        sections["metrics"],
        render(sections, published, title, battle.data).noted(comparison.identical),
        run=comparison.run_fields,
        seed=comparison_args.seed,
        rows=judged.rows,
        figure=lambda path: battle_figure(path, sections, title),
        **{key: section for key, section in sections.items() if key != "metrics"},
        published=published,
        work={"answers": answering, "judging": judged.work},
        data=battle.data,
    )


def check(args, trained: dict):
    """Set the default of --beta, and validate the arguments. `trained`: the arguments of the training run."""
    # 0 must reach the check below instead of being replaced by the default.
    args.beta = args.beta if args.beta is not None else trained.get("beta") or 0.1
    if not args.beta > 0:
        raise UserError(f"--beta {args.beta}: must be above 0")
    keys = ("prompts", "models", "opponent_outputs", "published", "contamination", "stop_when", "audit_dataset")
    battle_only = [k for k in keys if getattr(args, k) is not None]
    # --judge has a default, so only another value shows that it was given.
    if not args.battle and (battle_only or args.judges != [DEFAULT_JUDGE]):
        raise UserError(f"--{(battle_only or ['judge'])[0]} is for battles only: add --battle")
    if args.stop_when is not None and not 0 < args.stop_when < 50:
        raise UserError(f"--stop_when {args.stop_when:g}: must be points above 0 and below 50")
    if args.stop_when is not None and args.plan:
        raise UserError("--stop_when with --plan: a plan is for a number of prompts chosen in advance; remove one")
    args.check()


def main():
    stage, comparison_args, args = start("win_rate", __doc__, ComparisonArguments, WinRateArguments, listing=print_runs)
    from preflab.evaluation import plan
    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.two_models import TwoModels
    from utils.distributed import join_processes

    stage.name = "battle" if args.battle else "win_rate"
    if pilot := plan.pilot_file(args.plan, comparison_args.limit):
        return plan.plan_from_file(stage, pilot, comparison_args.output_dir, comparison_args.seed)
    # A pilot of N prompts is a trial run with --limit N.
    comparison_args.limit = plan.pilot_size(args.plan, comparison_args.limit) or comparison_args.limit
    comparison = resolve(comparison_args, answers_only=args.battle, alone=args.battle)
    if len(comparison.sides) == 1 and not (args.models or args.opponent_outputs):
        raise UserError(
            f"--base_model {comparison_args.base_model} alone has no opponent: give answers with"
            " --opponent_outputs, further models with --models, or a tuned model"
        )
    check(args, comparison.trained)
    # After the checks, so that invalid arguments fail without waiting for the other processes.
    join_processes()
    models = TwoModels(comparison)
    comparison.ensure_same_evaluation(stage.name, stage.arguments)
    summary = (battle_mode if args.battle else reward_mode)(stage, models, args)
    if args.plan and is_main_process():
        plan.publish_plan(stage, summary, comparison.path(stage.name, ".json"), comparison_args.seed)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
