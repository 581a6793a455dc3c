"""A real S3 server on 127.0.0.1 (seaweedfs), and a proxy before it whose replies go wrong."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import botocore.config
import botocore.session
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "test", "testtest"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_REGION": "us-east-1",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "AWS_EC2_METADATA_DISABLED": "true",
}
BUCKET = "bucket"
START_S = 120


def _free_ports(number):
    """Such that each of them and the one 10,000 above are free: seaweedfs takes both."""
    held, found = [], []
    while len(found) < number:
        low = socket.create_server(("127.0.0.1", 0))
        held.append(low)
        port = low.getsockname()[1]
        try:
            held.append(socket.create_server(("127.0.0.1", port - 20_000)))
            held.append(socket.create_server(("127.0.0.1", port - 10_000)))
        except (OSError, OverflowError):
            continue
        found.append(port - 20_000)
    for one in held:
        one.close()
    return found


@contextmanager
def s3_server(folder):
    """Start a server with an empty bucket; its endpoint, also in the environment."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    rights = {"accessKey": KEY, "secretKey": SECRET}
    actions = ["Admin", "Read", "List", "Write"]
    identities = [{"name": "test", "credentials": [rights], "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3, metrics = _free_ports(5)
    command = [
        *(str(Path(sysconfig.get_path("scripts")) / "weed"), "server"),
        *("-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}", "-filer", "-s3"),
        *(f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(
            f"-s3.port={s3}",
            f"-s3.config={folder / 's3.json'}",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ),
        *(f"-metricsPort={metrics}", "-master.volumeSizeLimitMB=64", "-volume.max=100"),
    ]
    endpoint = f"http://127.0.0.1:{s3}"
    before = {name: os.environ.get(name) for name in (*ENVIRONMENT, "AWS_ENDPOINT_URL")}
    os.environ.update(ENVIRONMENT, AWS_ENDPOINT_URL=endpoint)
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _make_bucket(endpoint, server)
        yield endpoint
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def client_of(endpoint):
    """What others do in a bucket."""
    config = botocore.config.Config(retries={"max_attempts": 0}, s3={"addressing_style": "path"})
    return botocore.session.Session().create_client("s3", endpoint_url=endpoint, config=config)


def _make_bucket(endpoint, server):
    """Once the server can write: it is up before that."""
    client = client_of(endpoint)
    until_s = time.monotonic() + START_S
    while True:
        try:
            if BUCKET not in {one["Name"] for one in client.list_buckets()["Buckets"]}:
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="first", Body=b"x")
            client.delete_object(Bucket=BUCKET, Key="first")
        except (BotoCoreError, ClientError):
            assert server.poll() is None, "the server has ended"
            assert time.monotonic() < until_s, "the server does not come up"
            time.sleep(0.1)
        else:
            return


def error_xml(code):
    return f"<Error><Code>{code}</Code><Message>made up</Message></Error>".encode()


LATE = {"lost", "500", "412"}
"""What is stored before the reply goes wrong."""
REPLIES = {
    "500": (500, error_xml("InternalError")),
    "412": (412, b""),
    "503": (503, error_xml("SlowDown")),
    "409": (409, error_xml("ConditionalRequestConflict")),
}
FAULTS = ("lost", "500", "412", "503", "409", "cut")
POINT_FAULTS = (*FAULTS, "silent", "away")
AWAY = 12
"""How many requests in a row nobody answers: more than are tried without patience."""


class Proxy:
    """Passes requests on; each PUT (of "cut": each GET) of a key goes wrong once.

    With a point it is the request of that number that goes wrong, whatever it is, and no other.
    "ignore" says yes to each PUT, as stores do that know no conditions.
    """

    def __init__(self, endpoint, fault=None, point=None):  # noqa: C901 - one handler
        self.fault = fault
        self.point = point if point is None else int(point)
        self.asked = Counter()
        """PUT, GET, LIST ... -> how many of them there were."""
        self.spoilt = Counter()
        """Key -> how many of its replies went wrong."""
        self._lock = threading.Lock()
        proxy, upstream = self, endpoint.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy.fault_of(self.command, self.path)
                if fault in {"away", "silent"}:
                    self.close_connection = True
                    # Until the client has had enough.
                    return self.rfile.read(1) if fault == "silent" else None
                if fault in REPLIES and fault not in LATE:
                    return self.answer(*REPLIES[fault])
                line = http.client.HTTPConnection(upstream, timeout=60)
                try:
                    line.request(self.command, self.path, body, dict(self.headers.items()))
                    reply = line.getresponse()
                    data = reply.read()
                finally:
                    line.close()
                if proxy.fault == "ignore" and reply.status == 412:
                    return self.answer(200, b"", {"ETag": '"0"'})
                if fault in REPLIES:
                    return self.answer(*REPLIES[fault])
                if fault == "lost":
                    self.close_connection = True
                    return None
                return self.answer(reply.status, data, reply.headers, is_cut=fault == "cut")

            def answer(self, status, data, headers=(), *, is_cut=False):
                self.send_response_only(status)
                names = dict(headers)
                length = names.get("Content-Length", len(data))
                for name, value in names.items():
                    if name.lower() not in {"content-length", "connection", "transfer-encoding"}:
                        self.send_header(name, value)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[: len(data) // 2] if is_cut else data)
                self.close_connection = is_cut

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one  # noqa: N815 - theirs

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def fault_of(self, method, path):
        key, _, query = path.partition("?")
        with self._lock:
            number = self.asked.total()
            self.asked["LIST" if "list-type" in query else method] += 1
        if self.point is not None:
            width = AWAY if self.fault == "away" else 1
            return self.fault if self.point <= number < self.point + width else None
        if self.fault not in FAULTS or method != ("GET" if self.fault == "cut" else "PUT") or query:
            return None
        with self._lock:
            is_first = not self.spoilt[key]
            self.spoilt[key] += is_first
        return self.fault if is_first else None

    def serve(self):
        self._server.serve_forever(poll_interval=0.05)

    def __enter__(self):
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def proxy_process(endpoint, fault, *point):
    """A proxy in a process of its own, for a parent that forks; its endpoint."""
    command = [sys.executable, "-m", "tests.s3", endpoint, fault, *map(str, point)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as proxy:
        try:
            yield proxy.stdout.readline().strip()
        finally:
            proxy.kill()


if __name__ == "__main__":
    this = Proxy(*sys.argv[1:])
    print(this.url, flush=True)
    this.serve()
