"""SimPO, SPPO, CPO and ORPO: golden numbers by hand, TRL's own losses where they exist, and complete runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line, make_pairs, train_args, write_jsonl
from datasets import Dataset
from stock_trl import SETTINGS, assert_equal, lora, ours, stock, trainer_of
from stock_trl import steps as steps_of

from preflab.models.loading import load_model, load_tokenizer
from preflab.training import losses
from preflab.training.dpo_trainer import ResumableDPOTrainer

# Log-probabilities of two chosen and three rejected tokens, reference sums -4 and -4.5: d_w = 1, d_l = -0.5,
# means -3/2 and -5/3. Each entry: settings, loss, gradient of each chosen and of each rejected token, by hand.
CHOSEN, REJECTED, REFERENCE = [-1.0, -2.0], [-1.5, -0.5, -3.0], (-4.0, -4.5)
GOLDEN = {
    # log(1 + e^-0.15) and -+ 0.1 / (1 + e^0.15)
    "sigmoid": ({"beta": 0.1}, 0.6209570, -0.0462570, 0.0462570),
    # 1 - 0.15 and -+ 0.1
    "hinge": ({"beta": 0.1}, 0.85, -0.1, 0.1),
    # (1/2 + 1/6 - 5)^2; 2 (-13/3) / 2 and -2 (-13/3) / 3
    "ipo": ({"beta": 0.1}, 18.7777778, -4.3333333, 2.8888889),
    # (1 - 5)^2 + (-0.5 + 5)^2; 2 (-4) and 2 (4.5)
    "sppo_hard": ({"beta": 0.1}, 36.25, -8.0, 9.0),
    # ((1 - 3)^2 + (-0.5 + 2)^2) / 2 with P = 0.8 and 0.3
    "sppo": ({"beta": 0.1}, 3.125, -2.0, 1.5),
    # log(1 + e^(2/3)): 2 (1/6 - 1/2) = -2/3; -+ 2 sigma(2/3) / 2 and / 3
    "simpo": ({"beta": 2.0, "gamma_beta_ratio": 0.5}, 1.0810367, -0.6607564, 0.4405042),
    # log(1 + e^-0.2) + 2 x 3/2; -0.1 sigma(-0.2) - 2 / 2 and 0.1 sigma(-0.2)
    "cpo": ({"beta": 0.1, "cpo_alpha": 2.0}, 3.5981389, -1.0450166, 0.0450166),
    # P = e^(-3/2) and e^(-5/3); log odds -1.2475177 and -1.4573330, d = 0.2098153: 3/2 + 0.5 log(1 + e^-d);
    # (-1 - 0.5 sigma(-d) / (1 - P_w)) / 2 and 0.5 sigma(-d) / (1 - P_l) / 3
    "orpo": ({"beta": 0.5}, 1.7968661, -0.6440839, 0.0919994),
}  # fmt: skip


class Fixed:
    """A policy whose response log-probabilities are given."""

    def __init__(self):
        self.logps = torch.zeros(2, 5)
        self.logps[0, 1:3], self.logps[1, 1:4] = torch.tensor(CHOSEN), torch.tensor(REJECTED)
        self.logps.requires_grad_()

    def __call__(self, **kwargs):
        nothing = torch.zeros(2, 5)
        return SimpleNamespace(
            log_probs=self.logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool(), loss=None
        )


def inputs() -> dict:
    mask = torch.zeros(2, 6, dtype=torch.long)
    mask[0, 2:4], mask[1, 2:5] = 1, 1
    reference = {
        f"ref_{side}_logps": torch.tensor([v]) for side, v in zip(("chosen", "rejected"), REFERENCE, strict=True)
    }
    wins = {"win_chosen": torch.tensor([0.8]), "win_rejected": torch.tensor([0.3])}
    ids = torch.ones(2, 6, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": ids, "completion_mask": mask, **reference, **wins}


@pytest.mark.parametrize("loss_type", GOLDEN)
def test_losses_and_gradients_by_hand(loss_type, tiny, tmp_path):
    settings, expected, to_chosen, to_rejected = GOLDEN[loss_type]
    trainer, policy = trainer_of(tiny, tmp_path, loss_type=[loss_type], **settings), Fixed()
    trainer.precompute_ref_logps = True
    loss = trainer._compute_loss(policy, inputs(), return_outputs=False)
    loss.backward()
    assert loss.item() == pytest.approx(expected, abs=1e-5)
    gradient = policy.logps.grad
    assert gradient[0, 1:3].tolist() == pytest.approx([to_chosen] * 2, abs=1e-5)
    assert gradient[1, 1:4].tolist() == pytest.approx([to_rejected] * 3, abs=1e-5)


def test_own_and_trl_losses_are_weighted(tiny, tmp_path):
    settings = {"loss_type": ["sigmoid", "sppo", "hinge"], "loss_weights": [2.0, 0.5, 1.0], "beta": 0.1}
    trainer = trainer_of(tiny, tmp_path, **settings)
    trainer.precompute_ref_logps = True
    loss = trainer._compute_loss(Fixed(), inputs(), return_outputs=False)
    assert loss.item() == pytest.approx(2 * 0.6209570 + 0.5 * 3.125 + 0.85, abs=1e-5)
    assert trainer.loss_types == ["sigmoid", "sppo", "hinge"] and trainer.loss_weights == [2.0, 0.5, 1.0]


def test_simpo_rewards_have_separate_names(tiny, tmp_path):
    trainer = trainer_of(tiny, tmp_path, loss_type=["simpo"], beta=2.0)
    trainer.precompute_ref_logps = True
    trainer._compute_loss(Fixed(), inputs(), return_outputs=False)
    logged = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    assert logged["simpo/chosen"] == pytest.approx(-3.0) and logged["simpo/rejected"] == pytest.approx(-10 / 3)
    assert logged["simpo/accuracies"] == 1
    assert logged["rewards/chosen"] == pytest.approx(2.0) and logged["rewards/rejected"] == pytest.approx(-1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_simpo_equals_trl_cpo_trainer(smoothing):
    from trl.experimental.cpo import CPOTrainer

    chosen, rejected = torch.randn(7), torch.randn(7)
    stub = SimpleNamespace(
        alpha=0.0, beta=2.5, simpo_gamma=1.375, loss_type="simpo", label_smoothing=smoothing,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    expected = CPOTrainer.cpo_loss(stub, chosen, rejected)[0]
    assert torch.allclose(losses.simpo(chosen, rejected, 2.5, 0.55, smoothing), expected, atol=1e-6)


TRAINING = dict(per_device_train_batch_size=1, gradient_accumulation_steps=3)


def stock_reference_free(loss_type: str, tiny, tmp_path, rows: list[dict]) -> tuple[list[dict], list[dict]]:
    """(logged steps, tokenised rows) of TRL's experimental trainer of that loss."""
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {"cpo": (CPOConfig, CPOTrainer), "orpo": (ORPOConfig, ORPOTrainer)}[loss_type]
    settings = {key: value for key, value in (SETTINGS | TRAINING).items() if key != "label_smoothing"}
    stock = trainer(
        load_model(str(tiny)),
        args=config(str(tmp_path / "stock"), bf16=False, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(str(tiny)),
        peft_config=lora(),
    )
    steps = steps_of(stock)
    # Rows of the stock trainer: the prompt's ids, then prompt and answer with -100 on the prompt.
    tokenised = [
        {
            "prompt_ids": row["prompt_input_ids"],
            **{f"{side}_ids": [i for i in row[f"{side}_labels"] if i != -100] for side in ("chosen", "rejected")},
        }
        for row in stock.train_dataset
    ]
    return steps, tokenised


@pytest.mark.parametrize("loss_type", ["cpo", "orpo"])
def test_training_equals_trls_experimental_trainer(loss_type, tiny, tmp_path):
    """One pair per micro-batch: TRL's likelihood is a mean over the tokens of the micro-batch.

    ORPO without prompts, since TRL's likelihood includes the prompt's tokens, which the paper's P(y | x) does not.
    """
    prompts = ["" if loss_type == "orpo" else f"Q{i}:" for i in range(12)]
    rows = [
        {"prompt": prompt, "chosen": f" yes {i} " * (1 + i % 3), "rejected": f" no {i}"}
        for i, prompt in enumerate(prompts)
    ]
    expected, tokenised = stock_reference_free(loss_type, tiny, tmp_path, rows)
    own = steps_of(trainer_of(tiny, tmp_path / "ours", tokenised, loss_type=[loss_type], **TRAINING))
    for a, b in zip(own, expected, strict=True):
        pairs = [(a["loss"], b["loss"]), (a["grad_norm"], b["grad_norm"]), (a[f"{loss_type}/nll"], b["nll_loss"])]
        pairs += [(a[f"{loss_type}/{side}"], b[f"rewards/{side}"]) for side in ("chosen", "rejected", "accuracies")]
        for value, trl_value in pairs:
            assert value == pytest.approx(trl_value, abs=1e-5, rel=1e-4), a["step"]
    assert own[-1]["loss"] != pytest.approx(own[0]["loss"], abs=1e-2), "the steps change the model"


def test_terms_equal_trls(tiny):
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    chosen, rejected = (-8 * torch.rand(7, requires_grad=False) - 0.01 for _ in range(2))
    inputs = [side.requires_grad_() for side in (chosen, rejected)]
    stub = SimpleNamespace(
        alpha=0.0, beta=0.7, loss_type="sigmoid", label_smoothing=0.2, accelerator=SimpleNamespace(device="cpu")
    )
    expected = CPOTrainer.cpo_loss(stub, *inputs)[0]
    assert torch.allclose(losses.cpo(*inputs, inputs[0], 0.7, 0.0, 0.2), expected, atol=1e-6)
    own = losses.orpo(*inputs, 0.7) + inputs[0]
    expected = -ORPOTrainer.odds_ratio_loss(stub, *inputs)[0]
    assert torch.allclose(own, expected, atol=1e-6)
    gradients = [torch.autograd.grad(loss.sum(), inputs, retain_graph=True) for loss in (own, expected)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_log_odds_are_finite_at_certainty():
    values = torch.tensor([0.0, -1e-9, -1e-4, -200.0], requires_grad=True)
    odds = losses.log_odds(values)
    odds.sum().backward()
    assert odds.isfinite().all() and values.grad.isfinite().all()
    assert odds[2].item() == pytest.approx(9.2102904, rel=1e-5) and odds[3].item() == -200


@pytest.mark.parametrize(
    "loss_type", ["orpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("simpo", "cpo"))]
)
def test_reference_free_losses_run_no_reference_in_training(loss_type, train, tiny, prefs, tmp_path, monkeypatch):
    # Forwards of each micro-batch of training: the policy's, and the reference's where there is one.
    forwards, compute = [], ResumableDPOTrainer._compute_trl_loss

    def counted(self, model, inputs, return_outputs, captured):
        result = compute(self, model, inputs, return_outputs, captured)
        if self.model.training:
            forwards.append(len(captured))
        return result

    monkeypatch.setattr(ResumableDPOTrainer, "_compute_trl_loss", counted)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--loss_type", loss_type, "--max_steps", "2"))
    assert code == 0, err
    assert "none in training" in out
    results = json.loads((tmp_path / "out/r/train.json").read_text())
    assert set(forwards) == {1}
    # The reference of the test pairs only, which the table compares with.
    pairs = results["data"]["test"]["pairs"]
    assert results["training"]["reference"]["computed"] == results["metrics"]["reward_accuracy"]["n"] == pairs
    rows = [json.loads(line) for line in (tmp_path / "out/r/train_log.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["split"] == "train"]
    assert all(f"{loss_type}/accuracies" in row and "rewards/margins" not in row for row in trained)
    assert all("rewards/margins" in row for row in rows if row["split"] == "eval")


def test_sppo_with_certain_wins_is_half_of_sppo_hard(tiny, tmp_path):
    rows = [{**row, "win_chosen": 1.0, "win_rejected": 0.0} for row in make_pairs(24)]
    own_steps = ours(tiny, "sppo", tmp_path, rows, loss_weights=[2.0])
    assert_equal(own_steps, stock(tiny, "sppo_hard", tmp_path, rows))


@pytest.mark.parametrize(
    "loss_type", ["simpo", *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("sppo", "cpo", "orpo"))]
)
def test_speedups_do_not_change_own_losses(loss_type, train, tiny, tmp_path):
    rows = [{**row, "win_chosen": 0.6 + 0.01 * i, "win_rejected": 0.3} for i, row in enumerate(make_pairs(24))]
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows).parent
    write_jsonl(data / "test.jsonl", [{**row, "win_chosen": 0.9, "win_rejected": 0.2} for row in make_pairs(8, 100)])
    figures = []
    for k, flags in enumerate([("--no_shared_prompt", "--no_reference_cache"), (), ("--micro_batch_tokens", "80")]):
        args = train_args(tiny, data, tmp_path / str(k), "--loss_type", loss_type, "--beta", "0.5", *flags)
        code, _, err = train(*args)
        assert code == 0, err
        log = (tmp_path / str(k) / "out" / "r" / "train_log.jsonl").read_text().splitlines()
        figures.append([r[key] for r in map(json.loads, log) if r["split"] == "train" for key in ("loss", "grad_norm")])
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=1e-4)
    assert figures[2] == pytest.approx(figures[0], rel=1e-4, abs=1e-4)


def test_sppo_uses_win_probabilities(train, tiny, tmp_path):
    figures = []
    for name, win in (("sure", 0.99), ("unsure", 0.51)):
        rows = [{**row, "chosen_probs_win": win, "chosen_probs_lose": 1 - win} for row in make_pairs(8)]
        data = write_jsonl(tmp_path / name / "train.jsonl", rows).parent
        flags = ("--loss_type", "sppo", "--beta", "0.1", "--dataset_test_split", "none")
        code, _, err = train(*train_args(tiny, data, tmp_path / name, *flags))
        assert code == 0, err
        first = json.loads((tmp_path / name / "out" / "r" / "train_log.jsonl").read_text().splitlines()[0])
        # At step 0 both ratios are 0: the loss is ((P_w - 1/2)^2 + (P_l - 1/2)^2) / (2 beta^2).
        assert first["loss"] == pytest.approx((win - 0.5) ** 2 / 0.01, rel=1e-3)
        figures.append(first["loss"])
    assert figures[0] != figures[1]


@pytest.mark.parametrize("value", [None, 1.2, "likely", True])
def test_sppo_needs_win_probabilities(value, train, tiny, tmp_path):
    rows = [{**row, "win_chosen": value, "win_rejected": 0.1} for row in make_pairs(4)]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    flags = ("--dataset_test_split", "none", "--loss_type")
    code, _, err = train(*train_args(tiny, data, tmp_path, *flags, "sppo"))
    assert code == 2
    assert_one_line(err, "win_chosen", "train.jsonl", "4 rows")
    code, _, err = train(*train_args(tiny, data, tmp_path / "sigmoid", *flags, "sigmoid"))
    assert code == 0, err


@pytest.mark.parametrize(
    "flags",
    [
        ("simpo", "--ld_alpha", "0.5"),
        ("sppo", "--use_weighting"),
        ("simpo", "--f_divergence_type", "forward_kl"),
        ("sppo", "--label_smoothing", "0.1"),
        ("orpo", "--label_smoothing", "0.1"),
        ("cpo", "--cpo_alpha", "-1"),
    ],
)
def test_keys_without_effect_are_refused(flags, train, tiny, prefs, tmp_path):
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--loss_type", *flags))
    assert code == 2
    assert_one_line(err, flags[1])


def test_win_rate_reproduces_simpo_log(train, call, tiny, prefs, tmp_path):
    """rewards/* of a SimPO run are log-ratios as in every run, so --expected accepts its log without a warning."""
    flags = ("--loss_type", "simpo", "--beta", "2", "--eval_strategy", "steps", "--eval_steps", "2")
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *flags, "--max_steps", "2", "--learning_rate", "1e-5"))
    assert code == 0 and "likelihood displacement" not in err, err
    log = tmp_path / "out" / "r" / "train_log.jsonl"
    folders = ("--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, out, err = call("eval_win_rate", *folders, "--expected", log)
    assert code == 0, err
