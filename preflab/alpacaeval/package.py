"""Adapter to the alpaca-eval package: its judge prompt, output order, metrics, evaluators and leaderboard.

No other module imports alpaca_eval. Its `evaluate` is never called: by default it writes caches, leaderboards and
regression weights into site-packages. Written against alpaca-eval 0.6.6.
"""

import csv
import json
import logging
import os
import re
import warnings
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np

from preflab.data.chat_template import CONTROL_TOKENS, break_up
from preflab.data.sources import folded
from preflab.judging.judge_prompt import JudgePrompt, Verdict, unparsed
from utils.artifacts import metric, write_text
from utils.errors import UserError
from utils.hub import fetch
from utils.provenance import sha256_of, sha256_of_files
from utils.stats import bootstrap, share

REPOSITORY = "tatsu-lab/alpaca_eval"
# The judge of AlpacaEval 2's leaderboard.
LEADERBOARD_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
# The `dataset` column of AlpacaEval's 805 instructions; "unknown" is the package's default for rows without one.
DATASETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna", "unknown")
# Regressions of the package: with and without the difficulty of each instruction.
VARIANTS = ("length_controlled_v1", "length_controlled_minimal")
PUBLISHED = (
    "gemma-2b-it", "gemma-7b-it", "gemma-2-9b-it-DPO", "gemma-2-9b-it-SimPO", "SPPO-Gemma-2-9B-It-PairRM",
    "gpt4_1106_preview",
)  # fmt: skip


# Fewest judged rows for length control: the package's regression is fitted by cross-validation.
MIN_LC_ROWS = 50
# Pairs per call of a package evaluator: results are cached after each call.
CHUNK = 32
# Placeholders that the package fills one after another, also inside texts that it has already inserted.
PLACEHOLDER = re.compile(r"\{(instruction|output_1|output_2)\}")


@contextmanager
def quiet():
    """Silence the package: deprecation warnings, progress bars, root-level logging and its regression's C output."""
    # redirect_stderr replaces Python's sys.stderr only; C code writes to file descriptor 2, which `stream` restores.
    level, stream = logging.getLogger().level, os.dup(2)
    with warnings.catch_warnings(), open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            # Importing the package sets the root logger's level.
            logging.getLogger().setLevel(level)


def package_folder() -> Path:
    """The folder of the installed package."""
    with quiet():
        # Imported late everywhere in this module: the import is slow and changes logging.
        import alpaca_eval
    return Path(alpaca_eval.__file__).parent


def clf_prompt() -> JudgePrompt:
    """The package's alpaca_eval_clf prompt: the judge answers with one token, `m` (first output better) or `M`."""
    path = package_folder() / "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    parts = {}
    # The file is in ChatML: <|im_start|>role, newline, content, <|im_end|>.
    for turn in path.read_text(encoding="utf-8").split("<|im_start|>")[1:]:
        role, _, content = turn.partition("\n")
        parts[role.strip()] = content.replace("<|im_end|>", "").strip()
    user = parts["user"]
    placeholders = {"{instruction}": "{prompt}", "{output_1}": "{answer_1}", "{output_2}": "{answer_2}"}
    for package_name, own_name in placeholders.items():
        user = user.replace(package_name, own_name)
    # (outcome of the first answer, votes). The labels differ in case only, so they may not be compared in lower case.
    labels = {"m": (1.0, 1), "M": (0.0, 1)}
    return JudgePrompt("alpaca_eval_clf.txt", user, labels, "logprob", parts["system"], 1, label_only=True)


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the package shows the second output first: drawn from the instruction, so equal for all models."""
    with quiet():
        from alpaca_eval.utils import random_seeded_choice

    # The same seed text as in the package's RandomSwitchTwoColumnsProcessor, so that both give the same orders.
    return random_seeded_choice(f"is_switched_outputs{instruction}{seed}", choices=[False, True])


# ---------------------------------------------------------------------------------------------------------- metrics


def prompt_groups(annotations: list[dict]) -> list[str]:
    """The group of each row for resampling: instructions that differ only in case and spacing are one prompt."""
    return [folded(row["instruction"]) for row in annotations]


def rates(annotations: list[dict], seed: int) -> dict:
    """The package's win rates of one model, in percent, with bootstrap intervals.

    Returns:
        win_rate and discrete_win_rate with the bootstrap's standard error; standard_error, the package's own; counts
        of wins, losses, draws and rows without a verdict; avg_length in characters. Where the rows have it:
        truncated_share, flip_rate (both orders judged), verdict_mass_* (label probability of a logprob judge).
    """
    with quiet():
        from alpaca_eval.metrics import get_winrate

        judged = [row for row in annotations if row["preference"] is not None]
        parsed = [row["preference"] for row in judged]
        # From the package, so that reported values equal those of its leaderboard; intervals are added below.
        package_rates = get_winrate([{"preference": p} for p in parsed])
    preference = np.array(parsed)
    discrete = np.select([preference > 1.5, preference < 1.5], [1.0, 0.0], 0.5)
    n, groups, all_groups = len(parsed), prompt_groups(judged), prompt_groups(annotations)
    lengths = [len(row["output_2"]) for row in annotations]
    metrics = {
        # The value is the package's, the interval the bootstrap's; both are means of preference - 1.
        "win_rate": {**share(preference - 1, seed, 100, groups), "value": float(package_rates["win_rate"])},
        "discrete_win_rate": {
            **share(discrete, seed, 100, groups),
            "value": float(package_rates["discrete_win_rate"]),
        },
        "standard_error": metric(float(package_rates["standard_error"]), n=n),
        # The package truncates the mean length to an integer.
        "avg_length": {**bootstrap(lengths, seed, groups=all_groups), "value": int(np.mean(lengths))},
        "unparsed": metric(len(annotations) - n, n=len(annotations)),
    }
    ended = [row for row in annotations if row.get("finish_reason") is not None]
    if ended:
        truncated = [row["finish_reason"] == "length" for row in ended]
        metrics["truncated_share"] = share(truncated, seed, groups=prompt_groups(ended))
    # Preferences are in terms of output_1 and output_2 already, so a consistent judge gives equal ones in both orders.
    orders = [[order["preference"] for order in row.get("orders", [])] for row in annotations]
    both = [k for k, pair in enumerate(orders) if len(pair) == 2 and None not in pair]
    if both:
        flipped = [(a > 1.5) != (b > 1.5) or (a < 1.5) != (b < 1.5) for a, b in (orders[k] for k in both)]
        metrics["flip_rate"] = share(flipped, seed, groups=[all_groups[k] for k in both])
    mass = [order["mass"] for row in annotations for order in row.get("orders", []) if order.get("mass") is not None]
    if mass:
        metrics["verdict_mass_median"] = metric(float(np.median(mass)), n=len(mass))
        metrics["verdict_mass_below_half"] = metric(float(np.mean(np.array(mass) < 0.5)), n=len(mass))
    return metrics | {k: metric(int(package_rates[k]), n=n) for k in ("n_wins", "n_wins_base", "n_draws", "n_total")}


def one_sided(annotations: list[dict]) -> bool:
    """Whether all judgements are full wins, or all are full losses."""
    return {row["preference"] for row in annotations} in ({1.0}, {2.0})


def why_no_fit(annotations: list[dict]) -> str | None:
    """Why these judged rows have no length-controlled rate; None where the regression can be fitted."""
    rows = len(annotations)
    if one_sided(annotations):
        return "one model won or lost every judgement, so the package's regression is undefined"
    if rows < MIN_LC_ROWS:
        return f"{rows} judged rows are too few for the package's cross-validated fit (at least {MIN_LC_ROWS})"
    if len({len(row["output_1"]) - len(row["output_2"]) for row in annotations}) == 1:
        return "every output differs from its reference by the same number of characters: length has no effect to fit"
    return None


NOT_FITTED = (
    "the package's regression left all its coefficients at zero, which gives 50.0 whatever was judged; judge more"
    " instructions"
)


class LengthControl:
    """Length-controlled win rates by the package's own regression (Dubois et al. 2024), for rows in any order.

    The package looks up an instruction's difficulty by row number, so rows are joined by instruction text first. The
    regression's prior is calibrated on GPT-4 Turbo's judgements.

    Args:
        variant: one of VARIANTS.
        positions: row number of each instruction in AlpacaEval.
        calibration: the package's df_gamed.csv.
    """

    def __init__(self, variant: str, positions: dict[str, int], calibration: Path):
        self.variant, self.positions, self.calibration = variant, positions, calibration

    def fit(self, annotations: list[dict]) -> tuple[float, float]:
        """(length_controlled_winrate, lc_standard_error) of the package, in percent.

        NaN where the regression keeps all its coefficients at 0 and returns 50 whatever was judged: on one-sided
        judgements, which are one class, and where cross-validation chooses the strongest penalty.
        """
        if one_sided(annotations):
            return float("nan"), float("nan")
        fits = []
        with quiet():
            import pandas as pd
            from alpaca_eval.metrics import glm_winrate

            keys = ("preference", "output_1", "output_2", "generator_1", "generator_2")
            frame = pd.DataFrame([{k: row[k] for k in keys} for row in annotations])
            # The index becomes the column `index`, by which the package looks up the difficulty of an instruction.
            frame.index = [self.positions[row["instruction"]] for row in annotations]
            # The package downloads its calibration file inside the fit; give it the local copy.
            download, glm_winrate.hf_hub_download = glm_winrate.hf_hub_download, lambda **_: str(self.calibration)
            fit = glm_winrate.fit_LogisticRegressionCV

            def remembered(*args, **kwargs):
                fits.append(fit(*args, **kwargs))
                return fits[-1]

            # The package returns predictions only, and the coefficients decide whether they mean something.
            glm_winrate.fit_LogisticRegressionCV = remembered
            try:
                fitted = glm_winrate.get_length_controlled_winrate(
                    # The folds of the cross-validation depend on the rows' order, the result must not. Stable, because
                    # a resample repeats instructions.
                    frame.sort_index(kind="stable"),
                    glm_name=self.variant,
                    # With "auto", the package writes the fitted weights into its own folder in site-packages.
                    save_weights_dir=None,
                    is_add_glm_preference_inplace=False,
                    is_warn_extreme_changes=False,
                )
            finally:
                glm_winrate.hf_hub_download, glm_winrate.fit_LogisticRegressionCV = download, fit
        if fits and not fits[-1].coef_.any():
            return float("nan"), float("nan")
        return float(fitted["length_controlled_winrate"]), float(fitted["lc_standard_error"])

    def bootstrap(self, sides: dict[str, list[dict]], seed: int, resamples: int) -> dict:
        """Rates of each side and differences from the first side, with intervals from refits on resampled rows.

        Args:
            sides: `{name: annotations}`; row k of every side is on the same instruction.
        """
        # All statistics below see the same resamples (same seed), so each side is fitted once per resample.
        fitted, groups = {}, prompt_groups(next(iter(sides.values())))

        def rate(name, rows):
            # The resampled row numbers identify a fit; fits are slow, so the difference reuses those of its sides.
            key = (name, rows.tobytes())
            if key not in fitted:
                fitted[key] = self.fit([sides[name][int(i)] for i in rows.ravel()])[0]
            return fitted[key]

        first, *others = sides
        # Row numbers are resampled, not preferences, so that both models keep the same instructions in each resample.
        index = np.arange(len(sides[first]))
        rates = {}
        for name in sides:
            rates[name] = bootstrap(
                index, seed, resamples, lambda rows, name=name: rate(name, rows), bca=False, groups=groups
            )
        for name in others:
            rates[f"{name} - {first}"] = bootstrap(
                index, seed, resamples, lambda rows, name=name: rate(name, rows) - rate(first, rows), bca=False,
                groups=groups,
            )  # fmt: skip
        return rates


def length_control(annotations: list[dict], stub: Path) -> tuple[LengthControl, str | None]:
    """The length control that these instructions allow, and the reason where it is not AlpacaEval 2's.

    AlpacaEval 2's variant needs every instruction to be AlpacaEval's and the calibration file from the hub. Otherwise
    the package's minimal variant is used: no difficulty of instructions, no calibration.

    Args:
        stub: path for the minimal variant's empty calibration file.
    """
    instructions = [row["instruction"] for row in annotations]
    try:
        # Rows that name another dataset need no download.
        if not any(row.get("dataset", "unknown") in DATASETS for row in annotations):
            raise UserError("the instructions are not AlpacaEval's")
        # The order of the rows in this file defines the row numbers that the difficulties refer to.
        rows = json.loads(fetch(REPOSITORY, "alpaca_eval_gpt4_baseline.json", "dataset").read_text(encoding="utf-8"))
        positions = {row["instruction"]: i for i, row in enumerate(rows)}
        unknown = [text for text in instructions if text not in positions]
        if not unknown:
            return LengthControl(VARIANTS[0], positions, fetch(REPOSITORY, "df_gamed.csv", "dataset")), None
        reason = f"{len(unknown)} of {len(instructions)} instructions are not AlpacaEval's"
    except UserError as error:
        reason = str(error) if "AlpacaEval's" in str(error) else f"the calibration file is not available ({error})"
    # The package reads the file for every variant. The minimal one uses no value of it, but needs a row per index.
    lines = [f"0.5,0.0,0.0,False,{i},none" for i in range(len(instructions))]
    head = "preference,std_delta_len,instruction_difficulty,not_gamed_baseline,index,model"
    # One file per size, so that concurrent calls do not overwrite a file that another one reads.
    stub = stub.with_name(f"{stub.stem}-{len(instructions)}{stub.suffix}")
    write_text(stub, "\n".join([head, *lines]) + "\n")
    positions = {text: i for i, text in enumerate(dict.fromkeys(instructions))}
    return LengthControl(VARIANTS[1], positions, stub), reason


def published_rows(extra: dict | None = None) -> dict:
    """`{name: {win_rate, length_controlled_winrate, avg_length, source}}` from AlpacaEval 2's shipped leaderboard.

    Args:
        extra: further rows, with their source.
    """
    path = package_folder() / "leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
    with path.open(encoding="utf-8") as f:
        rows = {row[""]: row for row in csv.DictReader(f)}
    keys = ("win_rate", "length_controlled_winrate", "avg_length")
    shipped = {
        name: {**{k: float(rows[name][k]) for k in keys}, "source": "alpaca-eval's leaderboard"} for name in PUBLISHED
    }
    return {**shipped, **(extra or {})}


# ------------------------------------------------------------------------------------------------ shipped evaluators


def shipped_evaluators() -> list[str]:
    """The names of the evaluator configs that the package ships."""
    return sorted(p.parent.name for p in (package_folder() / "evaluators_configs").glob("*/configs.yaml"))


class PackageEvaluator:
    """A judge that alpaca-eval ships, run by the package, which also chooses the order of the outputs.

    Raises UserError where the evaluator needs a package that is not installed.
    """

    instant, orders_itself = False, True

    def __init__(self, name: str, seed: int = 0):
        self.name, self.seed = name, seed
        try:
            with quiet():
                from alpaca_eval.annotators import PairwiseAnnotator

                # No cache of the package: this project caches verdicts by their full identity.
                self.annotator = PairwiseAnnotator(
                    annotators_config=name, caching_path=None, is_avoid_reannotations=False, seed=seed
                )
        except ImportError as error:
            raise UserError(
                f"--judge {name}: alpaca-eval needs {error.name} for this evaluator: pip install {error.name}"
            ) from None

    def identity(self) -> dict:
        """Hashes of its config files and of the endpoint variables: what a cached verdict depends on."""
        files = [p for p in (package_folder() / "evaluators_configs" / self.name).iterdir() if p.is_file()]
        # Hashed, not stored: an endpoint's address may be confidential.
        endpoint = {k: os.environ.get(k) for k in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH")}
        return {
            "judge": f"alpaca_eval:{self.name}",
            "seed": self.seed,
            "files_sha256": sha256_of_files(files),
            "where_sha256": sha256_of(str(endpoint)),
        }

    def judge(self, items):
        """Yield (index, Verdict) of each item, in chunks; after two failed calls the rest is left unparsed."""
        # Consecutive failures: two in a row indicate a wrong key or endpoint rather than one bad answer.
        failures = 0
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            rows = [
                {
                    "instruction": neutralise(item.prompt.text),
                    "output_1": neutralise(item.first),
                    "output_2": neutralise(item.second),
                }
                for item in chunk
            ]
            preferences, error = {}, "not requested: the calls before it failed"
            if failures < 2:
                try:
                    with quiet():
                        logging.getLogger().setLevel(logging.ERROR)
                        annotated = self.annotator.annotate_pairs(rows)
                    preferences = {
                        # Matched by content, since the package may drop or reorder rows. Texts are neutralised on both
                        # sides.
                        (row["instruction"], row["output_1"], row["output_2"]): row.get("preference")
                        for row in annotated
                    }
                    failures = 0
                except Exception as e:  # the package's clients raise many types; each means that there is no verdict
                    failures += 1
                    error = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            for k, row in enumerate(rows):
                preference = preferences.get(tuple(row.values()))
                if not preferences:
                    yield start + k, unparsed(error)
                elif preference is None or not 1 <= preference <= 2:
                    yield start + k, unparsed(f"the package parsed no verdict ({preference})")
                else:
                    # preference 1 is output_1, the first answer; 2 - preference is its probability.
                    first = 0.5 + 0.5 * ((preference < 1.5) - (preference > 1.5))
                    yield start + k, Verdict(first, 2 - float(preference))


def neutralise(text: str) -> str:
    """Break up placeholders and control tokens in `text`.

    The package fills its placeholders one after another, so that one inside an answer would be filled too, and it
    splits a prompt at control tokens.
    """
    return break_up(PLACEHOLDER, break_up(CONTROL_TOKENS, text))
