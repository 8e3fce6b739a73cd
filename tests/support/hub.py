"""The hub's stand-ins: its local cache, and a server on this machine."""

import http.server
import json
import shutil
import threading
from contextlib import contextmanager
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache, repo_id, folder):
    """Put a folder into a cache as that repository at COMMIT; the client reads it there with HF_HUB_OFFLINE."""
    shutil.copytree(folder, cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / COMMIT)


@contextmanager
def served(repositories):
    """Serve folders as repositories by their ids at COMMIT; yields the endpoint, and the files that were asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            place = self.path.removeprefix("/api/models").removeprefix("/")
            repo_id = next((name for name in repositories if place.startswith(name)), None)
            if repo_id is None:
                return self.answer(404, b"")
            folder, rest = Path(repositories[repo_id]), place.removeprefix(repo_id)
            if self.path.startswith("/api/"):
                names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
                record = {"id": repo_id, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                if "/tree/" in rest:
                    record = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
                return self.answer(200, json.dumps(record).encode())
            name = rest.partition(f"/{COMMIT}/")[2]
            if not (folder / name).is_file():
                return self.answer(404, b"")
            asked.append(f"{repo_id}/{name}")
            return self.answer(200, (folder / name).read_bytes())

        do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{len(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
