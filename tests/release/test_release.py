"""release.py: every figure of the card traced to its file, what the folder holds, and uploads to a stand-in hub."""

import errno
import json
import os
import re
import signal
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, assert_one_line
from drills import Fault, run_with, writes_of
from example_runs import EXAMPLE, rewrite, write_run
from hub_server import hub_server
from huggingface_hub import ModelCard, parse_eval_result_entries

from preflab.models.adapter_files import adapter_sha256

# Digits inside words (load_in_4bit) are no figures.
NUMBER = re.compile(r"(?<!\w)\d+(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)")
KNOWN = ("--license", "mit", "--language", "en")


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Make a run of docs/example_run with small weights: made(name) gives the folder of its results."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "quickstart", base: str = "HuggingFaceTB/SmolLM2-135M-Instruct") -> Path:
        results = write_run(tmp_path, name)
        weights = tmp_path / "ck" / name
        (weights / "config.json").unlink()
        (weights / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "r": 16}))
        (weights / "adapter_model.safetensors").write_bytes(b"weights")
        (weights / "training_args.bin").write_bytes(b"/home/me/secret")
        (weights / "tokenizer.json").write_text('{"vocab": {"/home": 1}}')
        (weights / "checkpoint-2").mkdir()
        for file in ("samples.md", "dpo_training_curves.png"):
            (results / file).write_bytes((EXAMPLE / file).read_bytes())
        rewrite(results / "train.json", lambda s: s["run"].update(run_name=name))
        own = adapter_sha256(str(weights))
        for file in ("win_rate.json", "perplexity.json", "battle.json", "lm_eval/quick/lm_eval.json"):
            rewrite(results / file, lambda s: s["model"]["tuned"].update(adapter_sha256=own))
        return results

    return make


@pytest.fixture
def release(call, tmp_path):
    """Call release.py on the run of `made`."""

    def calling(*args, known: tuple = KNOWN):
        return call("release", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out", *known, *args)

    return calling


def card_of(tmp_path, name: str = "quickstart") -> tuple[Path, str, dict, list[dict]]:
    """(folder, body of the card, its metadata, sources)."""
    folder = tmp_path / "ck" / f"{name}-release"
    card = ModelCard.load(folder / "README.md")
    return folder, card.text, card.data.to_dict(), json.loads((folder / "card_sources.json").read_text())["figures"]


def value_at(results: Path, entry: dict, keys: list):
    """The value that an entry names, read again from the file."""
    path = results / entry["file"] if (results / entry["file"]).exists() else ROOT / entry["file"]
    text = path.read_text()
    if path.suffix == ".jsonl":
        value = [json.loads(line) for line in text.splitlines()]
    else:
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    for key in keys:
        value = value[key]
    return value


def check_entry(results: Path, entry: dict) -> None:
    """The figure follows from its file."""
    kind, shown, keys = entry["kind"], entry["shown"], entry["key"]
    if kind in ("name", "finding"):
        return
    if kind in ("product", "mean"):
        values = [value_at(results, entry, place) for place in keys]
        expected = values[0] * values[1] if kind == "product" else entry["scale"] * sum(values) / len(values)
        assert float(shown) == pytest.approx(expected, abs=0.5001 * 10 ** -entry.get("digits", 0)), entry
        return
    value = value_at(results, entry, keys)
    if kind == "number":
        decimals = len(shown.partition(".")[2])
        assert decimals == entry["digits"], entry
        assert float(shown) == pytest.approx(entry["scale"] * value, abs=0.5001 * 10**-decimals), entry
    elif kind == "p":
        assert float(shown) == pytest.approx(value, rel=0.06), entry
    elif kind == "index":
        assert float(shown) == value, entry
    elif kind == "eval_results":
        assert float(shown) == pytest.approx(100 * value, abs=1e-4), entry
    elif kind == "text":
        assert shown == value, entry
    else:
        assert kind == "value", entry
        words = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        assert shown.replace("\\", "") == words, entry


def untraced(text: str, entries: list[dict]) -> Counter:
    """The numbers of a card, outside code, that no source accounts for."""
    text = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    # The template's own words.
    text = text.replace("with 95% intervals in brackets", "")
    shown = Counter(n for entry in entries for n in NUMBER.findall(entry["shown"]))
    return Counter(NUMBER.findall(text)) - shown


def test_every_number_has_its_source(made, release, tmp_path):
    results = made()
    code, out, err = release()
    assert code == 0, err
    _, text, data, entries = card_of(tmp_path)
    assert len([e for e in entries if e["kind"] == "number"]) > 150
    for entry in entries:
        check_entry(results, entry)
    body = [e for e in entries if e["section"] not in ("model-index", ".eval_results")]
    assert not untraced(text, body)
    # The check notices a figure that nobody accounts for.
    assert untraced(text.replace("Training helped", "Training helped by 12.34%"), body) == Counter({"12.34": 1})
    # Stages of the run, base beside tuned, as in the artifacts.
    for words in ("### Preference training", "### Perplexity", "### Battles", "### lm-evaluation-harness, suite quick"):
        assert words in text
    metric = json.loads((EXAMPLE / "train.json").read_text())["metrics"]["reward_accuracy"]
    low, high = metric["ci95"]
    assert f"{100 * metric['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]" in text
    index = [e for e in entries if e["section"] == "model-index"]
    listed = [m["value"] for model in data["model-index"] for r in model["results"] for m in r["metrics"]]
    assert sorted(float(e["shown"]) for e in index) == sorted(map(float, listed)) and len(listed) > 20


def test_failed_judges_are_marked(made, release, tmp_path):
    """The battle's judge changes its verdict with the order on 95% of the prompts."""
    made()
    assert release()[0] == 0
    _, text, data, _ = card_of(tmp_path)
    (line,) = re.findall(r"^\| wins, .*", text, re.MULTILINE)
    assert "†" in line and "† the judge is unreliable" in text
    names = [m["name"] for model in data["model-index"] for r in model["results"] for m in r["metrics"]]
    assert "win_rate (the judge is unreliable)" in names
    # Controls and other stages have no mark.
    assert text.count("†") == 2


@pytest.mark.parametrize(
    ("audit", "words"),
    [({"passed": True}, None), ({"passed": False}, "the judge failed its audit"), (None, "the judge was not audited")],
)
def test_audit_of_alpacaeval(made, release, tmp_path, audit, words):
    """In the stage's table, in the published layout and in the model index."""
    results = made("gemma-2-9b-it-simpo", "google/gemma-2-9b-it")
    metric = {"value": 40.25, "stderr": 2.0, "ci95": [36.0, 44.0], "n": 8}
    rates = ("win_rate", "length_controlled_winrate", "longer_win_rate", "avg_length")
    metrics = {f"{side}_{rate}": metric for side in ("base", "tuned", "difference") for rate in rates}
    metrics["base_unparsed"] = {**metric, "value": 0}
    summary = json.loads((results / "win_rate.json").read_text())
    summary |= {"stage": "alpacaeval", "metrics": metrics, "audit": audit}
    summary["args"]["judge"] = "hf:me/judge"
    (results / "alpacaeval").mkdir()
    (results / "alpacaeval/alpacaeval.json").write_text(json.dumps(summary))
    code, _, err = release()
    assert code == 0, err
    _, text, data, entries = card_of(tmp_path, "gemma-2-9b-it-simpo")
    names = [m["name"] for model in data["model-index"] for r in model["results"] for m in r["metrics"]]
    section = text.partition("### AlpacaEval")[2].partition("\n### ")[0]
    (published,) = re.findall(r"^\| this run: tuned .*", text, re.MULTILINE)
    assert "40.2" in published and "≠" in published and "hf:me/judge" in section
    for entry in (e for e in entries if e["section"] == "published"):
        check_entry(results, entry)
    if words is None:
        assert "†" not in section + published and "tuned_win_rate" in names
    else:
        # Base, tuned and difference of both rates; not the control and the lengths.
        assert section.count("†") == 7 and f"† {words}" in section and published.count("†") == 3
        assert f"tuned_win_rate ({words})" in names and f"tuned_length_controlled_winrate ({words})" in names


def test_card_has_what_the_hub_needs(made, release, tmp_path):
    made()
    links = ("--family", "GGUF=me/x-GGUF", "--tracker", "https://t.example/run/1")
    sampling = ("--system", "Be brief.", "--temperature", 0.6, "--top_k", 40, "--top_p", 0.9)
    code, _, err = release(*links, *sampling)
    assert code == 0, err
    folder, text, data, _ = card_of(tmp_path)
    assert (data["license"], data["language"]) == ("mit", ["en"])
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    for words in ("temperature=0.6, top_k=40, top_p=0.9", '"content": "Be brief."', "rafailov", "2305.18290",
                  "betas=(0.9, 0.999)", "eval_batch_size: 4", "distributed_type: none", "me/x-GGUF",
                  "<https://t.example/run/1>", "## Intended use and limits",
                  "[smollm2-135m-instruct](https://"):  # fmt: skip
        assert words.lower() in text.lower(), words
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors", "card_sources.json",
                     "tokenizer.json", "training_curves.png"]  # fmt: skip
    weights = tmp_path / "ck/quickstart/adapter_model.safetensors"
    assert os.path.samefile(folder / "adapter_model.safetensors", weights)


def test_licence_of_the_base(made, release, tmp_path, call):
    results, base = made(), tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    rewrite(results / "train.json", lambda s: s["model"].update(name=str(base)))
    own = ("--base_hub_id", "me/base")
    assert_one_line(release(known=())[2], "--base_hub_id", "OWNER/NAME")
    code, _, err = release(*own, known=())
    assert code == 2 and not (tmp_path / "ck/quickstart-release").exists()
    assert_one_line(err, "--license", "--language", "--license apache-2.0 --language en")
    head = "---\nlicense: other\nlicense_name: gemma\nlicense_link: https://x.y/z\n---\n# Base"
    (base / "README.md").write_text(head)
    assert_one_line(release(*own, known=())[2], "--language")
    (base / "README.md").write_text(head.replace("license: other", "license: other\nlanguage: [en, de]"))
    assert release(*own, known=())[0] == 0
    data = card_of(tmp_path)[2]
    assert (data["license"], data["license_name"], data["language"]) == ("other", "gemma", ["en", "de"])
    # A licence of one's own has no name or link of the base's.
    assert release(*own, "--license", "mit", known=())[0] == 0
    assert "license_name" not in card_of(tmp_path)[2]


def test_licence_of_the_builtin_model_needs_no_network(made, release, tmp_path, monkeypatch):
    def unreachable(*_):
        raise AssertionError("the hub was called")

    monkeypatch.setattr("preflab.release.base.fetch", unreachable)
    made()
    expected = {
        (): ("apache-2.0", ["en"]),
        ("--license", "mit"): ("mit", ["en"]),
        ("--language", "de"): ("apache-2.0", ["de"]),
    }
    for flags, both in expected.items():
        assert release(*flags, known=())[0] == 0
        data = card_of(tmp_path)[2]
        assert (data["license"], data["language"]) == both


def test_adapter_on_a_merged_base(made, release, tmp_path):
    """Loaded on the original base, it would be another model."""
    results = made()
    start = {"base": "HuggingFaceTB/SmolLM2-135M-Instruct", "adapter": "sft", "merged": str(tmp_path / "sft-merged")}
    rewrite(results / "train.json", lambda s: s.update(start=start))
    code, _, err = release()
    assert code == 2 and not (tmp_path / "ck/quickstart-release").exists()
    assert_one_line(err, "--run_name quickstart", "--merged", "--base_hub_id")
    # A merged folder is complete.
    merged = tmp_path / "ck/quickstart-merged"
    merged.mkdir()
    (merged / "config.json").write_text("{}")
    (merged / "model.safetensors").write_bytes(b"weights")
    (merged / "merged_from.json").write_text(json.dumps(start))
    assert release("--merged")[0] == 0
    folder, text, data, _ = card_of(tmp_path)
    assert data["base_model_relation"] == "finetune" and "merged into its base" in text
    assert (folder / "model.safetensors").exists() and not (folder / "merged_from.json").exists()


def test_nothing_of_the_machine(made, release, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "very-secret-value")
    results, weights = made(base=str(tmp_path / "cache/base")), tmp_path / "ck/quickstart"

    def change(summary):
        summary["claim"] += f" See {tmp_path}/notes.txt and very-secret-value, hf_{'a' * 20}."
        summary["args"]["output_dir"] = str(tmp_path / "ck")
        summary["data"]["train"]["sources"][0]["name"] = f"{tmp_path}/my_pairs.jsonl"

    rewrite(results / "train.json", change)
    (weights / "tokenizer_config.json").write_text(json.dumps({"name_or_path": str(tmp_path), "pad_token": "x"}))
    assert release()[0] == 0
    folder, text, _, _ = card_of(tmp_path)
    assert "See notes.txt and ***, ***." in text and "my\\_pairs.jsonl" in text.replace("my_", "my\\_")
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_text(errors="replace")
            assert str(tmp_path) not in content and "very-secret" not in content and "hf_aaa" not in content, path
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 16}
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"pad_token": "x"}
    # What cannot be removed is refused, and the earlier folder is left as it is.
    (weights / "chat_template.jinja").write_text("{# very-secret-value #}")
    code, _, err = release()
    assert code == 2 and folder.is_dir()
    assert_one_line(err, "chat_template.jinja", "token")
    (weights / "chat_template.jinja").write_text(f"{{# {tmp_path}/base #}}")
    assert_one_line(release()[2], "chat_template.jinja", str(tmp_path))


def test_stale_results_and_trials_are_left_out(made, release, tmp_path):
    results = made()
    data = tmp_path / "my_pairs.jsonl"
    data.write_text("changed\n")
    source = {"name": str(data), "split": "test", "files": ["my_pairs.jsonl"], "sha256": "0" * 64, "rows": 1}
    rewrite(results / "win_rate.json", lambda s: s["data"].update(sources=[source]))
    rewrite(results / "perplexity.json", lambda s: s["run"].update(limit=8))
    (results / "battle.json").write_text("{")
    code, out, err = release()
    assert code == 0, err
    text = card_of(tmp_path)[1]
    for title in ("### Win rate by rewards", "### Perplexity", "### Battles"):
        assert title not in text
    assert "changed since" in out and "--limit 8" in out and "battle.json" in out


def test_damaged_artifacts_are_named(made, release, tmp_path):
    """A suite whose rows lack a key is left out; of training, which the card needs, the section is named."""
    results = made()
    rewrite(results / "lm_eval/quick/lm_eval.json", lambda s: s["rows"][0].pop("shots"))
    code, out, err = release()
    assert code == 0, err
    assert "lm_eval.json: is not as its stage writes it" in " ".join(out.split()) and "'shots'" in out
    assert "### lm-evaluation-harness" not in card_of(tmp_path)[1]
    rewrite(results / "train.json", lambda s: s["plan"].pop("global_batch_size"))
    code, _, err = release()
    assert code == 2
    assert_one_line(err, "hyperparameters", "global_batch_size")


def test_eval_results_of_the_hub(made, release, tmp_path):
    results = made()

    def change(summary):
        row = summary["rows"][0]
        row.update(task="gsm8k", metric="exact_match", filter="strict-match", shots=5)

    rewrite(results / "lm_eval/quick/lm_eval.json", change)
    assert release("--push", "me/x")[0] == 0
    folder, _, _, entries = card_of(tmp_path)
    (entry,) = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results/gsm8k.yaml").read_text()))
    row = json.loads((EXAMPLE / "lm_eval_quick.json").read_text())["rows"][0]
    assert (entry.dataset_id, entry.value) == ("openai/gsm8k", pytest.approx(100 * row["tuned"]["value"], abs=1e-4))
    assert "5-shot" in entry.notes and entry.source_url.endswith("/me/x")
    (source,) = (e for e in entries if e["section"] == ".eval_results")
    check_entry(results, source)


def test_published_figures_of_the_recipe(made, release, tmp_path):
    results = made("gemma-2-9b-it-simpo", "google/gemma-2-9b-it")

    def change(summary):
        summary["model"]["name"] = "google/gemma-2-9b-it"
        summary["data"]["train"]["sources"][0].update(name="princeton-nlp/gemma2-ultrafeedback-armorm", revision="abc")
        summary["args"]["loss_type"] = ["simpo"]

    rewrite(results / "train.json", change)
    code, _, err = release("--run_name", "gemma-2-9b-it-simpo")
    assert code == 0, err
    _, text, data, entries = card_of(tmp_path, "gemma-2-9b-it-simpo")
    (line,) = re.findall(r"^\| published: gemma-2-9b-it-SimPO .*", text, re.MULTILINE)
    assert re.findall(r"[\d.]+", line.partition("SimPO")[2]) == ["72.4", "65.9", "1833", "59.1", "693", "88.0", "341",
                                                                "72.2", "441"]  # fmt: skip
    assert "published: gemma-2-9b-it " in text and "this run: tuned" in text and "not measured" in text
    for entry in entries:
        check_entry(results, entry)
    assert not untraced(text, [e for e in entries if e["section"] != "model-index"])
    assert data["datasets"] == ["princeton-nlp/gemma2-ultrafeedback-armorm"]
    for key in ("simpo2024", "ultrafeedback2023", "armorm2024", "dpo2023"):
        assert f"{{{key}," in text


def test_training_results_by_epoch_and_step(made, release, tmp_path):
    results = made()
    made_log = [json.loads(line) for line in (EXAMPLE / "train_log.jsonl").read_text().splitlines()]
    evaluation = {**made_log[-1], "split": "eval", "step": 17, "loss": 0.51234}
    with (results / "train_log.jsonl").open("w") as log:
        log.writelines(json.dumps(row) + "\n" for row in [*made_log, evaluation])
    assert release()[0] == 0
    text = card_of(tmp_path)[1]
    (line,) = re.findall(r"^\| 0\.\d{4} +\| \d\.\d\d +\| 17 .*", text, re.MULTILINE)
    train_loss = next(row["loss"] for row in made_log if row["split"] == "train" and row["step"] == 17)
    assert line.startswith(f"| {train_loss:.4f}") and "| 0.5123 " in line


def test_push_and_push_again(made, release, tmp_path, monkeypatch):
    made()
    push = ("--push", "me/quick")
    with hub_server(monkeypatch) as hub:
        # The default only lists.
        code, out, _ = release(*push)
        assert code == 0 and "dry run" in out and "adapter_model.safetensors" in out and not hub.requests
        # The commit fails after the weights were sent; the second call sends the rest only.
        hub.fail_commits = 1
        code, _, err = release(*push, "--no_dry_run", "--private")
        assert code == 2 and hub.repositories == {"me/quick": {}} and hub.private["me/quick"]
        assert_one_line(err, "--push me/quick", "the same command continues")
        weights = [path for path in hub.uploads() if "/lfs/" in path]
        assert len(weights) == 1
        code, out, err = release(*push, "--no_dry_run")
        assert code == 0, err
        folder = card_of(tmp_path)[0]
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert hub.repositories["me/quick"] == files
        assert [path for path in hub.uploads() if "/lfs/" in path] == weights
        # Nothing has changed: nothing is sent.
        sent = len(hub.uploads())
        code, out, _ = release(*push, "--no_dry_run")
        assert code == 0 and len(hub.uploads()) == sent and out.count("in the repository") == len(files)
        # One file has changed.
        (tmp_path / "ck/quickstart/tokenizer.json").write_text("{}")
        assert release(*push, "--no_dry_run")[0] == 0
        assert len(hub.uploads()) == sent + 1 and hub.repositories["me/quick"]["tokenizer.json"] == b"{}"
        hub.refuse = 403
        code, _, err = release(*push, "--no_dry_run")
        assert code == 2
        assert_one_line(err, "--push me/quick", "403", "hf auth login")


def test_kill_full_disk_and_ctrl_c(made, tmp_path):
    """While files are written, with an earlier release in place; the next call makes the folder all the same."""
    made()
    flags = ("--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out", "--run_name", "quickstart", *KNOWN)
    assert run_with(Fault(str(tmp_path)), "release.py", flags).returncode == 0
    folder, last = tmp_path / "ck/quickstart-release", writes_of(tmp_path) - 1
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    for kind, at, code in (("kill", 6, -9), (errno.ENOSPC, 8, 2), ("signal", 9, 130), ("kill", last, -9)):
        done = run_with(Fault(str(tmp_path), at, kind, signal.SIGINT), "release.py", flags)
        assert done.returncode == code and "Traceback" not in done.stderr, done.stderr
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert run_with(Fault(str(tmp_path)), "release.py", flags).returncode == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == content
    assert not Path(f"{folder}.part").exists()


def test_usage_example_runs(made, release, tmp_path, tiny, monkeypatch, capsys):
    """The card's code loads the folder, greedy and sampled, with nothing but transformers."""
    made()
    weights = tmp_path / "ck/quickstart"
    for path in weights.glob("adapter*"):
        path.unlink()
    for path in tiny.iterdir():
        (weights / path.name).write_bytes(path.read_bytes())
    rewrite(weights / "config.json", lambda config: config.update(_name_or_path=str(tiny)))
    assert release("--system", "Be brief.")[0] == 0
    folder, text, data, _ = card_of(tmp_path)
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")
    blocks = re.findall(r"^```python\n(.*?)^```$", text.partition("## Results")[0], re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(folder.parent)
    code = [block.replace("max_new_tokens=64", "max_new_tokens=4") for block in blocks if "generator" in block]
    assert len(code) == 2 and "top_p=0.95" in code[1]
    exec("\n".join(code), {})


def test_folders_and_runs_that_are_not_ours(made, release, tmp_path):
    made()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    code, _, err = release("--release_dir", other)
    assert code == 2 and (other / "thesis.txt").read_text() == "mine"
    assert_one_line(err, "--release_dir", "other")
    rewrite(tmp_path / "ck/quickstart/run.json", lambda run: run.update(finished=False))
    assert_one_line(release("--run_name", "quickstart")[2], "--run_name quickstart", "not a finished")
