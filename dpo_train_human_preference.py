"""Train a language model on preference pairs with DPO or a loss of its family (TRL's DPOTrainer).

    python dpo_train_human_preference.py --config configs/quickstart.yaml        # CPU, 2 cores
    python dpo_train_human_preference.py --config configs/gemma-2b-it-dpo.yaml   # one GPU
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        dpo_train_human_preference.py --config configs/gemma-2b-it-dpo.yaml      # eight GPUs
    python dpo_train_human_preference.py --config configs/quickstart.yaml --limit 16 \\
        --max_steps 4                                                            # a trial run

Answers: does the policy learn to rank held-out answers as people did? Writes weights and a model
card to checkpoints/<run_name>/, and preflight.json, train.json, train_log.jsonl,
heldout_rows.jsonl, samples.md and dpo_training_curves.png to eval_out/<run_name>/.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  model    --model_name_or_path ID|FOLDER|builtin:smollm2-135m-instruct
           --model_revision REV [main]   --dtype float32|bfloat16|float16|auto [float32]
           --bf16 | --fp16 (default: bf16 on a GPU)
           --attn_implementation sdpa|eager|flash_attention_2   --chat_template_path FILE
           --use_peft   --lora_r N [16]   --lora_alpha N [32]   --lora_dropout X [0.05]
           --lora_target_modules NAME ... | all-linear   --load_in_4bit   --start_adapter FOLDER|ID
           --start_adapter_use merge|continue (with --use_peft)
  data     --dataset_name HUB_ID|FILE|FOLDER   --test_dataset_name OTHER
           --dataset_train_split NAME [train]   --dataset_test_split NAME|none (default: test)
           --test_rows N (hold N rows out of the train split instead)
           --drop_ties   --min_score_margin X   --keep_duplicate_prompts
           --train_test_overlap refuse|drop|keep [refuse]   --prompt_format auto|chat|text [auto]
           --columns NAME=COLUMN ...   --on_bad_row refuse|skip [refuse]   --limit N
           --lists (rows with several scored answers as pairs of the best and the worst)
           several datasets: a `datasets:` list in the YAML, each {path, split, test_split,
           fraction}
  loss     --loss_type NAME ... [sigmoid] (DPO's; also ipo hinge robust sppo_hard apo_zero simpo
           sppo cpo orpo ...; on ranked lists all_pairs best_vs_rest plackett_luce;
           on answers with a thumb up or down kto)
           --beta X [0.1] (orpo: lambda)   --label_smoothing X [0]
           --gamma_beta_ratio X [0.5] (simpo)   --cpo_alpha X [1] (cpo)
           --desirable_weight X [1]   --undesirable_weight X [1] (kto)
  length   --max_length N [1024]
           --max_prompt_length N (half of max_length; used only in longer pairs)
  steps    --per_device_train_batch_size N [8]   --gradient_accumulation_steps N [1]
           --global_batch_size N (instead of the accumulation)   --num_train_epochs X [3]
           --max_steps N   --learning_rate X [1e-6]   --lr_scheduler_type NAME [linear]
           --warmup_steps N [0]
  run      --run_name NAME   --output_dir DIR [checkpoints]   --eval_out DIR [eval_out]
           --resume auto|PATH|never [auto]   --overwrite   --preflight_only
           --plan HARDWARE (only memory, time, disk; 1x24GB, 2x8x80GB or cpu:24GB)
           --plan_tflops X (with --plan)
           --allow_fatal (train although the preflight found the run useless)   --list (all runs)
           --eval_strategy no|steps|epoch [no]   --eval_steps N   --save_steps N [500]
           --report_to NAME [none] (tensorboard, trackio, wandb)
"""

from functools import partial

from preflab.evaluation.run_list import print_runs
from preflab.training.memory import OUT_OF_MEMORY
from utils.errors import run
from utils.stage import prepare, print_main


def main():
    prepare(__doc__, listing=partial(print_runs, folder_flag="--output_dir"))

    # Heavy imports only now: --help is answered before torch is imported.
    from preflab.data.preferences import DataArguments
    from preflab.training import reference_cache
    from preflab.training.dpo_config import DPORunConfig
    from preflab.training.families import family_of
    from preflab.training.run import TrainingRun, training_summary
    from preflab.training.samples import write_pair_samples
    from preflab.training.step0 import check_step0_margins

    training = TrainingRun.open("train", __doc__, DataArguments, DPORunConfig)
    # The same command, called again after the end, prints the results.
    if training.folders.finished:
        return training.print_results()
    # Pairs, ranked lists, or answers with thumbs, as the loss reads them.
    family = family_of(training.config)
    splits = training.load_splits(family.load_splits)
    trainer = training.build_trainer(family.trainer, splits)
    flight = training.preflight(trainer, splits, family.describe)
    # Policy and reference are the same model before the first step, so every reward and margin must be 0.
    check_step0_margins(flight["step0"], training.config)
    if training.config.preflight_only:
        return print_main(f"\n{training.describe_preflight_only()}")
    # After the preflight, whose step-0 rewards are thus computed with the reference itself.
    reference = reference_cache.prepare(training, trainer, flight["plan"])
    training.train(trainer, flight)
    rows, metrics = family.evaluate(trainer, splits, training.config)
    samples = write_pair_samples(training, trainer, splits)
    title = training.title(splits, family.unit)
    report = family.render(metrics, title, training.row_log.read(), samples, splits.kept_overlap)
    tokens, reference_in_step = flight["plan"]["tokens_stored_once"], "in_every_step_because" in reference
    speed = training_summary(trainer, flight, "pairs", tokens, reference_in_step)
    training.publish(
        trainer,
        splits,
        flight,
        metrics,
        rows,
        report,
        title=title,
        curves=family.curves,
        curves_name="dpo_training_curves.png",
        training={**speed, "reference": reference},
        flight_keys=("padded_because",),
    )


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
