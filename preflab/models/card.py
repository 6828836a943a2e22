"""The model card of a training run: Hub metadata, results, how to use it, and what made it."""

from preflab.models.loading import BUILTIN_HUB_ID

PREFERENCE_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Rewards/chosen", "rewards/chosen"), ("Rewards/rejected", "rewards/rejected"),
    ("Rewards/accuracies", "rewards/accuracies"), ("Rewards/margins", "rewards/margins"),
    ("Logps/rejected", "logps/rejected"), ("Logps/chosen", "logps/chosen"),
    ("Logits/rejected", "logits/rejected"), ("Logits/chosen", "logits/chosen"),
)  # fmt: skip
INSTRUCTION_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Token accuracy", "mean_token_accuracy"), ("Entropy", "entropy"),
)  # fmt: skip
COLUMNS = {"train": PREFERENCE_COLUMNS, "sft": INSTRUCTION_COLUMNS}


def results_table(rows: list[dict], columns: tuple = PREFERENCE_COLUMNS) -> str:
    """The training-results table by epoch and step, with alignment-handbook's columns, from train_log.jsonl rows."""
    train_loss = {row["step"]: row["loss"] for row in rows if row["split"] == "train" and "loss" in row}
    found = []
    for row in (row for row in rows if row["split"] == "eval"):
        before = [step for step in train_loss if step <= row["step"]]
        found.append({**row, "train_loss": train_loss[max(before)] if before else None})
    return value_table(found, columns)


def value_table(rows: list[dict], columns: tuple) -> str:
    """A Markdown table of `rows`, a dash where a row has no such figure."""
    lines = [" | ".join(name for name, _ in columns), " | ".join("---" for _ in columns)]
    digits = {"step": 0, "epoch": 2}
    for row in rows:
        values = [(key, row.get(key)) for _, key in columns]
        lines.append(" | ".join("-" if v is None else f"{v:.{digits.get(key, 4)}f}" for key, v in values))
    return "\n".join(f"| {line} |" for line in lines)


def usage_snippet(base: str, folder: str, peft: bool) -> str:
    """Python that loads the model and answers one prompt: plain transformers and peft wherever the base is loadable."""
    prompt = 'messages = [{"role": "user", "content": "Why is the sky blue?"}]'
    if base.startswith("builtin:"):
        # The builtin base is no hub id: only this repository knows where its weights are.
        return "\n".join([
            "# in a checkout of this repository",
            "from preflab.models.generation import generate",
            "from preflab.models.loading import load_model, load_tokenizer",
            "",
            f'tokenizer = load_tokenizer("{folder}")',
            f'model = load_model("{base}", adapter="{folder}")' if peft else f'model = load_model("{folder}")',
            prompt,
            'print(next(generate(model, tokenizer, [messages], max_new_tokens=64))["text"])',
        ])  # fmt: skip
    load = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    if peft:
        load = ["from peft import AutoPeftModelForCausalLM", "from transformers import AutoTokenizer"]
    return "\n".join([
        *load,
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{folder}")',
        f'model = Auto{"Peft" if peft else ""}ModelForCausalLM.from_pretrained("{folder}")',
        prompt,
        "inputs = tokenizer.apply_chat_template("
        'messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")',
        "output = model.generate(**inputs, max_new_tokens=64)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ])  # fmt: skip


HYPERPARAMETERS = (
    "loss_type", "beta", "gamma_beta_ratio", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "optim", "weight_decay", "max_length", "max_prompt_length", "seed", "use_peft", "lora_r", "lora_alpha",
    "lora_target_modules", "load_in_4bit", "dtype",
)  # fmt: skip


def _metadata(summary: dict, peft: bool) -> str:
    """The card's Hub metadata as YAML between dashes."""
    from huggingface_hub import ModelCardData

    base, args = (summary["start"] or {}).get("base", summary["model"]["name"]), summary["args"]
    sources = [s for split in summary["data"].values() if split for s in split["sources"]]
    kind = ["dpo", "preference-tuning"] if summary["stage"] == "train" else ["sft", "instruction-tuning"]
    losses = args["loss_type"] if summary["stage"] == "train" else []
    data = ModelCardData(
        base_model=BUILTIN_HUB_ID if base.startswith("builtin:") else base,
        # A local file has a hash, a hub dataset a revision; only the latter can be linked.
        datasets=sorted({s["name"] for s in sources if "revision" in s}) or None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", *kind, *(["lora"] if peft else []), *losses],
        model_name=summary["run"]["run_name"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _metrics(metrics: dict) -> str:
    if not metrics:
        return "There was no test split."
    lines = ["| metric | value | standard error | 95% interval | n |", "| --- | --- | --- | --- | --- |"]
    for name, m in metrics.items():
        error = "-" if m["stderr"] is None else f"{m['stderr']:.4f}"
        interval = "-" if m["ci95"] is None else f"{m['ci95'][0]:.4f} to {m['ci95'][1]:.4f}"
        lines.append(f"| {name} | {m['value']:.4f} | {error} | {interval} | {m['n']} |")
    return "\n".join(lines)


def _hyperparameters(summary: dict) -> str:
    plan, args = summary["plan"], summary["args"]
    batch = plan["batch"]
    lines = [f"- {key}: {args[key]}" for key in HYPERPARAMETERS if key in args]
    lines += [
        f"- dropout that ran: {summary['dropout']}",
        f"- precision: {summary['precision']}",
        f"- steps: {plan['steps']} of {plan['global_batch_size']} rows ({batch['per_device']} a process ×"
        f" {batch['accumulation']} accumulation × {batch['processes']} processes), {plan['epochs']} epochs",
    ]
    return "\n".join(lines)


def _provenance(data: dict) -> str:
    lines = []
    for split, found in data.items():
        if found:
            lines.append(
                f"- {split}: {_count(found)} of {found['rows']} rows; dropped: {found['dropped'] or 'none'};"
                f" sha256 of the texts `{found['text_sha256'][:16]}`"
            )
            for source in found["sources"]:
                version = source.get("revision") or f"sha256 {source.get('sha256', '?')[:16]}"
                lines.append(f"  - `{source['name']}`, split {source['split']}, {version}")
    return "\n".join(lines)


def _count(split: dict) -> str:
    unit = "pairs" if "pairs" in split else "conversations"
    return f"{split[unit]} {unit}"


def _made_by(run: dict, training: dict) -> str:
    hardware = run["hardware"]
    machine = ", ".join([f"{hardware['cpu']} ({hardware['cores']} cores)", *hardware["gpus"]])
    rows = f"{training['pairs_per_second']} pairs and " if "pairs_per_second" in training else ""
    speed = f"{training['seconds']:.0f} s of training, {rows}{training['tokens_per_second']:.0f} tokens a second"
    speed += f" (MFU {training['mfu']:.1%})"
    return "\n".join([
        f"- commit `{run['git_commit']}`, {run['finished_utc']}",
        f"- {speed}, on {machine}, {run['world_size']} processes",
        "- " + ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    ])  # fmt: skip


def model_card(summary: dict, rows: list[dict], folder: str, peft: bool) -> str:
    """The card's text. `summary` is the run's, `rows` its train_log.jsonl, `folder` holds the weights."""
    base, args, start = summary["model"]["name"], summary["args"], summary["start"]
    preference, columns, published = summary["stage"] == "train", COLUMNS[summary["stage"]], summary["published"]
    how = ("LoRA" if peft else "full fine-tuning") + (" on a 4-bit base" if args["load_in_4bit"] else "")
    what = (
        f"preference pairs with the {' + '.join(args['loss_type'])} loss"
        if preference
        else f"instructions, with a loss on {args['loss_on']}"
    )
    trial, evaluated = args.get("limit"), any(row["split"] == "eval" for row in rows)
    sections = [
        _metadata(summary, peft),
        f"# {summary['run']['run_name']}",
        f"{base}, trained on {what} ({how}).{_started(start)}",
        f"> A trial run on the first {trial} rows (--limit)." if trial else "",
        summary["claim"],
        f"> Warning: {summary['warning']}" if summary["warning"] else "",
        f"## Use\n\n```python\n{usage_snippet(base, folder, peft)}\n```",
        f"## Held-out {'pairs' if preference else 'conversations'}\n\n{_metrics(summary['metrics'])}",
        f"## Training results\n\n{results_table(rows, columns)}" if evaluated or published else "",
        _published(published, columns) if published else "",
        f"## Hyperparameters\n\n{_hyperparameters(summary)}",
        f"## Data\n\n{_provenance(summary['data'])}",
        f"## Made by\n\n{_made_by(summary['run'], summary['training'])}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _started(start: dict | None) -> str:
    if not start:
        return ""
    if start["merged"]:
        return f" That base is {start['base']} with the adapter {start['adapter']} merged into it."
    return f" The adapter {start['adapter']} was trained further."


def _published(published: dict, columns: tuple) -> str:
    """The published run's own table, named as what it is."""
    about = f"{published['source']}; {published['setting']}."
    return f"### As published\n\n{about}\n\n{value_table(published['rows'], columns)}"
