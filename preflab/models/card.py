"""Model cards: Hub metadata, results, a usage snippet and provenance, from the templates in this folder."""

import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from preflab.models.loading import BUILTIN_HUB_ID
from utils.stage import Report
from utils.tables import decimals, number, p_value

TEMPLATE = Path(__file__).with_name("model_card.md.jinja")
MERGED_TEMPLATE = Path(__file__).with_name("merged_card.md.jinja")

# Columns of the training results, as alignment-handbook's cards have them: heading and key of train_log.jsonl.
PREFERENCE_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Rewards/chosen", "rewards/chosen"), ("Rewards/rejected", "rewards/rejected"),
    ("Rewards/accuracies", "rewards/accuracies"), ("Rewards/margins", "rewards/margins"),
    ("Logps/rejected", "logps/rejected"), ("Logps/chosen", "logps/chosen"),
    ("Logits/rejected", "logits/rejected"), ("Logits/chosen", "logits/chosen"),
)  # fmt: skip
SFT_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Token accuracy", "mean_token_accuracy"), ("Entropy", "entropy"),
)  # fmt: skip
# Decimal places of a column; 4 for all others.
DIGITS = {"step": 0, "epoch": 2}

HYPERPARAMETERS = (
    "loss_type", "beta", "gamma_beta_ratio", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "optim", "weight_decay", "max_length", "max_prompt_length", "seed", "use_peft", "lora_r", "lora_alpha",
    "lora_target_modules", "load_in_4bit", "dtype",
)  # fmt: skip


def model_card(summary: dict, rows: list[dict], folder: str, peft: bool) -> str:
    """The card of a training run.

    Args:
        summary: the run's train.json.
        rows: the run's train_log.jsonl.
        folder: the folder of the weights.
        peft: whether that folder holds an adapter.
    """
    args, published, preference = summary["args"], summary["published"], summary["stage"] == "train"
    columns = PREFERENCE_COLUMNS if preference else SFT_COLUMNS
    if preference:
        objective = f"preference pairs with the {' + '.join(args['loss_type'])} loss"
    else:
        objective = f"conversations, with a loss on {args['loss_on']}"
    evaluated = any(row["split"] == "eval" for row in rows)
    card = ModelCard.from_template(
        card_data=_card_data(summary, peft),
        template_path=str(TEMPLATE),
        summary=summary,
        args=args,
        start=summary["start"],
        plan=summary["plan"],
        batch=summary["plan"]["batch"],
        objective=objective,
        method=("LoRA" if peft else "full fine-tuning") + (" on a 4-bit base" if args["load_in_4bit"] else ""),
        unit="pairs" if preference else "conversations",
        snippet=usage_snippet(summary["model"]["name"], folder, peft),
        metrics=[_metric_cells(name, metric) for name, metric in summary["metrics"].items()],
        columns=[heading for heading, _ in columns],
        # A run without evaluations shows an empty table next to the published one.
        results=_result_cells(rows, columns) if evaluated else [],
        show_results=evaluated or bool(published),
        published=published,
        published_results=_cells(published["rows"], columns) if published else [],
        hyperparameters={key: args[key] for key in HYPERPARAMETERS if key in args},
        speed=_speed(summary["training"]),
        machine=_machine(summary["run"]["hardware"]),
    )
    return str(card).rstrip() + "\n"


def merged_card(
    folder: str, name: str, base: str, adapter: str, dtype: str, quantised: bool, report: Report, run: dict
) -> str:
    """The card of a merged adapter.

    Args:
        folder: the merged folder.
        name: of the run.
        base, adapter: what was merged, in `dtype`.
        quantised: whether the adapter was trained on a quantised base.
        report: of the check that both models are the same.
        run: the `run` section of the summary.
    """
    data = ModelCardData(
        base_model=_hub_name(base),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merged", "preference-tuning"],
        model_name=name,
    )
    card = ModelCard.from_template(
        card_data=data,
        template_path=str(MERGED_TEMPLATE),
        name=name,
        base=base,
        adapter=adapter,
        dtype=dtype,
        quantised=quantised,
        report=report,
        run=run,
        snippet=usage_snippet(folder, folder, peft=False),
    )
    return str(card).rstrip() + "\n"


def _hub_name(base: str) -> str:
    """The hub id of a base model; the builtin's original for the builtin."""
    return BUILTIN_HUB_ID if base.startswith("builtin:") else base


def _card_data(summary: dict, peft: bool) -> ModelCardData:
    """The card's Hub metadata, with the held-out metrics as its model index."""
    # After a merge the model is a local folder; the Hub's base model is the one that was merged into.
    base, args = (summary["start"] or {}).get("base", summary["model"]["name"]), summary["args"]
    sources = [source for split in summary["data"].values() if split for source in split["sources"]]
    kind = ["dpo", "preference-tuning"] if summary["stage"] == "train" else ["sft", "instruction-tuning"]
    losses = args["loss_type"] if summary["stage"] == "train" else []
    return ModelCardData(
        base_model=_hub_name(base),
        # A hub dataset has a revision and can be linked; a local file has a hash.
        datasets=sorted({source["name"] for source in sources if "revision" in source}) or None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", *kind, *(["lora"] if peft else []), *losses],
        model_name=summary["run"]["run_name"],
        eval_results=_eval_results(summary) or None,
    )


def _eval_results(summary: dict) -> list[EvalResult]:
    """The held-out metrics for the Hub's model index; p-values are left to the card's own table."""
    sources = (summary["data"].get("test") or {}).get("sources", [])
    name = ", ".join(source["name"] for source in sources) or "held-out rows"
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=name,
            dataset_name=name,
            # An entry of the model index has one split, so a mix of datasets has none.
            dataset_split=sources[0]["split"] if len(sources) == 1 else None,
            metric_type=key,
            metric_name=key,
            metric_value=float(metric["value"]),
        )
        for key, metric in summary["metrics"].items()
        if not key.startswith("p_") and metric["value"] is not None and math.isfinite(metric["value"])
    ]


def _metric_cells(name: str, metric: dict) -> list[str]:
    """One metric as a row of the card's table."""
    value, low_high, digits = metric["value"], metric["ci95"], decimals(metric, digits=4)
    return [
        name,
        p_value(value) if name.startswith("p_") else number(value, digits),
        number(metric["stderr"], digits),
        "-" if low_high is None else " to ".join(number(end, digits) for end in low_high),
        str(metric["n"]),
    ]


def _result_cells(rows: list[dict], columns: tuple) -> list[list[str]]:
    """The evaluations of train_log.jsonl as table rows, each with the latest training loss before it."""
    # Train and eval rows are logged at different steps.
    train_loss = {row["step"]: row["loss"] for row in rows if row["split"] == "train" and "loss" in row}
    evaluations = []
    for row in (row for row in rows if row["split"] == "eval"):
        steps = [step for step in train_loss if step <= row["step"]]
        evaluations.append({**row, "train_loss": train_loss[max(steps)] if steps else None})
    return _cells(evaluations, columns)


def _cells(rows: list[dict], columns: tuple) -> list[list[str]]:
    """Numbers as text, "-" where a row has none."""
    return [
        ["-" if row.get(key) is None else f"{row[key]:.{DIGITS.get(key, 4)}f}" for _, key in columns] for row in rows
    ]


def _speed(training: dict) -> str:
    pairs = f"{training['pairs_per_second']} pairs and " if "pairs_per_second" in training else ""
    tokens = f"{pairs}{training['tokens_per_second']:.0f} tokens per second"
    mfu = "not measured" if training["mfu"] is None else f"{training['mfu']:.1%}"
    return f"{training['seconds']:.0f} s of training, {tokens} (MFU {mfu})"


def _machine(hardware: dict) -> str:
    return ", ".join([f"{hardware['cpu']} ({hardware['cores']} cores)", *hardware["gpus"]])


BUILTIN_SNIPPET = """\
# in a checkout of this repository
from preflab.models.generation import generate
from preflab.models.loading import load_model, load_tokenizer

tokenizer = load_tokenizer("{folder}")
model = {load}
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
print(next(generate(model, tokenizer, [messages], max_new_tokens=64))["text"])"""

SNIPPET = """\
{imports}

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = {load}
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


def usage_snippet(base: str, folder: str, peft: bool) -> str:
    """Python that loads the model and answers one prompt.

    It uses transformers and peft only, except for the builtin base, which only this repository can load.
    """
    if base.startswith("builtin:"):
        load = f'load_model("{base}", adapter="{folder}")' if peft else f'load_model("{folder}")'
        return BUILTIN_SNIPPET.format(folder=folder, load=load)
    if peft:
        imports = "from peft import AutoPeftModelForCausalLM\nfrom transformers import AutoTokenizer"
    else:
        imports = "from transformers import AutoModelForCausalLM, AutoTokenizer"
    load = f'Auto{"Peft" if peft else ""}ModelForCausalLM.from_pretrained("{folder}")'
    return SNIPPET.format(imports=imports, folder=folder, load=load)
