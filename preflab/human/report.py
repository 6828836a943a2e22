"""What human_eval.py prints and draws: the page's summary, and tables, verdict and picture of its votes."""

from pathlib import Path

import numpy as np

from preflab.human.metrics import MOST_KAPPAS_WITH_INTERVAL
from preflab.human.study import COLUMN_OF, TRUNCATED
from preflab.judging.battle_report import categories_table
from utils.markdown import sentence
from utils.plots import CHOSEN, EVAL, NEUTRAL, REJECTED, empty_panel, figure, name_bars, rate_bars, save
from utils.power import power_sentence
from utils.stage import Report, fits_terminal, wrote
from utils.stats import direction, holm
from utils.tables import answer_label, cell, difference, estimate, p_equals, p_value, side_by_side
from utils.tables import render as render_table


def render_page(key: dict, answers: dict, paths: dict[str, Path], title: str, key_flag: str) -> str:
    """The text after a page was made: answer lengths, number of pairs, and what to do next.

    Args:
        answers: `{model: metrics of its answers}`.
        paths: of `candidates`, `page` and `key`.
        key_flag: ` --key FILE` where scoring will not find the key, else "".
    """
    lines = [("model", "answers", "tokens per answer", "truncated, %")]
    for name, m in answers.items():
        truncated = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        lines.append((name, str(m["answers"]["value"]), cell(m["tokens"]), truncated))
    repeats = sum(item["repeat_of"] is not None for item in key["items"])
    page = paths["page"].name
    pairs = f"{page}: {len(key['items']) - repeats} pairs, {repeats} of them repeated with sides swapped"
    if key["identical"]:
        pairs += f"; {len(key['identical'])} pairs of identical answers are not shown"
    return "\n\n".join(
        [
            render_table(title, lines),
            f"{pairs}.",
            f"{wrote([*paths.values()])}\nand the candidates' .md and .about.json\n"
            f"Send only {page} to the annotators: key and candidates name the models.\n"
            f"python human_eval.py --score votes-*.json{key_flag} scores the exported votes.",
        ]
    )


@fits_terminal
def render(sections: dict, title: str, data: dict | None = None) -> Report:
    """Tables of matches, votes, answers, annotators, agreement and categories, and the verdict.

    Args:
        sections: from `preflab.human.metrics.summarise`.
        data: what was read: `data` of the study's .about.json.
    """
    data = data or {}
    blocks = [matches_table(sections, title), votes_table(sections), answers_table(sections)]
    blocks.append(annotators_table(sections))
    if sections["agreement"]:
        blocks.append(agreement_table(sections["agreement"]))
    # A single category would repeat the pairing's own row.
    blocks += [categories_table(match) for match in sections["matches"] if len(match["categories"]) > 1]
    if "powered" in sections:
        blocks.append(powered_table(sections))
    verdict = verdict_of(sections["metrics"])
    if data.get("trained_on"):
        blocks.append(data["trained_on"])
    if data.get("not_held_out"):
        verdict = f"{data['not_held_out']} ({verdict})"
    return Report("\n\n".join(filter(None, [*blocks, verdict, power_note(sections["metrics"])])), verdict)


def verdict_of(m: dict) -> str:
    """One sentence: whose answers people prefer, and what qualifies that.

    Preference and position bias are two claims of one verdict, so their p-values have Holm's correction.
    """
    # There are votes, but only on other pairings.
    if "win_rate" not in m:
        return "No claim: nobody judged tuned against base."
    rate, p, source = _main_rate(m)
    p_preferred, p_left = holm([p, m["p_left_wins_is_half"]["value"]])
    shown = (
        f"tuned wins {estimate(rate, 100)}% against base (95% interval over prompts; ties half; {source} {p_equals(p)})"
    )
    outcomes = {1: "People prefer tuned", -1: "People prefer base", 0: "Inconclusive"}
    verdict = f"{outcomes[direction(rate, p_preferred, 0.5)]}: {shown}."
    # Sides are balanced, so a position bias costs power but does not favour a model.
    if direction(m["left_wins"], p_left, 0.5):
        verdict += f" Position bias: the left answer wins {estimate(m['left_wins'], 100)}%."
    # Neither judged nor skipped: the page was not finished.
    missing = m["judged"]["n"] - m["judged"]["value"] - m["skipped"]["value"]
    if missing:
        verdict += f" {missing} of {m['judged']['n']} votes are missing."
    return verdict


def _main_rate(m: dict) -> tuple[dict, float, str]:
    """(the win rate of the verdict, its p-value, what they come from): with --judge the prediction-powered ones."""
    powered = m.get("win_rate_prediction_powered")
    if powered and powered["ci95"]:
        return powered, m["p_win_rate_prediction_powered_is_half"]["value"], "votes with a judge's verdicts"
    return m["win_rate"], m["p_win_rate_is_half"]["value"], "sign test"


def powered_table(sections: dict) -> str:
    """The win rate from votes, from verdicts, and from both, and what the verdicts were worth in votes."""
    m, powered = sections["metrics"], sections["powered"]
    both = m["win_rate_prediction_powered"]
    lines = [
        ("tuned against base", "prompts", "win rate, %", "p"),
        (
            "votes alone",
            str(m["win_rate"]["n"]),
            estimate(m["win_rate"], 100),
            p_value(m["p_win_rate_is_half"]["value"]),
        ),
        ("the judge's verdicts alone", str(powered["judged"]), estimate(m["win_rate_of_judge"], 100), ""),
        (
            "both: prediction-powered",
            f"{powered['voted']} of {powered['judged']}",
            estimate(both, 100),
            p_value(m["p_win_rate_prediction_powered_is_half"]["value"]),
        ),
    ]
    notes = [f"judge: {', '.join(powered['judges'])}; weight of its verdicts {powered['weight']:.2f} (0: useless)."]
    if powered["voted"] == powered["judged"]:
        notes.append("Every judged prompt has votes, so the verdicts add nothing.")
    else:
        notes.append(
            f"Both are as precise as votes on {powered['as_precise_as']:.0f} prompts: {powered['votes_saved']:.0f}"
            f" prompts of voting saved ({powered['share_saved']:.0%}). The judge's own interval ignores its bias. The"
            " prompts with votes must be a random part: the page's order is random, so people may stop anywhere, but"
            " not choose."
        )
    if powered["unparsed"]:
        notes.append(f"Without a verdict, and left out of both: {powered['unparsed']} prompts.")
    return "\n".join([render_table("few votes, many verdicts", lines), *notes])


def power_note(m: dict) -> str:
    """What these prompts could have shown, where the verdict is inconclusive; else ""."""
    if "win_rate_prediction_powered" in m:
        return ""
    if "win_rate" not in m or direction(m["win_rate"], m["p_win_rate_is_half"]["value"], 0.5):
        return ""
    return power_sentence(m["win_rate"])


def matches_table(sections: dict, title: str) -> str:
    """Win rates, one line per pairing."""
    lines = [("", "prompts", "win rate, %", "p", "style held equal, %")]
    notes = ["Win rate: prompts have equal weight, ties and both bad count half. Style: length and Markdown."]
    for match in sections["matches"]:
        m = match["metrics"]
        lines.append(
            (
                _name(match),
                str(m["prompts"]["value"]),
                estimate(m["win_rate"], 100),
                p_value(m["p_win_rate_is_half"]["value"]),
                estimate(m["win_rate_style_controlled"], 100),
            )
        )
        if m["identical_answers"]["value"]:
            notes.append(
                f"{m['identical_answers']['value']} pairs of identical answers were not shown; counted as ties, they"
                f" change {match['a']}'s rate to {estimate(m['win_rate_whole_set'], 100)}%"
            )
    return "\n".join([render_table(title, lines), *notes])


def votes_table(sections: dict) -> str:
    """Counts of votes, one line per pairing."""
    lines = [("votes", *(label for label, _ in VOTES.values()), "both bad, %")]
    for match in sections["matches"]:
        m = match["metrics"]
        counts = (str(m[f"votes_{step}"]["value"]) for step in VOTES)
        lines.append((_name(match), *counts, estimate(m["both_bad_share"], 100)))
    return render_table("votes for the model named first", lines)


def _name(match: dict) -> str:
    return f"{match['a']} against {match['b']}"


def answers_table(sections: dict) -> str:
    """Acceptable answers where they were marked, lengths and strengths, one line per model."""
    # strengths is None for two models or unconnected votes; the table then omits its last column.
    strengths, main = sections["bradley_terry"], sections["metrics"]
    lines = [("model", "acceptable, %", "tuned - base", "tokens per answer", "truncated, %", "Bradley-Terry, logits")]
    notes = []
    for name, m in sections["answers"].items():
        acceptable_difference = ""
        # The difference belongs to the pairing of tuned and base, shown in tuned's line.
        if name == "tuned" and "acceptable_difference" in main:
            acceptable_difference = difference(main["acceptable_difference"], scale=100)
            notes.append(f"acceptable, tuned - base: sign test {p_equals(main['p_acceptable_difference']['value'])}")
        truncated = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        strength = estimate(strengths[name], 1, 2) if strengths else ""
        acceptable = estimate(m["acceptable"], 100)
        lines.append((name, acceptable, acceptable_difference, cell(m["tokens"]), truncated, strength))
    return "\n".join([render_table("answers", [line if strengths else line[:5] for line in lines]), *notes])


def annotators_table(sections: dict) -> str:
    """Coverage, preference, position bias, self-consistency and time, one line per annotator."""
    lines = [("annotator", "judged", "skipped", "tuned wins, %", "left wins, %", "same on repeat, %", "seconds")]
    for name, m in sections["annotators"].items():
        lines.append(
            (
                name,
                f"{m['judged']['value']}/{m['judged']['n']}",
                str(m["skipped"]["value"]),
                estimate(m["win_rate"], 100),
                estimate(m["left_wins"], 100),
                cell(m["self_consistency"], 100),
                f"{m['seconds_median']['value']:.0f}",
            )
        )
    return render_table("annotators (seconds: median per vote)", lines)


def agreement_table(agreement: dict) -> str:
    """Alpha of all annotators, kappa of every two, or the median and the range of many kappas."""
    lines = [("agreement", "pairs", "win, tie, loss", "five steps")]
    nominal, ordinal = (estimate(agreement[f"alpha_{kind}"], 1, 2) for kind in ("nominal", "ordinal"))
    lines.append(("Krippendorff's alpha, all annotators", str(agreement["pairs"]["value"]), nominal, ordinal))
    kappas = agreement["kappas"]
    if len(kappas) > MOST_KAPPAS_WITH_INTERVAL:
        pairs = f"{np.median([k['pairs'] for k in kappas]):g}"
        cells = [_median_and_range([k[name]["value"] for k in kappas]) for name in ("kappa", "kappa_weighted")]
        lines.append((f"Cohen's kappa, {len(kappas)} pairs of annotators, median", pairs, *cells))
        kappas = []
    for k in kappas:
        # Same order of columns as alpha: without the size of a preference, then with it.
        label = f"Cohen's kappa, {k['annotators'][0]} and {k['annotators'][1]}"
        lines.append((label, str(k["pairs"]), estimate(k["kappa"], 1, 2), estimate(k["kappa_weighted"], 1, 2)))
    return render_table("agreement of annotators (alpha: nominal, ordinal; kappa: plain, quadratic)", lines)


def _median_and_range(values: list[float]) -> str:
    low, middle, high = np.nanquantile(values, [0, 0.5, 1])
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


STEP_NAMES = {2: "much better", 1: "better", 0: "a tie", -1: "worse", -2: "much worse"}


def strongest(rows: list[dict], candidates: list[dict], title: str, count: int = 10) -> str:
    """Markdown of the prompts with the strongest mean preference in each direction: texts, votes and comments."""
    votes: dict[tuple, list[dict]] = {}
    for row in rows:
        # First votes only: a repeat would count one annotator twice.
        if row["preference"] is not None and row["repeat_of"] is None:
            votes.setdefault((row["a"], row["b"], row["prompt"]), []).append(row)
    means = {unit: sum(vote["preference"] for vote in by_unit) / len(by_unit) for unit, by_unit in votes.items()}
    entries = []
    for sign in (1, -1):
        # Strongest first; ties in the order of models and prompts, so that the file is reproducible.
        units = sorted((u for u in means if sign * means[u] > 0), key=lambda u: (-sign * means[u], u))[:count]
        for a, b, prompt in units:
            winner = a if sign > 0 else b
            heading = f"Prompt {prompt + 1}: {winner} preferred, {abs(means[a, b, prompt]):.1f} of 2 steps"
            columns = {name: COLUMN_OF.get(name, name) for name in (a, b)}
            # Files of earlier versions do not have the column.
            cut_off = candidates[prompt].get(TRUNCATED, [])
            texts = {answer_label(name, c in cut_off): candidates[prompt][c] for name, c in columns.items()}
            entries.append((heading, candidates[prompt]["prompt"], texts, _votes_list(votes[a, b, prompt])))
    note = "" if entries else "No answer was preferred to another."
    return side_by_side(f"{title}: the strongest preferences", entries, note)


def _votes_list(votes: list[dict]) -> str:
    lines = []
    for vote in votes:
        outcome = "both bad" if vote["both_bad"] else STEP_NAMES[vote["preference"]]
        comment = f": {' '.join(vote['comment'].split())}" if vote["comment"] else ""
        # Names and comments are the annotators' own text.
        lines.append(f"- {sentence(vote['annotator'])}: {sentence(vote['a'])} {outcome}{sentence(comment)}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------- picture

VOTES = {
    "much_better": ("much better", CHOSEN),
    "better": ("better", "#7fb8b4"),
    "tie": ("tie", "#d9d9de"),
    "both_bad": ("both bad", "#8d8fa3"),
    "worse": ("worse", "#e6a898"),
    "much_worse": ("much worse", REJECTED),
}


def draw(path, sections: dict, title: str) -> None:
    """Three panels: win rates by pairing and annotator, shares of votes, win rates by category.

    Args:
        sections: from `preflab.human.metrics.summarise`.
    """
    fig, axes = figure(1, 3, title)
    axes[0].set_title("Win rate, 95% intervals")
    axes[1].set(title="Votes for the model named first", xlabel="share of votes (%)", xlim=(0, 100))
    if not sections["matches"]:
        axes[2].set_title("Win rate by category")
        for ax in axes:
            empty_panel(ax, "no votes yet")
        return save(fig, path)
    rates = []
    # The first ones fit the panel; the table and the artifact have all.
    for match in sections["matches"][:4]:
        rates.append((_name(match), match["metrics"]["win_rate"], CHOSEN))
        rates.append((f"{_name(match)}\nstyle held equal", match["metrics"]["win_rate_style_controlled"], EVAL))
    # Annotators who judged no pair of tuned and base have no win rate.
    annotators = [(name, m["win_rate"], NEUTRAL) for name, m in sections["annotators"].items() if m["win_rate"]["n"]]
    rate_bars(axes[0], [*rates, *annotators[:10]])
    if len(annotators) > 10:
        axes[0].set_title(f"Win rate, 95% intervals (10 of {len(annotators)} annotators)")

    matches = sections["matches"][:8]
    for y, match in enumerate(matches):
        total, left = match["metrics"]["votes"]["value"], 0.0
        # Shares from left to right, from the best to the worst vote for `a`; they add up to 100%.
        for step, (label, colour) in VOTES.items():
            width = 100 * match["metrics"][f"votes_{step}"]["value"] / max(total, 1)
            axes[1].barh(y, width, left=left, color=colour, height=0.6, label=label if y == 0 else None)
            left += width
    name_bars(axes[1], [f"{m['a']}\nagainst {m['b']}" for m in matches])
    axes[1].legend()

    main = next((m for m in sections["matches"] if (m["a"], m["b"]) == ("tuned", "base")), sections["matches"][0])
    categories = [(f"{name} ({c['n']})", c["win_rate"], CHOSEN) for name, c in main["categories"].items()]
    rate_bars(axes[2], categories[:16])
    axes[2].set_title(f"{_name(main)}, by category")
    if not categories:
        empty_panel(axes[2], "the prompts have no categories")
    save(fig, path)
