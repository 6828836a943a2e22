"""generate_preference_pairs.py: published win probabilities, equal and empty answers, every scorer, the script."""

import copy
import json
import math
import shutil

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, assert_one_line, make_pairs, train_args, write_jsonl
from helpers import pair_args
from safetensors.torch import load_file, save_file
from scipy.stats import chisquare

from preflab.data.candidates import load_candidates
from preflab.data.chat_template import ChatRenderer
from preflab.data.prompts import Prompt
from preflab.judging.judge_prompt import Item, Verdict, unparsed
from preflab.judging.judges import judge_all, make_judge
from preflab.judging.pairrm import FIRST, SECOND, SOURCE, PairRanker, PairRM
from preflab.models.loading import load_tokenizer
from preflab.pairs.metrics import agreement, pair_metrics
from preflab.pairs.pairing import Sampled, candidates_of, held_out_keys, pair_of, pairs_of, part_of, shuffled
from preflab.pairs.scorers import Candidates, Scores, make_scorer, mean_wins, ranker_scores, win_probabilities
from utils.artifacts import read_json
from utils.errors import UserError

OPTIONS = {
    "dtype": "float32", "judge_prompt": "configs/judges/pairwise.yaml", "attempts": 0, "timeout": 5.0, "concurrency": 2,
    "batch_tokens": 2048, "batch_size": None, "attn_implementation": None, "seed": 3,
}  # fmt: skip


def prompt(text="Say something.") -> Prompt:
    return Prompt([{"role": "user", "content": text}], f"{text} line 1")


def sampled(*texts, held_out=False, given=None) -> Sampled:
    answers = [{"text": t, "tokens": len(t.split()), "finish_reason": "stop", "seed": k} for k, t in enumerate(texts)]
    return Sampled(prompt(), answers, held_out, given)


# ------------------------------------------------------------------------------------------------------------ formulas


def test_win_probabilities_equal_published_code():
    """scripts/compute_prob.py of uclaml/SPPO: 1 / (1 + exp(s_j - s_i)), the mean of a row with its diagonal."""
    scores = [0.3, -1.2, 2.0, 0.3, -0.5]
    matrix = np.array([[1 / (1 + np.exp(b - a)) for b in scores] for a in scores])
    assert win_probabilities(scores, [1] * 5) == pytest.approx(matrix.sum(1) / 5)
    # By hand: sigma(0) = 1/2 and sigma(log 3) = 3/4.
    assert win_probabilities([math.log(3), 0.0], [1, 1]) == pytest.approx([(0.5 + 0.75) / 2, (0.25 + 0.5) / 2])
    assert win_probabilities([1e6, -1e6], [1, 1]) == pytest.approx([0.75, 0.25])


def test_repeated_answer_counts_once_per_sample():
    separate = win_probabilities([0.3, 0.3, -1.2, 2.0], [1, 1, 1, 1])
    assert win_probabilities([0.3, -1.2, 2.0], [2, 1, 1]) == pytest.approx([separate[0], separate[2], separate[3]])


def test_ranker_scores_equal_llm_blender():
    """llm_blender/gpt_eval/utils.py, get_scores_from_cmps: (cmp - cmp.T).mean(axis=-1)."""
    logits = np.random.default_rng(0).normal(size=(4, 4))
    np.fill_diagonal(logits, 0)
    assert ranker_scores(logits.tolist(), [1] * 4) == pytest.approx((logits - logits.T).mean(-1))


def test_mean_wins_by_hand():
    assert mean_wins([[0.5, 0.9], [0.1, 0.5]], [3, 1]) == pytest.approx([(1.5 + 0.9) / 4, (0.3 + 0.5) / 4])


# ---------------------------------------------------------------------------------------------------------- candidates


def test_candidates_merge_equal_and_drop_empty():
    candidates = candidates_of(sampled("b", "a", " b ", "", "c"))
    assert (candidates.answers, candidates.counts) == (["b", "a", "c"], [2, 1, 1])
    assert candidates_of(sampled("", " ")) == "all_samples_empty"
    assert candidates_of(sampled("a", "a ", "")) == "all_samples_identical"
    given = candidates_of(sampled("b", "a", "b", given={"scores": [1, 2, 3]}))
    assert given.given == {"scores": [1, 2]}


def test_pair_is_best_against_worst():
    sample = sampled("worst", "best", "middle", "best")
    candidates = candidates_of(sample)
    row = pair_of(sample, candidates, Scores([0.0, 2.0, 1.0], [0.1, 0.7, 0.4]))
    assert row["chosen"][0]["content"] == "best" and row["rejected"][0]["content"] == "worst"
    assert (row["win_chosen"], row["win_rejected"]) == (0.7, 0.1) and row["prompt_id"] == sample.prompt.key
    assert row["sampled_chosen"] == {"tokens": 1, "finish_reason": "stop"}
    assert pair_of(sample, candidates, Scores([1.0] * 3, [0.5] * 3)) == "all_scores_equal"


def test_shuffled_scores_are_a_uniform_permutation():
    many = [Candidates(prompt(f"Question {k}"), list("abcde"), [1] * 5) for k in range(300)]
    best = []
    for candidates in many:
        permuted = shuffled(candidates, Scores([0, 1, 2, 3, 4], [0.1, 0.3, 0.5, 0.7, 0.9]), 7)
        assert sorted(permuted.scores) == [0, 1, 2, 3, 4]
        assert permuted.wins == pytest.approx([0.1 + 0.2 * s for s in permuted.scores])
        best.append(int(np.argmax(permuted.scores)))
    assert chisquare(np.bincount(best, minlength=5)).pvalue > 1e-3
    again = shuffled(many[0], Scores([0, 1, 2, 3, 4], [0] * 5), 7)
    assert again.scores == shuffled(many[0], Scores([0, 1, 2, 3, 4], [0] * 5), 7).scores


def test_parts_are_disjoint_and_hold_out_by_text():
    prompts = [prompt(f"Q{k}") for k in range(10)]
    parts = [part_of(prompts, 3, t) for t in (1, 2, 3)]
    assert sorted(len(p) for p in parts) == [3, 3, 4] and {q.key for p in parts for q in p} == {q.key for q in prompts}
    assert part_of(prompts, None, 1) == prompts
    # As in training, prompts that differ only in case and spacing count as the same prompt.
    twins = [*prompts, *(prompt(f" q{k} ") for k in range(10))]
    held_out_twins = held_out_keys(twins, 4)
    assert len(held_out_twins) == 4 and all(
        (a.key in held_out_twins) == (b.key in held_out_twins) for a, b in zip(twins, twins[10:], strict=False)
    )
    held_out = held_out_keys(prompts, 4)
    assert len(held_out) == 4 and held_out == held_out_keys(prompts[::-1], 4)


def test_agreement_by_hand():
    rows, scored, other_scores = [], {}, {}
    for k, other in enumerate(([2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 5.0, 0.0], [1.0, 1.0, 1.0])):
        sample = Sampled(prompt(f"Q{k}"), [{"text": t} for t in "abc"], False)
        candidates, main = candidates_of(sample), Scores([2.0, 1.0, 0.0], [0.8, 0.5, 0.2])
        row = pair_of(sample, candidates, main)
        rows.append(row)
        scored[row["prompt_id"]], other_scores[row["prompt_id"]] = (candidates, main), Scores(other, other)
    metrics = agreement(rows, scored, {"other": other_scores})["other"]
    assert metrics["same_order"]["value"] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert metrics["same_best"]["value"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    # Kendall's tau is 1, -1 and 1/3; it is undefined where all scores are equal.
    assert (
        metrics["rank_correlation"]["value"] == pytest.approx((1 - 1 + 1 / 3) / 3)
        and metrics["rank_correlation"]["n"] == 3
    )
    with pytest.raises(UserError, match="--also_score other"):
        agreement(rows, scored, {"other": {}})


def test_several_pairs_per_prompt_are_one_unit():
    """--pairs all: figures per prompt are those of the best and the worst, and errors do not shrink with more pairs."""
    rng = np.random.default_rng(0)
    best_worst, every, scored, other_scores = [], [], {}, {}
    for k in range(12):
        sample = Sampled(prompt(f"Q{k}"), [{"text": t * int(rng.integers(1, 9))} for t in "abcd"], False)
        candidates, main, other = candidates_of(sample), rng.normal(size=4).tolist(), rng.normal(size=4).tolist()
        scores = Scores(main, [0.5] * 4)
        best_worst += pairs_of(sample, candidates, scores)
        every += pairs_of(sample, candidates, scores, every=True)
        scored[sample.prompt.key], other_scores[sample.prompt.key] = (candidates, scores), Scores(other, other)
    assert len(best_worst) == 12 and len(every) == 12 * 6
    of_two, of_all = (agreement(rows, scored, {"other": other_scores})["other"] for rows in (best_worst, every))
    assert all(of_two[key] == of_all[key] for key in ("same_best", "rank_correlation"))
    once, thrice = (pair_metrics(rows, list(scored.values())) for rows in (best_worst, best_worst * 3))
    for key in ("score_chosen", "chosen_longer", "p_chosen_longer_is_half"):
        assert thrice[key]["n"] == 36 and thrice[key]["value"] == pytest.approx(once[key]["value"]), key
    for key in ("score_chosen", "chosen_longer"):
        assert thrice[key]["stderr"] == pytest.approx(once[key]["stderr"]), key


# ------------------------------------------------------------------------------------------------------------- scorers


def scored(spec, items, tmp_path, **options):
    return make_scorer(spec, {**OPTIONS, **options}).score(items, str(tmp_path), False)


def items(*texts) -> list[Candidates]:
    return [Candidates(prompt("Who are you?"), list(texts), [1] * len(texts))]


def test_control_scorers(tmp_path):
    candidates = items("short", "a good deal longer")
    (longer,) = scored("longer", candidates, tmp_path)
    (shorter,) = scored("shorter", candidates, tmp_path)
    assert longer.scores[1] > longer.scores[0] and shorter.scores == [-s for s in longer.scores]
    assert longer.wins == pytest.approx(win_probabilities(longer.scores, [1, 1]))
    first, again, other = (scored("random", candidates, tmp_path, seed=s)[0].scores for s in (1, 1, 2))
    assert first == again != other


def test_function_scorer_and_its_errors(tmp_path):
    (tmp_path / "user.py").write_text(
        "def score(prompt, answers):\n    return [len(prompt) * len(a) for a in answers]\n"
    )
    (result,) = scored(f"{tmp_path}/user.py:score", items("a", "bb"), tmp_path)
    assert result.scores == [12.0, 24.0]
    name = make_scorer(f"{tmp_path}/user.py:score", OPTIONS).identity()
    (tmp_path / "user.py").write_text("def score(prompt, answers):\n    return [1.0]\n")
    assert make_scorer(f"{tmp_path}/user.py:score", OPTIONS).identity() != name
    for body, words in (
        ("def score(prompt, answers):\n    return [1.0]\n", "finite number"),
        ("def score(prompt, answers):\n    return [float('nan')] * 2\n", "finite number"),
        ("def score(prompt, answers):\n    return 1 / 0\n", "ZeroDivisionError"),
        ("def other():\n    pass\n", "score"),
        ("import nothing_of_this_name\n", "nothing_of_this_name"),
    ):
        (tmp_path / "user.py").write_text(body)
        with pytest.raises(UserError, match=words):
            scored(f"{tmp_path}/user.py:score", items("a", "bb"), tmp_path)
    with pytest.raises(UserError, match="nowhere.py"):
        make_scorer("nowhere.py:score", OPTIONS)


def test_shipped_scorer_prefers_short_words(tmp_path):
    (result,) = scored(
        f"{ROOT}/configs/scorers/plain_words.py:score", items("it is so", "extraordinary matters"), tmp_path
    )
    assert result.scores == pytest.approx([-4 * 2.0, -4 * 10.0])


def test_columns_scorer_uses_dataset_numbers(tmp_path):
    candidates = [Candidates(prompt(), ["a", "b"], [1, 1], {"wins": [0.9, 0.2]})]
    (wins,) = scored("columns", candidates, tmp_path)
    assert wins.wins == wins.scores == [0.9, 0.2]
    (scores,) = scored("columns", [Candidates(prompt(), ["a", "b"], [1, 1], {"scores": [math.log(3), 0.0]})], tmp_path)
    assert scores.wins == pytest.approx([0.625, 0.375])
    with pytest.raises(UserError, match="--answers given"):
        scored("columns", items("a", "b"), tmp_path)


def test_judge_scorer_averages_both_orders(tmp_path, monkeypatch):
    """The judge gives 0.8 to the first answer, 0.1 more if it is the good one; the preference for a slot cancels."""

    class Biased:
        name, instant = "biased", True

        def identity(self):
            return {"judge": "biased"}

        def judge(self, items):
            for k, item in enumerate(items):
                p = 0.8 + 0.1 * (item.first == "good") - 0.1 * (item.second == "good")
                yield k, Verdict(1.0, p)

    monkeypatch.setattr("preflab.pairs.scorers.make_judge", lambda *a: Biased())
    (result,) = scored("judge:hf:x", items("good", "bad"), tmp_path)
    beats = ((0.8 + 0.1) + (1 - (0.8 - 0.1))) / 2
    assert result.wins == pytest.approx([(0.5 + beats) / 2, (1.5 - beats) / 2]) and result.scores == result.wins


def test_prompt_without_verdict_is_unscored(tmp_path, monkeypatch):
    class SilentJudge:
        name, instant = "silent", True

        def identity(self):
            return {}

        def judge(self, items):
            for k, item in enumerate(items):
                yield k, unparsed("no") if "b" in (item.first, item.second) else Verdict(1.0)

    monkeypatch.setattr("preflab.pairs.scorers.make_judge", lambda *a: SilentJudge())
    two = [Candidates(prompt("1"), ["a", "b"], [1, 1]), Candidates(prompt("2"), ["a", "c"], [1, 1])]
    first, second = scored("judge:hf:x", two, tmp_path)
    assert first == "no verdict: no" and isinstance(second, Scores)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory, smol_tokenizer):
    """A tiny random sequence classifier with one output."""

    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(smol_tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_labels=1, max_position_embeddings=512,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("rm") / "rm"
    transformers.LlamaForSequenceClassification(config).save_pretrained(folder)
    smol_tokenizer.save_pretrained(folder)
    return folder


def test_reward_scores_equal_model_and_are_cached(reward_model, smol_tokenizer, tmp_path, monkeypatch):

    candidates = items("I am a cat.", "I am the sea, and the sand.", "word " * 600)
    (cut,) = scored(f"rm:{reward_model}", candidates, tmp_path)
    assert "limit of 512" in cut
    candidates[0].answers, candidates[0].counts = candidates[0].answers[:2], [1, 1]
    (result,) = scored(f"rm:{reward_model}", candidates, tmp_path)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reward_model).eval()
    model.config.pad_token_id = 0
    chat = ChatRenderer(smol_tokenizer)
    for answer, score in zip(candidates[0].answers, result.scores, strict=True):
        ids = chat.ids([chat.full_text(candidates[0].prompt.messages, answer)])
        with torch.no_grad():
            assert score == pytest.approx(model(input_ids=torch.tensor(ids)).logits.item(), abs=1e-5)
    monkeypatch.setattr("preflab.judging.reward_model.RewardModel.score", lambda *a: pytest.fail("scored again"))
    assert scored(f"rm:{reward_model}", candidates, tmp_path) == [result]


def test_pairwise_ranker_as_judge(pair_ranker, tmp_path):
    """The verdict on each order is the sign of its logit; logits equal those of the scorer."""
    ranker = PairRanker(str(pair_ranker), OPTIONS)
    answers = ["I am a cat.", "The sea, and the sand.", "Nothing at all, sir."]
    expected = ranker.logits("Name the sea.", answers)
    question = Prompt([{"role": "user", "content": "Name the sea."}], "p")
    pairs = [(0, 1), (1, 0), (2, 0), (1, 2)]
    judge = make_judge(f"pair:{pair_ranker}", "", OPTIONS)
    verdicts = judge_all(judge, [Item(question, answers[i], answers[j]) for i, j in pairs], str(tmp_path))
    for (i, j), verdict in zip(pairs, verdicts, strict=True):
        assert verdict.first == float(expected[i][j] > 0)
        assert verdict.probability == pytest.approx(1 / (1 + math.exp(-expected[i][j])), abs=1e-6)


def test_nan_output_leaves_prompt_unscored(reward_model, pair_ranker, tmp_path):
    for kind, folder, weight in (("rm", reward_model, "score.weight"), ("pair", pair_ranker, "head_layer.0.weight")):
        broken = tmp_path / kind
        shutil.copytree(folder, broken)
        weights = load_file(broken / "model.safetensors")
        name = next(n for n in weights if n.endswith(weight) or (kind == "pair" and "head" in n))
        save_file({**weights, name: weights[name] * float("nan")}, broken / "model.safetensors", {"format": "pt"})
        assert scored(f"{kind}:{broken}", items("I am a cat.", "The sea."), tmp_path) == [
            "the model's output is not a finite number"
        ], kind


MODEL_CODE = """
import torch
from transformers import LlamaForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

class Gated(LlamaForSequenceClassification):
    def forward(self, **inputs):
        plain = super().forward(**inputs)
        output = SequenceClassifierOutputWithPast(logits=plain.logits)
        output.score = plain.logits[:, 0] - plain.logits[:, 2]
        return output
"""


def test_reward_model_with_custom_score(reward_model, tmp_path):
    """As in ArmoRM: many outputs, and model code that combines them into one score."""

    folder = tmp_path / "gated"
    shutil.copytree(reward_model, folder)
    torch.manual_seed(4)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.num_labels = 3
    model = transformers.LlamaForSequenceClassification(config)
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="3 outputs"):
        make_scorer(f"rm:{folder}", OPTIONS)
    (folder / "modeling_gated.py").write_text(MODEL_CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling_gated.Gated"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--trust_remote_code"):
        make_scorer(f"rm:{folder}", OPTIONS)
    candidates = items("I am a cat.", "The sea, and the sand.")
    (result,) = make_scorer(f"rm:{folder}", {**OPTIONS, "trust_remote_code": True}).score(
        candidates, str(tmp_path), False
    )
    model = model.eval()
    model.config.pad_token_id = 0
    chat = ChatRenderer(load_tokenizer(str(folder)))
    for answer, score in zip(candidates[0].answers, result.scores, strict=True):
        ids = torch.tensor(chat.ids([chat.full_text(candidates[0].prompt.messages, answer)]))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        assert score == pytest.approx((logits[0] - logits[2]).item(), abs=1e-5)


@pytest.fixture(scope="module")
def pair_ranker(tmp_path_factory, smol_tokenizer):
    """A tiny random PairRM under SmolLM2's vocabulary, with the published markers."""

    tokenizer = copy.deepcopy(smol_tokenizer)
    tokenizer.add_tokens([SOURCE, FIRST, SECOND])
    torch.manual_seed(2)
    config = transformers.DebertaV2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        relative_attention=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, n_tasks=1, drop_out=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pairrm") / "pairrm"
    PairRM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_pairwise_ranker_equals_plain_forward(pair_ranker, tmp_path):
    """Against an independent forward: the backbone of transformers, the head's weights under their published names."""

    ranker = PairRanker(str(pair_ranker), OPTIONS)
    answers = ["I am a cat.", "The sea, the sand, and more of it.", "No."]
    logits = ranker.logits("Who are you?", answers)
    weights = load_file(pair_ranker / "model.safetensors")
    backbone = transformers.DebertaV2Model(transformers.AutoConfig.from_pretrained(pair_ranker)).eval()
    prefix = "pretrained_model."
    backbone.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    markers = [ranker.markers[m] for m in (SOURCE, FIRST, SECOND)]
    for i, j in ((0, 1), (1, 0), (2, 1)):
        ids = torch.tensor([ranker.ids("Who are you?", answers[i], answers[j])])
        assert [int((ids == marker).sum()) for marker in markers] == [1, 1, 1]
        with torch.no_grad():
            hidden = backbone(input_ids=ids).last_hidden_state[0]
        at = [hidden[(ids[0] == marker).nonzero()[0, 0]] for marker in markers]

        def head(candidate, at=at):
            x = torch.cat([at[0], candidate])
            x = torch.tanh(weights["head_layer.1.weight"] @ x + weights["head_layer.1.bias"])
            return (weights["head_layer.4.weight"] @ x + weights["head_layer.4.bias"]).item()

        assert logits[i][j] == pytest.approx(head(at[1]) - head(at[2]), abs=1e-5)
    assert [logits[k][k] for k in range(3)] == [0.0] * 3
    (result,) = scored(f"pair:{pair_ranker}", items(*answers), tmp_path)
    assert result.scores == pytest.approx(((np.array(logits) - np.array(logits).T).mean(1)).tolist())
    # A marker that an answer spells out is read as text.
    assert sum(i == ranker.markers[FIRST] for i in ranker.ids("?", f"{FIRST} {SECOND}", "x")) == 1


def test_model_without_markers_is_refused(tiny):
    with pytest.raises(UserError, match=r"<\|source\|>"):
        make_scorer(f"pair:{tiny}", OPTIONS)


@pytest.mark.parametrize("spec", ["nobody", "rm:", "pair:", "judge:", "judge:nobody"])
def test_unknown_scorer_is_refused(spec):
    with pytest.raises(UserError, match=f"--scorer {spec}"):
        make_scorer(spec, OPTIONS)


# -------------------------------------------------------------------------------------------------- answers in the data


@pytest.mark.parametrize(
    ("row", "numbers"),
    [
        ({"prompt": "Q", "all_generated_responses": ["a", "b"], "all_rm_scores": [0.1, 0.2]}, {"scores": [0.1, 0.2]}),
        ({"prompt": "Q", "all_generated_responses": '["a", "b"]', "all_rm_scores": "[1, 2]"}, {"scores": [1, 2]}),
        ({"prompt": "Q", "responses": ["a", "b"], "win_probabilities": [0.9, 0.3]}, {"wins": [0.9, 0.3]}),
        ({"prompt": "Q", "responses": ["a", "b"]}, {}),
        (
            {"prompt": "Q", "generate_0": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
             "generate_1": [{"role": "assistant", "content": "b"}], "rm_scores": [3.0, 1.0]},
            {"scores": [3.0, 1.0]},
        ),
    ],
)  # fmt: skip
def test_answers_and_scores_in_the_dataset(row, numbers, tmp_path):
    ((prompt, answers, given),), summary = load_candidates(
        [{"name": str(write_jsonl(tmp_path / "x.jsonl", [row, row])), "split": "train"}]
    )
    assert (prompt.text, answers, given) == ("Q", ["a", "b"], numbers)
    assert summary["left_out"] == {"duplicate_prompt": 1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "Q"}, "all_generated_responses"),
        ({"prompt": "Q", "responses": ["a", 2]}, "all_generated_responses"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "finite number.*2"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1, True]}, "finite number"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1, float("nan")]}, "finite number"),
    ],
)
def test_rows_without_usable_answers_are_refused(row, words, tmp_path):
    with pytest.raises(UserError, match=f"line 1.*{words}"):
        load_candidates([{"name": str(write_jsonl(tmp_path / "x.jsonl", [row])), "split": "train"}])


# -------------------------------------------------------------------------------------------------------------- script


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [{"instruction": r["prompt"]} for r in make_pairs(9)]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


@pytest.fixture
def pairs(call):
    """Run generate_preference_pairs.py in this process; returns (exit code, stdout, stderr)."""
    return lambda *args: call("generate_preference_pairs", *args)


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_to_pairs_to_training(pairs, train, tiny, prompts, tmp_path):
    code, out, err = pairs(*pair_args(tiny, prompts, tmp_path / "out", "--also_score", "random", "shorter"))
    assert code == 0, err
    folder = tmp_path / "out/p"
    assert {p.name for p in folder.iterdir()} == {
        "samples.jsonl", "scores.jsonl", "train.jsonl", "test.jsonl", "manifest.json", "preference_pairs.json",
        "preference_pairs.png",
    }  # fmt: skip
    train_rows, held_out = rows_of(folder / "train.jsonl"), rows_of(folder / "test.jsonl")
    dropped = read_json(folder / "preference_pairs.json")["counts"]["dropped"]
    assert len(train_rows) + len(held_out) + sum(dropped.values()) == 9
    assert not {r["prompt_id"] for r in train_rows} & {r["prompt_id"] for r in held_out} and len(held_out) == 2
    samples = {row["prompt_id"]: row for row in rows_of(folder / "samples.jsonl")}
    for row in train_rows:
        texts = sorted({a["text"].strip() for a in samples[row["prompt_id"]]["answers"]} - {""}, key=len)
        assert row["chosen"][0]["content"] == texts[-1] or len(row["chosen"][0]["content"]) == len(texts[-1])
        assert len(row["rejected"][0]["content"]) == len(texts[0]) and row["win_chosen"] > 0.5 > row["win_rejected"] > 0
    summary = read_json(folder / "preference_pairs.json")
    assert summary["model"]["policy"]["weights_sha256"] and summary["model"]["scorers"]["longer"] == {
        "scorer": "longer"
    }
    assert summary["metrics"]["shorter/same_order"]["value"] == 0 and "shorter" in out
    assert summary["metrics"]["chosen_longer"]["value"] == 1
    # The pairs train as they are, with the loss that needs win probabilities.
    code, out, err = train(
        *train_args(tiny, folder, tmp_path, "--loss_type", "sppo", "--max_steps", "1", "--beta", "1")
    )
    assert code == 0, err


def test_second_call_samples_and_scores_nothing(pairs, tiny, prompts, tmp_path, monkeypatch):
    assert pairs(*pair_args(tiny, prompts, tmp_path))[0] == 0
    before = (tmp_path / "p/train.jsonl").read_text()
    monkeypatch.setattr("preflab.judging.answers.generate", lambda *a, **k: pytest.fail("sampled again"))
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path))
    assert code == 0 and (tmp_path / "p/train.jsonl").read_text() == before, err
    # Another scorer on the same samples, under another name, samples nothing either.
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--run_name", "q", "--scorer", "shorter"))
    assert code == 0, err
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--scorer", "shorter"))
    assert code == 2
    assert_one_line(err, "scorer 'longer' -> 'shorter'", "--run_name")


def test_interrupted_sampling_continues(pairs, tiny, prompts, tmp_path, monkeypatch):
    import preflab.judging.answers

    usual, calls = preflab.judging.answers.generate, []

    def interrupted(*args, **kwargs):
        for answer in usual(*args, **kwargs):
            calls.append(answer["index"])
            if len(calls) == 12:
                raise KeyboardInterrupt
            yield answer

    small = ("--batch_size", "2")
    monkeypatch.setattr("preflab.judging.answers.generate", interrupted)
    assert pairs(*pair_args(tiny, prompts, tmp_path, *small))[0] == 130
    assert not (tmp_path / "p/samples.jsonl").exists()
    calls.clear()
    calls.extend([None] * 100)
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, *small))
    assert code == 0 and len(calls) - 100 == 27 - 11, err
    monkeypatch.setattr("preflab.judging.answers.generate", usual)
    assert pairs(*pair_args(tiny, prompts, tmp_path / "uninterrupted"))[0] == 0
    assert (tmp_path / "p/train.jsonl").read_text() == (tmp_path / "uninterrupted/p/train.jsonl").read_text()


def test_overwrite_interrupted_then_continued(pairs, tiny, prompts, tmp_path, monkeypatch):
    import preflab.judging.answers

    assert pairs(*pair_args(tiny, prompts, tmp_path))[0] == 0
    usual = preflab.judging.answers.generate

    def interrupted(*args, **kwargs):
        yield next(iter(usual(*args, **kwargs)))
        raise KeyboardInterrupt

    other = pair_args(tiny, prompts, tmp_path, "--temperature", "1.2")
    assert pairs(*other)[0] == 2
    monkeypatch.setattr("preflab.judging.answers.generate", interrupted)
    assert pairs(*other, "--overwrite")[0] == 130
    monkeypatch.setattr("preflab.judging.answers.generate", usual)
    code, _, err = pairs(*other)
    assert code == 0 and read_json(tmp_path / "p/preference_pairs.json")["args"]["temperature"] == 1.2, err


def test_stage_refuses_input_of_other_arguments(pairs, tiny, prompts, tmp_path):
    assert pairs(*pair_args(tiny, prompts, tmp_path))[0] == 0
    before = (tmp_path / "p/train.jsonl").read_text()
    for stage, flags, changed in (
        ("pair", ("--scorer", "shorter"), "scorer 'longer' -> 'shorter'"),
        ("score", ("--temperature", "1.2"), "temperature 1.5 -> 1.2"),
    ):
        code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--stage", stage, "--overwrite", *flags))
        assert code == 2 and (tmp_path / "p/train.jsonl").read_text() == before
        assert_one_line(err, changed)
    again = pair_args(tiny, prompts, tmp_path, "--scorer", "shorter", "--overwrite")
    assert pairs(*again, "--stage", "score")[0] == 0 and not (tmp_path / "p/train.jsonl").exists()
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--scorer", "shorter", "--stage", "pair"))
    assert code == 0, err
    for row in rows_of(tmp_path / "p/train.jsonl"):
        assert len(row["chosen"][0]["content"]) < len(row["rejected"][0]["content"])
    stages = read_json(tmp_path / "p/manifest.json")["stages"]
    assert list(stages) == ["sample", "score", "pair"] and "shorter" in stages["score"]["scorers"]


def test_bad_scorer_fails_before_sampling(pairs, tiny, prompts, tmp_path):
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--scorer", f"rm:{tiny}"))
    assert code == 2 and not (tmp_path / "p/samples.jsonl").exists()
    assert_one_line(err, f"rm:{tiny}", "outputs")


def test_separate_stages_equal_stage_all(pairs, tiny, prompts, tmp_path):
    assert pairs(*pair_args(tiny, prompts, tmp_path / "all"))[0] == 0
    for stage in ("pair", "score"):
        code, _, err = pairs(*pair_args(tiny, prompts, tmp_path / "apart", "--stage", stage))
        assert code == 2
        assert_one_line(err, "samples.jsonl", "--stage sample")
    for stage in ("sample", "score", "pair"):
        code, out, err = pairs(*pair_args(tiny, prompts, tmp_path / "apart", "--stage", stage))
        assert code == 0, err
        manifest = read_json(tmp_path / "apart/p/manifest.json")["stages"]
        assert manifest[stage]["run"]["git_commit"] and manifest[stage]["seconds"] >= 0
    assert list(manifest) == ["sample", "score", "pair"]
    for name in ("samples.jsonl", "scores.jsonl", "train.jsonl", "test.jsonl"):
        assert (tmp_path / "apart/p" / name).read_text() == (tmp_path / "all/p" / name).read_text(), name


def test_adapter_alone_answers_on_its_base(pairs, trained, tiny, prompts, tmp_path):
    args = pair_args(tiny, prompts, tmp_path, "--adapter_path", trained / "ck/r", "--stage", "sample", "--limit", 4)
    code, _, err = pairs(*args[2:])
    assert args[0] == "--model_name_or_path" and code == 0, err
    assert json.loads((tmp_path / "p_LIMIT4/manifest.json").read_text())["args"]["model_name_or_path"] == str(tiny)


def test_given_answers_with_scores(pairs, tiny, tmp_path):
    rows = [
        {"prompt": f"Q{k}", "all_generated_responses": ["good", "fair", "bad"], "all_rm_scores": [2.0, 1.0, -1.0]}
        for k in range(6)
    ]
    data = write_jsonl(tmp_path / "x.jsonl", rows)
    given = (
        "--dataset_name",
        data,
        "--answers",
        "given",
        "--scorer",
        "columns",
        "--test_prompts",
        "1",
        "--eval_out",
        tmp_path,
    )
    code, out, err = pairs(*given, "--run_name", "g")
    assert code == 0, err
    row = rows_of(tmp_path / "g/train.jsonl")[0]
    assert row["chosen"][0]["content"] == "good" and row["rejected"][0]["content"] == "bad"
    assert row["win_chosen"] == pytest.approx(win_probabilities([2.0, 1.0, -1.0], [1, 1, 1])[0])
    code, out, err = pairs(*given, "--run_name", "s", "--shuffle_scores", "1")
    assert code == 0 and "SHUFFLED" in out, err


def answers_of(count):
    """Three answers to each of `count` questions, with rank and score: worst, best, middle."""
    return [(f"Q{k}", [("bad", 3, 1.0), ("good", 1, 5.0), ("fair", 2, 4.5)]) for k in range(count)]


RANKED = {
    "Nectar": lambda count: [
        {"prompt": f"\n\nHuman: {q}\n\nAssistant: ", "answers": [{"answer": a, "rank": r} for a, r, _ in answers]}
        for q, answers in answers_of(count)
    ],
    "UltraFeedback": lambda count: [
        {"instruction": q, "completions": [{"response": a, "overall_score": s} for a, _, s in answers]}
        for q, answers in answers_of(count)
    ],
    "HelpSteer 2": lambda count: [
        {"prompt": q, "response": a, "helpfulness": s} for q, answers in answers_of(count) for a, _, s in answers
    ],
    "KTO": lambda count: [
        {"prompt": [{"role": "user", "content": q}], "completion": a, "label": r == 1}
        for q, answers in answers_of(count)
        for a, r, _ in answers
    ],
    "generations and ratings": lambda count: [
        {"input": q, "generations": [a for a, _, _ in answers], "ratings": [s for _, _, s in answers]}
        for q, answers in answers_of(count)
    ],
}


@pytest.mark.parametrize("name", RANKED)
def test_ranked_and_scored_lists_are_read(name, tmp_path):
    source = {"name": str(write_jsonl(tmp_path / "x.jsonl", RANKED[name](3))), "split": "train"}
    candidates, summary = load_candidates([source])
    assert [prompt.messages for prompt, _, _ in candidates] == [
        [{"role": "user", "content": f"Q{k}"}] for k in range(3)
    ]
    for _, answers, numbers in candidates:
        ranking = sorted(answers, key=lambda a: -numbers["scores"][answers.index(a)])
        assert ranking[0] == "good" and len(answers) == 3 and (name == "KTO" or ranking[-1] == "bad")
    assert not summary["left_out"] and len(load_candidates([source], limit=2)[0]) == 2
    assert len(load_candidates([source], limit=2)[0][1][1]) == 3


def test_all_pairs_above_a_margin_of_a_ranked_list(pairs, tmp_path):
    data = write_jsonl(tmp_path / "x.jsonl", RANKED["UltraFeedback"](4))
    given = ("--dataset_name", data, "--answers", "given", "--scorer", "columns", "--test_prompts", "1")
    code, out, err = pairs(*given, "--eval_out", tmp_path, "--run_name", "a", "--pairs", "all")
    assert code == 0 and "--keep_duplicate_prompts" in out, err
    rows = rows_of(tmp_path / "a/train.jsonl")
    made = [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]
    assert made == [("good", "bad"), ("fair", "bad"), ("good", "fair")] * 3
    code, out, err = pairs(
        *given, "--eval_out", tmp_path, "--run_name", "m", "--pairs", "all", "--min_score_margin", "1"
    )
    assert code == 0 and len(rows_of(tmp_path / "m/train.jsonl")) == 6, err


def test_foreign_folder_is_left_alone(pairs, tiny, prompts, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p/thesis.txt").write_text("text")
    code, _, err = pairs(*pair_args(tiny, prompts, tmp_path, "--overwrite"))
    assert code == 2 and (tmp_path / "p/thesis.txt").exists()
    assert_one_line(err, str(tmp_path / "p"), "--run_name")
