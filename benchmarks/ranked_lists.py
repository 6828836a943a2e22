"""What does a training step on lists of N answers cost, in steps on pairs?

    python benchmarks/ranked_lists.py                              # SmolLM2-135M, LoRA, float32, 2 CPU cores

The lists of every N have the same prompts, and answers of the same data: a row's own two, then those of the rows after
it. A step is forward and backward of the policy, with the reference cached, as in training. Every round times each N
once, in changing order; the cost is the mean over rounds of the time for N over that for 2. Also timed: all pairs of
the lists of the second N as rows of pairs, which is how lists are trained without these losses.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start
from utils.tables import render


@dataclass
class ListArguments:
    """Keys of this benchmark."""

    data: str = option("Preference data in any format of the training script.", "data/quickstart_prefs")
    split: str = option("Split of --data.", "train")
    model: str = option("Builtin model, hub id or folder.", "builtin:smollm2-135m-instruct")
    answers: list[int] = field(default_factory=lambda: [2, 4, 8], metadata={"help": "Answers per list."})
    lists: int = option("Lists per step.", 4)
    rounds: int = option("Rounds; one more is not timed.", 5)
    max_length: int = option("As in training.", 512)
    json: str | None = option("Write the figures here.")


def check(args) -> None:
    """Raise UserError for values that make no lists."""
    for key in ("lists", "rounds"):
        if getattr(args, key) < 1:
            raise UserError(f"--{key} {getattr(args, key)}: must be at least 1")
    if len(args.answers) < 2 or min(args.answers) < 2:
        raise UserError(f"--answers {' '.join(map(str, args.answers))}: give two numbers or more, each at least 2")


def trainer_of(args, rows: list[dict], folder: str):
    """The trainer of a run on lists, not started."""
    from datasets import Dataset
    from peft import LoraConfig

    from preflab.models.loading import load_model, load_tokenizer
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.list_trainer import RankedListTrainer
    from utils.artifacts import RowFile

    config = DPORunConfig(
        folder, loss_type=["plackett_luce"], per_device_train_batch_size=args.lists, max_length=args.max_length,
        bf16=False, use_cpu=True, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
    )  # fmt: skip
    config.sequences_a_row = max(args.answers)
    return RankedListTrainer(
        load_model(args.model),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(args.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        row_log=RowFile(Path(folder) / "log.jsonl"),
    )


def rows_of(args) -> dict[int, list[dict]]:
    """{number of answers: tokenised lists}, all with the same prompts.

    Raises:
        UserError: too few rows for complete lists.
    """
    from preflab.data.preferences import load_pairs, tokenize
    from preflab.models.loading import load_tokenizer

    data = load_pairs([{"name": args.data, "split": args.split}], limit=args.lists + max(args.answers) // 2)
    ids, _ = tokenize(data, load_tokenizer(args.model), args.max_length, args.max_length // 2)
    # The last list has the answers of its own row and of those after it.
    needed = args.lists - 1 + (max(args.answers) + 1) // 2
    if len(ids) < needed:
        raise UserError(
            f"--lists {args.lists}: needs {needed} rows of {args.data}, but {len(ids)} are usable; lower it"
        )
    pool = [row[f"{side}_ids"] for row in ids for side in ("chosen", "rejected")]
    lists = {}
    for number in args.answers:
        lists[number] = [listed(ids[k]["prompt_ids"], pool[2 * k : 2 * k + number]) for k in range(args.lists)]
    return lists


def listed(prompt: list[int], answers: list[list[int]]) -> dict:
    """A tokenised row of a list."""
    first, *others, last = answers
    return {
        "prompt_ids": prompt,
        "chosen_ids": first,
        "rejected_ids": last,
        "others_ids": [token for answer in others for token in answer],
        "others_lengths": [len(answer) for answer in others],
        "scores": [float(-k) for k in range(len(answers))],
    }


def main():
    _, args = start("ranked_lists", __doc__, ListArguments)
    check(args)
    from tempfile import TemporaryDirectory

    import numpy as np

    from preflab.training.list_trainer import answers_of

    lists = rows_of(args)
    # A step of pairs on all pairs of the lists of 4, or of the second number of answers.
    most = args.answers[1]
    pairs = [
        listed(row["prompt_ids"], [answers[i], answers[j]])
        for row in lists[most]
        for answers in [answers_of(row)]
        for i in range(most)
        for j in range(i + 1, most)
    ]
    names = {**{f"lists of {n}": rows for n, rows in lists.items()}, f"all pairs of {most}, as pairs": pairs}
    seconds = {name: [] for name in names}
    with TemporaryDirectory() as folder:
        rows = [row for part in names.values() for row in part]
        trainer = trainer_of(args, rows, folder)
        at, first = {}, 0
        for name, part in names.items():
            at[name] = list(range(first, first + len(part)))
            first += len(part)
        for number in range(args.rounds + 1):
            for name in list(names)[:: 1 if number % 2 else -1]:
                taken = trainer.time_step(at[name])
                if number:
                    seconds[name].append(taken)
    base = np.array(seconds[f"lists of {args.answers[0]}"])
    lines = [("a step on the same prompts", "seconds", "tokens", "cost (rounds)")]
    figures = {}
    for name, part in names.items():
        ratio = np.array(seconds[name]) / base
        tokens = sum(len(ids) for row in part for key, ids in row.items() if key.endswith("_ids"))
        figures[name] = {"seconds": seconds[name], "tokens": tokens, "cost": ratio.tolist()}
        spread = f"{ratio.mean():.2f} ({ratio.min():.2f} to {ratio.max():.2f})"
        lines.append((name, f"{np.mean(seconds[name]):.2f}", f"{tokens:,}", spread))
    print(render(f"{args.model}: {args.lists} lists per step, {args.rounds} rounds", lines))
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    run(main)
