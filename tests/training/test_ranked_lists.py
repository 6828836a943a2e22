"""Losses on ranked lists: values by enumeration and by DPO, the engine's layouts, complete runs, kill and resume."""

import itertools
import math

import pytest
import torch
from conftest import assert_one_line, interrupted_at, make_pairs, train_args, write_jsonl
from scipy.stats import kendalltau
from stock_trl import SETTINGS, lora, ours
from stock_trl import steps as steps_of

from preflab.data.preferences import load_pairs, tokenize
from preflab.models.loading import load_model, load_tokenizer
from preflab.training.dpo_config import DPORunConfig
from preflab.training.list_losses import LOSSES, accuracy
from preflab.training.list_trainer import RankedListTrainer
from preflab.training.loss_names import LIST_LOSSES
from utils.artifacts import RowFile, read_json

SCORES = [3.0, 2.5, 1.0, 0.0]


def list_rows(count: int, answers: int = 4, offset: int = 0) -> list[dict]:
    """Rows with `answers` answers of different lengths, their best one at a changing place."""
    rows = []
    for k in range(offset, offset + count):
        texts = [f"{'word ' * (1 + (k + i) % 4)}{i} of {k}" for i in range(answers)]
        scores = [float((i * 7 + k) % answers) for i in range(answers)]
        rows.append({"prompt": f"Question {k}?", "responses": texts, "scores": scores})
    return rows


def padded(*lists: list[float]) -> torch.Tensor:
    width = max(map(len, lists))
    return torch.tensor([[*values, *[0.0] * (width - len(values))] for values in lists], dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- losses


def by_enumeration(name: str, rewards: list[float], scores: list[float]) -> float:
    """The loss of one list from its definition, with plain loops."""
    pairs = [(i, j) for i, j in itertools.permutations(range(len(scores)), 2) if scores[i] > scores[j]]
    if name == "best_vs_rest":
        pairs = [(i, j) for i, j in pairs if scores[i] == max(scores)]
    if name != "plackett_luce":
        return sum(math.log(1 + math.exp(rewards[j] - rewards[i])) for i, j in pairs) / len(pairs)
    # The probability of drawing the answers in their order, one after the other, without replacement.
    loss = 0.0
    for i, score in enumerate(scores):
        below = sum(math.exp(rewards[j]) for j, other in enumerate(scores) if other < score)
        loss -= math.log(math.exp(rewards[i]) / (math.exp(rewards[i]) + below))
    return loss


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_losses_by_enumeration(name):
    lists = [([0.3, -1.0, 0.2, 2.0], SCORES), ([0.5, 0.1, -0.4], [2.0, 2.0, 1.0]), ([1.0, -1.0], [1.0, 0.0])]
    rewards, scores = (padded(*side) for side in zip(*lists, strict=True))
    given = padded(*([1.0] * len(r) for r, _ in lists)).bool()
    expected = [by_enumeration(name, *pair) for pair in lists]
    assert LOSSES[name](rewards, scores, given).tolist() == pytest.approx(expected, abs=1e-12)
    # Padding has no gradient, and its values change nothing.
    rewards = rewards.masked_fill(~given, 50.0).requires_grad_()
    losses = LOSSES[name](rewards, scores.masked_fill(~given, 9.0), given)
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    losses.sum().backward()
    assert (rewards.grad[~given] == 0).all() and rewards.grad.isfinite().all()


def test_plackett_luce_probabilities_of_all_orders_add_up_to_1():
    rewards, given = torch.tensor([[0.3, -1.0, 0.2, 2.0]], dtype=torch.float64), torch.ones(1, 4).bool()
    orders = itertools.permutations(SCORES)
    total = sum(math.exp(-LOSSES["plackett_luce"](rewards, torch.tensor([order]), given).item()) for order in orders)
    assert total == pytest.approx(1, abs=1e-12)


def test_accuracy_counts_ties_of_rewards_half():
    rewards, scores = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    assert accuracy(rewards, scores, torch.ones(1, 3).bool()).item() == pytest.approx(2.5 / 3)


# -------------------------------------------------------------------------------------------------------------- engine


def trainer_on(model, rows: list[dict], folder, **settings) -> RankedListTrainer:
    tokenizer = load_tokenizer(str(model))
    source = {"name": str(write_jsonl(folder / "x.jsonl", rows)), "split": "train", "lists": True}
    ids, _ = tokenize(load_pairs([source]), tokenizer, 256, 128, lists=True)
    args = DPORunConfig(str(folder), **{**SETTINGS, "label_smoothing": 0.0, **settings})
    args.sequences_a_row = max(len(scores) for scores in ids["scores"])
    return RankedListTrainer(
        load_model(str(model)),
        args=args,
        train_dataset=ids,
        processing_class=tokenizer,
        peft_config=lora(),
        row_log=RowFile(folder / "log.jsonl"),
    )


@pytest.mark.parametrize("name", LIST_LOSSES)
def test_lists_of_two_equal_dpo(name, tiny, tmp_path):
    rows = make_pairs(24)
    dpo = ours(tiny, "sigmoid", tmp_path / "dpo", rows, label_smoothing=0.0)
    lists = steps_of(trainer_on(tiny, rows, tmp_path / "lists", loss_type=[name]))
    keys = ("loss", "grad_norm", "rewards/margins", "rewards/accuracies_ties_half", "logps/chosen", "num_tokens")
    for a, b in zip(lists, dpo, strict=True):
        assert [a[key] for key in keys] == pytest.approx([b[key] for key in keys], abs=1e-5, rel=1e-5), a["step"]


@pytest.mark.parametrize("kind", ["tiny", pytest.param("tiny_gemma2", marks=pytest.mark.slow)])
def test_layouts_do_not_change_the_results(kind, request, tmp_path):
    """Padded, packed, and rebatched by tokens: the same losses and gradients. Gemma 2 has sliding windows."""
    model = request.getfixturevalue(kind)
    rows = [row for k in range(6) for row in list_rows(4, answers=2 + k % 3, offset=4 * k)]
    figures = []
    for k, flags in enumerate(({"shared_prompt": False}, {}, {"micro_batch_tokens": 150})):
        trainer = trainer_on(model, rows, tmp_path / str(k), loss_type=["plackett_luce"], **flags)
        assert (trainer.padded_because is None) == bool(k)
        figures.append([row[key] for row in steps_of(trainer) for key in ("loss", "grad_norm", "lists/accuracies")])
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-5)
    assert figures[2] == pytest.approx(figures[0], rel=1e-4, abs=1e-5)


def test_loss_of_a_batch_by_single_answers(tiny, tmp_path):
    """The packed batch against each answer scored alone, with another model as the reference."""
    from preflab.models.logprobs import attach_head, sequence_logps

    trainer = trainer_on(tiny, list_rows(3), tmp_path, loss_type=["all_pairs"])
    for _, weight in (item for item in trainer.model.named_parameters() if "lora_B" in item[0]):
        torch.nn.init.normal_(weight, std=0.3)
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    loss = trainer._compute_loss(trainer.model, batch, False).item()
    attach_head(trainer.model)
    expected = []
    for i in range(3):
        row, rewards = trainer.train_dataset[i], []
        answers = [row["chosen_ids"]]
        ends = [0, *itertools.accumulate(row["others_lengths"])]
        answers += [row["others_ids"][a:b] for a, b in itertools.pairwise(ends)] + [row["rejected_ids"]]
        for answer in answers:
            ids = torch.tensor([row["prompt_ids"] + answer])
            mask = torch.ones_like(ids)
            answered = torch.tensor([[0] * len(row["prompt_ids"]) + [1] * len(answer)])
            policy = sequence_logps(trainer.model, ids, mask, answered).item()
            with trainer.model.disable_adapter():
                rewards.append(0.5 * (policy - sequence_logps(trainer.model, ids, mask, answered).item()))
        expected.append(by_enumeration("all_pairs", rewards, row["scores"]))
    assert loss == pytest.approx(sum(expected) / 3, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- rows


def read(tmp_path, *rows: dict, **filters):
    source = {"name": str(write_jsonl(tmp_path / "x.jsonl", list(rows))), "split": "train", "lists": True}
    return load_pairs([source], **filters)


def test_layouts_of_rows(tmp_path):
    rows = [
        {"prompt": "A?", "responses": ["low", "high", "mid"], "scores": [1, 3, 2]},
        {"instruction": "B?", "completions": [{"response": t, "overall_score": s} for t, s in (("x", 2), ("y", 9))]},
        {"prompt": "C?", "answers": [{"answer": t, "rank": r} for t, r in (("third", 3), ("first", 1), ("second", 2))]},
        # princeton-nlp's rows have a pair too; the list counts.
        {"prompt": "D?", "chosen": "c", "rejected": "r", "all_generated_responses": ["r", "m", "c"],
         "all_rm_scores": [0.1, 0.2, 0.3]},
        {"prompt": "E?", "chosen": "good", "rejected": "bad"},
    ]  # fmt: skip
    pairs = read(tmp_path, *rows).pairs
    lists = [[pair.chosen, *pair.others, pair.rejected] for pair in pairs]
    assert lists == [["high", "mid", "low"], ["y", "x"], ["first", "second", "third"], ["c", "m", "r"], ["good", "bad"]]
    assert [pair.scores for pair in pairs] == [(3, 2, 1), (9, 2), (-1, -2, -3), (0.3, 0.2, 0.1), ()]
    assert (pairs[0].score_chosen, pairs[0].score_rejected) == (3, 1)


def test_dropped_rows_and_answers_are_counted(tmp_path):
    data = read(
        tmp_path,
        {"prompt": "A?", "responses": ["x", "y"], "scores": [1, 1]},
        {"prompt": "B?", "responses": ["x", "x", " "], "scores": [1, 2, 3]},
        {"prompt": "C?", "responses": ["x", "y", "x", ""], "scores": [3, 1, 0, 9]},
        {"prompt": "D?", "responses": ["x", "y"], "scores": [0.5, 0.2]},
        min_score_margin=1.0,
    )
    assert data.dropped == {"no_preference": 1, "fewer_than_two_answers": 1, "score_margin_below_threshold": 1}
    assert data.unused["empty answers"] == 2 and data.unused["repeated answers"] == 2
    assert [(pair.chosen, pair.rejected) for pair in data.pairs] == [("x", "y")]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "A?", "responses": ["x", "y"], "scores": [1]}, ("scores", "2 answers")),
        ({"prompt": "A?", "responses": ["x", 3], "scores": [1, 2]}, ("no answers",)),
        ({"responses": ["x", "y"], "scores": [1, 2]}, ("prompt",)),
        ({"prompt": "A?", "completion": "x", "label": True}, ("KTO", "generate_preference_pairs.py")),
    ],
)
def test_bad_rows(row, words, train, tiny, tmp_path):
    data = write_jsonl(tmp_path / "bad.jsonl", [row])
    flags = ("--dataset_test_split", "none", "--loss_type", "all_pairs")
    code, _, err = train(*train_args(tiny, data, tmp_path, *flags))
    assert code == 2
    assert_one_line(err, "bad.jsonl", *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("all_pairs", "sigmoid"), ("all_pairs sigmoid",)),
        (("plackett_luce", "--label_smoothing", "0.1"), ("--label_smoothing", "plackett_luce")),
        (("best_vs_rest", "--ld_alpha", "0.5"), ("--ld_alpha",)),
        (("all_pairs", "--precompute_ref_log_probs"), ("--precompute_ref_log_probs",)),
        (("listwise",), ("did you mean plackett_luce",)),
    ],
)
def test_bad_flags(flags, words, train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--loss_type", *flags))
    assert code == 2
    assert_one_line(err, *words)


def test_truncation_gives_all_answers_the_same_prompt(smol_tokenizer, tmp_path):
    row = {"prompt": "long " * 60, "responses": ["a " * 80, "b " * 5, "c " * 60, "d"], "scores": [1, 4, 2, 3]}
    ids, counts = tokenize(read(tmp_path, row), smol_tokenizer, 64, 20, lists=True)
    (row,) = ids.to_list()
    assert len(row["prompt_ids"]) <= 20 and len(row["prompt_ids"]) + len(row["rejected_ids"]) == 64
    assert len(row["others_ids"]) == sum(row["others_lengths"]) and row["others_lengths"][1] == 64 - len(
        row["prompt_ids"]
    )
    assert counts["truncated_rejected"] == 1 and counts["truncated_other"] == 1 and row["scores"] == [4, 3, 2, 1]


# ----------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    """A folder of lists with a train and a test split."""
    folder = tmp_path_factory.mktemp("lists")
    rows = [row for n in (2, 3, 4) for row in list_rows(6, answers=n, offset=10 * n)]
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", list_rows(8, offset=900))
    return folder


def test_run_on_lists(train, call, tiny, lists, tmp_path):
    args = train_args(
        tiny, lists, tmp_path, "--loss_type", "plackett_luce", "--eval_strategy", "steps", "--eval_steps", 2
    )
    code, out, err = train(*args)
    assert code == 0, err
    results = read_json(tmp_path / "out/r/train.json")
    assert "answers   3.0 per list (2 to 4)" in out and "Kendall" in results["text"]
    rows = RowFile(tmp_path / "out/r/heldout_rows.jsonl").read()
    # Both figures recomputed from the rows with scipy.
    taus = [kendalltau(row["rewards"], row["scores"]).statistic for row in rows]
    assert results["metrics"]["kendall_tau"]["value"] == pytest.approx(sum(taus) / len(taus), abs=1e-9)
    # Without ties, the share of pairs in order is (tau + 1) / 2.
    assert results["metrics"]["list_accuracy"]["value"] == pytest.approx(sum(taus) / len(taus) / 2 + 0.5, abs=1e-9)
    log = RowFile(tmp_path / "out/r/train_log.jsonl").read()
    assert all("lists/accuracies" in row for row in log)
    assert (tmp_path / "out/r/dpo_training_curves.png").exists()
    assert "plackett_luce" in (tmp_path / "ck/r/README.md").read_text()
    # A second call has nothing to train; evaluations read the lists as their best and worst answers.
    code, out, err = train(*args)
    assert code == 0 and "nothing to train" in out, err
    folders = ("--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, out, err = call("eval_win_rate", *folders, "--expected", tmp_path / "out/r/train_log.jsonl")
    assert code == 0, err
    win_rate = read_json(tmp_path / "out/r/win_rate.json")["metrics"]
    assert win_rate["win_rate_ties_half"]["value"] == results["metrics"]["reward_accuracy"]["value"]


def test_cached_reference_and_resume_change_nothing(train, tiny, lists, tmp_path, monkeypatch):
    flags = ("--loss_type", "all_pairs", "--save_steps", "1", "--max_steps", "4")
    logs = []
    for name, extra in (("every-step", ("--no_reference_cache",)), ("cached", ())):
        args = train_args(tiny, lists, tmp_path / name, *flags, *extra)
        if not extra:
            # Stopped in step 3; the same command continues.
            with interrupted_at(3):
                code, _, err = train(*args)
            assert code == 130, err
        code, _, err = train(*args)
        assert code == 0, err
        rows = RowFile(tmp_path / name / "out/r/train_log.jsonl").read()
        logs.append([[row["step"], row["loss"], row["grad_norm"]] for row in rows if row["split"] == "train"])
    reference = read_json(tmp_path / "cached/out/r/train.json")["training"]["reference"]
    assert reference["read"] > 0
    assert [step for step, *_ in logs[0]] == [step for step, *_ in logs[1]] == [1, 2, 3, 4]
    assert [x for row in logs[1] for x in row] == pytest.approx([x for row in logs[0] for x in row], rel=1e-4, abs=1e-5)


def test_losses_on_pairs_take_best_and_worst(train, tiny, lists, tmp_path):
    code, _, err = train(*train_args(tiny, lists, tmp_path, "--lists"))
    assert code == 0, err
    results = read_json(tmp_path / "out/r/train.json")
    assert results["data"]["train"]["pairs"] == 18 and "list_accuracy" not in results["metrics"]
    # Without the flag such rows are refused, as before.
    code, _, err = train(*train_args(tiny, lists, tmp_path / "pairs"))
    assert code == 2
    assert_one_line(err, "train.jsonl", "--lists")
