"""README and docs/: commands parse and files exist, some commands run, links resolve, tables match docs/example_run.

Every command of a fenced bash block, of a script's docstring and of a recipe's header is split as a shell would and
parsed by the script's own parser. Those in RUNS also run, with a tiny model in place of the one they name. The others
need a GPU, the hub, or minutes: they are parsed only.
"""

import argparse
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import example_run
import numpy as np
import pytest
import yaml
from conftest import ROOT, eval_args
from scipy.stats import binomtest
from stages import ITERATIONS

import utils.cli
import utils.stage
from preflab.evaluation.run_list import list_of_runs
from utils.tables import p_value

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / name / "README.md" for name in ("data", "eval_out", "benchmarks")]

# Names in commands that stand for a reader's own files.
PLACEHOLDERS = {"my_pairs.jsonl", "my.txt", "annotations.json", "votes-ann.json", "votes-bob.json", "votes-*.json"}
PLACEHOLDERS |= {"my_prompts.jsonl", "prompts.jsonl", "ranked.jsonl"}
PLACEHOLDERS |= {"my_votes.jsonl", "people.jsonl", "prompts.txt", "ann_votes.jsonl", "bob_votes.jsonl", "both.jsonl"}
PLACEHOLDERS |= {"ann.jsonl", "bob.jsonl", "gpt4-*.json", "gpt4-gemma.json", "gpt4-zephyr.json", "gpt4-llama.json"}
# Programs whose arguments are not checked.
OTHER_PROGRAMS = {
    "tensorboard",
    ".vllm/bin/vllm",
    "git",
    "cd",
    "source",
    "pip",
    "for",
    "done",
    "export",
    "mv",
    "rm",
    "rsync",
    "hf",
    "llama-cli",
    "ollama",
}
OUTPUT_FLAGS = {"--output-json", "--png", "--json"}


# ------------------------------------------------------------------------------------------------- reading the pages


def fenced_blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)


def commands_of(page: Path) -> list[str]:
    """The commands of the page's bash blocks, continued lines joined, comments and `do` removed."""
    commands = []
    for language, content in fenced_blocks(page):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for part in " ".join(shlex.quote(word) for word in words).split(" '&&' "):
                    if part:
                        commands.append(part.removeprefix("do "))
    return commands


def header_commands(source: Path) -> list[str]:
    """The commands in a script's docstring or in the comment at the head of a recipe: indented lines."""
    text = source.read_text()
    head = text.split('"""')[1] if source.suffix == ".py" else re.split(r"^[^#\n]", text, maxsplit=1, flags=re.M)[0]
    lines = re.sub(r"\\\n#? +", "", head).splitlines()
    matches = [re.match(r"#? {3,5}((python|bash|accelerate) .*)", line) for line in lines]
    return [shlex.join(shlex.split(match[1], comments=True)) for match in matches if match and "[" not in match[1]]


PATTERNS = ("*.py", "*.sh", "benchmarks/*.py", "configs/**/*.yaml")
SOURCES = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
# Each command once, with the first page or file that has it.
COMMANDS = {
    command: path.relative_to(ROOT).as_posix()
    for paths, commands_in in ((SOURCES, header_commands), (PAGES, commands_of))
    for path in reversed(paths)
    for command in commands_in(path)
}


def script_and_arguments(words: list[str]) -> tuple[str | None, list[str]]:
    """(script or None, its arguments) of `python X.py ...`, `bash X.sh ...` or `accelerate launch ... X.py ...`."""
    for at, word in enumerate(words):
        if word.endswith((".py", ".sh")) and words[0] in ("python", "python3", "bash", "accelerate"):
            return word, words[at + 1 :]
    return None, []


# ------------------------------------------------------------------------------------------------ parsing the commands


class Parsed(Exception):
    """Raised once a script's parser has accepted the arguments, so that nothing else of the script runs."""


def stop_after(parser):
    def parse_and_stop(*args, **kwargs):
        raise Parsed(parser(*args, **kwargs))

    return parse_and_stop


def parse_python(script: str, arguments: list[str], monkeypatch) -> None:
    """Run `script` up to the end of its argument parsing."""
    parse = utils.cli.parse
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    for module in (utils.cli, utils.stage):
        monkeypatch.setattr(module, "parse", stop_after(parse))
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_after(argparse.ArgumentParser.parse_args))
    monkeypatch.chdir(ROOT)
    # --list is answered before the parser, which takes seconds to import.
    with pytest.raises(SystemExit if "--list" in arguments else Parsed):
        main = runpy.run_path(str(ROOT / script))["main"]
        main()


def parse_harness(arguments: list[str], monkeypatch) -> None:
    module = importlib.import_module("preflab.harness.run")
    monkeypatch.setattr(sys, "argv", ["run_lm_eval.sh", *arguments])
    for holder in (utils.cli, utils.stage, module):
        if hasattr(holder, "parse"):
            monkeypatch.setattr(holder, "parse", stop_after(holder.parse))
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        module.main()


def parse_iteration(script: str, arguments: list[str], monkeypatch) -> None:
    """With PYTHON=true the shell script checks its arguments and prints both commands, which are parsed in turn."""
    command = ["bash", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": "/usr/bin:/bin", "PYTHON": "true"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    printed = [shlex.split(line) for line in done.stdout.decode().splitlines() if line.startswith("+ ")]
    assert len(printed) == 2
    for words in printed:
        at = next(k for k, word in enumerate(words) if word.endswith(".py"))
        with monkeypatch.context() as patch:
            parse_python(words[at], words[at + 1 :], patch)


@pytest.mark.parametrize(("command", "page"), COMMANDS.items(), ids=range(len(COMMANDS)))
def test_command_parses(command, page, monkeypatch):
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    words = [word.replace("$rate", "1e-4") for word in words]
    script, arguments = script_and_arguments(words)
    if script is None:
        assert words[0] in OTHER_PROGRAMS or words[1:3] in (["-m", "venv"], ["-m", "pytest"]), (
            f"{page}: unknown command"
        )
        return
    assert (ROOT / script).is_file(), f"{page}: {script} does not exist"
    for before, word in zip(["", *words], words, strict=False):
        looks_like_a_file = re.search(r"\.(ya?ml|jsonl?|md|txt|py|jinja)$", word) or word.startswith(
            ("configs/", "data/")
        )
        is_other = word in PLACEHOLDERS or before in OUTPUT_FLAGS or "://" in word or word.startswith("eval_out/")
        if looks_like_a_file and not is_other:
            assert (ROOT / word).exists(), f"{page}: {word} does not exist"
    if script == "run_lm_eval.sh":
        parse_harness(arguments, monkeypatch)
    elif script in ITERATIONS:
        parse_iteration(script, arguments, monkeypatch)
    elif script.endswith(".py") and words[1:3] != ["-m", "pytest"]:
        parse_python(script, arguments, monkeypatch)


def test_unknown_flag_in_a_command_is_found(monkeypatch):
    with pytest.raises((SystemExit, Exception), match="no_such_flag"):
        parse_python("eval_win_rate.py", ["--no_such_flag", "1"], monkeypatch)


# ------------------------------------------------------------------------------------------------ running some commands


# Command as printed in a page -> what makes it small. `{run}` names the tiny trained run, `{checkpoint}` its
# second step, `{tiny}` the model.
SHORT = "--limit 4 --max_new_tokens 8"
TRAIN = "--model_name_or_path {tiny} --output_dir {out}/ck --eval_out {out} --sample_prompts 0 --limit 8 --max_steps 1"
RUNS = {
    "python eval_win_rate.py": "{run}",
    "python eval_perplexity.py --text_file data/README.md --window 128": "{run}",
    "python eval_win_rate.py --battle": "{run} --judge longer --max_new_tokens 8",
    "python eval_win_rate.py --run_name quickstart --base_adapter checkpoints/simpo"
    " --output_dir eval_out/quickstart-vs-simpo": "{run} --base_adapter {checkpoint} --output_dir {out}/versus",
    "python merge_adapter.py": "{run} --merged_dir {out}/merged",
    "python human_eval.py": "{run} " + SHORT,
    "python dpo_train_human_preference.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct"
    " --dataset_name my_pairs.jsonl --dataset_test_split none --use_peft --run_name mine": TRAIN
    + " --dataset_name {prefs}/train.jsonl",
    "python generate_preference_pairs.py --config configs/pairs/quickstart-sppo.yaml"
    " --training_config configs/quickstart-sppo-iter1.yaml --part 1 --limit 6 --test_prompts 2"
    " --max_new_tokens 8": "--model_name_or_path {tiny} --run_name pairs --eval_out {out}",
}


@pytest.mark.parametrize("command", RUNS)
def test_command_runs(command, call, tiny, trained, prefs, tmp_path, monkeypatch):
    assert command in COMMANDS, "no page has this command any more"
    monkeypatch.chdir(ROOT)
    script, arguments = script_and_arguments(shlex.split(command))
    run = " ".join(eval_args(trained, tmp_path))
    names = {"run": run, "tiny": tiny, "out": tmp_path, "prefs": prefs, "checkpoint": trained / "ck/r/checkpoint-2"}
    small = RUNS[command].format(**names)
    code, out, err = call(script.removesuffix(".py"), *arguments, *small.split())
    assert code == 0, err
    assert "wrote" in out


# --------------------------------------------------------------------------------------------- size, links and anchors


def test_readme_size():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines()
    assert 200 <= len(lines) <= 275 and 12_000 <= len(text.encode()) <= 17_000
    assert max(map(len, prose)) <= 140
    assert sum(bool(re.fullmatch(r"\|[-| :]+\|", line)) for line in prose) <= 4
    assert max(len(line) for _, block in fenced_blocks(ROOT / "README.md") for line in block.splitlines()) <= 140


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of the headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors_of(file), f"{page.name}: {target}"


def test_docs_index_is_complete():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if p.name != "README.md" and f"({p.name})" not in index] == []


def test_errors_of_troubleshooting_exist():
    """Every message that the table of errors quotes is in the sources."""
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    table = page[page.index("| error | fix |") : page.index("## Questions")].splitlines()[2:]
    messages = [m for row in table if row for m in re.findall(r"`([^`]+)`", row.split("|")[1])]
    paths = [*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py"), *(ROOT / "preflab").rglob("*.py")]
    # Messages are split over several source lines.
    sources = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in paths))
    assert len(messages) > 10 and [m for m in messages if m not in sources] == []


def test_citation_has_the_required_fields():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0"
    assert citation["message"] and citation["title"] and all(author["name"] for author in citation["authors"])
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_recipe_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    recipes = [p.stem for p in (ROOT / "configs").glob("*.yaml") if "learning_rate" in p.read_text()]
    assert [r for r in recipes if not r.startswith("quickstart") and re.sub(r"-2$", "-1", r) not in text] == []


# ------------------------------------------------------------------------------------------- figures and their sources


TABLE = re.compile(r"^\|[^\n]*\|\n\|[-| :]+\|\n(?:\|[^\n]*\n)+", re.M)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SOURCE = re.compile(r"<!-- source: (.+) -->\s*\Z")
# What a table may name as its source: a file that the tests below recompute, a measurement with its commit and command,
# published figures, data files whose rows are counted below, or definitions (settings, layouts), which are not results.
KINDS = (
    r"example_run/(train|win_rate|perplexity|battle|lm_eval_quick|sppo_trait)\.json",
    r"(measured|computed)(, since| at) [0-9a-f]{7}: (python|bash) \S+.*",
    r"published: .+",
    r"the list of example_run",
    r"the tables of docs/performance\.md",
    r"the files of data(/lm_eval_quick)?",
    r"definitions",
)


def tables_with_numbers(page: Path) -> list[tuple[str, str | None]]:
    """(table, its source or None) of every Markdown table and every unnamed fenced block that has numbers."""
    text = page.read_text()
    fences = [match for match in FENCE.finditer(text) if not match[1]]
    without_fences = FENCE.sub(lambda match: "." * len(match[0]), text)
    tables = []
    for match in [*fences, *TABLE.finditer(without_fences)]:
        # Names of files and models in code or links are not figures.
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", "", match[0].removeprefix("```").removesuffix("```"))
        numbers = re.findall(r"(?<![\w.-])[+-]?\d[\d,]*(?:\.\d+)?", words)
        if len(numbers) > 1:
            source = SOURCE.search(text[: match.start()])
            tables.append((match[0], source and source[1]))
    return tables


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_table_names_its_source(page):
    for table, source in tables_with_numbers(page):
        head = table.splitlines()[:2]
        assert source, f"{page.name}: no `<!-- source: ... -->` before the table {head}"
        assert any(re.fullmatch(kind, source) for kind in KINDS), f"{page.name}: unknown source {source!r} of {head}"
        script = re.search(r"(?:python|bash) (\S+\.(?:py|sh))", source)
        assert not script or (ROOT / script[1]).is_file(), f"{page.name}: {source}"


def test_table_without_a_source_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("| a | b |\n| --- | --- |\n| 1.5 | 2 |\n\n<!-- source: definitions -->\n\n```\n1.0 2.0\n```\n")
    assert sorted(str(source) for _, source in tables_with_numbers(page)) == ["None", "definitions"]


@pytest.mark.parametrize("name", example_run.SUMMARIES)
def test_summary_follows_from_its_rows(name):
    """`python tests/example_run.py` rewrites the committed summaries after a change of the statistics."""
    committed = example_run.summary(name)
    for section, value in example_run.recomputed(name).items():
        assert example_run.same(committed[section], value), f"{name}.json, {section}"


def test_figures_of_the_example_run_by_hand():
    """A few figures, computed from the rows without the project's code."""
    margin = np.array([row["margin"] for row in example_run.rows("heldout_rows")])
    metrics = example_run.summary("train")["metrics"]
    assert len(margin) == 120 and metrics["reward_margin"]["value"] == pytest.approx(margin.mean())
    assert metrics["reward_accuracy"]["value"] == pytest.approx(np.mean((margin > 0) + 0.5 * (margin == 0)))
    wilson = binomtest(int((margin > 0).sum()), 120).proportion_ci(method="wilson")
    assert metrics["reward_accuracy"]["ci95"] == pytest.approx([wilson.low, wilson.high])
    metrics, rows = example_run.summary("perplexity")["metrics"], example_run.rows("perplexity_rows")
    for name in ("response_chosen", "response_rejected", "whole_chosen", "whole_rejected", "text"):
        end = "" if name == "text" else f"_{name}"
        of = [row for row in rows if row["set"] == ("text" if name == "text" else "pairs")]
        tokens = sum(row[f"tokens{end}"] for row in of)
        assert metrics[f"{name}_tokens"]["value"] == tokens
        for side in ("base", "tuned"):
            nll = np.array([row[f"nll{end}_{side}"] for row in of])
            assert metrics[f"{name}_ppl_{side}"]["value"] == pytest.approx(np.exp(nll.sum() / tokens))
    metrics, rows = example_run.summary("battle")["metrics"], example_run.rows("battle_rows")
    assert metrics["win_rate"]["value"] == pytest.approx(np.mean([row["consistent"] for row in rows]))
    assert metrics["flip_rate"]["value"] == pytest.approx(np.mean([row["flipped"] for row in rows]))


def test_listed_figures_match_the_example_run(tmp_path):
    """The excerpt of --list in docs/runs.md shows the figures of this run under the name quickstart."""
    (tmp_path / "out/quickstart").mkdir(parents=True)
    shutil.copy(example_run.EXAMPLE / "train.json", tmp_path / "out/quickstart/train.json")
    lines = [line for line in list_of_runs(tmp_path / "ck", tmp_path / "out").splitlines() if "train.json" in line]
    assert len(lines) == 2
    for line in lines:
        assert_row("docs/runs.md", line)


def shown(metric: dict, digits: int, scale: float = 1) -> str:
    """`value ± stderr` as tables print it."""
    return f"{metric['value'] * scale:.{digits}f} ± {metric['stderr'] * scale:.{digits}f}"


def interval(metric: dict, digits: int, scale: float = 1) -> str:
    low, high = metric["ci95"]
    return f"{metric['value'] * scale:+.{digits}f} [{low * scale:+.{digits}f}, {high * scale:+.{digits}f}]"


def assert_row(page: str, *parts: str) -> None:
    """One line of the page holds all `parts`."""
    lines = (ROOT / page).read_text().splitlines()
    assert any(all(part in line for part in parts) for line in lines), f"{page}: no row with {parts}"


def test_sppo_table_matches_the_experiment():
    metrics = example_run.summary("sppo_trait")["metrics"]
    for iteration in (1, 2, 3):
        scored, shuffled = (metrics[f"{name}_letters_{iteration}"] for name in ("scored", "shuffled"))
        assert_row("docs/sppo.md", shown(scored, 3), shown(shuffled, 3))
    assert_row("docs/sppo.md", interval(metrics["scored_minus_shuffled_all"], 3))
    text = " ".join((ROOT / "docs/sppo.md").read_text().split())
    low, high = metrics["scored_minus_shuffled_all_over_seeds"]["ci95"]
    assert f"[{low:.3f}, {high:.3f}] by Student's t over the three seeds" in text
    for ends in ("", "_over_seeds"):
        for label in ("scored", "shuffled"):
            values = (metrics[f"p_{label}_change_{t}{ends}"]["value"] for t in (1, 2, 3))
            assert f"p = {', '.join(p_value(p) for p in values)}" in text, (label, ends)


def test_lm_eval_table_matches_the_example_run():
    """The layout is tested in tests/harness; here every row's figures come from the artifact."""
    metrics = example_run.summary("lm_eval_quick")["metrics"]
    names = {key.rsplit("/", 1)[0] for key in metrics}
    assert len(names) == 8
    for name in names:
        base, tuned = (shown(metrics[f"{name}/{side}"], 4) for side in ("base", "tuned"))
        difference = metrics[f"{name}/difference"]
        assert_row("docs/lm_eval.md", base, tuned, f"{difference['value']:+.4f} ± {difference['stderr']:.4f}")


def test_speed_in_the_readme_is_that_of_the_performance_page():
    page, row = (ROOT / "docs/performance.md").read_text(), re.compile(r"^\| \S.* pairs/s, .*\|$", re.M)
    figures = [re.findall(r"([\d.]+) pairs/s", line) for line in row.findall((ROOT / "README.md").read_text())]
    assert len(figures) == 3 and all(f"| {figure} |" in page for pair in figures for figure in pair)


def test_counts_of_data_files():
    for page in ("data/README.md", "docs/data.md"):
        for file, count in re.findall(r"^\| `([\w/]+\.jsonl)` \| (\d+)", (ROOT / page).read_text(), re.M):
            path = next(p for p in (ROOT / file, ROOT / "data/lm_eval_quick" / file) if p.exists())
            assert len(path.read_text().splitlines()) == int(count), f"{page}: {file}"


@pytest.mark.parametrize("name", ["train", "win_rate", "perplexity", "battle"])
def test_excerpts_are_what_scripts_print(name):
    """Blocks that name a summary as their source consist of lines of its report."""
    printed = example_run.summary(name)["text"]
    lines, sentences = printed.splitlines(), " ".join(printed.split())
    blocks = [t for page in PAGES for t, source in tables_with_numbers(page) if source == f"example_run/{name}.json"]
    assert blocks, f"no page shows {name}"
    for line in "\n".join(block.strip("`\n") for block in blocks).splitlines():
        # Sentences are wrapped in the pages, rows of tables are not.
        assert line in lines or (line.strip() and "  " not in line.strip() and line in sentences) or not line, line
