"""The usage section of a card: a pipeline, the system prompt, sampling, and an answer that the run really gave."""

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path

from preflab.release.arguments import ReleaseArguments
from preflab.release.sources import public_text
from preflab.training.run_config import SAMPLE_TOKENS
from utils.markdown import code_block, visible
from utils.tables import CUT_OFF_TEXT

PIPELINE = """\
from transformers import pipeline

generator = pipeline("text-generation", model={model})
messages = [{{"role": "user", "content": {prompt}}}]
answer = generator(messages, max_new_tokens={tokens}, do_sample=False, return_full_text=False)
print(answer[0]["generated_text"])"""

SAMPLED = """\
messages = [{system}{{"role": "user", "content": {prompt}}}]
answer = generator(
    messages, max_new_tokens={tokens}, do_sample=True, temperature={temperature}, top_k={top_k}, top_p={top_p},
    return_full_text=False,
)
print(answer[0]["generated_text"])"""

TEXT = """\
from transformers import pipeline

generator = pipeline("text-generation", model={model})
print(generator({prompt}, max_new_tokens={tokens}, do_sample=False)[0]["generated_text"])"""

DEFAULT_PROMPT = "Why is the sky blue?"


@dataclass
class Sample:
    """A prompt of one user turn with the tuned model's greedy answer; `cut` at SAMPLE_TOKENS tokens."""

    prompt: str
    answer: str
    cut: bool


def read_sample(path: Path) -> Sample | None:
    """The first complete answer in samples.md, else the first one; None without a prompt of one turn."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None
    samples = []
    for entry in re.split(r"^## .*$", text, flags=re.MULTILINE)[1:]:
        prompt, *answers = re.split(r"^### (.*)$", entry, flags=re.MULTILINE)
        for label, answer in zip(answers[::2], answers[1::2], strict=True):
            # Several turns have their roles in front, which are no part of the prompt.
            if label.startswith("tuned") and not prompt.lstrip().startswith("> **"):
                samples.append(Sample(_unquoted(prompt), _unquoted(answer), CUT_OFF_TEXT in label))
    samples = [s for s in samples if s.prompt and s.answer and s.answer != "(empty)"]
    return next((s for s in samples if not s.cut), samples[0] if samples else None)


def _unquoted(text: str) -> str:
    lines = [line[2:] for line in text.splitlines() if line.startswith("> ")]
    return html.unescape("\n".join(lines)).strip()


def usage(model: str, sample: Sample | None, args: ReleaseArguments, text: bool, peft: bool) -> str:
    """Markdown of how to answer a prompt.

    Args:
        model: hub id or folder of the released model.
        text: whether it was trained on plain text, without a chat template.
        peft: whether it is an adapter.
    """
    prompt = public_text(sample.prompt) if sample else DEFAULT_PROMPT
    values = {"model": _quoted(visible(model)), "prompt": _quoted(prompt), "tokens": SAMPLE_TOKENS}
    parts = [
        f"`pip install torch transformers{' peft' if peft else ''}`, then:",
        code_block((TEXT if text else PIPELINE).format(**values), "python"),
    ]
    if sample:
        cut = f", cut off at {SAMPLE_TOKENS} tokens" if sample.cut else ""
        parts += [f"The answer of the run's own evaluation, decoded greedily{cut}:",
                  code_block(public_text(sample.answer), "text")]  # fmt: skip
    if not text and args.temperature > 0:
        turn = f'{{"role": "system", "content": {_quoted(args.system)}}}, ' if args.system else ""
        kind = "With the system prompt and sampling:" if args.system else "With sampling:"
        values |= {"temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "system": turn}
        parts += [kind, code_block(SAMPLED.format(**values), "python")]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
