"""A toy scorer for trying out on-policy pairs: the answer with shorter words is better.

    python generate_preference_pairs.py --scorer configs/scorers/plain_words.py:score ...

Any function of this form can be a scorer. It takes a prompt and its distinct answers and returns one number per answer,
as log-odds: answer i beats answer j with probability 1 / (1 + exp(score_j - score_i)).
"""

import re

# One letter per word less multiplies the odds of being better by e^4.
LOG_ODDS_PER_LETTER = 4.0


def letters_per_word(text: str) -> float:
    """Mean letters per word of `text`; 12, as for long words, if it has no words."""
    words = re.findall(r"[^\W\d_]+", text)
    return sum(map(len, words)) / len(words) if words else 12.0


def score(prompt: str, answers: list[str]) -> list[float]:
    """Log-odds of each answer."""
    return [-LOG_ODDS_PER_LETTER * letters_per_word(answer) for answer in answers]
