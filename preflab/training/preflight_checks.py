"""Which figures of a preflight are fatal and which deserve a warning, in words, with the fix."""

from collections import Counter
from collections.abc import Iterable

from preflab.data.reading_report import unit_of
from utils.errors import UserError

# Shares from which a finding is a warning, and from which it is fatal.
TRUNCATED = (0.1, 0.9)
DUPLICATES = (0.1, 0.8)
SAME_PROMPT = 0.5
ENDED = 0.5
# Fewer rows say nothing about repetition.
FEWEST_ROWS = 4
# Learning rates of published recipes, (lowest, highest, source). A rate outside by RATE_FACTOR is fatal.
RATE_FACTOR = 100
RATES = {
    "DPO, LoRA": (5e-7, 2e-4, "configs/juanako-7b-v1-dpo-1.yaml, configs/quickstart.yaml"),
    "DPO, full": (5e-7, 1e-6, "configs/gemma-2-9b-it-dpo.yaml, TRL's default"),
    "SimPO, LoRA": (5e-7, 2e-4, "as DPO: no SimPO recipe uses LoRA"),
    "SimPO, full": (3e-7, 1e-6, "configs/gemma-2-9b-it-simpo.yaml, arXiv 2405.14734"),
    "SPPO, LoRA": (5e-7, 4e-4, "configs/quickstart-sppo-iter1.yaml"),
    "SPPO, full": (5e-7, 5e-7, "configs/gemma-2-9b-it-sppo-iter1.yaml"),
    "reward, LoRA": (1e-5, 2e-4, "arXiv 2406.10216 (GRM), TRL's default"),
    "reward, full": (5e-7, 9e-6, "configs/llama-3-8b-rm.yaml, OpenRLHF's example"),
    "SFT, LoRA": (2e-5, 2e-4, "configs/llama3-8b-alpaca-sft.yaml, TRL's default"),
    "SFT, full": (5e-6, 2e-5, "arXiv 2411.15124 (Tulu 3), TRL's default"),
}


def check_flight(flight: dict, config, model_args, trial: bool) -> dict[str, list[str]]:
    """Sentences about figures with which training would be useless (fatal) or doubtful (warning).

    Args:
        flight: the content of preflight.json, with `repetition`.
        config: the run's RunConfig.
        model_args: TRL's ModelConfig.
        trial: whether the run is a trial on some rows (--limit), which often has fewer steps than warm-up.

    Returns:
        `{"fatal": [...], "warning": [...]}`, each sentence with its fix.
    """
    result = {"fatal": [], "warning": []}
    for severity, sentence in [
        *_trainable(flight),
        *_truncation(flight, config),
        *_end_tokens(flight),
        *_schedule(flight["plan"], config, trial),
        *_learning_rate(config, model_args),
        *_repetition(flight),
    ]:
        result[severity].append(sentence)
    return result


def refuse_fatal(findings: dict[str, list[str]], allowed: bool) -> None:
    """Raise UserError with the first fatal finding, unless they are allowed."""
    fatal = findings["fatal"]
    if fatal and not allowed:
        more = f" ({len(fatal) - 1} more above)" if len(fatal) > 1 else ""
        raise UserError(f"preflight: {fatal[0]}; or train anyway with --allow_fatal{more}")


def _trainable(flight: dict) -> Iterable[tuple[str, str]]:
    if not flight["parameters"]["trainable"]:
        yield "fatal", "no parameter is trained: check --use_peft, --lora_target_modules and --start_adapter_use"


def _truncation(flight: dict, config) -> Iterable[tuple[str, str]]:
    """Truncated rows, and pairs whose answers became equal by it."""
    train, counts = flight["train"], flight["truncation"]
    total = tokenised(train)
    # Per part of a pair; the most frequent part counts.
    cut, part = max((n, name) for name, n in {"": 0, **counts}.items() if not name or name.startswith("truncated"))
    unit = unit_of(train)
    severity = _severity(cut / total, TRUNCATED)
    if severity:
        name = part.removeprefix("truncated").replace("_", " ").strip()
        of = f"of {unit} the {name} was" if name else f"of {unit} were"
        yield severity, f"in {cut / total:.0%} {of} truncated to --max_length {config.max_length}: raise it"
    longer = train["dropped"].get("longer_than_max_length", 0)
    severity = _severity(longer / total, TRUNCATED)
    if severity:
        yield (
            severity,
            f"{longer} of {total} pairs were left out, being longer than --max_length {config.max_length}: raise it",
        )
    identical = train["dropped"].get("identical_after_truncation", 0)
    severity = _severity(identical / total, TRUNCATED)
    if severity:
        yield (
            severity,
            f"{identical} of {total} pairs were dropped, since their answers are equal up to --max_length"
            f" {config.max_length}: raise it",
        )


def _end_tokens(flight: dict) -> Iterable[tuple[str, str]]:
    """Answers without their end token: the model would learn to continue without stopping."""
    special = flight["special_tokens"]
    shares = {key.removesuffix("_with_end_token"): x for key, x in special.items() if key.endswith("_with_end_token")}
    share = min(shares.values())
    if share >= ENDED:
        return
    which = min(shares, key=shares.get)
    what = "conversations" if which == "conversations" else f"{which} answers"
    amount = f"no {what.removesuffix('s')} keeps its" if share == 0 else f"only {share:.0%} of {what} keep their"
    yield (
        "fatal" if share == 0 else "warning",
        f"{amount} end token, so the model does not learn to stop: raise --max_length, or give a chat template that"
        " ends answers (--chat_template_path)",
    )


def _schedule(plan: dict, config, trial: bool) -> Iterable[tuple[str, str]]:
    """Fewer steps than warm-up: the learning rate never reaches its value."""
    # Below 1 it is a share of the steps.
    warmup = config.warmup_steps or 0
    if warmup >= 1 and plan["steps"] <= warmup:
        rate = "is 0 in the only step" if plan["steps"] == 1 else f"does not reach {config.learning_rate:g}"
        yield (
            "warning" if trial else "fatal",
            f"{plan['steps']} steps, but --warmup_steps {warmup:g}: the learning rate {rate}; lower --warmup_steps"
            " (below 1: a share of the steps)",
        )


def rate_kind(config, use_peft: bool) -> str:
    """The key of RATES for a run: its objective, and whether it trains an adapter."""
    losses = set(config.objectives)
    name = "SFT" if losses == {"sft"} and not hasattr(config, "beta") else "DPO"
    name = "SimPO" if losses == {"simpo"} else "SPPO" if losses == {"sppo"} else name
    name = "reward" if losses == {"reward"} else name
    return f"{name}, {'LoRA' if use_peft else 'full'}"


def _learning_rate(config, model_args) -> Iterable[tuple[str, str]]:
    """A learning rate far from those of the recipes."""
    kind, rate = rate_kind(config, model_args.use_peft), config.learning_rate
    lowest, highest, source = RATES[kind]
    if not lowest / RATE_FACTOR < rate < highest * RATE_FACTOR:
        far, change = ("above", "lower") if rate > highest else ("below", "raise")
        factor = rate / highest if rate > highest else lowest / rate
        usual = f"{lowest:g}" if lowest == highest else f"{lowest:g} to {highest:g}"
        yield (
            "fatal",
            f"--learning_rate {rate:g} is a factor {factor:.0f} {far} what recipes use for {kind}: {usual} ({source});"
            f" {change} it",
        )


def _repetition(flight: dict) -> Iterable[tuple[str, str]]:
    """Prompts and rows that occur again and again."""
    train, repetition = flight["train"], flight["repetition"]
    rows = repetition["rows"]
    dropped = train["dropped"].get("duplicate_prompt", 0)
    severity = _severity(dropped / (dropped + rows), DUPLICATES)
    if severity and dropped + rows >= FEWEST_ROWS:
        yield (
            severity,
            f"{dropped} of {dropped + rows} rows repeat the prompt of an earlier row and were dropped: check that the"
            " prompt is read from the right column, or keep them with --keep_duplicate_prompts",
        )
    share = repetition["most_common_prompt"] / rows
    if share > SAME_PROMPT and rows >= FEWEST_ROWS:
        yield (
            "fatal",
            f"{repetition['most_common_prompt']} of {rows} rows have the same prompt: check that it is read from the"
            " right column",
        )
    if repetition["repeated_rows"] > DUPLICATES[0] * rows and rows >= FEWEST_ROWS:
        yield (
            "warning",
            f"{repetition['repeated_rows']} of {rows} rows are exact copies of an earlier row: remove them from the"
            " data",
        )


def repetition(prompts: Iterable, rows: Iterable) -> dict:
    """How often prompts and complete rows occur.

    Args:
        prompts: the prompt of each row, hashable.
        rows: each row as a whole, hashable.
    """
    # Hashes, so that the texts of large data sets are not held a second time.
    by_prompt, by_row = Counter(map(hash, prompts)), Counter(map(hash, rows))
    return {
        "rows": by_row.total(),
        "distinct_prompts": len(by_prompt),
        "most_common_prompt": max(by_prompt.values()),
        "repeated_rows": by_row.total() - len(by_row),
    }


def tokenised(split: dict) -> int:
    """Rows of a split that were tokenised, those dropped only then included, from its summary."""
    dropped = ("identical_after_truncation", "empty_prompt", "nothing_left_to_train_on", "longer_than_max_length")
    return split[unit_of(split)] + sum(split["dropped"].get(k, 0) for k in dropped)


def _severity(share: float, limits: tuple[float, float]) -> str | None:
    """How bad a share is, "fatal", "warning" or None, by the limits of both."""
    return "fatal" if share >= limits[1] else "warning" if share >= limits[0] else None
