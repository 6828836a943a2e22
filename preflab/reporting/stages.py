"""What each stage answers, and its figures as tables: base beside tuned, with intervals and tests."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from preflab.alpacaeval.report import table_lines as alpacaeval_lines
from preflab.evaluation.perplexity_report import SECTIONS
from preflab.evaluation.reward_table import SIDES, comparison_row
from preflab.evaluation.win_rate_report import table_lines as win_rate_lines
from preflab.gguf.report import table_lines as gguf_lines
from preflab.judging.battle_report import judge_lines, panel_lines, panel_notes
from preflab.pairs.report import pair_lines
from preflab.reporting.artifacts import Artifact
from preflab.rewards.report import best_of_lines
from preflab.rewards.report import pair_lines as scorer_lines
from preflab.training.dpo_report import table_lines as dpo_lines
from preflab.training.kto_report import table_lines as kto_lines
from preflab.training.reward_report import table_lines as reward_lines
from preflab.training.sft_report import table_lines as sft_lines
from utils.tables import cell, difference, estimate, number, p_value


@dataclass
class Table:
    """A table of texts.

    Attributes:
        lines: the head first; a line of one text spans all columns.
        title: above it.
        note: below it.
    """

    lines: list[tuple]
    title: str = ""
    note: str = ""

    @property
    def head(self) -> tuple:
        """Its columns."""
        return self.lines[0]

    @property
    def body(self) -> list[tuple]:
        """Its lines without the head."""
        return self.lines[1:]

    @property
    def words(self) -> list[bool]:
        """Of each column, whether it holds words, not figures; the first always does."""
        lines = [line for line in self.body if len(line) == len(self.head)]
        return [k == 0 or any(map(_is_words, (line[k] for line in lines))) for k in range(len(self.head))]


def _is_words(cell: str) -> bool:
    return bool(re.search("[A-Za-z]{3}", cell)) and not re.match(r"[-+<\d]", cell)


@dataclass(frozen=True)
class Stage:
    """A kind of artifact.

    Attributes:
        title: of its section.
        question: that it answers.
        command: that writes it, without the flags that name the run.
        tables: makes its tables from an artifact.
    """

    title: str
    question: str
    command: str
    tables: Callable[[Artifact], list[Table]] = field(repr=False)


def tables_of(artifact: Artifact) -> tuple[list[Table], str | None]:
    """(tables of an artifact, what is wrong with it or None)."""
    if artifact.problem:
        return [], artifact.problem
    stage = STAGES.get(artifact.stage)
    if stage is None:
        return [], f"stage {artifact.stage} is unknown to this report"
    try:
        return stage.tables(artifact), None
    except KeyError as error:
        return [], f"has no {error.args[0]}"
    except (TypeError, ValueError, AttributeError, IndexError, StopIteration) as error:
        return [], f"is not as its stage writes it ({error})"


def title_of(artifact: Artifact) -> str:
    """The title of an artifact's section, with the suite of the harness and the mark of a trial."""
    stage = STAGES.get(artifact.stage)
    title = stage.title if stage else artifact.stage
    if artifact.suite:
        title += f", suite {artifact.suite}"
    return title if artifact.limit is None else f"{title} (trial, limit {artifact.limit:g})"


# -------------------------------------------------------------------------------------------------------------- tables


def _train(artifact: Artifact) -> list[Table]:
    # Without a held-out split there are no metrics; the claim says so.
    lines_of = dpo_lines if "reward_accuracy" in artifact.metrics else kto_lines
    return [Table(lines_of(artifact.metrics))] if artifact.metrics else []


def _sft(artifact: Artifact) -> list[Table]:
    return [Table(sft_lines(artifact.metrics))] if artifact.metrics else []


def _reward_model(artifact: Artifact) -> list[Table]:
    return [Table(reward_lines(artifact.metrics))] if artifact.metrics else []


def _reward_eval(artifact: Artifact) -> list[Table]:
    m = artifact.metrics
    tables = [Table(scorer_lines(m))] if "reward_accuracy" in m else []
    named = {name.partition("/")[2]: value for name, value in m.items() if name.startswith("benchmark/")}
    if named:
        tables.append(Table([("benchmark", "score, %"), *((name, estimate(v, 100)) for name, v in named.items())]))
    if points := artifact.summary.get("best_of"):
        tables.append(Table(best_of_lines(points), "best of n samples"))
    return tables


def _pairs(artifact: Artifact) -> list[Table]:
    metrics = artifact.metrics
    return [Table(pair_lines({"sampling": metrics, "pairs": metrics, "counts": artifact.summary["counts"]}))]


def _win_rate(artifact: Artifact) -> list[Table]:
    held_out = "NOT HELD OUT" not in str(artifact.summary.get("claim"))
    return [Table(win_rate_lines(artifact.metrics, held_out))]


def _perplexity(artifact: Artifact) -> list[Table]:
    m = artifact.metrics
    if not any(f"{name}_ppl_tuned" in m for name in SECTIONS):
        # --base_model without a tuned one: figures of one model.
        lines = [(label, estimate(m[f"{name}_ppl_base"], 1, 3)) for name, label in SECTIONS.items()
                 if f"{name}_ppl_base" in m]  # fmt: skip
        return [Table([("perplexity per token", "value [95% interval]"), *lines])]
    lines = [("perplexity per token", "base", "tuned", "tuned - base [95% interval]")]
    for name, label in SECTIONS.items():
        if f"{name}_ppl_base" in m:
            base, tuned, change = (m[f"{name}_ppl_{key}"] for key in ("base", "tuned", "difference"))
            p = m[f"p_{name}_nll_difference"] if m[f"{name}_tokens"]["n"] > 1 else None
            lines.append(comparison_row(label, base, tuned, change, p, digits=3))
    for side in SIDES:
        if f"kl_{side}" in m:
            lines.append(
                (f"KL(tuned || base), {side}, nats per token", "0 by def.", estimate(m[f"kl_{side}"], 1, 4), "")
            )
    return [Table(lines)]


def _battle(artifact: Artifact) -> list[Table]:
    tables = []
    for match in artifact.summary["matches"]:
        judge = next(iter(match["judges"]))
        note = f"judge: {judge}; longer and random are controls that do not read the answers"
        tables.append(Table(judge_lines(match["judges"]), f"{match['a']} against {match['b']}", note))
    panel, audit = artifact.summary.get("panel"), artifact.summary.get("audit")
    if panel:
        tables.append(Table(panel_lines(panel, audit), "judges of the panel", "; ".join(panel_notes(panel))))
    if audit:
        tables.append(Table(audit_lines(audit), "judge audit"))
    return [*tables, Table(answer_lines(artifact.summary["answers"]))]


def answer_lines(answers: dict) -> list[tuple]:
    """Lengths of the answers and how many were truncated, a line per model."""
    lines = [("answers of", "answers", "tokens per answer", "truncated, %")]
    for name, m in answers.items():
        truncated = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        lines.append((name, str(m["answers"]["value"]), cell(m["tokens"]), truncated))
    return lines


def _alpacaeval(artifact: Artifact) -> list[Table]:
    m = artifact.metrics
    if "base_unparsed" in m:
        table = Table(alpacaeval_lines(m, lc_name(m)), "against the reference answers")
    else:
        # --annotations scores a file of one model.
        kinds = ("win_rate", lc_name(m), "discrete_win_rate", "avg_length")
        lines = [(name.replace("_", " "), estimate(m[name])) for name in kinds if name in m]
        table = Table([("one model", "value"), *lines])
    audit = artifact.summary.get("audit")
    return [table, *([Table(audit_lines(audit), "judge audit")] if audit else [])]


def lc_name(metrics: dict) -> str:
    """The name of the length-controlled rate that an AlpacaEval summary has: the package's, or its minimal variant."""
    minimal = "length_controlled_minimal_winrate"
    return minimal if any(name.endswith(minimal) for name in metrics) else "length_controlled_winrate"


def audit_lines(audit: dict) -> list[tuple]:
    """The judge and its controls on labelled pairs."""
    judge, *controls = audit["audits"]
    lines = [(f"on {audit['audits'][judge]['agreement']['n']} labelled pairs", "judge", *controls)]
    for key, label in (
        ("agreement", "agreement with labels, %"),
        ("agreement_length_matched", "agreement at equal length, %"),
        ("flip_rate", "verdict changes with order, %"),
        ("prefers_longer", "longer answer wins, %"),
        ("parsed_share", "parsed verdicts, %"),
    ):
        lines.append((label, *(estimate(m[key], 100) for m in audit["audits"].values())))
    ahead = audit["against_longer"]
    return [*lines, (f"judge - longer, points {difference(ahead['difference'], ahead['p'], 100)}",)]


def _dump(artifact: Artifact) -> list[Table]:
    return [Table(answer_lines(artifact.metrics))]


def _human(artifact: Artifact) -> list[Table]:
    lines = [("people's votes", "prompts", "win rate, % [95% interval]", "p", "style held equal, %")]
    for match in artifact.summary["matches"]:
        m = match["metrics"]
        rate, styled = (estimate(m[key], 100) for key in ("win_rate", "win_rate_style_controlled"))
        p = p_value(m["p_win_rate_is_half"]["value"])
        lines.append((f"{match['a']} against {match['b']}", str(m["prompts"]["value"]), rate, p, styled))
    return [Table(lines)]


def _merge(artifact: Artifact) -> list[Table]:
    m = artifact.metrics
    lines = [(f"on {m['logps_adapter']['n']} pairs", "adapter on base", "merged", "merged - adapter")]
    sides = (cell(m[f"logps_{side}"], 1, 2) for side in ("adapter", "merged"))
    lines.append(("log-prob per answer, nats", *sides, cell(m["mean_difference"], 1, 5)))
    return [Table([*lines, ("same answer preferred, %", "100 by def.", cell(m["same_preference"], 100), "")])]


def _gguf(artifact: Artifact) -> list[Table]:
    changes, levels = gguf_lines(artifact.metrics, artifact.summary["gguf"], artifact.summary["source"])
    return [Table(changes), Table(levels)]


def _release(artifact: Artifact) -> list[Table]:
    lines = [("file", "bytes")]
    return [Table([*lines, *((str(file["name"]), str(file["size"])) for file in artifact.summary["files_released"])])]


def _lm_eval(artifact: Artifact) -> list[Table]:
    settings, tables = artifact.summary["settings"], []
    averages = artifact.part("averages")
    if averages:
        lines = [("average", "base", "tuned", "tuned - base", "p")]
        lines += [(name, *_three(m, 2), p_value(m["p"])) for name, m in averages.items()]
        tables.append(Table(lines))
    lines = [("task", "base", "tuned", "tuned - base", "p, Holm")]
    for row in artifact.summary["rows"]:
        # Subtasks are in lm_eval.md; here they would hide their groups.
        if row["top"]:
            lines.append((task_label(row), *_three(row, 4), p_value(row.get("p_holm"))))
    template = "with" if settings["apply_chat_template"] else "without"
    return [*tables, Table(lines, note=f"{template} chat template; the harness's own scale")]


def task_label(row: dict) -> str:
    """A task of the harness with its shots, metric and filter."""
    shots = "" if row["shots"] is None else f", {row['shots']}-shot"
    filtered = "" if row["filter"] == "none" else f", {row['filter']}"
    return f"{row['alias']}{shots}: {row['metric']}{filtered}"


def _three(figures: dict, digits: int) -> tuple[str, str, str]:
    change = figures["difference"]
    shown = number(change["value"], digits, "+")
    shown += "" if change["stderr"] is None else f" ± {number(change['stderr'], digits)}"
    return cell(figures["base"], 1, digits), cell(figures["tuned"], 1, digits), shown


STAGES = {
    "preference_pairs": Stage(
        "Preference pairs",
        "Which of the model's own answers does a scorer prefer?",
        "python generate_preference_pairs.py",
        _pairs,
    ),
    "train": Stage(
        "Preference training",
        "Does the model rank held-out answers as people did?",
        "python dpo_train_human_preference.py",
        _train,
    ),
    "sft": Stage(
        "Supervised fine-tuning",
        "Does the model predict held-out answers better?",
        "python sft_train_instruction.py",
        _sft,
    ),
    "reward_model": Stage(
        "Reward model",
        "Does it rank held-out answers better than length, words and the base model's likelihood?",
        "python train_reward_model.py",
        _reward_model,
    ),
    "reward_eval": Stage(
        "Scorer on labelled answers",
        "Does it score the better answer higher than length alone would?",
        "python eval_reward_model.py",
        _reward_eval,
    ),
    "merge": Stage("Merge", "Is the merged folder the same model?", "python merge_adapter.py", _merge),
    "gguf": Stage("GGUF files", "What does each quantisation lose?", "python export_gguf.py", _gguf),
    "win_rate": Stage(
        "Win rate by rewards",
        "Do implicit rewards rank held-out pairs correctly?",
        "python eval_win_rate.py",
        _win_rate,
    ),
    "perplexity": Stage(
        "Perplexity",
        "What happened to the model's language?",
        "python eval_perplexity.py",
        _perplexity,
    ),
    "battle": Stage(
        "Battles",
        "Whose answers does a judge prefer?",
        "python eval_win_rate.py --battle",
        _battle,
    ),
    "alpacaeval": Stage(
        "AlpacaEval",
        "How often does a local judge prefer the answers to those of a reference?",
        "python run_alpacaeval_local.py --config configs/alpacaeval.yaml",
        _alpacaeval,
    ),
    "human_eval_dump": Stage(
        "Answers for people",
        "What do base and tuned answer to the prompts that people judge?",
        "python human_eval.py",
        _dump,
    ),
    "human_eval": Stage(
        "Human evaluation",
        "Which answers do people prefer, blind?",
        "python human_eval.py --score votes-*.json",
        _human,
    ),
    "lm_eval": Stage(
        "lm-evaluation-harness",
        "What happened to knowledge and reasoning?",
        "bash run_lm_eval.sh",
        _lm_eval,
    ),
    "release": Stage("Release", "What is uploaded, and where is each figure from?", "python release.py", _release),
}  # fmt: skip
