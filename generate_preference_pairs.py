"""Make preference pairs of a model's own answers: sample several to a prompt, score them, take the best and the worst.

    python generate_preference_pairs.py --config configs/pairs/quickstart-sppo.yaml \\
        --training_config configs/quickstart-sppo-iter1.yaml --part 1                             # CPU, 2 cores
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml generate_preference_pairs.py \\
        --config configs/pairs/gemma-2-9b-it-sppo.yaml --training_config configs/gemma-2-9b-it-sppo-iter1.yaml --part 1
    python generate_preference_pairs.py --dataset_name prompts.jsonl --model_name_or_path ID --scorer rm:MODEL

Answers: which of the model's own answers does a scorer prefer, how surely, and would another scorer agree? It is the
data half of an SPPO iteration (run_sppo_iteration.sh does both). Writes to eval_out/<run_name>/: samples.jsonl,
scores.jsonl, the pairs as train.jsonl and test.jsonl (with win_chosen and win_rejected, ready for
dpo_train_human_preference.py), preference_pairs.json and preference_pairs.png; manifest.json says which stage is done.

  model     --model_name_or_path ID|FOLDER   --adapter_path FOLDER   --dtype   --engine auto|hf|vllm
            --training_config YAML: the model (and adapter) that this training starts from, and its dataset_name as the
            folder to write
  prompts   --dataset_name ID|FILE   --split NAME ({part} in it becomes --part)   --parts 3 --part 1   --limit N
            --test_prompts 100 (held out, by a hash of the prompt)   --answers own|given (the rows hold several answers)
  sampling  --sampling_seeds 0 50 100 150 200 (one answer each)   --temperature 0.7  --top_p 0.9  --max_new_tokens 2048
  scoring   --scorer rm:MODEL|pair:MODEL|judge:hf:MODEL|judge:openai:MODEL@URL|FILE.py:FUNCTION|columns|longer|shorter
            |random   --also_score OTHER ...: how often they agree   --shuffle_scores SEED: a control
  run       --stage all|sample|score|pair   --run_name NAME   --eval_out eval_out   --overwrite
"""

from dataclasses import dataclass, field

from utils.cli import option, quick_help
from utils.errors import UserError, is_main_process, run

STAGES = ("sample", "score", "pair")


@dataclass
class PairArguments:
    """Keys of this script."""

    model_name_or_path: str | None = option("Hub id, folder or builtin model that answers.")
    model_revision: str | None = option("Hub revision of the model.")
    adapter_path: str | None = option("LoRA folder or hub id on top of it.")
    training_config: str | None = option("YAML of the training that will read the pairs: names model and folder.")
    dtype: str | None = option(
        "Precision of the weights (default: bfloat16 on a GPU, float32 on a CPU).",
        choices=["float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = option("sdpa, eager or flash_attention_2.")
    chat_template_path: str | None = option("Jinja file that replaces the chat template.")
    trust_remote_code: bool = option("Run model code from the hub.", False)
    engine: str = option("What generates: vLLM where it is installed, else transformers.", "auto",
                         choices=["auto", "hf", "vllm"])  # fmt: skip
    dataset_name: str | None = option("Prompts: hub id, file or folder, in any form of this project.")
    dataset_config: str | None = option("Configuration of a hub dataset.")
    dataset_revision: str | None = option("Revision of a hub dataset.")
    split: str = option("Split of the prompts; {part} in it becomes --part.", "train")
    answers: str = option("own: the model answers; given: the rows hold the answers.", "own", choices=["own", "given"])
    parts: int | None = option("Cut the prompts into so many shares (where the split does not name them).")
    part: int | None = option("The share, or {part} of the split: an iteration's number, from 1.")
    test_prompts: int = option("Prompts whose pairs are held out as test.jsonl.", 100)
    sampling_seeds: list[int] = field(
        default_factory=lambda: [0, 50, 100, 150, 200], metadata={"help": "One answer a prompt for each seed."}
    )
    temperature: float = option("Of the sampling, above 0.", 0.7)
    top_p: float = option("Nucleus of the sampling.", 0.9)
    max_new_tokens: int = option("Longest answer in tokens.", 2048)
    scorer: str = option("What ranks the answers (see --help).", "pair:llm-blender/PairRM-hf")
    also_score: list[str] = field(
        default_factory=list, metadata={"help": "Further scorers, whose agreement with the first is reported."}
    )
    scorer_dtype: str | None = option(
        "Precision of a local scorer (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    judge_prompt: str = option("YAML of a judge's prompt, for judge:...", "configs/judges/pairwise.yaml")
    shuffle_scores: int | None = option("Control: deal the scores out at random among a prompt's answers, with a seed.")
    stage: str = option("all, or one of sample, score and pair.", "all", choices=["all", *STAGES])
    batch_size: int | None = option("Most sequences a batch, below the token budget (default: no limit).")
    batch_tokens: int | None = option("Padded tokens a batch (default: 16384 on a GPU, 2048 on a CPU).")
    limit: int | None = option("Use only the first prompts; marks the name.")
    seed: int = option("Seed of the resampling, and of the control `random`.", 42)
    run_name: str | None = option("Name of the results' folder (default: the training's, or the config's).")
    eval_out: str = option("Results go to <eval_out>/<run_name>/.", "eval_out")
    overwrite: bool = option("Compute everything again, whatever an earlier call kept.", False)


# What moves no pair may differ between two calls that write the same files.
ARGUMENTS_NOT_IN_IDENTITY = {
    "stage",
    "batch_size",
    "batch_tokens",
    "overwrite",
    "eval_out",
    "engine",
    "trust_remote_code",
}
# What the later stages look at; all else is the samples' business.
STAGE_OF_ARGUMENT = {"scorer": "score", "also_score": "score", "scorer_dtype": "score", "judge_prompt": "score",
            "seed": "score", "shuffle_scores": "pair"}  # fmt: skip
WRITES = {"sample": ("samples.jsonl",), "score": ("scores.jsonl",),
          "pair": ("train.jsonl", "test.jsonl", "preference_pairs.json", "preference_pairs.png")}  # fmt: skip


def check(args) -> None:
    """Refuse what no pair can come of."""
    for key in ("max_new_tokens", "batch_size", "batch_tokens", "limit", "parts", "part"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    if args.dataset_name is None:
        raise UserError("--dataset_name is missing: the prompts, as a hub id, a local file or a folder")
    if args.answers == "own" and args.model_name_or_path is None:
        raise UserError("--model_name_or_path is missing: the model that answers (or name its --training_config)")
    if args.answers == "own" and (not args.temperature > 0 or not 0 < args.top_p <= 1):
        raise UserError("--temperature must be above 0 (else all samples are one), --top_p in (0, 1]")
    if args.answers == "own" and len(set(args.sampling_seeds)) < 2:
        raise UserError("--sampling_seeds: a pair needs two answers, so at least two different seeds")
    if args.test_prompts < 0:
        raise UserError(f"--test_prompts {args.test_prompts}: must be at least 0")
    if "{part}" in args.split and args.part is None:
        raise UserError(f"--split {args.split}: needs --part, the number that stands for {{part}}")
    if args.parts is not None and not 1 <= (args.part or 0) <= args.parts:
        raise UserError(f"--parts {args.parts}: needs --part from 1 to {args.parts}")


def output_folder(args, asked: dict):
    """The folder of the results, claimed for this request by its manifest. For rank 0 alone.

    Raises UserError where it holds another's, or where a stage is asked for whose input was made otherwise.
    """
    from pathlib import Path

    from utils.artifacts import check_writable, read_json, with_limit_suffix, write_json

    check_writable(args.eval_out, "--eval_out")
    folder = Path(args.eval_out) / with_limit_suffix(args.run_name, args.limit)
    manifest = folder / "manifest.json"
    if not manifest.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} holds files that are no pairs of this script: choose another --run_name")
    before = read_json(manifest) if manifest.exists() else {"args": asked, "stages": {}}
    # Where no stage was finished there is nothing to protect: answers and scores are kept under their own settings.
    protected = asked if before["stages"] else {}
    changed = sorted(k for k in protected if k not in ARGUMENTS_NOT_IN_IDENTITY and asked[k] != before["args"].get(k))
    first = 0 if args.stage == "all" else STAGES.index(args.stage)
    earlier = [k for k in changed if STAGES.index(STAGE_OF_ARGUMENT.get(k, "sample")) < first]
    refused = earlier if args.overwrite else changed
    if refused:
        what = ", ".join(f"{k} {before['args'].get(k)!r} -> {asked[k]!r}" for k in refused[:3])
        mend = "redo the stage that they belong to, too" if args.overwrite else "or --overwrite them"
        raise UserError(f"{folder} holds other pairs ({what}): choose another --run_name, {mend}")
    if args.overwrite:
        for stage in STAGES[first:]:
            before["stages"].pop(stage, None)
            for name in WRITES[stage]:
                (folder / name).unlink(missing_ok=True)
    # Before the first answer, so that an interrupted call is known for what it was.
    write_json(manifest, {"args": asked, "stages": before["stages"]})
    return folder


def sample(args, folder) -> dict:
    """Answer every prompt under each seed, or read the answers that the data hold; write samples.jsonl."""
    from preflab.data.prompts import load_candidates, load_prompts
    from preflab.judging.answers import answer_each, answerable, policy_model
    from preflab.models.vllm_engine import choose_engine
    from preflab.pairs.pairing import Sampled, part_of
    from utils.artifacts import write_rows

    split = args.split.replace("{part}", str(args.part))
    source = {"name": args.dataset_name, "split": split, "config": args.dataset_config}
    source["revision"] = args.dataset_revision
    if args.answers == "given":
        rows, summary = load_candidates([source], None if args.parts else args.limit)
        rows = part_of(rows, args.parts, args.part)[: args.limit]
        prompts, model = [prompt for prompt, _, _ in rows], None
        held_out = kept_for_testing(args, prompts)
        answers = [[{"text": text, "tokens": None, "finish_reason": None} for text in texts] for _, texts, _ in rows]
        given = [numbers or None for _, _, numbers in rows]
    else:
        prompts, summary = load_prompts([source], limit=None if args.parts else args.limit)
        prompts = part_of(prompts, args.parts, args.part)[: args.limit]
        answerer = policy_model(args)
        prompts, refused = answerable([answerer], prompts)
        summary["left_out"] |= {"template_refused": refused} if refused else {}
        held_out = kept_for_testing(args, prompts)
        sampling = {key: getattr(args, key) for key in ("max_new_tokens", "temperature", "top_p")}
        engine = choose_engine(args.engine)
        columns = answer_each(answerer, prompts, [{**sampling, "seed": s} for s in args.sampling_seeds], args, engine)
        seeded = list(zip(args.sampling_seeds, columns, strict=True))
        answers = [[{**column[k], "seed": seed} for seed, column in seeded] for k in range(len(prompts))]
        given, model = [None] * len(prompts), {**answerer.identity, "engine": engine}
    rows = [Sampled(p, a, p.key in held_out, g).row() for p, a, g in zip(prompts, answers, given, strict=True)]
    write_rows(folder / "samples.jsonl", rows)
    return {"prompts": len(prompts), "data": summary, "model": model}


def kept_for_testing(args, prompts) -> set[str]:
    """The keys of the held-out prompts. Raises UserError where none would be left to train on."""
    from preflab.pairs.pairing import held_out_keys

    held_out = held_out_keys(prompts, args.test_prompts)
    if len(held_out) == len({p.key for p in prompts}):
        few = f" that --limit {args.limit} leaves" if args.limit else ""
        raise UserError(f"--test_prompts {args.test_prompts}: would hold out all {len(prompts)} prompts{few}; lower it")
    return held_out


def score(args, folder, scorers: list) -> dict:
    """Ask every scorer about every prompt's distinct answers; write scores.jsonl."""
    from preflab.pairs.pairing import candidates_of
    from preflab.pairs.scorers import Candidates
    from utils.artifacts import write_rows

    samples = read_samples(folder)
    found = [candidates_of(s) for s in samples]
    items = [c for c in found if isinstance(c, Candidates)]
    if not items:
        raise UserError(f"{folder}/samples.jsonl: no prompt has two different answers; raise --temperature or --top_p")
    about, columns = {}, {}
    for scorer in scorers:
        about[scorer.name] = scorer.identity()
        columns[scorer.name] = scorer.score(items, args.eval_out, args.overwrite)
    rows = []
    for k, item in enumerate(items):
        row = {"prompt_id": item.prompt.key, "answers": item.answers, "counts": item.counts, "scorers": {}}
        for name, results in columns.items():
            said = results[k]
            row["scorers"][name] = {"error": said} if isinstance(said, str) else said.__dict__
        rows.append(row)
    write_rows(folder / "scores.jsonl", rows)
    return {"scored": len(items), "scorers": about}


def scorers_of(args) -> list:
    """The scorers, the one that ranks first. Raises UserError for one that cannot be made."""
    from preflab.models.loading import default_dtype
    from preflab.pairs.scorers import make_scorer

    options = {
        "dtype": args.scorer_dtype or default_dtype(),
        "judge_prompt": args.judge_prompt,
        "attempts": 4,
        "timeout": 120.0,
        "concurrency": 8,
        **{key: getattr(args, key) for key in ("batch_tokens", "batch_size", "attn_implementation", "seed")},
        "trust_remote_code": args.trust_remote_code,
    }
    return [make_scorer(spec, options) for spec in dict.fromkeys([args.scorer, *args.also_score])]


def read_samples(folder) -> list:
    """What the stage before wrote."""
    from preflab.pairs.pairing import Sampled
    from utils.artifacts import RowFile

    rows = RowFile(folder / "samples.jsonl").read()
    if not rows:
        raise UserError(f"{folder}/samples.jsonl is not there: run --stage sample first, or all stages")
    return [Sampled.read(row) for row in rows]


def make_pairs(args, folder) -> tuple[dict, dict]:
    """The best against the worst of every prompt; writes train.jsonl and test.jsonl.

    Returns:
        (pairs by split, sections of the summary).
    """
    from collections import Counter

    from preflab.pairs.pairing import agreement, candidates_of, pair_metrics, pair_of, sampling_metrics, shuffled
    from preflab.pairs.scorers import Scores
    from utils.artifacts import RowFile, write_rows

    samples, rows = read_samples(folder), RowFile(folder / "scores.jsonl").read()
    if not rows:
        raise UserError(f"{folder}/scores.jsonl is not there: run --stage score first, or all stages")
    said = {row["prompt_id"]: row for row in rows}
    names = list(rows[0]["scorers"])
    dropped, pairs, scored = Counter(), {"train": [], "test": []}, {}
    for one in samples:
        candidates = candidates_of(one)
        row = said.get(one.prompt.key)
        reason = candidates if isinstance(candidates, str) else None
        if reason is None:
            if row is None or row["answers"] != candidates.answers:
                raise UserError(f"{folder}/scores.jsonl is of other samples: run --stage score again")
            reason = "unscored" if "error" in row["scorers"][names[0]] else None
        if reason is None:
            scores = Scores(**row["scorers"][names[0]])
            if args.shuffle_scores is not None:
                scores = shuffled(candidates, scores, args.shuffle_scores)
            scored[one.prompt.key] = (candidates, scores)
            pair = pair_of(one, candidates, scores)
            reason = pair if isinstance(pair, str) else None
        if reason:
            dropped[reason] += 1
        else:
            pairs["test" if one.held_out else "train"].append(pair)
    if not pairs["train"]:
        raise UserError(f"{folder}: no pair came of {len(samples)} prompts; left out: {dict(dropped)}")
    for split, found in pairs.items():
        write_rows(folder / f"{split}.jsonl", found)
    others = {
        name: {key: Scores(**r["scorers"][name]) for key, r in said.items() if "error" not in r["scorers"][name]}
        for name in names[1:]
    }
    everyone = [*pairs["train"], *pairs["test"]]
    return pairs, {
        "sampling": sampling_metrics(samples, args.seed),
        "pairs": pair_metrics(everyone, list(scored.values()), args.seed),
        "agreement": agreement(everyone, scored, others, args.seed) if others else {},
        "counts": {
            "prompts": len(samples),
            "train": len(pairs["train"]),
            "test": len(pairs["test"]),
            "dropped": dict(dropped),
        },
        "shuffled": args.shuffle_scores is not None,
    }


def as_training_asks(args) -> None:
    """Take model and adapter from --training_config, and the folder to write from its dataset_name."""
    from pathlib import Path

    from utils.artifacts import read_yaml

    path = args.training_config
    config = read_yaml(path, "--training_config")
    if not {"model_name_or_path", "dataset_name"} <= set(config):
        raise UserError(
            f"--training_config {path}: needs model_name_or_path, and dataset_name, the folder of the pairs"
        )
    args.adapter_path = args.adapter_path or config.get("start_adapter")
    for key in ("model_name_or_path", "model_revision", "attn_implementation", "chat_template_path"):
        setattr(args, key, getattr(args, key) or config.get(key))
    folder = Path(config["dataset_name"])
    if args.run_name is None:
        args.run_name, args.eval_out = folder.name, str(folder.parent)


def main():
    quick_help(__doc__)

    import time

    from preflab.models.loading import default_batch_tokens, locate_adapter
    from preflab.pairs.report import conclude, pairs_figure
    from utils.artifacts import all_arguments, envelope, read_json, with_limit_suffix, write_json
    from utils.cli import parse, run_name
    from utils.distributed import join_processes, on_main_process, quiet_libraries
    from utils.provenance import run_record

    # What to make, and where to.
    started = time.monotonic()
    quiet_libraries()
    (args,) = parse((PairArguments,))
    if args.training_config:
        as_training_asks(args)
    check(args)
    if args.adapter_path:
        locate_adapter(args.adapter_path)
    if args.run_name is None:
        args.run_name = run_name(None, args.model_name_or_path or args.dataset_name, "pairs", None)
        args.run_name += f"-part{args.part}" if args.part else ""
    if args.batch_tokens is None:
        args.batch_tokens = default_batch_tokens()
    state, asked = join_processes(), all_arguments([args])
    folder = on_main_process(lambda: output_folder(args, asked))
    manifest = read_json(folder / "manifest.json")
    state.wait_for_everyone()
    # A scorer that cannot be made is told before the hours of sampling.
    scorers = scorers_of(args) if args.stage in ("all", "score") else []

    # Sample, score, pair: each stage reads what the one before wrote.
    sections = None
    for stage in STAGES if args.stage == "all" else (args.stage,):
        clock = time.monotonic()
        if stage == "sample":
            found = sample(args, folder)
        elif stage == "score":
            found = score(args, folder, scorers)
        else:
            pairs, sections = make_pairs(args, folder)
            found = sections["counts"]
        finished = {"seconds": round(time.monotonic() - clock, 1), "run": run_record(args.seed, 0.0)}
        manifest["stages"][stage] = {**found, **finished}
        write_json(folder / "manifest.json", manifest)
        state.wait_for_everyone()
    if not is_main_process():
        return
    if sections is None:
        return print(f"{args.stage}: done, see {folder}/manifest.json")

    # Write and tell.
    title = f"{with_limit_suffix(args.run_name, args.limit)}: pairs ranked by {args.scorer}"
    text, verdict = conclude(sections, title)
    metrics = {**sections["sampling"], **{k: m for k, m in sections["pairs"].items()}}
    metrics |= {f"{name}/{k}": m for name, found in sections["agreement"].items() for k, m in found.items()}
    sampled = manifest["stages"].get("sample", {})
    summary = envelope(
        "preference_pairs",
        {"policy": sampled.get("model"), "scorers": manifest["stages"].get("score", {}).get("scorers")},
        metrics,
        asked,
        run_record(args.seed, time.monotonic() - started, run_name=args.run_name, limit=args.limit),
        claim=verdict,
        text=text,
        **{key: sections[key] for key in ("counts", "agreement", "shuffled")},
        data=sampled.get("data"),
    )
    pairs_figure(folder / "preference_pairs.png", [*pairs["train"], *pairs["test"]], title)
    write_json(folder / "preference_pairs.json", summary)
    kept = "samples.jsonl, scores.jsonl, manifest.json"
    print(f"{text}\n\nwrote {folder}/: train.jsonl, test.jsonl, preference_pairs.json, preference_pairs.png, {kept}")


if __name__ == "__main__":
    run(main, "lower --batch_tokens or use --dtype bfloat16, then run the same command again to continue")
