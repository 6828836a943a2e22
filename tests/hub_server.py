"""A stand-in for the hub that takes uploads: repositories in memory, large files over LFS, a log of requests."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin")


class Hub:
    """`repositories` {id: {file: bytes}}, `blobs` {sha256: bytes}, `requests` [(method, path)]; `refuse` a status."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.private: dict[str, bool] = {}
        self.refuse = None
        self.fail_commits = 0

    def uploads(self) -> list[str]:
        """The paths of the requests that sent a file's content."""
        return [path for method, path in self.requests if method == "PUT" or "/commit/" in path]

    def tree(self, repository: str) -> list[dict]:
        """The files as the hub lists them."""
        entries = []
        for name, content in self.repositories[repository].items():
            oid = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
            entry = {"type": "file", "oid": oid, "size": len(content), "path": name}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                # Git has a pointer file instead of the content.
                entry |= {"oid": "0" * 40, "lfs": {"oid": sha256, "size": len(content), "pointerSize": 134}}
            entries.append(entry)
        return entries


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def reply(self, content, status: int = 200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, hub = unquote(urlsplit(self.path).path), self.hub
        hub.requests.append((self.command, path))
        address = f"http://{self.headers['Host']}"
        if hub.refuse:
            return self.reply({"error": "no"}, hub.refuse)
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            hub.private.setdefault(name, wanted.get("visibility") == "private" or wanted.get("private") is True)
            if name in hub.repositories:
                return self.reply({"error": "exists", "url": f"{address}/{name}"}, 409)
            hub.repositories[name] = {}
            return self.reply({"url": f"{address}/{name}", "name": name})
        if self.command == "PUT":
            hub.blobs[path.rpartition("/")[2]] = body
            return self.reply({})
        if path.endswith("/info/lfs/objects/batch"):
            objects = []
            for wanted in json.loads(body)["objects"]:
                here = wanted["oid"] in hub.blobs
                actions = {} if here else {"actions": {"upload": {"href": f"{address}/lfs/{wanted['oid']}"}}}
                objects.append({**wanted, "authenticated": True, **actions})
            return self.reply({"transfer": "basic", "objects": objects})
        kind, _, rest = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        name, action = kind, rest
        if action == "tree":
            return self.reply(hub.tree(name))
        if action == "preupload":
            files = [f["path"] for f in json.loads(body)["files"]]
            modes = [{"path": f, "uploadMode": "lfs" if f.endswith(LARGE) else "regular"} for f in files]
            return self.reply({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        if action == "commit":
            if hub.fail_commits:
                hub.fail_commits -= 1
                return self.reply({"error": "broken"}, 400)
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    hub.repositories[name][value["path"]] = hub.blobs[value["oid"]]
            return self.reply({"success": True, "commitOid": "1" * 40, "commitUrl": f"{address}/{name}/commit/1"})
        return self.reply({"error": f"unknown {path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = handle_any


@contextmanager
def hub_server(monkeypatch):
    """The stand-in as the hub of this process."""
    from huggingface_hub import constants

    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
