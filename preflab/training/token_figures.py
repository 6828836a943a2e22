"""Lengths and special tokens of tokenised rows, for the preflight."""

import numpy as np

from preflab.data.chat_template import ChatRenderer
from preflab.data.tokenised_rows import count_other_than, ends_of, lengths
from preflab.models.checks import largest_and_longest
from utils.errors import UserError

# Ids that are searched: for BOS tokens at the start of a sequence, for the end of a turn at its end (some templates put
# a newline after it).
FIRST_IDS, LAST_IDS = 8, 3


def pair_lengths(dataset) -> list[np.ndarray]:
    """Tokens of the prompt, the chosen and the rejected answer of each pair, each of shape (pairs,)."""
    return [lengths(dataset, f"{part}_ids") for part in ("prompt", "chosen", "rejected")]


def tokens_of_pairs(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray, shared_prompt: bool) -> np.ndarray:
    """Tokens that a forward computes for each pair; a prompt that is not shared counts with each answer."""
    return (1 if shared_prompt else 2) * prompt + chosen + rejected


def tokens_of_rows(dataset, shared_prompt: bool) -> np.ndarray:
    """Tokens that a forward computes for each row of pairs, lists or answers with thumbs, shape (rows,)."""
    if "completion_ids" in dataset.column_names:
        return lengths(dataset, "prompt_ids") + lengths(dataset, "completion_ids")
    tokens = tokens_of_pairs(*pair_lengths(dataset), shared_prompt)
    if "others_ids" in dataset.column_names:
        prompts = 0 if shared_prompt else lengths(dataset, "prompt_ids") * lengths(dataset, "others_lengths")
        tokens = tokens + lengths(dataset, "others_ids") + prompts
    return tokens


def list_figures(dataset, sequences: tuple) -> dict:
    """Lists of a split: their number of answers, how many have answers of equal score, tokens; {} for pairs.

    Args:
        sequences: columns of each sequence (`largest_and_longest`).
    """
    if "scores" not in dataset.column_names:
        return {}
    answers, scores = lengths(dataset, "scores"), dataset["scores"]
    return {
        "answers_mean": float(answers.mean()),
        "answers_min": int(answers.min()),
        "answers_max": int(answers.max()),
        "lists_with_ties": sum(len(set(values)) < len(values) for values in scores),
        "longest_sequence": largest_and_longest(dataset, sequences)[1],
        "tokens_per_epoch": int(tokens_of_rows(dataset, shared_prompt=False).sum()),
        "tokens_stored_once": int(tokens_of_rows(dataset, shared_prompt=True).sum()),
    }


def pair_tokens(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict:
    """Token lengths of a split of pairs (`pair_lengths`): totals, means, margins of chosen over rejected."""
    return {
        "pairs": len(prompt),
        "prompt_tokens_mean": float(prompt.mean()),
        "chosen_tokens_mean": float(chosen.mean()),
        "rejected_tokens_mean": float(rejected.mean()),
        # A sequence is a prompt with one answer, so the longer answer counts.
        "longest_sequence": int((prompt + np.maximum(chosen, rejected)).max()),
        # Padded, the prompt is computed with each answer; packed, once per pair.
        "tokens_per_epoch": int(tokens_of_pairs(prompt, chosen, rejected, shared_prompt=False).sum()),
        "tokens_stored_once": int(tokens_of_pairs(prompt, chosen, rejected, shared_prompt=True).sum()),
        "margin_tokens_mean": float((chosen - rejected).mean()),
        "margin_tokens_quartiles": [float(q) for q in np.percentile(chosen - rejected, [25, 50, 75])],
        "chosen_longer_share": float((chosen > rejected).mean()),
        "equal_length_share": float((chosen == rejected).mean()),
    }


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


def special_tokens(dataset, sequences: str, answers: dict[str, str], tokenizer) -> dict:
    """Leading BOS tokens per sequence, and the share of answers that end with an end-of-turn or EOS token.

    Args:
        sequences: the column with which each sequence starts.
        answers: {name: the column of the answers}.

    Raises:
        UserError: most sequences start with two BOS tokens. A few, whose text spells it, are counted.
    """
    bos, firsts = tokenizer.bos_token_id, ends_of(dataset, sequences, first=FIRST_IDS)
    # Number of BOS tokens before the first other token.
    leading = [next((i for i, t in enumerate(ids) if t != bos), len(ids)) for ids in firsts]
    doubled = sum(count > 1 for count in leading)
    if 2 * doubled > len(leading):
        raise UserError(
            f"{doubled} of {len(leading)} sequences start with {max(leading)} BOS tokens ({tokenizer.bos_token}): the"
            " chat template writes it more than once; correct the template with --chat_template_path FILE"
        )
    ends = {tokenizer.eos_token_id}
    if tokenizer.chat_template:
        ends |= ChatRenderer(tokenizer).end_ids()
    ended = {
        name: np.mean([any(t in ends for t in ids) for ids in ends_of(dataset, column, last=LAST_IDS)])
        for name, column in answers.items()
    }
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
