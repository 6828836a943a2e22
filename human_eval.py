"""Blind human evaluation: a page on which people compare answers, and the scores of their votes.

    python human_eval.py                                       # the latest run, 60 shipped prompts
    python human_eval.py --run_name gemma-2b-it-dpo --prompts my_prompts.jsonl
    python human_eval.py --models other=princeton-nlp/gemma-2-9b-it-SimPO   # more than two models
    python human_eval.py --score votes-*.json               # the files that the annotators exported
    python human_eval.py --score votes-*.json --pairs my_votes.jsonl   # and pairs to train on
    python human_eval.py --score votes-*.json --judge rm:MODEL   # few votes, many verdicts

Without --score, the models answer the prompts and an annotation page is made. Send only
human_eval.html to the annotators: it opens in any browser, needs no server and no network, and does
not contain which model gave which answer. Writes manual_eval_candidates.json (prompt, base, dpo)
with .md and .about.json beside it, human_eval.html, and human_eval_key.json, which unblinds the
votes; do not share it.

With --score, the votes are unblinded with that key. Writes human_eval.json, human_eval_rows.jsonl,
human_eval.png and human_eval_strongest.md beside the key.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  models    --run_name NAME | --base_model ID with --adapter_path FOLDER or --tuned_model ID
            --base_run NAME (a run in the base's place)   --list (all runs with state and figures)
            --models name=FOLDER ...   --pairs_per_prompt N [1]
            (each of the models may be openai:MODEL@URL, a server)
  prompts   --prompts ID|FILE|hf://FILE [data/eval_prompts/reference.jsonl]
            --prompts_split NAME [test]   --category_key NAME [category]   --limit N
  generate  --max_new_tokens N [256]   --temperature X [0]   --top_p X [1]   --seed N [42]
  page      --repeat_share X [0.05] (pairs shown twice, sides swapped)
            --sides_seed N (default: random, and recorded)
  score     --score FILE ...   --key FILE (default: the key of the votes' study below --eval_out)
            --pairs FILE (preference pairs out of the votes, for training)
            --min_agreement X [0.5] (share of a pair's votes that must prefer the chosen answer)
            --judge hf:MODEL|openai:MODEL@URL|rm:MODEL ... (judges all pairs, also those without
            votes, for a win rate from both)   --judge_prompt FILE [configs/judges/pairwise.yaml]
  plan      --plan FILE (a scored study, human_eval.json: prints prompts against detectable
            difference and time, and stops)
  run       --output_dir DIR   --overwrite

Answers are cached: the same command continues after an interruption. A second call makes the same
page again, so that existing votes stay valid.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from preflab.evaluation.arguments import HELP_OF_PLAN, ComparisonArguments, JudgeArguments
from preflab.evaluation.run_list import print_runs
from utils.cli import option
from utils.errors import UserError, is_main_process, run
from utils.stage import print_main, start


@dataclass
class HumanEvalArguments(JudgeArguments):
    """Keys of this script."""

    prompts: str = option("Prompts: a hub id, file or hf:// file.", "data/eval_prompts/reference.jsonl")
    prompts_split: str = option("Split of --prompts.", "test")
    prompts_config: str | None = option("Configuration of --prompts.")
    category_key: str = option("Column with the prompts' categories.", "category")
    models: list[str] | None = option("Further models, name=PATH or name=openai:MODEL@URL each.")
    pairs_per_prompt: int = option("Pairings of models shown per prompt.", 1)
    repeat_share: float = option("Share of the pairs that is shown twice, sides swapped.", 0.05)
    # Random by default: with a fixed seed, annotators who know this code could derive the sides.
    sides_seed: int | None = option("Seed of sides and order (default: random, and recorded in the key).")
    score: list[str] | None = option("Votes files to score, as the page exported them.")
    key: str | None = option("Key of the votes' study (default: the one below --eval_out).")
    pairs: str | None = option("JSON lines file for preference pairs out of the scored votes.")
    judge: list[str] | None = option(
        "Score: a judge of all pairs, whose verdicts help few votes (prediction-powered); several are averaged.",
    )
    judge_prompt: str = option("YAML of the judge's prompt.", "configs/judges/pairwise.yaml")
    min_agreement: float = option("Share of a pair's votes that must prefer the chosen answer of --pairs.", 0.5)
    plan: str | None = option(
        HELP_OF_PLAN.replace("from a pilot of this many prompts, which are judged first, or ", "")
    )


def check(args, c) -> None:
    """Raise UserError for contradictory or out-of-range arguments."""
    args.check()
    c.refuse_output_json()
    if args.pairs_per_prompt < 1:
        raise UserError(f"--pairs_per_prompt {args.pairs_per_prompt}: must be at least 1")
    # A repeat follows its first showing by half a page, so only pairs of the first half can be repeated.
    if not 0 <= args.repeat_share <= 0.5:
        raise UserError(f"--repeat_share {args.repeat_share}: must be from 0 to 0.5")
    if args.plan and args.plan.isdigit():
        raise UserError(
            f"--plan {args.plan}: people judge the pilot: make a page with --limit {args.plan}, score its votes, and"
            " give that human_eval.json to --plan"
        )
    if args.key and not args.score:
        raise UserError("--key needs --score: give the votes files too")
    if args.judge and not args.score:
        raise UserError("--judge needs --score: verdicts help votes; give the votes files too")
    if args.pairs and not args.score:
        raise UserError("--pairs needs --score: give the votes files too")
    # Run and limit are recorded in the key; flags could only contradict it.
    if args.score and (c.run_name or c.limit):
        raise UserError("--score finds the run by the votes' study: remove --run_name and --limit")
    # An empty list would otherwise count as no --score, and the models would answer.
    if args.score == []:
        raise UserError("--score: give at least one votes file")
    # `dpo` is tuned's column (COLUMN_OF); the others are not models.
    reserved = {"prompt", "dpo", "truncated"} & {spec.split("=")[0] for spec in args.models or []}
    if reserved:
        raise UserError(f"--models {reserved.pop()}=...: the candidates' file uses this column name; choose another")


def main():
    stage, comparison_args, args = start(
        "human_eval", __doc__, ComparisonArguments, HumanEvalArguments, listing=print_runs
    )
    check(args, comparison_args)

    from preflab.evaluation import plan
    from preflab.evaluation.comparison import resolve
    from preflab.human import dump, metrics, pairs, powered, report, study, votes
    from preflab.judging.vote_pairs import check_agreement, sentence
    from utils.artifacts import check_writable, with_limit_suffix
    from utils.distributed import join_processes

    check_agreement(args.min_agreement)
    eval_out, output_dir = comparison_args.eval_out, comparison_args.output_dir
    if args.plan:
        return plan.plan_from_file(stage, Path(args.plan).expanduser(), output_dir, comparison_args.seed)
    if not args.score:
        join_processes()
        comparison = resolve(comparison_args, answers_only=True)
        comparison.hold(comparison.path("human_eval", ".html"))
        prompts, answers, about = dump.answer_prompts(stage, comparison, args)
        # The other processes only helped to generate; drawing a salt and writing happen once.
        if is_main_process():
            title = f"{comparison.name}: {' and '.join(answers)}, {len(prompts)} prompts"
            key, paths = dump.write(comparison, args, prompts, answers, about, title)
            # --score searches --eval_out and one level below; elsewhere the user has to name the key.
            key_is_found = paths["key"].parent.resolve().parent == Path(eval_out).resolve()
            searched = "" if eval_out == ComparisonArguments.eval_out else f" --eval_out {eval_out}"
            key_flag = searched if key_is_found else f" --key {paths['key']}"
            notes = [about["data"][key] for key in ("trained_on", "not_held_out") if key in about["data"]]
            print_main("\n\n".join([*notes, report.render_page(key, about["metrics"], paths, title, key_flag)]))
        return

    exports = votes.read_votes(args.score)
    # read_votes has checked that all files are of the same study.
    study_id = next(iter(exports.values()))["study"]
    folders = [eval_out, *([output_dir] if output_dir else [])]
    key_file = study.find_key(study_id, folders, args.key, args.score[0])
    out = check_writable(output_dir or key_file.parent, "--output_dir")
    key, candidates, about = study.read_study(key_file)
    rows = votes.unblind(exports, key, about)
    summary_file = out / f"{with_limit_suffix('human_eval', key['limit'])}.json"
    votes_files = votes.describe_files(exports)
    # Before the metrics, so that a refused call writes nothing.
    votes.ensure_no_votes_lost(summary_file, votes_files, comparison_args.overwrite)
    pair_rows, pair_counts = [], {}
    if args.pairs:
        pairs.ensure_own_file(Path(args.pairs), study_id, comparison_args.overwrite)
        pair_rows, pair_counts = pairs.pairs_of_study(rows, candidates, about, study_id, args.min_agreement)

    judges = powered.make_judges(args, comparison_args, about)
    sections = metrics.summarise(rows, key, candidates, about, comparison_args.seed)
    if judges:
        scores = powered.judged_pairs(judges, candidates, about, comparison_args)
        powered.add(sections, rows, scores, comparison_args.seed)
    name = about["run"]["run_name"]
    annotators = "1 annotator" if len(exports) == 1 else f"{len(exports)} annotators"
    title = f"{name}: {annotators}, {len(candidates)} prompts, blind"
    # Rendered here, because the call below removes `metrics` from the sections.
    rendered = report.render(sections, title, about["data"])
    stage.publish(
        summary_file,
        about["model"],
        sections.pop("metrics"),
        rendered,
        run={"run_name": name, "limit": key["limit"]},
        seed=comparison_args.seed,
        rows=rows,
        figure=partial(report.draw, sections=sections, title=title),
        files={
            summary_file.with_name(f"{summary_file.stem}_strongest.md"): report.strongest(rows, candidates, title),
            # An empty file could not be trained on.
            **({Path(args.pairs): pair_rows} if pair_rows else {}),
        },
        **sections,
        **({"pairs": pair_counts} if args.pairs else {}),
        study={k: key[k] for k in ("study", "sides_seed", "repeat_share", "pairs_per_prompt", "candidates_sha256")},
        votes=votes_files,
        data=about["data"],
        sampling=about["sampling"],
    )
    if args.pairs:
        print_main(f"\n{sentence(pair_counts, args.pairs, args.min_agreement)}")


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
