"""Rows by vLLM's own server, started by `batchgen engine up`, are the rows of the engine here."""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.contract.pooling_models import PAIRS, TEXTS

ROOT = Path(__file__).parent.parent.parent
MODEL = ROOT / "sample_data" / "model"
PLACE = {"gen_engine", "gen_run_id", "gen_num_cached_tokens", "gen_latency_s"}
"""Columns that tell of a run and not of the answer."""
FORMS = {
    "schema": {
        "sampling": {"temperature": 0, "max_tokens": 48, "logprobs": 10},
        "output": {"schema": str(ROOT / "jobs" / "ticket.schema.json"), "flatten": True},
    },
    "retries": {
        "sampling": {"temperature": 0, "max_tokens": 3, "logprobs": 3},
        "output": {"schema": str(ROOT / "jobs" / "ticket.schema.json")},
        "retry": [{"max_tokens": 40, "temperature": 0.7}],
    },
    "votes": {
        "sampling": {"temperature": 0.9, "max_tokens": 8, "n": 3, "logprobs": 5},
        "output": {"choice": ["billing", "shipping", "account", "bug"]},
    },
    "text": {
        "prompt": {"text": "body"},
        "sampling": {"temperature": 0, "max_tokens": 12},
        "output": {},
        "checks": {"allow_truncated": True},
    },
}
pytestmark = pytest.mark.vllm


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def toml(tables):
    lines = []
    for name, table in tables.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"


class Place:
    """A folder with rows and jobs, and what batchgen says there."""

    def __init__(self, folder):
        self.folder = folder
        lines = (ROOT / "sample_data" / "tickets.jsonl").read_bytes().splitlines()[:120]
        (folder / "rows.jsonl").write_bytes(b"\n".join(lines) + b"\n")
        self.env = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_STATE_HOME": str(folder / "state")}
        self.env |= {"PYTHONPYCACHEPREFIX": str(folder.parent / "bytecode")}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)

    def job(self, form, out, more=None, **model):
        system = "Label the support ticket. Answer in JSON with label and urgency."
        tables = {
            "input": {"path": "rows.jsonl"},
            "prompt": {"system": system, "user": "Subject: {{ subject }}\n\n{{ body }}"},
            "gate": {"max_error_rate": 1.0},
            **FORMS[form],
        }
        shape = {"name": str(MODEL), "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32}
        tables["model"] = {**shape, **model}
        tables["model.engine"] = {"enforce_eager": True}
        tables["output"] = {"path": out, **FORMS[form]["output"]}
        tables |= more or {}
        path = self.folder / f"{form}-{out}-{'-'.join(model)}.toml"
        path.write_text(toml(tables))
        return path

    def run(self, job, *options):
        command = [sys.executable, "-m", "batchgen", "run", str(job), "--json", *options]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, check=False)
        assert done.stdout, done.stderr
        return json.loads(done.stdout)

    def rows(self, out):
        files = sorted((self.folder / out).glob("part-*.parquet"))
        table = pa.concat_tables([pq.read_table(file) for file in files])
        return table.drop_columns(
            [name for name in PLACE if name in table.column_names]
        ).to_pylist()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("endpoints"))


@contextmanager
def engine_up(place, job):
    """`batchgen engine up`, ready; its key in the environment of the runs."""
    before = set((place.folder / "state").rglob("*.json"))
    command = [sys.executable, "-m", "batchgen", "engine", "up", str(job)]
    command += ["--port", str(free_port())]
    with (place.folder / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, env=place.env, stdout=log, stderr=log, start_new_session=True
        )
    try:
        states = place.folder / "state"
        (path,) = wait_for(lambda: set(states.rglob("*.json")) - before, server)
        state = json.loads(path.read_bytes())
        place.env["WARM_KEY"] = Path(state["key_file"]).read_text().strip()
        wait_for(lambda: models(state["url"], place.env["WARM_KEY"]), server)
        yield server, state
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
        with suppress(ProcessLookupError):  # The core of a server that a test has killed.
            os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def warm(place):
    with engine_up(place, place.job("schema", "none")) as found:
        yield found


def wait_for(look, server):
    until = time.monotonic() + 300
    while time.monotonic() < until:
        assert server.poll() is None
        if found := look():
            return found
        time.sleep(0.2)
    pytest.fail("the server is not up")


def models(url, key):
    request = urllib.request.Request(f"{url}/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as reply:
            return reply.read()
    except OSError:
        return None


def assert_close(mine, theirs):
    """Equal, but for what float32 leaves to the order of rows in a batch."""
    if isinstance(mine, float) and isinstance(theirs, float):
        assert mine == pytest.approx(theirs, abs=1e-4)
    elif isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert_close(mine[name], theirs[name])
    elif isinstance(mine, list):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            assert_close(one, other)
    else:
        assert mine == theirs


@pytest.mark.parametrize("form", FORMS)
def test_rows_by_http_are_the_rows_of_the_engine_here(form, place, warm):
    _, state = warm
    url = {"backend": "openai", "base_url": state["url"], "api_key_env": "WARM_KEY"}
    done = place.run(place.job(form, f"{form}-http", **url))
    assert (done["exit_code"], done["num_ok"] > 100) == (0, True)
    here = place.run(place.job(form, f"{form}-here"))
    assert here["engine"]["name"] == "vllm"
    assert_close(place.rows(f"{form}-http"), place.rows(f"{form}-here"))
    with (place.folder / "rows.jsonl").open("ab") as file:  # The next night, without the server.
        file.write(b"\n")
    again = place.run(place.job(form, f"{form}-http"))
    assert again["exit_code"] == 0
    assert again["engine"] == {}
    assert_nowhere(place.folder / f"{form}-http", place.env["WARM_KEY"])


def assert_nowhere(folder, text):
    for file in folder.rglob("*"):
        assert not file.is_file() or text.encode() not in file.read_bytes(), file


def test_auto_takes_the_warm_engine_and_does_without_it_when_it_is_gone(place, warm):
    server, state = warm
    assert Path(state["key_file"]).stat().st_mode & 0o777 == 0o600
    assert place.env["WARM_KEY"] not in " ".join(Path(f"/proc/{server.pid}/cmdline").read_text())
    cards = json.loads(models(state["url"], place.env["WARM_KEY"]))["data"]
    assert [card["id"] for card in cards] == [str(MODEL), MODEL.name]
    auto = place.job("schema", "auto", backend="openai", base_url="auto")
    started = time.monotonic()
    assert place.run(auto)["engine"]["name"] == "openai"
    print(f"a night of 120 rows on a warm engine: {time.monotonic() - started:.1f} s")
    command = [sys.executable, "-m", "batchgen", "engine", "up", str(auto)]
    again = subprocess.run(command, env=place.env, capture_output=True, text=True, check=False)
    assert (again.returncode, state["url"] in again.stderr) == (75, True)
    other = place.job("schema", "other", backend="openai", base_url="auto", max_model_len=512)
    assert place.run(other)["engine"]["name"] == "vllm"


def test_adapters_and_a_warm_engine_that_is_killed_under_a_run(place):
    adapters = ROOT / "sample_data" / "adapters"
    loras = {name: str(adapters / name) for name in ("teams", "urgency")}
    model = {"lora_column": "adapter"}
    lines = (place.folder / "rows.jsonl").read_bytes().splitlines()
    rows = [row for row in lines if is_json(row)][:90]
    given = [
        json.dumps({**json.loads(row), "n": n, "adapter": name})
        for n in range(12)
        for row in rows
        for name in ("teams", "urgency", None)
    ]
    (place.folder / "adapters.jsonl").write_text("\n".join(given) + "\n")
    shape = {"input": {"path": "adapters.jsonl"}, "model.lora": loras, "run": {"dedupe": "never"}}
    auto = place.job("schema", "lora", shape, backend="openai", base_url="auto", **model)
    few = ("--set", "input.limit=90")
    with engine_up(place, auto) as (server, _):
        assert place.run(auto, *few)["engine"]["name"] == "openai"
        command = [sys.executable, "-m", "batchgen", "run", str(auto), "--fresh", "--json"]
        run = subprocess.Popen(command, env=place.env, stdout=subprocess.PIPE)
        wait_for(lambda: num_ended(place.folder / "lora") > 200, run)
        server.kill()
        done = json.loads(run.communicate(timeout=300)[0])
    assert (done["exit_code"], done["num_planned"]) == (0, len(given))
    assert done["engine"]["name"] == "vllm"
    assert any("the warm server has ended" in text for text in done["warnings"])
    place.run(place.job("schema", "lora-here", shape, **model))
    assert_close(place.rows("lora"), place.rows("lora-here"))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    command = [sys.executable, "-m", "tests.contract.pooling_models", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("task", ["embed", "classify", "score"])
def test_numbers_by_http_are_those_of_the_engine_here(task, place, encoders):
    """To the last bit but for float32's, cut texts and refused ones included."""
    pair = {"query": "{{ q }}", "passage": "{{ text }}"}
    rows = [{"q": first, "text": second} for first, second in PAIRS]
    rows += [{"q": "what?", "text": text} for text in TEXTS]
    (place.folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def job(out, **model):
        tables = {
            "input": {"path": "texts.jsonl"},
            "prompt": pair if task == "score" else {"template": "{{ text }}"},
            "pooling": {"too_long": "refuse" if task == "score" else "truncate"},
            "model": {
                "name": str(encoders / task),
                "dtype": "float32",
                "max_num_seqs": 16,
                **model,
            },
            "model.engine": {"enforce_eager": True},
            "gate": {"max_error_rate": 1.0},
            "output": {"path": out},
        }
        path = place.folder / f"{out}.toml"
        path.write_text(f'task = "{task}"\n{toml(tables)}')
        return path

    auto = job(f"{task}-auto", backend="openai", base_url="auto")
    with engine_up(place, auto) as (_, state):
        url = {"backend": "openai", "base_url": state["url"], "api_key_env": "WARM_KEY"}
        for path in (auto, job(f"{task}-url", **url)):
            done = place.run(path)
            assert (done["exit_code"], done["engine"]["name"]) == (0, "openai")
            assert done["num_errors"] == (task == "score")
    assert place.run(job(f"{task}-here"))["engine"]["name"] == "vllm"
    assert any("truncated" in str(row) for row in place.rows(f"{task}-here")) == (task != "score")
    here, *others = (place.rows(f"{task}-{out}") for out in ("here", "auto", "url"))
    for row in itertools.chain(here, *others):
        del row["gen_error"]  # Each says in its own words that a text is too long.
    for there in others:
        assert_close(there, here)


def is_json(row):
    try:
        return isinstance(json.loads(row), dict)
    except ValueError:
        return False


def num_ended(out):
    """Rows that the newest run has ended so far."""
    newest = max(out.glob("_batchgen/runs/*/live.json"), key=lambda path: path.parent.name)
    live = json.loads(newest.read_bytes())
    return live.get("num_ok", 0) + live.get("num_errors", 0)
