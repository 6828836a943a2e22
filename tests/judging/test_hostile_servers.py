"""Servers that hang, send without an end, send too much or redirect: bounded, retried within a budget, counted."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from test_judges import OPTIONS, PAIRWISE, item_of

from preflab.judging.endpoint import TIMEOUTS_UNTIL_DOWN
from preflab.judging.endpoint_answers import EndpointModel
from preflab.judging.judges import make_judge
from utils.errors import UserError

TIMEOUT, ATTEMPTS, ITEMS = 0.3, 1, 60


def hangs(handler):
    time.sleep(3)


def never_ends(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.02)


def ten_megabytes(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", str(10 * 2**20))
    handler.end_headers()
    handler.wfile.write(b"A" * 10 * 2**20)


def nested_deeply(handler):
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "100000")
    handler.end_headers()
    handler.wfile.write(b"[" * 100_000)


def redirects_to_itself(handler):
    handler.send_response(307)
    handler.send_header("Location", handler.path)
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def redirects_elsewhere(handler):
    handler.send_response(307)
    handler.send_header("Location", f"http://localhost:{handler.server.server_port}/elsewhere")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def hangs_up(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")


def endless_headers(handler):
    for _ in range(3000):
        handler.wfile.write(b"X-Filler: " + b"x" * 1000 + b"\r\n")


@pytest.fixture
def server(monkeypatch):
    """Start a server of this behaviour: gives its openai:MODEL@URL and the paths that were requested."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    servers = []

    def start(behaviour):
        paths = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                paths.append(self.path)
                try:
                    behaviour(self)
                except OSError:  # the client has had enough
                    pass

            def log_message(self, *args):
                pass

        running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.daemon_threads, running.block_on_close = True, False
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(running)
        return f"openai:m@http://127.0.0.1:{running.server_port}/v1", paths

    yield start
    for running in servers:
        running.shutdown()
        running.server_close()


BEHAVIOURS = [
    nested_deeply,
    hangs,
    never_ends,
    ten_megabytes,
    redirects_to_itself,
    redirects_elsewhere,
    hangs_up,
    endless_headers,
]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_judge(behaviour, server):
    spec, paths = server(behaviour)
    judge = make_judge(spec, PAIRWISE, {**OPTIONS, "timeout": TIMEOUT, "attempts": ATTEMPTS, "concurrency": 8})
    started = time.monotonic()
    verdicts = dict(judge.judge([item_of(f"q{i}") for i in range(ITEMS)]))
    # Retries wait half a second at first.
    assert time.monotonic() - started < 30
    assert len(verdicts) == ITEMS and all(v.first is None and v.error for v in verdicts.values()), "each is counted"
    assert len(paths) <= ITEMS * (1 + ATTEMPTS) and set(paths) == {"/v1/chat/completions"}
    if behaviour in (hangs, never_ends):
        assert len(paths) <= (TIMEOUTS_UNTIL_DOWN + 8) * (1 + ATTEMPTS), "a server that never answers gets no more"


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.__name__)
def test_answering_model(behaviour, server, smol_tokenizer, monkeypatch):
    monkeypatch.setattr("preflab.judging.endpoint_answers.ATTEMPTS", ATTEMPTS)
    spec, paths = server(behaviour)
    model = EndpointModel(spec, "--models", SimpleNamespace(server_timeout=TIMEOUT, server_concurrency=2))
    started = time.monotonic()
    with pytest.raises(UserError, match="openai:m@"):
        list(model.generate([[{"role": "user", "content": "q"}]] * 9, smol_tokenizer,
                            max_new_tokens=3, temperature=0, top_p=1, seed=1))  # fmt: skip
    assert time.monotonic() - started < 10 and set(paths) == {"/v1/chat/completions"}
