"""The keys of a training run by topic, for `--help_all`."""

# {topic: regular expression of names}; the first that matches counts.
TOPICS = {
    "run": "run_name|output_dir|eval_out|resume.*|overwrite|preflight_only|plan(_tflops)?|allow_fatal|seed|data_seed"
    "|limit|published|sample_prompts|full_determinism",
    "model": "model_.*|base_hub_id|dtype|attn_implementation|trust_remote_code|chat_template_path|template_date"
    "|pad_token|eos_token"
    "|use_cache|router_aux_loss_coef|disable_dropout",
    "LoRA and quantisation": "use_peft|lora_.*|start_adapter.*|use_(rslora|dora)|load_in_.bit|(use_)?bnb_.*",
    "data": "dataset.*|test_.*|train_test_overlap|drop_ties|min_score_margin|lists|keep_duplicate_prompts|prompt_format"
    "|columns|on_bad_row|shuffle_dataset|remove_unused_columns|label_names|length_column_name",
    "length and packing": "max_(prompt_)?length|truncation_mode|(eval_)?packing.*|padding_free|pad_to_.*",
    "loss": "margin_per_point|center_rewards_coefficient|base_ranking"
    "|loss_.*|beta|label_smoothing.*|gamma_beta_ratio|cpo_alpha|(un)?desirable_weight|ld_alpha|f_.*"
    "|use_weighting|discopop_tau|sync_ref_model|ref_model_.*|reference_cache|precompute_.*"
    "|completion_only_loss|assistant_only_loss|neftune.*",
    "optimisation": "learning_rate|lr_.*|warmup.*|num_train_epochs|max_steps|optim.*|weight_decay|adam_.*"
    "|max_grad_norm|train_sampling_strategy|average_tokens_.*",
    "batches": "(per_device_train|global)_batch_size|gradient_accumulation_steps|micro_batch_tokens|shared_prompt"
    "|auto_find_batch_size",
    "precision and memory": "bf16.*|fp16.*|tf32|.*_checkpointing.*|activation_offloading|torch_.*"
    "|compile_layers|.*liger.*|use_cpu",
    "evaluation": "eval_.*|per_device_eval_batch_size|prediction_loss_only|include_for_metrics|batch_eval_metrics"
    "|load_best_model_at_end|metric_for_best_model|greater_is_better|do_.*",
    "saving": "save_.*|enable_jit_checkpoint|ignore_data_skip|restore_callback_.*",
    "logging": "log_.*|logging_.*|report_to|project|trackio.*|disable_tqdm|include_num_input_.*|debug"
    "|skip_memory_metrics",
    "hub": "(push_to_)?hub.*",
    "distributed and data loading": "ddp_.*|fsdp.*|deepspeed|local_rank|accelerator_config|parallelism_config"
    "|dataloader_.*",
    "other": ".*",
}
