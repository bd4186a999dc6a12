"""A Hugging Face Hub in one file, in memory, on this machine: what huggingface_hub asks for when it pushes and loads.

`python hub_server.py` prints its port. Users are the tokens themselves, of which one that begins with "expired" is
none; GET /_log lists the requests of all clients. Large files go through git-LFS: those above PART_BYTES in parts, as
the Hub does with files above 5 GB. To all but their owner a repository named gated-... is gated, busy-... answers 429
and broken-... 503.
"""

import base64
import hashlib
import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_BYTES = 16 * 1024
PART_BYTES = 64 * 1024
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
# What the real Hub takes, as far as cards here use it.
PIPELINES = ("image-text-to-text", "text-generation")
LICENCES = ("apache-2.0", "mit", "llama2", "other", "cc-by-nc-4.0")
RELATIONS = ("finetune", "adapter", "merge", "quantized")
HUB_ID = r"[\w.-]+/[\w.-]+"

repos = {}  # id -> {"private": bool, "gated": bool, "branches": {name: sha}, "tags": {name: sha}}
commits = {}  # sha -> {path: bytes}
messages = {}  # sha -> message of the commit
large = {}  # sha256 -> bytes
parts = {}  # (sha256, number) -> bytes
log = []


class Refused(Exception):
    """An answer that is an error of the Hub: its status, its X-Error-Code and further headers."""

    def __init__(self, status, code, message, headers=None):
        super().__init__(message)
        self.status, self.code, self.headers = status, code, headers or {}


def git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_large(path, content_len):
    return content_len > LFS_BYTES or path.endswith((".safetensors", ".bin"))


def card_errors(content):
    """Return what the Hub would find wrong with a card's metadata."""
    found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
    fields = yaml.safe_load(found[1]) if found else None
    if not isinstance(fields, dict) or not content[found.end() :].strip():
        return ["no metadata, or no text"]
    ids = [("base_model", fields.get("base_model", [])), ("datasets", fields.get("datasets", []))]
    ids = [(key, [value] if isinstance(value, str) else value) for key, value in ids]
    wrong = [f"{key} {name}" for key, names in ids for name in names if not re.fullmatch(HUB_ID, name)]
    allowed = {"pipeline_tag": PIPELINES, "license": LICENCES, "base_model_relation": RELATIONS}
    wrong += [f"{key} {fields[key]}" for key, known in allowed.items() if key in fields and fields[key] not in known]
    wrong += [f"tag {tag}" for tag in fields.get("tags", []) if not isinstance(tag, str)]
    return wrong


def tree_of(repo, revision):
    """Return (sha, files) of a branch, a tag, a pull request or a commit."""
    sha = {**repo["tags"], **repo["branches"]}.get(revision, revision)
    if sha not in commits:
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return sha, commits[sha]


def add_commit(repo, branch, files, message="initial commit"):
    sha = hashlib.sha1(json.dumps([len(commits), sorted(files)]).encode()).hexdigest()
    commits[sha] = files
    repo["branches"][branch] = sha
    messages[sha] = message
    return sha


class Hub(BaseHTTPRequestHandler):
    """Route a request by method and path; every handler returns (status, headers, body)."""

    protocol_version = "HTTP/1.1"

    def user(self):
        user = self.headers.get("Authorization", "").removeprefix("Bearer ") or None
        if user is not None and user.startswith("expired"):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return user

    def repo(self, name):
        """Return a repository that this user may see."""
        found, user = repos.get(name), self.user()
        if found is None or (found["private"] and user != name.split("/")[0]):
            # Who may not see a repository does not learn that it exists.
            raise Refused(401 if user is None else 404, "RepoNotFound", "Repository not found")
        if name.split("/")[1].startswith("busy-") and user != name.split("/")[0]:
            raise Refused(429, "", "Too many requests", {"Retry-After": "1"})
        if name.split("/")[1].startswith("broken-") and user != name.split("/")[0]:
            raise Refused(503, "", "Service unavailable")
        return found

    def writable(self, name):
        """Return a repository that this user may write to; a pull request is for everybody who may see it."""
        asks_only = parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]
        if self.user() != name.split("/")[0] and not (asks_only and self.user()):
            raise Refused(403, "", f"{self.user()} may not write to {name}")
        return self.repo(name)

    def readable(self, name):
        if self.repo(name)["gated"] and self.user() != name.split("/")[0]:
            raise Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        return self.repo(name)

    def address(self, path):
        return f"http://{self.headers['Host']}{path}"

    # -------------------------------------------------------------- pushing

    def create(self, body):
        asked = json.loads(body)
        name = f"{asked.get('organization') or self.user()}/{asked['name']}"
        if self.user() is None:
            raise Refused(401, "", "Invalid username or password.")
        if name.split("/")[0] != self.user():
            raise Refused(
                403, "", f"You don't have the rights to create a model under the namespace {name.split('/')[0]}"
            )
        status = 409 if name in repos else 200
        if name not in repos:
            hidden = asked.get("private") or asked.get("visibility") == "private"
            gated = asked["name"].startswith("gated-")
            repos[name] = {"private": bool(hidden), "gated": gated, "branches": {}, "tags": {}}
            add_commit(repos[name], "main", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return status, {}, {"url": self.address(f"/{name}"), "name": name, "error": "exists"}

    def validate_yaml(self, body):
        errors = [{"message": wrong} for wrong in card_errors(json.loads(body)["content"])]
        return 400 if errors else 200, {}, {"errors": errors, "warnings": []}

    def preupload(self, body, repo, revision):
        _, files = tree_of(self.writable(repo), revision)
        answers = []
        for asked in json.loads(body)["files"]:
            mode = "lfs" if is_large(asked["path"], asked["size"]) else "regular"
            here = files.get(asked["path"])
            oid = git_oid(here) if here is not None and mode == "regular" else None
            answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": answers}

    def lfs_batch(self, body, repo):
        self.repo(repo)
        objects = []
        for asked in json.loads(body)["objects"]:
            oid, size = asked["oid"], asked["size"]
            upload = {"href": self.address(f"/_lfs/{oid}")}
            if size > PART_BYTES:
                count = -(-size // PART_BYTES)
                numbers = range(1, count + 1)
                upload["header"] = {f"{n:05d}": self.address(f"/_lfs/{oid}/{n}") for n in numbers}
                upload["header"]["chunk_size"] = str(PART_BYTES)
                upload["href"] = self.address(f"/_lfs/{oid}/complete")
            actions = {"upload": upload, "verify": {"href": self.address(f"/_lfs/{oid}/verify")}}
            objects.append(asked if oid in large else {**asked, "actions": actions})
        return 200, {}, {"transfer": "basic", "objects": objects}

    def lfs_put(self, body, oid, number=None):
        if number is not None:
            parts[oid, int(number)] = body
        elif hashlib.sha256(body).hexdigest() == oid:
            large[oid] = body
        else:
            raise Refused(400, "", "sha256 does not fit")
        return 200, {"ETag": hashlib.md5(body).hexdigest()}, b""

    def lfs_complete(self, body, oid):
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        return self.lfs_put(b"".join(parts[oid, number] for number in numbers), oid)

    def lfs_verify(self, body, oid):
        return (200 if oid in large else 404), {}, {}

    def commit(self, body, repo, revision):
        found = self.writable(repo)
        _, files = tree_of(found, revision)
        files, message = dict(files), ""
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = large[value["oid"]]
        answer = {"success": True}
        if parse_qs(urlsplit(self.path).query).get("create_pr") == ["1"]:
            number = 1 + sum(name.startswith("refs/pr/") for name in found["branches"])
            revision, answer["pullRequestUrl"] = f"refs/pr/{number}", self.address(f"/{repo}/discussions/{number}")
        sha = add_commit(found, revision, files, message)
        return 200, {}, {**answer, "commitUrl": self.address(f"/{repo}/commit/{sha}"), "commitOid": sha}

    def branch(self, body, repo, revision):
        found = self.writable(repo)
        if revision in found["branches"]:
            return 409, {}, {"error": "Reference already exists"}
        found["branches"][revision] = found["branches"]["main"]
        return 200, {}, {}

    def tag(self, body, repo, revision):
        found = self.writable(repo)
        found["tags"][json.loads(body)["tag"]], _ = tree_of(found, revision)
        return 200, {}, {}

    # -------------------------------------------------------------- loading

    def info(self, body, repo, revision="main"):
        sha, files = tree_of(self.repo(repo), revision)
        names = [{"rfilename": path} for path in sorted(files)]
        return 200, {}, {"id": repo, "sha": sha, "private": self.repo(repo)["private"], "tags": [], "siblings": names}

    def refs(self, body, repo):
        found = self.repo(repo)
        kinds = {"branches": found["branches"], "tags": found["tags"]}
        listed = {
            kind: [{"name": name, "ref": name, "targetCommit": sha} for name, sha in named.items() if "/" not in name]
            for kind, named in kinds.items()
        }
        return 200, {}, {**listed, "converts": []}

    def history(self, body, repo, revision):
        sha, _ = tree_of(self.repo(repo), revision)
        reported = {
            "id": sha,
            "title": messages[sha],
            "message": "",
            "authors": [],
            "date": "2026-01-01T00:00:00.000Z",
        }
        return 200, {}, [reported]

    def tree(self, body, repo, revision, path=""):
        _, files = tree_of(self.readable(repo), revision)
        directory = f"{path}/" if path else ""
        inside = {name: content for name, content in files.items() if name.startswith(directory)}
        if directory and not inside:
            raise Refused(404, "EntryNotFound", f"no directory {path}")
        entries = [{"type": "file", "path": n, "size": len(c), "oid": git_oid(c)} for n, c in inside.items()]
        return 200, {}, entries

    def resolve(self, body, repo, revision, path):
        sha, files = tree_of(self.readable(repo), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", f"no file {path}")
        content = files[path]
        etag = hashlib.sha256(content).hexdigest() if is_large(path, len(content)) else git_oid(content)
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": sha, "X-Linked-Size": str(len(content))}, content

    def show_log(self, body):
        return 200, {}, log

    routes = (
        ("POST", r"/api/repos/create", create),
        ("POST", r"/api/validate-yaml", validate_yaml),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>.+)", preupload),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch),
        ("POST", r"/_lfs/(?P<oid>\w+)/verify", lfs_verify),
        ("POST", r"/_lfs/(?P<oid>\w+)/complete", lfs_complete),
        ("PUT", r"/_lfs/(?P<oid>\w+)(/(?P<number>\d+))?", lfs_put),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>.+)", commit),
        ("POST", rf"/api/models/{REPO}/branch/(?P<revision>.+)", branch),
        ("POST", rf"/api/models/{REPO}/tag/{REVISION}", tag),
        ("GET", rf"/api/models/{REPO}", info),
        ("GET", rf"/api/models/{REPO}/revision/(?P<revision>.+)", info),
        ("GET", rf"/api/models/{REPO}/refs", refs),
        ("GET", rf"/api/models/{REPO}/commits/{REVISION}", history),
        ("GET", rf"/api/models/{REPO}/tree/{REVISION}(/(?P<path>.+))?", tree),
        ("GET", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", resolve),
        ("GET", r"/_log", show_log),
    )

    # -------------------------------------------------------------- plumbing

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def answer(self):
        url = urlsplit(self.path)
        path, method = unquote(url.path), "GET" if self.command == "HEAD" else self.command
        body = self.body()
        log.append([self.command, path, parse_qs(url.query)])
        for wanted, pattern, handler in self.routes:
            found = re.fullmatch(pattern, path) if wanted == method else None
            if found:
                named = {key: value for key, value in found.groupdict().items() if value is not None}
                return handler(self, body, **named)
        if "/resolve/" in path:
            # Of the oldest repositories, which have no owner, this Hub has none.
            raise Refused(401 if self.user() is None else 404, "RepoNotFound", "Repository not found")
        raise Refused(404, "", f"this hub knows no {method} {path}")

    def handle_any(self):
        try:
            status, headers, body = self.answer()
        except Refused as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": str(error), **error.headers}
            status, body = error.status, {"error": str(error)}
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers = {"Content-Type": "application/json", **headers}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def log_message(self, *args):
        """Log nothing here: GET /_log returns the requests."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    print(server.server_address[1], flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)
