"""Read a label from a judge's reply. One parser for local, vLLM and endpoint judges."""

import re

# Openings and closings of the thoughts of reasoning models: DeepSeek R1 and Qwen 3; Magistral; Kimi; gpt-oss with and
# without its special tokens; Bespoke and Sky-T1.
THOUGHTS = (
    (r"<(?:seed:)?(?:think|thinking|thought|reasoning|reflection)>",
     r"</(?:seed:)?(?:think|thinking|thought|reasoning|reflection)>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    ("◁think▷", "◁/think▷"),
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
    (r"<\|channel\|>(?:analysis|commentary)", r"<\|channel\|>final(?:<\|message\|>)?"),
    (r"(?-i:\Aanalysis(?=[A-Z]))", "assistantfinal"),
)  # fmt: skip
OPENS = re.compile("|".join(opening for opening, _ in THOUGHTS), re.IGNORECASE)
# A verdict heading: a line or sentence that starts with it, or "my final verdict is" within a sentence.
HEADING = re.compile(
    r"(?:^|[.!?]\s)[\W_]*(?:(?:my|the|our|final|overall)\s+)*"
    r"(?:verdict|judge?ment|decision|conclusion|winner|final answer)\b[*_\s]*(?:[:=]|\bis\b|$)"
    r"|\b(?:final|my)\s+(?:verdict|judge?ment|decision)\b",
    re.IGNORECASE | re.MULTILINE,
)
# What may surround a reply that is a label: white space, Markdown, quotes and a full stop.
AROUND = " \t\r\n*_`\"'“”‘’«»."


def opening_of_thought(text: str) -> str:
    """The opening of a thought that `text` ends in, "" if it ends in none.

    Some chat templates open the thought in the prompt, so that the reply has its closing only.
    """
    matches = [match for match in OPENS.finditer(text) if not text[match.end() :].strip()]
    return matches[-1][0] if matches else ""


def starts_with_thought(text: str) -> bool:
    """Whether a reply opens with a thought."""
    return bool(OPENS.match(text.lstrip()))


def without_thoughts(text: str) -> str:
    """A reply without its thoughts; one that is never closed reaches to the end of the reply."""
    for opening, closing in THOUGHTS:
        text = re.sub(f"(?:{opening}).*?(?:{closing})", "", text, flags=re.IGNORECASE | re.DOTALL)
        # A closing alone: the chat template opened the thought in the prompt.
        text = re.sub(rf"\A.*(?:{closing})", "", text, flags=re.IGNORECASE | re.DOTALL)
        text = re.sub(f"(?:{opening}).*", "", text, flags=re.IGNORECASE | re.DOTALL)
    return text


def read_label(text: str, labels, only: bool, cut: bool = False) -> tuple[str | None, str | None]:
    """The label that a judge's reply ends in.

    Thoughts are removed first. Several different labels count only after a verdict heading, where the last one decides.

    Args:
        only: the prompt requests a label and nothing else, so only a reply that is a label counts.
        cut: the reply was ended by its length limit, so that its verdict may be missing.

    Returns:
        (label, None), or (None, why there is none).
    """
    if cut:
        return None, f"the reply was cut off by its length limit: ...{text[-80:]!r}"
    said = without_thoughts(text)
    if only:
        exact = {said.strip(), said.strip(AROUND)} & set(labels)
        return (exact.pop(), None) if len(exact) == 1 else (None, _no_label(text, said))
    matches = list(pattern_of(labels).finditer(said))
    if len({match[0] for match in matches}) > 1:
        headings = list(HEADING.finditer(said))
        # The last heading that a label follows: a reply may end with a remark on its verdict.
        last = next((h for h in reversed(headings) if matches[-1].start() >= h.end()), None)
        if last is None:
            named = ", ".join(dict.fromkeys(match[0] for match in matches))
            return None, f"several labels ({named}) and no verdict heading in {said[-80:]!r}"
    return (matches[-1][0], None) if matches else (None, _no_label(text, said))


def _no_label(text: str, said: str) -> str:
    if text.strip() and not said.strip():
        return f"only a thought: ...{text[-80:]!r}"
    return f"no verdict in {said[-80:]!r}"


def pattern_of(labels) -> re.Pattern:
    """A pattern that matches any of the labels."""
    patterns = []
    # Longest first, so that A+ is not read as A.
    for label in sorted(labels, key=len, reverse=True):
        # Labels that start or end in a letter or digit must be separate words: the A of "Answer" is not a label.
        before, after = (r"(?<!\w)" * label[0].isalnum(), r"(?!\w)" * label[-1].isalnum())
        patterns.append(before + re.escape(label) + after)
    return re.compile("|".join(patterns))
