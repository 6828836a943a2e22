"""Payloads in models, adapters, tokenizers, data, templates and configs: none runs, and each ends in one error line."""

import json
import shutil

import pytest
import torch
from conftest import assert_one_line, eval_args, train_args, write_jsonl
from helpers import pair_args
from payloads import Mark
from safetensors.torch import load_file

from preflab.models.loading import load_model, load_tokenizer


@pytest.fixture
def mark(tmp_path):
    """Nothing may have left it by the end of the test, unless the test has removed it."""
    mark = Mark(tmp_path / "mark")
    yield mark
    mark.assert_unmarked()


def changed(folder, **keys):
    """Change keys of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def pickled_model(folder, mark):
    (folder / "model.safetensors").unlink()
    mark.pickled(folder / "pytorch_model.bin")


def truncated_model(folder, mark):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def empty_weights(folder, mark):
    (folder / "model.safetensors").write_bytes(b"")


def code_of_the_model(folder, mark):
    (folder / "evil.py").write_text(mark.code + "class Evil: pass\n")
    changed(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})


def code_of_another_repository(folder, mark):
    changed(folder, model_type="evil", auto_map={"AutoConfig": "nobody/evil--evil.Evil"})


def code_of_the_tokenizer(folder, mark):
    (folder / "evil.py").write_text(mark.code + "class Evil: pass\n")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
    }
    path.write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()


def list_as_config(folder, mark):
    (folder / "config.json").write_text("[1, 2]")


def deep_config(folder, mark):
    (folder / "config.json").write_text("[" * 200_000)


def heads_of_zero(folder, mark):
    changed(folder, num_attention_heads=0, head_dim=None)


def text_as_size(folder, mark):
    changed(folder, hidden_size="large")


MODELS = [
    pickled_model, truncated_model, empty_weights, code_of_the_model, code_of_another_repository,
    code_of_the_tokenizer, list_as_config, deep_config, heads_of_zero, text_as_size,
]  # fmt: skip


@pytest.mark.parametrize("tamper", MODELS, ids=lambda tamper: tamper.__name__)
def test_tampered_models(tamper, train, call, tiny, prefs, trained, tmp_path, mark, monkeypatch):
    """In training, as base of an evaluation, as judge and as the model that answers."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user is asked to run code"))
    folder = shutil.copytree(tiny, tmp_path / "model")
    tamper(folder, mark)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": f"Say {i}."} for i in range(4)])
    adapter = ("--adapter_path", trained / "ck/r", "--allow_other_base", "--eval_out", tmp_path / "out")
    for code, out, err in (
        train(*train_args(folder, prefs, tmp_path)),
        # An adapter's own tokenizer is used in place of the base's.
        *([call("eval_win_rate", "--base_model", folder, *adapter, "--dataset_name", prefs)]
          if tamper is not code_of_the_tokenizer else []),
        call("eval_win_rate", *eval_args(trained, tmp_path / "out"), "--battle", "--judge", f"hf:{folder}",
             "--max_new_tokens", 4, "--limit", 2),
        call("generate_preference_pairs", *pair_args(folder, prompts, tmp_path / "pairs")),
    ):  # fmt: skip
        assert code == 2, out + err
        assert_one_line(err, str(folder))
        mark.assert_unmarked()


def test_code_runs_only_when_it_is_allowed(tiny, tmp_path, mark):
    folder = shutil.copytree(tiny, tmp_path / "model")
    code_of_the_model(folder, mark)
    with pytest.raises(Exception):  # noqa: B017 - what the code of the model leads to
        load_model(str(folder), trust_remote_code=True)
    mark.path.unlink()  # it was left: the payload of the tests above is one


def pickled_adapter(folder, mark):
    (folder / "adapter_model.safetensors").unlink()
    mark.pickled(folder / "adapter_model.bin")


def truncated_adapter(folder, mark):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def huge_header(folder, mark):
    (folder / "adapter_model.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}")


def list_as_adapter_config(folder, mark):
    (folder / "adapter_config.json").write_text('["LORA"]')


def list_as_type(folder, mark):
    (folder / "adapter_config.json").write_text('{"peft_type": ["LORA"]}')


def text_as_rank(folder, mark):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": "four"}))


ADAPTERS = [pickled_adapter, truncated_adapter, huge_header, list_as_adapter_config, list_as_type, text_as_rank]


@pytest.mark.parametrize("tamper", ADAPTERS, ids=lambda tamper: tamper.__name__)
def test_tampered_adapters(tamper, train, call, tiny, prefs, trained, tmp_path, mark):
    """In evaluations, the harness, the merge and as start of training."""
    folder = shutil.copytree(trained / "ck/r", tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    tamper(folder, mark)
    tuned = ("--base_model", tiny, "--adapter_path", folder, "--eval_out", tmp_path / "out")
    start = ("--start_adapter", folder, "--start_adapter_use", "continue")
    for code, out, err in (
        call("eval_win_rate", *tuned, "--dataset_name", prefs),
        call("eval_win_rate", *eval_args(trained, tmp_path / "out"), "--base_adapter", folder),
        # lm_eval itself would find the text in place of a number, after it has evaluated the base.
        *([call("preflab.harness.run", *tuned)] if tamper is not text_as_rank else []),
        call("merge_adapter", *tuned, "--merged_dir", tmp_path / "merged", "--dataset_name", prefs),
        train(*train_args(tiny, prefs, tmp_path, *start)),
    ):
        assert code == 2, out + err
        assert_one_line(err, str(folder))
        mark.assert_unmarked()
    assert not (tmp_path / "merged").exists()


def test_harmless_pickled_adapter_is_read(call, tiny, prefs, trained, tmp_path):
    folder = shutil.copytree(trained / "ck/r", tmp_path / "adapter", ignore=shutil.ignore_patterns("checkpoint-*"))
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    tuned = ("--base_model", tiny, "--adapter_path", folder, "--eval_out", tmp_path / "out")
    code, _, err = call("eval_win_rate", *tuned, "--dataset_name", prefs, "--limit", 4)
    assert code == 0, err


def test_reward_model_with_code(call, tiny, trained, tmp_path, mark):
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "evil.py").write_text(mark.code)
    changed(folder, auto_map={"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Evil"})
    judge = ("--battle", "--judge", f"rm:{folder}")
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path / "out"), *judge)
    assert code == 2
    assert_one_line(err, str(folder), "--trust_remote_code")


def test_dataset_script_beside_data(train, tiny, prefs, tmp_path, mark):
    folder = shutil.copytree(prefs, tmp_path / "data")
    for name in ("data.py", "train.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(mark.code)
    code, _, err = train(*train_args(tiny, folder, tmp_path, "--max_steps", "1"))
    assert code == 0, err


def test_scorer_file_runs_only_when_named(call, tiny, prefs, tmp_path, mark, monkeypatch):
    for name in ("longer.py", "scorer.py", "random.py", "columns.py"):
        (tmp_path / name).write_text(mark.code + "def longer(prompt, answers): return [0.0 for _ in answers]\n")
    monkeypatch.chdir(tmp_path)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"instruction": f"Say {i}."} for i in range(4)])
    code, _, err = call("generate_preference_pairs", *pair_args(tiny, prompts, tmp_path / "pairs"))
    assert code == 0, err
    mark.assert_unmarked()
    named = ("--scorer", "scorer.py:longer", "--run_name", "named")
    call("generate_preference_pairs", *pair_args(tiny, prompts, tmp_path / "pairs", *named))
    mark.path.unlink()  # it was left: the file is run when it is named


YAML = [
    "!!python/object/apply:builtins.exec [{code!r}]",
    "!!python/object/new:type {{args: [x, !!python/tuple [], {{extend: !!python/name:builtins.exec }}]}}",
    "!!python/name:builtins.exec ''",
]


@pytest.mark.parametrize("text", YAML)
@pytest.mark.parametrize("flag", ["--config", "--published", "--judge_prompt", "--training_config"])
def test_yaml_tags(flag, text, call, inputs, tmp_path, mark):
    path = tmp_path / "file.yaml"
    path.write_text(f"beta: {text.format(code=mark.code)}\n")
    script = {"--judge_prompt": "eval_win_rate", "--training_config": "generate_preference_pairs"}
    args = {
        "--judge_prompt": eval_args(
            inputs.trained, tmp_path / "out", "--battle", "--judge", "openai:x@http://127.0.0.1:9"
        ),
        "--training_config": pair_args(inputs.tiny, inputs.prompts, tmp_path / "out"),
    }.get(flag, train_args(inputs.tiny, inputs.prefs, tmp_path))
    code, out, err = call(script.get(flag, "dpo_train_human_preference"), *args, flag, path)
    assert code == 2, out + err
    assert_one_line(err, str(path))


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch MARK') }}",
    "{{ lipsum.__globals__['os'].popen('touch MARK') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.open('MARK', 'w') }}",
    "{{ (messages|attr('__class__')).__base__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__['os'].system('touch MARK') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ strftime_now.__func__ }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch MARK') }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_stay_in_the_sandbox(template, train, tiny, prefs, tmp_path, mark):
    path = tmp_path / "template.jinja"
    # With the messages, so that the template is otherwise a usable one.
    text = "{% for m in messages %}{{ m.role + m.content }}{% endfor %}" + template.replace("MARK", str(mark.path))
    path.write_text(text)
    code, out, err = train(*train_args(tiny, prefs, tmp_path, "--chat_template_path", path, "--max_steps", "1"))
    mark.assert_unmarked()
    # Either refused, or rendered as nothing.
    assert "Traceback" not in err and "root:" not in out
    if code:
        assert_one_line(err)


def test_tokenizer_with_a_payload_is_one_line(tiny, tmp_path, mark):
    folder = shutil.copytree(tiny, tmp_path / "model")
    code_of_the_tokenizer(folder, mark)
    from utils.errors import UserError

    with pytest.raises(UserError, match="trust_remote_code|custom code"):
        load_tokenizer(str(folder))
