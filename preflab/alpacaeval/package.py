"""The one place that touches the alpaca-eval package: its prompt, its order, its metrics, its leaderboard.

alpaca-eval 0.6.6 computes here and writes nothing: its caches, leaderboards and model weights would go into
site-packages by default, so its `evaluate` is never called.
"""

import json
import logging
import os
import re
import warnings
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import numpy as np

from preflab.data.chat_template import CONTROL_TOKENS, break_up
from preflab.judging.judge_prompt import JudgePrompt
from utils.artifacts import metric, write_text
from utils.errors import UserError
from utils.hub import fetch
from utils.provenance import sha256_of, sha256_of_files
from utils.stats import bootstrap

REPOSITORY = "tatsu-lab/alpaca_eval"
DATASETS = ("helpful_base", "koala", "oasst", "selfinstruct", "vicuna", "unknown")
VARIANTS = ("length_controlled_v1", "length_controlled_minimal")
PUBLISHED = (
    "gemma-2b-it", "gemma-7b-it", "gemma-2-9b-it-DPO", "gemma-2-9b-it-SimPO", "SPPO-Gemma-2-9B-It-PairRM",
    "gpt4_1106_preview",
)  # fmt: skip


@contextmanager
def quiet():
    """Without the deprecation warnings of an old package under new libraries, its bars, its root-level log lines, and
    what its regression's C code says on the error stream."""
    level, stream = logging.getLogger().level, os.dup(2)
    with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stream, 2)
            os.close(stream)
            logging.getLogger().setLevel(level)


def folder() -> Path:
    """Where the package lies."""
    with quiet():
        import alpaca_eval
    return Path(alpaca_eval.__file__).parent


def clf_prompt() -> JudgePrompt:
    """The package's alpaca_eval_clf prompt: one token, `m` for a better first output, `M` for a better second."""
    path = folder() / "evaluators_configs/alpaca_eval_clf_gpt4_turbo/alpaca_eval_clf.txt"
    parts = {}
    for turn in path.read_text(encoding="utf-8").split("<|im_start|>")[1:]:
        role, _, content = turn.partition("\n")
        parts[role.strip()] = content.replace("<|im_end|>", "").strip()
    user = parts["user"]
    for theirs, ours in (("{instruction}", "{prompt}"), ("{output_1}", "{answer_1}"), ("{output_2}", "{answer_2}")):
        user = user.replace(theirs, ours)
    labels = {"m": (1.0, 1), "M": (0.0, 1)}
    return JudgePrompt("alpaca_eval_clf.txt", user, labels, "logprob", parts["system"], max_new_tokens=1)


def is_switched(instruction: str, seed: int = 0) -> bool:
    """Whether the package shows the second output first: alike for all models, drawn from the instruction."""
    with quiet():
        from alpaca_eval.utils import random_seeded_choice

    return random_seeded_choice(f"is_switched_outputs{instruction}{seed}", choices=[False, True])


# ---------------------------------------------------------------------------------------------------------- metrics


def rates(annotations: list[dict], seed: int) -> dict:
    """The package's head-to-head figures of one model, in percent, with bootstrap intervals for its two rates.

    win_rate and discrete_win_rate carry the bootstrap's standard error; `standard_error` is the package's own.
    """
    with quiet():
        from alpaca_eval.metrics import get_winrate

        parsed = [a["preference"] for a in annotations if a["preference"] is not None]
        found = get_winrate([{"preference": p} for p in parsed])
    preference = np.array(parsed)
    discrete = np.select([preference > 1.5, preference < 1.5], [1.0, 0.0], 0.5)
    n = len(parsed)
    metrics = {
        "win_rate": {**bootstrap(100 * (preference - 1), seed), "value": float(found["win_rate"])},
        "discrete_win_rate": {**bootstrap(100 * discrete, seed), "value": float(found["discrete_win_rate"])},
        "standard_error": metric(float(found["standard_error"]), n=n),
        "avg_length": bootstrap([len(a["output_2"]) for a in annotations], seed),
        "unparsed": metric(len(annotations) - n, n=len(annotations)),
    }
    # The package's own figure is the mean length cut to a whole number.
    metrics["avg_length"]["value"] = int(np.mean([len(a["output_2"]) for a in annotations]))
    cut = [a["finish_reason"] == "length" for a in annotations if a.get("finish_reason") is not None]
    if cut:
        metrics["truncated_share"] = bootstrap(cut, seed)
    orders = [[o["preference"] for o in a.get("orders", [])] for a in annotations]
    both = [two for two in orders if len(two) == 2 and None not in two]
    if both:
        metrics["flip_rate"] = bootstrap([(a > 1.5) != (b > 1.5) or (a < 1.5) != (b < 1.5) for a, b in both], seed)
    mass = [o["mass"] for a in annotations for o in a.get("orders", []) if o.get("mass") is not None]
    if mass:
        metrics["verdict_mass_median"] = metric(float(np.median(mass)), n=len(mass))
        metrics["verdict_mass_below_half"] = metric(float(np.mean(np.array(mass) < 0.5)), n=len(mass))
    return metrics | {k: metric(int(found[k]), n=n) for k in ("n_wins", "n_wins_base", "n_draws", "n_total")}


def one_sided(annotations: list[dict]) -> bool:
    """Whether every judgement is a whole win, or every one a whole loss."""
    return {row["preference"] for row in annotations} in ({1.0}, {2.0})


class LengthControl:
    """Length-controlled win rates through the package's own regression, whatever the order of the rows.

    The package looks an instruction's difficulty up by its row number in AlpacaEval, so rows are joined by instruction
    first. Calibrated on GPT-4 Turbo's judgements.
    """

    def __init__(self, variant: str, positions: dict[str, int], calibration: Path):
        self.variant, self.positions, self.calibration = variant, positions, calibration

    def fit(self, annotations: list[dict]) -> tuple[float, float]:
        """(length_controlled_winrate, lc_standard_error) of the package, in percent.

        NaN where every judgement is a whole win, or every one a whole loss: the regression sees one class then, keeps
        its coefficients at 0 and would say 50 (or 100).
        """
        if one_sided(annotations):
            return float("nan"), float("nan")
        with quiet():
            import pandas as pd
            from alpaca_eval.metrics import glm_winrate

            keys = ("preference", "output_1", "output_2", "generator_1", "generator_2")
            frame = pd.DataFrame([{k: a[k] for k in keys} for a in annotations])
            frame.index = [self.positions[a["instruction"]] for a in annotations]
            whole, glm_winrate.hf_hub_download = glm_winrate.hf_hub_download, lambda **_: str(self.calibration)
            try:
                found = glm_winrate.get_length_controlled_winrate(
                    frame.sort_index(kind="stable"),
                    glm_name=self.variant,
                    save_weights_dir=None,
                    is_add_glm_preference_inplace=False,
                    is_warn_extreme_changes=False,
                )
            finally:
                glm_winrate.hf_hub_download = whole
        return float(found["length_controlled_winrate"]), float(found["lc_standard_error"])

    def bootstrap(self, sides: dict[str, list[dict]], seed: int, resamples: int) -> dict:
        """Rates of each side, and of their differences from the first, with intervals by refitting on resampled rows.

        Args:
            sides: `{name: annotations}`, row k of each on the same instruction.
        """
        known = {}

        def rate(name, rows):
            key = (name, rows.tobytes())
            if key not in known:
                known[key] = self.fit([sides[name][int(i)] for i in rows.ravel()])[0]
            return known[key]

        first, *others = sides
        index = np.arange(len(sides[first]))
        found = {}
        for name in sides:
            found[name] = bootstrap(index, seed, resamples, lambda rows, name=name: rate(name, rows))
        for name in others:
            found[f"{name} - {first}"] = bootstrap(
                index, seed, resamples, lambda rows, name=name: rate(name, rows) - rate(first, rows)
            )
        return found


def length_control(annotations: list[dict], stub: Path) -> tuple[LengthControl, str | None]:
    """The length control that these rows' instructions allow, and why it is not the whole one.

    The whole one needs every instruction to be AlpacaEval's, and the calibration file of the hub. Without, the
    package's minimal variant knows nothing of difficulty and needs no calibration.

    Args:
        stub: where the minimal variant's empty calibration file may be written.
    """
    instructions = [row["instruction"] for row in annotations]
    try:
        # Rows that say themselves to be of another set need no hub to be told so.
        if not any(row.get("dataset", "unknown") in DATASETS for row in annotations):
            raise UserError("the instructions are not AlpacaEval's")
        rows = json.loads(fetch(REPOSITORY, "alpaca_eval_gpt4_baseline.json", "dataset").read_text(encoding="utf-8"))
        positions = {row["instruction"]: i for i, row in enumerate(rows)}
        strangers = [text for text in instructions if text not in positions]
        if not strangers:
            return LengthControl(VARIANTS[0], positions, fetch(REPOSITORY, "df_gamed.csv", "dataset")), None
        why = f"{len(strangers)} of {len(instructions)} instructions are not AlpacaEval's"
    except UserError as error:
        why = str(error) if "AlpacaEval's" in str(error) else f"the calibration file cannot be had ({error})"
    lines = [f"0.5,0.0,0.0,False,{i},none" for i in range(len(instructions))]
    head = "preference,std_delta_len,instruction_difficulty,not_gamed_baseline,index,model"
    stub = stub.with_name(f"{stub.stem}-{len(instructions)}{stub.suffix}")
    write_text(stub, "\n".join([head, *lines]) + "\n")
    positions = {text: i for i, text in enumerate(dict.fromkeys(instructions))}
    return LengthControl(VARIANTS[1], positions, stub), why


def published_rows(extra: dict | None = None) -> dict:
    """`{name: {win_rate, length_controlled_winrate, avg_length, source}}` of AlpacaEval 2's leaderboard, as published.

    Args:
        extra: rows that the package's leaderboard lacks, with their source.
    """
    import csv

    path = folder() / "leaderboards/data_AlpacaEval_2/weighted_alpaca_eval_gpt4_turbo_leaderboard.csv"
    with path.open(encoding="utf-8") as f:
        rows = {row[""]: row for row in csv.DictReader(f)}
    keys = ("win_rate", "length_controlled_winrate", "avg_length")
    found = {
        name: {**{k: float(rows[name][k]) for k in keys}, "source": "alpaca-eval's leaderboard"} for name in PUBLISHED
    }
    return {**found, **(extra or {})}


# ---------------------------------------------------------------------------------------------- evaluators by name


def shipped_evaluators() -> list[str]:
    """The names of the evaluator configs that the package ships."""
    return sorted(p.parent.name for p in (folder() / "evaluators_configs").glob("*/configs.yaml"))


class PackageEvaluator:
    """A judge that alpaca-eval ships, run by the package itself, which decides on the order of the outputs.

    Raises UserError where the evaluator needs a package that is not installed.
    """

    orders_itself = True

    def __init__(self, name: str, seed: int = 0):
        self.name, self.seed = name, seed
        try:
            with quiet():
                from alpaca_eval.annotators import PairwiseAnnotator

                self.annotator = PairwiseAnnotator(
                    annotators_config=name, caching_path=None, is_avoid_reannotations=False, seed=seed
                )
        except ImportError as error:
            raise UserError(
                f"--judge {name}: alpaca-eval needs {error.name} for it: pip install {error.name}"
            ) from None

    def identity(self) -> dict:
        """Its files, and where its calls go."""
        files = [p for p in (folder() / "evaluators_configs" / self.name).iterdir() if p.is_file()]
        where = {k: os.environ.get(k) for k in ("OPENAI_BASE_URL", "OPENAI_API_BASE", "OPENAI_CLIENT_CONFIG_PATH")}
        return {
            "judge": f"alpaca_eval:{self.name}",
            "seed": self.seed,
            "files_sha256": sha256_of_files(files),
            "where_sha256": sha256_of(str(where)),
        }

    def judge(self, items):
        from preflab.judging.judge_prompt import Verdict, unparsed

        failures = 0
        for start in range(0, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            rows = [
                {"instruction": plain(i.prompt.text), "output_1": plain(i.first), "output_2": plain(i.second)}
                for i in chunk
            ]
            found, error = {}, "not asked: the calls before it failed"
            if failures < 2:
                try:
                    with quiet():
                        logging.getLogger().setLevel(logging.ERROR)
                        answered = self.annotator.annotate_pairs(rows)
                    found = {(a["instruction"], a["output_1"], a["output_2"]): a.get("preference") for a in answered}
                    failures = 0
                except Exception as e:  # whatever an old client throws is no verdict
                    failures += 1
                    error = f"{type(e).__name__}: {str(e).splitlines()[0][:200] if str(e) else ''}"
            for k, row in enumerate(rows):
                preference = found.get(tuple(row.values()))
                if not found:
                    yield start + k, unparsed(error)
                elif preference is None or not 1 <= preference <= 2:
                    yield start + k, unparsed(f"the package parsed no verdict ({preference})")
                else:
                    first = 0.5 + 0.5 * ((preference < 1.5) - (preference > 1.5))
                    yield start + k, Verdict(first, 2 - float(preference))


def plain(text: str) -> str:
    """`text` without what the package would take for its own: it fills placeholders one after another, and splits a
    prompt at the control tokens in an answer."""
    return break_up(PLACEHOLDER, break_up(CONTROL_TOKENS, text))


CHUNK = 32
PLACEHOLDER = re.compile(r"\{(instruction|output_1|output_2)\}")
