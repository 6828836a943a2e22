"""Errors of the hub (unknown, gated, unreachable models and datasets), simulated by a local server."""

import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import assert_one_line, command, train_args

from utils.hub import report_retries_once


class RefusingHub(BaseHTTPRequestHandler):
    """Responds as the hub does: gated for */gated*, not found for everything else."""

    def do_GET(self):
        gated = "/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header(
            "X-Error-Message", "Access to this repository is restricted" if gated else "Repository not found"
        )
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), RefusingHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run_against(endpoint, tmp_path, model, data, **env):
    environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", **env}
    done = command("dpo_train_human_preference.py", *train_args(model, data, tmp_path), env=environment)
    assert done.returncode == 2, done.stderr
    return done.stderr


def test_gated_model_names_the_login(hub, tmp_path, prefs):
    assert_one_line(run_against(hub, tmp_path, "org/gated-model", prefs), "org/gated-model", "hf auth login")


def test_doctor_names_what_a_recipe_cannot_read(hub, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model_name_or_path: org/gated-model\ndataset_name: org/misspelt-data\n")
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}
    done = command("-m", "preflab.doctor.run", "--config", recipe, env=environment)
    assert done.returncode == 1 and "2 problems" in done.stdout
    lines = " ".join(done.stdout.split())
    assert "model org/gated-model is gated: accept its licence" in lines and "dataset org/misspelt-data" in lines


def test_unknown_model(hub, tmp_path, prefs):
    assert_one_line(run_against(hub, tmp_path, "org/misspelt", prefs), "org/misspelt")


@pytest.mark.slow
def test_unknown_dataset(hub, tmp_path, tiny):
    assert_one_line(run_against(hub, tmp_path, tiny, "org/misspelt-data"), "org/misspelt-data")


# The hub client retries for half a minute before it fails.
@pytest.mark.parametrize("offline", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_no_network_for_the_model(tmp_path, prefs, offline):
    err = run_against("http://127.0.0.1:9", tmp_path, "org/model", prefs, HF_HUB_OFFLINE=offline)
    fix = ("HF_HUB_OFFLINE is set", str(tmp_path / "hf"), "docs/install.md") if offline == "1" else ("HTTPS_PROXY",)
    assert_one_line(err, "org/model", *fix)


@pytest.mark.slow
def test_no_network_for_the_data(tmp_path, tiny):
    err = run_against("http://127.0.0.1:9", tmp_path, tiny, "org/data", HF_HUB_OFFLINE="1")
    assert_one_line(err, "org/data", "HF_HUB_OFFLINE is set", "docs/install.md")


def test_retries_are_reported_once():
    """huggingface_hub retries an unreachable hub five times, with two lines each."""
    from huggingface_hub.utils import _http

    records = []
    logger = _http.logger
    earlier, logger.filters = logger.filters, []
    handler = logging.Handler()
    handler.emit = records.append
    logger.addHandler(handler)
    try:
        report_retries_once()
        report_retries_once()
        for k in range(3):
            logger.warning("'%s' thrown while requesting", OSError())
            logger.warning(f"Retrying in 1s [Retry {k}/3].")
        logger.error("another error")
    finally:
        logger.removeHandler(handler)
        logger.filters = earlier
    lines = [record.getMessage() for record in records]
    assert len(lines) == 2 and "does not answer" in lines[0] and lines[1] == "another error"
