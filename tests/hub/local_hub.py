"""A small Hub on loopback: as much of the protocol as the real client needs. Files are kept whole, without LFS."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

STATISTICS_FILE = "lora_da_statistics-00001-of-00001.safetensors"


@dataclass
class Repo:
    """Commits, each a mapping of files, and what points to them. Every repo starts with a commit, as on the Hub."""

    repo_id: str
    private: bool
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"})

    @property
    def owner(self):
        return self.repo_id.split("/")[0]

    @property
    def files(self):
        return self.commits[self.refs["main"]]

    def commit(self, files, ref="main"):
        sha = hashlib.sha1(f"{self.repo_id} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        return sha

    def resolve(self, revision):
        return self.refs.get(revision) or (revision if revision in self.commits else None)

    def describe(self, commit):
        card = card_data(self.commits[commit].get("README.md", b"").decode())
        base = card.get("base_model")
        return {
            "id": self.repo_id.removeprefix("datasets/"),
            "sha": commit,
            "private": self.private,
            "gated": "manual" if self.gated else False,
            "cardData": card,
            "tags": [*(card.get("tags") or []), *([f"base_model:adapter:{base}"] if isinstance(base, str) else [])],
            "downloads": 0,
            "siblings": [{"rfilename": name} for name in self.commits[commit]],
        }


def card_data(card):
    """Return the metadata at the top of a model card."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else {}


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Refusal(Exception):
    """An answer other than success."""

    def __init__(self, status, code=None, message=""):
        self.status, self.code, self.message = status, code, message


class LocalHub:
    """The state, the server, and what tests may change."""

    def __init__(self):
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos, self.log = {}, []
        self.default_public = False  # repos are made public whatever was asked for, as an organisation may have it
        self.before_commit = lambda: None  # called when a commit arrives, before anything is looked at
        self.lock = threading.RLock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.closed = False

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def serve(self, repo_id, files):
        """Add a public repository, a data set under ``datasets/owner/name``."""
        self.repos[repo_id] = Repo(repo_id, private=False)
        self.repos[repo_id].commit(files)

    def downloads(self):
        """Return the names of the files that were fetched."""
        return [line.rsplit("/", 1)[-1] for line in self.log if re.match(r"GET .*/resolve/", line)]

    def close(self):
        self.closed = True  # connections that a client keeps open would be served on
        self.server.shutdown()
        self.server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: LocalHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def handle_one(self):
        if self.hub.closed:
            self.close_connection = True
            return
        self.hub.log.append(f"{self.command} {self.path}")
        self.user = self.hub.tokens.get((self.headers["Authorization"] or "").removeprefix("Bearer "))
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        address = urlsplit(self.path)
        self.query = parse_qs(address.query)
        try:
            for pattern, action in ROUTES:
                match = re.fullmatch(pattern, f"{self.command} {address.path}")
                if match:
                    if action is Handler.commit:
                        self.hub.before_commit()
                    with self.hub.lock:
                        return action(self, **{name: unquote(value) for name, value in match.groupdict().items()})
            raise Refusal(404, message=f"{self.command} {self.path} is not served")
        except Refusal as refusal:
            self.reply({"error": refusal.message}, refusal.status, **{"X-Error-Code": refusal.code or ""})

    do_GET = do_HEAD = do_POST = handle_one

    def reply(self, values=None, status=200, **headers):
        data = values if isinstance(values, bytes) else json.dumps({} if values is None else values).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, repo_id, *, write=False, content=False):
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and self.user != repo.owner):
            raise Refusal(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and self.user != repo.owner:
            raise Refusal(403, message="not allowed")
        if content and repo.gated and self.user != repo.owner:
            raise Refusal(403, "GatedRepo", "Access is restricted")
        return repo

    def commit_of(self, repo, revision):
        commit = repo.resolve(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", "Invalid rev id")
        return commit

    def whoami(self):
        if not self.user:
            raise Refusal(401)
        self.reply({"name": self.user, "type": "user", "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or self.user}/{asked['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return self.reply(url, 409)
        private = (asked.get("private") or asked.get("visibility") == "private") and not self.hub.default_public
        self.hub.repos[repo_id] = Repo(repo_id, private=bool(private))
        return self.reply(url)

    def info(self, repo_id, revision="main"):
        repo = self.repo(repo_id)
        self.reply(repo.describe(self.commit_of(repo, revision)))

    def auth_check(self, repo_id):
        self.reply({"id": self.repo(repo_id, content=True).repo_id})

    def list(self):
        wanted, author = set(self.query.get("filter", [])), self.query.get("author", [None])[0]
        visible = [repo for repo in self.hub.repos.values() if not repo.private or repo.owner == self.user]
        found = [repo.describe(repo.refs["main"]) for repo in visible if author in (None, repo.owner)]
        found = [entry for entry in found if wanted <= set(entry["tags"])]
        self.reply(found[: int(self.query.get("limit", ["1000"])[0])])

    def validate(self):
        self.reply({"errors": [], "warnings": []})

    def preupload(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        files = repo.commits[self.commit_of(repo, revision)]
        oids = {name: git_hash(content) for name, content in files.items()}
        asked = [entry["path"] for entry in json.loads(self.body)["files"]]
        ways = {"uploadMode": "regular", "shouldIgnore": False}
        self.reply({"files": [{"path": path, **ways, "oid": oids.get(path)} for path in asked]})

    def commit(self, repo_id, revision):
        repo = self.repo(repo_id, write=True)
        (header, *lines) = [json.loads(line) for line in self.body.splitlines()]
        head = self.commit_of(repo, revision)
        parent = header["value"].get("parentCommit") or head
        is_pr = "create_pr" in self.query
        if not is_pr and parent != head:
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines:
            path = line["value"]["path"]
            if line["key"] == "file":
                files[path] = base64.b64decode(line["value"]["content"])
            else:
                del files[path]
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
        sha = repo.commit(files, f"refs/pr/{number}" if is_pr else revision)
        answer = {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha}
        if is_pr:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo_id}/discussions/{number}"
        self.reply(answer)

    def tree(self, repo_id, revision):
        repo = self.repo(repo_id)
        files = repo.commits[self.commit_of(repo, revision)].items()
        self.reply([{"type": "file", "path": n, "size": len(f), "oid": git_hash(f)} for n, f in files])

    def resolve(self, repo_id, revision, path):
        repo = self.repo(repo_id, content=True)
        commit = self.commit_of(repo, revision)
        if path not in repo.commits[commit]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content = repo.commits[commit][path]
        self.reply(content, **{"X-Repo-Commit": commit, "ETag": f'"{git_hash(content)}"'})


REPO = r"(?P<repo_id>[\w.-]+/[\w.-]+)"
DATA_SET = r"(?P<repo_id>datasets/[\w.-]+/[\w.-]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES = [
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"GET /api/models", Handler.list),
    (rf"GET /api/models/{REPO}", Handler.info),
    (rf"GET /api/models/{REPO}/auth-check", Handler.auth_check),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", Handler.info),
    (rf"GET /api/models/{REPO}/tree/{REVISION}", Handler.tree),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", Handler.commit),
    (rf"GET /api/{DATA_SET}", Handler.info),
    (rf"GET /api/{DATA_SET}/revision/{REVISION}", Handler.info),
    (rf"GET /api/{DATA_SET}/tree/{REVISION}", Handler.tree),
    (rf"(GET|HEAD) /{DATA_SET}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    (rf"(GET|HEAD) /{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
]
