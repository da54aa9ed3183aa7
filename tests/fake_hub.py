"""A Hub for tests: the protocol that huggingface_hub speaks without Xet, in memory, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_a_secret_that_must_not_leak"


class FakeHub:
    """Repositories and requests of a server that runs in a thread.

    Attributes:
        url: address of the server.
        repos: repositories by id: ``private``, ``branches`` (name -> path -> bytes), ``commits``.
        requests: "METHOD path" of each request, in order.
        faults: [pattern, action, how often]; an action is a status, "drop", "hang", or (status, headers).
    """

    def __init__(self, port=0):
        self.repos, self.objects, self.requests, self.faults = {}, {}, [], []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def fail(self, pattern, action, times=10**6):
        self.faults.append([pattern, action, times])

    def fault(self, request):
        for fault in self.faults:
            if fault[2] > 0 and re.search(fault[0], request):
                fault[2] -= 1
                return fault[1]
        return None

    def create(self, repo_id, private=False):
        self.repos[repo_id] = {"private": private, "branches": {"main": {}}, "commits": 0}

    def files(self, repo_id, branch="main"):
        return self.repos[repo_id]["branches"][branch]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_request(self):
        path = unquote(urlparse(self.path).path)
        path = re.sub(r"^/spaces/", "/space.", path)  # a Space is stored as a repository of this name
        path = re.sub(r"^/api/spaces/", "/api/models/space.", path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.read_chunks()
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        action = self.hub.fault(request)
        if action == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if action == "hang":
            time.sleep(30)
            self.close_connection = True
            return
        if action is not None:
            status, headers = action if isinstance(action, tuple) else (action, {})
            self.answer(status, {"error": f"injected {status}"}, **headers)
            return
        public = path.startswith("/lfs/") or "/resolve/" in path or self.command in ("GET", "HEAD")
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not authorized and (not public or "whoami" in path or "auth-check" in path):
            self.answer(401, {"error": "Invalid username or password."})
            return
        for pattern, method in ROUTES:
            match = re.fullmatch(pattern, request)
            if match:
                getattr(self, method)(body, *match.groups())
                return
        self.answer(404, {"error": f"no route for {request}"})

    do_GET = do_POST = do_PUT = do_HEAD = handle_request

    def read_chunks(self):
        content = b""
        while size := int(self.rfile.readline().strip() or b"0", 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def repo(self, repo_id):
        if repo_id not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return self.hub.repos[repo_id]

    def whoami(self, body):
        self.answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})

    def create(self, body):
        wish = json.loads(body)
        repo_id = f"{wish.get('organization') or 'me'}/{wish['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if wish.get("type") == "space":
            url, repo_id = f"{self.hub.url}/spaces/{repo_id}", f"space.{repo_id}"
        status = 409 if repo_id in self.hub.repos else 200
        if repo_id.startswith("others/"):
            self.answer(403, {"error": "You don't have the rights to create a model under the namespace others"})
            return
        if status == 200:
            self.hub.create(repo_id, private=wish.get("visibility") == "private" or bool(wish.get("private")))
        self.answer(status, {"url": url, "name": repo_id})

    def auth_check(self, body, repo_id):
        if self.repo(repo_id):
            self.answer(200, {})

    def branch(self, body, repo_id, branch):
        repo = self.repo(repo_id)
        if repo:
            known = branch in repo["branches"]
            repo["branches"].setdefault(branch, dict(repo["branches"]["main"]))
            self.answer(409 if known else 200, {})

    def info(self, body, repo_id, revision=None):
        repo = self.repo(repo_id)
        if not repo:
            return
        branch = revision if revision in repo["branches"] else "main"
        files = [{"rfilename": path} for path in repo["branches"][branch]]
        facts = {"id": repo_id, "modelId": repo_id, "private": repo["private"], "sha": f"{repo['commits']:040x}"}
        self.answer(200, {**facts, "siblings": files, "tags": [], "downloads": 0, "likes": 0})

    def validate(self, body):
        text = json.loads(body)["content"]
        valid = text.startswith("---\n") and "\n---" in text
        self.answer(200 if valid else 400, {"errors": [] if valid else [{"message": "no metadata"}], "warnings": []})

    def preupload(self, body, repo_id, revision):
        repo, answers = self.repo(repo_id), []
        if not repo:
            return
        for file in json.loads(body)["files"]:
            large = file["path"].endswith((".safetensors", ".png")) or "tfevents" in file["path"]
            present = repo["branches"][revision].get(file["path"])
            entry = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if present is not None:
                git = hashlib.sha1(b"blob %d\0" % len(present) + present).hexdigest()
                entry["oid"] = hashlib.sha256(present).hexdigest() if large else git
            answers.append(entry)
        self.answer(200, {"files": answers})

    def batch(self, body, repo_id):
        objects = []
        for entry in json.loads(body)["objects"]:
            if entry["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{entry['oid']}"
                entry = {**entry, "actions": {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/verify"}}}
            objects.append(entry)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "wrong hash"})
            return
        self.hub.objects[oid] = body
        self.answer(200)

    def verify(self, body):
        self.answer(200 if json.loads(body)["oid"] in self.hub.objects else 404, {})

    def commit(self, body, repo_id, revision):
        repo = self.repo(repo_id)
        if not repo:
            return
        files = dict(repo["branches"][revision])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
        repo["branches"][revision] = files
        repo["commits"] += 1
        oid = f"{repo['commits']:040x}"
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}", "commitOid": oid})

    def tree(self, body, repo_id, revision):
        repo = self.repo(repo_id)
        if repo:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for path, content in repo["branches"]["main"].items()
            ]
            self.answer(200, entries)

    def resolve(self, body, method, repo_id, revision, path):
        repo = self.repo(repo_id)
        if not repo:
            return
        content = repo["branches"]["main"].get(path)
        if content is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        tag = f'"{hashlib.sha256(content).hexdigest()}"'
        self.answer(200, content, ETag=tag, X_Repo_Commit=f"{repo['commits']:040x}")


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (rf"GET /api/models/{NAME}/auth-check/write", "auth_check"),
    (rf"POST /api/models/{NAME}/branch/(.+)", "branch"),
    (rf"GET /api/models/{NAME}", "info"),
    (rf"GET /api/models/{NAME}/revision/(.+)", "info"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{NAME}/preupload/(.+)", "preupload"),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (r"POST /verify", "verify"),
    (rf"POST /api/models/{NAME}/commit/(.+)", "commit"),
    (rf"GET /api/models/{NAME}/tree/(.+)", "tree"),
    (rf"(GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)", "resolve"),
]
