"""The preflight: everything about a preference run that can be known, and be wrong, before its first step."""

import math
import time

import numpy as np

from preflab.training.memory import needed
from utils.errors import UserError


def token_counts(dataset) -> dict:
    """Token lengths of a tokenised split: totals, means, margins of chosen over rejected."""
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in dataset[key]]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")
    )
    return {
        "pairs": len(dataset),
        "prompt_tokens_mean": float(prompt.mean()),
        "chosen_tokens_mean": float(chosen.mean()),
        "rejected_tokens_mean": float(rejected.mean()),
        "longest_sequence": int((prompt + np.maximum(chosen, rejected)).max()),
        "tokens_per_epoch": int((2 * prompt + chosen + rejected).sum()),
        "tokens_stored_once": int((prompt + chosen + rejected).sum()),
        "margin_tokens_mean": float((chosen - rejected).mean()),
        "margin_tokens_quartiles": [float(q) for q in np.percentile(chosen - rejected, [25, 50, 75])],
        "chosen_longer_share": float((chosen > rejected).mean()),
        "equal_length_share": float((chosen == rejected).mean()),
    }


def special_tokens(openings, answers: dict, tokenizer) -> dict:
    """Leading BOS tokens per sequence, and the share of answers that end with an end-of-turn or EOS token.

    Args:
        openings: token ids of what opens each sequence.
        answers: `{name: token ids of each answer}`.

    Raises:
        UserError: where a sequence opens with two BOS tokens.
    """
    bos = tokenizer.bos_token_id
    leading = [next((i for i, t in enumerate(ids) if t != bos), len(ids)) for ids in openings]
    if max(leading) > 1:
        raise UserError(f"{max(leading)} BOS tokens open a prompt: template and text both add one")
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        from preflab.data.chat_template import ChatRenderer

        ends |= ChatRenderer(tokenizer).end_ids()
    ended = {name: np.mean([any(t in ends for t in ids[-3:]) for ids in rows]) for name, rows in answers.items()}
    return {
        "bos_token": tokenizer.bos_token,
        "end_tokens": sorted(tokenizer.convert_ids_to_tokens(sorted(ends - {None}))),
        "leading_bos_min": int(min(leading)),
        "leading_bos_max": int(max(leading)),
        **{f"{name}_with_end_token": float(share) for name, share in ended.items()},
    }


def first_pair(dataset, tokenizer) -> dict:
    """The first pair decoded, with its loss mask: what is only read, and what is scored."""
    row = dataset[0]
    return {
        "prompt_not_scored": tokenizer.decode(row["prompt_ids"]),
        "chosen_scored": tokenizer.decode(row["chosen_ids"]),
        "rejected_scored": tokenizer.decode(row["rejected_ids"]),
        "tokens": {k: len(row[f"{k}_ids"]) for k in ("prompt", "chosen", "rejected")},
    }


def plan(args, rows: int, an_epoch: dict, world_size: int) -> dict:
    """Steps, rows and tokens that training will see, as transformers' Trainer counts them.

    Args:
        rows: rows of the train split, as the trainer takes them.
        an_epoch: `{name: tokens in an epoch}`; each is told for the whole run.
    """
    per_device = -(-rows // world_size)
    micro = -(-per_device // args.per_device_train_batch_size)
    steps_per_epoch = max(-(-micro // args.gradient_accumulation_steps), 1)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps_per_epoch)
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size
    epochs, rest = divmod(steps, steps_per_epoch)
    seen = epochs * rows + min(rest * batch, rows)
    return {
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "epochs": round(steps / steps_per_epoch, 3),
        "global_batch_size": batch,
        "batch": {
            "per_device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "processes": world_size,
        },
        "rows_seen": seen,
        **{name: round(seen * tokens / rows) for name, tokens in an_epoch.items()},
    }


def dropout_that_runs(args, model_args) -> str:
    """The dropout that training really uses: TRL's disable_dropout makes lora_dropout 0 without a word."""
    if not getattr(args, "disable_dropout", False):
        return f"{model_args.lora_dropout:g} (lora_dropout)" if model_args.use_peft else "as the model's config has it"
    if model_args.use_peft and model_args.lora_dropout:
        return f"0 (lora_dropout {model_args.lora_dropout} is switched off by disable_dropout: true)"
    return "0"


def step0_margins(trainer, pairs: int) -> tuple[dict, float | None]:
    """The largest reward and margin before the first step, over a few train pairs, and the seconds a pair took.

    A sharded model exists only inside training: there the trainer checks the first micro-batch.
    """
    from preflab.evaluation.rewards import reward_rows
    from preflab.training.dpo_trainer import step0_tolerance

    found = {"largest_margin": None, "largest_reward": None, "pairs": 0, "tolerance": step0_tolerance(trainer.args)}
    if trainer.is_sharded:
        return {**found, "checked": "will be checked on the first micro-batch: a sharded model exists only there"}, None
    world = trainer.accelerator.num_processes
    count = min(pairs, 4 * world)
    started = time.monotonic()
    rows = reward_rows(trainer.score(trainer.train_dataset, range(count)), trainer.args.beta)
    seconds = (time.monotonic() - started) / -(-count // world)
    return {
        **found,
        "largest_margin": max(abs(row["margin"]) for row in rows),
        "largest_reward": max(abs(row[f"reward_{side}"]) for row in rows for side in ("chosen", "rejected")),
        "pairs": count,
        "checked": "before training",
    }, seconds


def run_preflight(trainer, args, model_args, train, train_ids, test, truncation, notes) -> dict:
    """The whole preflight of a preference run, as preflight.json holds it.

    Args:
        train, test: PreferenceData of the splits (test may be None).
        train_ids, truncation: from `preflab.data.preferences.tokenize`.

    Raises:
        UserError: where a prompt opens with two BOS tokens.
    """
    tokens = token_counts(train_ids)
    answers = {side: train_ids[f"{side}_ids"] for side in ("chosen", "rejected")}
    special = special_tokens(train_ids["prompt_ids"], answers, trainer.processing_class)
    step0, seconds = step0_margins(trainer, len(train_ids))
    an_epoch = {"tokens_seen": tokens["tokens_per_epoch"], "tokens_stored_once": tokens["tokens_stored_once"]}
    steps = plan(args, len(train_ids), an_epoch, trainer.accelerator.num_processes)
    cached = args.precompute_ref_log_probs
    # Policy and reference were timed together; full fine-tuning keeps the reference beside the policy.
    forward = None if seconds is None else seconds / (2 - cached)
    beside = not (cached or hasattr(trainer.model, "peft_config"))
    return {
        "first_pair": first_pair(train_ids, trainer.processing_class),
        "special_tokens": special,
        "train": train.summary(),
        "test": test.summary() if test else None,
        "tokens": tokens,
        "truncation": truncation,
        "parameters": trainable(trainer.model),
        "precision": args.precision,
        "dropout": dropout_that_runs(args, model_args),
        "padded_because": trainer.padded_because,
        "gradient_checkpointing": args.gradient_checkpointing,
        "plan": steps,
        "estimate": estimate(args, trainer.model, steps, forward, 3 + (not cached), tokens["longest_sequence"], beside),
        "step0": step0,
        "notes": notes,
    }


def trainable(model) -> dict:
    """Parameters in all and those trained."""
    numel = [(p.requires_grad, p.ds_numel if hasattr(p, "ds_numel") else p.numel()) for p in model.parameters()]
    return {"trainable": sum(n for on, n in numel if on), "total": sum(n for _, n in numel)}


def estimate(args, model, plan_: dict, forward: float | None, forwards: int, longest: int, reference_beside: bool):
    """A rough estimate of time and memory (preflab.training.memory), to be read as an order of magnitude.

    Args:
        forward: seconds that one forward of one row was timed to take; None leaves the time out.
        forwards: what a row's step costs, in forwards (a backward counts as two); checkpointing adds one.
        longest: tokens of the longest sequence.
    """
    memory = needed(model, args, trainable(model)["trainable"], longest, reference_beside)
    found = {"memory_gib": round(memory.total(args.gradient_checkpointing) / 2**30, 2)}
    if forward is not None:
        per_process = plan_["rows_seen"] / plan_["batch"]["processes"]
        found["minutes"] = round(per_process * forward * (forwards + bool(args.gradient_checkpointing)) / 60, 1)
    return found


def short(text: str, end: bool = False) -> str:
    """`text` on one line, its start or its end where it is long."""
    text = text.replace("\n", "⏎")
    return text if len(text) <= 300 else ("… " + text[-300:] if end else text[:300] + " …")


def drops(split: dict) -> str:
    """What the filters left out of a split, from its summary."""
    count = split["pairs"] if "pairs" in split else split["conversations"]
    # Beyond --limit, or held out.
    rest = split["rows"] - count - sum(split["dropped"].values())
    found = [f"{k} {v}" for k, v in split["dropped"].items()]
    text = ", ".join(found) or "nothing"
    return f"{text} ({rest} set aside)" if rest > 0 else text


def run_lines(flight: dict, unit: str) -> list[str]:
    """The report's lines on model and plan. `unit`: what a step counts, in the plural."""
    steps = flight["plan"]
    batch = steps["batch"]
    return [
        f"  model     {flight['parameters']['trainable']:,} of {flight['parameters']['total']:,} parameters trained,"
        f" {flight['precision']}, dropout {flight['dropout']}",
        f"  plan      {steps['steps']} steps ({steps['epochs']} epochs) of {steps['global_batch_size']} {unit}"
        f" ({batch['per_device']} a process × {batch['accumulation']} accumulation × {batch['processes']} processes),"
        f" about {steps['tokens_seen']:,} tokens",
    ]


def estimate_line(flight: dict) -> str:
    """The report's line on time and memory."""
    found = flight["estimate"]
    return f"  estimate  {found.get('minutes', '?')} minutes, {found['memory_gib']} GiB (rough)"


CHECKPOINTED = ", activations computed twice (gradient checkpointing)"


def report(flight: dict) -> str:
    """The preflight of a preference run as a person reads it."""
    train, tokens, special, pair = (flight[k] for k in ("train", "tokens", "special_tokens", "first_pair"))
    cut, margin = flight["truncation"], flight["step0"]

    def share(part):
        return f"{cut.get(f'truncated_{part}', 0) / train['pairs']:.1%}"

    size, test, why = pair["tokens"], flight["test"], flight["padded_because"]
    held_out = f"{test['pairs']} test pairs; dropped: {drops(test)}" if test else "no test split"
    lines = [
        "preflight",
        f"  prompt    {size['prompt']:>4} tokens, not scored | {short(pair['prompt_not_scored'], end=True)}",
        f"  chosen    {size['chosen']:>4} tokens, scored     | {short(pair['chosen_scored'])}",
        f"  rejected  {size['rejected']:>4} tokens, scored     | {short(pair['rejected_scored'])}",
        f"  data      {train['rows']} rows, {train['pairs']} train pairs; dropped: {drops(train)}; {held_out}",
        f"  lengths   chosen {tokens['chosen_tokens_mean']:.0f}, rejected {tokens['rejected_tokens_mean']:.0f}"
        f" tokens on average; chosen longer in {tokens['chosen_longer_share']:.1%} of pairs",
        f"  cut       prompt {share('prompt')}, chosen {share('chosen')}, rejected {share('rejected')} of pairs; end"
        f" token kept in {special['chosen_with_end_token']:.1%} of chosen, {special['rejected_with_end_token']:.1%} of"
        " rejected",
        f"  special   leading BOS {special['leading_bos_min']} to {special['leading_bos_max']}"
        f" ({special['bos_token']}), end {' '.join(special['end_tokens'])}",
        *run_lines(flight, "pairs"),
        f"  compute   {'each prompt once, without padding' if why is None else f'padded pairs, as stock: {why}'}"
        + (CHECKPOINTED if flight["gradient_checkpointing"] else ""),
        estimate_line(flight),
    ]
    if margin["largest_margin"] is not None:
        lines.append(
            f"  step 0    largest reward margin {margin['largest_margin']:.2g} over {margin['pairs']} pairs (must be 0"
            f" within {margin['tolerance']:g})"
        )
    else:
        lines.append(f"  step 0    {margin['checked']}")
    return "\n".join(lines + [f"  note      {note}" for note in flight["notes"]])
