"""Train a language model on preference pairs with DPO or any loss of its family (TRL's DPOTrainer is the engine).

    python dpo_train_human_preference.py --config configs/quickstart.yaml                       # CPU, 2 cores
    python dpo_train_human_preference.py --config configs/gemma-2b-it-dpo.yaml                  # one GPU
    accelerate launch --config_file configs/accelerate/multi_gpu.yaml \\
        dpo_train_human_preference.py --config configs/gemma-2b-it-dpo.yaml                     # eight GPUs
    python dpo_train_human_preference.py --config configs/quickstart.yaml --limit 16 --max_steps 4   # a trial run

Answers: does the policy learn to rank held-out answers as people did? Writes weights and a model card to
checkpoints/<run_name>/, and preflight.json, train.json, train_log.jsonl, heldout_rows.jsonl, samples.md and
dpo_training_curves.png to eval_out/<run_name>/.

The keys that matter (YAML keys and flags are the same; the command line wins; --help_all lists every key):

  model    --model_name_or_path ID|FOLDER|builtin:smollm2-135m-instruct   --model_revision  --dtype float32|bfloat16
           --use_peft --lora_r 16 --lora_alpha 32 --lora_target_modules q_proj v_proj ...   --load_in_4bit
           --attn_implementation sdpa|eager|flash_attention_2   --bf16 | --fp16   --chat_template_path FILE
           --start_adapter FOLDER|ID --start_adapter_use merge|continue (with --use_peft)
  data     --dataset_name HUB_ID|FILE|FOLDER   --dataset_train_split train   --dataset_test_split test (or none)
           --test_dataset_name OTHER   --drop_ties   --min_score_margin X   --keep_duplicate_prompts
           --train_test_overlap refuse|drop|keep   --prompt_format auto|chat   --limit N
           several datasets: a `datasets:` list in the YAML, each {path, split, test_split, fraction}
  loss     --loss_type sigmoid ipo hinge robust sppo_hard apo_zero simpo sppo ...   --beta 0.1   --label_smoothing 0
           --gamma_beta_ratio 0.5 (simpo)
  length   --max_length 1024   --max_prompt_length 512 (used only in pairs longer than max_length)
  steps    --per_device_train_batch_size 2  --gradient_accumulation_steps 4  or  --global_batch_size 8
           --num_train_epochs 1 | --max_steps N   --learning_rate 1e-6   --lr_scheduler_type cosine  --warmup_steps N
  run      --run_name NAME   --output_dir checkpoints   --eval_out eval_out   --resume auto|PATH|never   --overwrite
           --eval_strategy steps --eval_steps N   --save_steps N   --preflight_only   --report_to none|tensorboard|...
"""

from preflab.training.memory import OUT_OF_MEMORY
from utils.cli import quick_help
from utils.errors import UserError, is_main_process, run


def parse_arguments():
    """(DataArguments, DPORunConfig, ModelConfig) from YAML and command line, checked before anything is loaded."""
    from trl import ModelConfig

    from preflab.data.preferences import DataArguments
    from preflab.training.dpo_trainer import LOSS_TYPES, DPORunConfig
    from preflab.training.losses import OWN_LOSSES
    from preflab.training.run_config import check_positive, check_run_config
    from utils.cli import parse

    data, args, model = parse((DataArguments, DPORunConfig, ModelConfig))
    unknown = [loss for loss in args.loss_type if loss not in LOSS_TYPES]
    if unknown:
        raise UserError(f"--loss_type {unknown[0]}: unknown; one or several of {', '.join(LOSS_TYPES)}")
    check_positive((args, ("beta", "micro_batch_tokens")))
    check_run_config(args, model)
    data.check()
    if args.max_length is not None:
        if args.max_prompt_length is None:
            args.max_prompt_length = args.max_length // 2
        if not 0 < args.max_prompt_length < args.max_length:
            raise UserError(
                f"--max_prompt_length {args.max_prompt_length} must be above 0 and below --max_length"
                f" {args.max_length}, so that an answer always keeps a token"
            )
    if not 0 <= args.label_smoothing < 0.5:
        raise UserError(f"--label_smoothing {args.label_smoothing}: must be at least 0 and below 0.5")
    if set(args.loss_type) & set(OWN_LOSSES):
        for key, idle in (("ld_alpha", None), ("use_weighting", False), ("f_divergence_type", "reverse_kl")):
            if getattr(args, key) != idle:
                raise UserError(f"--{key} belongs to TRL's losses; simpo and sppo know nothing of it")
        if "sppo" in args.loss_type and args.label_smoothing:
            raise UserError("--label_smoothing: sppo has none; its win probabilities say how sure a label is")
    if "exo_pair" in args.loss_type and args.label_smoothing == 0:
        raise UserError("--loss_type exo_pair needs --label_smoothing above 0 (its paper recommends 1e-3)")
    if args.f_divergence_type not in F_DIVERGENCES:
        raise UserError(f"--f_divergence_type {args.f_divergence_type}: unknown; one of {', '.join(F_DIVERGENCES)}")
    if args.sync_ref_model:
        raise UserError(
            "--sync_ref_model: not supported, since every figure here is told against a reference that stays"
        )
    if args.ld_alpha is not None and args.precompute_ref_log_probs:
        raise UserError("--ld_alpha with --precompute_ref_log_probs: leave one out; step 0 could not be checked")
    return data, args, model


F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def load_data(data, args, tokenizer):
    """Read, filter and tokenise both splits.

    Returns:
        (train, train_ids, test, test_ids, truncation): PreferenceData and Dataset a split (test: None where there is
        none), and the train split's truncation counts.
    """
    from preflab.data.preferences import load_pairs, tokenize
    from preflab.data.sources import without_overlap

    filters = {
        "drop_ties": data.drop_ties,
        "min_score_margin": data.min_score_margin,
        "keep_duplicate_prompts": data.keep_duplicate_prompts,
        "plain_as_chat": data.prompt_format == "chat",
        "limit": data.limit,
    }
    train_sources, test_sources = data.sources()
    lengths = args.max_length, args.max_prompt_length
    train, test, test_ids = load_pairs(train_sources, **filters), None, None
    if test_sources:
        test = load_pairs(test_sources, **filters)
        train.pairs = without_overlap(train.pairs, test.pairs, data.train_test_overlap, train.dropped)
        test_ids, _ = tokenize(test, tokenizer, *lengths, desc="test")
    train_ids, truncation = tokenize(train, tokenizer, *lengths, desc="train")
    if "sppo" in args.loss_type:
        for name, split in (("train", train), ("test", test)):
            pairs = split.pairs if split else []
            lacking = [p for p in pairs if any(w is None or not 0 <= w <= 1 for w in (p.win_chosen, p.win_rejected))]
            if lacking:
                raise UserError(
                    f"{lacking[0].source}: --loss_type sppo needs 'win_chosen' and 'win_rejected' (probabilities from 0"
                    f" to 1) in every row of the {name} split, and {len(lacking)} rows have none"
                )
    return train, train_ids, test, test_ids, truncation


def build_trainer(args, model_args, start, tokenizer, train_ids, test_ids, row_log, notes):
    """Policy, reference and trainer. Whether memory asks for gradient checkpointing is decided here, and noted."""
    from functools import cache

    from trl import get_peft_config

    from preflab.models.loading import load_adapter, load_for_training
    from preflab.training.dpo_trainer import ResumableDPOTrainer, longest_sequence

    if test_ids is None:
        args.eval_strategy = "no"
    further = start is not None and start.use == "continue"
    try:
        policy = load_for_training(args, model_args)
        trained = 0 if model_args.use_peft else sum(p.numel() for p in policy.parameters())
        beside = not (model_args.use_peft or args.precompute_ref_log_probs)
        longest = cache(lambda: longest_sequence(train_ids))
        args.choose_micro_batch_tokens(policy, trained, longest, beside)
        why = args.choose_checkpointing(policy, trained, longest, beside)
        notes += [why] if why else []
        return ResumableDPOTrainer(
            # An adapter that is trained further becomes the policy; TRL freezes a copy of it as the reference.
            model=load_adapter(policy, start.adapter, is_trainable=True) if further else policy,
            # With LoRA the reference is the policy with its adapter switched off; precomputed, none is kept.
            ref_model=load_for_training(args, model_args) if beside else None,
            args=args,
            train_dataset=train_ids,
            eval_dataset=test_ids,
            processing_class=tokenizer,
            peft_config=None if further else get_peft_config(model_args),
            row_log=row_log,
        )
    except (ValueError, NotImplementedError) as error:
        raise UserError(f"{model_args.model_name_or_path}: {str(error).splitlines()[0]}") from error


def cache_reference(trainer, args, model_args, start, tokenizer) -> dict:
    """Reference log-probabilities of all pairs, from disk where an earlier run left them; why not, where not."""
    from preflab.models.loading import describe, quantised_as
    from preflab.training import reference_cache
    from preflab.training.run_config import print_main

    why = reference_cache.unsupported_reason(trainer)
    if why is not None:
        return {"in_every_step_because": why}
    identity = describe(model_args.model_name_or_path, trainer.model, tokenizer, model_args.model_revision)
    quantised = {**quantised_as(model_args), "precision": args.precision}
    frozen = {"start": start.describe()} if start and start.use == "continue" else {}
    found = reference_cache.use(trainer, args.eval_out, {**identity, **quantised, **frozen})
    print_main(f"reference: {found['computed']} pairs computed, {found['read']} read, {found['seconds']} s")
    return found


def evaluate(trainer, args, train, test) -> tuple[list[dict], dict]:
    """Rows and metrics of the held-out pairs: implicit rewards, the base's ranking, and what the surface gives away."""
    from preflab.evaluation.rewards import reward_metrics, reward_rows
    from preflab.evaluation.surface_baseline import bag_of_words_scores

    logged = [row["step"] for row in trainer.row_log.read() if row["split"] == "eval"]
    scores = trainer.score(trainer.eval_dataset, log=trainer.state.global_step not in logged)
    rows = reward_rows(scores, args.beta)
    texts = [[(pair.chosen, pair.rejected) for pair in split.pairs] for split in (train, test)]
    for row, pair in zip(rows, test.pairs, strict=True):
        row.update(where=pair.source, score_chosen=pair.score_chosen, score_rejected=pair.score_rejected)
    return rows, reward_metrics(rows, bag_of_words_scores(*texts, seed=args.seed), args.seed)


def answer_samples(trainer, test, count: int, path) -> None:
    """A few held-out prompts answered greedily by reference and policy, side by side, to be read."""
    from contextlib import nullcontext

    from preflab.models.start_adapter import as_reference
    from preflab.training.samples import write_samples

    # A sharded model cannot answer from rank 0 alone, and text-only pairs are no questions.
    prompts = [pair.messages for pair in test.pairs if pair.messages][:count] if test else []
    policy = trainer.accelerator.unwrap_model(trainer.model)
    has_reference = trainer.ref_model is not None or hasattr(policy, "peft_config")
    if prompts and has_reference and is_main_process() and not trainer.is_sharded:
        sides = {"base": as_reference(policy, trainer.ref_model), "tuned": nullcontext(policy)}
        with trainer.accelerator.autocast():
            write_samples(path, sides, trainer.processing_class, prompts)


def main():
    quick_help(__doc__)

    from utils.distributed import keep_fsdp_on_cpu, on_main_process, quiet_libraries

    quiet_libraries()
    data_args, args, model_args = parse_arguments()
    keep_fsdp_on_cpu()

    import time

    from preflab.models.card import model_card
    from preflab.models.loading import describe, load_tokenizer, locate
    from preflab.models.start_adapter import merge_start_adapter, resolve_start_adapter
    from preflab.training.curves import dpo_curves
    from preflab.training.dpo_report import conclude
    from preflab.training.dpo_trainer import check_step0
    from preflab.training.preflight import report, run_preflight
    from preflab.training.run_config import fit_global_batch, print_main, train_or_resume, training_summary
    from preflab.training.run_folder import checkpoint_to_resume, claim_run, identity
    from preflab.training.throughput import DPO_OPERATIONS, slower_than_float32
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
    args.run_name = run_name(args.run_name, model_args.model_name_or_path, "-".join(args.loss_type), data_args.limit)
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
        data_args.chat_template_path,
        trust_remote_code=args.trust_remote_code,
    )
    train, train_ids, test, test_ids, truncation = load_data(data_args, args, tokenizer)
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
    flight = run_preflight(trainer, args, model_args, train, train_ids, test, truncation, notes)
    write_json(current.out / "preflight.json", flight)
    print_main(report(flight))
    if flight["step0"]["largest_reward"] is not None:
        check_step0(max(flight["step0"]["largest_margin"], flight["step0"]["largest_reward"]), args)
    if args.preflight_only:
        return print_main(f"\npreflight only: see {current.out}/preflight.json")

    # The reference, once and for all runs; then train, and save weights and tokenizer.
    reference = cache_reference(trainer, args, model_args, start, tokenizer)
    train_or_resume(trainer, checkpoint, current)
    trainer.save_model(args.output_dir)
    if trainer.step0_reward is not None:
        flight["step0"] |= {"largest_reward": trainer.step0_reward, "checked": "on the first micro-batch of training"}
        write_json(current.out / "preflight.json", flight)

    # Evaluate on the held-out pairs.
    rows, metrics = evaluate(trainer, args, train, test) if test else ([], {})
    answer_samples(trainer, test, args.sample_prompts, current.out / "samples.md")
    if not is_main_process():
        return
    lora = "LoRA" if model_args.use_peft else "full fine-tuning"
    title = (
        f"{args.run_name}: {model_args.model_name_or_path}, {lora}, {'+'.join(args.loss_type)}, {len(train_ids)} pairs"
    )
    text, verdict, warning = conclude(metrics, title)
    speed = training_summary(
        row_log.read(), trainer, flight, "pairs", flight["plan"]["tokens_stored_once"], DPO_OPERATIONS
    )

    # Write: rows, curves, card, and last the summary that declares the run complete.
    summary = envelope(
        "train",
        describe(model_args.model_name_or_path, trainer.model, tokenizer, model_args.model_revision),
        metrics,
        all_arguments([data_args, args, model_args]),
        run_record(args.seed, time.monotonic() - started, run_name=args.run_name, limit=data_args.limit),
        claim=verdict,
        warning=warning,
        text=text,
        training={**speed, "reference": reference},
        **{key: flight[key] for key in ("plan", "dropout", "precision", "parameters", "padded_because")},
        start=start.describe() if start else None,
        published=published,
        data={"train": train.summary(), "test": test.summary() if test else None},
    )
    if rows:
        write_rows(current.out / "heldout_rows.jsonl", rows)
    dpo_curves(current.out / "dpo_training_curves.png", row_log.read(), title, warning)
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
