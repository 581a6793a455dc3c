"""What a person is told to do next works for them: no text spells a command out by itself."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import batchgen
from batchgen.cli import cli
from batchgen.core.runtime import _FUNCTIONS, Caller, _keywords, called, command, option, printable

PACKAGE = Path(batchgen.__file__).parent
VERBS = "|".join(cli.commands)
OPTIONS = sorted(
    {
        name
        for one in cli.commands.values()
        for parameter in one.params
        for name in parameter.opts
        if isinstance(parameter, click.Option) and name.startswith("--")
    }
)
SPELLED = re.compile(rf"batchgen ({VERBS})\b|(?<![\w-])({'|'.join(OPTIONS)})(?![\w-])")
SEAM = {"command", "option", "flag"}
ABOUT_ITSELF = {
    "Written by `batchgen tune`; used by `batchgen run` while all of [key] but the",
    "versions fits. What the job file or --set says wins. Remove the file to do without.",
}
"""Comments of a tuned file, which are of no one job."""
NAMES = {"--rate", "--gpu-cost", "--on", "--json", "--new-key", "--host", "--port"}
"""Places of errors, and what is looked for in a command line: alone, and no advice."""


def docstrings(tree: ast.AST) -> set[ast.expr]:
    """Texts that nobody is told: statements of their own."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def given_to_the_seam(tree: ast.AST) -> set[ast.AST]:
    """Texts that are parts of a command there, and help texts of options."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            name = node.func.id if isinstance(node.func, ast.Name) else name
            if name in SEAM:
                found |= {
                    inner
                    for argument in [*node.args, *node.keywords]
                    for inner in ast.walk(argument)
                }
    return found


def spelled_out(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = docstrings(tree) | given_to_the_seam(tree)
    texts = (
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in skipped
    )
    return [t for t in texts if SPELLED.search(t) and t not in ABOUT_ITSELF | NAMES]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_no_text_spells_out_a_command_or_an_option(path: Path) -> None:
    own = set(OPTIONS) if path.name == "runtime.py" else set()
    assert set(spelled_out(path)) <= own


@pytest.mark.parametrize(
    "text", ['f"run `batchgen show {job} --errors`"', '"with --retry-errors"', '"(--set a.b=c)"']
)
def test_the_test_finds_what_is_spelled_out(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.py"
    path.write_text(f'"""Of `batchgen run`."""\nX = {text}\n', encoding="utf-8")
    assert spelled_out(path)


HOSTILE = "it's a job; $(rm -rf) `x`.toml"


def test_every_function_of_the_package_is_a_command_that_hints_can_name() -> None:
    verbs = set(_FUNCTIONS.values())
    assert verbs == {name for name in batchgen.__all__ if name.islower()} - {
        "errors",
        "compare",
        "read",
        "rollback",
        "__version__",
    }
    assert set(_FUNCTIONS) <= set(cli.commands)
    for verb, name in _FUNCTIONS.items():
        keywords = inspect.signature(getattr(batchgen, name)).parameters
        flags = [p for p in cli.commands[verb].params if isinstance(p, click.Option)]
        for flag in flags:
            if flag.opts[0] not in {"--json", "--max-runtime", "--until", "--show", "--watch"}:
                told = _keywords([flag.opts[0]])[0].partition("=")[0]
                assert told in keywords, f"{name} has no {told}"


NO_JOB = {"schema", "compare", "engine", "run-batch", "serve"}


@pytest.mark.parametrize("verb", sorted(cli.commands.keys() - NO_JOB))
def test_the_shell_gets_the_jobs_name_with_what_was_set(verb: str) -> None:
    given = Caller(HOSTILE, overrides=["prompt.user=a b", "output.path=x"], run_date="2026-01-31")
    with called(given):
        told = command(verb, "--json")
    program, *words = shlex.split(told)
    assert (program, words[:2]) == ("batchgen", [verb, HOSTILE])
    # Click remembers the names with which help is first asked for.
    how = {**cli.context_settings, "resilient_parsing": True}
    context = cli.commands[verb].make_context(verb, words[1:], **how)
    assert context.params["overrides"] == ("prompt.user=a b", "output.path=x")
    assert str(context.params["run_date"]) == "2026-01-31 00:00:00"


NAMES_OF_FILES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=30, deadline=None)
@given(
    name=NAMES_OF_FILES.map(os.fsencode)
    | st.binary(min_size=1).filter(lambda name: b"\0" not in name)
)
@example(name=b"caf\xe9 \x1b[2J\xe2\x80\xae'\\x0a\n.toml")
def test_a_name_that_would_steer_the_terminal_is_quoted_by_its_bytes(name: bytes) -> None:
    with called(Caller(os.fsdecode(name))):
        told = command("show")
    assert printable(told, keep="") == told
    script = f'batchgen() {{ printf %s "$2"; }}; {told}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert done.stdout == name


def test_an_output_folder_needs_no_more_but_run_needs_a_job_file() -> None:
    with called(Caller("out", is_folder=True, overrides=["output.path=out"])):
        assert command("show", "--errors") == "batchgen show out --errors"
        assert command("run", "--retry-errors") == "batchgen run JOB --retry-errors"


def test_python_gets_its_own_words() -> None:
    given = Caller("a b.toml", overrides=["output.path=x"], run_date="2026-01-31")
    in_python = Caller(
        given.job, overrides=given.overrides, run_date=given.run_date, python_job=repr(given.job)
    )
    with called(in_python):
        assert command("run", "--retry-errors") == (
            "batchgen.run('a b.toml', overrides={'output.path': 'x'}, run_date='2026-01-31', "
            "retry_errors=True)"
        )
        assert option("--accept-recipe", "--only-errors") == "accept_recipe=True, only_errors=True"
        assert (option("--no-tuned"), option("--set")) == ("tuned=False", "overrides")
        assert command("verify") == (
            "batchgen verify 'a b.toml' --set output.path=x --date 2026-01-31"
        )
        assert command("try", "--set", "output.path=y", "-n", "20") == (
            "batchgen.try_out('a b.toml', overrides={'output.path': 'y'}, "
            "run_date='2026-01-31', num_rows=20)"
        )
        assert option("--rate", "250rows/s") == "rate='250rows/s'"
        assert (option("--error-type"), option("--gpu")) == ("error_type", "gpu")
    with called(Caller(python_job="job")):
        assert command("show", "--errors") == "batchgen.show(job, errors=True)"
    with called(given):
        assert option("--accept-recipe", "--only-errors") == "--accept-recipe --only-errors"
    assert command("run") == "batchgen run JOB"
