"""Style of answers, and win rates with it held equal (arena-hard-auto's style control, scaled about zero)."""

import re

import numpy as np

FEATURES = ("length", "headers", "lists", "bold")
# An opening fence has no backtick after it on its line; a closing one is at least as long, or the text ends first.
FENCE = re.compile(
    r"^[ \t]*(?P<f>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ \t]*(?P=f)[`~]*[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL
)
HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
LIST = re.compile(r"^\s*(\d+[.)]|[-*+])\s", re.MULTILINE)
BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def markdown_counts(text: str) -> tuple[int, int, int]:
    """Headers, list items and bold runs of a text, outside code fences."""
    prose = FENCE.sub("", text)
    return len(HEADER.findall(prose)), len(LIST.findall(prose)), len(BOLD.findall(prose))


def style_differences(a: list[str], b: list[str], tokens_a: list[int], tokens_b: list[int]) -> np.ndarray:
    """Style of answers `a` against answers `b`, shape (n, 4).

    Length: (L_a - L_b) / (L_a + L_b) in tokens. Headers, lists, bold: densities d = count / (tokens + 1), compared as
    (d_a - d_b) / (d_a + d_b + 1).
    """
    length_a, length_b = np.array(tokens_a, float), np.array(tokens_b, float)
    found = [(length_a - length_b) / np.maximum(length_a + length_b, 1)]
    counts_a, counts_b = (np.array([markdown_counts(text) for text in side], float).reshape(-1, 3) for side in (a, b))
    for k in range(3):
        d_a, d_b = counts_a[:, k] / (length_a + 1), counts_b[:, k] / (length_b + 1)
        found.append((d_a - d_b) / (d_a + d_b + 1))
    return np.stack(found, 1)


def scaled(differences: np.ndarray) -> np.ndarray:
    """Features divided by their root mean square; a constant 0 stays 0.

    Not centred, unlike arena-hard-auto's: there the sides are shuffled, here one side is always the tuned model, and
    centring would take exactly the style that it has on average out of the control.
    """
    size = np.sqrt((differences**2).mean(0))
    return differences / np.where(size > 0, size, 1)
