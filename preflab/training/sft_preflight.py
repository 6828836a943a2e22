"""The preflight of an instruction run: what can be known, and be wrong, before its first step."""

import time

import numpy as np

from preflab.training.preflight import (
    CHECKPOINTED,
    dropout_that_runs,
    drops,
    estimate,
    estimate_line,
    plan,
    run_lines,
    short,
    special_tokens,
    trainable,
)
from preflab.training.sft_trainer import longest_row

TIMED = 4


def token_counts(dataset) -> dict:
    """Token lengths of a tokenised split, and how many tokens are trained on."""
    lengths = np.array([len(ids) for ids in dataset["input_ids"]])
    trained = np.array([sum(label != -100 for label in labels) for labels in dataset["labels"]])
    return {
        "conversations": len(dataset),
        "tokens_mean": float(lengths.mean()),
        "longest_sequence": int(lengths.max()),
        "tokens_per_epoch": int(lengths.sum()),
        "trained_tokens_per_epoch": int(trained.sum()),
    }


def first_row(dataset, tokenizer) -> list[dict]:
    """The first conversation decoded, piece by piece, each with whether it is trained on."""
    row, pieces = dataset[0], []
    for token, label in zip(row["input_ids"], row["labels"], strict=True):
        if not pieces or pieces[-1]["trained_on"] != (label != -100):
            pieces.append({"trained_on": label != -100, "ids": []})
        pieces[-1]["ids"].append(token)
    return [
        {"trained_on": p["trained_on"], "tokens": len(p["ids"]), "text": tokenizer.decode(p["ids"])} for p in pieces
    ]


def last_answers(dataset) -> list[list[int]]:
    """The tokens that end each conversation."""
    return [ids[-3:] for ids in dataset["input_ids"]]


def run_preflight(trainer, args, model_args, train, train_ids, test, counts, notes) -> dict:
    """The whole preflight, as preflight.json holds it.

    Args:
        train, test: ConversationData of the splits (test may be None).
        train_ids, counts: from `preflab.data.conversations.tokenize`.

    Raises:
        UserError: where a conversation opens with two BOS tokens.
    """
    tokens, world = token_counts(train_ids), trainer.accelerator.num_processes
    rows, ends = len(trainer.train_dataset), {"conversations": last_answers(train_ids)}
    special = special_tokens(train_ids["input_ids"], ends, trainer.processing_class)
    an_epoch = {"tokens_seen": tokens["tokens_per_epoch"], "trained_tokens_seen": tokens["trained_tokens_per_epoch"]}
    steps, forward, step0 = plan(args, rows, an_epoch, world), None, None
    if not trainer.is_sharded:
        some, started = range(min(len(train_ids), TIMED * world)), time.monotonic()
        nll = trainer.score(train_ids, some)
        seconds = (time.monotonic() - started) / -(-len(some) // world)
        # A packed row holds several conversations.
        forward = seconds * len(train_ids) / rows
        scored = sum(sum(label != -100 for label in train_ids[i]["labels"][1:]) for i in some)
        step0 = {"loss": sum(nll) / scored, "conversations": len(some)}
    return {
        "first_conversation": first_row(train_ids, trainer.processing_class),
        "special_tokens": special,
        "train": train.summary(),
        "test": test.summary() if test else None,
        "tokens": tokens,
        "truncation": counts,
        "packing": {"rows": rows, "filled": tokens["tokens_per_epoch"] / (rows * args.max_length)}
        if args.packing
        else None,
        "parameters": trainable(trainer.model),
        "precision": args.precision,
        "dropout": dropout_that_runs(args, model_args),
        "gradient_checkpointing": args.gradient_checkpointing,
        "plan": steps,
        "estimate": estimate(args, trainer.model, steps, forward, 3, longest_row(train_ids), False),
        "step0": step0,
        "notes": notes,
    }


def report(flight: dict, loss_on: str) -> str:
    """The preflight as a person reads it."""
    train, tokens, special, test = (flight[k] for k in ("train", "tokens", "special_tokens", "test"))
    pieces = [
        f"  {'trained on' if p['trained_on'] else 'read only '} {p['tokens']:>4} tokens |"
        f" {short(p['text'], end=not p['trained_on'])}"
        for p in flight["first_conversation"][:4]
    ]
    held_out = f"{test['conversations']} test conversations; dropped: {drops(test)}" if test else "no test split"
    share = tokens["trained_tokens_per_epoch"] / tokens["tokens_per_epoch"]
    packed = flight["packing"]
    lines = [
        "preflight",
        *pieces,
        f"  data      {train['rows']} rows, {train['conversations']} train conversations; dropped: {drops(train)};"
        f" {held_out}",
        f"  lengths   {tokens['tokens_mean']:.0f} tokens on average, {tokens['longest_sequence']} at most; {share:.1%}"
        f" of them trained on ({loss_on})",
        f"  cut       {flight['truncation'].get('truncated', 0) / train['conversations']:.1%} of conversations; end"
        f" token kept in {special['conversations_with_end_token']:.1%}",
        f"  special   leading BOS {special['leading_bos_min']} to {special['leading_bos_max']}"
        f" ({special['bos_token']}), end {' '.join(special['end_tokens'])}",
        *run_lines(flight, "packed rows" if packed else "conversations"),
        "  compute   "
        + (f"{packed['rows']} packed rows, {packed['filled']:.0%} filled" if packed else "padded rows")
        + (CHECKPOINTED if flight["gradient_checkpointing"] else ""),
        estimate_line(flight),
    ]
    if flight["step0"]:
        lines.append(
            f"  step 0    loss {flight['step0']['loss']:.3f} nats a token over {flight['step0']['conversations']}"
            " conversations"
        )
    return "\n".join(lines + [f"  note      {note}" for note in flight["notes"]])
