"""JSON and YAML that is deep, huge by references, or no plain data: one error, soon."""

import json
import os
import time

import pytest
import yaml
from conftest import assert_one_line, make_pairs, train_args, write_jsonl

from preflab.data.files import read_file
from utils.artifacts import RowFile, read_json, read_yaml
from utils.config_file import check_config, check_environment, read_config
from utils.errors import UserError
from utils.parsing import DEEPEST, parse_json, parse_yaml

DEEP = [
    "[" * 200_000,
    "[" * 200_000 + "]" * 200_000,
    '{"a":' * 200_000,
    "[" * 101 + "]" * 101,
    '{"a":' * 101 + "1" + "}" * 101,
]


@pytest.mark.parametrize("text", DEEP)
def test_deep_json(text, tmp_path):
    for form in (text, text.encode()):
        with pytest.raises(ValueError):
            parse_json(form)
    (tmp_path / "a.json").write_text(text)
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "x"}}\n{text}\n')
    for read in (read_json, read_file):
        with pytest.raises(UserError, match="a.json"):
            read(tmp_path / "a.json")
    with pytest.raises(UserError, match="line 2"):
        read_file(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="line 2"):
        RowFile(tmp_path / "a.jsonl").read()


def test_ordinary_json_is_read():
    for value in (
        [1] * 500,
        [[i] for i in range(500)],
        {"a": {str(i): [] for i in range(500)}},
        json.loads("[" * 100 + "]" * 100),
    ):
        assert parse_json(json.dumps(value)) == value
    assert DEEPEST == 100


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
BAD_YAML = [
    "? [a, b]\n: 1",
    "? {a: b}\n: 1",
    "a: " + "[" * 5000,
    "a: " + "[" * 5000 + "]" * 5000,
    "a: " + "{b: " * 5000,
    BOMB,
    "a: &a [*a]",
    "a: &a {b: *a}",
    "a: 2001-99-99",
    "a: !!int x",
    "a: !!float []",
    "a: !!timestamp x",
    "a: !!binary é",
    "a: *nothing",
    "a: [",
    "a: \x07",
    "a: !!python/name:os.system ''",
    "a: !!set [1]",
    "<<: 3",
    "<<: [3]",
    "- 1",
    "3",
    "",
    "a: '\ud800'".encode("utf-8", "surrogatepass").decode("latin-1"),
]


@pytest.mark.parametrize("text", BAD_YAML, ids=lambda text: text[:20])
def test_bad_yaml(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode("latin-1"))
    started = time.process_time()
    for read in (read_config, read_yaml):
        with pytest.raises(UserError, match="a.yaml"):
            read(path)
    assert time.process_time() - started < 5


def test_shared_parts_of_yaml_are_read():
    text = "a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}\nd: [1, 2.5, null, true, 2001-01-01]"
    assert parse_yaml(text) == yaml.safe_load(text) and parse_yaml("") is None


@pytest.mark.parametrize(
    ("env", "word"),
    [
        ("3", "env"),
        ("[a]", "env"),
        ("{LD_PRELOAD: /tmp/x.so}", "LD_PRELOAD"),
        ("{PYTHONPATH: x}", "PYTHONPATH"),
        ("{PATH: x}", "PATH"),
        ("{HF_ENDPOINT: 'http://x'}", "HF_ENDPOINT"),
        ("{WANDB_API_KEY: abc}", "WANDB_API_KEY"),
        ("{WANDB_BASE_URL: 'http://x'}", "WANDB_BASE_URL"),
        ("{WANDB_PROJECT: [a]}", "WANDB_PROJECT"),
        ("{1: 2}", "1"),
    ],
)
def test_environment_of_a_config(env, word, train, tiny, prefs, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"env: {env}\n")
    before = dict(os.environ)
    code, _, err = train(*train_args(tiny, prefs, tmp_path, "--config", path))
    assert code == 2
    assert_one_line(err, "env", word)
    assert dict(os.environ) == before


def test_environment_that_is_harmless():
    check_environment("c.yaml", {"WANDB_PROJECT": "x", "CUDA_VISIBLE_DEVICES": 0, "OMP_NUM_THREADS": 4})
    with pytest.raises(UserError):
        check_config("nowhere.yaml", {})


def test_deep_row_in_training_data(train, tiny, tmp_path):
    data = write_jsonl(tmp_path / "data/train.jsonl", make_pairs(6))
    data.write_text(data.read_text() + '{"prompt": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    code, _, err = train(*train_args(tiny, data.parent, tmp_path))
    assert code == 2
    assert_one_line(err, "train.jsonl line 7")
