"""A Hub on loopback that speaks as much of the protocol as `huggingface_hub` needs, with large files on a second port.

Nothing here is meant to be fast or safe; it exists to let the real client push to and pull from something.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

SIGNATURE = "signature=of-this-url"
_CHUNK = 1 << 20

CARD = """---
base_model: org/base
license: apache-2.0
tags: [lora, peft, lora-da, lora-init]
lora_da: {rank: 4}
---
A card.
"""


@dataclass
class File:
    """A file in a commit: its bytes, or for LFS the hash of a blob in the storage."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self):
        """The id that the client compares with its own: git's blob hash, or the SHA-256."""
        return self.sha256 or hashlib.sha1(b"blob %d\0" % self.size + self.content).hexdigest()


@dataclass
class Repo:
    """Commits and what points to them. Every repo starts with a commit, as on the Hub."""

    repo_id: str
    private: bool
    gated: bool = False
    accepted: set[str] = field(default_factory=set)
    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pull_requests: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.branches["main"] = self.add_commit({".gitattributes": File(size=len(attributes), content=attributes)})

    @property
    def owner(self):
        return self.repo_id.split("/")[0]

    def add_commit(self, files):
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def resolve(self, revision):
        for refs in (self.branches, self.tags, self.pull_requests):
            if revision in refs:
                return refs[revision]
        return next((sha for sha in self.commits if len(revision) >= 7 and sha.startswith(revision)), None)


@dataclass(frozen=True)
class Seen:
    """One request that a server saw."""

    server: str
    method: str
    path: str
    authorization: str | None
    range: str | None


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status, code=None, message="", **headers):
        self.status, self.message = status, message
        self.headers = {**({"X-Error-Code": code} if code else {}), **headers}


class LocalHub:
    """The state, the two servers, and the faults that tests ask for.

    Attributes:
        tokens: User by token.
        repos: By id.
        log: Every request.
        uploads_left: How many more uploads the storage takes before it hangs up on the rest; None: all.
        cuts_left: How many more blob downloads break off half-way.
        multipart_above: Files above this size are sent in parts.
        default_public: Repos are made public whatever was asked for, as an organisation may have it.
        before_commit: Called when a commit arrives, before anything is looked at.
        after_commit: Called with the repo once a commit is in it, before that is answered.
        after_info: Called once it is known what a revision is, before that is answered.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos = {}
        self.log = []
        self.lock = threading.RLock()
        self.uploads_left = None
        self.cuts_left = 0
        self.multipart_above = 1 << 40
        self.default_public = False
        self.before_commit = None
        self.after_commit = None
        self.after_info = None
        self.closed = False
        self._servers = {name: _serve(self, handler) for name, handler in (("hub", Front), ("storage", Storage))}

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self._servers['hub'].server_port}"

    @property
    def storage(self):
        # another name for the same machine, so that the client takes it for another host
        return f"http://localhost:{self._servers['storage'].server_port}"

    def blob(self, oid):
        return self.folder / oid

    def seen(self, *, server=None, method=None, contains=""):
        found = (s for s in self.log if contains in s.path)
        return [s for s in found if server in (None, s.server) and method in (None, s.method)]

    def close(self):
        self.closed = True  # connections that a client keeps open would be served on
        for server in self._servers.values():
            server.shutdown()
            server.server_close()


def _serve(hub, handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(handler.__name__, (handler,), {"hub": hub}))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


class Handler(BaseHTTPRequestHandler):
    """What both servers share: reading a body, answering, keeping a log."""

    hub: LocalHub
    name = ""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_one(self):
        headers = self.headers
        self.hub.log.append(Seen(self.name, self.command, self.path, headers["Authorization"], headers["Range"]))
        self.has_read = False
        if self.hub.closed:
            return self.hang_up()
        try:
            self.answer()
        except Refusal as refusal:
            self.reply(refusal.status, {"error": refusal.message}, **refusal.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_one

    def chunks(self):
        self.has_read = True
        if self.headers["Transfer-Encoding"] == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers["Content-Length"] or 0)
        while left:
            chunk = self.rfile.read(min(left, _CHUNK))
            left -= len(chunk)
            yield chunk

    def body(self):
        return b"".join(self.chunks())

    def reply(self, status=200, values=None, *, data=None, **headers):
        if not self.has_read:
            self.body()
        data = json.dumps(values or {}).encode() if data is None else data
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def hang_up(self):
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)


class Storage(Handler):
    """Blobs by SHA-256, behind links that need no token."""

    name = "storage"

    def answer(self):
        path, _, query = self.path.partition("?")
        if SIGNATURE not in query:
            raise Refusal(403)
        target = self.hub.blob(path.strip("/"))
        if self.command == "PUT":
            self.put(target)
        else:
            self.get(target)

    def put(self, target):
        with self.hub.lock:
            if self.hub.uploads_left == 0:
                return self.hang_up()
            if self.hub.uploads_left is not None:
                self.hub.uploads_left -= 1
        digest = hashlib.sha256()
        partial = target.with_name(f"{target.name}.{threading.get_ident()}")
        with partial.open("wb") as file:
            for chunk in self.chunks():
                digest.update(chunk)
                file.write(chunk)
        partial.rename(target)
        return self.reply(ETag=f'"{digest.hexdigest()}"')

    def get(self, source):
        size = source.stat().st_size
        first = int(re.match(r"bytes=(\d+)-", self.headers["Range"] or "bytes=0-")[1])
        with self.hub.lock:
            cut = self.command == "GET" and self.hub.cuts_left > 0
            self.hub.cuts_left -= cut
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(size - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{size - 1}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        left = (size - first) // 2 if cut else size - first
        with source.open("rb") as file:
            file.seek(first)
            while left:
                chunk = file.read(min(left, _CHUNK))
                left -= len(chunk)
                self.wfile.write(chunk)
        if cut:
            self.hang_up()


class Front(Handler):
    """The Hub itself."""

    name = "hub"

    def answer(self):
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        self.user = self.hub.tokens.get((self.headers["Authorization"] or "").removeprefix("Bearer "))
        for pattern, action in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {address.path}")
            if match:
                if action is Front.commit and self.hub.before_commit is not None:
                    self.hub.before_commit()
                with self.hub.lock:
                    return action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
        raise Refusal(404, message=f"{self.command} {self.path} is not served")

    # who may do what

    def repo(self, repo_id, *, write=False):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != repo.owner:
            raise Refusal(403 if self.user else 401, message="not allowed")
        return repo

    def commit_of(self, repo, revision):
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit

    # repos

    def whoami(self):
        if not self.user:
            raise Refusal(401)
        self.reply(values={"name": self.user, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        asked = json.loads(self.body())
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.reply(409, url)
        if self.user is None or repo_id.split("/")[0] != self.user:
            raise Refusal(403 if self.user else 401, message="not allowed")
        private = (asked.get("private") or asked.get("visibility") == "private") and not self.hub.default_public
        self.hub.repos[repo_id] = Repo(repo_id, private=bool(private))
        return self.reply(values=url)

    def delete(self):
        asked = json.loads(self.body())
        repo = self.repo(f"{asked.get('organization') or self.user}/{asked['name']}", write=True)
        del self.hub.repos[repo.repo_id]
        self.reply()

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        values = describe(repo, self.commit_of(repo, revision))
        if self.hub.after_info is not None:
            self.hub.after_info()
        self.reply(values=values)

    def list(self):
        wanted, author = set(self.query.get("filter", [])), self.query.get("author", [None])[0]
        visible = [r for r in self.hub.repos.values() if not r.private or r.owner == self.user]
        found = [describe(r, r.branches["main"]) for r in visible if author in (None, r.owner)]
        found = [entry for entry in found if wanted <= set(entry["tags"])]
        limit = int(self.query.get("limit", ["1000"])[0])
        self.reply(data=json.dumps(found[:limit]).encode())

    def refs(self, repo_id):
        repo = self.repo(repo_id)

        def entries(refs, prefix):
            return [{"name": n, "ref": f"{prefix}{n}", "targetCommit": sha} for n, sha in refs.items()]

        self.reply(
            values={
                "branches": entries(repo.branches, "refs/heads/"),
                "tags": entries(repo.tags, "refs/tags/"),
                "converts": [],
                "pullRequests": entries(repo.pull_requests, ""),
            }
        )

    def tag(self, repo_id, revision):
        repo, name = self.repo(repo_id, write=True), json.loads(self.body())["tag"]
        if name in repo.tags:
            raise Refusal(409, message="Tag reference exists already")
        repo.tags[name] = self.commit_of(repo, revision)
        self.reply()

    def untag(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        if repo.tags.pop(revision, None) is None:
            raise Refusal(404, "RevisionNotFound")
        self.reply()

    def branch(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        start = json.loads(self.body() or b"{}").get("startingPoint", "main")
        repo.branches[revision] = self.commit_of(repo, start)
        self.reply()

    # committing

    def validate(self):
        try:
            card_data(json.loads(self.body())["content"].encode())
        except yaml.YAMLError as error:
            return self.reply(400, {"errors": [{"message": str(error)}], "warnings": []})
        return self.reply(values={"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        files = self.repo(repo_id).commits[self.commit_of(self.repo(repo_id), revision)]
        answers = [
            {
                "path": asked["path"],
                "uploadMode": "lfs" if asked["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": files[asked["path"]].oid if asked["path"] in files else None,
            }
            for asked in json.loads(self.body())["files"]
        ]
        self.reply(values={"files": answers})

    def batch(self, repo_id):
        self.repo(repo_id)
        self.reply(values={"objects": [self.upload_of(asked) for asked in json.loads(self.body())["objects"]]})

    def upload_of(self, asked):
        oid, size = asked["oid"], asked["size"]
        if self.hub.blob(oid).exists():
            return {"oid": oid, "size": size}
        upload = {"href": f"{self.hub.storage}/{oid}?{SIGNATURE}"}
        if size > self.hub.multipart_above:
            chunk = self.hub.multipart_above
            parts = range(1, -(-size // chunk) + 1)
            links = {str(part): f"{self.hub.storage}/{oid}.part{part}?{SIGNATURE}" for part in parts}
            upload = {"href": f"{self.hub.endpoint}/complete/{oid}", "header": {"chunk_size": str(chunk), **links}}
        verify = {"href": f"{self.hub.endpoint}/verify/{oid}"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def complete(self, oid):
        with self.hub.blob(oid).open("wb") as whole:
            for part in json.loads(self.body())["parts"]:
                source = self.hub.blob(f"{oid}.part{part['partNumber']}")
                whole.write(source.read_bytes())
                source.unlink()
        self.reply()

    def verify(self, oid):
        if file_sha256(self.hub.blob(oid)) != oid:
            self.hub.blob(oid).unlink()
            raise Refusal(400, message="the blob is another one")
        self.reply()

    def commit(self, repo_id, revision):
        lines = [json.loads(line) for line in self.body().splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        is_pr = "create_pr" in self.query
        repo = self.repo(repo_id, write=not is_pr)
        if self.user is None:
            raise Refusal(401)
        parent = header.get("parentCommit") or repo.branches[revision]
        if not is_pr and not repo.branches[revision].startswith(parent):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[self.commit_of(repo, parent)])
        for line in lines:
            self.apply(line["key"], line["value"], files)
        sha = repo.add_commit(files)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}
        if is_pr:
            number = len(repo.pull_requests) + 1
            repo.pull_requests[f"refs/pr/{number}"] = sha
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        else:
            repo.branches[revision] = sha
        if self.hub.after_commit is not None:
            self.hub.after_commit(repo)
        self.reply(values=answer)

    def apply(self, key, value, files):
        if key == "file":
            content = base64.b64decode(value["content"])
            files[value["path"]] = File(size=len(content), content=content)
        elif key == "lfsFile":
            blob = self.hub.blob(value["oid"])
            if not blob.exists():
                raise Refusal(400, message="an LFS object is missing")
            files[value["path"]] = File(size=blob.stat().st_size, sha256=value["oid"])
        elif key == "deletedFile":
            del files[value["path"]]

    # downloading

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id)
        commit = self.commit_of(repo, revision)
        if repo.gated and self.user not in repo.accepted | {repo.owner}:
            raise Refusal(403 if self.user else 401, "GatedRepo", "Access is restricted")
        file = repo.commits[commit].get(path)
        if file is None:
            raise Refusal(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit})
        headers = {"X-Repo-Commit": commit, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            return self.reply(data=file.content, **headers)
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
        location = f"{self.hub.storage}/{file.sha256}?{SIGNATURE}"
        return self.reply(302, data=b"", **headers, **linked, Location=location)


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Front.whoami),
    (r"POST /api/repos/create", Front.create),
    (r"DELETE /api/repos/delete", Front.delete),
    (r"POST /api/validate-yaml", Front.validate),
    (r"GET /api/models", Front.list),
    (rf"GET /api/models/{REPO}", Front.info),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", Front.info),
    (rf"GET /api/models/{REPO}/refs", Front.refs),
    (rf"POST /api/models/{REPO}/tag/{REVISION}", Front.tag),
    (rf"DELETE /api/models/{REPO}/tag/{REVISION}", Front.untag),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", Front.branch),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Front.preupload),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Front.commit),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Front.batch),
    (r"POST /complete/(?P<oid>\w+)", Front.complete),
    (r"POST /verify/(?P<oid>\w+)", Front.verify),
    (rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Front.resolve),
]


def describe(repo, commit):
    """Return what the Hub says of a repo at a commit."""
    files = repo.commits[commit]
    card = card_data(files["README.md"].content) if "README.md" in files else {}
    bases = card.get("base_model") or []
    bases = [bases] if isinstance(bases, str) else bases
    return {
        "id": repo.repo_id,
        "sha": commit,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "cardData": card,
        "tags": [*(card.get("tags") or []), *(f"base_model:adapter:{base}" for base in bases)],
        "downloads": 0,
        "siblings": [
            {
                "rfilename": path,
                "size": file.size,
                "blobId": file.oid[:40],
                **({"lfs": {"sha256": file.sha256, "size": file.size, "pointerSize": 130}} if file.sha256 else {}),
            }
            for path, file in files.items()
        ],
    }


def card_data(content):
    """Return the metadata at the top of a model card."""
    match = re.match(r"---\n(.*?)\n---\n", content.decode(), re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def file_sha256(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(file)


def _sha256(file):
    digest = hashlib.sha256()
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
