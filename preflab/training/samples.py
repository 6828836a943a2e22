"""A few prompts answered by several models, to be read."""

from preflab.models.generation import generate
from utils.artifacts import write_text

LONGEST = 64


def write_samples(path, sides: dict, tokenizer, prompts: list[list[dict]]) -> None:
    """Write `path`: each prompt with the greedy answer of every model, in Markdown.

    Args:
        sides: `{name: context under which the model is loaded and set}`, each entered once.
        prompts: conversations that end with a user turn.
    """
    answers = {}
    for name, opened in sides.items():
        with opened as model:
            answers[name] = sorted(generate(model, tokenizer, prompts, LONGEST), key=lambda a: a["index"])
    parts = [f"# Held-out prompts, answered greedily (at most {LONGEST} tokens)\n"]
    for i, messages in enumerate(prompts):
        # Alpaca's own template has a place for an input beside the instruction.
        shown = ((m["role"], "\n\n".join(m[key] for key in ("content", "input") if m.get(key))) for m in messages)
        parts += [f"**{role}**: {text}\n" for role, text in shown]
        parts += [
            f"- **{name}** ({found[i]['finish_reason']}): {found[i]['text']}\n" for name, found in answers.items()
        ]
        parts.append("---\n")
    write_text(path, "\n".join(parts))
