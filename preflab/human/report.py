"""What human_eval.py prints and writes to be read."""

from preflab.human.study import SHOWN, quoted
from preflab.judging.battle_report import categories_table
from utils.errors import is_main_process
from utils.plots import CHOSEN, EVAL, NEUTRAL, REJECTED, empty_panel, figure, save, win_rate_bars
from utils.tables import cell, difference, estimate, render


def dumped(key: dict, answers: dict, page: str, title: str) -> str:
    """The table of a dump: how long each model's answers are, and what the page asks."""
    lines = [("model", "answers", "tokens an answer", "cut off, %")]
    for name, m in answers.items():
        cut = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        lines.append((name, str(m["answers"]["value"]), cell(m["tokens"]), cut))
    again = sum(item["repeat_of"] is not None for item in key["items"])
    asked = f"{page} asks {len(key['items']) - again} pairs, {again} of them a second time with sides swapped"
    if key["identical"]:
        asked += f"; {len(key['identical'])} pairs of identical answers are not asked"
    return "\n\n".join([render(title, lines), asked + "."])


def conclude(sections: dict, title: str) -> tuple[str, str]:
    """(text, verdict): the tables, and the one sentence that answers the question."""
    blocks = [matches_table(sections, title), answers_table(sections), annotators_table(sections)]
    if sections["agreement"]:
        blocks.append(agreement_table(sections["agreement"]))
    blocks += [categories_table(match) for match in sections["matches"] if len(match["categories"]) > 1]
    verdict = claim(sections["metrics"])
    return "\n\n".join([*blocks, verdict]), verdict


def claim(m: dict) -> str:
    """Whose answers people prefer, in one sentence."""
    if "win_rate" not in m:
        return "No claim: nobody judged tuned against base."
    rate, p = m["win_rate"], m["p_win_rate_is_half"]["value"]
    shown = (
        f"tuned wins {estimate(rate, 100)}% against base (95% interval over prompts; ties half; sign test p={p:.2g})"
    )
    if rate["ci95"] and p < 0.05 and rate["ci95"][0] > 0.5:
        verdict = f"People prefer tuned: {shown}."
    elif rate["ci95"] and p < 0.05 and rate["ci95"][1] < 0.5:
        verdict = f"People prefer base: {shown}."
    else:
        verdict = f"No claim: {shown}."
    if m["p_left_wins_is_half"]["value"] < 0.05:
        verdict += f" Mind the annotators' own bias: the left answer wins {estimate(m['left_wins'], 100)}%."
    missing = m["judged"]["n"] - m["judged"]["value"] - m["skipped"]["value"]
    if missing:
        verdict += f" {missing} of {m['judged']['n']} votes are still open."
    return verdict


def matches_table(sections: dict, title: str) -> str:
    """A line a pairing."""
    lines = [
        (
            "",
            "prompts",
            "win rate, %",
            "p",
            "same style",
            "much better / better / tie / worse / much worse",
            "both bad, %",
        )
    ]
    steps = ("much_better", "better", "tie", "worse", "much_worse")
    for match in sections["matches"]:
        m = match["metrics"]
        lines.append(
            (
                f"{match['a']} against {match['b']}",
                str(m["prompts"]["value"]),
                estimate(m["win_rate"], 100),
                f"{m['p_win_rate_is_half']['value']:.2g}",
                estimate(m["win_rate_style_controlled"], 100),
                " / ".join(str(m[f"votes_{step}"]["value"]) for step in steps),
                estimate(m["both_bad_share"], 100),
            )
        )
    note = "win rate: prompts weigh alike, ties and both bad count half; same style: length and Markdown held equal"
    for match in sections["matches"]:
        m = match["metrics"]
        if m["identical_answers"]["value"]:
            note += f"\n{m['identical_answers']['value']} pairs of identical answers were not asked; as ties they make"
            note += f" {match['a']}'s rate over the whole set {estimate(m['win_rate_whole_set'], 100)}%"
    return "\n".join([render(title, lines), note])


def answers_table(sections: dict) -> str:
    """A line a model: acceptable answers where they were marked, lengths, strength."""
    strengths, main = sections["bradley_terry"], sections["metrics"]
    lines = [("model", "acceptable, %", "tuned - base", "tokens an answer", "cut off, %", "Bradley-Terry, logits")]
    for name, m in sections["answers"].items():
        acceptable, moved = estimate(m["acceptable"], 100), ""
        if name == "tuned" and "acceptable_difference" in main:
            moved = difference(main["acceptable_difference"], main["p_acceptable_difference"], 100)
        cut = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        strength = estimate(strengths[name], 1, 2) if strengths else ""
        lines.append((name, acceptable, moved, cell(m["tokens"]), cut, strength))
    return render("answers", [line if strengths else line[:5] for line in lines])


def annotators_table(sections: dict) -> str:
    """A line a person."""
    lines = [("annotator", "judged", "skipped", "tuned wins, %", "left wins, %", "same when asked again, %", "seconds")]
    for name, m in sections["annotators"].items():
        again = m["self_consistency"]
        lines.append(
            (
                name,
                f"{m['judged']['value']}/{m['judged']['n']}",
                str(m["skipped"]["value"]),
                estimate(m["win_rate"], 100),
                estimate(m["left_wins"], 100),
                f"{estimate(again, 100)}" if again["value"] is not None else "-",
                f"{m['seconds_median']['value']:.0f}",
            )
        )
    return render("annotators", lines)


def agreement_table(found: dict) -> str:
    """Alpha of all annotators, kappa of every two."""
    lines = [("agreement", "pairs", "win, tie, loss", "five steps")]
    nominal, ordinal = (estimate(found[f"alpha_{kind}"], 1, 2) for kind in ("nominal", "ordinal"))
    lines.append(("Krippendorff's alpha, everyone", str(found["pairs"]["value"]), nominal, ordinal))
    for k in found["kappas"]:
        who = f"Cohen's kappa, {k['annotators'][0]} and {k['annotators'][1]}"
        lines.append((who, str(k["pairs"]), estimate(k["kappa"], 1, 2), estimate(k["kappa_weighted"], 1, 2)))
    return render("agreement of annotators (alpha: nominal, ordinal; kappa: plain, quadratic)", lines)


STEP_NAMES = {2: "much better", 1: "better", 0: "a tie", -1: "worse", -2: "much worse"}


def strongest(rows: list[dict], candidates: list[dict], title: str, count: int = 10) -> str:
    """Markdown of the prompts that people felt most strongly about, in each direction, with texts and comments."""
    votes: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["preference"] is not None and row["repeat_of"] is None:
            votes.setdefault((row["a"], row["b"], row["prompt"]), []).append(row)
    means = {unit: sum(v["preference"] for v in found) / len(found) for unit, found in votes.items()}
    parts = [f"# {title}: the strongest preferences\n"]
    for better, sign in (("first", 1), ("second", -1)):
        units = sorted((u for u in means if sign * means[u] > 0), key=lambda u: (-sign * means[u], u))[:count]
        for a, b, prompt in units:
            winner = a if better == "first" else b
            parts.append(
                f"---\n\n## Prompt {prompt + 1}: {winner} preferred, {abs(means[a, b, prompt]):.1f} of 2 steps\n"
            )
            parts.append(quoted(candidates[prompt]["prompt"]))
            for name in (a, b):
                parts.append(f"### {name}\n\n{quoted(candidates[prompt][SHOWN.get(name, name)])}")
            for vote in votes[a, b, prompt]:
                said = f": {' '.join(vote['comment'].split())}" if vote["comment"] else ""
                how = "both bad" if vote["both_bad"] else STEP_NAMES[vote["preference"]]
                parts.append(f"- {vote['annotator']}: {a} {how}{said}")
            parts.append("")
    if len(parts) == 1:
        parts.append("Nobody preferred an answer to another.")
    return "\n".join(parts)


VOTES = {
    "much_better": ("much better", CHOSEN),
    "better": ("better", "#7fb8b4"),
    "tie": ("tie", "#d9d9de"),
    "both_bad": ("both bad", "#8d8fa3"),
    "worse": ("worse", "#e6a898"),
    "much_worse": ("much worse", REJECTED),
}


def human_eval_figure(path, sections: dict, headline: str) -> None:
    """Win rates by pairing and annotator, the votes themselves, and win rates by category.

    Args:
        sections: from `preflab.human.metrics.summarise`.
    """
    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)
    axes[0].set_title("Win rate, 95% intervals")
    axes[1].set(title="Votes, as the first named model fared", xlabel="share of votes", xlim=(0, 1))
    if not sections["matches"]:
        for ax in axes:
            empty_panel(ax, "no votes yet")
        return save(fig, path)
    rates = []
    for match in sections["matches"][:4]:
        who = f"{match['a']} against {match['b']}"
        rates.append((who, match["metrics"]["win_rate"], CHOSEN))
        rates.append((f"{who}\nstyle held equal", match["metrics"]["win_rate_style_controlled"], EVAL))
    people = [(name, m["win_rate"], NEUTRAL) for name, m in sections["annotators"].items() if m["win_rate"]["n"]]
    win_rate_bars(axes[0], [*rates, *people[:10]])
    if len(people) > 10:
        axes[0].set_title(f"Win rate, 95% intervals (10 of {len(people)} people)")

    matches = sections["matches"][:8]
    for y, match in enumerate(matches):
        total, left = match["metrics"]["votes"]["value"], 0.0
        for step, (label, colour) in VOTES.items():
            width = match["metrics"][f"votes_{step}"]["value"] / max(total, 1)
            axes[1].barh(y, width, left=left, color=colour, height=0.6, label=label if y == 0 else None)
            left += width
    axes[1].set_yticks(range(len(matches)), [f"{m['a']}\nagainst {m['b']}" for m in matches], fontsize=7)
    axes[1].set_ylim(len(matches) - 0.4, -1.1)
    axes[1].legend(fontsize=7, ncols=3, loc="upper center", framealpha=0.9)

    main = next((m for m in sections["matches"] if (m["a"], m["b"]) == ("tuned", "base")), sections["matches"][0])
    parts = [(f"{name} ({c['n']})", c["win_rate"], CHOSEN) for name, c in main["categories"].items()]
    win_rate_bars(axes[2], parts[:16])
    axes[2].set_title(f"{main['a']} against {main['b']}, by category")
    if not parts:
        empty_panel(axes[2], "the prompts name no category")
    save(fig, path)
