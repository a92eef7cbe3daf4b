"""A stand-in of the hub's API on this machine, for the real client: repositories in memory."""

import base64
from collections.abc import Callable
import contextlib
import hashlib
import http.server
import json
import re
import threading
from urllib.parse import urlsplit

TOKEN = "hf_" + "aSecretThatIsWrittenNowhere"


class Hub:
    """What it holds, what it was asked, and how it behaves."""

    def __init__(self):
        self.repos: dict[str, dict] = {}  # files by name, private, the messages of commits
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.asked: list[tuple[str, str]] = []
        self.sent: list[str] = []  # what was uploaded, by SHA-256
        self.breaks_after: int | None = None  # uploads that succeed
        self.refuses = False  # every write
        self.before_upload: Callable[[], None] = lambda: None
        self.one_by_one = threading.Lock()

    def answer(self, method: str, path: str, headers: dict, body: bytes, url: str):
        """Status and JSON."""
        self.asked.append((method, path))
        if put := re.fullmatch(r"/upload/(\w+)", path):
            self.before_upload()
            with self.one_by_one:  # the client sends several at a time
                if self.breaks_after is not None and len(self.sent) >= self.breaks_after:
                    return 403, {"error": "the line is cut"}
                assert hashlib.sha256(body).hexdigest() == put[1]
                self.large[put[1]] = body
                self.sent.append(put[1])
            return 200, {}
        if headers.get("authorization") != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid username or password."}
        if path == "/api/repos/create":
            return self._created(json.loads(body), url)
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        name = re.match(r"(?:/api/models)?/([^/]+/[^/.]+)", path)[1]
        if name not in self.repos:
            return 404, {"error": "Repository not found"}
        repo, rest = self.repos[name], path.partition(name)[2]
        if rest in ("", "/revision/main"):
            return 200, {"id": name, "private": repo["private"], "sha": "0" * 40, "siblings": []}
        if rest == "/tree/main":
            sizes = {path: len(content) for path, content in repo["files"].items()}
            return 200, [{"type": "file", "path": path, "size": size, "oid": "0" * 40}
                         for path, size in sizes.items()]  # fmt: skip
        if rest == "/preupload/main":
            mode = lambda one: (
                "lfs" if one["path"].endswith(("safetensors", "r.json")) else "regular"
            )
            given = json.loads(body)["files"]
            files = [
                {"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False,
                 "oid": _oid(repo["files"].get(f["path"]))}
                for f in given
            ]  # fmt: skip
            return 200, {"files": files}
        if rest == ".git/info/lfs/objects/batch":
            objects = []
            for one in json.loads(body)["objects"]:
                todo = {} if one["oid"] in self.large else {
                    "upload": {"href": f"{url}/upload/{one['oid']}", "header": {}}
                }  # fmt: skip
                objects.append(one | {"actions": todo} if todo else one)
            return 200, {"transfer": "basic", "objects": objects}
        if rest == "/commit/main":
            return self._committed(repo, body, url, name)
        raise AssertionError((method, path))

    def _created(self, asked, url):
        if self.refuses:
            return 403, {"error": "You don't have the rights to create a model under this name"}
        name = f"{asked['organization']}/{asked['name']}" if "organization" in asked else ""
        name = name or asked["name"]
        if name in self.repos:
            return 409, {"error": "You already created this repo", "url": f"{url}/{name}"}
        private = asked.get("private", False) or asked.get("visibility") == "private"
        made = {"private": private, "files": {}, "commits": []}
        self.repos[name] = made
        return 200, {"url": f"{url}/{name}", "name": name, "id": name}

    def _committed(self, repo, body, url, name):
        lines = [json.loads(line) for line in body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del repo["files"][value["path"]]
            elif line["key"] == "lfsFile":
                repo["files"][value["path"]] = self.large[value["oid"]]
            else:
                repo["commits"].append(value["summary"])
        return 200, {"commitUrl": f"{url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40}


def _oid(content: bytes | None) -> str | None:
    if content is None:
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def serving():
    """A hub, and its address."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def _answer(self):
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            path = urlsplit(self.path).path
            status, told = hub.answer(self.command, path, headers, body, url)
            content = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, url
    finally:
        server.shutdown()
        server.server_close()
