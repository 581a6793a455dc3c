"""What users of batchgen see, as files: the outside that must not change by accident.

    python -m tests.golden.make

rewrites them, for a change that is meant; its diff is what a user will notice. `keys.txt` is the
exception: recipes and request keys are the memory of published outputs, and were written by the
code of 0.1.0 (commit e905896). A change there makes every user compute every row again.

Everything goes through the command line and `batchgen.read`, so that this file runs on any
version: `PYTHONPATH=path/of/e905896 python tests/golden/make.py`.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

import batchgen
from batchgen.cli import cli, main

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Done:
    """A command that has ended: its exit code and what it printed."""

    def __init__(self, args: Sequence[str]) -> None:
        """Run it in this process, as the shell would."""
        out, err = io.StringIO(), io.StringIO()
        os.environ["COLUMNS"] = "80"  # Click wraps help at the terminal's width.
        before = sys.argv, {number: signal.getsignal(number) for number in _SIGNALS}
        sys.argv = ["batchgen", *args]
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                main()
        except SystemExit as end:
            self.code = int(end.code or 0)
        else:
            self.code = 0
        finally:
            sys.argv, handlers = before
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.stdout, self.stderr = out.getvalue(), err.getvalue()


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def job_of(folder: Path, **tables: Any) -> str:
    """A job file for the echo engine over `in.jsonl`.

    Keys of `tables` join or replace these, None
    takes one away."""
    job: dict[str, Any] = {
        "input": {"path": "in.jsonl"},
        "prompt": {"user": "{{ text }}"},
        "model": {"backend": "echo"},
        "sampling": {"max_tokens": 40, "temperature": 0},
        "output": {"path": "out"},
        "checks": {"allow_truncated": True},
    }
    for name, keys in tables.items():
        job[name] = keys if isinstance(keys, list) else {**job.get(name, {}), **keys}
    folder.mkdir(exist_ok=True)
    path = folder / "job.toml"
    path.write_text("\n".join(_toml(job)) + "\n", encoding="utf-8")
    return str(path)


def _toml(job: Mapping[str, Any]) -> Iterator[str]:
    for name, keys in job.items():
        for table in keys if isinstance(keys, list) else [keys]:
            yield f"[[{name}]]" if isinstance(keys, list) else f"[{name}]"
            yield from (
                f"{key} = {_value(value)}" for key, value in table.items() if value is not None
            )


def _value(value: Any) -> str:
    if isinstance(value, dict):
        inner = ", ".join(f"{json.dumps(key)} = {_value(item)}" for key, item in value.items())
        return f"{{{inner}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    return json.dumps(value, ensure_ascii=False)


def write_rows(folder: Path, *texts: Any, name: str = "in.jsonl") -> None:
    """JSONL of `id`, `text`, `score` and `tags`; a mapping adds columns, bytes are a line as is."""
    folder.mkdir(exist_ok=True)
    lines = []
    for number, text in enumerate(texts):
        row = {"id": number, "text": text, "score": number / 2, "tags": ["a"] * (number % 3)}
        if isinstance(text, dict):
            row |= text
        lines.append(text if isinstance(text, bytes) else json.dumps(row).encode())
    (folder / name).write_bytes(b"\n".join(lines) + b"\n")


# Help ----------------------------------------------------------------------------------------


def help_texts() -> str:
    """`--help` of every command."""
    names = ["", *sorted(cli.commands)]
    texts = (
        f"$ batchgen {name} --help\n{Done([*name.split(), '--help']).stdout}" for name in names
    )
    # Click names the program as it was started.
    return re.sub("^Usage: .*batchgen", "Usage: batchgen", "\n".join(texts), flags=re.MULTILINE)


# Keys of --json and exit codes -----------------------------------------------------------------


def shape_of(value: Any, name: str = "") -> dict[str, set[str]]:
    """The paths of a JSON value, each with its types; `[]` is any item of a list."""
    found: dict[str, set[str]] = {}
    if isinstance(value, dict) and value:
        inner = [(f"{name}.{key}" if name else key, item) for key, item in value.items()]
    elif isinstance(value, list) and value:
        inner = [(f"{name}[]", item) for item in value]
    else:
        return {name: {_TYPES[type(value)]}}
    for path, item in inner:
        for deep, types in shape_of(item, path).items():
            found.setdefault(deep, set()).update(types)
    return found


_TYPES = {
    str: "text",
    bool: "true/false",
    int: "number",
    float: "number",
    type(None): "null",
    dict: "{}",
    list: "[]",
}
_VARYING = re.compile(r"^doctor .*(findings|machine|can_run)")
"""Of the machine and what is installed on it."""


class Situations:
    """Runs commands in one situation after the other, and notes what each came to."""

    def __init__(self, folder: Path) -> None:
        """Begin with nothing."""
        self.folder = folder
        self.codes: list[str] = []
        self.shapes: dict[str, dict[str, set[str]]] = {}

    def note(self, situation: str, *args: str) -> Done:
        """Run a command and note it; of paths, the last name."""
        shown = [Path(arg).name if os.sep in arg else arg for arg in args]
        done = Done(args)
        state = ""
        if "--json" in args and done.stdout:
            facts = json.loads(done.stdout.splitlines()[-1])
            state = f", {facts['state']}" if "state" in facts else ""
            shapes = self.shapes.setdefault(args[0], {})
            for path, types in shape_of(facts).items():
                if not _VARYING.match(f"{args[0]} {path}"):
                    shapes.setdefault(path, set()).update(types)
        self.codes.append(f"{done.code:>2}  {situation}: {' '.join(shown)}{state}")
        return done

    def codes_text(self) -> str:
        """One line for each situation."""
        return "\n".join(self.codes) + "\n"

    def shapes_text(self) -> str:
        """Every path of every command's JSON with its types."""
        lines = []
        for command, shapes in sorted(self.shapes.items()):
            lines.append(f"$ batchgen {command} --json")
            lines += [f"{path}: {' or '.join(sorted(types))}" for path, types in shapes.items()]
        return "\n".join(lines) + "\n"


def situations(folder: Path) -> Situations:
    """All of them, on one job after the other."""
    at = Situations(folder)
    _usage(at)
    _nights(at)
    _refused(at)
    _damage(at)
    _deciding(at)
    return at


def _usage(at: Situations) -> None:
    at.note("no command")
    at.note("unknown command", "fly")
    for command in ("run", "plan", "check", "status", "show", "verify", "tune", "doctor"):
        at.note("no job", command)
        at.note("no such file", command, "none.toml")
    at.note("unknown option", "run", "job.toml", "--quick", "--json")
    at.note("option that is wrong", "run", "job.toml", "--until", "soon")
    at.note("option that is wrong", "run", "job.toml", "--max-runtime", "1ms", "--json")
    at.note("one number", "diff", "job.toml", "1")
    at.note("version", "--version")
    at.note("schema", "schema")


def _nights(at: Situations) -> None:
    folder = at.folder / "nights"
    choice = ["yes", "no"]
    write_rows(folder, *["yes", "no"] * 8, "maybe", b"{bad", b"")
    job = job_of(
        folder,
        output={"choice": choice},
        gate={"max_error_rate": 0.05},
        retry=[{"temperature": 0.5}],
    )
    both = ("--json",)
    for command in ("status", "snapshots", "plan", "doctor"):
        at.note("nothing was run", command, job, *both)
    for command in ("check", "show", "diff"):
        at.note("nothing was run", command, job)
    at.note("over the gate", "run", job, *both)
    at.note("over the gate", "status", job, *both)
    at.note("published anyway", "run", job, "--publish-anyway", *both)
    at.note("done", "run", job, *both)
    at.note("done", "run", job)
    at.note("done", "plan", job, *both)
    at.note("one snapshot", "diff", job, *both)
    with (folder / "out/_batchgen/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        at.note("another run is at work", "run", job, *both)
        at.note("another run is at work", "tune", job, *both)
        at.note("another run is at work", "prune", job, "--keep", "1", *both)
    write_rows(folder, "no", *["no", "yes"] * 8, "maybe", b"{bad", b"", "yes", "no")
    at.note("next night", "plan", job, *both)
    at.note("next night", "run", job, "--publish-anyway", *both)
    for command in ("status", "snapshots", "diff", "verify", "plan", "doctor"):
        at.note("two nights", command, job, *both)
        at.note("two nights", command, job)
    for args in (("check",), ("show",), ("show", "--errors"), ("show", "--snapshot", "9")):
        at.note("two nights", args[0], job, *args[1:])
    at.note("two nights", "diff", job, "--on", "id", *both)
    at.note("two nights", "diff", job, "1", "9")
    at.note("output folder", "status", str(folder / "out"), *both)
    at.note("errors again", "plan", job, "--retry-errors", *both)
    at.note("errors again", "run", job, "--retry-errors", *both)
    _later_nights(at, job)


def _later_nights(at: Situations, job: str) -> None:
    both = ("--json",)
    at.note("prune", "prune", job, "--keep", "1", "--dry-run", *both)
    at.note("prune", "prune", job, "--keep", "1", *both)
    at.note("prune", "prune", job)
    other = ("--set", "sampling.max_tokens=41")
    at.note("another recipe", "plan", job, *other, *both)
    at.note("another recipe", "run", job, *other, *both)
    at.note("another recipe, accepted", "run", job, *other, "--accept-recipe", *both)
    at.note("another recipe, accepted", "status", job, *both)
    at.note("all anew", "plan", job, *other, "--fresh", *both)
    at.note("options that clash", "run", job, "--fresh", "--retry-errors", *both)
    at.note("options that clash", "plan", job, "--fresh", "--retry-errors", *both)


def _refused(at: Situations) -> None:
    folder = at.folder / "refused"
    write_rows(folder, "a")
    wrong: dict[str, dict[str, Any]] = {
        "unknown key": {"input": {"pfad": "x"}},
        "no input": {"input": {"path": "none.jsonl"}},
        "unknown column": {"prompt": {"user": "{{ tekst }}"}},
        "wrong template": {"prompt": {"user": "{{ text "}},
        "wrong option of the engine": {"model": {"engine": {"quick": 1}}},
        "no such model": {"model": {"backend": "vllm", "name": "./none"}},
        "output at a URL": {"output": {"path": "gs://bucket/out"}},
        "output below a file": {"output": {"path": "in.jsonl/out"}},
    }
    for situation, tables in wrong.items():
        job = job_of(folder, **tables)
        for command in ("check", "plan", "doctor", "run", "status", "tune"):
            json_ = () if command == "check" else ("--json",)
            at.note(situation, command, job, *json_)
        shutil.rmtree(folder / "out", ignore_errors=True)
    at.note("not a folder of batchgen", "status", str(folder))


def _damage(at: Situations) -> None:
    folder = at.folder / "damaged"
    write_rows(folder, *"abc")
    job = job_of(folder)
    at.note("small job", "run", job, "--json")
    for path in (folder / "out").glob("part-*.parquet"):
        path.chmod(0o644)
        data = bytearray(path.read_bytes())
        data[len(data) // 3] ^= 0xFF
        path.write_bytes(data)
    at.note("damaged", "verify", job, "--json")
    at.note("damaged", "run", job, "--retry-errors", "--json")
    at.note("mended", "verify", job, "--json")


def _deciding(at: Situations) -> None:
    folder = at.folder / "deciding"
    write_rows(
        folder,
        *(
            {"text": text, "gold": gold}
            for text, gold in zip("xxyz", ["x", "y", "", "x"], strict=True)
        ),
    )
    job = job_of(folder, output={"choice": ["x", "y"]}, gate={"max_error_rate": 0.5})
    other = ("--set", "prompt.user={{ gold }}")
    at.note("nothing was run", "try", job, "-n", "0")
    at.note("nothing was run", "try", job, "-n", "2", "--json")
    at.note("nothing was run", "try", job, "--errors", "--json")
    at.note("nothing was run", "compare", job, job, "--json")
    at.note("nothing was run", "score", job, "--gold", "gold", "--json")
    at.note("after two were tried", "run", job, "--json")
    at.note("another recipe", "try", job, *other, "--json")
    at.note("another recipe", "try", job, *other)
    at.note("another recipe", "run", job, *other, "--accept-recipe", "--publish-anyway", "--json")
    at.note("two snapshots", "compare", f"{job}@1", job, "--json")
    at.note("two snapshots", "compare", f"{job}@1", f"{job}@9")
    at.note("two snapshots", "score", job, "--gold", "gold", "--snapshot", "1", "--json")
    at.note("two snapshots", "score", job, "--gold", "golt")
    at.note("two snapshots", "score", job)


# Output folders ---------------------------------------------------------------------------------


def outputs(folder: Path) -> str:
    """File names and Parquet schemas of a few jobs' outputs."""
    person = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"enum": ["a"]}}}
    answers = ['{"n": 1, "s": "a"}'] * 2
    jobs: dict[str, tuple[Sequence[Any], dict[str, Any]]] = {
        "free text": ("abc", {}),
        "a schema": (answers, {"output": {"schema": person, "prefix": "llm_"}}),
        "a schema, flat": (answers, {"output": {"schema": person, "flatten": True}}),
        "a choice": (["a"], {"output": {"choice": ["a", "b"], "with_seed": True}}),
        "JSON": (["{}"], {"output": {"json_object": True}}),
        "votes": (["a"], {"sampling": {"n": 2, "temperature": 1}, "output": {"choice": ["a"]}}),
        "small files": ("abcde", {"output": {"rows_per_file": 2}, "input": {"columns": ["id"]}}),
    }
    lines = []
    for number, (name, (texts, tables)) in enumerate(jobs.items()):
        at = folder / f"job{number}"
        write_rows(at, *texts)
        done = Done(["run", job_of(at, **tables)])
        lines.append(f"# {name}: exit {done.code}")
        out = at / "out"
        names = (str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
        names = (_SHOWN.sub(r"\1-<hash>", _RUN.sub("<run>", name)) for name in names)
        lines += sorted({_HASH.sub("<hash>", name) for name in names})
        lines += _schema(min(out.glob("part-*.parquet")))
    lines += _schema(next(out.glob("_batchgen/runs/*/stats.parquet")))
    return "\n".join(lines) + "\n"


_RUN = re.compile(r"\d{8}T\d{6}-[0-9a-f]{6}")
_SHOWN = re.compile(r"(part-\d{8})-[0-9a-f]{8}")
_HASH = re.compile(r"(?<=[/-])(?:[0-9a-f]{64}|[0-9a-f]{32}|[0-9a-f]{16})(?=\.\w+)")


def _schema(path: Path) -> list[str]:
    name = _SHOWN.sub(r"\1-<hash>", path.name)
    return [f"schema of {name}", *(f"  {_field(field)}" for field in pq.read_schema(path))]


def _field(field: Any) -> str:
    meta = {key.decode(): value.decode() for key, value in (field.metadata or {}).items()}
    return (
        f"{field.name}: {field.type}{'' if field.nullable else ' not null'} {meta or ''}".rstrip()
    )


# Recipes and request keys -------------------------------------------------------------------------

_TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
_CHATS = [{"text": [{"role": "user", "content": f"n {n}"}]} for n in range(3)]
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "system": {"prompt": {"system": "Say {{ id }}."}},
    "examples": {"prompt": {"examples": [{"user": "a", "assistant": {"x": 1, "a": 2}}]}},
    "raw text": {"prompt": {"user": None, "text": "text"}},
    "a whole chat": {"prompt": {"user": None, "messages": "text"}},
    "template": {
        "prompt": {"user": "{% for t in tags %}{{ t }}{% endfor %}{{ score }} {{ text }}"}
    },
    "tools": {"prompt": {"tools": _TOOLS}},
    "sampled": {"sampling": {"temperature": 0.7, "top_p": 0.9, "n": 2, "stop": ["x"], "seed": 7}},
    "own sampling": {"sampling": {"column": "own"}},
    "choice": {"output": {"choice": ["row 1", "b"]}},
    "schema": {"output": {"schema": {"type": "object", "properties": {"b": {}, "a": {}}}}},
    "regex": {"output": {"regex": "row [0-9]"}},
    "engine": {"model": {"engine": {"max_model_len": 90}, "allow_pickle": True}},
    "checks": {
        "checks": {"rules": ["id < 9"]},
        "gate": {"max_error_rate": 1.0},
        "retry": [{"temperature": 0.5}],
    },
}


def keys(folder: Path) -> str:
    """Recipe fingerprints and request keys of jobs, exact."""
    lines = []
    for number, (name, tables) in enumerate(JOBS.items()):
        at = folder / f"keys{number}"
        chats = _CHATS if name == "a whole chat" else ["row 0", "row 1", "ä ☃"]
        own = [{"own": {"max_tokens": 5 + n}} for n in range(3)]
        rows = [row if isinstance(row, dict) else {"text": row} for row in chats]
        write_rows(at, *({**row, **mine} for row, mine in zip(rows, own, strict=True)))
        job = job_of(at, **{"gate": {"max_error_rate": 1.0}, **tables})
        done = Done(["run", job, "--json"])
        lines.append(f"# {name}: exit {done.code}")
        frame = batchgen.read(job).select("gen_recipe", "gen_request_key").collect()
        lines += [f"{recipe} {key}" for recipe, key in frame.rows()]
    lines.append("# recipes of jobs that are shipped")
    for path in sorted((ROOT / "jobs").glob("*.toml")):
        recipe = re.search(r"^recipe +(\w+)$", Done(["check", str(path)]).stdout, re.MULTILINE)
        lines.append(f"{path.name} {recipe and recipe[1]}")
    return "\n".join(lines) + "\n"


# Options ----------------------------------------------------------------------------------------


def options() -> str:
    """Every key of a job file, from `batchgen schema`: its types and default, not its words."""
    schema = json.loads(Done(["schema"]).stdout)
    return json.dumps(_plain(schema), indent=1, sort_keys=True) + "\n"


def _plain(value: Any, name: str = "") -> Any:
    if isinstance(value, dict):
        drops = () if name in {"properties", "$defs"} else ("description", "title")
        return {key: _plain(item, key) for key, item in value.items() if key not in drops}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def made(folder: Path) -> dict[str, Callable[[], str]]:
    """Name of a golden file -> what makes its text. Those of situations share one run of them."""
    seen: list[Situations] = []

    def at() -> Situations:
        if not seen:
            seen.append(situations(folder))
        return seen[0]

    return {
        "help.txt": help_texts,
        "exit_codes.txt": lambda: at().codes_text(),
        "json_keys.txt": lambda: at().shapes_text(),
        "outputs.txt": lambda: outputs(folder),
        "options.json": options,
        "keys.txt": lambda: keys(folder),
    }


def write(names: Sequence[str]) -> None:
    """Rewrite these golden files, or all but `keys.txt`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, make in made(Path(folder)).items():
            if name in names or (not names and name != "keys.txt"):
                (HERE / name).write_text(make(), encoding="utf-8")


if __name__ == "__main__":
    write(sys.argv[1:])
