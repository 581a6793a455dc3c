"""What `jobs/servers/` has for a team, by the programs that it is for, where they are here."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.servers import stand_in

ROOT = Path(__file__).parents[2]
SERVERS = ROOT / "jobs" / "servers"
FOLDERS = os.pathsep.join(
    [os.environ.get("PATH", ""), "/usr/sbin", str(Path(sys.executable).parent)]
)
NGINX, CADDY, SYSTEMD, OPENSSL = (
    shutil.which(name, path=FOLDERS) for name in ("nginx", "caddy", "systemd-analyze", "openssl")
)
MODEL = "models/m"


def run(*command, **more):
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False, **more
    )


@pytest.fixture
def proxy(tmp_path):
    """nginx's files as they are shipped, but for places, ports and the certificate."""
    if NGINX is None or OPENSSL is None:
        pytest.skip("nginx or openssl is not here")
    certificate = [tmp_path / "engine.crt", "-keyout", tmp_path / "engine.key", "-days", "2"]
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = run(
        OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-out", *certificate, *subject
    )
    assert made.returncode == 0, made.stderr
    shutil.copy(SERVERS / "keys.conf", tmp_path / "engine-keys.conf")
    text = (SERVERS / "nginx.conf").read_text().replace("/etc/nginx/", f"{tmp_path}/")
    temps = "".join(
        f"{name}_temp_path {tmp_path}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off; pid {tmp_path}/pid; error_log {tmp_path}/error.log; events {{}}"
    head += f" http {{ access_log {tmp_path}/access.log; {temps}\n"
    path = tmp_path / "nginx.conf"

    def write(port, engine):
        own = text.replace("listen 443", f"listen 127.0.0.1:{port}")
        path.write_text(f"{head}{own.replace('127.0.0.1:8000', f'127.0.0.1:{engine}')}\n}}\n")
        return [NGINX, "-p", str(tmp_path), "-e", f"{tmp_path}/error.log", "-c", str(path)]

    return write


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_up(port):
    with socket.socket() as line:
        return line.connect_ex(("127.0.0.1", port)) == 0


def test_nginx_takes_its_file(proxy):
    done = run(*proxy(free_port(), 8000), "-t")
    assert done.returncode == 0, done.stderr


@pytest.mark.proof
def test_a_team_s_rows_go_through_nginx_with_a_key_each(proxy, tmp_path):
    """By TLS with an authority of one's own; who has no key gets nothing, and the engine's key
    stays where it is."""
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"t": "row {n}"}}\n' for n in range(300)))
    port = free_port()
    job = tmp_path / "job.toml"
    job.write_text(
        f"""
        [input]
        path = "rows.jsonl"
        [prompt]
        user = "{{{{ t }}}}"
        [model]
        backend = "openai"
        name = "{MODEL}"
        base_url = "https://localhost:{port}/v1"
        api_key_env = "MY_KEY"
        [sampling]
        max_tokens = 20
        [output]
        path = "out"
        """
    )

    def batchgen(key):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "MY_KEY": key}
        env["SSL_CERT_FILE"] = str(tmp_path / "engine.crt")
        return run(sys.executable, "-m", "batchgen", "run", job, "--json", env=env)

    with stand_in(model=MODEL, key="KEY_OF_THE_ENGINE") as engine:
        nginx = subprocess.Popen(proxy(port, engine.port))
        try:
            while not is_up(port):
                assert nginx.poll() is None, (tmp_path / "error.log").read_text()
                time.sleep(0.05)
            for wrong in ("KEY_OF_THE_ENGINE", "nobody"):
                done = batchgen(wrong)
                assert done.returncode == 2
                assert "HTTP 401" in done.stderr
            assert engine.asked == []
            done = json.loads(batchgen("KEY_OF_ANNA").stdout)
        finally:
            nginx.send_signal(signal.SIGQUIT)
            nginx.wait(60)
    assert (done["exit_code"], done["num_ok"], done["warnings"]) == (0, 300, [])
    assert engine.answered >= 300


def test_nginx_takes_the_file_for_batches(proxy, tmp_path):
    path = tmp_path / "batches.conf"
    text = (SERVERS / "nginx-serve.conf").read_text().replace("/etc/nginx/batches", "engine")
    path.write_text(f"daemon off; pid pid; error_log e; events {{}} http {{ {text} }}")
    done = run(NGINX, "-t", "-p", tmp_path, "-e", tmp_path / "e", "-c", path)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(CADDY is None, reason="caddy is not here")
def test_caddy_takes_its_file(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "KEY_OF_ANNA": "a", "KEY_OF_BEN": "b"}
    env |= {"ENGINE_KEY": "e", "XDG_DATA_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    config = ("--config", SERVERS / "Caddyfile", "--adapter", "caddyfile")
    done = run(CADDY, "validate", *config, env=env)
    assert done.returncode == 0, done.stderr
    assert "not formatted" not in done.stderr


@pytest.mark.skipif(SYSTEMD is None, reason="systemd is not here")
@pytest.mark.parametrize("name", ["engine", "serve"])
def test_systemd_takes_the_units(tmp_path, name):
    unit = tmp_path / f"batchgen-{name}.service"
    program = Path(sys.executable).parent / "batchgen"
    text = (SERVERS / unit.name).read_text().replace("/opt/batchgen/bin/batchgen", str(program))
    unit.write_text(text.replace("%h/venv/bin/batchgen", str(program)))
    done = run(SYSTEMD, "verify", "--man=no", unit)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "batchgen" in line]
    assert (done.returncode, said) == (0, [])
