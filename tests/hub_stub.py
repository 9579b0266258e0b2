"""A stand-in for the Hugging Face hub that takes model repositories, as huggingface_hub sends them.

Small files come within the commit, others by LFS's batch and a PUT each; xet must be off.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "stand" * 5
USER = "me"


class StubHub:
    """Serves on a free port until closed; a context manager.

    Attributes:
        url: its address.
        repositories: "owner/name" -> its files, by path.
        private: of each, whether it was asked to be private.
        cards: "owner/name" of models that are only looked up -> their cards' data.
        foreign: owners that the token may not write for.
        faults: a part of a path -> the status that requests with it get, as (method, part).
        requests: (method, path) of everything that was asked.
        bodies: all that was received beside LFS files.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.foreign: set[str] = set()
        self.faults: dict[str, int] = {}
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[bytes] = []
        self.objects: dict[str, bytes] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "StubHub":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def save(self, name: str, folder: Path) -> Path:
        """A repository's files as a folder."""
        for path, content in self.repositories[name].items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(content)
        return folder

    def answer(self, method: str, path: str, body: bytes, token: str) -> tuple[int, Any]:
        """Status and content."""
        self.requests.append((method, path))
        for part, status in self.faults.items():
            if part in path:
                return status, {"error": "as told"}
        if method == "PUT" and (match := re.fullmatch(r"/lfs/(\w+)", path)):
            assert hashlib.sha256(body).hexdigest() == match[1]
            self.objects[match[1]] = body
            return 200, {}
        self.bodies.append(body)
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if match := re.fullmatch(r"/([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        match = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/main)?(?:/.*)?", path)
        if not match or (match[1] not in self.repositories and match[1] not in self.cards):
            return 404, {"error": "Repository not found"}
        return self._of_model(match[1], match[2], body)

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner = asked.get("organization") or USER
        name = f"{owner}/{asked['name']}"
        url = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", **url}
        if owner in self.foreign:
            return 403, {"error": "You don't have the rights to create a model under it"}
        self.repositories[name] = {".gitattributes": b""}
        hidden = asked.get("private"), asked.get("visibility") == "private"  # older, newer clients
        self.private[name] = any(hidden)
        return 200, url

    def _of_model(self, name: str, what: str | None, body: bytes) -> tuple[int, Any]:
        files = self.repositories.get(name, {})
        if what is None or what == "revision":
            told = {"id": name, "private": self.private.get(name, False), "sha": "0" * 40}
            told |= {"cardData": self.cards.get(name), "tags": []}
            return 200, told | {"siblings": [{"rfilename": path} for path in files]}
        if what == "tree":
            kinds = {"type": "file", "oid": "0" * 40}
            return 200, [kinds | {"path": p, "size": len(files[p])} for p in files]
        if name.split("/")[0] in self.foreign:
            return 403, {"error": "Forbidden: you may not write here"}
        if what == "preupload":
            paths = [(file["path"], file["size"]) for file in json.loads(body)["files"]]
            modes = {p: "lfs" if p.endswith(".safetensors") else "regular" for p, _ in paths}
            kept = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False} for p in modes]
            return 200, {"files": kept}
        assert what == "commit"
        for value in (json.loads(line) for line in body.splitlines()):
            self._commit(files, value["key"], value["value"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40}

    def _commit(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif key == "lfsFile":
            files[value["path"]] = self.objects[value["oid"]]
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            assert key == "header", key

    def _batch(self, asked: dict[str, Any]) -> tuple[int, Any]:
        assert asked["operation"] == "upload"
        objects = [
            {**x, "actions": {"upload": {"href": f"{self.url}/lfs/{x['oid']}", "header": {}}}}
            for x in asked["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}


def _handler(hub: StubHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            chunked = "chunked" in self.headers.get("Transfer-Encoding", "")
            body = self._chunks() if chunked else self.rfile.read(length)
            path = unquote(urlsplit(self.path).path)
            token = self.headers.get("Authorization", "")
            status, answer = hub.answer(self.command, path, body, token)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _handle

        def _chunks(self) -> bytes:
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
