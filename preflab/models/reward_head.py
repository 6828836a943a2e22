"""Reward models: a transformer with one output, `score`, read at the last token of a conversation."""

from pathlib import Path

from utils.artifacts import read_json
from utils.errors import UserError


def padding_that_ends_nothing(tokenizer, last_ids: set[int]) -> int:
    """A pad id that no sequence ends with; where it is a special token, it becomes the tokenizer's pad token.

    transformers reads a reward at the last token that is not the pad id. Where sequences end with it (a tokenizer that
    pads with its end-of-turn token), the reward would be read one token too early.

    Args:
        last_ids: the last token id of every sequence.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in last_ids:
        return tokenizer.pad_token_id
    special = sorted({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - last_ids)
    if special:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(special[0])
        return special[0]
    # One of n + 1 ids is not among n last ids. The tokenizer cannot pad with an ordinary token and is left as it is.
    return next(t for t in range(len(last_ids) + 1) if t not in last_ids)


def reward_adapter(name: str) -> str | None:
    """The folder of a LoRA adapter that is a reward model; None for a complete model or a hub id.

    Raises:
        UserError: an adapter of a language model.
    """
    folder = Path(name).expanduser()
    if not (folder / "adapter_config.json").exists() or (folder / "config.json").exists():
        return None
    if read_json(folder / "adapter_config.json").get("task_type") != "SEQ_CLS":
        raise UserError(
            f"rm:{name}: an adapter of a language model, which gives no rewards; train_reward_model.py trains one"
        )
    return str(folder)
