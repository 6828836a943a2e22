"""The report of battles (eval_win_rate.py --battle): tables, verdict, warning about the judge, picture."""

from pathlib import Path

from preflab.evaluation.contamination import overlap_table
from preflab.judging.panel_report import audit_result, heading_of, left_out_judges
from utils.plots import CHOSEN, EVAL, NEUTRAL, empty_panel, figure, name_bars, rate_bars, save, shorten
from utils.power import power_sentence
from utils.stage import Report, fits_terminal
from utils.stats import direction
from utils.tables import cell, difference, estimate, p_equals, p_value, undecided
from utils.tables import render as render_table

# A judge whose verdict changes with the order of the answers on more than half of the prompts is unreliable.
UNRELIABLE_FLIP_RATE = 0.5
# The share of prompts without a verdict above which the verdict says so.
MANY_DROPPED = 0.1


@fits_terminal
def render(sections: dict, published: dict | None, title: str, data: dict) -> Report:
    """All tables, then the verdict.

    Args:
        sections: from `preflab.judging.battle_metrics.battle_sections`.
        published: published scores to print beside (utils.artifacts.read_published), or None.
        data: what was read and left out.
    """
    blocks = judges_tables(sections, title)
    if "panel" in sections:
        blocks.append(panel_table(sections["panel"], sections.get("audit")))
    if "audit" in sections:
        blocks += [sections["audit"]["table"], sections["audit"]["verdict"]]
    if "stopping" in sections:
        blocks.append(stopping_note(sections["stopping"]))
    blocks.append(models_table(sections, published))
    blocks += [categories_table(match) for match in sections["matches"] if len(match["categories"]) > 1]
    if data["left_out"]:
        blocks.append("LEFT OUT: " + ", ".join(f"{reason} {n}" for reason, n in data["left_out"].items()))
    if data.get("answer_notes"):
        blocks.append(f"ANSWERS: {'; '.join(data['answer_notes'])}.")
    if data.get("trained_on"):
        blocks.append(data["trained_on"])
    if data.get("judge_notes"):
        blocks.append(f"JUDGE: {'; '.join(data['judge_notes'])}.")
    blocks += [overlap_of_pairing(each) for each in sections.get("contamination", ())]
    if published:
        blocks.append(
            f"published: {published['source']}; {published['setting']}. It used another judge, so the scores are not"
            " comparable."
        )
    verdict = verdict_of(sections) + judge_caveats(sections)
    if data.get("not_held_out"):
        verdict = f"{data['not_held_out']} ({verdict})"
    # A planned number of prompts has a power; a number that the outcomes decided has none.
    power = "" if "stopping" in sections else power_note(sections["metrics"])
    return Report("\n\n".join(filter(None, [*blocks, verdict, power])), verdict)


def verdict_of(sections: dict) -> str:
    """Which model the judge or panel prefers. Inconclusive unless interval and test exclude no difference.

    No claim is made for a judge that failed its audit; the judges that a panel leaves out are named.
    """
    audit, panel = sections.get("audit"), "panel" in sections
    result = _outcome(sections, "panel" if panel else "judge")
    if audit and not audit["passed"] and not result.startswith("No claim"):
        failed = "every judge of the panel failed its audit" if panel else "the judge failed its audit"
        return f"No claim: {failed}. ({result})"
    return result + left_out_judges(audit)


def _outcome(sections: dict, judge: str) -> str:
    m = sections["metrics"]
    if "win_rate_difference" in m:
        d, p = m["win_rate_difference"], m["p_win_rate_difference"]
        result = f"against the same opponent, tuned - base is {difference(d, scale=100)} points"
        preferred = direction(d, p["value"])
        if preferred:
            return f"The {judge} prefers {'tuned' if preferred > 0 else 'base'}: {result}."
        return f"Inconclusive: {result}, {undecided(d, p['value'], 0, 'no difference')}."
    if "tuned" not in sections["answers"]:
        return "No claim: one model alone, without a tuned model to compare."
    if has_opponent(sections):
        return "No claim: no prompt has verdicts for both models."
    if "win_rate" not in m:
        return "No claim: no prompt has verdicts in both orders."
    rate, p = m["win_rate"], m["p_win_rate_is_half"]["value"]
    kind = ("confidence sequence", "anytime-valid") if "stopping" in sections else ("interval", "sign test")
    result = f"tuned wins {estimate(rate, 100)}% against base (95% {kind[0]}; ties half; {kind[1]} {p_equals(p)})"
    preferred = direction(rate, p, 0.5)
    if preferred < 0:
        return f"The {judge} prefers base: {result}."
    if not preferred:
        return f"Inconclusive: {result}."
    # A length-only judge that prefers tuned at least as strongly shows that length may explain the result.
    longer = m.get("longer_win_rate")
    if longer and longer["value"] >= rate["value"]:
        result += f". The length-only judge `longer` gives {100 * longer['value']:.1f}%"
    return f"The {judge} prefers tuned: {result}."


def power_note(m: dict) -> str:
    """What these prompts could have shown, where the verdict is inconclusive; else ""."""
    if "win_rate_difference" in m:
        rate, p, null = m["win_rate_difference"], m["p_win_rate_difference"]["value"], 0
    elif "win_rate" in m:
        rate, p, null = m["win_rate"], m["p_win_rate_is_half"]["value"], 0.5
    else:
        return ""
    return "" if direction(rate, p, null) else power_sentence(rate)


def panel_lines(panel: dict, audit: dict | None) -> list[tuple]:
    """A line per judge: its audit, its win rate, the panel's without it, and what its verdicts cost in this call."""
    audited = (audit or {}).get("members", {})
    lines = [("", "agrees with labels, %", "audit", "win rate, %", "panel without it, %", "verdicts", "seconds")]
    for number, (name, m) in enumerate(panel["members"].items(), 1):
        checked = audited.get(name)
        without = m.get("without", {}).get("win_rate")
        lines.append(
            (
                str(number),
                estimate(checked["audit"]["agreement"], 100) if checked else "-",
                audit_result(checked["passed"] if checked else None, m["votes"]),
                estimate(m["win_rate"], 100) if "win_rate" in m else "-",
                estimate(without, 100) if without else "-",
                f"{m['cost']['computed']} of {m['cost']['of']}",
                f"{m['cost']['seconds']:.1f}",
            )
        )
    return lines


def panel_notes(panel: dict) -> list[str]:
    """The judges' names by number, with a server's tokens, and their agreement."""
    notes = []
    for number, (name, m) in enumerate(panel["members"].items(), 1):
        tokens = ", ".join(
            f"{m['cost'][key]:,} {key.replace('_', ' ')}"
            for key in ("tokens_read", "tokens_written")
            if m["cost"].get(key)
        )
        notes.append(f"{number}: {name}" + (f" ({tokens})" if tokens else ""))
    notes.append("verdicts: computed in this call, the others were cached.")
    alphas = panel["agreement"]
    if alphas:
        shown = f"Krippendorff's alpha of the judges: {estimate(alphas['alpha'], 1, 2)}"
        if "alpha_voting" in alphas:
            shown += f"; of those with a vote {estimate(alphas['alpha_voting'], 1, 2)}"
        notes.append(f"{shown} (1: they agree; 0: as chance would).")
    return notes


def panel_table(panel: dict, audit: dict | None) -> str:
    """The judges of a panel as text."""
    return "\n".join([render_table("judges of the panel", panel_lines(panel, audit)), *panel_notes(panel)])


def stopping_note(stopping: dict) -> str:
    """Whether --stop_when ended the judging, and what that saved."""
    half = 50 * (stopping["high"] - stopping["low"])
    what = "difference" if stopping["quantity"] == "difference" else "win rate"
    null = "0" if stopping["quantity"] == "difference" else "50%"
    if not stopping["reason"]:
        return (
            f"NOT STOPPED EARLY: after all {stopping['of']} prompts the {what}'s confidence sequence is"
            f" +/- {half:.1f} points wide, more than {stopping['points']:g}, and includes {null}."
        )
    reason = f"excludes {null}" if stopping["reason"] == "decided" else f"is within {stopping['points']:g} points"
    return (
        f"STOPPED after {stopping['judged']} of {stopping['of']} prompts, in random order: the {what}'s confidence"
        f" sequence, which holds at every number of prompts, {reason} (+/- {half:.1f} points). It saved"
        f" {stopping['saved']:.1%} of the verdicts. Figures of the table are those of the judged prompts; other"
        " intervals in it are for a number of prompts chosen in advance."
    )


def overlap_of_pairing(section: dict) -> str:
    """The win rate of a pairing with and without the prompts that overlap with training data."""

    def cells(figures: dict) -> list[str]:
        if "win_rate" not in figures:
            return ["-", "-"]
        return [estimate(figures["win_rate"], 100), p_value(figures["p_win_rate_is_half"]["value"])]

    return overlap_table(section, [f"win rate of {section['a']} vs {section['b']}, %", "p"], cells)


def judge_caveats(sections: dict) -> str:
    """Sentences about a judge with strong position bias or many missing verdicts; empty for a good one."""
    # The first pairing's first judge: the one of --judge.
    m = next(iter(sections["matches"][0]["judges"].values()))
    caveats = ""
    if "flip_rate" in m:
        flips = m["flip_rate"]
        # A coin that ignores the answers flips on half of the prompts; the complete interval must be above that.
        if flips["ci95"] and flips["ci95"][0] > UNRELIABLE_FLIP_RATE:
            caveats += (
                f" This judge is unreliable: its verdict changes with the answer order on {flips['value']:.1%} of"
                f" prompts (the first answer wins {m['first_slot_wins']['value']:.1%})."
            )
    dropped, prompts = m["dropped"]["value"], m["prompts"]["value"]
    if dropped > MANY_DROPPED * prompts:
        caveats += f" {dropped} of {prompts} prompts have no verdict."
    return caveats


def has_opponent(sections: dict) -> bool:
    """Whether base and tuned met answers from a file rather than each other."""
    return any(match["a"] == "base" for match in sections["matches"])


def judges_tables(sections: dict, title: str) -> list[str]:
    """One table per pairing, the judge and its controls side by side; rates are those of the pairing's first model."""
    matches = sections["matches"]
    if len(matches) == 1:
        tables = [render_table(title, judge_lines(matches[0]["judges"]))]
    else:
        tables = [title]
        tables += [render_table(f"{m['a']} vs {m['b']}", judge_lines(m["judges"])) for m in matches]
    notes = [
        "win rate: a tie where the two orders of the answers disagree.",
        "style-controlled: length and Markdown held equal; - if style and model are collinear.",
    ]
    judge = next(iter(matches[0]["judges"].values()))
    if "verdict_mass_median" in judge:
        notes.append(
            f"Probability on the verdict labels: median {judge['verdict_mass_median']['value']:.3f}, below 0.5 in"
            f" {judge['verdict_mass_below_half']['value']:.1%} of verdicts."
        )
    return [*tables[:-1], "\n".join([tables[-1], *notes])]


def judge_lines(judges: dict[str, dict]) -> list[tuple]:
    """Rows of a pairing's table: one per metric, a column for the judge and for each of its controls."""

    def percent(name: str):
        return lambda m: f"{100 * m[name]['value']:.1f}" if name in m else "-"

    rows = {
        "win rate, %": lambda m: estimate(m["win_rate"], 100),
        "p-value against 50% (sign test)": lambda m: p_value(m["p_win_rate_is_half"]["value"]),
        "wins / ties / losses": lambda m: " / ".join(str(m[k]["value"]) for k in ("wins", "ties", "losses")),
        "win rate, mean of both orders, %": percent("win_rate_average_of_orders"),
        "win rate, by judge probability, %": percent("win_rate_probability"),
        "win rate, style-controlled, %": lambda m: estimate(m["win_rate_style_controlled"], 100),
        "verdict changes with order, %": percent("flip_rate"),
        "first answer wins, %": percent("first_slot_wins"),
    }
    names = [heading_of(next(iter(judges))), *list(judges)[1:]]
    lines = [("", *names)]
    for label, text_of in rows.items():
        lines.append((label, *(text_of(m) if "win_rate" in m else "-" for m in judges.values())))
    unparsed = [m["unparsed_verdicts"] for m in judges.values()]
    lines.append(("unparsed verdicts", *(f"{u['value']} of {u['n']}" for u in unparsed)))
    return lines


def models_table(sections: dict, published: dict | None) -> str:
    """One row per model: answer length, truncation and, where they are defined, strength and score."""
    strengths = sections["bradley_terry"]
    # Against one opponent, as published scores are measured, each model is `a` of exactly one pairing.
    scores = {m["a"]: next(iter(m["judges"].values())).get("win_rate_votes") for m in sections["matches"]}
    lines = [("model", "answers", "tokens per answer", "truncated, %", "Bradley-Terry, logits", "score by votes, %")]
    for name, m in sections["answers"].items():
        truncated = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        strength = estimate(strengths[name], 1, 2) if strengths else "-"
        score = estimate(scores[name], 100) if published and scores.get(name) else "-"
        lines.append((name, str(m["answers"]["value"]), cell(m["tokens"]), truncated, strength, score))
    for name, row in published["rows"].items() if published else ():
        lines.append((f"{name} (published)", "-", str(row.get("tokens", "-")), "-", "-", str(row["score"])))
    columns = [0, 1, 2, 3, *([4] if strengths else []), *([5] if published else [])]
    return render_table("answers", [tuple(line[k] for k in columns) for line in lines])


def categories_table(match: dict) -> str:
    """Win rate by category of prompts."""
    lines = [("category", "prompts", f"{match['a']} wins, %", "p")]
    for name, c in match["categories"].items():
        lines.append((name, str(c["n"]), estimate(c["win_rate"], 100), p_value(c["p_win_rate_is_half"])))
    return render_table(f"{match['a']} vs {match['b']} by category (not corrected for multiple tests)", lines)


def battle_figure(path: Path, sections: dict, title: str) -> None:
    """Draw win rates under the judge and its controls, win rates by category, and answer lengths. Rank 0 only.

    Args:
        sections: from `preflab.judging.battle_metrics.battle_sections`.
    """
    fig, axes = figure(1, 3, title)

    bars = []
    for match in sections["matches"]:
        pairing = f"{match['a']} vs {match['b']}"
        for k, (judge, m) in enumerate(match["judges"].items()):
            if "win_rate" not in m:
                continue
            # Judges of one kind share a long prefix, so the end of the name is shown.
            bars.append((f"{pairing}\n{judge.split(':')[-1]}", m["win_rate"], CHOSEN if k == 0 else NEUTRAL))
            if k == 0:
                bars.append((f"{pairing}\nstyle-controlled", m["win_rate_style_controlled"], EVAL))
    rate_bars(axes[0], bars[:12])
    axes[0].set_title("Win rate, 95% intervals" + (f" (12 of {len(bars)})" if len(bars) > 12 else ""))
    if not bars:
        empty_panel(axes[0], "no prompt has verdicts in both orders")

    # The last pairing has the last model as `a`: tuned, or the last of --models.
    last = sections["matches"][-1]
    bars = [(f"{name} (n={c['n']})", c["win_rate"], CHOSEN) for name, c in last["categories"].items()]
    rate_bars(axes[1], bars[:16])
    first = f" (16 of {len(bars)})" if len(bars) > 16 else ""
    axes[1].set_title(f"{shorten(last['a'])} vs {shorten(last['b'])}, by category{first}")
    if not bars:
        empty_panel(axes[1], "the prompts have no categories")

    answers = sections["answers"]
    truncated = [m.get("truncated_share", {}).get("value") for m in answers.values()]
    labels = [n if t is None else f"{n}\n{t:.0%} truncated" for n, t in zip(answers, truncated, strict=True)]
    axes[2].barh(range(len(answers)), [m["tokens"]["value"] for m in answers.values()], color=NEUTRAL, height=0.6)
    name_bars(axes[2], labels)
    axes[2].set(title="Answer length", xlabel="mean tokens per answer")
    save(fig, path)
