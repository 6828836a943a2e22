"""The preflight: everything about a training run that can be checked before its first step, for pairs and for SFT.

`run_preflight` gives what all objectives share; `describe_pairs` and `describe_conversations` what differs.
"""

import math
from dataclasses import dataclass

import numpy as np

from preflab.data import reading_report
from preflab.data.chat_template import ChatRenderer
from preflab.data.messages import transcript
from preflab.data.tokenised_rows import count_other_than, ends_of, lengths
from preflab.evaluation.rewards import reward_rows
from preflab.training.estimate import Speed, Work, estimate_text, estimated_minutes, measure_speed
from preflab.training.memory import needed
from preflab.training.order import reached_rows
from preflab.training.preflight_checks import check_flight, repetition, tokenised
from preflab.training.preflight_text import decoded_conversation, decoded_pair, dropped_rows, excerpt, wrapped
from preflab.training.step0 import step0_tolerance
from utils.errors import UserError

# Rows per process that are scored before training, for the figures of step 0.
CHECKED_ROWS = 4
# Ids that are searched: for BOS tokens at the start of a sequence, for the end of a turn at its end (some templates put
# a newline after it).
FIRST_IDS, LAST_IDS = 8, 3
CHECKPOINTED = ", activations computed twice (gradient checkpointing)"


@dataclass
class RowFacts:
    """What the preflight of one objective says about its rows, beside what all objectives share.

    Attributes:
        sections: named sections of preflight.json.
        tokens_per_epoch: {name of the plan's figure: tokens of one epoch}.
        rows: rows that the trainer iterates over (a packed row counts once).
        longest: tokens of the longest sequence.
        speed: measured seconds per token; None for a sharded model.
        work: what the run computes after the preflight.
        unit: what a step counts, in the plural.
        lines: printed lines about the rows.
        compute: printed description of how a batch is computed.
        step0_lines: printed lines about step 0.
        repetition: how often prompts and rows occur (`preflight_checks.repetition`).
    """

    sections: dict
    tokens_per_epoch: dict[str, int]
    rows: int
    longest: int
    speed: Speed | None
    work: Work
    unit: str
    lines: list[str]
    compute: str
    step0_lines: list[str]
    repetition: dict


def run_preflight(describe_rows, trainer, splits, args: list, notes: list[str]) -> tuple[dict, str]:
    """Check and describe a run before its first step.

    Args:
        describe_rows: `describe_pairs` or `describe_conversations`.
        args: the run's data arguments, its RunConfig and TRL's ModelConfig.
        notes: sentences to be shown with it.

    Returns:
        (flight, text): the content of preflight.json, and the printed report.

    Raises:
        UserError: a sequence starts with two BOS tokens.
    """
    data_args, config, model_args = args
    facts = describe_rows(trainer, splits, data_args, config)
    plan = plan_training(config, facts.rows, facts.tokens_per_epoch, trainer.accelerator.num_processes)
    parameters = count_parameters(trainer.model)
    beside = config.keeps_reference_model(model_args.use_peft)
    memory = needed(trainer.model, config, parameters["trainable"], facts.longest, beside)
    flight = {
        **facts.sections,
        **splits.summary,
        "truncation": splits.truncation,
        "parameters": parameters,
        "precision": config.precision,
        "dropout": effective_dropout(config, model_args),
        "gradient_checkpointing": config.gradient_checkpointing,
        "plan": plan,
        "estimate": {
            "memory_gib": round(memory.total(config.gradient_checkpointing) / 2**30, 2),
            **estimated_minutes(facts.work, facts.speed, plan, config, facts.rows),
        },
        "repetition": facts.repetition,
        "notes": notes,
    }
    flight |= check_flight(flight, config, model_args, trial=data_args.limit is not None)
    return flight, report(flight, facts)


def report(flight: dict, facts: RowFacts) -> str:
    """The preflight as printed text, in lines that fit the terminal and have at most 100 columns."""
    plan, special, estimate = flight["plan"], flight["special_tokens"], flight["estimate"]
    batch = plan["batch"]
    lines = [
        "preflight",
        *facts.lines,
        f"  special   {leading_bos(special)}; an answer ends with {' or '.join(special['end_tokens'])}",
        f"  model     {flight['parameters']['trainable']:,} of {flight['parameters']['total']:,} parameters trained,"
        f" {flight['precision']}, dropout {flight['dropout']}",
        f"  plan      {plan['steps']} steps ({plan['epochs']} epochs) of {plan['global_batch_size']} {facts.unit}"
        f" ({batch['per_device']} per process × {batch['accumulation']} accumulation × {batch['processes']}"
        f" processes), about {plan['tokens_seen']:,} tokens",
        f"  compute   {facts.compute}{CHECKPOINTED if flight['gradient_checkpointing'] else ''}",
        f"  estimate  {estimate_text(estimate)}",
        *facts.step0_lines,
        *(f"  note      {note}" for note in flight["notes"]),
        *(f"  warning   {warning}" for warning in flight["warning"]),
        *(f"  fatal     {fatal}" for fatal in flight["fatal"]),
    ]
    return "\n".join(wrapped(line) for line in lines)


# ------------------------------------------------------------------------------------------------- preference pairs


def describe_pairs(trainer, splits, data_args, config) -> RowFacts:
    """Facts about preference pairs: the first one decoded, lengths, special tokens, margins before the first step."""
    dataset, tokenizer = splits.train_ids, trainer.processing_class
    tokens = pair_tokens(dataset)
    answers = {side: ends_of(dataset, f"{side}_ids", last=LAST_IDS) for side in ("chosen", "rejected")}
    special = special_tokens(ends_of(dataset, "prompt_ids", first=FIRST_IDS), answers, tokenizer)
    step0 = step0_margins(trainer, len(dataset))
    pair = decoded_pair(dataset, tokenizer)
    padded_because, cached = trainer.padded_because, trainer.uncached_reference_because is None
    row_tokens = tokens_of_pairs(dataset, shared_prompt=padded_because is None)
    test_tokens = sum(tokens_of_pairs(splits.test_ids, padded_because is None)) if splits.test else 0
    return RowFacts(
        sections={
            "first_pair": pair,
            "special_tokens": special,
            "tokens": tokens,
            "padded_because": padded_because,
            "step0": step0,
        },
        tokens_per_epoch={
            "tokens_seen": tokens["tokens_per_epoch"],
            "tokens_stored_once": tokens["tokens_stored_once"],
        },
        rows=len(dataset),
        longest=tokens["longest_sequence"],
        speed=measure_speed(trainer, row_tokens),
        work=Work(
            epoch_tokens=sum(row_tokens),
            once_tokens=reference_tokens(trainer, row_tokens, test_tokens) if cached else {},
            # Where the reference is not cached, its forward comes on top of the policy's.
            held_out_tokens=test_tokens * (2 - cached),
            sampling_models=2 if splits.test and any(pair.messages for pair in splits.test.pairs) else 0,
        ),
        unit="pairs",
        lines=pair_lines(pair, tokens, special, splits),
        compute="each prompt once, without padding" if padded_because is None else f"padded pairs: {padded_because}",
        step0_lines=[step0_line(step0)],
        repetition=repetition(
            (pair.prompt_key for pair in splits.train.pairs),
            ((pair.prompt_text, pair.chosen, pair.rejected) for pair in splits.train.pairs),
        ),
    )


def reference_tokens(trainer, row_tokens: list[int], test_tokens: int) -> dict[str, int]:
    """Tokens of the reference's forwards: of the train pairs that the steps reach, and of the test pairs."""
    plan = plan_training(trainer.args, len(row_tokens), {}, trainer.accelerator.num_processes)
    rows = reached_rows(trainer, plan)
    return {"reference": sum(row_tokens[i] for i in rows), "reference of test pairs": test_tokens}


def pair_tokens(dataset) -> dict:
    """Token lengths of a tokenised split of pairs: totals, means, margins of chosen over rejected."""
    prompt, chosen, rejected = (lengths(dataset, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return {
        "pairs": len(dataset),
        "prompt_tokens_mean": float(prompt.mean()),
        "chosen_tokens_mean": float(chosen.mean()),
        "rejected_tokens_mean": float(rejected.mean()),
        # A sequence is a prompt with one answer, so the longer answer counts.
        "longest_sequence": int((prompt + np.maximum(chosen, rejected)).max()),
        # Padded, the prompt is computed with each answer; packed, once per pair.
        "tokens_per_epoch": int((2 * prompt + chosen + rejected).sum()),
        "tokens_stored_once": int((prompt + chosen + rejected).sum()),
        "margin_tokens_mean": float((chosen - rejected).mean()),
        "margin_tokens_quartiles": [float(q) for q in np.percentile(chosen - rejected, [25, 50, 75])],
        "chosen_longer_share": float((chosen > rejected).mean()),
        "equal_length_share": float((chosen == rejected).mean()),
    }


def tokens_of_pairs(dataset, shared_prompt: bool) -> list[int]:
    """Tokens that a forward computes for each pair; a prompt that is not shared counts with each answer."""
    prompt, chosen, rejected = (lengths(dataset, key) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))
    return ((1 if shared_prompt else 2) * prompt + chosen + rejected).tolist()


def step0_margins(trainer, pairs: int) -> dict:
    """The largest |reward| and |margin| before the first step, over a few train pairs.

    A sharded model exists only inside training: there the trainer checks the first micro-batch.
    """
    step0 = {"largest_margin": None, "largest_reward": None, "pairs": 0, "tolerance": step0_tolerance(trainer.args)}
    if trainer.is_sharded:
        later = "will be checked on the first micro-batch: a sharded model exists only there"
        return {**step0, "checked": later}
    count = min(pairs, CHECKED_ROWS * trainer.accelerator.num_processes)
    rows = reward_rows(trainer.score(trainer.train_dataset, range(count)), trainer.args.beta)
    return {
        **step0,
        "largest_margin": max(abs(row["margin"]) for row in rows),
        "largest_reward": max(abs(row[f"reward_{side}"]) for row in rows for side in ("chosen", "rejected")),
        "pairs": count,
        "checked": "before training",
    }


def pair_lines(pair: dict, tokens: dict, special: dict, splits) -> list[str]:
    """Printed lines about the pairs of a run."""
    train, test = splits.summary["train"], splits.summary["test"]

    def truncated(part):
        return f"{splits.truncation.get(f'truncated_{part}', 0) / tokenised(train):.1%}"

    size = pair["tokens"]
    held_out = f"{test['pairs']} test pairs; dropped: {dropped_rows(test)}" if test else "no test split"
    return [
        f"  prompt    {size['prompt']:>4} tokens, not scored | {excerpt(pair['prompt_not_scored'], end=True)}",
        f"  chosen    {size['chosen']:>4} tokens, scored     | {excerpt(pair['chosen_scored'])}",
        f"  rejected  {size['rejected']:>4} tokens, scored     | {excerpt(pair['rejected_scored'])}",
        *reading_report.pair_lines(train, splits.truncation),
        f"  data      {train['rows']} rows, {train['pairs']} train pairs; dropped: {dropped_rows(train)}; {held_out}",
        f"  lengths   chosen {tokens['chosen_tokens_mean']:.0f}, rejected {tokens['rejected_tokens_mean']:.0f}"
        f" tokens on average; chosen longer in {tokens['chosen_longer_share']:.1%} of pairs",
        f"  truncated prompt {truncated('prompt')}, chosen {truncated('chosen')}, rejected {truncated('rejected')} of"
        f" pairs; end token kept in {special['chosen_with_end_token']:.1%} of chosen,"
        f" {special['rejected_with_end_token']:.1%} of rejected",
    ]


def step0_line(step0: dict) -> str:
    """The printed line about the margins before the first step."""
    if step0["largest_margin"] is None:
        return f"  step 0    {step0['checked']}"
    return (
        f"  step 0    largest reward margin {step0['largest_margin']:.2g} over {step0['pairs']} pairs (must be 0"
        f" within {step0['tolerance']:g})"
    )


# ---------------------------------------------------------------------------------------------------- conversations


def describe_conversations(trainer, splits, data_args, config) -> RowFacts:
    """Facts about SFT conversations: the first one decoded, lengths, packing, and the loss before the first step."""
    dataset, tokenizer = splits.train_ids, trainer.processing_class
    tokens, rows = conversation_tokens(dataset), len(trainer.train_dataset)
    answers = {"conversations": ends_of(dataset, "input_ids", last=LAST_IDS)}
    special = special_tokens(ends_of(dataset, "input_ids", first=FIRST_IDS), answers, tokenizer)
    step0 = step0_loss(trainer, dataset)
    test_tokens = int(lengths(splits.test_ids, "input_ids").sum()) if splits.test else 0
    pieces = decoded_conversation(dataset, tokenizer)
    packing = None
    if config.packing:
        packing = {"rows": rows, "filled": tokens["tokens_per_epoch"] / (rows * config.max_length)}
    return RowFacts(
        sections={
            "first_conversation": pieces,
            "special_tokens": special,
            "tokens": tokens,
            "packing": packing,
            "step0": step0,
        },
        tokens_per_epoch={
            "tokens_seen": tokens["tokens_per_epoch"],
            "trained_tokens_seen": tokens["trained_tokens_per_epoch"],
        },
        rows=rows,
        longest=tokens["longest_sequence"],
        speed=measure_speed(trainer, lengths(trainer.train_dataset, "input_ids").tolist()),
        work=Work(
            epoch_tokens=tokens["tokens_per_epoch"],
            once_tokens={"base on held-out rows": test_tokens} if test_tokens else {},
            held_out_tokens=test_tokens,
            sampling_models=(1 + hasattr(trainer.model, "peft_config")) if splits.test else 0,
        ),
        unit="packed rows" if packing else "conversations",
        lines=conversation_lines(pieces, tokens, special, splits, data_args.loss_on),
        compute=f"{packing['rows']} packed rows, {packing['filled']:.0%} filled" if packing else "padded rows",
        step0_lines=[f"  step 0    loss {step0['loss']:.3f} nats per token over {step0['conversations']} conversations"]
        if step0
        else [],
        repetition=repetition(
            (conversation.prompt_key for conversation in splits.train.conversations),
            (transcript(conversation.turns) for conversation in splits.train.conversations),
        ),
    )


def conversation_tokens(dataset) -> dict:
    """Token lengths of a tokenised split of conversations, and how many tokens are trained on."""
    tokens = lengths(dataset, "input_ids")
    return {
        "conversations": len(dataset),
        "tokens_mean": float(tokens.mean()),
        "longest_sequence": int(tokens.max()),
        "tokens_per_epoch": int(tokens.sum()),
        # -100 marks tokens without a loss (the index that PyTorch's cross-entropy ignores).
        "trained_tokens_per_epoch": count_other_than(dataset, "labels", -100),
    }


def step0_loss(trainer, dataset) -> dict | None:
    """The mean loss per trained token before the first step, over a few conversations.

    None for a sharded model, which exists only inside training.
    """
    if trainer.is_sharded:
        return None
    sample = range(min(len(dataset), CHECKED_ROWS * trainer.accelerator.num_processes))
    # Sums over the labelled tokens of each conversation, in nats.
    nll = trainer.score(dataset, sample)
    # The first token has no prediction.
    scored = sum(sum(label != -100 for label in dataset[i]["labels"][1:]) for i in sample)
    return {"loss": sum(nll) / scored, "conversations": len(sample)}


def conversation_lines(pieces: list[dict], tokens: dict, special: dict, splits, loss_on: str) -> list[str]:
    """Printed lines about the conversations of a run."""
    train, test = splits.summary["train"], splits.summary["test"]
    held_out = f"{test['conversations']} test conversations; dropped: {dropped_rows(test)}" if test else "no test split"
    share = tokens["trained_tokens_per_epoch"] / tokens["tokens_per_epoch"]
    return [
        *(
            f"  {'trained on' if p['trained_on'] else 'read only '} {p['tokens']:>4} tokens |"
            f" {excerpt(p['text'], end=not p['trained_on'])}"
            for p in pieces[:4]
        ),
        *reading_report.conversation_lines(train, splits.truncation, share),
        f"  data      {train['rows']} rows, {train['conversations']} train conversations; dropped:"
        f" {dropped_rows(train)}; {held_out}",
        f"  lengths   {tokens['tokens_mean']:.0f} tokens on average, {tokens['longest_sequence']} at most; {share:.1%}"
        f" of them trained on ({loss_on})",
        f"  truncated {splits.truncation.get('truncated', 0) / tokenised(train):.1%} of conversations; end"
        f" token kept in {special['conversations_with_end_token']:.1%}",
    ]


# ----------------------------------------------------------------------------------------------------------- shared


def special_tokens(sequences, answers: dict, tokenizer) -> dict:
    """Leading BOS tokens per sequence, and the share of answers that end with an end-of-turn or EOS token.

    Args:
        sequences: the first token ids of each sequence.
        answers: {name: the last token ids of each answer}.

    Raises:
        UserError: most sequences start with two BOS tokens. A few, whose text spells it, are counted.
    """
    bos = tokenizer.bos_token_id
    # Number of BOS tokens before the first other token.
    leading = [next((i for i, t in enumerate(ids) if t != bos), len(ids)) for ids in sequences]
    doubled = sum(count > 1 for count in leading)
    if 2 * doubled > len(leading):
        raise UserError(
            f"{doubled} of {len(leading)} sequences start with {max(leading)} BOS tokens ({tokenizer.bos_token}): the"
            " chat template writes it more than once; correct the template with --chat_template_path FILE"
        )
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends |= ChatRenderer(tokenizer).end_ids()
    ended = {name: np.mean([any(t in ends for t in ids[-LAST_IDS:]) for ids in rows]) for name, rows in answers.items()}
    return {
        "bos_token": tokenizer.bos_token,
        "end_tokens": sorted(tokenizer.convert_ids_to_tokens(sorted(ends - {None}))),
        "leading_bos_min": int(min(leading)),
        "leading_bos_max": int(max(leading)),
        "more_than_one_bos": doubled,
        **{f"{name}_with_end_token": float(share) for name, share in ended.items()},
    }


def leading_bos(special: dict) -> str:
    """How the sequences of a run begin, in words. `special`: from `special_tokens`."""
    if special["bos_token"] is None:
        return "the tokenizer has no BOS token"
    counts = special["leading_bos_min"], special["leading_bos_max"]
    which = {(0, 0): "no sequence starts", (1, 1): "every sequence starts"}.get(counts, "some sequences start")
    twice = f" ({special['more_than_one_bos']} with more than one)" if special["more_than_one_bos"] else ""
    return f"{which} with the BOS token {special['bos_token']}{twice}"


def plan_training(config, rows: int, tokens_per_epoch: dict[str, int], world_size: int) -> dict:
    """Steps, rows and tokens of the entire training, counted as transformers' Trainer counts them.

    Args:
        rows: rows of the train split, as the trainer takes them.
        tokens_per_epoch: {name: tokens of one epoch}; the plan has each for the entire training.
    """
    # The sampler pads the last batch, so every process gets equally many rows.
    per_device = -(-rows // world_size)
    micro_batches = -(-per_device // config.per_device_train_batch_size)
    # The last step of an epoch may have fewer micro-batches than the accumulation; it counts as a step.
    steps_per_epoch = max(-(-micro_batches // config.gradient_accumulation_steps), 1)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    global_batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size
    epochs, rest = divmod(steps, steps_per_epoch)
    # A partial epoch sees at most all rows: the last batch of an epoch may be smaller than a global batch.
    seen = epochs * rows + min(rest * global_batch, rows)
    return {
        "steps": steps,
        "steps_per_epoch": steps_per_epoch,
        "epochs": round(steps / steps_per_epoch, 3),
        "global_batch_size": global_batch,
        "batch": {
            "per_device": config.per_device_train_batch_size,
            "accumulation": config.gradient_accumulation_steps,
            "processes": world_size,
        },
        "rows_seen": seen,
        **{name: round(seen * tokens / rows) for name, tokens in tokens_per_epoch.items()},
    }


def count_parameters(model) -> dict:
    """The number of all and of the trained parameters."""
    # DeepSpeed ZeRO-3 keeps the size of a sharded parameter in ds_numel.
    numel = [(p.requires_grad, p.ds_numel if hasattr(p, "ds_numel") else p.numel()) for p in model.parameters()]
    return {"trainable": sum(n for trained, n in numel if trained), "total": sum(n for _, n in numel)}


def effective_dropout(config, model_args) -> str:
    """The dropout that training uses: TRL's disable_dropout sets lora_dropout to 0 without a message."""
    if not getattr(config, "disable_dropout", False):
        return f"{model_args.lora_dropout:g} (lora_dropout)" if model_args.use_peft else "as in the model's config"
    if model_args.use_peft and model_args.lora_dropout:
        return f"0 (lora_dropout {model_args.lora_dropout} is switched off by disable_dropout: true)"
    return "0"
