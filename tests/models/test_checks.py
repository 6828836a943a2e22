"""Longest context and token ids are checked before the first forward; adapters with a resized vocabulary load."""

import shutil

import pytest
import torch
import transformers
from conftest import assert_one_line, make_pairs, save_tiny, train_args, write_jsonl
from helpers import lora_of, sft_args

from preflab.models import checks
from preflab.models.generation import generate
from preflab.models.loading import load_model, load_tokenizer
from utils.errors import UserError

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("kind", "keys", "length"),
    [
        ("Llama", {"max_position_embeddings": 512}, 512),
        ("GPT2", {"n_positions": 128}, 128),
        ("Mistral", {"max_position_embeddings": 512, "sliding_window": 16}, 512),
        ("Qwen2", {"max_position_embeddings": 512, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        (
            "Llama",
            {
                "max_position_embeddings": 512,
                "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 128},
            },
            512,
        ),
        ("Mamba", {}, None),
        ("Bloom", {}, None),
    ],
)
def test_context_length(kind, keys, length):
    model = torch.nn.Module()
    model.config = getattr(transformers, f"{kind}Config")(**keys)
    assert checks.context_length(model) == length


@pytest.fixture(scope="module")
def short(tmp_path_factory, smol_tokenizer):
    """A tiny Llama that reads 64 tokens."""
    return save_tiny(tmp_path_factory.mktemp("short"), smol_tokenizer, max_position_embeddings=64)


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory):
    rows = make_pairs(12)
    rows[3]["chosen"][1]["content"] = "word " * 80
    folder = tmp_path_factory.mktemp("long")
    write_jsonl(folder / "train.jsonl", rows)
    write_jsonl(folder / "test.jsonl", make_pairs(4, 50))
    return folder


def test_training_beyond_the_context_is_refused(train, short, long_rows, tmp_path):
    code, _, err = train(*train_args(short, long_rows, tmp_path), "--preflight_only")
    assert code == 2
    assert_one_line(err, "train split", "at most 64", "--max_length 64")
    code, _, err = train(*train_args(short, long_rows, tmp_path), "--preflight_only", "--max_length", 64)
    assert code == 0, err


def test_sft_beyond_the_context_is_refused(call, short, long_rows, tmp_path):
    extra = ("--preflight_only", "--test_rows", 0)
    code, _, err = call("sft_train_instruction", *sft_args(short, long_rows, tmp_path), *extra)
    assert code == 2
    assert_one_line(err, "train split", "at most 64", "--max_length 64")
    packed = ("--packing", "--max_length", 100)
    code, _, err = call("sft_train_instruction", *sft_args(short, long_rows, tmp_path), *extra, *packed)
    assert code == 2
    assert_one_line(err, "--max_length 64")


def test_scoring_beyond_the_context_is_refused(call, short, long_rows, tmp_path):
    adapter = lora_of(short, tmp_path / "adapter")
    models = ("--base_model", short, "--adapter_path", adapter, "--run_name", "x", "--eval_out", tmp_path / "out")
    data = ("--dataset_name", long_rows, "--split", "train")
    code, _, err = call("eval_win_rate", *models, *data, "--max_length", 128)
    assert code == 2
    assert_one_line(err, "at most 64", "--max_length 64")
    (tmp_path / "text.txt").write_text("some words " * 100)
    text = ("--skip_pairs", "--text_file", tmp_path / "text.txt")
    code, _, err = call("eval_perplexity", *models, *text, "--window", 100)
    assert code == 2
    assert_one_line(err, "at most 64", "--window 64")
    code, _, err = call("eval_perplexity", *models, *text, "--window", 64)
    assert code == 0, err


def test_answers_end_at_the_longest_context(short, smol_tokenizer):
    model = load_model(str(short)).eval()
    prompts = [[{"role": "user", "content": "word " * n}] for n in (1, 12, 5)]
    sizes = [len(smol_tokenizer.apply_chat_template(p, add_generation_prompt=True)["input_ids"]) for p in prompts]
    assert 64 - sizes[1] < 12 < 64 - sizes[2]
    together = sorted(generate(model, smol_tokenizer, prompts, max_new_tokens=12), key=lambda a: a["index"])
    for prompt, size, answer in zip(prompts, sizes, together, strict=True):
        (alone,) = generate(model, smol_tokenizer, [prompt], max_new_tokens=min(12, 64 - size))
        assert {**alone, "index": 0} == {**answer, "index": 0}
    with pytest.raises(UserError, match="prompt 1 of 1 has .* at most 64"):
        list(generate(model, smol_tokenizer, [[{"role": "user", "content": "word " * 90}]]))


# -------------------------------------------------------------------------------------------------------- vocabulary


def with_new_tokens(tokenizer, folder, *tokens):
    """The tokenizer with further tokens, saved to a folder and read again."""
    tokenizer.save_pretrained(folder)
    larger = load_tokenizer(str(folder))
    larger.add_tokens(list(tokens), special_tokens=True)
    larger.save_pretrained(folder)
    return larger


@pytest.fixture
def unresized(tiny, smol_tokenizer, tmp_path):
    """A model folder whose tokenizer has one token more than the model has embedding rows."""
    folder = tmp_path / "unresized"
    shutil.copytree(tiny, folder)
    with_new_tokens(smol_tokenizer, folder, "<|new|>")
    return folder


def test_ids_beyond_the_embeddings_are_refused(train, unresized, tmp_path):
    rows = make_pairs(4)
    rows[1]["chosen"][1]["content"] += "<|new|>"
    data = write_jsonl(tmp_path / "data/train.jsonl", rows).parent
    args = (*train_args(unresized, data, tmp_path), "--dataset_test_split", "none", "--preflight_only")
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "4096 embedding rows", "<|new|>", "4097 tokens")


def test_a_pad_token_without_embedding_is_replaced(train, unresized, prefs, tmp_path):
    tokenizer = load_tokenizer(str(unresized))
    tokenizer.pad_token = "<|new|>"
    tokenizer.save_pretrained(unresized)
    code, _, err = train(*train_args(unresized, prefs, tmp_path), "--max_steps", 1, "--no_shared_prompt")
    assert code == 0, err


@pytest.fixture
def resized_adapter(tiny, smol_tokenizer, tmp_path):
    """An adapter trained after two tokens were added, with its embedding rows."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path / "adapter"
    tokenizer = with_new_tokens(smol_tokenizer, folder, "<|one|>", "<|two|>")
    base = load_model(str(tiny))
    base.resize_token_embeddings(len(tokenizer))
    modules = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    torch.manual_seed(3)
    model = get_peft_model(base, LoraConfig(r=4, **modules))
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            weight.data.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_adapter_after_a_resize_equals_peft(tiny, resized_adapter, capsys):
    from peft import AutoPeftModelForCausalLM

    model = load_model(str(tiny), adapter=str(resized_adapter)).eval()
    assert "4096 embedding rows" in capsys.readouterr().err
    expected = AutoPeftModelForCausalLM.from_pretrained(resized_adapter).eval()
    ids = torch.tensor([[5, 4096, 9, 4097, 12]])
    torch.testing.assert_close(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    checks.check_ids(model, load_tokenizer(str(resized_adapter)), 4097)


def test_adapter_after_a_resize_is_evaluated(call, tiny, resized_adapter, tmp_path):
    rows = make_pairs(4)
    rows[0]["chosen"][1]["content"] += "<|one|>"
    data = write_jsonl(tmp_path / "data/test.jsonl", rows).parent
    models = ("--base_model", tiny, "--adapter_path", resized_adapter, "--run_name", "x", "--eval_out", tmp_path / "o")
    code, _, err = call("eval_win_rate", *models, "--dataset_name", data, "--split", "test", "--max_length", 128)
    assert code == 0, err


def test_added_token_without_weights(call, tiny, smol_tokenizer, prefs, tmp_path):
    """The adapter's folder has one token more, without an embedding: unused it does no harm, used it is refused."""
    adapter = lora_of(tiny, tmp_path / "adapter")
    with_new_tokens(smol_tokenizer, adapter, "<|new|>")
    models = ("--base_model", tiny, "--adapter_path", adapter, "--run_name", "x", "--max_length", 128)
    data = ("--dataset_name", prefs, "--split", "test")
    code, _, err = call("eval_win_rate", *models, *data, "--eval_out", tmp_path / "o")
    assert code == 0 and "resized to 4097" in err, err
    rows = make_pairs(4)
    rows[0]["chosen"][1]["content"] += "<|new|>"
    data = ("--dataset_name", write_jsonl(tmp_path / "data/test.jsonl", rows).parent, "--split", "test")
    code, _, err = call("eval_win_rate", *models, *data, "--eval_out", tmp_path / "o2")
    assert code == 2
    assert_one_line(err, "<|new|>", "4096 embedding rows", "4097 tokens")
