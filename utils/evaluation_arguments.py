"""The keys that every evaluation has: which two models, on which data. Nothing heavy is imported here."""

from dataclasses import dataclass, field

DEFAULT_RUN = "quickstart"
ULTRAFEEDBACK = "HuggingFaceH4/ultrafeedback_binarized"


def option(text: str, default=None, **extra):
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": text, **extra})


@dataclass
class ComparisonArguments:
    """Which two models, on which data. What is left out comes from the run that trained the tuned model."""

    run_name: str | None = option(f"A run below --checkpoints (default: {DEFAULT_RUN}, where no model is named).")
    checkpoints: str = option("Where training wrote its runs.", "checkpoints")
    base_model: str | None = option("Hub id, folder or builtin model (default: what the tuned one was trained from).")
    adapter_path: str | None = option("LoRA folder: the tuned model is the base with this adapter.")
    tuned_model: str | None = option("Hub id or folder of a tuned model of its own.")
    base_revision: str | None = option("Hub revision of the base model.")
    tuned_revision: str | None = option("Hub revision of --tuned_model.")
    allow_other_base: bool = option("Accept an adapter that names another base model.", False)
    dtype: str | None = option(
        "Precision of the weights (default: as trained, else bfloat16 on a GPU and float32 on a CPU).",
        choices=["float32", "bfloat16", "float16"],
    )
    attn_implementation: str | None = option("sdpa, eager or flash_attention_2.")
    load_in_4bit: bool | None = option("Quantise the base to nf4 (default: as trained).")
    trust_remote_code: bool = option("Run model code from the hub.", False)
    dataset_name: str | None = option(f"Hub id, file or folder (default: the run's, else {ULTRAFEEDBACK}).")
    dataset_config: str | None = option("Configuration of a hub dataset.")
    dataset_revision: str | None = option("Revision of a hub dataset.")
    split: str | None = option("Split to evaluate on (default: the run's test split, else test_prefs or test).")
    prompt_format: str | None = option("Plain-text pairs: auto or chat (default: the run's).", choices=["auto", "chat"])
    chat_template_path: str | None = option("Jinja file that replaces the chat template.")
    max_length: int | None = option("Longest sequence in tokens (default: the run's, else 1024).")
    max_prompt_length: int | None = option("In longer pairs the prompt is cut to this (default: as trained, or half).")
    batch_size: int | None = option("Most sequences a batch, below the token budget (default: no limit).")
    batch_tokens: int | None = option("Padded tokens a batch (default: 16384 on a GPU, 2048 on a CPU).")
    limit: int | None = option("Use only the first rows; marks every file name.")
    seed: int = option("Seed of the resampling and of sampled answers.", 42)
    eval_out: str = option("Results go to <eval_out>/<run_name>/.", "eval_out")
    output_dir: str | None = option("Folder of the results, if another.")
    output_json: str | None = option("Path of the summary, if another; rows and picture land beside it.")
    overwrite: bool = option("Compute everything again, whatever an earlier call kept.", False)
