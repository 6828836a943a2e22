"""The implicit reward of a run as judge and scorer, against the rewards that eval_win_rate.py computes."""

import math

import pytest
from conftest import eval_args

from preflab.data.preferences import load_pairs
from preflab.data.prompt_format import AS_CHAT
from preflab.judging.audit import audit_items
from preflab.judging.judges import judge_all, make_judge
from preflab.pairs.scorers import Candidates, make_scorer
from utils.artifacts import RowFile, read_json
from utils.errors import UserError


@pytest.fixture(scope="module")
def options(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("implicit")
    return {"dtype": "float32", "batch_tokens": 300, "batch_size": None, "attn_implementation": None, "seed": 0,
            "checkpoints": str(trained / "ck"), "eval_out": str(folder)}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(prefs):
    source = {"name": str(prefs), "split": "test", "config": None, "revision": None}
    return load_pairs([source], keep_duplicate_prompts=True, prompt_format=AS_CHAT).pairs


def test_verdicts_and_scores_equal_the_rewards(call, trained, prefs, pairs, options, tmp_path):
    assert call("eval_win_rate", *eval_args(trained, tmp_path / "out"))[0] == 0
    rows = {row["where"]: row for row in RowFile(tmp_path / "out/r/win_rate_rows.jsonl").read()}
    judge = make_judge("implicit:r", "", options)
    assert judge.beta == read_json(trained / "out/r/train.json")["args"]["beta"]
    verdicts = judge_all(judge, audit_items(pairs), options["eval_out"])
    scorer = make_scorer("implicit:r", options)
    candidates = [Candidates(items.prompt, [items.first, items.second], [1, 1]) for items in audit_items(pairs)[::2]]
    scores = scorer.score(candidates, options["eval_out"], False)
    compared = 0
    for k, pair in enumerate(pairs):
        if pair.source not in rows:
            continue
        row, (first, second) = rows[pair.source], verdicts[2 * k : 2 * k + 2]
        compared += 1
        assert first.probability == pytest.approx(1 / (1 + math.exp(-row["margin"])), abs=1e-5)
        assert second.probability == pytest.approx(1 - first.probability, abs=1e-9)
        assert scores[k].scores == pytest.approx([row["reward_chosen"], row["reward_rejected"]], abs=2e-5)
    assert compared == len(rows) > 5


def test_run_by_its_folder(trained, pairs, options):
    named, folder = (make_judge(f"implicit:{run}", "", options) for run in ("r", trained / "ck/r"))
    items = audit_items(pairs[:3])
    first, second = (dict(judge.judge(items)) for judge in (named, folder))
    assert {k: v.probability for k, v in first.items()} == pytest.approx({k: v.probability for k, v in second.items()})
    first_identity, second_identity = named.identity(), folder.identity()
    assert first_identity.pop("judge") != second_identity.pop("judge") and first_identity == second_identity


def test_unknown_run_is_named(options):
    for make in (lambda: make_judge("implicit:nobody", "", options), lambda: make_scorer("implicit:nobody", options)):
        with pytest.raises(UserError, match="implicit:nobody"):
            make()
