"""Make preference pairs from a model's own answers: sample, score, pair the best with the worst.

    python generate_preference_pairs.py --config configs/pairs/quickstart-sppo.yaml \\
        --training_config configs/quickstart-sppo-iter1.yaml --part 1   # CPU, 2 cores
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml generate_preference_pairs.py \\
        --config configs/pairs/gemma-2-9b-it-sppo.yaml \\
        --training_config configs/gemma-2-9b-it-sppo-iter1.yaml --part 1
    python generate_preference_pairs.py --dataset_name prompts.jsonl --model_name_or_path ID \\
        --scorer rm:MODEL
    python generate_preference_pairs.py --dataset_name ranked.jsonl --answers given \\
        --scorer columns                                                # ranked or scored lists

Question: which of the model's own answers does a scorer prefer, by how much, and would another
scorer agree? This is the data half of an online iteration
(run_online_iteration.sh runs both halves).
Writes to eval_out/<run_name>/: samples.jsonl, scores.jsonl, the pairs as train.jsonl and test.jsonl
(with win_chosen and win_rejected, ready for dpo_train_human_preference.py), preference_pairs.json
and preference_pairs.png; manifest.json lists the finished stages.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  model     --model_name_or_path ID|FOLDER|openai:MODEL@URL (a server)
            --adapter_path FOLDER (alone: on the base of its run)
            --dtype float32|bfloat16|float16   --engine auto|hf|vllm [auto]
            --vllm_args KEY=VALUE ... (vLLM's settings, e.g. tensor_parallel_size=2)
            --training_config YAML: use the model (and adapter) that this training starts from, and
            write to the folder that its dataset_name names
  prompts   --dataset_name ID|FILE   --split NAME [train] ({part} in it is replaced by --part)
            --parts N   --part N   --limit N
            --test_prompts N [100] (held out by a hash of the prompt)
            --answers own|given [own] (given: the dataset's answers)
  sampling  --sampling_seeds N ... [0 50 100 150 200] (one answer per seed)   --temperature X [0.7]
            --top_p X [0.9]   --max_new_tokens N [2048]
  scoring   --scorer NAME [pair:llm-blender/PairRM-hf]: rm:MODEL, pair:MODEL, implicit:RUN,
            judge:hf:MODEL, judge:openai:MODEL@URL, FILE.py:FUNCTION, columns, longer, shorter,
            random
            --also_score OTHER ...: report their agreement   --shuffle_scores SEED: a control
            --pairs best_worst|all [best_worst]   --min_score_margin X
  run       --stage all|sample|score|pair [all]   --run_name NAME   --eval_out DIR [eval_out]
            --overwrite   --list (all runs)
"""

from dataclasses import dataclass, field
from pathlib import Path

from preflab.evaluation.arguments import (
    HELP_OF_ENGINE,
    HELP_OF_VLLM_ARGS,
    DatasetArguments,
    ModelArguments,
    OutputArguments,
    ServerArguments,
)
from preflab.evaluation.run_list import print_runs
from preflab.evaluation.servers import SERVER, model_and_url, model_of_server
from preflab.models.vllm_environment import parse_args
from preflab.pairs.folder import STAGES, open_folder
from utils.artifacts import all_arguments, read_yaml, with_limit_suffix
from utils.cli import option, run_name
from utils.errors import UserError, run
from utils.secrets_in_text import without_secrets
from utils.stage import print_main, start


@dataclass
class PairArguments(ModelArguments, DatasetArguments, OutputArguments, ServerArguments):
    """The flags of this script."""

    model_name_or_path: str | None = option(
        "Model that answers: hub id, folder, builtin model or openai:MODEL@URL (a server)."
    )
    model_revision: str | None = option("Hub revision of the model.")
    adapter_path: str | None = option("LoRA folder or hub id on top of the model.")
    training_config: str | None = option("YAML of the training that will read the pairs: names model and folder.")
    dtype: str | None = option(
        "Precision of the weights (default: bfloat16 on a GPU, float32 on a CPU).",
        choices=["float32", "bfloat16", "float16"],
    )
    # The engines sample different answers for the same seed, so the choice is part of the answers' cache.
    engine: str = option(HELP_OF_ENGINE, "auto", choices=["auto", "hf", "vllm"])
    vllm_args: list[str] | None = option(HELP_OF_VLLM_ARGS)
    dataset_name: str | None = option("Prompts: hub id, file or folder, in any supported format.")
    split: str = option("Split of the prompts; {part} in it is replaced by --part.", "train")
    answers: str = option("own: the model answers; given: use the dataset's answers.", "own", choices=["own", "given"])
    parts: int | None = option("Divide the prompts into this many parts (if the split does not name them).")
    part: int | None = option("The part to use, and {part} of --split: an iteration's number, from 1.")
    test_prompts: int = option("Number of prompts whose pairs are held out as test.jsonl.", 100)
    sampling_seeds: list[int] = field(
        default_factory=lambda: [0, 50, 100, 150, 200], metadata={"help": "Seeds; one answer per prompt and seed."}
    )
    temperature: float = option("Sampling temperature (> 0).", 0.7)
    top_p: float = option("Top-p (nucleus) threshold.", 0.9)
    max_new_tokens: int = option("Maximum answer length in tokens.", 2048)
    scorer: str = option("Scorer that ranks the answers (see --help).", "pair:llm-blender/PairRM-hf")
    also_score: list[str] = field(
        default_factory=list, metadata={"help": "Further scorers, whose agreement with --scorer is reported."}
    )
    scorer_dtype: str | None = option(
        "Precision of a local scorer (default: bfloat16 on a GPU, else float32).",
        choices=["float32", "bfloat16", "float16"],
    )
    judge_prompt: str = option("YAML file with the prompt of judge:... scorers.", "configs/judges/pairwise.yaml")
    pairs: str = option(
        "best_worst: one pair per prompt; all: every two answers.", "best_worst", choices=["best_worst", "all"]
    )
    min_score_margin: float | None = option("Leave out pairs with a smaller difference of scores.")
    shuffle_scores: int | None = option("Control: shuffle the scores among each prompt's answers, with this seed.")
    stage: str = option("all, or one of sample, score and pair.", "all", choices=["all", *STAGES])
    limit: int | None = option("Use only the first prompts; marks the folder's name.")
    seed: int = option("Seed of bootstrap resampling and of the control `random`.", 42)
    run_name: str | None = option("Name of the output folder (default: the training's, or the config's).")


def check(args) -> None:
    """Raise UserError for arguments that cannot produce pairs."""
    for key in ("max_new_tokens", "batch_size", "batch_tokens", "limit", "parts", "part"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be above 0")
    if args.dataset_name is None:
        raise UserError("--dataset_name is missing: give the prompts as a hub id, a local file or a folder")
    if args.answers == "own":
        if args.model_name_or_path is None:
            raise UserError(
                "--model_name_or_path is missing: give the model that answers, --adapter_path checkpoints/NAME for a"
                " run's (--list shows all), or --training_config"
            )
        if args.model_name_or_path.startswith(SERVER):
            model_and_url(args.model_name_or_path, f"--model_name_or_path {args.model_name_or_path}")
            if args.adapter_path:
                raise UserError("--adapter_path: an adapter runs on weights here; the server must load it itself")
        if not args.temperature > 0:
            raise UserError(f"--temperature {args.temperature}: must be above 0, or all samples are equal")
        if not 0 < args.top_p <= 1:
            raise UserError(f"--top_p {args.top_p}: must be in (0, 1]")
        # Equal seeds give equal answers.
        if len(set(args.sampling_seeds)) < 2:
            raise UserError("--sampling_seeds: a pair needs two answers, so give at least two different seeds")
    args.check_server()
    parse_args(args.vllm_args)
    if args.test_prompts < 0:
        raise UserError(f"--test_prompts {args.test_prompts}: must be at least 0")
    if "{part}" in args.split and args.part is None:
        raise UserError(f"--split {args.split}: needs --part, the number that replaces {{part}}")
    if args.parts is not None and not 1 <= (args.part or 0) <= args.parts:
        raise UserError(f"--parts {args.parts}: needs --part from 1 to {args.parts}")


def apply_training_config(args) -> None:
    """Take model and adapter from --training_config, and the output folder from its dataset_name."""
    path = args.training_config
    config = read_yaml(path, "--training_config")
    if not {"model_name_or_path", "dataset_name"} <= set(config):
        raise UserError(
            f"--training_config {path}: needs model_name_or_path, and dataset_name, the folder of the pairs"
        )
    # The adapter that training continues from is the policy whose answers are compared.
    args.adapter_path = args.adapter_path or config.get("start_adapter")
    # Flags of this call take precedence over the training's YAML.
    for key in ("model_name_or_path", "model_revision", "attn_implementation", "chat_template_path"):
        setattr(args, key, getattr(args, key) or config.get(key))
    folder = Path(config["dataset_name"])
    # The training reads the pairs from this folder, so sampling writes them there.
    if args.run_name is None:
        args.run_name, args.eval_out = folder.name, str(folder.parent)


def take_base_of_adapter(args) -> None:
    """Take the model from the run, or the config, of --adapter_path."""
    # Not at the top: it imports torch.
    from preflab.evaluation.comparison import base_of
    from preflab.models.loading import locate_adapter

    args.model_name_or_path = base_of(locate_adapter(args.adapter_path))


def default_run_name(args) -> str:
    """The name of the config or of the model (else the dataset), with the part if there is one."""
    name = run_name(None, model_of_server(args.model_name_or_path or args.dataset_name), "pairs", None)
    return name + (f"-part{args.part}" if args.part else "")


def main():
    stage, args = start("preference_pairs", __doc__, PairArguments, runs_bare=False, listing=print_runs)
    if args.training_config:
        apply_training_config(args)
    if args.adapter_path and args.model_name_or_path is None:
        take_base_of_adapter(args)
    check(args)

    from preflab.models.loading import default_batch_tokens, locate_adapter
    from preflab.pairs import stages
    from preflab.pairs.metrics import pair_sections, summary_metrics
    from preflab.pairs.report import pairs_figure, render
    from utils.distributed import join_processes

    # An unknown adapter fails here, before processes join and prompts are read.
    if args.adapter_path:
        locate_adapter(args.adapter_path)
    # Final before open_folder, which records every argument in the manifest.
    args.run_name = args.run_name or default_run_name(args)
    args.batch_tokens = args.batch_tokens or default_batch_tokens()
    join_processes()
    # Checked before any model is loaded: the folder may hold other pairs.
    folder = open_folder(args, all_arguments([args]))
    # Build the scorers first, so that a bad --scorer fails before sampling.
    scorers = stages.make_scorers(args) if args.stage in ("all", "score") else []

    # Each stage reads the files of the one before it, also within one call, so that both ways give the same pairs.
    for name in STAGES if args.stage == "all" else (args.stage,):
        with folder.recording(name, args.seed) as entry:
            if name == "sample":
                entry |= stages.sample(args, folder)
            elif name == "score":
                entry |= stages.score(args, folder, scorers)
            else:
                pairs = stages.make_pairs(args, folder)
                sections = pair_sections(pairs, args.seed)
                entry |= sections["counts"]
    # These stages leave the report to the pairing stage.
    if args.stage in ("sample", "score"):
        return print_main(f"{args.stage}: done, see {folder.path}/manifest.json")

    title = f"{with_limit_suffix(args.run_name, args.limit)}: pairs ranked by {without_secrets(args.scorer)}"
    stage.publish(
        folder.path / "preference_pairs.json",
        {"policy": folder.about("sample").get("model"), "scorers": folder.about("score").get("scorers")},
        summary_metrics(sections),
        render(sections, title),
        run={"run_name": args.run_name, "limit": args.limit},
        seed=args.seed,
        figure=lambda path: pairs_figure(path, [*pairs.train, *pairs.test], title),
        **{key: sections[key] for key in ("counts", "agreement", "shuffled")},
        data=folder.about("sample").get("data"),
    )
    several = "; train with --keep_duplicate_prompts, or only each prompt's first pair is used"
    print_main(
        f"pairs for dpo_train_human_preference.py: {folder.path}/train.jsonl and test.jsonl"
        + (several if args.pairs == "all" else "")
    )


if __name__ == "__main__":
    run(main, "lower --batch_tokens or use --dtype bfloat16, then run the same command again to continue")
