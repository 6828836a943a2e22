"""The preflight: everything about a training run that can be checked before its first step, for pairs and for SFT.

`run_preflight` gives what all objectives share; `describe_pairs` and `describe_conversations` what differs.
"""

from collections.abc import Callable
from dataclasses import dataclass

from preflab.data import reading_report
from preflab.data.messages import transcript
from preflab.data.tokenised_rows import lengths
from preflab.training.estimate import Speed, Work, estimate_text, estimated_minutes, speed_of
from preflab.training.memory_parts import Weights
from preflab.training.plan import plan_training, reached_rows
from preflab.training.preflight_checks import check_flight, repetition, tokenised
from preflab.training.preflight_text import decoded_conversation, decoded_pair, dropped_rows, excerpt, wrapped
from preflab.training.sharding import Shards
from preflab.training.step0 import (
    step0_line,
    step0_loss,
    step0_margins,
    step0_reward_model,
    step0_reward_model_line,
    step0_rewards,
)
from preflab.training.token_figures import (
    conversation_tokens,
    leading_bos,
    list_figures,
    pair_lengths,
    pair_tokens,
    special_tokens,
    tokens_of_rows,
)

CHECKPOINTED = ", activations computed twice (gradient checkpointing)"


@dataclass
class RowFacts:
    """What the preflight of one objective says about its rows, beside what all objectives share.

    Attributes:
        sections: named sections of preflight.json.
        tokens_per_epoch: {name of the plan's figure: tokens of one epoch}.
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
    # A packed row counts once.
    rows = len(trainer.train_dataset)
    plan = plan_training(config, rows, trainer.accelerator.num_processes)
    facts = describe_rows(trainer, splits, data_args, config, plan)
    plan |= {name: round(plan["rows_seen"] * tokens / rows) for name, tokens in facts.tokens_per_epoch.items()}
    parameters = count_parameters(trainer.model)
    memory = config.memory(
        Weights.of(trainer.model.config, config, model_args),
        config.largest_row(splits.train_ids),
        facts.longest,
        checkpointing=bool(config.gradient_checkpointing),
        shards=Shards.of_run(config),
    )
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
            "memory_gib": round(memory.total / 2**30, 2),
            "memory_is_rough": not memory.exact,
            **estimated_minutes(facts.work, facts.speed, plan, config, rows),
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


def describe_pairs(trainer, splits, data_args, config, plan: dict) -> RowFacts:
    """Facts about preference pairs: the first one decoded, lengths, special tokens, margins before the first step."""
    facts, row_tokens = pair_facts(trainer, splits, step0_margins, step0_line, ("not scored", "scored"))
    cached, test_tokens = trainer.uncached_reference_because is None, facts.work.held_out_tokens
    facts.work.once_tokens = reference_tokens(trainer, plan, row_tokens, test_tokens) if cached else {}
    # Where the reference is not cached, its forward comes on top of the policy's.
    facts.work.held_out_tokens = test_tokens * (2 - cached)
    if splits.test and any(pair.messages for pair in splits.test.pairs):
        facts.work.sampling_models = 2
    return facts


def describe_reward_pairs(trainer, splits, data_args, config, plan: dict) -> RowFacts:
    """Facts about a reward model's pairs: those of `describe_pairs`, and rewards before the first step."""
    return pair_facts(trainer, splits, step0_reward_model, step0_reward_model_line, ("read", "rewarded"))[0]


def pair_facts(
    trainer,
    splits,
    measure_step0: Callable[[object, list[int]], dict],
    line_of: Callable[[dict], str],
    verbs: tuple[str, str],
) -> tuple[RowFacts, list[int]]:
    """What all objectives on pairs say about their rows, and the tokens that a forward computes for each train pair.

    Args:
        measure_step0: gives the figures before the first step, from the trainer and the tokens of every row.
        line_of: the printed line about them.
        verbs: what happens to the prompt's and to the answers' tokens.
    """
    dataset, tokenizer = splits.train_ids, trainer.processing_class
    # Of lists, the best and the worst answer are the pair; `list_figures` counts all answers.
    tokens = pair_tokens(*pair_lengths(dataset)) | list_figures(dataset, trainer.SEQUENCES)
    special = special_tokens(dataset, "prompt_ids", {"chosen": "chosen_ids", "rejected": "rejected_ids"}, tokenizer)
    pair, padded_because = decoded_pair(dataset, tokenizer), trainer.padded_because
    shared = padded_because is None
    row_tokens = tokens_of_rows(dataset, shared).tolist()
    # A first forward, which includes warm-up, before the speed is measured.
    step0 = measure_step0(trainer, row_tokens)
    test_tokens = int(tokens_of_rows(splits.test_ids, shared).sum()) if splits.test else 0
    facts = RowFacts(
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
        longest=tokens["longest_sequence"],
        speed=speed_of(trainer, row_tokens),
        work=Work(epoch_tokens=sum(row_tokens), once_tokens={}, held_out_tokens=test_tokens, sampling_models=0),
        unit="lists" if trainer.args.uses_lists else "pairs",
        lines=pair_lines(pair, tokens, special, splits, verbs),
        compute="each prompt once, without padding" if shared else f"padded pairs: {padded_because}",
        step0_lines=[line_of(step0)],
        repetition=repetition(
            (pair.prompt_key for pair in splits.train.pairs),
            ((pair.prompt_text, pair.chosen, pair.rejected, *pair.others) for pair in splits.train.pairs),
        ),
    )
    return facts, row_tokens


def reference_tokens(trainer, plan: dict, row_tokens: list[int], test_tokens: int) -> dict[str, int]:
    """Tokens of the reference's forwards: of the train pairs that the steps reach, and of the test pairs."""
    reached = 0 if trainer.args.reference_free else sum(row_tokens[i] for i in reached_rows(trainer, plan))
    return {"reference": reached, "reference of test pairs": test_tokens}


def pair_lines(pair: dict, tokens: dict, special: dict, splits, verbs: tuple[str, str]) -> list[str]:
    """Printed lines about the pairs of a run. `verbs`: as for `pair_facts`."""
    before, after = (f"tokens, {verb:<10}" for verb in verbs)
    train, test = splits.summary["train"], splits.summary["test"]

    def truncated(part):
        return f"{splits.truncation.get(f'truncated_{part}', 0) / tokenised(train):.1%}"

    size = pair["tokens"]
    held_out = f"{test['pairs']} test pairs; dropped: {dropped_rows(test)}" if test else "no test split"
    return [
        f"  prompt    {size['prompt']:>4} {before} | {excerpt(pair['prompt_not_scored'], end=True)}",
        f"  chosen    {size['chosen']:>4} {after} | {excerpt(pair['chosen_scored'])}",
        f"  rejected  {size['rejected']:>4} {after} | {excerpt(pair['rejected_scored'])}",
        *reading_report.pair_lines(train, splits.truncation),
        f"  data      {train['rows']} rows, {train['pairs']} train pairs; dropped: {dropped_rows(train)}; {held_out}",
        *list_line(tokens),
        f"  lengths   chosen {tokens['chosen_tokens_mean']:.0f}, rejected {tokens['rejected_tokens_mean']:.0f}"
        f" tokens on average; chosen longer in {tokens['chosen_longer_share']:.1%} of pairs",
        f"  truncated prompt {truncated('prompt')}, chosen {truncated('chosen')}, rejected {truncated('rejected')} of"
        f" pairs; end token kept in {special['chosen_with_end_token']:.1%} of chosen,"
        f" {special['rejected_with_end_token']:.1%} of rejected",
    ]


def describe_thumbs(trainer, splits, data_args, config, plan: dict) -> RowFacts:
    """Facts about answers with thumbs: the first one decoded, labels and their weights, rewards before step 1."""
    dataset, tokenizer = splits.train_ids, trainer.processing_class
    sizes = tokens_of_rows(dataset, shared_prompt=False)
    special = special_tokens(dataset, "prompt_ids", {"answers": "completion_ids"}, tokenizer)
    step0 = step0_rewards(trainer, sizes.tolist())
    tokens = {
        "thumbs": len(dataset),
        "longest_sequence": int(sizes.max()),
        "tokens_per_epoch": int(sizes.sum()),
        "answer_tokens_mean": float(lengths(dataset, "completion_ids").mean()),
    }
    first, test_ids = dataset[0], splits.test_ids
    test_tokens = int(tokens_of_rows(test_ids, shared_prompt=False).sum()) if test_ids else 0
    return RowFacts(
        sections={
            "first_answer": {"prompt": tokenizer.decode(first["prompt_ids"]), "label": first["label"]},
            "special_tokens": special,
            "tokens": tokens,
            "padded_because": trainer.padded_because,
            "step0": step0,
        },
        tokens_per_epoch={
            "tokens_seen": tokens["tokens_per_epoch"],
            "tokens_stored_once": tokens["tokens_per_epoch"],
        },
        longest=tokens["longest_sequence"],
        speed=speed_of(trainer, sizes.tolist()),
        work=Work(
            epoch_tokens=tokens["tokens_per_epoch"],
            once_tokens={},
            held_out_tokens=2 * test_tokens,
            sampling_models=2 if splits.test and any(thumb.messages for thumb in splits.test.pairs) else 0,
        ),
        unit="thumbs",
        lines=thumb_lines(first, tokens, special, splits, config, tokenizer),
        compute=f"padded answers: {trainer.padded_because}",
        step0_lines=[step0_line(step0)],
        repetition=repetition(
            (thumb.prompt_key for thumb in splits.train.pairs),
            ((thumb.prompt_text, thumb.chosen, thumb.label) for thumb in splits.train.pairs),
        ),
    )


def thumb_lines(first: dict, tokens: dict, special: dict, splits, config, tokenizer) -> list[str]:
    """Printed lines about the answers with thumbs of a run."""
    train, test = splits.summary["train"], splits.summary["test"]
    held_out = f"{test['thumbs']} test answers; dropped: {dropped_rows(test)}" if test else "no test split"
    dropped = dropped_rows(train)

    def truncated(part):
        return f"{splits.truncation.get(f'truncated_{part}', 0) / tokenised(train):.1%}"

    prompt, answer = (tokenizer.decode(first[f"{part}_ids"]) for part in ("prompt", "completion"))
    return [
        f"  prompt    {len(first['prompt_ids']):>4} tokens, not scored | {excerpt(prompt, end=True)}",
        f"  answer    {len(first['completion_ids']):>4} tokens, thumb {'up' if first['label'] else 'down'} |"
        f" {excerpt(answer)}",
        *reading_report.pair_lines(train, splits.truncation),
        f"  data      {train['rows']} rows, {train['thumbs']} train answers; dropped: {dropped}; {held_out}",
        f"  thumbs    {train['up']} up, {train['down']} down; {weights_text(train['up'], train['down'], config)}",
        f"  lengths   {tokens['answer_tokens_mean']:.0f} tokens per answer on average; order shuffled with the seed",
        f"  truncated prompt {truncated('prompt')}, answer {truncated('answer')} of answers; end token kept in"
        f" {special['answers_with_end_token']:.1%}",
    ]


def weights_text(up: int, down: int, config) -> str:
    """The weights of the two labels, and those that KTO's paper (arXiv 2402.01306, eq. 8) advises for their numbers."""
    weights = f"weights {config.desirable_weight:g} and {config.undesirable_weight:g}"
    if not up or not down:
        return f"{weights}; one label only: the rewards cannot be separated"
    ratio = config.desirable_weight * up / (config.undesirable_weight * down)
    if 1 <= round(ratio, 2) <= 1.33:
        return f"{weights}, within the paper's advice"
    low, high = (config.undesirable_weight * down / up * factor for factor in (1, 4 / 3))
    return f"{weights}; the paper advises --desirable_weight {low:.3g} to {high:.3g} for these numbers"


def list_line(tokens: dict) -> list[str]:
    """The printed line about the lists of a run; none for pairs."""
    if "answers_mean" not in tokens:
        return []
    return [
        f"  answers   {tokens['answers_mean']:.1f} per list ({tokens['answers_min']} to {tokens['answers_max']}); equal"
        f" scores, not compared, in {tokens['lists_with_ties']} lists; chosen is the best answer, rejected the worst"
    ]


# ---------------------------------------------------------------------------------------------------- conversations


def describe_conversations(trainer, splits, data_args, config, plan: dict) -> RowFacts:
    """Facts about SFT conversations: the first one decoded, lengths, packing, and the loss before the first step."""
    dataset, tokenizer = splits.train_ids, trainer.processing_class
    tokens = conversation_tokens(dataset)
    special = special_tokens(dataset, "input_ids", {"conversations": "input_ids"}, tokenizer)
    step0 = step0_loss(trainer, dataset)
    test_tokens = int(lengths(splits.test_ids, "input_ids").sum()) if splits.test else 0
    pieces = decoded_conversation(dataset, tokenizer)
    packing = None
    if config.packing:
        rows = len(trainer.train_dataset)
        packing = {"rows": rows, "filled": tokens["tokens_per_epoch"] / (rows * config.max_length)}
        compute = f"{rows} packed rows, {packing['filled']:.0%} filled"
    elif trainer.padded_because is None:
        compute = "the conversations of a micro-batch in one row, without padding"
    else:
        compute = f"padded rows: {trainer.padded_because}"
    return RowFacts(
        sections={
            "first_conversation": pieces,
            "special_tokens": special,
            "tokens": tokens,
            "packing": packing,
            "padded_because": trainer.padded_because,
            "step0": step0,
        },
        tokens_per_epoch={
            "tokens_seen": tokens["tokens_per_epoch"],
            "trained_tokens_seen": tokens["trained_tokens_per_epoch"],
        },
        longest=tokens["longest_sequence"],
        speed=speed_of(trainer, lengths(trainer.train_dataset, "input_ids").tolist()),
        work=Work(
            epoch_tokens=tokens["tokens_per_epoch"],
            once_tokens={"base on held-out rows": test_tokens} if test_tokens else {},
            held_out_tokens=test_tokens,
            sampling_models=(1 + hasattr(trainer.model, "peft_config")) if splits.test else 0,
        ),
        unit="packed rows" if packing else "conversations",
        lines=conversation_lines(pieces, tokens, special, splits, data_args.loss_on),
        compute=compute,
        step0_lines=[f"  step 0    loss {step0['loss']:.3f} nats per token over {step0['conversations']} conversations"]
        if step0
        else [],
        repetition=repetition(
            (conversation.prompt_key for conversation in splits.train.conversations),
            (transcript(conversation.turns) for conversation in splits.train.conversations),
        ),
    )


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
