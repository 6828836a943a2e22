"""The summary of battles, and what eval_win_rate.py --battle prints."""

from preflab.judging.battles import against_opponent, answer_metrics, battle_metrics, bradley_terry, by_category
from utils.errors import is_main_process
from utils.plots import CHOSEN, EVAL, NEUTRAL, empty_panel, figure, save, win_rate_bars
from utils.tables import cell, difference, estimate, render


def battle_summary(judged: dict, answers: dict, pairs: list[tuple[str, str]], answering: list[str], seed: int) -> dict:
    """Every section of battle.json.

    Args:
        judged: `{judge: rows}`, the judge first and its controls after it.
        answers: `{model: answers}`. pairs: who met whom, as (a, b). answering: the models that answered here.

    Returns:
        metrics (of tuned against base, or of each against the opponent), matches, answers, bradley_terry.
    """
    matches = []
    for a, b in pairs:
        mine = {name: [r for r in rows if (r["a"], r["b"]) == (a, b)] for name, rows in judged.items()}
        first = next(iter(mine.values()))
        matches.append(
            {
                "a": a,
                "b": b,
                "judges": {name: battle_metrics(rows, seed) for name, rows in mine.items()},
                "categories": by_category(first, seed),
            }
        )
    rows = next(iter(judged.values()))
    opponent = pairs[0][1] if pairs[0][1] not in answering else None
    metrics = {}
    for match in matches:
        prefix = f"{match['a']}_" if opponent else "" if (match["a"], match["b"]) == ("tuned", "base") else None
        if prefix is not None:
            for k, (judge, found) in enumerate(match["judges"].items()):
                metrics |= {f"{prefix}{key if k == 0 else f'{judge}_{key}'}": m for key, m in found.items()}
    if opponent:
        metrics |= against_opponent(rows, ["base", "tuned"], opponent, seed)
    lengths = {name: answer_metrics(found, seed) for name, found in answers.items()}
    decided = [row for row in rows if row["consistent"] is not None]
    names = list(dict.fromkeys([*answering, *lengths]))
    strengths = bradley_terry(decided, names, seed) if len(names) > 2 and decided else None
    return {"metrics": metrics, "matches": matches, "answers": lengths, "bradley_terry": strengths}


def conclude(sections: dict, published: dict | None, title: str, read: dict) -> tuple[str, str]:
    """(text, verdict): the table with everything below it, and the one sentence that answers the question."""
    blocks = [table(sections, title), models_table(sections, published)]
    categories = [m for m in sections["matches"] if len(m["categories"]) > 1]
    blocks += [categories_table(m) for m in categories]
    if read["left_out"]:
        blocks.append("LEFT OUT: " + ", ".join(f"{k} {v}" for k, v in read["left_out"].items()))
    if published:
        blocks.append(
            f"published: {published['source']}; {published['setting']}: not the judge above, so no difference"
        )
    verdict = claim(sections)
    judged = next(iter(sections["matches"][0]["judges"].values()))
    if "flip_rate" in judged and judged["flip_rate"]["value"] > 0.5 and judged["flip_rate"]["n"] >= 20:
        turned, slot = judged["flip_rate"]["value"], judged["first_slot_wins"]["value"]
        verdict += (
            f" This judge is no judge: its verdict turns with the order on {turned:.1%} of the prompts (the first"
            f" answer wins {slot:.1%})."
        )
    if judged["dropped"]["value"] > 0.1 * judged["prompts"]["value"]:
        verdict += f" Mind that {judged['dropped']['value']} of {judged['prompts']['value']} prompts have no verdict."
    return "\n\n".join([*blocks, verdict]), verdict


def claim(sections: dict) -> str:
    """Who won, in one sentence that never goes beyond the judge's controls."""
    m = sections["metrics"]
    if "win_rate_difference" in m:
        d, p = m["win_rate_difference"], m["p_win_rate_difference"]
        shown = f"against the same opponent tuned scored {difference(d, p, 100)} points more than base"
        clear = d["ci95"] and d["ci95"][0] > 0 and p["value"] < 0.05
        return f"Tuned answers better under this judge: {shown}." if clear else f"No claim: {shown}."
    if opponent_of(sections):
        return "No claim: no prompt has verdicts for both models."
    if "win_rate" not in m:
        return "No claim: no prompt has verdicts in both orders."
    rate, p = m["win_rate"], m["p_win_rate_is_half"]["value"]
    shown = f"tuned wins {estimate(rate, 100)}% against base (95% interval; ties half; sign test p={p:.2g})"
    if not (rate["ci95"] and rate["ci95"][0] > 0.5 and p < 0.05):
        return f"No claim that the judge prefers tuned: {shown}."
    longer = m.get("longer_win_rate")
    caution = ""
    if longer and longer["value"] >= rate["value"]:
        caution = f" A judge of nothing but length would say {100 * longer['value']:.1f}%."
    return f"The judge prefers tuned: {shown}.{caution}"


def table(sections: dict, title: str) -> str:
    """A line a pairing and judge; `a` is the first named of a pairing."""
    lines = [
        ("judge", "win rate, %", "p", "both orders", "by prob.", "same style", "w/t/l", "flips", "slot 1", "unparsed")
    ]
    several = len(sections["matches"]) > 1
    for match in sections["matches"]:
        for judge, m in match["judges"].items():
            name = f"{match['a']} vs {match['b']}: {judge}" if several else judge
            unparsed = f"{m['unparsed_verdicts']['value']}/{m['unparsed_verdicts']['n']}"
            if "win_rate" not in m:
                lines.append((name, *["-"] * 8, unparsed))
                continue
            lines.append(
                (
                    name,
                    estimate(m["win_rate"], 100),
                    f"{m['p_win_rate_is_half']['value']:.2g}",
                    f"{100 * m['win_rate_average_of_orders']['value']:.1f}",
                    f"{100 * m['win_rate_probability']['value']:.1f}" if "win_rate_probability" in m else "-",
                    estimate(m["win_rate_style_controlled"], 100),
                    "/".join(str(m[k]["value"]) for k in ("wins", "ties", "losses")),
                    f"{100 * m['flip_rate']['value']:.1f}%",
                    f"{100 * m['first_slot_wins']['value']:.1f}%",
                    unparsed,
                )
            )
    notes = [
        "win rate: orders that disagree tie; both orders: their mean; by prob.: the judge's probabilities; same style:"
        " length and Markdown held equal; slot 1: verdicts for the first answer"
    ]
    first = next(iter(sections["matches"][0]["judges"].values()))
    if "verdict_mass_median" in first:
        notes.append(
            f"probability on the verdict labels: median {first['verdict_mass_median']['value']:.3f}, below a half in"
            f" {first['verdict_mass_below_half']['value']:.1%}"
        )
    return "\n".join([render(title, lines), *notes])


def models_table(sections: dict, published: dict | None) -> str:
    """A line a model: length of its answers, share cut off, and where they mean something its strength and score."""
    strengths = sections["bradley_terry"]
    scores = {m["a"]: next(iter(m["judges"].values())).get("win_rate_votes") for m in sections["matches"]}
    lines = [("model", "answers", "tokens an answer", "cut off, %", "Bradley-Terry, logits", "score by votes, %")]
    for name, m in sections["answers"].items():
        cut = cell(m["truncated_share"], 100) if "truncated_share" in m else "-"
        strength = estimate(strengths[name], 1, 2) if strengths else "-"
        score = estimate(scores[name], 100) if published and scores.get(name) else "-"
        lines.append((name, str(m["answers"]["value"]), cell(m["tokens"]), cut, strength, score))
    for name, row in (published or {"rows": {}})["rows"].items():
        lines.append((f"{name} (published)", "-", str(row.get("tokens", "-")), "-", "-", str(row["score"])))
    shown = [0, 1, 2, 3, *([4] if strengths else []), *([5] if published else [])]
    return render("answers", [tuple(line[k] for k in shown) for line in lines])


def opponent_of(sections: dict) -> bool:
    """Whether base and tuned met given answers rather than each other."""
    return any(match["a"] == "base" for match in sections["matches"])


def categories_table(match: dict) -> str:
    """Win rate by category of prompts."""
    lines = [("category", "prompts", f"{match['a']} wins, %", "p")]
    for name, c in match["categories"].items():
        lines.append((name, str(c["n"]), estimate(c["win_rate"], 100), f"{c['p_win_rate_is_half']:.2g}"))
    return render(f"{match['a']} vs {match['b']} by category (no correction for many categories)", lines)


def battle_figure(path, sections: dict, headline: str) -> None:
    """Win rates of every pairing under the judge and its controls, by category, and answer lengths.

    Args:
        sections: from `preflab.judging.battle_report.battle_summary`.
    """

    if not is_main_process():
        return
    fig, axes = figure(1, 3, headline)

    rates = []
    for match in sections["matches"]:
        who = f"{match['a']} vs {match['b']}"
        for k, (judge, m) in enumerate(match["judges"].items()):
            if "win_rate" in m:
                rates.append((f"{who}\n{judge.split(':')[-1][-28:]}", m["win_rate"], CHOSEN if k == 0 else NEUTRAL))
            if k == 0 and "win_rate" in m:
                rates.append((f"{who}\nstyle held equal", m["win_rate_style_controlled"], EVAL))
    win_rate_bars(axes[0], rates[:12])
    axes[0].set_title("Win rate, 95% intervals")
    main = sections["matches"][-1]
    parts = [(f"{name} ({c['n']})", c["win_rate"], CHOSEN) for name, c in main["categories"].items()]
    win_rate_bars(axes[1], parts[:16])
    axes[1].set_title(f"{main['a']} vs {main['b']}, by category")
    if not parts:
        empty_panel(axes[1], "the prompts name no category")
    names = list(sections["answers"])
    length = [sections["answers"][name]["tokens"] for name in names]
    cut = [sections["answers"][name].get("truncated_share", {}).get("value") for name in names]
    axes[2].barh(range(len(names)), [m["value"] for m in length], color=NEUTRAL, height=0.6)
    labels = [n if c is None else f"{n}\n{c:.0%} cut off" for n, c in zip(names, cut, strict=True)]
    axes[2].set_yticks(range(len(names)), labels, fontsize=7)
    axes[2].invert_yaxis()
    axes[2].set(title="Answer length", xlabel="mean tokens an answer")
    save(fig, path)
