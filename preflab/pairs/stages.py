"""The three stages of generate_preference_pairs.py: sample answers, score them, make pairs. Each reads files that the
stage before wrote, so they can run in separate calls.
"""

from collections import Counter

from preflab.data.candidates import load_candidates
from preflab.data.prompts import load_prompts
from preflab.data.sources import reading
from preflab.judging.answers import answer_each, answerable, engine_name, policy_model
from preflab.models.vllm_engine import choose_engine
from preflab.pairs.folder import PairsFolder
from preflab.pairs.pairing import Pairs, Sampled, candidates_of, held_out_keys, pairs_of, part_of, shuffled
from preflab.pairs.scorers import Candidates, Scores, make_scorer, scorer_options
from utils.artifacts import write_rows
from utils.errors import UserError


def make_scorers(args) -> list:
    """The scorers of --scorer and --also_score, the main one first. Raises UserError for one that cannot be made."""
    # dict.fromkeys drops a repeated scorer and keeps the order: the first one ranks.
    return [make_scorer(spec, scorer_options(args)) for spec in dict.fromkeys([args.scorer, *args.also_score])]


# ----------------------------------------------------------------------------------------------------------- sampling


def sample(args, folder: PairsFolder) -> dict:
    """Answer every prompt once per seed, or read the answers that the dataset holds; write samples.jsonl.

    Returns:
        The stage's manifest entry: number of prompts, what was read, the model's identity.
    """
    source = {
        "name": args.dataset_name,
        "split": args.split.replace("{part}", str(args.part)),
        "config": args.dataset_config,
        "revision": args.dataset_revision,
        **reading(args.columns, args.on_bad_row),
    }
    samples, data, model = _given_answers(args, source) if args.answers == "given" else _own_answers(args, source)
    # Rank 0 writes; every process has the same samples.
    write_rows(folder.path / "samples.jsonl", [sampled.row() for sampled in samples])
    return {"prompts": len(samples), "data": data, "model": model}


def _given_answers(args, source: dict) -> tuple[list[Sampled], dict, None]:
    """(samples, what was read, None): the answers of the dataset's rows, for --answers given."""
    rows, data = load_candidates([source], _read_limit(args))
    # First the part, then the limit, so that every part of a trial run has prompts.
    rows = part_of(rows, args.parts, args.part)[: args.limit]
    held_out = held_out_prompts(args, [prompt for prompt, _, _ in rows])
    samples = []
    for prompt, texts, numbers in rows:
        answers = [{"text": text, "tokens": None, "finish_reason": None} for text in texts]
        samples.append(Sampled(prompt, answers, prompt.key in held_out, numbers or None))
    return samples, data, None


def _own_answers(args, source: dict) -> tuple[list[Sampled], dict, dict]:
    """(samples, what was read, the model's identity): the model's answers, one per prompt and seed."""
    prompts, data = load_prompts([source], limit=_read_limit(args))
    prompts = part_of(prompts, args.parts, args.part)[: args.limit]
    model = policy_model(args)
    # Before the split into train and test, so that --test_prompts counts prompts with answers.
    prompts, refused = answerable([model], prompts)
    if refused:
        data["left_out"]["template_refused"] = refused
    held_out = held_out_prompts(args, prompts)
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_p")}
    engine = choose_engine(args.engine, bases=[model.base])
    # One list of answers per seed, in the prompts' order; the next loop regroups them by prompt.
    by_setting = [{**settings, "seed": seed} for seed in args.sampling_seeds]
    by_seed = answer_each(model, prompts, by_setting, args, engine, args.vllm_args)
    samples = []
    for k, prompt in enumerate(prompts):
        answers = [{**answers[k], "seed": seed} for seed, answers in zip(args.sampling_seeds, by_seed, strict=True)]
        samples.append(Sampled(prompt, answers, prompt.key in held_out))
    return samples, data, {**model.identity, "engine": engine_name(model, engine)}


def _read_limit(args) -> int | None:
    """How many rows to read. With --parts all: --limit counts prompts of the part."""
    return None if args.parts else args.limit


def held_out_prompts(args, prompts: list) -> set[str]:
    """The keys of the held-out prompts. Raises UserError if none would be left to train on."""
    held_out = held_out_keys(prompts, args.test_prompts)
    if len(held_out) == len({prompt.key for prompt in prompts}):
        limited = f" that --limit {args.limit} leaves" if args.limit else ""
        raise UserError(
            f"--test_prompts {args.test_prompts}: would hold out all {len(prompts)} prompts{limited}; lower it"
        )
    return held_out


# ------------------------------------------------------------------------------------------------------------ scoring


def score(args, folder: PairsFolder, scorers: list) -> dict:
    """Score every prompt's distinct answers with every scorer; write scores.jsonl.

    Returns:
        The stage's manifest entry: number of prompts scored, the scorers' identities.
    """
    candidates = [candidates_of(sampled) for sampled in read_samples(folder)]
    # The others are reasons (text), which `make_pairs` counts.
    items = [item for item in candidates if isinstance(item, Candidates)]
    if not items:
        raise UserError(
            f"{folder.path}/samples.jsonl: no prompt has two different answers; raise --temperature or --top_p"
        )
    results = {scorer.name: scorer.score(items, args.eval_out, args.overwrite) for scorer in scorers}
    rows = []
    for k, item in enumerate(items):
        row = {"prompt_id": item.prompt.key, "answers": item.answers, "counts": item.counts, "scorers": {}}
        for name, of_items in results.items():
            result = of_items[k]
            row["scorers"][name] = {"error": result} if isinstance(result, str) else result.__dict__
        # A failed prompt is kept with its error, so that the pairing stage can count it.
        rows.append(row)
    write_rows(folder.path / "scores.jsonl", rows)
    return {"scored": len(items), "scorers": {scorer.name: scorer.identity() for scorer in scorers}}


def read_samples(folder: PairsFolder) -> list[Sampled]:
    """The samples of the sample stage."""
    return [Sampled.read(row) for row in folder.rows("samples.jsonl", "sample")]


# ------------------------------------------------------------------------------------------------------------- pairing


def make_pairs(args, folder: PairsFolder) -> Pairs:
    """Pair the best with the worst answer of every prompt; write train.jsonl and test.jsonl.

    Raises:
        UserError: a stage's file is missing, scores belong to other samples, or there is no pair to train on.
    """
    samples, rows = read_samples(folder), folder.rows("scores.jsonl", "score")
    score_rows = {row["prompt_id"]: row for row in rows}
    # The first scorer ranks; the others are compared with it.
    main, *others = rows[0]["scorers"]
    dropped, pairs, scored = Counter(), {"train": [], "test": []}, {}
    for sampled in samples:
        candidates = candidates_of(sampled)
        if isinstance(candidates, str):
            dropped[candidates] += 1
            continue
        row = score_rows.get(sampled.prompt.key)
        # The scores are matched by position, so a changed order or text of the answers would assign them wrongly.
        if row is None or row["answers"] != candidates.answers:
            raise UserError(f"{folder.path}/scores.jsonl belongs to other samples: run --stage score again")
        if "error" in row["scorers"][main]:
            dropped["unscored"] += 1
            continue
        scores = Scores(**row["scorers"][main])
        # Before `scored` is filled: the metrics of the control must describe the shuffled scores.
        if args.shuffle_scores is not None:
            scores = shuffled(candidates, scores, args.shuffle_scores)
        scored[sampled.prompt.key] = (candidates, scores)
        rows_of_prompt = pairs_of(sampled, candidates, scores, args.pairs == "all", args.min_score_margin or 0.0)
        if isinstance(rows_of_prompt, str):
            dropped[rows_of_prompt] += 1
        else:
            pairs["test" if sampled.held_out else "train"] += rows_of_prompt
    if not pairs["train"]:
        raise UserError(f"{folder.path}: no train pair from {len(samples)} prompts; left out: {dict(dropped)}")
    # Written after the check, so that a call without a train pair writes neither file.
    for split, split_rows in pairs.items():
        write_rows(folder.path / f"{split}.jsonl", split_rows)
    other_scorers = {
        name: {
            key: Scores(**row["scorers"][name])
            for key, row in score_rows.items()
            if "error" not in row["scorers"][name]
        }
        for name in others
    }
    return Pairs(**pairs, samples=samples, scored=scored, other_scorers=other_scorers, dropped=dropped,
                 shuffled=args.shuffle_scores is not None)  # fmt: skip
