"""Train a reward model on preference pairs: a language model whose one output is a reward.

    python train_reward_model.py --config configs/quickstart-rm.yaml             # CPU, 2 cores
    python train_reward_model.py --config configs/llama-3-8b-rm.yaml             # GPUs
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        train_reward_model.py --config configs/llama-3-8b-rm.yaml                # eight GPUs
    python train_reward_model.py --config configs/quickstart-rm.yaml --limit 16 \\
        --max_steps 4                                                            # a trial run

Answers: does it rank held-out answers as people did, and better than length, words, and the base
model's own likelihood? The loss is Bradley-Terry's (TRL's RewardTrainer); each pair's prompt is
computed once. Writes weights and a model card to checkpoints/<run_name>/, and preflight.json,
train.json, train_log.jsonl, heldout_rows.jsonl and reward_training_curves.png to
eval_out/<run_name>/. Afterwards `rm:checkpoints/<run_name>` is a scorer and a judge in every
script, and eval_reward_model.py evaluates it.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  model    --model_name_or_path ID|FOLDER|builtin:smollm2-135m-instruct
           --model_revision REV [main]   --dtype float32|bfloat16|float16|auto [float32]
           --bf16 | --fp16 (default: bf16 on a GPU)   --chat_template_path FILE
           --attn_implementation sdpa|eager|flash_attention_2   --use_peft   --lora_r N [16]
           --lora_alpha N [32]   --lora_dropout X [0.05]
           --lora_target_modules NAME ... | all-linear   --load_in_4bit
           --start_adapter FOLDER|ID --start_adapter_use merge (e.g. an SFT adapter)
  data     --dataset_name HUB_ID|FILE|FOLDER   --test_dataset_name OTHER
           --dataset_train_split NAME [train]   --dataset_test_split NAME|none (default: test)
           --test_rows N (hold N rows out of the train split instead)
           --drop_ties   --min_score_margin X   --keep_duplicate_prompts
           --train_test_overlap refuse|drop|keep [refuse]   --prompt_format auto|chat|text [auto]
           --columns NAME=COLUMN ...   --on_bad_row refuse|skip [refuse]   --limit N
           several datasets: a `datasets:` list in the YAML, each {path, split, test_split,
           fraction}
  loss     --margin_per_point X (margin: X logits per point of score_chosen - score_rejected)
           --center_rewards_coefficient X (draws rewards towards 0; 0.01 is usual)
  length   --max_length N [1024] (longer pairs are left out: a reward is read at an answer's end)
  steps    --per_device_train_batch_size N [8]   --gradient_accumulation_steps N [1]
           --global_batch_size N (instead of the accumulation)   --num_train_epochs X [3]
           --max_steps N   --learning_rate X [1e-4]   --lr_scheduler_type NAME [linear]
           --warmup_steps N [0]
  run      --run_name NAME   --output_dir DIR [checkpoints]   --eval_out DIR [eval_out]
           --resume auto|PATH|never [auto]   --overwrite   --preflight_only
           --allow_fatal (train although the preflight found the run useless)   --list (all runs)
           --plan HARDWARE (only memory, time, disk; 1x24GB, 2x8x80GB or cpu:24GB)
           --base_ranking BOOL [true] (also rank the test pairs by the base's likelihood)
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
    from preflab.data.preferences import PairFilters
    from preflab.training import reward_report
    from preflab.training.base_ranking import rank_by_likelihood
    from preflab.training.curves import reward_curves
    from preflab.training.held_out import evaluate_rewards
    from preflab.training.preflight import describe_reward_pairs
    from preflab.training.reward_config import RewardRunConfig
    from preflab.training.reward_trainer import ResumableRewardTrainer
    from preflab.training.run import TrainingRun, training_summary
    from preflab.training.splits import load_reward_splits

    training = TrainingRun.open("reward_model", __doc__, PairFilters, RewardRunConfig)
    # The same command, called again after the end, prints the results.
    if training.folders.finished:
        return training.print_results()
    splits = training.load_splits(load_reward_splits)
    # Before the trainer is made, so that only one copy of the weights is in memory.
    base = None if training.config.preflight_only else rank_by_likelihood(training, splits)
    trainer = training.build_trainer(ResumableRewardTrainer, splits)
    flight = training.preflight(trainer, splits, describe_reward_pairs)
    if training.config.preflight_only:
        return print_main(f"\n{training.describe_preflight_only()}")
    training.train(trainer, flight)
    rows, metrics = evaluate_rewards(trainer, splits, base, training.config.seed)
    title = training.title(splits, "pairs")
    report = reward_report.render(metrics, title, training.row_log.read(), kept=splits.kept_overlap)
    training.publish(
        trainer,
        splits,
        flight,
        metrics,
        rows,
        report,
        title=title,
        curves=reward_curves,
        curves_name="reward_training_curves.png",
        training=training_summary(trainer, flight, "pairs", flight["plan"]["tokens_stored_once"]),
        flight_keys=("padded_because",),
    )


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
