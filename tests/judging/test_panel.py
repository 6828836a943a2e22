"""Panels of judges: the majority by hand, alpha against Krippendorff's own example, audits, and a battle end to end."""

import pytest
from conftest import assert_one_line, write_jsonl

from preflab.data.prompts import Prompt
from preflab.judging.battle_report import panel_table, verdict_of
from preflab.judging.battles import combine_orders
from preflab.judging.judge_prompt import Item, Verdict, unparsed
from preflab.judging.judges import LongerJudge
from preflab.judging.panel import Member, Panel, panel_rows, panel_section, vote
from utils.artifacts import RowFile, metric, read_json
from utils.tables import wrap_sentences


@pytest.mark.parametrize(
    ("firsts", "first", "mean"),
    [
        ((1, 1, 0), 1, 2 / 3),
        ((1, 0), 0.5, 1 / 2),
        ((1, 0.5, 0.5), 1, 2 / 3),
        ((0, 0.5, 1, 0), 0, 3 / 8),
        ((None, 0, 0), 0, 0),
        ((None, 1, 0), 0.5, 1 / 2),
    ],
)
def test_majority_and_mean_by_hand(firsts, first, mean):
    voted = vote([unparsed("no label") if f is None else Verdict(float(f), 0.99) for f in firsts])
    assert voted.first == first and voted.probability == pytest.approx(mean)
    assert (voted.note is None) == (None not in firsts)
    assert voted.note is None or voted.note.startswith("1 of 3 judges")


def test_no_vote_is_no_verdict():
    assert vote([unparsed("cut off"), unparsed("other")]) == unparsed("cut off")


class Shortest:
    """The answer with fewer characters wins."""

    name, instant = "shortest", True

    def identity(self):
        return {"judge": self.name}

    def judge(self, items):
        for i, item in enumerate(items):
            a, b = len(item.first), len(item.second)
            yield i, Verdict(0.5 + 0.5 * ((a < b) - (a > b)))


def test_panel_is_a_judge(tmp_path):
    prompt = Prompt([{"role": "user", "content": "q"}], "")
    panel = Panel([LongerJudge(), LongerJudge(), Shortest()], str(tmp_path))
    verdicts = dict(panel.judge([Item(prompt, "long", "s"), Item(prompt, "s", "long"), Item(prompt, "x", "x")]))
    assert [verdicts[k].first for k in range(3)] == [1, 0, 0.5]
    assert [verdicts[k].probability for k in range(3)] == pytest.approx([2 / 3, 1 / 3, 0.5])
    assert verdicts[2].label == "identical" and len(panel.identity()["members"]) == 3


def member(name: str, outcomes: list) -> Member:
    """A judge whose verdict on prompt k is outcomes[k] for `a` in both orders; None: no verdict."""

    class Named(Shortest):
        pass

    judge = Named()
    judge.name = name
    rows = []
    for k, y in enumerate(outcomes):
        orders = [unparsed("none")] * 2 if y is None else [Verdict(float(y)), Verdict(1 - float(y))]
        sides = {f"answer_{s}": {"text": s, "tokens": 1} for s in "ab"}
        rows.append({"prompt": k, "a": "tuned", "b": "base", "category": None, **sides, **combine_orders(*orders)})
    return Member(judge, rows, {"seconds": 1.0, "computed": 4, "of": 2 * len(rows), "tokens_read": 1234})


def test_section_leaves_one_out_and_names_who_has_no_vote():
    a, b = member("a", [1, 1, 0, 0]), member("b", [1, 0, 1, 0])
    c, failed = member("c", [1, 1, 1, None]), member("failed", [0, 0, 0, 0])
    assert [row["consistent"] for row in panel_rows([a, b, c])] == [1, 1, 1, 0]
    # Outcome 4 has a vote of two judges.
    assert panel_rows([a, b, c])[3]["probability"] == 0
    section = panel_section([a, b, c, failed], [a, b, c], ("tuned", "base"), 0)
    rates = {name: m["win_rate"]["value"] for name, m in section["members"].items()}
    assert rates == pytest.approx({"a": 0.5, "b": 0.5, "c": 1, "failed": 0})
    without = {name: m["without"]["win_rate"]["value"] for name, m in section["members"].items() if "without" in m}
    # Without a: b and c give 1, 0.5, 1 and 0; without c: a and b give 1, 0.5, 0.5 and 0.
    assert without == pytest.approx({"a": 2.5 / 4, "b": 2.5 / 4, "c": 2 / 4})
    assert "without" not in section["members"]["failed"] and not section["members"]["failed"]["votes"]
    assert section["agreement"]["alpha_voting"]["value"] > section["agreement"]["alpha"]["value"]
    table = panel_table(section, None)
    assert "1,234 tokens read" in table and max(map(len, wrap_sentences(table).splitlines())) <= 100


def audit_of(*passed: bool) -> dict:
    figures = {"agreement": metric(0.7, 0.05, (0.6, 0.8), 100)}
    difference = {"difference": metric(0.1, 0.05, (0.0, 0.2), 100), "p": metric(0.01)}
    audit = {"audit": figures, "against_longer": difference}
    members = {f"judge-{k}": {**audit, "passed": each} for k, each in enumerate(passed)}
    return {"members": members, "passed": any(passed)}


def test_verdict_names_the_judges_without_a_vote():
    rate = {"win_rate": metric(0.8, 0.04, (0.72, 0.87), 120), "p_win_rate_is_half": metric(1e-9)}
    sections = {"metrics": rate, "matches": [{"a": "tuned", "b": "base"}], "answers": {"base": {}, "tuned": {}}}
    sections |= {"panel": {}, "audit": audit_of(True, False, True)}
    verdict = verdict_of(sections)
    assert verdict.startswith("The panel prefers tuned") and verdict.endswith("audit failed: judge-1.")
    nobody = verdict_of({**sections, "audit": audit_of(False, False)})
    assert nobody.startswith("No claim: every judge of the panel failed its audit. (The panel prefers tuned")
    one = {key: value for key, value in sections.items() if key != "panel"}
    assert verdict_of({**one, "audit": {"passed": False}}).startswith("No claim: the judge failed its audit.")
    assert verdict_of({**one, "audit": {"passed": True}}).startswith("The judge prefers tuned")


# --------------------------------------------------------------------------------------------------------- end to end


def letter(prefers: str):
    """A judge's server that chooses the answer that contains a word, else the first."""

    def reply(question, _):
        answers = question.split("# Answer ")[1:]
        return "B" if prefers in answers[1] and prefers not in answers[0] else "A"

    return reply


@pytest.fixture
def battle(endpoint, tmp_path):
    """Arguments of a battle that tuned wins on 10 of 12 prompts, and labelled pairs for its audit."""
    base = endpoint(lambda *_: "bad, and it goes into much more detail")[0]
    tuned = endpoint(lambda question, _: "good" if int(question.split()[-1]) < 10 else "bad, short")[0]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {k}"} for k in range(12)])
    pairs = [{"prompt": f"pair {k}", "chosen": f"good {k}", "rejected": f"bad answer {k} in detail"} for k in range(30)]
    labelled = write_jsonl(tmp_path / "labelled.jsonl", pairs)
    args = ["--battle", "--base_model", base, "--tuned_model", tuned, "--prompts", prompts, "--audit_dataset", labelled]
    return [*args, "--audit_split", "train", "--eval_out", tmp_path / "out", "--judge_attempts", 0]


def test_panel_of_a_battle(battle, endpoint, call, tmp_path):
    """Two judges know the good answer, the third prefers details and fails its audit: it has no vote."""
    judges = [endpoint(letter(word))[0] for word in ("good", "good", "detail")]
    flags = [word for judge in judges for word in ("--judge", judge)]
    code, stdout, err = call("eval_win_rate", *battle, *flags)
    assert code == 0, err
    summary = read_json(tmp_path / "out/m/battle.json")
    assert summary["args"]["judge"] == judges and summary["model"]["judge"]["judge"] == "panel of 2 judges"
    passed = {name: m["passed"] for name, m in summary["audit"]["members"].items()}
    assert passed == dict(zip(judges, (True, True, False), strict=True)) and summary["audit"]["passed"]
    members = summary["panel"]["members"]
    assert [members[name]["votes"] for name in judges] == [True, True, False]
    # Ten wins; on the other two prompts no answer has the word, so that the first wins in both orders: ties.
    assert [members[name]["win_rate"]["value"] for name in judges[:2]] == pytest.approx([11 / 12] * 2)
    assert summary["metrics"]["win_rate"]["value"] == pytest.approx(11 / 12)
    assert members[judges[2]]["cost"]["computed"] == members[judges[2]]["cost"]["of"] == 24
    assert summary["claim"].startswith("The panel prefers tuned") and judges[2] in summary["claim"]
    assert "FAILED, no vote" in stdout and max(map(len, stdout.splitlines())) <= 100
    rows = [row["members"] for row in RowFile(tmp_path / "out/m/battle_rows.jsonl").read()]
    assert len(rows) == 12 and set(rows[0]) == set(judges)


def test_one_judge_is_audited_where_pairs_are_named(battle, endpoint, call, tmp_path):
    judge = endpoint(letter("detail"))[0]
    code, _, err = call("eval_win_rate", *battle, "--judge", judge)
    assert code == 0, err
    summary = read_json(tmp_path / "out/m/battle.json")
    assert summary["claim"].startswith("No claim: the judge failed its audit") and summary["args"]["judge"] == judge
    assert "panel" not in summary and "members" not in summary["audit"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--judge", "longer", "--judge", "longer"), ("--judge longer", "twice")),
        (("--judge", "longer", "oracle"), ("--judge oracle",)),
        (("--judge", "longer", "--judge", "random", "--audit_dataset", "gone.jsonl"), ("gone.jsonl",)),
        (("--judge", "longer", "--audit_limit", "-1"), ("--audit_limit -1",)),
        (("--judge", "longer", "--stop_when", "0"), ("--stop_when 0",)),
        (("--judge", "longer", "--stop_when", "3", "--plan", "8"), ("--stop_when", "--plan")),
    ],
)
def test_bad_panels_fail_before_a_model_answers(battle, call, flags, named):
    code, _, err = call("eval_win_rate", *battle, *flags)
    assert code == 2
    assert_one_line(err, *named)
