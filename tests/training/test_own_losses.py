"""SimPO and SPPO: golden numbers by hand, TRL's own losses where they exist, and complete runs."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_one_line, make_pairs, train_args, write_jsonl
from stock_trl import assert_equal, ours, stock, trainer_of

from preflab.training import losses

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


def test_sppo_with_certain_wins_is_half_of_sppo_hard(tiny, tmp_path):
    rows = [{**row, "win_chosen": 1.0, "win_rejected": 0.0} for row in make_pairs(24)]
    own_steps = ours(tiny, "sppo", tmp_path, rows, loss_weights=[2.0])
    assert_equal(own_steps, stock(tiny, "sppo_hard", tmp_path, rows))


@pytest.mark.parametrize("loss_type", ["simpo", pytest.param("sppo", marks=pytest.mark.slow)])
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
