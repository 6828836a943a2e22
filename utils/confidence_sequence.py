"""Confidence sequences: intervals that hold at every number of rows at once, so that one may look after each and stop.

An ordinary 95% interval holds for a number of rows chosen in advance. To look again and again until it excludes 50%,
and to stop there, is wrong more often than 5%.
"""

import math
from dataclasses import dataclass

import numpy as np

# Candidate means between 0 and 1. An end is rounded outwards to the next candidate.
CANDIDATES = 1001
# Bets are fixed and their capital is averaged: large ones exclude a clear difference after few rows, and the best one
# after n rows of standard deviation s is about 2.7 / (s sqrt(n)), here down to n = 10,000.
BETS = np.geomspace(0.05, 1.6, 6)
# The largest share of the capital that one row may lose.
MOST_LOST = 0.9


@dataclass
class Sequence:
    """The confidence sequence after some rows.

    Attributes:
        low, high: ends of the 95% interval of the mean, which hold with this probability at all numbers of rows.
        p: the anytime-valid p-value of the hypothesis that the mean is one half.
        n: the number of rows.
    """

    low: float
    high: float
    p: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the interval's width."""
        return (self.high - self.low) / 2

    @property
    def excludes_half(self) -> bool:
        """Whether one half is outside the interval."""
        return not self.low <= 0.5 <= self.high


class Betting:
    """Bets against every candidate mean of independent rows in [0, 1].

    Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by betting" (Journal of the Royal
    Statistical Society B 86, 1-27), with the average over a grid of bets. A gambler bets against each candidate mean m,
    upwards and downwards with half of the capital each: the capital of a bet b is the product of 1 + b (x - m) over
    the rows. Against the true mean it does not grow on average, so that it ever reaches 1 / alpha has probability of at
    most alpha (Ville 1939); candidates against which it did are excluded, and stay so.
    """

    def __init__(self, alpha: float = 0.05):
        self.alpha, self.n, self.total = alpha, 0, 0.0
        self.candidates = m = np.linspace(0, 1, CANDIDATES)
        with np.errstate(divide="ignore"):
            # Shape (upwards and downwards, bets, candidates). A bet that a row could lose too much of is lowered.
            up, down = (np.minimum(BETS[:, None], MOST_LOST / room) for room in (m, 1 - m))
        self.bets = np.stack([up, -down])
        # Logarithms: of the capital now, and of the largest so far against each candidate.
        self.capital, self.largest = np.zeros(self.bets.shape), np.full(CANDIDATES, -np.inf)
        self.gains: dict[float, np.ndarray] = {}

    def extend(self, outcomes) -> "Betting":
        """Bet on further rows, shape (n,), whose order does not depend on the outcomes. Returns itself.

        Raises:
            ValueError: an outcome outside [0, 1].
        """
        for outcome in np.asarray(outcomes, dtype=np.float64).tolist():
            if not 0 <= outcome <= 1:
                raise ValueError(f"an outcome must be from 0 to 1, not {outcome}")
            # Most outcomes are 0, 0.5 or 1.
            if outcome not in self.gains:
                self.gains[outcome] = np.log1p(self.bets * (outcome - self.candidates))
            self.capital += self.gains[outcome]
            # The average over the bets of each half, without overflow; each half started with 1/2.
            highest = self.capital.max(1, keepdims=True)
            averages = highest[:, 0] + np.log(np.exp(self.capital - highest).mean(1)) - math.log(2)
            self.largest = np.maximum(self.largest, averages.max(0))
            self.n, self.total = self.n + 1, self.total + outcome
        return self

    def sequence(self) -> Sequence:
        """The confidence sequence after the rows so far."""
        inside = self.candidates[self.largest < -math.log(self.alpha)]
        p = min(1.0, math.exp(min(0.0, -float(self.largest[CANDIDATES // 2])))) if self.n else 1.0
        if not len(inside):
            # Every candidate is excluded, which has probability of at most alpha.
            return Sequence(self.total / self.n, self.total / self.n, p, self.n)
        step = 1 / (CANDIDATES - 1)
        return Sequence(max(0.0, float(inside[0]) - step), min(1.0, float(inside[-1]) + step), p, self.n)


def confidence_sequence(outcomes, alpha: float = 0.05) -> Sequence:
    """The confidence sequence of all rows, shape (n,): `Betting` on each of them in turn."""
    return Betting(alpha).extend(outcomes).sequence()
