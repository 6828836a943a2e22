"""Planted secrets (in the environment, in a flag, in an address) are in no output of any stage."""

import pytest
from conftest import assert_one_line, eval_args, train_args
from helpers import pair_args
from stages import STAGES

ENVIRONMENT = {
    "HF_TOKEN": "hf_PlantedTokenOfTheHub0123456789",
    "OPENAI_API_KEY": "sk-PlantedKeyOfOpenAI0123456789",
    "WANDB_API_KEY": "planted0wandb0key0123456789",
    "GITHUB_TOKEN": "planted-token-without-a-form",
}
FLAG, PASSWORD = "hf_PlantedFlag0123456789abcdef", "planted-password"
SECRETS = [*ENVIRONMENT.values(), FLAG, PASSWORD]


@pytest.fixture
def planted(monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def assert_none_leaks(folder, *outputs):
    files = [path for path in folder.rglob("*") if path.is_file()]
    for secret in SECRETS:
        assert not [path for path in files if secret.encode() in path.read_bytes()]
        assert not any(secret in output for output in outputs)
    return len(files)


def with_login(spec: str) -> str:
    return spec.replace("http://", f"http://planted-user:{PASSWORD}@")


def test_training(train, tiny, prefs, tmp_path, planted):
    args = train_args(tiny, prefs, tmp_path)
    # The one flag for a token is refused; the record of the command is tested in tests/utils/test_markdown.py.
    code, *outputs = train(*args, "--hub_token", FLAG)
    assert code == 2 and "--hub_token" in outputs[1]
    code, out, err = train(*args)
    assert code == 0, err
    assert assert_none_leaks(tmp_path, *outputs, out, err) > 10


@pytest.mark.parametrize(
    "stage",
    ["eval_perplexity.py", "run_alpacaeval_local.py", "human_eval.py", "merge_adapter.py", "report.py", "release.py"],
)
def test_other_stages(stage, call, inputs, endpoint, tmp_path, planted):
    """run_lm_eval.sh starts a process: tests/harness/test_run_lm_eval.py searches its files."""
    args = STAGES[stage](inputs, tmp_path)
    if stage == "run_alpacaeval_local.py":
        args += ["--judge", with_login(endpoint(lambda *_: "m")[0])]
    code, out, err = call(stage.removesuffix(".py"), *args)
    assert code == 0, err
    assert assert_none_leaks(tmp_path, out, err)


def test_servers(call, endpoint, inputs, tmp_path, planted):
    """As judge, as answering model and as scorer; with errors of a server that fails."""
    judge = with_login(endpoint(lambda *_: "A")[0])
    answers = with_login(endpoint(lambda question, _: f"Re: {question}")[0])
    failing = with_login(endpoint(lambda *_: 401)[0])
    nowhere = f"openai:m@http://planted-user:{PASSWORD}@127.0.0.1:9/v1"
    malformed = f"openai:m@ftp://planted-user:{PASSWORD}@127.0.0.1:9/v1"
    no_scheme = f"openai:m@planted-user:{PASSWORD}@127.0.0.1:9/v1"
    slash = f"openai:m@http://planted-user:a/{PASSWORD}@127.0.0.1:9/v1"
    battle = eval_args(inputs.trained, tmp_path / "out", "--battle", "--limit", "2", "--max_new_tokens", "4")
    outputs = []
    for args in ((judge, "--models", f"other={answers}"), (failing,), (nowhere,), (malformed,), (no_scheme,), (slash,)):
        code, *printed = call("eval_win_rate", *battle, "--overwrite", "--judge", *args, "--judge_attempts", "0")
        assert code in (0, 2), printed
        outputs += printed
    scorer = pair_args(inputs.tiny, inputs.prompts, tmp_path / "pairs", "--scorer", f"judge:{judge}", "--overwrite")
    code, *rest = call("generate_preference_pairs", *scorer)
    assert code in (0, 2), rest
    assert assert_none_leaks(tmp_path, *outputs, *rest) > 5


def test_errors_name_no_secret(call, tmp_path, planted):
    code, out, err = call("dpo_train_human_preference", "--no_such_flag", FLAG, "--hub_token", FLAG)
    assert code == 2
    assert_one_line(err, "--no_such_flag")
    assert_none_leaks(tmp_path, out, err)
    # The library that looks for a local file writes http:/ with one slash.
    address = f"https://planted-user:{PASSWORD}@host/rows"
    code, out, err = call("dpo_train_human_preference", "--dataset_name", address, "--model_name_or_path", "gpt2")
    assert code == 2
    assert_none_leaks(tmp_path, out, err)
