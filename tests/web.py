"""A web server on this machine, with ranges, listings, and the failures that servers have."""

import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web:
    """What the server does, and what it was asked.

    Attributes:
        url: address of the folder.
        ranges: whether parts of files are given.
        broken: so many of the next answers end after half of their bytes.
        refused: so many of the next answers are 503.
        denied: whether all answers are 403.
        got: (path, first byte or None) of every GET of a file.
        sent: bytes of files.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = ""
        self.ranges, self.broken, self.refused = True, 0, 0
        self.denied = self.down = False
        self.got: list[tuple[str, int | None]] = []
        self.sent = 0


def _handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(head=True)

        def do_GET(self) -> None:
            self.answer(head=False)

        def answer(self, head: bool) -> None:
            path = web.root / self.path.partition("?")[0].strip("/")
            if web.down:
                self.close_connection = True
                return None
            if web.denied:
                return self.give(403, b"")
            if web.refused > 0 and not head:
                web.refused -= 1
                return self.give(503, b"")
            if path.is_dir():
                links = "".join(f'<a href="{p.name}{"/" * p.is_dir()}">x</a>' for p in sorted(path.iterdir()))
                return self.give(200, links.encode(), head, kind="text/html")
            if not path.is_file():
                return self.give(404, b"", head)
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if web.ranges else None
            if not head:
                web.got.append((path.name, int(asked[1]) if asked else None))
            if asked:
                start, stop = int(asked[1]), min(len(content), int(asked[2]) + 1)
                self.give(206, content[start:stop], head, stamp=path, span=f"bytes {start}-{stop - 1}/{len(content)}")
            else:
                self.give(200, content, head, stamp=path)

        def give(self, status, content, head=False, kind="application/octet-stream", stamp=None, span=""):
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if stamp is not None:
                self.send_header("ETag", f'"{stamp.stat().st_mtime_ns}"')
                self.send_header("Accept-Ranges", "bytes" if web.ranges else "none")
            if span:
                self.send_header("Content-Range", span)
            self.end_headers()
            if head:
                return
            if stamp is not None and web.broken > 0:
                web.broken -= 1
                content = content[: len(content) // 2]
                self.close_connection = True
            web.sent += len(content) if stamp is not None else 0
            self.wfile.write(content)

    return Handler


@contextmanager
def served(root: Path):
    """Context with a server of a folder; at its end nothing answers any more."""
    web = Web(root)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(web))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    web.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield web
    finally:
        web.down = True  # for connections that stay open
        server.shutdown()
        server.server_close()
        thread.join()
