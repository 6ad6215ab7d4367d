"""A server on this machine that speaks the part of the Hub's protocol that an upload uses.

It keeps what it is given, and checks it as the Hub does: tokens, names, hashes and sizes, the
metadata of a model card.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

import yaml

TOKENS = {"hf_writer": "write", "hf_reader": "read"}
USER = "someone"
INVALID = "Invalid credentials in Authorization header"


class Hub:
    """What the server holds: repositories by name, and large files by hash.

    A repository is a dictionary with ``private`` and, by branch, a list of commits; a commit has a message and the
    content of its files.
    """

    def __init__(self):
        self.repositories, self.large, self.requests = {}, {}, []
        self.fails = {}  # ending of a path -> status of the answer

    def files(self, repo, branch="main"):
        """The files of a branch, as all of its commits leave them."""
        merged = {}
        for commit in self.repositories[repo]["branches"][branch]:
            merged |= commit["files"]
        return merged


@contextlib.contextmanager
def serve():
    """A hub and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status, message, code="", **more):
        self.status, self.message, self.code, self.more = status, message, code, more


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._answer("GET")

    def do_POST(self):
        self._answer("POST")

    def do_PUT(self):
        self._answer("PUT")

    def _answer(self, method):
        path = urllib.parse.urlsplit(self.path).path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self._read_chunks()
        self.hub.requests.append((method, path))
        try:
            for ending, status in self.hub.fails.items():
                if path.endswith(ending):
                    raise _Refused(status, "asked to fail")
            self._send(200, self._route(method, path, body))
        except _Refused as refused:
            value = {"error": refused.message} | refused.more
            self._send(refused.status, value, refused.code, refused.message)

    def _read_chunks(self):
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, status, value, code="", message=""):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        self.wfile.write(content)

    def _route(self, method, path, body):
        for verb, pattern, function in _ROUTES:
            match = re.fullmatch(pattern, path)
            if verb == method and match:
                return function(self, body, **match.groupdict())
        raise _Refused(404, f"no such endpoint: {method} {path}")

    def _role(self):
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in TOKENS:
            raise _Refused(401, INVALID)
        return TOKENS[token]

    def _check_write(self, repo):
        if self._role() != "write" or repo.partition("/")[0] != USER:
            raise _Refused(403, "You don't have the rights to create a model under this namespace")

    def _find(self, repo):
        if repo not in self.hub.repositories:
            raise _Refused(404, "Repository not found", "RepoNotFound")
        return self.hub.repositories[repo]

    def about(self, body, repo):
        self._role()
        found = self._find(repo)
        last = found["branches"]["main"]
        return {"id": repo, "private": found["private"], "sha": _sha(last), "siblings": []}

    def create(self, body):
        asked = json.loads(body)
        repo = f"{asked['organization']}/{asked['name']}"
        self._check_write(repo)
        if repo in self.hub.repositories:
            raise _Refused(409, "You already created this model repo")
        is_private = asked.get("private", False) or asked.get("visibility") == "private"
        self.hub.repositories[repo] = {"private": is_private, "branches": {"main": []}}
        return {"url": f"http://{self.headers['Host']}/{repo}"}

    def branch(self, body, repo, branch):
        self._check_write(repo)
        branches = self._find(repo)["branches"]
        if branch in branches:
            raise _Refused(409, "Reference already exists")
        branches[branch] = list(branches["main"])
        return {}

    def validate(self, body):
        """As the Hub: the head of a model card is YAML, and some of its keys have a form."""
        content = json.loads(body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        about = yaml.safe_load(match[1]) if match else {}
        errors = [
            {"message": f'"{key}" must be {wanted.__name__}'}
            for key, wanted in (
                ("base_model", str),
                ("datasets", list),
                ("tags", list),
                ("license", str),
            )
            if key in about and not isinstance(about[key], wanted)
        ]
        if errors:
            raise _Refused(400, "Invalid metadata", errors=errors, warnings=[])
        return {"errors": [], "warnings": []}

    def preupload(self, body, repo, branch):
        self._check_write(repo)
        if branch not in self._find(repo)["branches"]:
            raise _Refused(404, "Invalid rev id", "RevisionNotFound")
        large = lambda file: file["path"].endswith(".safetensors")
        return {"files": [
            {"path": f["path"], "uploadMode": "lfs" if large(f) else "regular", "shouldIgnore": False, "oid": None}
            for f in json.loads(body)["files"]
        ]}  # fmt: skip

    def batch(self, body, repo):
        self._check_write(repo)
        asked = json.loads(body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256"
        host = f"http://{self.headers['Host']}"
        return {"transfer": "basic", "objects": [
            x if x["oid"] in self.hub.large else
            x | {"actions": {"upload": {"href": f"{host}/large/{x['oid']}"}, "verify": {"href": f"{host}/verify"}}}
            for x in asked["objects"]
        ]}  # fmt: skip

    def upload(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content has another hash")
        self.hub.large[oid] = body
        return {}

    def verify(self, body):
        asked = json.loads(body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(400, "the content has another size")
        return {}

    def commit(self, body, repo, branch):
        self._check_write(repo)
        commits, files, message = self._find(repo)["branches"][branch], {}, ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                assert value["algo"] == "sha256"
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                raise _Refused(400, f"unknown operation {line['key']}")
        commits.append({"message": message, "files": files})
        url = f"http://{self.headers['Host']}/{repo}/commit/{_sha(commits)}"
        return {"success": True, "commitOid": _sha(commits), "commitUrl": url}


def _sha(commits):
    return hashlib.sha1(str(len(commits)).encode()).hexdigest()


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = (
    ("POST", "/api/repos/create", _Handler.create),
    ("GET", f"/api/models/{_REPO}", _Handler.about),
    ("POST", f"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _Handler.branch),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_REPO}/preupload/(?P<branch>[^/]+)", _Handler.preupload),
    ("POST", f"/{_REPO}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    ("POST", "/verify", _Handler.verify),
    ("POST", f"/api/models/{_REPO}/commit/(?P<branch>[^/]+)", _Handler.commit),
)
