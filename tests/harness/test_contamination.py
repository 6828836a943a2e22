"""Figures without the documents that overlap with training data, against calculations by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import assert_one_line, write_jsonl
from scipy.stats import binomtest

from preflab.evaluation.contamination import TrainingText
from preflab.harness.contamination import contamination, table
from preflab.harness.metrics import SuiteResults, rows
from preflab.harness.results import ModelResults, question_of
from preflab.harness.suites import Suite
from utils.artifacts import read_json, write_json
from utils.errors import UserError

WORDS = "amber basil cedar delta ember fjord grove heath inlet jetty knoll larch mossy north ocean".split()


def question(number: int, count: int = 14) -> str:
    """A question of `count` words that shares no three words in a row with another number's."""
    return " ".join(f"{word}{number}" for word in WORDS[:count])


def side_of(values: dict[str, list], measure="acc", subtasks=None, group_value=None) -> ModelResults:
    """The harness's results of some tasks, `{task: figure per document}`; question k of each task is question(k)."""
    side = ModelResults()
    for task, figures in values.items():
        side.samples[task] = {
            ("none", k): {"document": f"d{k}", "prompt": "p", "values": {measure: v}, "options": 4, "answer": str(v)}
            for k, v in enumerate(figures)
        }
        side.questions[task] = {k: question(k) for k in range(len(figures))}
        side.results[task] = {"alias": task, f"{measure},none": float(np.mean(figures))}
        side.higher[task] = {measure: True}
    if subtasks:
        side.subtasks = subtasks
        (group,) = subtasks
        side.results[group] = {"alias": group, f"{measure},none": group_value}
        side.higher[group] = {measure: True}
    return side


class Training:
    """Stands for the rows of a dataset."""

    def __init__(self, *texts):
        from preflab.evaluation.contamination import TrainingText

        self.text = TrainingText("mine train", [{"prompt": text} for text in texts], [])

    def __getattr__(self, name):
        return getattr(self.text, name)


def section_of(base, tuned, *texts) -> dict:
    tasks = [{"task": task} for task in base.results]
    suite = Suite("s", "title", "source", tasks)
    results = SuiteResults("t", suite, {"base": base, "tuned": tuned}, rows(base, tuned, suite, 0), {}, [], {})
    return contamination(results, Training(*texts), 0)


BASE = [1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 0, 0]
TUNED = [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]


def test_figures_without_overlapping_documents_by_hand():
    # Questions 1 and 3 are quoted completely, of question 5 its first ten words.
    quotes = [f"Someone asked: {question(1).upper()}!", question(3), f"{question(5, 10)} and more"]
    section = section_of(side_of({"t": BASE}), side_of({"t": TUNED}), *quotes)
    assert section["tasks"] == {"t": {"documents": 12, "too_short": 0, "overlapping": {"13": 2, "8": 3}}}
    (figure,) = section["figures"]
    assert figure["documents"] == 12 and figure["all"]["base"]["value"] == pytest.approx(0.5)
    for size, gone in (("13", (1, 3)), ("8", (1, 3, 5))):
        base, tuned = ([v for k, v in enumerate(each) if k not in gone] for each in (BASE, TUNED))
        without = figure["without"][size]
        assert without["documents"] == len(base) and figure["removed"][size] == len(gone)
        for side, values in (("base", base), ("tuned", tuned)):
            assert without[side]["value"] == pytest.approx(np.mean(values))
            assert without[side]["stderr"] == pytest.approx(np.std(values, ddof=1) / np.sqrt(len(values)))
        better, worse = (sum(a - b == sign for a, b in zip(tuned, base, strict=True)) for sign in (1, -1))
        assert without["difference"]["value"] == pytest.approx(np.mean(tuned) - np.mean(base))
        assert without["p"] == pytest.approx(binomtest(better, better + worse).pvalue)
    text = table(section)
    assert "10 (-2)" in text and "9 (-3)" in text and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("weighted", [True, False])
def test_group_without_overlapping_documents(weighted):
    values = {"x": BASE, "y": TUNED[:6]}
    other = {"x": TUNED, "y": BASE[:6]}
    sides = [
        side_of(each, subtasks={"g": ["x", "y"]},
                group_value=float(np.mean(each["x"] + each["y"]) if weighted else
                                  np.mean([np.mean(each["x"]), np.mean(each["y"])])))
        for each in (values, other)
    ]  # fmt: skip
    figure = section_of(*sides, question(2))["figures"][0]
    assert figure["task"] == "g" and figure["removed"] == {"13": 2, "8": 2} and figure["documents"] == 18
    for side, each in (("base", values), ("tuned", other)):
        x, y = ([v for k, v in enumerate(each[task]) if k != 2] for task in "xy")
        expected = np.mean(x + y) if weighted else np.mean([np.mean(x), np.mean(y)])
        assert figure["without"]["13"][side]["value"] == pytest.approx(expected)


def test_group_with_another_mean_has_no_figure_without_overlap():
    """Neither the mean over documents nor that over tasks gives the harness's figure of all documents."""
    values = {"x": BASE, "y": TUNED[:6]}
    side = side_of(values, subtasks={"g": ["x", "y"]}, group_value=0.123)
    figure = section_of(side, side, question(2))["figures"][0]
    assert figure["task"] == "g" and figure["removed"] == {"13": 2, "8": 2}
    assert figure["without"] == {"13": None, "8": None}


def test_perplexity_without_overlapping_documents():
    base, tuned = [[-2.0, 1], [-3.0, 1], [-1.0, 1]], [[-1.0, 1], [-3.5, 1], [-1.0, 1]]
    sides = [side_of({"t": [0, 0, 0]}, "ppl") for _ in range(2)]
    for side, values in zip(sides, (base, tuned), strict=True):
        side.results["t"] = {"alias": "t", "ppl,none": float(np.exp(-np.mean([v for v, _ in values])))}
        for k, value in enumerate(values):
            side.samples["t"]["none", k]["values"] = {"ppl": value[0]}
    without = section_of(*sides, question(1))["figures"][0]["without"]["13"]
    assert [without[s]["value"] for s in ("base", "tuned")] == pytest.approx([np.exp(1.5), np.exp(1.0)])


def test_training_data_are_read_once_for_all_tasks(monkeypatch):
    read, texts = [], TrainingText.texts
    monkeypatch.setattr(TrainingText, "texts", lambda self: read.append(1) or texts(self))
    values = {"t": BASE, "u": TUNED[:3]}
    sides = [side_of(values), side_of(values)]
    sides[0].questions["u"] = {0: question(20), 1: "too short", 2: question(30)}
    section = section_of(*sides, question(2), question(30, 9))
    assert read == [1] and section["tasks"] == {
        "t": {"documents": 12, "too_short": 0, "overlapping": {"13": 1, "8": 1}},
        "u": {"documents": 3, "too_short": 1, "overlapping": {"13": 0, "8": 1}},
    }


def test_tasks_without_overlap_are_named():
    section = section_of(side_of({"t": BASE, "u": BASE}), side_of({"t": TUNED, "u": TUNED}), "nothing of it")
    assert section["figures"][0]["without"] == {"13": None, "8": None}
    assert "No question overlaps: t (12), u (12)." in table(section)


@pytest.mark.parametrize(
    ("document", "config", "expected"),
    [
        ({"question": "Q?", "choices": ["a"]}, {"doc_to_decontamination_query": "question"}, "Q?"),
        ({"goal": "G", "sol1": "s"}, {"doc_to_decontamination_query": "{{goal}}"}, "G"),
        ({"question": "Q?", "answer": "A"}, {"doc_to_decontamination_query": "Question: {{question}}\nAnswer:"}, "Q?"),
        ({"ctx": "C", "ind": 3, "endings": ["x"]}, {}, "C"),
        ({"eins": "one two", "zwei": "three", "n": 4}, {}, "one two three"),
        (None, {}, ""),
    ],
)
def test_question_of_a_document(document, config, expected):
    assert question_of(document, config) == expected


def logged(folder, values: list) -> str:
    lines = [
        {"filter": "none", "doc_id": k, "doc": {"question": question(k)}, "doc_hash": f"d{k}", "prompt_hash": "p",
         "metrics": ["acc"], "resps": [[str(v)]], "acc": v, "arguments": {"gen_args_0": {"arg_0": "Q"}}}
        for k, v in enumerate(values)
    ]  # fmt: skip
    write_jsonl(folder / "samples_t_1.jsonl", lines)
    config = dict.fromkeys(("model", "model_args", "gen_kwargs", "limit", "batch_size"), "x")
    results = {"t": {"alias": "t", "acc,none": float(np.mean(values)), "acc_stderr,none": 0.1}}
    write_json(folder / "results_1.json", {"results": results, "configs": {"t": {}}, "config": config})
    return str(folder)


def test_contamination_of_logged_samples(call, tmp_path, trained, prefs):
    """Through the script: a dataset's file, then a run, whose held-out rows are not training data."""
    folders = [logged(tmp_path / "a", BASE), logged(tmp_path / "b", TUNED)]
    data = write_jsonl(tmp_path / "sft.jsonl", [{"instruction": "Hi", "output": f"You asked: {question(1)}"}])
    out = ("--output-dir", tmp_path / "out")
    code, stdout, err = call("preflab.harness.run", "--compare", *folders, "--contamination", data, *out)
    assert code == 0, err
    summary = read_json(tmp_path / "out/b-vs-a/lm_eval.json")
    assert summary["contamination"]["tasks"]["t"]["overlapping"] == {"13": 1, "8": 1}
    assert summary["contamination"]["rows"] == 1 and "without 13-grams" in stdout and "11 (-1)" in stdout
    assert "without 13-grams" in (tmp_path / "out/b-vs-a/lm_eval.md").read_text()
    run = ("--contamination", "r", "--checkpoints", trained / "ck")
    code, stdout, err = call("preflab.harness.run", "--compare", *folders, *run, *out)
    assert code == 0, err
    section = read_json(tmp_path / "out/b-vs-a/lm_eval.json")["contamination"]
    rows_of_run = len((prefs / "train.jsonl").read_text().splitlines())
    assert section["training_data"] == "run r" and section["rows"] == rows_of_run and "No question overlaps" in stdout


def test_unknown_training_data_is_one_line(call, tmp_path):
    folders = [logged(tmp_path / "a", BASE), logged(tmp_path / "b", TUNED)]
    code, _, err = call("preflab.harness.run", "--compare", *folders, "--contamination", "./nosuch.jsonl")
    assert code == 2
    assert_one_line(err, "--contamination ./nosuch.jsonl")


def test_held_out_rows_of_a_run_are_not_training_data(tmp_path):
    from types import SimpleNamespace

    from preflab.evaluation.contamination import TrainingText
    from preflab.evaluation.runs import HELD_OUT_ROWS

    pairs = [{"prompt": question(k), "chosen": "Yes, of course.", "rejected": "No."} for k in range(3)]
    data = write_jsonl(tmp_path / "data.jsonl", pairs)
    write_jsonl(tmp_path / "ck/r" / HELD_OUT_ROWS, pairs[1:2])
    arguments = {"dataset_name": str(data), "dataset_test_split": "none", "test_rows": 1}
    (tmp_path / "ck/r/run.json").write_text(json.dumps({"args": arguments}))
    args = SimpleNamespace(contamination="r", contamination_split=None)
    training = TrainingText.read(args, str(tmp_path / "ck"))
    assert [row["prompt"] for row in training.rows] == [question(0), question(2)]
    assert training.overlap([question(0), question(1)]).overlapping[13].tolist() == [True, False]


@pytest.mark.parametrize("line", ['"a text that is not an object"', '{"a": 1}'])
def test_training_data_without_text_is_refused(tmp_path, line):
    path = tmp_path / "rows.jsonl"
    path.write_text(line + "\n")
    args = SimpleNamespace(contamination=str(path), contamination_split=None)
    with pytest.raises(UserError, match="no row is an object that holds text"):
        TrainingText.read(args, "checkpoints")
