"""Templates that print today's date print one date per run, also after midnight."""

import shutil
from datetime import date
from importlib.resources import files

import pytest
from conftest import assert_one_line, eval_args, interrupted_at, train_args

from preflab.data import template_date
from preflab.data.chat_template import ChatRenderer
from utils.artifacts import read_json

TEMPLATES = files("trl") / "chat_templates"
QUESTION = [{"role": "user", "content": "Two plus two?"}]


@pytest.fixture
def today(monkeypatch):
    """A function that sets the day of the following calls."""

    def change(year, month, day):
        class Day(date):
            @classmethod
            def today(cls):
                return date(year, month, day)

        template_date.choose_template_date(None)
        monkeypatch.setattr(template_date, "date", Day)
        monkeypatch.setattr("preflab.training.run_folder.date", Day)

    yield change
    template_date.choose_template_date(None)


def test_date_of_llama(smol_tokenizer, monkeypatch, today):
    """Equal to the template under its own variable for the date."""
    monkeypatch.setattr(smol_tokenizer, "chat_template", (TEMPLATES / "llama3_2.jinja").read_text())
    today(2024, 1, 5)
    arguments = {"tokenize": False, "add_generation_prompt": True}
    expected = smol_tokenizer.apply_chat_template(QUESTION, date_string="05 Jan 2024", **arguments)
    assert "05 Jan 2024" in expected and ChatRenderer(smol_tokenizer).prompt_text(QUESTION) == expected


def test_date_of_gpt_oss(smol_tokenizer, today):
    today(2024, 1, 5)
    chat = ChatRenderer(smol_tokenizer, (TEMPLATES / "gptoss.jinja").read_text())
    assert "Current date: 2024-01-05\n" in chat.prompt_text(QUESTION)


def test_a_process_has_one_date(smol_tokenizer, today):
    today(2024, 1, 5)
    text = (TEMPLATES / "llama3_2.jinja").read_text()
    assert template_date.template_date(text) == "2024-01-05"
    template_date.choose_template_date("2023-12-31")
    assert template_date.template_date(text) == "2023-12-31"
    assert template_date.template_date(smol_tokenizer.chat_template) is None


def test_run_keeps_its_date(train, call, tiny, prefs, tmp_path, today):
    """Begun on one day, resumed on the next, evaluated later: the same prompts."""
    path = tmp_path / "dated.jinja"
    path.write_text((TEMPLATES / "llama3_2.jinja").read_text())
    args = train_args(tiny, prefs, tmp_path, "--chat_template_path", path, "--save_steps", 1, "--max_length", 400)
    today(2024, 1, 5)
    with interrupted_at(2):
        train(*args)
    today(2024, 1, 6)
    code, out, err = train(*args)
    assert code == 0 and "resuming from" in out and "2024-01-05" in out, err
    assert "05 Jan 2024" in read_json(tmp_path / "out/r/preflight.json")["first_pair"]["prompt_not_scored"]
    assert read_json(tmp_path / "ck/r/run.json")["template_date"] == "2024-01-05"
    today(2024, 2, 1)
    code, _, err = call("eval_win_rate", *eval_args(tmp_path, tmp_path / "out"))
    assert code == 0, err
    result = read_json(tmp_path / "out/r/win_rate.json")
    assert result["model"]["tuned"]["template_date"] == "2024-01-05"
    trained = read_json(tmp_path / "out/r/train.json")["metrics"]
    for name in ("logps_chosen_tuned", "logps_rejected_base"):
        assert result["metrics"][name]["value"] == pytest.approx(trained[name]["value"], abs=1e-4)

    # The adapter without its run: the day of the call, stored in the artifact, and the flag.
    shutil.copytree(tmp_path / "ck/r", tmp_path / "elsewhere", ignore=shutil.ignore_patterns("run.json", "checkpoint*"))
    models = ("--base_model", tiny, "--adapter_path", tmp_path / "elsewhere", "--max_length", 400)
    data = ("--dataset_name", prefs, "--split", "test", "--eval_out", tmp_path / "o2")
    for extra, day in (((), "2024-02-01"), (("--template_date", "2024-01-05", "--overwrite"), "2024-01-05")):
        code, _, err = call("eval_win_rate", *models, *data, *extra)
        assert code == 0, err
        again = read_json(tmp_path / "o2/elsewhere/win_rate.json")
        assert again["model"]["base"]["template_date"] == day
    assert again["metrics"]["logps_chosen_tuned"]["value"] == pytest.approx(
        result["metrics"]["logps_chosen_tuned"]["value"], abs=1e-4
    )


def test_bad_date_is_refused(call, trained, tmp_path):
    code, _, err = call("eval_win_rate", *eval_args(trained, tmp_path / "out"), "--template_date", "5 Jan")
    assert code == 2
    assert_one_line(err, "--template_date 5 Jan", "YYYY-MM-DD")
