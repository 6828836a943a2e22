"""The model card of a training run: Hub metadata, results, how to use it, and what made it."""

from utils.models import BUILTIN_HUB_ID

RESULT_COLUMNS = (
    ("Training Loss", "train_loss"), ("Epoch", "epoch"), ("Step", "step"), ("Validation Loss", "loss"),
    ("Rewards/chosen", "rewards/chosen"), ("Rewards/rejected", "rewards/rejected"),
    ("Rewards/accuracies", "rewards/accuracies"), ("Rewards/margins", "rewards/margins"),
    ("Logps/rejected", "logps/rejected"), ("Logps/chosen", "logps/chosen"),
    ("Logits/rejected", "logits/rejected"), ("Logits/chosen", "logits/chosen"),
)  # fmt: skip


def results_table(rows: list[dict]) -> str:
    """The training-results table by epoch and step, with alignment-handbook's columns, from train_log.jsonl rows."""
    lines = [" | ".join(name for name, _ in RESULT_COLUMNS), " | ".join("---" for _ in RESULT_COLUMNS)]
    train_loss = {row["step"]: row["loss"] for row in rows if row["split"] == "train" and "loss" in row}
    for row in (row for row in rows if row["split"] == "eval"):
        before = [step for step in train_loss if step <= row["step"]]
        row = {**row, "train_loss": train_loss[max(before)] if before else None}
        cells = []
        for name, key in RESULT_COLUMNS:
            value = row.get(key)
            if value is None:
                cells.append("-")
            else:
                cells.append(str(value) if key == "step" else f"{value:.2f}" if key == "epoch" else f"{value:.4f}")
        lines.append(" | ".join(cells))
    return "\n".join(f"| {line} |" for line in lines)


def usage_snippet(base: str, folder: str, peft: bool) -> str:
    """Python that loads the model and answers one prompt: plain transformers and peft wherever the base is loadable."""
    prompt = 'messages = [{"role": "user", "content": "Why is the sky blue?"}]'
    if base.startswith("builtin:"):
        # The builtin base is no hub id: only this repository knows where its weights are.
        return "\n".join([
            "# in a checkout of this repository",
            "from utils.generation import generate",
            "from utils.models import load_model, load_tokenizer",
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


def model_card(summary: dict, rows: list[dict], folder: str, peft: bool) -> str:
    """The card's text. `summary` is the run's train.json, `rows` its train_log.jsonl; metadata is for ModelCard."""
    from huggingface_hub import ModelCardData

    base, data, args = summary["model"]["name"], summary["data"], summary["args"]
    sources = [s for split in ("train", "test") if data[split] for s in data[split]["sources"]]
    hub_names = sorted({s["name"] for s in sources if "revision" in s})
    metadata = ModelCardData(
        base_model=BUILTIN_HUB_ID if base.startswith("builtin:") else base,
        datasets=hub_names or None,
        library_name="peft" if peft else "transformers",
        pipeline_tag="text-generation",
        tags=["trl", "dpo", "preference-tuning", *(["lora"] if peft else []), *args["loss_type"]],
        model_name=summary["run"]["run_name"],
    )
    keys = (
        "loss_type", "beta", "label_smoothing", "learning_rate", "lr_scheduler_type", "warmup_steps", "optim",
        "weight_decay", "max_length", "max_prompt_length", "seed", "use_peft", "lora_r", "lora_alpha",
        "lora_target_modules", "load_in_4bit", "dtype",
    )  # fmt: skip
    hyper = "\n".join(f"- {key}: {args[key]}" for key in keys if key in args)
    batch = summary["plan"]["batch"]
    metrics = "\n".join(
        f"| {name} | {m['value']:.4f} | {'-' if m['stderr'] is None else format(m['stderr'], '.4f')} | "
        f"{'-' if m['ci95'] is None else '{:.4f} to {:.4f}'.format(*m['ci95'])} | {m['n']} |"
        for name, m in summary["metrics"].items()
    )
    provenance = "\n".join(
        f"- {split}: {data[split]['pairs']} pairs of {data[split]['rows']} rows; dropped {data[split]['dropped'] or 'none'};"
        f" text sha256 `{data[split]['text_sha256'][:16]}`; from "
        + ", ".join(f"`{s['name']}` ({s.get('split')}, {s.get('revision') or s.get('sha256', '')[:16]})" for s in data[split]["sources"])
        for split in ("train", "test")
        if data[split]
    )
    run = summary["run"]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {run['run_name']}",
        f"{base} trained on preference pairs with {', '.join(args['loss_type'])} loss"
        f" ({'LoRA' if peft else 'full fine-tuning'}{', 4-bit base' if args['load_in_4bit'] else ''}).",
        summary["claim"],
        f"> {summary['warning']}" if summary["warning"] else "",
        "## Use",
        f"```python\n{usage_snippet(base, folder, peft)}\n```",
        "## Held-out pairs",
        f"| metric | value | standard error | 95% interval | n |\n| --- | --- | --- | --- | --- |\n{metrics}" if metrics else "No test split.",
        "## Training results",
        results_table(rows),
        "## Hyperparameters",
        f"{hyper}\n- dropout that ran: {summary['dropout']}\n- precision: {summary['precision']}\n"
        f"- batch: {batch['per_device']} a process × {batch['accumulation']} accumulation × {batch['processes']} processes"
        f" = {summary['plan']['global_batch_size']} pairs a step, {summary['plan']['steps']} steps",
        "## Data",
        provenance,
        "## Made by",
        f"- commit `{run['git_commit']}`, {run['finished_utc']}, {run['wall_seconds']:.0f} s on {run['hardware']['cpu']}"
        f" ({run['hardware']['cores']} cores) {', '.join(run['hardware']['gpus'])}".rstrip()
        + "\n- " + ", ".join(f"{k} {v}" for k, v in run["versions"].items()),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"
