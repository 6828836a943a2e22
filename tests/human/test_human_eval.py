"""human_eval.py: layout of a blind study, votes of SYNTHETIC annotators, unblinding and scores."""

import json
import math
import random
import re

import numpy as np
import pytest
from conftest import assert_one_line, eval_args, write_jsonl
from scipy.stats import binomtest

from preflab.data.pair_rows import to_pair
from preflab.data.prompts import Prompt
from preflab.human.metrics import agreement, cohen_kappa, krippendorff_alpha, summarise
from preflab.human.page import FORMAT, checksum
from preflab.human.report import agreement_table, render
from preflab.human.study import candidates, candidates_markdown, lay_out, plan, write_study
from preflab.human.votes import read_votes, unblind
from utils.artifacts import dumps
from utils.errors import UserError
from utils.provenance import sha256_of
from utils.stats import sign_test
from utils.tables import quoted

UNJUDGED = {"choice": None, "left_acceptable": None, "right_acceptable": None, "skip": None, "comment": "", "ms": 4000}


def answers_of(names, count) -> dict:
    return {
        name: [{"text": f"{name} says {k}" + " word" * (k % 3), "tokens": 5 + k % 3, "finish_reason": "stop"}
               for k in range(count)]
        for name in names
    }  # fmt: skip


def study(names=("base", "tuned"), count=20, repeat_share=0.1, seed=7, pairs_per_prompt=1):
    """(key, candidates, about) as human_eval.py writes them, without a model."""
    answers = answers_of(names, count)
    pairs, identical = plan(answers, pairs_per_prompt, random.Random(seed))
    key = {
        "study": "s1",
        "models": list(names),
        "items": lay_out(pairs, repeat_share, seed),
        "identical": identical,
    }
    columns = {name: "dpo" if name == "tuned" else name for name in names}
    candidates = [{"prompt": f"prompt {k}", **{columns[n]: answers[n][k]["text"] for n in names}} for k in range(count)]
    about = {
        "prompts": [{"category": "even" if k % 2 == 0 else "odd"} for k in range(count)],
        "answers": answers,
    }
    return key, candidates, about


def export(key, vote, annotator="SYNTHETIC ann") -> dict:
    """A votes file of a synthetic annotator: `vote(item)` returns the fields of a vote, or None for an open pair."""
    votes = [{"id": item["id"], **UNJUDGED, **fields} for item in key["items"] if (fields := vote(item)) is not None]
    return {
        "format": FORMAT,
        "study": key["study"],
        "annotator": annotator,
        "items": len(key["items"]),
        "exported_utc": "2026-01-01T00:00:00Z",
        "votes": votes,
        "checksum": checksum(key["study"], annotator, votes),
    }


def prefers(winner, strong=False):
    """An annotator who always prefers the answer of one model."""
    return lambda item: {"choice": ("left" if item["left"] == winner else "right") + ("_much" if strong else "")}


def scored(key, candidates, about, *exports) -> dict:
    rows = unblind({f"v{k}.json": e for k, e in enumerate(exports)}, key, about)
    return summarise(rows, key, candidates, about, 42)


# --------------------------------------------------------------------------------------------------------- the study


@pytest.mark.parametrize("count", [1, 2, 9, 40, 500])
def test_sides_are_balanced_and_repeats_swapped(count):
    pairs = [{"prompt": k, "a": "tuned", "b": "base"} for k in range(count)]
    items = lay_out(pairs, 0.05, seed=3)
    first = [item for item in items if item["repeat_of"] is None]
    left = sum(item["left"] == "tuned" for item in first)
    assert left in (count // 2, count - count // 2)
    assert sorted(item["prompt"] for item in first) == list(range(count))
    repeats = [item for item in items if item["repeat_of"]]
    assert len(repeats) == min(count // 2, math.ceil(0.05 * count))
    place = {item["id"]: k for k, item in enumerate(items)}
    assert len(place) == len(items)
    for item in repeats:
        first_item = items[place[item["repeat_of"]]]
        assert (item["left"], item["right"], item["prompt"]) == (
            first_item["right"],
            first_item["left"],
            first_item["prompt"],
        )
        assert place[item["id"]] - place[first_item["id"]] >= count // 2


def test_seed_decides_order_sides_and_ids():
    pairs = [{"prompt": k, "a": "tuned", "b": "base"} for k in range(30)]
    assert lay_out(pairs, 0.1, 5) == lay_out(pairs, 0.1, 5)
    items, other = lay_out(pairs, 0.1, 5), lay_out(pairs, 0.1, 6)
    assert not {item["id"] for item in items} & {item["id"] for item in other}
    assert [item["prompt"] for item in items] != sorted(item["prompt"] for item in items)
    assert [i["left"] for i in items] != [i["left"] for i in other]
    salted = lay_out(pairs, 0.1, 5, "pepper")
    assert [i["prompt"] for i in salted] == [i["prompt"] for i in items]
    assert not {i["id"] for i in salted} & {i["id"] for i in items}, "the seed alone does not give the ids"


def test_sides_are_balanced_along_the_page():
    pairs = [{"prompt": k, "a": "tuned", "b": "base"} for k in range(60)]
    left = [item["left"] == "tuned" for item in lay_out(pairs, 0.0, 11)]
    assert all(abs(sum(left[:k]) - k / 2) <= 1 for k in range(61))


def test_repeat_share_zero_repeats_nothing():
    assert all(i["repeat_of"] is None for i in lay_out([{"prompt": 0, "a": "t", "b": "b"}] * 8, 0.0, 1))


def test_pairings_are_sampled_evenly():
    answers = answers_of(["base", "tuned", "c", "d"], 50)
    pairs, identical = plan(answers, 1, random.Random(0))
    counts = {}
    for pair in pairs:
        counts[pair["a"], pair["b"]] = counts.get((pair["a"], pair["b"]), 0) + 1
    assert len(pairs) == 50 and not identical and len(counts) == 6
    assert max(counts.values()) - min(counts.values()) <= 1
    pairs, _ = plan(answers, 3, random.Random(0))
    assert all(len({(p["a"], p["b"]) for p in pairs if p["prompt"] == k}) == 3 for k in range(50))
    with pytest.raises(UserError, match=r"\b6\b"):
        plan(answers, 7, random.Random(0))


def test_identical_answers_are_not_shown():
    answers = answers_of(["base", "tuned"], 4)
    answers["tuned"][2] = answers["base"][2]
    pairs, identical = plan(answers, 1, random.Random(0))
    assert [p["prompt"] for p in identical] == [2] and sorted(p["prompt"] for p in pairs) == [0, 1, 3]


# ------------------------------------------------------------------------------------------------------------- votes


def test_unblind_one_vote():
    key, _, about = study(count=4, repeat_share=0.0)
    item = key["items"][0]
    tuned_left = item["left"] == "tuned"
    fields = {"choice": "left_much", "left_acceptable": True, "right_acceptable": False, "comment": "clear"}
    (row,) = unblind({"v": export(key, lambda i: fields if i is item else None)}, key, about)
    assert (row["a"], row["b"], row["prompt"]) == ("tuned", "base", item["prompt"])
    assert row["preference"] == (2 if tuned_left else -2) and row["outcome"] == (1 if tuned_left else 0)
    assert row["a_acceptable"] is tuned_left and row["b_acceptable"] is not tuned_left
    assert row["a_is_left"] is tuned_left and row["seconds"] == 4.0 and row["comment"] == "clear"
    assert row["category"] == ("even" if item["prompt"] % 2 == 0 else "odd")


@pytest.mark.parametrize("choice, preference, outcome", [
    ("left_much", 2, 1), ("left", 1, 1), ("tie", 0, 0.5), ("both_bad", 0, 0.5), ("right", -1, 0), ("right_much", -2, 0),
])  # fmt: skip
def test_steps_of_every_choice(choice, preference, outcome):
    key, _, about = study(count=6, repeat_share=0.0)
    item = next(i for i in key["items"] if i["left"] == "tuned")
    (row,) = unblind({"v": export(key, lambda i: {"choice": choice} if i is item else None)}, key, about)
    assert (row["preference"], row["outcome"], row["both_bad"]) == (preference, outcome, choice == "both_bad")


def write(path, content) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def edited(**fields):
    """A valid votes file whose fields were changed after the export."""
    return lambda good: {**good, **fields}


def changed_vote(**fields):
    return lambda good: {**good, "votes": [{**good["votes"][0], **fields}, *good["votes"][1:]]}


@pytest.mark.parametrize("break_it, words", [
    (lambda good: [1], ["votes"]),
    (edited(format="other"), ["votes"]),
    (edited(annotator="  "), ["name"]),
    (edited(items="12"), ["'items'"]),
    (edited(checksum=None), ["'checksum'"]),
    (edited(checksum="00000000"), ["edited"]),
    (edited(annotator="SYNTHETIC other"), ["edited"]),
    (edited(study="s2"), ["edited"]),
    (changed_vote(choice="right_much"), ["edited"]),
    (changed_vote(comment="added"), ["edited"]),
    (changed_vote(choice="best"), ["vote 1", "choice"]),
    (changed_vote(ms="long"), ["vote 1"]),
    (changed_vote(model="tuned"), ["vote 1"]),
    (changed_vote(skip="other"), ["vote 1"]),
])  # fmt: skip
def test_bad_votes_file_is_named(tmp_path, break_it, words):
    key, *_ = study(count=6)
    path = write(tmp_path / "v.json", break_it(export(key, prefers("tuned"))))
    with pytest.raises(UserError) as error:
        read_votes([path])
    for word in [path, *words]:
        assert word in str(error.value)


ACCENTED = ("Jos\N{LATIN SMALL LETTER E WITH ACUTE}", "Jose\N{COMBINING ACUTE ACCENT}")


def test_files_of_two_studies_are_not_mixed(tmp_path):
    """Nor two files of one annotator; and a file without votes is refused."""
    key, *_ = study(count=6)
    first = write(tmp_path / "1.json", export(key, prefers("tuned"), "SYNTHETIC Ann"))
    same = write(tmp_path / "2.json", export(key, prefers("base"), "synthetic  ann "))
    with pytest.raises(UserError, match=r"2\.json.*1\.json"):
        read_votes([first, same])
    # One name in two Unicode forms: e with an accent, and e followed by a combining accent.
    forms = [write(tmp_path / f"n{k}.json", export(key, prefers("tuned"), name)) for k, name in enumerate(ACCENTED)]
    with pytest.raises(UserError, match=r"n1\.json.*n0\.json"):
        read_votes(forms)
    other = write(tmp_path / "3.json", export({**key, "study": "s2"}, prefers("base"), "SYNTHETIC Bob"))
    with pytest.raises(UserError, match=r"3\.json"):
        read_votes([first, other])
    empty = write(tmp_path / "4.json", export(key, lambda i: {"skip": "other"}, "SYNTHETIC Eve"))
    with pytest.raises(UserError, match=r"4\.json.*SYNTHETIC Eve"):
        read_votes([first, empty])


def test_votes_on_unknown_or_duplicate_pairs_fail():
    key, _, about = study(count=6)
    good = export(key, prefers("tuned"))
    for votes, words in (
        ([{**good["votes"][0], "id": "ffffffffffff"}], "ffffffffffff"),
        ([good["votes"][0], good["votes"][0]], good["votes"][0]["id"]),
    ):
        with pytest.raises(UserError, match=rf"v\.json: .*{words}"):
            unblind({"v.json": {**good, "votes": votes}}, key, about)
    with pytest.raises(UserError, match="5 pairs"):
        unblind({"v.json": {**good, "items": 5}}, key, about)


# ----------------------------------------------------------------------------------------------------------- metrics


def test_metrics_of_one_annotator():
    key, candidates, about = study(count=20, repeat_share=0.0)
    # 12 wins (4 of them strong), 5 losses, 2 ties, 1 both bad.
    outcomes = ["win_much"] * 4 + ["win"] * 8 + ["loss"] * 5 + ["tie"] * 2 + ["both_bad"]

    def vote(item):
        outcome = outcomes[item["prompt"]]
        if not outcome.startswith(("win", "loss")):
            return {"choice": outcome}
        winner = "tuned" if outcome.startswith("win") else "base"
        return prefers(winner, outcome.endswith("much"))(item)

    sections = scored(key, candidates, about, export(key, vote))
    m = {name: metric["value"] for name, metric in sections["metrics"].items()}
    assert m["win_rate"] == (12 + 3 / 2) / 20
    assert m["p_win_rate_is_half"] == pytest.approx(binomtest(12, 17).pvalue)
    names = ("much_better", "better", "tie", "both_bad", "worse", "much_worse")
    assert [m[f"votes_{k}"] for k in names] == [4, 8, 2, 1, 5, 0]
    assert m["both_bad_share"] == 1 / 20 and m["preference_steps"] == (2 * 4 + 8 - 5) / 20
    assert m["judged"] == 20 and m["skipped"] == 0 and m["seconds_median"] == 4.0
    ends = sections["metrics"]["win_rate"]["ci95"]
    # The bootstrap's standard error of a mean is near sd / sqrt(n).
    y = np.array([1] * 12 + [0] * 5 + [0.5] * 3)
    assert sections["metrics"]["win_rate"]["stderr"] == pytest.approx(y.std() / math.sqrt(20), rel=0.08)
    assert ends[0] < m["win_rate"] < ends[1]
    even = sections["matches"][0]["categories"]["even"]
    # Even prompts: 0 to 10 won (6), 12 to 16 lost (3), 18 tied.
    assert even["n"] == 10 and even["win_rate"]["value"] == (6 + 1 / 2) / 10


def test_prompts_have_equal_weight():
    key, candidates, about = study(count=4, repeat_share=0.0)
    every = export(key, lambda i: prefers("tuned")(i) if i["prompt"] < 2 else prefers("base")(i), "SYNTHETIC 1")
    first = export(key, lambda i: prefers("base")(i) if i["prompt"] == 0 else None, "SYNTHETIC 2")
    sections = scored(key, candidates, about, every, first)
    # Prompt 0 is split, 1 won, 2 and 3 lost.
    assert sections["metrics"]["win_rate"]["value"] == (0.5 + 1 + 0 + 0) / 4
    assert sections["metrics"]["win_rate"]["n"] == 4 and sections["metrics"]["votes"]["value"] == 5
    assert sections["metrics"]["p_win_rate_is_half"]["value"] == 1.0
    assert sections["metrics"]["judged"] == {"value": 5, "stderr": None, "ci95": None, "n": 8}


def test_identical_answers_are_ties():
    key, candidates, about = study(count=4, repeat_share=0.0)
    key["items"] = [i for i in key["items"] if i["prompt"] != 3]
    key["identical"] = [{"prompt": 3, "a": "tuned", "b": "base"}]
    m = scored(key, candidates, about, export(key, prefers("tuned")))["metrics"]
    assert m["win_rate"]["value"] == 1.0 and m["identical_answers"]["value"] == 1 and m["votes"]["value"] == 3
    assert m["win_rate_whole_set"]["value"] == 3.5 / 4
    # A half-finished study is not diluted: the judged pair stands for all pairs of the page.
    partial = scored(key, candidates, about, export(key, lambda i: prefers("tuned")(i) if i["prompt"] == 0 else None))
    assert partial["metrics"]["win_rate_whole_set"]["value"] == 3.5 / 4


def test_equal_shares_of_thirds_tie():
    """(1 + 2/3 - 2/3) / 2 is not 0.5 in floating point; ten such prompts would look like ten losses."""
    key, candidates, about = study(count=10, repeat_share=0.0)
    good = {"choice": "tie", "left_acceptable": True, "right_acceptable": True}
    bad = {**good, "left_acceptable": False, "right_acceptable": False}
    exports = [export(key, lambda i, f=f: f, f"SYNTHETIC {k}") for k, f in enumerate((good, good, bad))]
    m = scored(key, candidates, about, *exports)["metrics"]
    assert m["acceptable_a"]["value"] == pytest.approx(2 / 3) and m["acceptable_difference"]["value"] == 0
    assert m["p_acceptable_difference"]["value"] == 1.0


def test_repeat_replaces_skipped_first():
    key, candidates, about = study(count=10, repeat_share=0.2)
    repeated = {i["repeat_of"] for i in key["items"]} - {None}
    vote = export(key, lambda i: {"skip": "other"} if i["id"] in repeated else prefers("tuned")(i))
    m = scored(key, candidates, about, vote)["metrics"]
    assert m["votes"]["value"] == 10 and m["win_rate"]["value"] == 1.0 and m["skipped"]["value"] == 2
    assert m["self_consistency"]["value"] is None


def test_tie_and_both_bad_are_not_consistent():
    key, candidates, about = study(count=10, repeat_share=0.2)
    m = scored(key, candidates, about, export(key, lambda i: {"choice": "both_bad" if i["repeat_of"] else "tie"}))
    assert m["metrics"]["self_consistency"]["value"] == 0.0


def test_strengths_need_connected_models():
    key, candidates, about = study(("base", "tuned", "third"), count=30, repeat_share=0.0)
    vote = export(key, lambda i: prefers("tuned")(i) if "base" not in (i["left"], i["right"]) else None)
    sections = scored(key, candidates, about, vote)
    assert sections["bradley_terry"] is None and "win_rate" not in sections["metrics"]
    assert "No claim: nobody judged tuned against base" in render(sections, "t").text


def test_position_bias_is_reported():
    key, candidates, about = study(count=40, repeat_share=0.2)
    sections = scored(key, candidates, about, export(key, lambda item: {"choice": "left"}))
    m = sections["metrics"]
    assert m["win_rate"]["value"] == 0.5
    assert m["left_wins"]["value"] == 1.0 and m["p_left_wins_is_half"]["value"] == pytest.approx(2 * 0.5**40)
    # None of 8: Wilson's interval.
    assert m["self_consistency"]["value"] == 0.0 and m["self_consistency"]["n"] == 8
    assert m["self_consistency"]["ci95"] == pytest.approx([0.0, 0.324], abs=1e-3)


def test_consistent_annotator_has_no_bias():
    key, candidates, about = study(count=40, repeat_share=0.2)
    m = scored(key, candidates, about, export(key, prefers("tuned", strong=True)))["metrics"]
    assert m["win_rate"]["value"] == 1.0 and m["self_consistency"]["value"] == 1.0
    assert m["votes"]["value"] == 40, "repeated pairs are counted once"
    assert m["judged"]["value"] == 48
    # The 40 pairs are balanced; the 8 repeats have their sides swapped.
    assert abs(m["left_wins"]["value"] - 0.5) <= 4 / 48


def test_acceptable_counts_marked_answers():
    key, candidates, about = study(count=10, repeat_share=0.0)

    def vote(item):
        if item["prompt"] >= 8:
            return {"choice": "tie"}
        good, bad = ("left", "right") if item["left"] == "tuned" else ("right", "left")
        return {"choice": "tie", f"{good}_acceptable": True, f"{bad}_acceptable": item["prompt"] < 2}

    m = scored(key, candidates, about, export(key, vote))["metrics"]
    assert m["acceptable_a"]["value"] == 1.0 and m["acceptable_b"]["value"] == 2 / 8
    assert m["acceptable_difference"]["value"] == 6 / 8
    assert m["p_acceptable_difference"]["value"] == pytest.approx(binomtest(6, 6).pvalue)


def test_sign_test_takes_means_of_votes():
    assert sign_test([0.75, 0.6, 0.5, 0.25]) == pytest.approx(binomtest(2, 3).pvalue)


# Krippendorff (2011), Computing Krippendorff's Alpha-Reliability: four observers, twelve units.
OBSERVERS = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, np.nan, np.nan, np.nan],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, np.nan, 3],
        [np.nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, np.nan],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, np.nan],
    ]
)


@pytest.mark.parametrize("kind, published", [("nominal", 0.743), ("ordinal", 0.815)])
def test_alpha_equals_published_example(kind, published):
    alpha = krippendorff_alpha(OBSERVERS.T, kind, 0)
    assert alpha["value"] == pytest.approx(published, abs=5e-4)
    assert alpha["ci95"][0] < published < alpha["ci95"][1]


def test_kappa_equals_sklearn():
    from sklearn.metrics import cohen_kappa_score

    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: agreement 0.7, by chance 0.5.
    both = np.array([[1, 1]] * 20 + [[1, -1]] * 5 + [[-1, 1]] * 10 + [[-1, -1]] * 15)
    assert cohen_kappa(both) == pytest.approx((0.7 - 0.5) / 0.5)
    steps = np.random.default_rng(0).integers(-2, 3, (60, 2))
    steps[::2, 1] = steps[::2, 0]
    assert cohen_kappa(steps) == pytest.approx(cohen_kappa_score(*steps.T))
    quadratic = cohen_kappa_score(*steps.T, weights="quadratic")
    assert cohen_kappa(steps, "quadratic") == pytest.approx(quadratic)


def test_agreement_of_annotators():
    key, candidates, about = study(count=12, repeat_share=0.0)
    rng = random.Random(1)
    random_choice = {item["id"]: rng.choice(["left", "right", "tie"]) for item in key["items"]}

    def opinion(item):
        return prefers("tuned" if item["prompt"] % 3 else "base")(item)

    exports = [
        export(key, opinion, "SYNTHETIC 1"),
        export(key, opinion, "SYNTHETIC 2"),
        export(key, lambda item: {"choice": random_choice[item["id"]]}, "SYNTHETIC 3"),
    ]
    agreements = scored(key, candidates, about, *exports)["agreement"]
    assert agreements["pairs"]["value"] == 12 and len(agreements["kappas"]) == 3
    same = next(k for k in agreements["kappas"] if k["annotators"] == ["SYNTHETIC 1", "SYNTHETIC 2"])
    assert same["kappa"]["value"] == 1.0 and same["kappa_weighted"]["value"] == 1.0
    assert agreements["alpha_nominal"]["value"] < 1.0
    rows = unblind({"v": exports[0]}, key, about)
    assert agreement(rows, 0) == {}, "agreement needs two annotators"


def test_agreement_of_many_annotators():
    """66 pairs of annotators: kappas as scikit-learn's, without intervals, and one row in the report."""
    from sklearn.metrics import cohen_kappa_score

    key, candidates, about = study(count=12, repeat_share=0.0)
    rng = random.Random(2)
    exports = [
        export(key, lambda item: {"choice": rng.choice(["left", "right", "tie"])}, f"SYNTHETIC {k}") for k in range(12)
    ]
    sections = scored(key, candidates, about, *exports)
    agreements = sections["agreement"]
    rows = unblind({f"v{k}": e for k, e in enumerate(exports)}, key, about)
    by_name = {
        name: {r["prompt"]: r["preference"] for r in rows if r["annotator"] == name}
        for name in {r["annotator"] for r in rows}
    }
    assert len(agreements["kappas"]) == 66
    for k in agreements["kappas"][::20]:
        first, second = ([by_name[name][prompt] for prompt in range(12)] for name in k["annotators"])
        assert k["kappa"]["value"] == pytest.approx(cohen_kappa_score(np.sign(first), np.sign(second)))
        assert k["kappa"]["ci95"] is None and k["kappa"]["n"] == 12
    table = agreement_table(agreements)
    assert "66 pairs of annotators" in table and "SYNTHETIC" not in table and len(table.splitlines()) < 10


def test_agreement_of_equal_votes_is_undefined():
    key, candidates, about = study(count=8, repeat_share=0.0)
    both = [export(key, prefers("tuned"), f"SYNTHETIC {k}") for k in range(2)]
    agreements = scored(key, candidates, about, *both)["agreement"]
    assert math.isnan(agreements["alpha_ordinal"]["value"])
    assert math.isnan(agreements["kappas"][0]["kappa"]["value"])


def test_strengths_of_three_models():
    key, candidates, about = study(("base", "tuned", "third"), count=60, repeat_share=0.0)
    order = {"base": 0, "third": 1, "tuned": 2}

    def vote(item):
        return {"choice": "left" if order[item["left"]] > order[item["right"]] else "right"}

    sections = scored(key, candidates, about, export(key, vote))
    strengths = {name: m["value"] for name, m in sections["bradley_terry"].items()}
    assert strengths["base"] == 0.0 < strengths["third"] < strengths["tuned"]
    assert {(m["a"], m["b"]) for m in sections["matches"]} == {("tuned", "base"), ("third", "base"), ("third", "tuned")}
    assert sum(m["metrics"]["votes"]["value"] for m in sections["matches"]) == 60


def test_tables_fit_100_columns():
    key, candidates, about = study(("base", "tuned", "third"), count=30, repeat_share=0.1)
    marks = {"left_acceptable": True, "right_acceptable": False}
    exports = [
        export(key, lambda item: {**prefers("tuned")(item), **marks}, "SYNTHETIC 1"),
        export(key, lambda item: {"choice": "left", **marks}, "SYNTHETIC 2"),
    ]
    report = render(scored(key, candidates, about, *exports), "quickstart: 2 annotators, 30 prompts, blind")
    tables = report.text.removesuffix(report.verdict)
    assert "Bradley-Terry" in tables and "Krippendorff" in tables
    assert max(map(len, tables.splitlines())) <= 100


def test_order_of_files_does_not_matter():
    key, candidates, about = study(count=10, repeat_share=0.2)
    exports = [export(key, prefers("tuned"), "SYNTHETIC 1"), export(key, lambda i: {"choice": "left"}, "SYNTHETIC 2")]
    first, second = (scored(key, candidates, about, *order) for order in (exports, exports[::-1]))
    assert first["metrics"]["win_rate"] == second["metrics"]["win_rate"]
    assert first["agreement"]["alpha_ordinal"]["value"] == pytest.approx(second["agreement"]["alpha_ordinal"]["value"])


# --------------------------------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    words = "river stone cloud paper lamp garden winter music".split()
    rows = [{"prompt": f"Tell me about {word}.", "category": "ab"[k % 2]} for k, word in enumerate(words)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def dump_args(trained, prompts, out, *extra):
    return eval_args(trained, out, "--prompts", prompts, "--max_new_tokens", 12, *extra)


def test_page_then_score(call, trained, prompts, tmp_path):
    arguments = dump_args(trained, prompts, tmp_path, "--repeat_share", "0.3")
    code, out, err = call("human_eval", *arguments)
    assert code == 0, err
    folder = tmp_path / "r"
    candidates = json.loads((folder / "manual_eval_candidates.json").read_text())
    assert len(candidates) == 8 and all(set(row) == {"prompt", "base", "dpo", "truncated"} for row in candidates)
    about = json.loads((folder / "manual_eval_candidates.about.json").read_text())
    assert about["sampling"] == {"max_new_tokens": 12, "temperature": 0.0, "top_p": 1.0, "seed": 42}
    assert about["model"]["tuned"]["adapter_sha256"] and about["run"]["git_commit"]
    assert "### dpo" in (folder / "manual_eval_candidates.md").read_text()
    key = json.loads((folder / "human_eval_key.json").read_text())
    assert "8 prompts" in out

    # The page contains neither models nor seed nor sides.
    page = (folder / "human_eval.html").read_text()
    shown = page.split('type="application/json"')[1].split("</script>")[0]
    for secret in ("base", "tuned", "dpo", "repeat", str(key["sides_seed"]), key["candidates_sha256"], "checkpoint"):
        assert secret not in shown
    assert str(key["sides_seed"]) not in page and trained.name not in page
    data = json.loads(shown[shown.index(">") + 1 :])
    assert [item["id"] for item in data["items"]] == [item["id"] for item in key["items"]]
    assert {field for item in data["items"] for field in item} == {"id", "prompt", "left", "right"}

    # The same command makes the same page again; another study in the same folder is refused.
    code, *_ = call("human_eval", *arguments)
    assert code == 0 and (folder / "human_eval.html").read_text() == page
    code, _, err = call("human_eval", *arguments[:-1], "0.0")
    assert code == 2
    assert_one_line(err, "human_eval_key.json", "--output_dir", "--overwrite")

    files = [
        write(tmp_path / "votes-1.json", export(key, prefers("tuned"), "SYNTHETIC 1 (always tuned)")),
        write(tmp_path / "votes-2.json", export(key, lambda i: {"choice": "tie", "comment": "|x|"}, "SYNTHETIC 2")),
    ]
    people = tmp_path / "people.jsonl"
    code, out, err = call("human_eval", "--score", *files, "--eval_out", tmp_path, "--pairs", people)
    assert code == 0, err
    result = json.loads((folder / "human_eval.json").read_text())
    pairs = len(key["items"]) - sum(i["repeat_of"] is not None for i in key["items"])
    assert result["metrics"]["win_rate"]["value"] == pytest.approx(0.75)
    expected = (pairs * 0.75 + len(key["identical"]) * 0.5) / (pairs + len(key["identical"]))
    assert result["metrics"]["win_rate_whole_set"]["value"] == pytest.approx(expected)
    assert result["stage"] == "human_eval" and result["study"]["sides_seed"] == key["sides_seed"]
    assert set(result["annotators"]) == {"SYNTHETIC 1 (always tuned)", "SYNTHETIC 2"}
    assert result["votes"][files[0]]["sha256"] and result["run"]["versions"]["torch"]
    assert result["claim"] in " ".join(out.split()) and "Krippendorff" in out
    assert (folder / "human_eval.png").read_bytes()[:4] == b"\x89PNG"
    rows = [json.loads(line) for line in (folder / "human_eval_rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * len(key["items"])
    assert "tuned preferred" in (folder / "human_eval_strongest.md").read_text()

    # One of the two votes on each pair prefers tuned, the other is a tie.
    written = [json.loads(line) for line in people.read_text().splitlines()]
    assert len(written) == pairs and {row["votes"] for row in written} == {2}
    by_prompt = {c["prompt"]: c for c in json.loads((folder / "manual_eval_candidates.json").read_text())}
    for row in written:
        candidate, pair = by_prompt[row["prompt"][0]["content"]], to_pair(row, "row")
        assert (pair.chosen, pair.rejected) == (candidate["dpo"], candidate["base"])
    assert result["pairs"]["ties"] == result["pairs"]["by_several"] == pairs and result["pairs"]["disagreements"] == 0
    assert f"{pairs} preference pairs of {pairs} judged ones" in out
    # Pairs of the same study are replaced, other rows are not.
    write_jsonl(people, [*written, {"prompt": "a", "chosen": "b", "rejected": "c"}])
    code, _, err = call("human_eval", "--score", *files, "--eval_out", tmp_path, "--pairs", people)
    assert code == 2
    assert_one_line(err, "--pairs", "people.jsonl", "--overwrite")

    # A score with fewer annotators does not replace one with more.
    code, _, err = call("human_eval", "--score", files[1], "--eval_out", tmp_path)
    assert code == 2
    assert_one_line(err, "human_eval.json", "SYNTHETIC 1 (always tuned)", "--overwrite")

    # Votes do not apply to an edited candidates file.
    (folder / "manual_eval_candidates.json").write_text(json.dumps(candidates[:-1]))
    code, _, err = call("human_eval", "--score", *files, "--eval_out", tmp_path)
    assert code == 2
    assert_one_line(err, "manual_eval_candidates.json")


def test_further_model_and_limit_in_file_names(call, trained, prompts, tiny, tmp_path):
    extra = ("--models", f"other={trained / 'ck' / 'r' / 'checkpoint-2'}", "--limit", "6", "--pairs_per_prompt", "2")
    code, _, err = call("human_eval", *dump_args(trained, prompts, tmp_path, *extra))
    assert code == 0, err
    key = json.loads((tmp_path / "r" / "human_eval_key_LIMIT6.json").read_text())
    assert key["models"] == ["base", "tuned", "other"]
    row = json.loads((tmp_path / "r" / "manual_eval_candidates_LIMIT6.json").read_text())[0]
    assert list(row) == ["prompt", "base", "dpo", "other", "truncated"]
    votes = write(tmp_path / "v.json", export(key, lambda item: {"choice": "left"}))
    code, out, err = call("human_eval", "--score", votes, "--key", tmp_path / "r" / "human_eval_key_LIMIT6.json")
    assert code == 0, err
    assert "Bradley-Terry" in out and (tmp_path / "r" / "human_eval_LIMIT6.json").exists()


def test_missing_or_wrong_key_is_named(call, tmp_path):
    code, _, err = call("human_eval", "--score", tmp_path / "none.json")
    assert code == 2
    assert_one_line(err, "none.json")
    key, *_ = study(count=6)
    votes = write(tmp_path / "v.json", export(key, prefers("tuned")))
    code, _, err = call("human_eval", "--score", votes, "--eval_out", tmp_path)
    assert code == 2
    assert_one_line(err, votes, "human_eval_key.json", "--key")
    broken = write(tmp_path / "human_eval_key.json", [1])
    code, _, err = call("human_eval", "--score", votes, "--eval_out", tmp_path)
    assert code == 2
    assert_one_line(err, broken, "--key")
    complete = {**key, "candidates": "c.json", "candidates_sha256": "", "limit": None}
    other = write(tmp_path / "human_eval_key.json", {**complete, "study": "s9"})
    for wrong in (other, votes):
        code, _, err = call("human_eval", "--score", votes, "--eval_out", tmp_path, "--key", wrong)
        assert code == 2
        assert_one_line(err, wrong)


def test_quoted_text_closes_code_fences():
    assert quoted("```py\nx = 1") == "> ```py\n> x = 1\n" and quoted("") == "> (empty)\n"


def test_votes_with_byte_order_mark_are_read(tmp_path):
    key, *_ = study(count=6)
    path = tmp_path / "v.json"
    path.write_text("\ufeff" + json.dumps(export(key, prefers("tuned"))), encoding="utf-8")
    assert read_votes([str(path)])
    path.write_text("{")
    with pytest.raises(UserError, match="v.json.*export"):
        read_votes([str(path)])


# ---- answers cut off at the token limit


def prompts_of(count):
    return [Prompt([{"role": "user", "content": f"prompt {k}"}], f"row {k}") for k in range(count)]


def test_answers_cut_off_are_marked_in_every_file(tmp_path):
    answers = answers_of(("base", "tuned"), 4)
    answers["tuned"][2]["finish_reason"] = "length"
    answers["base"][1]["finish_reason"] = None
    rows = candidates(prompts_of(4), answers)
    assert [row["truncated"] for row in rows] == [[], [], ["dpo"], []]
    assert candidates_markdown("t", rows).count("### dpo (cut off at the token limit)") == 1
    paths = {kind: tmp_path / f"{kind}.{suffix}" for kind, suffix in
             (("candidates", "json"), ("page", "html"), ("key", "json"))}  # fmt: skip
    settings = {"pairs_per_prompt": 1, "repeat_share": 0.0, "limit": None, "sides_seed": 1}
    key = write_study(paths, prompts_of(4), answers, "t", {}, settings, overwrite=False)
    item = next(item for item in key["items"] if item["prompt"] == 2)
    shown = json.loads(re.search(r'id="data">(.*?)</script>', paths["page"].read_text(), re.S)[1])["items"]
    shown = next(entry for entry in shown if entry["id"] == item["id"])
    marked = {side: '<p class="cut">' in shown[side] for side in ("left", "right")}
    assert marked == {side: item[side] == "tuned" for side in ("left", "right")}


def test_study_of_an_earlier_version_keeps_its_votes(tmp_path):
    """The candidates' file of earlier versions has no column `truncated`; its study is the same."""
    paths = {kind: tmp_path / f"{kind}.json" for kind in ("candidates", "page", "key")}
    settings = {"pairs_per_prompt": 1, "repeat_share": 0.0, "limit": None, "sides_seed": 1}
    call = (paths, prompts_of(4), answers_of(("base", "tuned"), 4), "t", {}, settings)
    key = write_study(*call, overwrite=False)
    content = json.loads(paths["candidates"].read_text())
    earlier = dumps([{k: v for k, v in row.items() if k != "truncated"} for row in content]) + "\n"
    assert key["study"] == sha256_of(key["salt"], earlier, dumps(key["items"]))[:16]
    paths["key"].write_text(dumps({**key, "candidates_sha256": sha256_of(earlier)}))
    assert write_study(*call, overwrite=False)["study"] == key["study"]
    with pytest.raises(UserError, match="another study"):
        write_study(*call[:5], {**settings, "repeat_share": 0.5}, overwrite=False)


# ----------------------------------------------------------------------------------------------- files that people edit


def test_half_an_emoji_in_a_comment_or_name_does_not_stop_the_scoring(tmp_path):
    key, *_ = study(count=4, repeat_share=0)
    cut = "\ud83d"
    votes = export(key, lambda item: {"choice": "tie", "comment": f"fine {cut}"}, annotator=f"SYNTHETIC {cut}")
    (tmp_path / "v.json").write_text(json.dumps(votes))
    (read,) = read_votes([str(tmp_path / "v.json")]).values()
    assert read["annotator"] == "SYNTHETIC \ufffd" and read["votes"][0]["comment"] == "fine \ufffd"


def test_one_name_in_two_unicode_forms_is_one_person(tmp_path):
    key, *_ = study(count=4, repeat_share=0)
    for form, name in (("nfc", "SYNTHETIC Ren\u00e9"), ("nfd", "SYNTHETIC Rene\u0301")):
        (tmp_path / f"{form}.json").write_text(json.dumps(export(key, lambda item: {"choice": "tie"}, name)))
    with pytest.raises(UserError, match="also exported"):
        read_votes([str(tmp_path / "nfc.json"), str(tmp_path / "nfd.json")])


def test_edited_candidates_are_not_overwritten(tmp_path):
    prompts = [Prompt([{"role": "user", "content": f"prompt {k}"}], f"row {k}") for k in range(6)]
    names = {"candidates": "manual_eval_candidates.json", "page": "human_eval.html", "key": "human_eval_key.json"}
    paths = {kind: tmp_path / name for kind, name in names.items()}
    settings = {"pairs_per_prompt": 1, "repeat_share": 0, "limit": None, "sides_seed": None}

    def write(overwrite=False):
        return write_study(paths, prompts, answers_of(("base", "tuned"), 6), "t", {}, settings, overwrite)

    key = write()
    assert write()["study"] == key["study"]
    edited = paths["candidates"].read_text().replace("tuned says 0", "my own answer")
    paths["candidates"].write_text(edited)
    with pytest.raises(UserError, match="manual_eval_candidates.json: edited"):
        write()
    assert paths["candidates"].read_text() == edited
    write(overwrite=True)
    assert "my own answer" not in paths["candidates"].read_text()
