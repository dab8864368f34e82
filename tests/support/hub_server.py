"""A hub on this machine."""

import hashlib
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of <org>/<name>/resolve/<revision>/<file>, as huggingface.co answers them."""

    repositories: dict[str, Path]
    requested: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        self.requested.append(self.path)
        org, name, verb, _, *file = [*self.path.split("?")[0].strip("/").split("/"), *[""] * 4][:5]
        path = self.repositories.get(f"{org}/{name}", Path("/none")) / (file[0] or "none")
        if self.path == "/":
            self._send(200, {}, b"", body)
        elif self.path.startswith("/api/models/"):
            self._answer_api(body)
        elif verb == "resolve" and path.is_file():
            data = path.read_bytes()
            headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self._send(200, headers, data, body)
        else:
            known = f"{org}/{name}" in self.repositories
            code = "EntryNotFound" if known else "RepoNotFound"
            self._send(404, {"X-Error-Code": code, "X-Repo-Commit": COMMIT}, b"", body)

    def _answer_api(self, body):
        """Repository information, which transformers asks for beside the files."""
        org, name = self.path.split("?")[0].split("/")[3:5]
        directory = self.repositories.get(f"{org}/{name}")
        if directory is None or "/tree/" in self.path:
            code = "RepoNotFound" if directory is None else "EntryNotFound"
            self._send(404, {"X-Error-Code": code}, b"", body)
            return
        files = [{"rfilename": path.name} for path in directory.iterdir()]
        model = {"id": f"{org}/{name}", "sha": COMMIT, "siblings": files, "tags": []}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(model).encode(), body)

    def _send(self, status, headers, data, body):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *args):
        pass
