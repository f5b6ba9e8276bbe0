"""A hub on this machine: repositories in memory, behind the endpoints that huggingface_hub calls."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class FakeHub:
    """tokens: token -> the owners that it may write for. repos: name -> its files. private, gated: names."""

    def __init__(self) -> None:
        self.tokens: dict[str, set[str]] = {"writer": {"ada"}, "reader": set()}
        self.repos: dict[str, Files] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.commits: list[dict[str, Any]] = []
        self.asked: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sha(self, repo: str) -> str:
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


class _Said(Exception):
    def __init__(self, status: int, code: str = "", text: str = "no"):
        self.status, self.code, self.text = status, code, text


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        do_GET = do_POST = do_HEAD

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.asked.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            try:
                head, data = self.route(path.strip("/").split("/"), body)
                status = 200
            except _Said as said:
                status, data = said.status, json.dumps({"error": said.text}).encode()
                head = {"X-Error-Code": said.code, "X-Error-Message": said.text}
            self.send_response(status)
            for name, value in {**head, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        # -- who asks -----------------------------------------------------------------------------------------
        def owners(self) -> set[str] | None:
            token = self.headers.get("authorization", "").removeprefix("Bearer ")
            return hub.tokens.get(token)

        def writes(self, repo: str) -> None:
            owners = self.owners()
            if owners is None:
                raise _Said(401, text="Invalid username or password.")
            if repo.partition("/")[0] not in owners:
                raise _Said(403, text=f"You don't have the rights to write to {repo}")

        def sees(self, repo: str) -> Files:
            hidden = repo in hub.private and repo.partition("/")[0] not in (self.owners() or set())
            if repo not in hub.repos or hidden:
                raise _Said(404 if self.owners() else 401, "RepoNotFound", "Repository not found")
            if repo in hub.gated:
                raise _Said(403, "GatedRepo", "Access to this model is restricted")
            return hub.repos[repo]

        # -- what is asked ------------------------------------------------------------------------------------
        def route(self, parts: list[str], body: bytes) -> tuple[dict[str, str], bytes]:
            if parts == ["api", "repos", "create"]:
                return self.json(self.create(json.loads(body)))
            if parts == ["api", "validate-yaml"]:
                return self.json({"errors": [], "warnings": []})
            if parts[:2] == ["api", "models"]:
                return self.json(self.model("/".join(parts[2:4]), parts[4:], body))
            if parts[2:3] == ["resolve"]:
                return self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            raise _Said(404)

        @staticmethod
        def json(held: Any) -> tuple[dict[str, str], bytes]:
            return {"content-type": "application/json"}, json.dumps(held).encode()

        def create(self, asked: dict[str, Any]) -> dict[str, Any]:
            repo = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.writes(repo)
            if repo in hub.repos:
                raise _Said(409, text="You already created this model repo")
            hub.repos[repo] = {}
            if asked.get("private"):
                hub.private.add(repo)
            return {"url": f"{hub.url}/{repo}", "name": repo}

        def model(self, repo: str, more: list[str], body: bytes) -> Any:
            files = self.sees(repo)
            if more[:1] == ["preupload"]:
                self.writes(repo)
                wanted = json.loads(body)["files"]
                return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
            if more[:1] == ["commit"]:
                self.writes(repo)
                return self.commit(repo, [json.loads(line) for line in body.splitlines()])
            self.revision(repo, more[1] if len(more) > 1 else "main")
            if more[:1] == ["tree"]:
                return [{"type": "file", "path": n, "size": len(d), "oid": _oid(d)} for n, d in files.items()]
            siblings = [{"rfilename": n} for n in files]
            return {
                "id": repo,
                "modelId": repo,
                "sha": hub.sha(repo),
                "siblings": siblings,
                "private": False,
                "tags": [],
            }

        def commit(self, repo: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
            for line in lines:
                if line["key"] == "file":
                    value = line["value"]
                    hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                else:
                    hub.commits.append(line["value"])
            oid = hub.sha(repo)
            return {"commitUrl": f"{hub.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}

        def revision(self, repo: str, name: str) -> None:
            if name not in ("main", hub.sha(repo)):
                raise _Said(404, "RevisionNotFound", f"Invalid rev id: {name}")

        def resolve(self, repo: str, revision: str, name: str) -> tuple[dict[str, str], bytes]:
            files = self.sees(repo)
            self.revision(repo, revision)
            if name not in files:
                raise _Said(404, "EntryNotFound", "Entry not found")
            return {"etag": f'"{_oid(files[name])}"', "X-Repo-Commit": hub.sha(repo)}, files[name]

    return Handler


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
