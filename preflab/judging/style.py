"""Style features of answers (length, headers, lists, bold) for style control, as in arena-hard-auto."""

import re

import numpy as np

# A fenced code block: no backtick follows the opening fence on its line. It ends at a fence that is at least as long,
# or at the end of the text.
FENCE = re.compile(
    r"^[ \t]*(?P<f>`{3,}(?=[^`\n]*$)|~{3,}).*?(?:^[ \t]*(?P=f)[`~]*[ \t\r]*$|\Z)", re.MULTILINE | re.DOTALL
)
HEADER = re.compile(r"^#{1,6}\s", re.MULTILINE)
LIST = re.compile(r"^\s*(\d+[.)]|[-*+])\s", re.MULTILINE)
# Within one line, so that two unrelated pairs of asterisks do not make a bold run.
BOLD = re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__")


def markdown_counts(text: str) -> tuple[int, int, int]:
    """Number of headers, list items and bold runs in a text, outside code fences."""
    prose = FENCE.sub("", text)
    return len(HEADER.findall(prose)), len(LIST.findall(prose)), len(BOLD.findall(prose))


def style_differences(a: list[str], b: list[str], tokens_a: list[int], tokens_b: list[int]) -> np.ndarray:
    """Style features of answers `a` relative to answers `b`, shape (n, 4): length, headers, lists, bold.

    Length: (L_a - L_b) / (L_a + L_b) in tokens. The others are densities d = count / (tokens + 1), compared as
    (d_a - d_b) / (d_a + d_b + 1).
    """
    length_a, length_b = np.array(tokens_a, float), np.array(tokens_b, float)
    # At least 1, so that two empty answers have difference 0.
    features = [(length_a - length_b) / np.maximum(length_a + length_b, 1)]
    # Each of shape (n, 3), also for n = 0.
    counts_a, counts_b = (np.array([markdown_counts(text) for text in side], float).reshape(-1, 3) for side in (a, b))
    for k in range(3):
        d_a, d_b = counts_a[:, k] / (length_a + 1), counts_b[:, k] / (length_b + 1)
        features.append((d_a - d_b) / (d_a + d_b + 1))
    return np.stack(features, 1)


def scaled(differences: np.ndarray) -> np.ndarray:
    """Features divided by their root mean square; a feature that is 0 everywhere stays 0.

    arena-hard-auto also centres them. There the sides are shuffled; here `a` is always the tuned model, and centring
    would remove its average style from the control.
    """
    rms = np.sqrt((differences**2).mean(0))
    return differences / np.where(rms > 0, rms, 1)
