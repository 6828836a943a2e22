"""A local stand-in for servers with OpenAI's chat completions."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def completion(reply) -> dict:
    """OpenAI's reply: `{token: logprob}` becomes log-probs of one token, text a message."""
    logprobs = None
    if isinstance(reply, dict):
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in reply.items()]
        logprobs, reply = {"content": [{**top[0], "top_logprobs": top}]}, top[0]["token"]
    message = {"role": "assistant", "content": reply}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": logprobs}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def raw(choice: dict) -> bytes:
    """A reply whose choice has these fields."""
    return json.dumps({**completion(""), "choices": [{**completion("A")["choices"][0], **choice}]}).encode()


@contextmanager
def chat_servers():
    """Yields `start(answer)`, which starts a server and gives (openai:m@URL, its requests, as they come).

    `answer(question, number)` gives log-probs, text, an HTTP status, (status, message), raw bytes, or a function of
    the complete request that gives one of these.
    """
    servers = []

    def start(answer: Callable) -> tuple[str, list[dict]]:
        requests = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                requests.append({**request, "path": self.path, "authorization": self.headers["Authorization"]})
                reply = answer(request["messages"][-1]["content"], len(requests))
                reply = reply(request) if callable(reply) else reply
                reply, message = reply if isinstance(reply, tuple) else (reply, "try later")
                status = reply if isinstance(reply, int) else 200
                body = reply if isinstance(reply, bytes) else json.dumps(
                    {"error": {"message": message}} if status != 200 else completion(reply)
                ).encode()  # fmt: skip
                self.send_response(status)
                self.send_header("retry-after-ms", "1")
                self.send_header("Content-Type", "text/html" if body.startswith(b"<") else "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"openai:m@http://127.0.0.1:{server.server_port}/v1", requests

    try:
        yield start
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
