"""Files and folders of rows: CSV and TSV, byte order marks, gzip, folders of the hub and of save_to_disk."""

import gzip
import json

import pytest
from conftest import assert_one_line, make_pairs, train_args

from preflab.data.files import BadRow
from preflab.data.rows import read_rows
from utils.artifacts import read_json
from utils.errors import UserError

ROWS = [
    {"prompt": "Name a river.", "chosen": 'The "Loire", in France;\nit is long.', "rejected": "No\tidea."},
    {"prompt": "Größe?", "chosen": "1,5 m", "rejected": ""},
]
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def csv_text(delimiter: str) -> str:
    def cell(text):
        return '"' + text.replace('"', '""') + '"'

    rows = [list(ROWS[0]), *([cell(v) for v in row.values()] for row in ROWS)]
    return "\r\n".join(delimiter.join(row) for row in rows) + "\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("comma.csv", csv_text(",")),
        ("semicolon.csv", csv_text(";")),
        ("tab.csv", csv_text("\t")),
        ("tab.tsv", csv_text("\t")),
        ("a.jsonl", JSON_LINES),
        ("a.json", json.dumps(ROWS, indent=1)),
        ("lines.json", JSON_LINES),
    ],
)
def test_text_files_give_the_same_rows(name, text, gz, encoding, tmp_path):
    path = tmp_path / (name + (".gz" if gz else ""))
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if gz else content)
    assert [row for _, row in read_rows(str(path), "train")[0]] == ROWS


def test_rows_of_csv_are_named_by_their_first_line(tmp_path):
    (tmp_path / "a.csv").write_text(csv_text(","), newline="")
    assert [source.rpartition(" ")[2] for source, _ in read_rows(str(tmp_path / "a.csv"), "x")[0]] == ["2", "4"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("prompt,chosen\na,b,c\n", ("line 2", "3 cells", "2 columns")), ("a,a\n1,2\n", ("twice", "a, a")),
     ('a,b\n"x"y,2\n', ("line 2", "CSV"))],
)  # fmt: skip
def test_damaged_csv_is_named(text, words, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError) as error:
        read_rows(str(tmp_path / "x.csv"), "train")
    assert all(word in str(error.value) for word in ("x.csv", *words)), error.value


def test_lines_that_are_not_json_are_kept_apart_where_bad_rows_are_skipped(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{oops\n')
    rows = [row for _, row in read_rows(str(tmp_path / "x.jsonl"), "train", keep_bad=True)[0]]
    assert rows[0] == {"a": 1} and isinstance(rows[1], BadRow) and "line 2" in rows[1].problem


@pytest.mark.parametrize("place", ["train-00000-of-00002", "data/train-00000-of-00002", "train/0", "en/train-00000"])
def test_folders_of_the_hub(place, tmp_path):
    from datasets import Dataset

    for part, rows in enumerate((make_pairs(3), make_pairs(2, 3))):
        path = tmp_path / f"{place.replace('00000-of', f'0000{part}-of')}{part}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(path)
    config = "en" if place.startswith("en/") else None
    rows, about = read_rows(str(tmp_path), "train", config)
    assert [row["prompt"] for _, row in rows] == [row["prompt"] for row in make_pairs(5)] and len(about["files"]) == 2


def test_folders_of_save_to_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    train, test = Dataset.from_list(make_pairs(3)), Dataset.from_list(make_pairs(2, 3))
    train.save_to_disk(tmp_path / "one")
    DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert [row for _, row in read_rows(str(tmp_path / "one"), "train")[0]] == make_pairs(3)
    assert [row for _, row in read_rows(str(tmp_path / "two"), "test")[0]] == make_pairs(2, 3)
    with pytest.raises(UserError, match="two: has no split 'dev'.*train, test"):
        read_rows(str(tmp_path / "two"), "dev")


def test_json_with_a_bom(tmp_path):
    (tmp_path / "a.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "a.json") == {"a": 1}


def test_csv_trains_and_unknown_columns_get_the_flag(train, tiny, tmp_path):
    rows = [("aufgabe", "gut", "schlecht"), *((f"Name river {i}.", f"River {i}.", f"Stone {i}.") for i in range(8))]
    data = tmp_path / "mine.csv"
    data.write_text("\n".join(";".join(row) for row in rows) + "\n", encoding="utf-8-sig")
    args = train_args(tiny, data, tmp_path, "--dataset_test_split", "none", "--preflight_only")
    code, _, err = train(*args)
    assert code == 2
    assert_one_line(err, "mine.csv line 2", "aufgabe, gut, schlecht", "--columns prompt=A chosen=B rejected=C")
    code, out, err = train(*args, "--columns", "prompt=aufgabe", "chosen=gut", "rejected=schlecht")
    assert code == 0 and "8 train pairs" in out, err


def test_run_on_mapped_csv_files_is_evaluated_as_it_was_trained(call, train, tiny, tmp_path):
    """The stored names of the columns and the stored wrapping of text prompts reach the evaluation."""
    header, text = "Aufgabe,gut,schlecht\n", "Name river {0}.,River {0} is long.,Stone {0}.\n"
    (tmp_path / "data").mkdir()
    for split, numbers in (("train", range(8)), ("test", range(10, 14))):
        (tmp_path / "data" / f"{split}.csv").write_text(header + "".join(text.format(i) for i in numbers))
    columns = ("--columns", "prompt=Aufgabe", "chosen=gut", "rejected=schlecht")
    code, _, err = train(*train_args(tiny, tmp_path / "data", tmp_path, *columns))
    assert code == 0, err
    run = ("--run_name", "r", "--checkpoints", tmp_path / "ck", "--eval_out", tmp_path / "out")
    code, _, err = call("eval_win_rate", *run)
    assert code == 0, err
    trained = read_json(tmp_path / "out/r/train.json")["metrics"]
    evaluated = read_json(tmp_path / "out/r/win_rate.json")["metrics"]
    assert trained["reward_margin"]["value"] == pytest.approx(evaluated["avg_margin"]["value"], abs=1e-4) != 0


def test_hub_error_without_text_is_named_by_its_type(monkeypatch):
    """A builder's bare `assert` has no first line of text."""

    def failing(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr("preflab.data.rows.load_dataset", failing)
    with pytest.raises(UserError, match="somebody/data split train: AssertionError"):
        read_rows("somebody/data", "train")
