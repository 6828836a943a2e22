"""What a run does with each key of TRL's configs: honoured, refused or irrelevant.

A refused key must keep its default. Every key of DPOConfig, SFTConfig, RewardConfig and ModelConfig has exactly one
decision, which a test checks, so that a key of a new TRL version is noticed.
"""

import dataclasses

from utils.errors import UserError

# Read and done as TRL and transformers document it, or as the key of the same name in RunConfig says.
HONOURED = frozenset(
    """
    output_dir run_name seed data_seed full_determinism report_to project trackio_space_id trackio_bucket_id
    trackio_static_space_id
    model_name_or_path model_revision dtype attn_implementation trust_remote_code chat_template_path disable_dropout
    router_aux_loss_coef
    use_peft lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save use_rslora
    use_dora load_in_8bit load_in_4bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage
    max_length packing packing_strategy eval_packing center_rewards_coefficient
    loss_type loss_weights beta label_smoothing ld_alpha f_divergence_type f_alpha_divergence_coef use_weighting
    discopop_tau precompute_ref_log_probs precompute_ref_batch_size
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps optim optim_args
    optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm average_tokens_across_devices
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps train_sampling_strategy
    bf16 fp16 tf32 use_cpu activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing
    gradient_checkpointing_kwargs activation_offloading torch_empty_cache_steps
    eval_strategy eval_steps eval_delay eval_on_start metric_for_best_model greater_is_better
    save_strategy save_steps save_total_limit
    push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter disable_tqdm debug
    ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout
    fsdp fsdp_config deepspeed
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context
    """.split()
)

NOT_COMPILED = "it compiles the whole model, whose packed rows change at every step; use --compile_layers"
NO_LIGER = "TRL is removing it; the output layer is fused already, and --compile_layers fuses norms and activations"
OWN_ROWS = "rows are read and tokenised by this project (docs/data.md)"
ONE_OUTPUT_LAYER = "the fused output layer does this already"
# {key: why it must keep its default, and what to use instead}.
REFUSED = {
    # Kept promises: exact resume, held-out rows that decide nothing, one global batch, no row left out silently.
    "resume_from_checkpoint": "use --resume auto|PATH|never",
    "save_only_model": "checkpoints without the optimizer cannot be resumed; --save_strategy no writes none",
    "ignore_data_skip": "a resumed run continues at the next row",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint already",
    "dataloader_in_order": "a resumed run needs the same order of rows",
    "dataloader_drop_last": "rows would be left out",
    "auto_find_batch_size": "the batch would change during the run; the preflight estimates the memory",
    "load_best_model_at_end": "the rows that choose a checkpoint could not measure it; evaluate checkpoints with"
    " eval_win_rate.py --adapter_path",
    "save_on_each_node": "the first process writes all files",
    "accelerator_config": "this trainer divides rows over processes",
    "parallelism_config": "tensor and context parallelism do not fit the shared prompts; use FSDP or DeepSpeed",
    # Without an effect here, where a user would expect one.
    "model_init_kwargs": "TRL does not load the model here; use --dtype, --attn_implementation, --model_revision",
    "lora_task_type": "the training script decides it",
    "truncation_mode": "prompts are cut at their start and answers at their end, see --max_prompt_length",
    "pad_token": "padding is masked, so its token changes nothing",
    "eos_token": "the chat template ends an answer",
    "dataset_text_field": OWN_ROWS,
    "dataset_kwargs": OWN_ROWS,
    "shuffle_dataset": "the trainer shuffles",
    "label_names": OWN_ROWS,
    "length_column_name": "rows are not grouped by length",
    "completion_only_loss": "use --loss_on responses",
    "assistant_only_loss": "use --loss_on responses",
    "label_smoothing_factor": "the trained loss would not be the one that is reported; DPO has --label_smoothing",
    "sync_ref_model": "all metrics assume a fixed reference model",
    "ref_model_mixup_alpha": "it belongs to --sync_ref_model, which is not supported",
    "ref_model_sync_steps": "it belongs to --sync_ref_model, which is not supported",
    "bf16_full_eval": "evaluations run in the precision of training",
    "fp16_full_eval": "evaluations run in the precision of training",
    "use_liger_kernel": NO_LIGER,
    "liger_kernel_config": NO_LIGER,
    "torch_compile": NOT_COMPILED,
    "torch_compile_backend": NOT_COMPILED,
    "torch_compile_mode": NOT_COMPILED,
    "hub_token": "a token in a command or a file is easily published; use `hf auth login` or HF_TOKEN",
    "hub_revision": "uploads go to the branch main",
}
# Honoured in SFT, refused for pairs and for reward models.
REFUSED_FOR_PAIRS = {
    "neftune_noise_alpha": "the noise would be part of policy and reference, and so of every reward",
    "padding_free": "use --shared_prompt, which has no padding either",
}
REFUSED_FOR_REWARDS = {
    "neftune_noise_alpha": "its scale depends on the length of a row, which shared prompts change",
}
# Key -> the values that keep the run's promises.
ALLOWED = {"train_sampling_strategy": ("random", "sequential")}
# {key: why any value is accepted although nothing here depends on it}.
IRRELEVANT = {
    "do_train": "no trainer reads it",
    "do_eval": "no trainer reads it",
    "do_predict": "no trainer reads it",
    "local_rank": "the launcher sets it",
    "use_cache": "training computes complete sequences",
    "dataset_num_proc": "tokenisation does not use TRL's processes; the rows are the same",
    "remove_unused_columns": "rows have only the columns that are read",
    "pad_to_multiple_of": "padding is masked",
    "prediction_loss_only": "metrics are sums that the loss computes",
    "eval_do_concat_batches": "predictions are not collected",
    "eval_use_gather_object": "predictions are not collected",
    "eval_accumulation_steps": "predictions are not collected",
    "include_for_metrics": "there is no compute_metrics",
    "batch_eval_metrics": "there is no compute_metrics",
    "include_num_input_tokens_seen": "TRL's own num_tokens is logged",
    "skip_memory_metrics": "peak memory is measured without it",
    "restore_callback_states_from_checkpoint": "the callbacks have no state",
    "log_level": "the scripts set the libraries' level",
    "log_level_replica": "the scripts set the libraries' level",
    "log_on_each_node": "the first process logs",
}


def check_decisions(config, model_args) -> None:
    """Raise UserError for a refused key that does not have its default.

    Args:
        config: the filled RunConfig; its `unsupported` is the table of its stage. model_args: TRL's ModelConfig.
    """
    for holder in (config, model_args):
        for field in dataclasses.fields(holder):
            value = getattr(holder, field.name)
            if field.name in config.unsupported and value != field.default and not _made_by_default(field.name, value):
                raise UserError(f"--{field.name}: not supported: {config.unsupported[field.name]}; remove it")
            if field.name in ALLOWED and value not in ALLOWED[field.name]:
                choices = ", ".join(ALLOWED[field.name])
                raise UserError(f"--{field.name} {value}: not supported; choose from {choices}")


def _made_by_default(name: str, value) -> bool:
    """Whether __post_init__ made this value of the default, although it is not equal to it."""
    return name == "accelerator_config" and value == type(value)()
