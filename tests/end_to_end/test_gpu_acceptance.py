"""The acceptance of a machine: its steps on a CPU, what it skips, and what a failure leaves."""

import json
import subprocess

import pytest
from conftest import ROOT, assert_one_line

from benchmarks.acceptance_steps import STEPS_OF_PAGE, Machine, Step, StepFailed, execute
from benchmarks.gpu_acceptance import FAILED, PASSED, SKIPPED, Result, page, perform


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine("cpu", 0.0, tmp_path)


def acceptance(*arguments) -> subprocess.CompletedProcess:
    command = ["bash", "benchmarks/gpu_acceptance.sh", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_step_has_a_command_and_a_reason_without_a_gpu(machine):
    assert len({step.name for step in STEPS_OF_PAGE}) == len(STEPS_OF_PAGE)
    for step in STEPS_OF_PAGE:
        assert (step.command is None) != (step.do is None), step.name
        if step.command:
            script = str(step.command(machine)[0])
            assert (ROOT / script).exists(), script
    skipped = {step.name for step in STEPS_OF_PAGE if step.skip(machine)}
    assert "shape_llama_3_8b" in skipped and "dpo_lora" not in skipped
    small = Machine("cuda", 24.0, machine.folder)
    assert "24" in next(s for s in STEPS_OF_PAGE if s.name == "shape_llama_3_8b").skip(small)
    assert next(s for s in STEPS_OF_PAGE if s.name == "shape_qwen2_5_0_5b").skip(small) is None


def step(*arguments, **more) -> Step:
    return Step("a", "says", lambda machine: ["-c", *arguments], **more)


def test_states_of_a_step(machine):
    def ask(one, left=60.0, results=None):
        return perform(one, machine, results or {}, left)

    assert ask(step("print(5)", read=lambda m, out: {"value": int(out)})).figures == {"value": 5}
    failed = ask(step("import sys; print('x', file=sys.stderr); sys.exit('error: no such model')"))
    assert failed.state == FAILED and "no such model" in failed.detail and "exit code 1" in failed.detail
    unread = ask(step("print('a')", read=lambda m, out: {"value": int(out)}))
    assert unread.state == FAILED and "cannot be read" in unread.detail
    late = ask(step("import time; time.sleep(30)"), left=0.1)
    assert late.state == FAILED and late.seconds < 10 and "not finished" in late.detail
    assert ask(step("print(5)"), left=0).detail == "no time left (--minutes)"
    after = step("print(5)", needs="b")
    assert ask(after).state == SKIPPED
    assert ask(after, results={"b": Result("b", "", FAILED)}).detail == "needs the step b"
    assert ask(after, results={"b": Result("b", "", PASSED)}).state == PASSED


def test_command_that_ends_leaves_no_process(machine, tmp_path):
    code = "import subprocess, time; subprocess.Popen(['sleep', '61.73']); time.sleep(60)"
    with pytest.raises(StepFailed):
        execute(["-c", code], 1.0)
    assert subprocess.run(["pgrep", "-f", "^sleep 61.73$"], capture_output=True).returncode == 1


def test_page_lists_every_result():
    results = [Result("a", "first", PASSED, 3.2, {"loss": 0.5}), Result("b", "second", SKIPPED, detail="for a GPU")]
    run = {
        "hardware": {"gpus": ["H100"], "cpu": "EPYC"}, "versions": {"torch": "2.9"}, "wall_seconds": 8.0,
        "git_commit": "abc",
    }  # fmt: skip
    text = page(results, run, "cuda")
    assert (
        "H100" in text
        and "| first | passed | 3 | loss: 0.5 |" in text
        and "| second | skipped | 0 | for a GPU |" in text
    )
    assert "1 passed, 0 failed, 1 skipped" in text and "EPYC" in page(results, run, "cpu")


def test_bad_arguments():
    for arguments, word in (
        (("--only", "everything"), "everything"),
        (("--device", "cuda"), "--device cpu"),
    ):
        done = acceptance(*arguments)
        assert done.returncode == 2
        assert_one_line(done.stderr, word)


def test_run_on_a_cpu(tmp_path):
    done = acceptance("--device", "cpu", "--only", "shared_prompts", "throughput_gemma_2b", "--output_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "gpu_acceptance.json").read_text())
    assert [s["state"] for s in result["steps"]] == [PASSED, SKIPPED] and result["run"]["versions"]["torch"]
    assert "for a GPU" in (tmp_path / "gpu_acceptance.md").read_text()


@pytest.mark.slow
def test_stages_run_on_a_cpu(tmp_path):
    """The stages of a GPU's acceptance on this CPU: five minutes."""
    names = [step.name for step in STEPS_OF_PAGE if not step.skip(Machine("cpu", 0.0, tmp_path))]
    done = acceptance("--device", "cpu", "--minutes", 30, "--output_dir", tmp_path)
    result = json.loads((tmp_path / "gpu_acceptance.json").read_text())
    failed = [s for s in result["steps"] if s["state"] == FAILED]
    assert done.returncode == 0 and not failed, failed
    assert {s["name"] for s in result["steps"] if s["state"] == PASSED} == set(names)
