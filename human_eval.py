"""Which model's answers do people prefer? A blind side-by-side page, and the score of its votes.

    python human_eval.py                                            # the quickstart run, 60 shipped prompts, CPU
    python human_eval.py --run_name gemma-2b-it-dpo --prompts my_prompts.jsonl
    python human_eval.py --models other=princeton-nlp/gemma-2-9b-it-SimPO     # more than two models
    python human_eval.py --score votes-*.json                       # what the annotators exported

Without --score, both models answer the prompts, and a page is made that anybody can judge in a browser: send
human_eval.html, nothing else; it needs no server and no network, and knows nothing of which answer is whose. Writes
manual_eval_candidates.json (prompt, base, dpo) with .md and .about.json beside it, human_eval.html, and
human_eval_key.json, which says which side was whose: keep it to yourself.

With --score the votes are unblinded with that key. Writes human_eval.json, human_eval_rows.jsonl, human_eval.png and
human_eval_strongest.md beside the key.

The keys that matter (YAML keys and flags are the same; dashes and underscores both work; --help_all lists every key):

  models    --run_name NAME | --base_model ID --adapter_path FOLDER | --base_model ID --tuned_model ID|FOLDER
            --models name=FOLDER ...   --pairs_per_prompt 1
  prompts   --prompts ID|FILE|hf://FILE --prompts_split test --category_key category   --limit N
  generate  --max_new_tokens 256   --temperature 0   --top_p 1   --seed 42
  page      --repeat_share 0.05 (pairs asked twice, sides swapped)   --sides_seed N (left out: drawn, and recorded)
  score     --score FILE ...   --key FILE (left out: found below --eval_out by the votes' study)
  run       --output_dir DIR   --overwrite

Answers are kept as they come: the same command goes on where another call stopped, and a second call makes the same
page again, so that votes stay good.
"""

from dataclasses import dataclass

from preflab.evaluation.arguments import ComparisonArguments, GenerationArguments
from utils.cli import option, quick_help
from utils.errors import UserError, is_main_process, run


@dataclass
class HumanEvalArguments(GenerationArguments):
    """Keys of this script."""

    prompts: str = option("Prompts: a hub id, file or hf:// file.", "data/eval_prompts/reference.jsonl")
    prompts_split: str = option("Split of --prompts.", "test")
    prompts_config: str | None = option("Configuration of --prompts.")
    category_key: str = option("Column that names a prompt's category.", "category")
    models: list[str] | None = option("Further models, name=PATH each.")
    pairs_per_prompt: int = option("Pairings of models that are asked on each prompt.", 1)
    repeat_share: float = option("Share of the pairs that is asked again, sides swapped.", 0.05)
    sides_seed: int | None = option("Seed of sides and order (default: drawn, and kept in the key).")
    score: list[str] | None = option("Votes to score, as the page exported them.")
    key: str | None = option("The key of the votes' study (default: found below --eval_out).")


def check(args, c) -> None:
    """Refuse what cannot be run."""
    args.check()
    if c.output_json:
        raise UserError("--output_json: this script writes several files; --output_dir names another folder")
    if args.pairs_per_prompt < 1:
        raise UserError(f"--pairs_per_prompt {args.pairs_per_prompt}: must be at least 1")
    if not 0 <= args.repeat_share <= 0.5:
        raise UserError(f"--repeat_share {args.repeat_share}: must be from 0 to 0.5")
    if args.key and not args.score:
        raise UserError("--key belongs to --score: give the votes too")
    if args.score and (c.run_name or c.limit):
        raise UserError("--score finds its run by the votes' study: leave --run_name and --limit out")
    if args.score == []:
        raise UserError("--score: give the votes' files")
    taken = {"prompt", "dpo"} & {spec.split("=")[0] for spec in args.models or []}
    if taken:
        raise UserError(
            f"--models {taken.pop()}=...: the candidates' file has another column of that name; choose another"
        )


def dump(comparison_args, args, started) -> None:
    """Answers of every model, the page, and its key."""
    import time
    from pathlib import Path

    from preflab.data.prompts import load_prompts
    from preflab.evaluation.comparison import resolve
    from preflab.evaluation.two_models import TwoModels
    from preflab.human.report import dumped
    from preflab.human.study import STEMS, write_study
    from preflab.judging.answers import answer_prompts_with_all, answerable, answering_models
    from preflab.judging.battle_metrics import answer_metrics
    from utils.artifacts import all_arguments
    from utils.provenance import run_record

    comparison = resolve(comparison_args)
    c, models = comparison.args, TwoModels(comparison)
    source = {"name": args.prompts, "split": args.prompts_split, "config": args.prompts_config}
    prompts, read = load_prompts([source], args.category_key, c.limit)
    answering = answering_models(models, args.models)
    prompts, refused = answerable(answering, prompts)
    if refused:
        read["left_out"]["prompts refused by a chat template"] = refused
    answers = answer_prompts_with_all(models, answering, prompts, args.sampling(c.seed))
    if not is_main_process():
        return

    metrics = {name: answer_metrics(found, c.seed) for name, found in answers.items()}
    about = {
        "stage": "human_eval_dump",
        "model": {**models.describe(), "others": {p.name: p.identity for p in answering[2:]}},
        "sampling": args.sampling(c.seed),
        "metrics": metrics,
        "args": all_arguments([c, args]),
        "run": run_record(c.seed, time.monotonic() - started, run_name=comparison.name, limit=c.limit),
        "data": read,
        "prompts": [{"where": p.source, "uid": p.uid, "category": p.category} for p in prompts],
        "answers": {
            name: [{k: answer[k] for k in ("tokens", "finish_reason")} for answer in found]
            for name, found in answers.items()
        },
    }
    title = f"{comparison.name}: {' and '.join(answers)}, {len(prompts)} prompts"
    names = zip(("candidates", "page", "key"), STEMS, (".json", ".html", ".json"), strict=True)
    paths = {what: comparison.path(stem, suffix) for what, stem, suffix in names}
    settings = {k: getattr(args, k) for k in ("pairs_per_prompt", "repeat_share", "sides_seed")}
    key = write_study(paths, prompts, answers, title, about, {**settings, "limit": c.limit}, c.overwrite)
    print(dumped(key, metrics, paths["page"].name, title))
    print(f"\nwrote {', '.join(str(path) for path in paths.values())}, and the candidates' .md and .about.json")
    print(f"Send {paths['page'].name} to the annotators, and nothing else: key and candidates name the models.")
    found = paths["key"].parent.resolve().parent == Path(c.eval_out).resolve()
    where = "" if found else f" --key {paths['key']}"
    print(f"python human_eval.py --score votes-*.json{where} unblinds what they export.")


def score(c, args, started) -> None:
    """The votes, unblinded and counted."""
    import time
    from pathlib import Path

    from preflab.human.metrics import summarise
    from preflab.human.report import conclude, human_eval_figure, strongest
    from preflab.human.study import find_key, read_study
    from preflab.human.votes import read_votes, unblind
    from utils.artifacts import (
        all_arguments,
        check_writable,
        envelope,
        with_limit_suffix,
        write_json,
        write_rows,
        write_text,
    )
    from utils.provenance import run_record, sha256_of_files, shorten_paths

    exports = read_votes(args.score)
    first = next(iter(exports.values()))
    folders = [c.eval_out, *([c.output_dir] if c.output_dir else [])]
    place = find_key(first["study"], folders, args.key, args.score[0])
    out = check_writable(c.output_dir or place.parent, "--output_dir")
    key, candidates, about = read_study(place)
    rows = unblind(exports, key, about)
    sections = summarise(rows, key, candidates, about, c.seed)
    name, people = about["run"]["run_name"], len(exports)
    who = "1 annotator" if people == 1 else f"{people} annotators"
    title = f"{name}: {who}, {len(candidates)} prompts, blind"
    text, verdict = conclude(sections, title)

    def path(stem, suffix):
        return Path(out) / f"{with_limit_suffix('human_eval', key['limit'])}{stem}{suffix}"

    votes = {
        shorten_paths(f): {"annotator": e["annotator"], "sha256": sha256_of_files([f])} for f, e in exports.items()
    }
    ensure_no_votes_lost(path("", ".json"), votes, c.overwrite)
    write_rows(path("_rows", ".jsonl"), rows)
    write_text(path("_strongest", ".md"), strongest(rows, candidates, title))
    human_eval_figure(path("", ".png"), sections, title)
    summary = envelope(
        "human_eval",
        about["model"],
        sections.pop("metrics"),
        all_arguments([c, args]),
        run_record(c.seed, time.monotonic() - started, run_name=name, limit=key["limit"]),
        claim=verdict,
        text=text,
        **sections,
        study={k: key[k] for k in ("study", "sides_seed", "repeat_share", "pairs_per_prompt", "candidates_sha256")},
        votes=votes,
        data=about["data"],
        sampling=about["sampling"],
    )
    write_json(path("", ".json"), summary)
    print(text)
    written = [path("", ".json"), path("_rows", ".jsonl"), path("", ".png"), path("_strongest", ".md")]
    print(f"\nwrote {', '.join(map(str, written))}")


def ensure_no_votes_lost(path, votes: dict, overwrite: bool) -> None:
    """Refuse to replace a score that counts people whom this one leaves out."""
    from utils.artifacts import read_json

    before = read_json(path).get("votes", {}) if path.exists() and not overwrite else {}
    now = {found["annotator"] for found in votes.values()}
    missing = sorted({found["annotator"] for found in before.values()} - now)
    if missing:
        raise UserError(
            f"{path} also counts {', '.join(missing)}: give all votes together, or name a folder with --output_dir, or"
            " --overwrite it"
        )


def main():
    quick_help(__doc__, runs_bare=True)

    import time

    from utils.cli import parse
    from utils.distributed import join_processes, quiet_libraries

    started = time.monotonic()
    quiet_libraries()
    comparison_args, args = parse((ComparisonArguments, HumanEvalArguments))
    check(args, comparison_args)
    if args.score:
        return score(comparison_args, args, started)
    join_processes()
    dump(comparison_args, args, started)


if __name__ == "__main__":
    run(main, "lower --batch_tokens or --batch_size and run the same command again; or use --dtype bfloat16")
