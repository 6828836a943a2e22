"""Answers of several models to a few held-out prompts, for people to read."""

from preflab.models.generation import generate
from utils.artifacts import write_text
from utils.tables import side_by_side

MAX_NEW_TOKENS = 64


def write_samples(path, sides: dict, tokenizer, prompts: list[list[dict]]) -> None:
    """Write a Markdown file with the greedy answer of every model to each prompt.

    Args:
        sides: `{name: context manager that gives the model}`, each entered once.
        prompts: conversations that end with a user turn.
    """
    answers = {}
    for name, context in sides.items():
        with context as model:
            answers[name] = sorted(generate(model, tokenizer, prompts, MAX_NEW_TOKENS), key=lambda a: a["index"])
    entries = [
        (
            f"Prompt {i + 1}",
            "\n\n".join(_turn(message, len(messages) > 1) for message in messages),
            {f"{name} ({by_prompt[i]['finish_reason']})": by_prompt[i]["text"] for name, by_prompt in answers.items()},
        )
        for i, messages in enumerate(prompts)
    ]
    note = f"Held-out prompts, decoded greedily, at most {MAX_NEW_TOKENS} tokens per answer."
    write_text(path, side_by_side("Answers side by side", entries, note))


def _turn(message: dict, with_role: bool) -> str:
    # Alpaca's template has an `input` field beside the instruction.
    text = "\n\n".join(message[key] for key in ("content", "input") if message.get(key))
    return f"**{message['role']}**: {text}" if with_role else text
