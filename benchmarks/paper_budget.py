"""What does DPO on UltraFeedback's 61,135 pairs need for models of 7B, 9B and 70B?

    python benchmarks/paper_budget.py                                  # a table, about 3 minutes on a CPU
    python benchmarks/paper_budget.py --price_24gb 0.4 --price_80gb 2 --json budget.json

For each model, recipe and hardware: memory of a GPU, the options that make it fit, tokens per second, hours and cost of
one epoch, all computed by the planner (`--plan`, docs/planning.md). Nothing here was run at this size. Measured are the
share of the rate of matrix products that training reached and the mean tokens of a pair (docs/performance.md); prices
are assumptions.
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from utils.cli import option
from utils.errors import UserError, run
from utils.stage import start
from utils.tables import duration, markdown_table

LORA = ("--use_peft", "--lora_r", "16", "--lora_target_modules", "all-linear", "--dtype", "bfloat16")
RECIPES = {
    "LoRA": LORA,
    "QLoRA": (*LORA, "--load_in_4bit", "--use_bnb_nested_quant"),
    "full": ("--precompute_ref_log_probs", "true"),
}
HARDWARE = ("1x24GB", "1x80GB", "8x80GB", "2x8x80GB")
# Pairs and mean tokens of UltraFeedback at this max_length, prompts counted once (docs/performance.md).
PAIRS, TOKENS, LENGTH = 61_135, 740, 1024
# One pair per forward at least: the token budget of a GPU then decides how many are computed together.
BATCH = ("--per_device_train_batch_size", "1", "--global_batch_size", "64", "--num_train_epochs", "1",
         "--max_length", str(LENGTH))  # fmt: skip


# Of benchmarks/shapes.py.
MODELS = ("mistral-7b", "gemma-2-9b", "llama-3-70b")


@dataclass
class BudgetArguments:
    """Keys of this benchmark."""

    only: str | None = option("Only the models whose name contains this.")
    price_24gb: float = option("Price of an hour of a GPU of 24 GB, in US dollars (assumed).", 0.5)
    price_80gb: float = option("Price of an hour of a GPU of 80 GB, in US dollars (assumed).", 2.5)
    json: str | None = option("Write the figures here.")


def plan(model: str, recipe: str, hardware: str) -> dict:
    """The first option that fits, or the smallest one."""
    from trl import ModelConfig

    from benchmarks.shapes import config_of
    from preflab.data.preferences import DataArguments
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.planner import GIB, Planner, Rows
    from utils.cli import parse

    with tempfile.TemporaryDirectory() as folder:
        config_of(model).save_pretrained(folder)
        words = ["--model_name_or_path", folder, "--dataset_name", "none", "--plan", hardware, "--output_dir", folder]
        arguments = parse((DataArguments, DPORunConfig, ModelConfig), [*words, *BATCH, *RECIPES[recipe]])
        prompt = LENGTH // 3
        rows = Rows(PAIRS, TOKENS, (prompt, LENGTH - prompt, LENGTH - prompt), LENGTH, "stated")
        planner = Planner(*arguments, rows=rows)
        chosen, tried = planner.choose(keep_method=True)
    shown = chosen or min(tried, key=lambda option: option.total)
    hours = shown.hours
    return {
        "model": model, "recipe": recipe, "hardware": hardware, "fits": chosen is not None, "with": shown.name,
        "gib": shown.total / GIB, "tokens_per_second": shown.tokens_per_second, "hours": hours,
        "gpu_hours": hours * planner.hardware.processes, "checkpoint_gib": shown.checkpoint / GIB,
    }  # fmt: skip


def main():
    stage, args = start("paper_budget", __doc__, BudgetArguments)
    models = [name for name in MODELS if args.only is None or args.only in name]
    if not models:
        raise UserError(f"--only {args.only}: no such model; choose from {', '.join(MODELS)}")
    rows = []
    for model in models:
        for recipe in RECIPES:
            for hardware in HARDWARE:
                row = plan(model, recipe, hardware)
                price = args.price_24gb if hardware.endswith("24GB") else args.price_80gb
                rows.append({**row, "dollars": row["gpu_hours"] * price})
                print(f"{model}, {recipe}, {hardware}: {row['gib']:.1f} GiB", file=sys.stderr)
    print(table(rows))
    if args.json:
        from utils.artifacts import write_json
        from utils.provenance import run_record

        write_json(args.json, {"rows": rows, "args": args.__dict__, "run": run_record(42, stage.seconds)})


def table(rows: list[dict]) -> str:
    """The figures as a Markdown table; a configuration that does not fit has its memory only."""
    lines = [["model", "recipe", "GPUs", "GiB per GPU", "with", "tokens/s", "time", "cost", "checkpoint"]]
    for row in rows:
        name = row["with"].replace("as the command", "").strip(", ") or "-"
        figures = [f"{row['tokens_per_second']:,.0f}", duration(row["hours"] * 3600), f"${row['dollars']:,.0f}"]
        lines.append([
            row["model"], row["recipe"], row["hardware"], f"{row['gib']:.0f}" + ("" if row["fits"] else ", too much"),
            name if row["fits"] else "-", *(figures if row["fits"] else ["-"] * 3), f"{row['checkpoint_gib']:.1f} GiB",
        ])  # fmt: skip
    return markdown_table(lines)


if __name__ == "__main__":
    run(main)
