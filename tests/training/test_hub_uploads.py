"""--push_to_hub against a stand-in for the hub: what is uploaded while a run trains, and what stays here."""

import json

import pytest
from conftest import assert_one_line, train_args
from hub_server import hub_server

MODEL = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"}
MODEL |= {"tokenizer_config.json"}


@pytest.fixture
def hub(monkeypatch):
    with hub_server(monkeypatch) as server:
        yield server


def push_args(tiny, prefs, folder, *extra):
    push = ("--push_to_hub", "--hub_model_id", "me/run", "--base_hub_id", "org/base", "--save_steps", 2)
    return train_args(tiny, prefs, folder, *push, *extra)


def commits(hub) -> int:
    return sum("/commit/" in path for _, path in hub.requests)


def test_every_save_and_the_end_are_uploaded(train, tiny, prefs, tmp_path, hub):
    flags = ("--hub_strategy", "all_checkpoints", "--hub_always_push", "--hub_private_repo")
    code, out, err = train(*push_args(tiny, prefs, tmp_path, *flags))
    assert code == 0 and "warning" not in err, err
    assert "uploaded to me/run" in out and hub.private["me/run"]
    # Steps 2 and 4, and the finished run.
    assert commits(hub) == 3
    files = hub.repositories["me/run"]
    assert {name for name in files if "/" not in name} == MODEL
    run = tmp_path / "ck/r"
    assert files["adapter_model.safetensors"] == (run / "adapter_model.safetensors").read_bytes()
    assert b"reward accuracy" in files["README.md"], "the card of the finished run, not the one of a save"
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "org/base"
    # The checkpoints are complete, for a resume elsewhere, but for the pickled arguments.
    for step in (2, 4):
        saved = run / f"checkpoint-{step}"
        here = {f"{saved.name}/{p.relative_to(saved)}": p.read_bytes() for p in saved.rglob("*") if p.is_file()}
        del here[f"{saved.name}/training_args.bin"]
        assert {name: content for name, content in files.items() if name.startswith(f"{saved.name}/")} == here


def test_strategy_end_uploads_once(train, tiny, prefs, tmp_path, hub):
    code, _, err = train(*push_args(tiny, prefs, tmp_path, "--hub_strategy", "end"))
    assert code == 0, err
    assert commits(hub) == 1 and set(hub.repositories["me/run"]) == MODEL
    # The finished run prints its results and uploads nothing.
    sent = len(hub.requests)
    assert train(*push_args(tiny, prefs, tmp_path, "--hub_strategy", "end"))[0] == 0 and len(hub.requests) == sent


def test_failed_upload_does_not_stop_training(train, tiny, prefs, tmp_path, hub):
    hub.fail_commits = 1
    code, out, err = train(*push_args(tiny, prefs, tmp_path, "--hub_always_push"))
    assert code == 0 and "uploaded to me/run" in out
    (line,) = [line for line in err.splitlines() if "warning: --push_to_hub" in line]
    assert "me/run" in line and "training continues" in line
    assert set(hub.repositories["me/run"]) == MODEL


def test_failed_last_upload_names_the_command(train, tiny, prefs, tmp_path, hub):
    hub.fail_commits = 9
    code, _, err = train(*push_args(tiny, prefs, tmp_path, "--hub_strategy", "end"))
    assert code == 2
    assert_one_line(err, "--push_to_hub me/run", f"hf upload me/run {tmp_path}/ck/r")
    assert json.loads((tmp_path / "ck/r/run.json").read_text())["finished"]


def test_refused_before_a_model_is_loaded(train, tiny, prefs, tmp_path, hub):
    hub.refuse = 403
    code, _, err = train(*push_args(tiny, prefs, tmp_path))
    assert code == 2 and not (tmp_path / "ck/r").exists()
    assert_one_line(err, "--push_to_hub me/run", "403", "hf auth login")


def test_bad_name(train, tiny, prefs, tmp_path, hub):
    code, _, err = train(*push_args(tiny, prefs, tmp_path, "--hub_model_id", "me/my model"))
    assert code == 2 and not hub.repositories
    assert_one_line(err, "--push_to_hub me/my model", "OWNER/NAME")


def test_without_a_network(train, tiny, prefs, tmp_path):
    code, _, err = train(*push_args(tiny, prefs, tmp_path))
    assert code == 2
    assert_one_line(err, "--push_to_hub me/run", "HF_HUB_OFFLINE")
