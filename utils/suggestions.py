"""What the user may have meant: near spellings, and the short names that other tools use."""

import difflib
from collections.abc import Iterable

# Short and foreign names of keys. Of several candidates, a script's own is suggested; the first wins.
SHORT_NAMES = {
    "4bit": ("load_in_4bit",),
    "8bit": ("load_in_8bit",),
    "accumulation": ("gradient_accumulation_steps",),
    "adapter": ("adapter_path", "start_adapter"),
    "alpha": ("lora_alpha",),
    "attention": ("attn_implementation",),
    "attn": ("attn_implementation",),
    "base": ("base_model", "model_name_or_path"),
    "base_model": ("model_name_or_path",),
    "batch": ("per_device_train_batch_size", "batch_size"),
    "batch_size": ("per_device_train_batch_size",),
    "bs": ("per_device_train_batch_size", "batch_size"),
    "chat_template": ("chat_template_path", "apply_chat_template"),
    "checkpoint": ("resume", "adapter_path"),
    "clip": ("max_grad_norm",),
    "context_length": ("max_length",),
    "cutoff_len": ("max_length",),
    "data": ("dataset_name", "prompts", "reference", "tasks"),
    "data_path": ("dataset_name", "prompts", "reference"),
    "dataset": ("dataset_name", "prompts", "reference", "tasks"),
    "dropout": ("lora_dropout",),
    "epoch": ("num_train_epochs",),
    "epochs": ("num_train_epochs",),
    "eval_batch_size": ("per_device_eval_batch_size", "batch_size"),
    "eval_split": ("dataset_test_split", "split"),
    "experiment": ("run_name",),
    "fewshot": ("num_fewshot",),
    "flash_attention": ("attn_implementation",),
    "flash_attn": ("attn_implementation",),
    "force": ("overwrite",),
    "gamma": ("gamma_beta_ratio",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "gradient_accumulation": ("gradient_accumulation_steps",),
    "gpus": ("processes",),
    "iterations": ("max_steps",),
    "judge_model": ("judge",),
    "log_steps": ("logging_steps",),
    "log_to": ("report_to",),
    "lora": ("use_peft", "adapter_path"),
    "lora_path": ("start_adapter", "adapter_path"),
    "lora_rank": ("lora_r",),
    "loss": ("loss_type",),
    "lr": ("learning_rate",),
    "lr_scheduler": ("lr_scheduler_type",),
    "max_completion_length": ("max_new_tokens",),
    "max_samples": ("limit",),
    "max_seq_len": ("max_length",),
    "max_seq_length": ("max_length",),
    "max_tokens": ("max_new_tokens", "max_length"),
    "micro_batch_size": ("per_device_train_batch_size", "batch_size"),
    "model": ("model_name_or_path", "tuned_model"),
    "model_id": ("model_name_or_path", "tuned_model"),
    "model_name": ("model_name_or_path", "tuned_model"),
    "model_path": ("model_name_or_path", "tuned_model"),
    "model_name_or_path": ("tuned_model",),
    "n": ("limit",),
    "name": ("run_name",),
    "num_epochs": ("num_train_epochs",),
    "num_samples": ("limit",),
    "optimizer": ("optim",),
    "out": ("output_dir", "eval_out"),
    "out_dir": ("output_dir", "eval_out"),
    "output": ("output_dir", "eval_out"),
    "output_folder": ("output_dir", "eval_out"),
    "peft": ("use_peft", "adapter_path"),
    "precision": ("dtype",),
    "qlora": ("load_in_4bit",),
    "quantize": ("load_in_4bit",),
    "r": ("lora_r",),
    "rank": ("lora_r",),
    "resume_from": ("resume",),
    "run": ("run_name",),
    "samples": ("limit", "sample_prompts"),
    "save": ("save_steps",),
    "scheduler": ("lr_scheduler_type",),
    "seq_len": ("max_length",),
    "seq_length": ("max_length",),
    "shots": ("num_fewshot",),
    "smoothing": ("label_smoothing",),
    "steps": ("max_steps",),
    "target_modules": ("lora_target_modules",),
    "task": ("tasks",),
    "temp": ("temperature",),
    "template": ("chat_template_path",),
    "test_split": ("dataset_test_split", "split"),
    "torch_dtype": ("dtype",),
    "train_batch_size": ("per_device_train_batch_size",),
    "train_file": ("dataset_name",),
    "train_split": ("dataset_train_split",),
    "tuned": ("tuned_model",),
    "use_lora": ("use_peft",),
    "wandb": ("report_to",),
    "warmup": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "wd": ("weight_decay",),
}


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelled most like `word`, or None; case and the dash are ignored."""
    plain = {name.lower().replace("-", "_"): name for name in known}
    matches = difflib.get_close_matches(word.lower().replace("-", "_"), plain, n=1, cutoff=0.6)
    return plain[matches[0]] if matches else None


def meant_key(name: str, keys: Iterable[str]) -> str | None:
    """The key that was probably meant by an unknown name: its usual short name, else the nearest spelling."""
    keys, name = list(keys), name.lower().replace("-", "_")
    named = next((key for key in SHORT_NAMES.get(name, ()) if key in keys), None)
    return named or nearest(name, keys)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`did you mean X? `, or nothing where no known word is spelled like `word`."""
    match = nearest(word, known)
    return f"did you mean {match}? " if match else ""


def choose_from(word: str, known: Iterable[str]) -> str:
    """`did you mean X? choose from X, Y`, for a word that is none of the known ones."""
    return f"{did_you_mean(word, known)}choose from {', '.join(known)}"
