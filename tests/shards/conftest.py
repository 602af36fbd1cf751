"""A small corpus of any bytes, and servers of S3 and plain HTTP on loopback, behind faults that tests choose."""

import fcntl
import http.client
import os
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from selfsight.files import sha256_of
from selfsight.shards.index import write_index
from selfsight.shards.manifest import COUNTS, Manifest, Shard, merkle_root
from selfsight.shards.write import ShardWriter


@pytest.fixture(scope="session")
def write_corpus() -> Callable:
    """A function that writes a corpus of payloads that need not be images: the layer under test knows bytes only."""

    fixed = {"format": "PNG", "mode": "RGB", "width": 4, "height": 3, "frames": 1, "progressive": False}

    def write(root: Path, contents: list[bytes], per_shard: int, per_chunk: int) -> Path:
        shards, tables = [], []
        for name in ("shards", "index"):
            (root / name).mkdir(parents=True)
        for number, first in enumerate(range(0, len(contents), per_shard)):
            with open(root / f"shards/{number:06d}.tar", "wb") as f:
                writer, rows = ShardWriter(f, number=number, first=first, chunk_samples=per_chunk), []
                for ordinal, data in enumerate(contents[first : first + per_shard], first):
                    writer.add(data, "png", ordinal % 3)
                    rows.append({"sample": ordinal, "label": ordinal % 3, "size": len(data), "exif_orientation": 1})
                    rows[-1] |= {**fixed, "crc32c": google_crc32c.value(data)}
                size, digest, table, extents = writer.finish()
            index = root / f"index/{number:06d}.parquet"
            write_index(index, [row | extent for row, extent in zip(rows, extents, strict=True)])
            shards.append(Shard(number, first, len(rows), size, digest, sha256_of(index)))
            tables.append(table)
        np.save(root / "chunks.npy", np.concatenate(tables))
        Manifest(
            merkle_root(shards), len(contents), 0, shards, sum(map(len, tables)), sha256_of(root / "chunks.npy"), "",
            ["a", "b", "c"], dict.fromkeys(COUNTS, 0), {}, {}, "",
        ).save(root)  # fmt: skip
        return root

    return write


Answer = tuple[int, dict[str, str], bytes]  # status, headers, body
Fault = str  # "403", "500", "503", "slow", "silent", "closed", "cut", "short", "truncated", "flipped" or "whole"


CODES = {"403": "AccessDenied", "500": "InternalError", "503": "SlowDown"}


class FaultyServer:
    """Answers as `backend` does, but for what `plan(path, nth)` says of the nth GET, and the nth HEAD, of a path: a
    Fault or None."""

    def __init__(self, backend: Callable[[str, str, dict[str, str], bytes], Answer]) -> None:
        self.asked: Counter[str] = Counter()
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self._lock = threading.Lock()
        self.calm()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def respond(self) -> None:
                outer._respond(self, backend)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:  # clients that hang up are what this is about
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def calm(self) -> None:
        """No faults from now on, and no memory of requests."""
        self.plan: Callable[[str, int], Fault | None] = lambda path, nth: None
        self.asked.clear()
        self.requests.clear()

    def gets(self, part: str = "") -> list[tuple[str, str, str | None]]:
        return [r for r in self.requests if r[0] == "GET" and part in r[1]]

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def _respond(self, handler: BaseHTTPRequestHandler, backend: Callable) -> None:
        method, path, headers = handler.command, handler.path.partition("?")[0], dict(handler.headers.items())
        body = handler.rfile.read(int(headers.get("Content-Length", 0)))
        asked = path if method == "GET" else f"{method} {path}"
        with self._lock:
            nth = self.asked[asked]
            self.asked[asked] += 1
            self.requests.append((method, path, headers.get("Range") or headers.get("range")))
        fault = self.plan(path, nth) if method in ("GET", "HEAD") else None
        if fault == "closed":
            return self._hang_up(handler)
        if fault == "silent":
            time.sleep(1.0)
        if fault in CODES:
            status, headers = int(fault), {}
            data = f"<Error><Code>{CODES[fault]}</Code></Error>".encode() if method == "GET" else b""
        else:
            if fault == "whole":  # as servers do that know no ranges
                headers = {name: value for name, value in headers.items() if name.lower() != "range"}
            status, headers, data = backend(method, handler.path, headers, body)
        if fault == "flipped":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        if fault == "truncated":  # and the header says so too
            data = data[: len(data) // 2]
        handler.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("content-length", "connection", "server", "date", "transfer-encoding"):
                handler.send_header(name, value)
        length = next((v for k, v in headers.items() if k.lower() == "content-length"), None)
        handler.send_header("Content-Length", str(length if method == "HEAD" and length else len(data)))
        handler.end_headers()
        if method == "HEAD":
            return
        if fault in ("cut", "short"):
            handler.wfile.write(data[: len(data) // 2])
            return self._hang_up(handler, reset=fault == "cut")
        pieces = 4 if fault == "slow" else 1
        for i in range(pieces):
            handler.wfile.write(data[len(data) * i // pieces : len(data) * (i + 1) // pieces])
            time.sleep(0.02 if fault == "slow" else 0)

    @staticmethod
    def _hang_up(handler: BaseHTTPRequestHandler, reset: bool = False) -> None:
        handler.wfile.flush()
        handler.close_connection = True
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.connection.close()
        else:
            handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def s3_client():
    """boto3's client of a real S3-speaking server."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    yield boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys)
    server.stop()


@pytest.fixture(scope="session")
def s3_server(s3_client):
    """The S3 server behind a FaultyServer."""
    place = s3_client.meta.endpoint_url.removeprefix("http://")

    def forward(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        connection = http.client.HTTPConnection(place, timeout=30)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    server = FaultyServer(forward)
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server, quick, monkeypatch):
    """The faulty S3 server, calm, and the environment of a user of it."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server.url)
    s3_server.calm()
    return s3_server


@pytest.fixture
def web(tmp_path_factory):
    """A plain web server of a folder, `web.folder`, that gives ranges, as a FaultyServer."""
    folder = tmp_path_factory.mktemp("web")

    def give(method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        file = folder / path.lstrip("/")
        if not file.is_file():
            return 404, {}, b""
        data = file.read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("Range", ""))
        if asked is None:
            return 200, {"Accept-Ranges": "bytes", "Content-Length": str(len(data))}, data
        start, stop = int(asked[1]), int(asked[2] or len(data) - 1) + 1
        if start >= len(data):
            return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
        piece = data[start:stop]
        return 206, {"Content-Range": f"bytes {start}-{start + len(piece) - 1}/{len(data)}"}, piece

    server = FaultyServer(give)
    server.folder = folder
    yield server
    server.stop()


@pytest.fixture(scope="session")
def held() -> Callable[[Path], int]:
    """A function: the bytes of all files in a cache, at a moment in which nobody adds or evicts any."""

    def held(folder: Path) -> int:
        if not (folder / "lock").exists():
            return 0
        with open(folder / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            total = 0
            for path in folder.glob("[!l]*"):
                with suppress(FileNotFoundError):
                    total += path.stat().st_size
            return total

    return held


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Many tries with hardly a pause, and a cache of the test's own, whose folder this is."""
    monkeypatch.setenv("SELFSIGHT_TRIES", "12")
    monkeypatch.setenv("SELFSIGHT_PAUSE", "0.001")
    monkeypatch.setenv("SELFSIGHT_SILENCE", "20")
    monkeypatch.setenv("SELFSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SELFSIGHT_CACHE_BYTES", raising=False)
    return tmp_path / "cache" / "runs"
