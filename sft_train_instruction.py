"""Train a language model to follow instructions: supervised fine-tuning on answers (TRL's SFTTrainer).

    python sft_train_instruction.py --config configs/quickstart-sft.yaml         # CPU, 2 cores
    python sft_train_instruction.py --config configs/llama3-8b-alpaca-sft.yaml   # one GPU
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        sft_train_instruction.py --config configs/llama3-8b-alpaca-sft.yaml      # eight GPUs
    python sft_train_instruction.py --config configs/quickstart-sft.yaml --limit 16 \\
        --max_steps 4                                                            # a trial run

Answers: does the model predict held-out answers better than it did? Writes weights and a model card
to checkpoints/<run_name>/, and preflight.json, train.json, train_log.jsonl, heldout_rows.jsonl,
samples.md and sft_training_curves.png to eval_out/<run_name>/.

The keys that matter (flags and YAML keys are the same, the command line wins; [x] is the default;
--help_all lists every key, --help_all WORD those about WORD):

  model    --model_name_or_path ID|FOLDER|builtin:smollm2-135m-instruct
           --model_revision REV [main]   --dtype float32|bfloat16|float16|auto [float32]
           --bf16 | --fp16 (default: bf16 on a GPU)
           --attn_implementation sdpa|eager|flash_attention_2   --use_peft   --lora_r N [16]
           --lora_alpha N [32]   --lora_dropout X [0.05]
           --lora_target_modules NAME ... | all-linear   --load_in_4bit   --start_adapter FOLDER|ID
           --start_adapter_use merge|continue
  data     --dataset_name HUB_ID|FILE|FOLDER   --test_dataset_name OTHER
           --dataset_train_split NAME [train]   --dataset_test_split NAME|none
           --test_rows N (held out of the train split where no test split is named, default 200)
           --columns NAME=COLUMN ...   --on_bad_row refuse|skip [refuse]   --limit N
           rows: messages; instruction, input, output; prompt and completion; prompt and chosen
           several datasets: a `datasets:` list in the YAML, each {path, split, test_split,
           fraction}
  text     --prompt_format auto|chat|text [auto] (text prompts as user turns)
           --chat_template_path FILE (default: the model's own; configs/templates has alpaca.jinja
           and llama3.jinja for base models)   --loss_on responses|everything [responses]
  length   --max_length N [1024]   --packing   --packing_strategy bfd|bfd_split [bfd]
           (rows without padding; --no_padding_free: padded ones, slower, with the same results)
  steps    --per_device_train_batch_size N [8]   --gradient_accumulation_steps N [1]
           --global_batch_size N (instead of the accumulation)   --num_train_epochs X [3]
           --max_steps N   --learning_rate X [2e-5]   --lr_scheduler_type NAME [linear]
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
    from preflab.data.conversations import SFTArguments
    from preflab.models.start_adapter import keep_reference
    from preflab.training import sft_report
    from preflab.training.curves import sft_curves
    from preflab.training.held_out import evaluate_conversations, score_base
    from preflab.training.preflight import describe_conversations
    from preflab.training.run import TrainingRun, training_summary
    from preflab.training.samples import write_conversation_samples
    from preflab.training.sft_config import SFTRunConfig
    from preflab.training.sft_trainer import ResumableSFTTrainer
    from preflab.training.splits import load_conversation_splits

    training = TrainingRun.open("sft", __doc__, SFTArguments, SFTRunConfig)
    # The same command, called again after the end, prints the results.
    if training.folders.finished:
        return training.print_results()
    splits = training.load_splits(load_conversation_splits)
    trainer = training.build_trainer(ResumableSFTTrainer, splits)
    flight = training.preflight(trainer, splits, describe_conversations)
    if training.config.preflight_only:
        return print_main(f"\n{training.describe_preflight_only()}")
    # Before the first step, since no copy of the base is kept beside the model that is trained.
    score_base(training, trainer, splits)
    # Unlike DPOTrainer, SFTTrainer keeps no copy of a start adapter that it trains further.
    keep_reference(training.start_adapter, training.config.output_dir)
    training.train(trainer, flight)
    rows, metrics = evaluate_conversations(trainer, splits, training.config.seed)
    samples = write_conversation_samples(training, trainer, splits)
    title = training.title(splits, "conversations")
    report = sft_report.render(metrics, title, training.row_log.read(), samples, splits.kept_overlap)
    training.publish(
        trainer,
        splits,
        flight,
        metrics,
        rows,
        report,
        title=title,
        curves=sft_curves,
        curves_name="sft_training_curves.png",
        training=training_summary(trainer, flight, "rows", flight["plan"]["tokens_seen"]),
        flight_keys=("packing", "padded_because"),
    )


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
