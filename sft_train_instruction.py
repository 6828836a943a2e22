"""Train a language model to follow instructions: supervised fine-tuning on answers (TRL's SFTTrainer is the engine).

    python sft_train_instruction.py --config configs/quickstart-sft.yaml                         # CPU, 2 cores
    python sft_train_instruction.py --config configs/llama3-8b-alpaca-sft.yaml                   # one GPU
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        sft_train_instruction.py --config configs/llama3-8b-alpaca-sft.yaml                      # eight GPUs
    python sft_train_instruction.py --config configs/quickstart-sft.yaml --limit 16 --max_steps 4    # a trial run

Answers: does the model predict held-out answers better than it did? Writes weights and a model card to
checkpoints/<run_name>/, and preflight.json, train.json, train_log.jsonl, heldout_rows.jsonl, samples.md and
sft_training_curves.png to eval_out/<run_name>/.

The keys that matter (YAML keys and flags are the same; the command line wins; --help_all lists every key):

  model    --model_name_or_path ID|FOLDER|builtin:smollm2-135m-instruct   --model_revision  --dtype float32|bfloat16
           --use_peft --lora_r 16 --lora_alpha 16 --lora_target_modules q_proj v_proj ...   --load_in_4bit
           --start_adapter FOLDER|ID --start_adapter_use merge|continue   --bf16 | --fp16   --attn_implementation
  data     --dataset_name HUB_ID|FILE|FOLDER   --dataset_train_split train   --dataset_test_split test (or none)
           --test_rows 200 (held out of the train split where no test split is named)   --limit N
           rows: messages; instruction, input, output; prompt and completion; prompt and chosen
           several datasets: a `datasets:` list in the YAML, each {path, split, test_split, fraction}
  text     --chat_template_path FILE (default: the model's own; configs/templates has alpaca.jinja and llama3.jinja for
           base models)   --loss_on responses|everything
  length   --max_length 1024   --packing   --packing_strategy bfd|bfd_split
  steps    --per_device_train_batch_size 2  --gradient_accumulation_steps 4  or  --global_batch_size 8
           --num_train_epochs 1 | --max_steps N   --learning_rate 2e-4   --lr_scheduler_type linear  --warmup_steps N
  run      --run_name NAME   --output_dir checkpoints   --eval_out eval_out   --resume auto|PATH|never   --overwrite
           --eval_strategy steps --eval_steps N   --save_steps N   --preflight_only   --report_to none|tensorboard|...
"""

from preflab.training.memory import OUT_OF_MEMORY
from utils.cli import quick_help
from utils.errors import UserError, is_main_process, run


def parse_arguments():
    """(SFTArguments, SFTRunConfig, ModelConfig) from YAML and command line, checked before loading."""
    from trl import ModelConfig

    from preflab.data.conversations import SFTArguments
    from preflab.training.run_config import check_run_config
    from preflab.training.sft_trainer import SFTRunConfig
    from utils.cli import parse

    data, args, model = parse((SFTArguments, SFTRunConfig, ModelConfig))
    check_run_config(args, model)
    data.check()
    if args.packing and args.max_length is None:
        raise UserError("--packing needs --max_length: the tokens of a packed row")
    if args.packing and args.packing_strategy not in UNBROKEN:
        raise UserError(
            f"--packing_strategy {args.packing_strategy}: conversations would see each other; take one of"
            f" {', '.join(UNBROKEN)}"
        )
    for key, ours in IDLE.items():
        if getattr(args, key):
            raise UserError(f"--{key}: rows come tokenised here; {ours}")
    return data, args, model


IDLE = {
    "assistant_only_loss": "--loss_on responses does that",
    "completion_only_loss": "--loss_on responses does that",
    "padding_free": "--packing does that",
    "eos_token": "the chat template ends an answer",
    "shuffle_dataset": "the trainer shuffles",
}
UNBROKEN = ("bfd", "bfd_split")


def load_data(data, args, tokenizer):
    """Read and tokenise both splits.

    Returns:
        (train, train_ids, test, test_ids, counts): ConversationData and Dataset a split (test: None where there is
        none), and the train split's counts.
    """
    from preflab.data.conversations import hold_out, load_conversations, tokenize
    from preflab.data.sources import without_overlap

    train_sources, test_sources = data.sources()
    train, test, test_ids = load_conversations(train_sources, data.limit), None, None
    if test_sources:
        test = load_conversations(test_sources, data.limit)
        policy, dropped = data.train_test_overlap, train.dropped
        train.conversations = without_overlap(train.conversations, test.conversations, policy, dropped)
    elif data.dataset_test_split is None:
        test = hold_out(train, min(data.test_rows, data.limit // 4) if data.limit else data.test_rows)
    if test:
        test_ids, _ = tokenize(test, tokenizer, data.loss_on, args.max_length, desc="test")
    train_ids, counts = tokenize(train, tokenizer, data.loss_on, args.max_length, desc="train")
    return train, train_ids, test, test_ids, counts


def build_trainer(args, model_args, start, tokenizer, train_ids, test_ids, row_log, notes):
    """Model and trainer. Whether memory asks for gradient checkpointing is decided here, and noted."""
    from trl import get_peft_config

    from preflab.models.loading import load_adapter, load_for_training
    from preflab.training.sft_trainer import ResumableSFTTrainer, longest_row

    if test_ids is None:
        args.eval_strategy = "no"
    further = start is not None and start.use == "continue"
    try:
        model = load_for_training(args, model_args)
        trained = 0 if model_args.use_peft else sum(p.numel() for p in model.parameters())
        why = args.choose_checkpointing(model, trained, lambda: longest_row(train_ids), False)
        notes += [why] if why else []
        return ResumableSFTTrainer(
            model=load_adapter(model, start.adapter, is_trainable=True) if further else model,
            args=args,
            train_dataset=train_ids,
            eval_dataset=test_ids,
            processing_class=tokenizer,
            peft_config=None if further else get_peft_config(model_args),
            row_log=row_log,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{model_args.model_name_or_path}: {str(error).splitlines()[0]}") from error


def main():
    quick_help(__doc__)

    from utils.distributed import keep_fsdp_on_cpu, on_main_process, quiet_libraries

    quiet_libraries()
    data_args, args, model_args = parse_arguments()
    keep_fsdp_on_cpu()

    import time
    from contextlib import nullcontext

    from preflab.data.chat_template import ChatRenderer
    from preflab.models.card import model_card
    from preflab.models.loading import describe, load_tokenizer, locate, quantised_as
    from preflab.models.start_adapter import as_reference, keep_reference, merge_start_adapter, resolve_start_adapter
    from preflab.training.curves import sft_curves
    from preflab.training.run_config import fit_global_batch, print_main, train_or_resume, training_summary
    from preflab.training.run_folder import checkpoint_to_resume, claim_run, identity
    from preflab.training.samples import write_samples
    from preflab.training.sft_preflight import report, run_preflight
    from preflab.training.sft_report import conclude, heldout_metrics, heldout_rows
    from preflab.training.throughput import SFT_OPERATIONS, slower_than_float32
    from utils.artifacts import (
        RowFile,
        all_arguments,
        envelope,
        read_json,
        read_published,
        write_json,
        write_rows,
        write_text,
    )
    from utils.cli import run_name
    from utils.provenance import run_record, sha256_of

    # The run: its name, its folders, and whether it stands there already.
    started = time.monotonic()
    notes = fit_global_batch(args)
    published = read_published(args.published, list) if args.published else None
    args.run_name = run_name(args.run_name, model_args.model_name_or_path, "sft", data_args.limit)
    locate(model_args.model_name_or_path, model_args.model_revision)
    start = resolve_start_adapter(args, model_args)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    arguments = identity([data_args, args, model_args], batch) | (start.identity() if start else {})
    claim = (args.run_name, args.output_dir, args.eval_out, arguments, args.resume, args.overwrite)
    current = on_main_process(lambda: claim_run(*claim))
    if current.finished:
        results = read_json(current.out / "train.json")
        current.ensure_data_unchanged(results["data"])
        return print_main(
            f"{current.folder} is finished, nothing to train; from {current.out}/train.json:\n\n{results['text']}"
        )
    checkpoint = checkpoint_to_resume(current, args.resume)
    args.output_dir = str(current.folder)

    # Data and model.
    tokenizer = load_tokenizer(
        *(start.tokenizer if start else (model_args.model_name_or_path, model_args.model_revision)),
        args.chat_template_path,
        trust_remote_code=args.trust_remote_code,
    )
    train, train_ids, test, test_ids, counts = load_data(data_args, args, tokenizer)
    current.record_data_hash(sha256_of(train.summary()["text_sha256"], test.summary()["text_sha256"] if test else ""))
    row_log = RowFile(current.out / "train_log.jsonl")
    if start and start.merged:
        merge_start_adapter(start, model_args.dtype, model_args.attn_implementation, args.trust_remote_code)
    trainer = build_trainer(args, model_args, start, tokenizer, train_ids, test_ids, row_log, notes)

    # Preflight.
    notes += [start.summary()] if start else []
    if args.use_cpu and args.precision != "fp32":
        slow = slower_than_float32(args.dtype_name, "cpu")
        notes += [slow] if slow else []
    flight = run_preflight(trainer, args, model_args, train, train_ids, test, counts, notes)
    write_json(current.out / "preflight.json", flight)
    print_main(report(flight, data_args.loss_on))
    if args.preflight_only:
        return print_main(f"\npreflight only: see {current.out}/preflight.json")

    # The base's figures, before a weight moves; then train, and save weights and tokenizer.
    base = None
    if test and not trainer.is_sharded:
        model = describe(model_args.model_name_or_path, trainer.model, tokenizer, model_args.model_revision)
        about = {**model, **quantised_as(model_args), "precision": args.precision}
        about["start"] = start.describe() if start else None
        base = trainer.base_figures(test_ids, args.eval_out, about)
    keep_reference(start, args.output_dir)
    train_or_resume(trainer, checkpoint, current)
    trainer.save_model(args.output_dir)

    # Evaluate on the held-out conversations.
    rows = heldout_rows(test, test_ids, base, trainer.score(test_ids)) if test else []
    metrics = heldout_metrics(rows, args.seed) if rows else {}
    if not is_main_process():
        return
    chat = ChatRenderer(tokenizer)
    prompts = [c.turns_for(chat)[:-1] for c in test.conversations[: args.sample_prompts]] if test else []
    if prompts and not trainer.is_sharded:
        policy = trainer.accelerator.unwrap_model(trainer.model)
        fresh = model_args.use_peft and not (start and start.use == "continue")
        sides = {**({"base": as_reference(policy)} if fresh else {}), "tuned": nullcontext(policy)}
        with trainer.accelerator.autocast():
            write_samples(current.out / "samples.md", sides, tokenizer, prompts)
    lora = "LoRA" if model_args.use_peft else "full fine-tuning"
    title = f"{args.run_name}: {model_args.model_name_or_path}, {lora}, SFT, {len(train_ids)} conversations"
    text, verdict, warning = conclude(metrics, title)
    speed = training_summary(row_log.read(), trainer, flight, "rows", flight["plan"]["tokens_seen"], SFT_OPERATIONS)

    # Write: rows, curves, card, and last the summary that declares the run complete.
    summary = envelope(
        "sft",
        describe(model_args.model_name_or_path, trainer.model, tokenizer, model_args.model_revision),
        metrics,
        all_arguments([data_args, args, model_args]),
        run_record(args.seed, time.monotonic() - started, run_name=args.run_name, limit=data_args.limit),
        claim=verdict,
        warning=warning,
        text=text,
        training=speed,
        **{key: flight[key] for key in ("plan", "dropout", "precision", "parameters", "packing")},
        start=start.describe() if start else None,
        published=published,
        data={"train": train.summary(), "test": test.summary() if test else None},
    )
    if rows:
        write_rows(current.out / "heldout_rows.jsonl", rows)
    sft_curves(current.out / "sft_training_curves.png", row_log.read(), title)
    write_text(
        current.folder / "README.md", model_card(summary, row_log.read(), str(current.folder), model_args.use_peft)
    )
    write_json(current.out / "train.json", summary)
    current.finish()
    print_main(f"\n{text}\n\nwrote {current.folder}/ (weights, tokenizer, card) and {current.out}/:")
    print_main("\n".join(f"  {path.name}" for path in sorted(current.out.iterdir())))
    print_main(f"training took {trainer.seconds:.0f} s, the whole command {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    run(main, OUT_OF_MEMORY)
