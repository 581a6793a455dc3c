"""The build of the package stays within its goals: `python -m tests.house` prints all figures."""

from __future__ import annotations

import pytest

from tests.house import Figure, code_lines, figures, table, traced

OPEN: dict[str, float] = {
    "lines of code": 31_045,
    "modules": 163,
    "layers": 9,
    "modules of a room": 15,
    "modules of engine, of pipeline": 20,
    "modules that an echo job imports": 100,
    "modules that a row passes": 47,
    "modules that open result files": 2,
}
"""Goals not reached yet -> today's figure: it may only become smaller. The goals are of the house
without its later doors; what each of these cost is in docs/internals, "What the lines are for"."""

NAMES = (
    *("lines of code", "modules", "layers", "modules of a room"),
    *("modules of engine, of pipeline", "lines of a module", "lines of a function, median"),
    *("lines of a function, 9 in 10", "lines of a function, longest"),
    *("modules that an echo job imports", "modules of the cluster among them"),
    *("modules that a row passes", "frames from the command line to step"),
    *("wrappers of the engine's protocol", "isinstance of a kind of engine"),
    *("modules that open result files", "words of the README"),
)


def found() -> dict[str, Figure]:
    return {one.name: one for one in figures()}


@pytest.mark.parametrize("name", NAMES)
def test_the_house_is_within_its_goals(name: str) -> None:
    one = found()[name]
    assert one.value <= max(one.goal, OPEN.get(name, 0)), f"goal {one.goal:,}"


def test_every_figure_of_the_table_is_held() -> None:
    assert set(found()) == set(NAMES)
    assert all(name in table() for name in NAMES)


def test_the_trace_is_of_a_run_that_read_answered_and_published() -> None:
    rooms = {name.split(".")[1] for name in traced()["passed"]}
    assert {"source", "prompt", "engine", "answers", "store", "pipeline"} <= rooms
    functions = [function for _, function in traced()["stack"]]
    assert (functions[0], functions[-1]) == ("step", "main")


def test_docstrings_comments_and_blanks_are_no_code() -> None:
    text = '''"""Of a
module."""

X = """a
text"""


def f():
    """Do."""
    # Why.
    return (
        1
    )
'''
    assert len(code_lines(text)) == 2 + 1 + 3
