"""A toy scorer, for trying things out: of two answers the one in shorter words is the better one.

    python generate_preference_pairs.py --scorer configs/scorers/plain_words.py:score ...

Any function of this form can be a scorer: it gets a prompt and its distinct answers, and gives a number for each, as
log-odds: one answer beats another with probability 1 / (1 + exp(theirs - its own)).
"""

import re

# One letter a word fewer makes an answer e^4 times as likely to be the better one.
LOG_ODDS_PER_LETTER = 4.0


def letters_per_word(text: str) -> float:
    """Mean number of letters of the words in `text`; of a text without words, that of a long one."""
    words = re.findall(r"[^\W\d_]+", text)
    return sum(map(len, words)) / len(words) if words else 12.0


def score(prompt: str, answers: list[str]) -> list[float]:
    """Log-odds of each answer."""
    return [-LOG_ODDS_PER_LETTER * letters_per_word(answer) for answer in answers]
