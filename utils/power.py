"""Statistical power: which difference a paired test can detect with this many rows, and how many a difference needs.

Computed for the exact sign test, where every row is a win, a tie or a loss, and else for `utils.stats.mean_test` on
normal rows, a t-test with a larger critical value for few rows. Levels are two-sided.
"""

import math
from dataclasses import dataclass

import numpy as np

from utils.stats import critical_distance, independent_values
from utils.tables import duration, number
from utils.tables import render as render_table

# The power and the level that a difference "can be detected" with (Cohen 1988).
POWER, LEVEL = 0.8, 0.05
# The sign test's power is exact up to this many rows, Connor's formula above.
MOST_ROWS_EXACT = 20_000
# From here on, Student's t and its noncentral distribution are the normal's for every purpose here.
NORMAL_FROM = 1000
# The rows of a plan's table.
PLANNED = (50, 100, 200, 400, 800, 1600, 3200, 6400)


@dataclass
class Pilot:
    """What the power of a test depends on, as estimated from rows.

    Attributes:
        n: number of independent units: rows, or groups of rows.
        mean: the observed difference from the null.
        deviation: standard deviation of the units' values.
        decided: share of rows that are not ties, for the sign test; None for the t-test.
        step: distance of a win from the null, for the sign test: 0.5 for outcomes 0, 0.5, 1.
        largest: the largest possible difference.
    """

    n: int
    mean: float
    deviation: float
    decided: float | None = None
    step: float = 1.0
    largest: float = math.inf

    def power(self, n: int, difference: float, level: float = LEVEL) -> float:
        """The probability that the test on `n` rows is significant if the true difference is `difference`."""
        if self.decided is not None:
            return sign_test_power(n, self.decided, abs(difference) / self.step, level)
        return t_test_power(n, abs(difference) / self.deviation, level, critical_distance(n, level))

    def is_testable(self, n: int, level: float) -> bool:
        """Whether a test on `n` rows can be significant: five equal signs have p = 0.0625 in the sign test."""
        if self.decided is not None:
            return 2.0 ** (1 - n) < level
        return math.isfinite(critical_distance(n, level))

    def detectable(self, n: int, level: float = LEVEL) -> float | None:
        """The smallest difference that `n` rows detect with `POWER`; None where no possible one is."""
        from scipy.optimize import brentq

        largest = self.decided * self.step if self.decided is not None else self.largest
        if not self.is_testable(n, level) or not largest > 0 or (self.decided is None and not self.deviation > 0):
            return None
        high = largest if math.isfinite(largest) else 4 * self.deviation
        while self.power(n, high, level) < POWER:
            if math.isfinite(largest):
                return None
            high *= 2
        return float(brentq(lambda d: self.power(n, d, level) - POWER, 0, high, xtol=1e-6 * high))

    def needed(self, difference: float, level: float = LEVEL) -> int | None:
        """About how many rows detect `difference` with `POWER`; None for a difference of 0."""
        from scipy.stats import norm

        # Rounding alone makes a difference of this size.
        if abs(difference) <= 1e-9 * max(self.step, self.deviation) or not math.isfinite(difference):
            return None
        if self.decided is None and not self.deviation > 0:
            return None
        z, z_power = norm.ppf(1 - level / 2), norm.ppf(POWER)
        if self.decided is not None:
            # Connor (1987), equation 4: ties have no part in the variance under the null.
            d = min(abs(difference) / self.step, self.decided)
            rows = ((z * math.sqrt(self.decided) + z_power * math.sqrt(max(0.0, self.decided - d * d))) / d) ** 2
        else:
            rows = ((z + z_power) * self.deviation / difference) ** 2
        if rows > MOST_ROWS_EXACT:
            return math.ceil(rows)
        # Both formulas are of the normal distribution, so the exact number is somewhat larger.
        low, high = 1, max(2, math.ceil(rows))
        while self.power(high, difference, level) < POWER:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self.power(middle, difference, level) >= POWER else (middle, high)
        return high


def pilot_of(rows, null: float = 0.0, groups=None) -> Pilot:
    """The pilot of rows whose mean is tested against `null`.

    Args:
        rows: outcomes in [0, 1] with null 0.5, or paired differences, shape (n,).
        groups: the group of each row (its prompt), as in `utils.stats.bootstrap`: the units are then groups.
    """
    rows = np.asarray(rows, dtype=np.float64) - null
    values = independent_values(rows, groups)
    n, mean = len(values), float(rows.mean()) if len(rows) else 0.0
    deviation = float(values.std(ddof=1)) if n > 1 else 0.0
    # Outcomes from 0 to 1 are at most 0.5 away from a null of 0.5.
    largest = 0.5 if null == 0.5 else math.inf
    step = 0.5 if null == 0.5 else 1.0
    if len(values) == len(rows) and np.isin(rows, (-step, 0, step)).all():
        return Pilot(n, mean, deviation, float(np.mean(rows != 0)) if n else 0.0, step, largest)
    # Values that are equal up to rounding have no spread.
    return Pilot(n, mean, deviation if deviation > 1e-12 * np.abs(rows).max(initial=0) else 0.0, largest=largest)


def pilot_of_metric(m: dict, n: int, of_shares: bool) -> Pilot:
    """The pilot of a paired difference that is known by its mean and standard error only.

    Args:
        m: the metric, with the standard error of a sample (n - 1).
        n: number of rows.
        of_shares: whether the rows are -1, 0 and 1, so that their mean square is the share of rows that are not ties.
    """
    deviation = (m["stderr"] or 0) * math.sqrt(n)
    # A mean square: the variance with n in the denominator, plus the squared mean.
    decided = min(1.0, deviation**2 * (n - 1) / max(n, 1) + m["value"] ** 2) if of_shares else None
    return Pilot(n, m["value"], deviation, decided)


def sign_test_power(n: int, decided: float, difference: float, level: float = LEVEL) -> float:
    """Power of the exact two-sided sign test on `n` rows, of which a share `decided` is no tie.

    Args:
        difference: share of wins minus share of losses, at most `decided`.
    """
    from scipy.stats import binom, norm

    difference = min(difference, decided)
    if n > MOST_ROWS_EXACT:
        spread = math.sqrt(max(0.0, decided - difference**2))
        distance = math.sqrt(n) * difference - norm.ppf(1 - level / 2) * math.sqrt(decided)
        return float(norm.cdf(distance / spread)) if spread else float(distance > 0)
    # Over the possible numbers of decided rows; those left out have a probability below 1e-12.
    counts = np.arange(max(0, int(binom.ppf(1e-12, n, decided))), int(binom.ppf(1 - 1e-12, n, decided)) + 1)
    # The largest number of losses whose two-sided p-value is below the level; -1 where there is none.
    critical = binom.ppf(level / 2, counts, 0.5)
    critical = np.where(2 * binom.cdf(critical, counts, 0.5) < level, critical, critical - 1)
    win = (1 + difference / decided) / 2
    significant = binom.cdf(critical, counts, 1 - win) + binom.cdf(critical, counts, win)
    return float((binom.pmf(counts, n, decided) * np.where(critical < 0, 0, significant)).sum())


def t_test_power(n: int, effect: float, level: float = LEVEL, critical: float | None = None) -> float:
    """Power of the two-sided one-sample t-test on `n` rows.

    Args:
        effect: the mean over the standard deviation.
        critical: the smallest significant |t|; default: Student's.
    """
    from scipy.stats import chi2, norm, t

    shift = effect * math.sqrt(n)
    if n > NORMAL_FROM:
        z = norm.ppf(1 - level / 2)
        return float(norm.sf(z - shift) + norm.cdf(-z - shift))
    if n < 2:
        return 0.0
    # The noncentral t distribution as a mean over the sample's deviation, at equally likely values of it:
    # scipy's nct is NaN for some arguments.
    quantiles = (np.arange(2000) + 0.5) / 2000
    critical = float(t.ppf(1 - level / 2, n - 1)) if critical is None else critical
    thresholds = critical * np.sqrt(chi2.ppf(quantiles, n - 1) / (n - 1))
    return float((norm.sf(thresholds - shift) + norm.cdf(-thresholds - shift)).mean())


def power_record(pilot: Pilot, unit: str, level: float = LEVEL) -> dict:
    """What a metric's key `power` holds, on the scale of the metric.

    Returns:
        detectable: the difference that these rows detect with 80% power, None where no possible one is; observed: the
        size of the observed one; needed: rows for the observed one, None without one or without any spread. The rest
        is what `pilot_from_record` needs.
    """
    return {
        "n": pilot.n,
        "unit": unit,
        "detectable": pilot.detectable(pilot.n, level),
        "observed": abs(pilot.mean),
        "needed": pilot.needed(pilot.mean, level),
        "power": POWER,
        "level": level,
        "test": "permutation test" if pilot.decided is None else "sign test",
        "ties": None if pilot.decided is None else 1 - pilot.decided,
        "deviation": pilot.deviation,
        "step": pilot.step,
        "largest": pilot.largest,
    }


def pilot_from_record(record: dict) -> Pilot:
    """The pilot that a metric's key `power` was made from, as read from an artifact."""
    decided = None if record["ties"] is None else 1 - record["ties"]
    largest = math.inf if record["largest"] is None else record["largest"]
    return Pilot(record["n"], record["observed"], record["deviation"], decided, record["step"], largest)


def with_power(m: dict, rows, unit: str, null: float = 0.0, groups=None, level: float = LEVEL, scale: float = 1):
    """The metric `m` with its key `power`, from the rows that it is the mean of.

    Args:
        rows, null, groups: as for `pilot_of`; with groups of several rows the units are prompts.
        unit: what a row is, in the plural.
        scale: of the metric: 100 for percent.
    """
    pilot = pilot_of(rows, null, groups)
    record = power_record(pilot, "prompts" if pilot.n < len(rows) else unit, level)
    sizes = ("detectable", "observed", "deviation", "step", "largest")
    scaled = {key: None if record[key] is None else scale * record[key] for key in sizes}
    return {**m, "power": {**record, **scaled}}


def points(difference: float) -> str:
    """A difference of shares in percentage points."""
    return f"{number(100 * difference, 1)} points"


def power_sentence(m: dict, shown=points, what: str = "a difference", of: str = "") -> str:
    """The sentence below an inconclusive verdict about a metric; empty where its power is not known.

    Args:
        m: from `with_power`.
        shown: formats a difference.
        what: what is detected, e.g. "a change of perplexity".
        of: what the metric is about, where a verdict is about several.
    """
    record = m.get("power")
    if not record or record["n"] < 2:
        return ""
    n, unit, title = f"{record['n']:,}", record["unit"], f"Power, {of}" if of else "Power"
    if record["needed"] is None and not record["deviation"]:
        return f"{title}: unknown, since these {n} {unit} show no variation."
    # The tie rate limits what is possible: without decided rows nothing can be detected.
    ties = f", {record['ties']:.0%} ties" if record["ties"] else ""
    level = f"two-sided test at {100 * record['level']:.3g}%{ties}"
    if record["detectable"] is None:
        found = f"{title}: {n} {unit} are too few to detect any difference"
    else:
        found = f"{title}: {n} {unit} detect {what} of {shown(record['detectable'])} or more"
    found += f" with {record['power']:.0%} power ({level})"
    if record["needed"] is None:
        return f"{found}; the observed one is 0."
    return f"{found}; one of the observed size, {shown(record['observed'])}, needs {about(record['needed'])} {unit}."


def about(count: int) -> str:
    """`37`, `about 7,100`: numbers above 100 with two significant digits."""
    if count < 100:
        return f"{count}"
    digits = len(str(count)) - 2
    return f"about {round(count, -digits):,}"


def plan_rows(pilot: Pilot, needed: int | None, seconds: float | None) -> list[dict]:
    """The rows of --plan, `{n, detectable, seconds}`: fixed numbers of rows, the pilot's, and `needed` ones.

    Args:
        seconds: per row; None where it is not known.
    """
    counts = sorted({*PLANNED, pilot.n, *filter(None, [needed])})
    return [
        {"n": n, "detectable": pilot.detectable(n), "seconds": None if seconds is None else n * seconds} for n in counts
    ]


def plan_table(rows: list[dict], n: int, needed: int | None, unit: str, title: str, shown=points) -> str:
    """The table of --plan: number of rows against the detectable difference and the time.

    Args:
        rows: from `plan_rows`.
        n: rows of the pilot.
        needed: rows that the pilot's own difference needs.
    """
    lines = [(unit, f"difference detected with {POWER:.0%} power", "time", "")]
    for row in rows:
        marks = ["the pilot"] if row["n"] == n else []
        marks += ["for the pilot's difference"] if row["n"] == needed else []
        detectable = "none" if row["detectable"] is None else shown(row["detectable"])
        lines.append((f"{row['n']:,}", detectable, duration(row["seconds"]), ", ".join(marks)))
    return render_table(title, lines)
