"""Adapters beside plain LoRA: scored as plain PEFT computes them, merged into the same model, or refused."""

import contextlib
import shutil
import warnings

import pytest
import torch
from conftest import assert_one_line, save_tiny
from helpers import slow_logp
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from preflab.models.fast import fused_lora
from preflab.models.loading import _version, ensure_changes_weights, load_model, load_tokenizer
from preflab.models.logprobs import attach_head, token_logps
from preflab.models.merging import ensure_same_model, probe_logps, write_merged
from utils.artifacts import RowFile, read_json
from utils.errors import UserError

Q = ["q_proj"]
TOKENS = [5, 9, 40]
# Adapters on an untied and on a tied model. `trainable_token_indices` alone also changes a tied output layer.
UNTIED = {
    "lm_head": {"target_modules": [*Q, "lm_head"]},
    "lm_head, rank-stabilised": {"target_modules": [*Q, "lm_head"], "use_rslora": True},
    "lm_head, DoRA": {"target_modules": ["lm_head"], "use_dora": True},
    "embed_tokens": {"target_modules": [*Q, "embed_tokens"]},
    "trained tokens": {"target_modules": Q, "trainable_token_indices": {"embed_tokens": TOKENS, "lm_head": TOKENS}},
    "saved lm_head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
}
TIED = {
    "lm_head": {"target_modules": [*Q, "lm_head"]},
    "embed_tokens": {"target_modules": [*Q, "embed_tokens"]},
    "both tied": {"target_modules": [*Q, "embed_tokens"], "ensure_weight_tying": True},
    "trained tokens": {"target_modules": Q, "trainable_token_indices": TOKENS},
    "saved lm_head": {"target_modules": Q, "modules_to_save": ["lm_head"]},
}
CASES = [(False, name) for name in UNTIED] + [(True, name) for name in TIED]


@pytest.fixture(scope="module")
def bases(tmp_path_factory, smol_tokenizer):
    """Folders of a tiny model with separate output layer and of one with tied embeddings, by `tied`."""
    root = tmp_path_factory.mktemp("bases")
    return {tied: save_tiny(root / f"tied-{tied}", smol_tokenizer, tie_word_embeddings=tied) for tied in (False, True)}


def adapter_of(base, folder, **config):
    """An adapter with random weights, saved by PEFT."""
    torch.manual_seed(1)
    with warnings.catch_warnings():
        # PEFT warns about tied layers.
        warnings.simplefilter("ignore")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


def plain_peft(base, folder):
    """Base and adapter with transformers and PEFT only, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), folder).eval()


@pytest.mark.parametrize(("tied", "name"), CASES)
def test_scores_and_merge_equal_plain_peft(tied, name, bases, tmp_path):
    base = bases[tied]
    folder = adapter_of(base, tmp_path / "adapter", **(TIED if tied else UNTIED)[name])
    prompt, answer = [5, 9, 11, 40], [7, 3, 21, 9, 40]
    reference = plain_peft(base, folder)
    model = load_model(str(base), adapter=str(folder)).eval()
    attach_head(model)
    fused_lora.attach(model)
    ids = torch.tensor([prompt + answer])
    mask = torch.tensor([[0] * len(prompt) + [1] * len(answer)])
    for off in (False, True):
        scopes = [m.disable_adapter() if off else contextlib.nullcontext() for m in (model, reference)]
        with torch.no_grad(), scopes[0], scopes[1]:
            expected = slow_logp(reference, prompt, answer)
            assert token_logps(model, ids, torch.ones_like(ids), mask).sum().item() == pytest.approx(expected, abs=1e-4)
    assert abs(expected - slow_logp(reference, prompt, answer)) > 0.05, "the adapter changes the answer"
    # Merged, written, and loaded again.
    expected, tokenizer = slow_logp(reference, prompt, answer), load_tokenizer(str(base))
    before = probe_logps(model, tokenizer)
    write_merged(tmp_path / "merged", load_model(str(base), adapter=str(folder)), tokenizer, {})
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert slow_logp(merged, prompt, answer) == pytest.approx(expected, abs=1e-4)
    ensure_same_model(before, probe_logps(merged, tokenizer), tmp_path / "merged", "float32")


def test_lora_on_the_output_layer_gets_its_gradient(bases):
    """The gradient of a log-probability through the fused head equals that of plain PEFT."""
    gradients = []
    for fused in (True, False):
        torch.manual_seed(1)
        base = AutoModelForCausalLM.from_pretrained(bases[False])
        model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
        ids = torch.tensor([[5, 9, 11, 40, 7]])
        if fused:
            attach_head(model)
            token_logps(model, ids, torch.ones_like(ids), torch.tensor([[0, 0, 1, 1, 1]])).sum().backward()
        else:
            logps = model(input_ids=ids).logits.log_softmax(-1)
            sum(logps[0, position - 1, ids[0, position]] for position in (2, 3, 4)).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert len(gradients[0]) == 2
    for ours, peft in zip(*gradients, strict=True):
        assert torch.allclose(ours, peft, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_scripts_apply_adapters_of_the_output_layer(tied, call, bases, prefs, tmp_path):
    """Win rate and merge of an adapter with LoRA on lm_head (untied) or with trained tokens (tied)."""
    config = TIED["trained tokens"] if tied else UNTIED["lm_head"]
    # Frequent tokens, so that the held-out answers contain them.
    config = config | ({"trainable_token_indices": list(range(200, 900))} if tied else {})
    folder = adapter_of(bases[tied], tmp_path / "adapter", **config)
    flags = ("--base_model", bases[tied], "--adapter_path", folder, "--dataset_name", prefs, "--limit", 2)
    code, _, err = call("eval_win_rate", *flags, "--output_dir", tmp_path / "win")
    assert code == 0, err
    reference, tokenizer = plain_peft(bases[tied], folder), load_tokenizer(str(bases[tied]))
    rows = RowFile(tmp_path / "win/win_rate_LIMIT2_rows.jsonl").read()
    pairs = RowFile(prefs / "test.jsonl").read()
    for row, pair in zip(rows, pairs[:2], strict=True):
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(pair[side][:1], add_generation_prompt=True, return_dict=False)
            whole = tokenizer.apply_chat_template(pair[side], return_dict=False)
            with torch.no_grad():
                expected = slow_logp(reference, prompt, whole[len(prompt) :])
            assert row[side] == pytest.approx(expected, abs=1e-3)
    # No held-out pairs are known, so the shipped ones are used, which is printed.
    flags = (*flags[:4], "--limit", 2, "--output_dir", tmp_path / "m", "--merged_dir", tmp_path / "merged")
    code, out, err = call("merge_adapter", *flags)
    assert code == 0, err
    assert "the 2 pairs are those shipped in data/quickstart_prefs" in " ".join(out.split())
    assert "shipped in data/quickstart_prefs" in read_json(tmp_path / "m/merge_LIMIT2.json")["text"]


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_learning_is_refused(kind, call, train, tiny, prefs, tmp_path):
    from conftest import train_args

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    )
    model.save_pretrained(tmp_path / "a")
    flags = ("--base_model", tiny, "--adapter_path", tmp_path / "a", "--eval_out", tmp_path / "out")
    words = (str(tmp_path / "a"), kind.__name__.removesuffix("TuningConfig").lower(), "tuning")
    for script in ("eval_win_rate", "eval_perplexity", "merge_adapter", "human_eval"):
        code, _, err = call(script, *flags)
        assert code == 2
        assert_one_line(err, *words)
    start = ("--start_adapter", tmp_path / "a", "--start_adapter_use", "continue")
    code, _, err = train(*train_args(tiny, prefs, tmp_path, *start))
    assert code == 2
    assert_one_line(err, *words)


@pytest.mark.parametrize("content", ["[]", '"LORA"', '{"peft_type": "NEW_KIND"}', "{", ""])
def test_damaged_adapter_config_is_one_line(content, tmp_path):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match="adapter_config.json"):
        ensure_changes_weights(tmp_path)


def test_merge_of_another_model_is_refused(bases, tmp_path):
    tokenizer = load_tokenizer(str(bases[False]))
    model = load_model(str(bases[False])).eval()
    before = probe_logps(model, tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.01)
    (tmp_path / "m").mkdir()
    with pytest.raises(UserError, match="another one"):
        ensure_same_model(before, probe_logps(model, tokenizer), tmp_path / "m", "float32")
    assert not (tmp_path / "m").exists()


def test_settings_of_a_local_model_are_part_of_its_identity(tiny, tmp_path):
    """Equal weights with another end token or rotary base give other results."""
    shutil.copytree(tiny, tmp_path / "m")
    seen = []
    for name in ("", "config.json", "generation_config.json", "tokenizer_config.json"):
        if name:
            text = (tmp_path / "m" / name).read_text()
            (tmp_path / "m" / name).write_text(text.rstrip()[:-1] + ', "changed": 1}')
        _version.cache_clear()
        seen.append(_version(str(tmp_path / "m"), None))
    assert len({version["settings_sha256"] for version in seen}) == 4
    assert len({version["weights_sha256"] for version in seen}) == 1
    _version.cache_clear()
