"""Ray's long stories in one line. Texts as Ray 2.60 has told them."""

from __future__ import annotations

from batchgen.cluster.machines import (
    counted,
    death_told,
    end_of_traceback,
    one_line,
    refusal,
)

HEAD = """The actor died unexpectedly before finishing this task.
\tclass_name: _Seat
\tactor_id: 9eba243578fb7bf986ebda9c01000000
\tpid: 29106
\tnamespace: c18e9e73-0479-43b2-ae2a-df8407de1872
\tip: 10.0.0.7
"""
EXIT = (
    "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR "
    "Worker exit detail: "
)
CRASH = (
    "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes "
    "include: (1) the process was killed by the OOM killer due to high memory usage, (2) ray stop "
    "--force was called, or (3) the worker crashed unexpectedly due to SIGSEGV or another "
    "unexpected error."
)
NODE = """The actor died because its node has died. Node Id: 40a82459
\tthe actor's node was terminated unexpectedly: health check failed due to missing heartbeats"""
MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 10.0.0.7, ID: 5a80438a) was 22.9GB used / 23.54GB limit (0.953426)
OOM kill reason: Memory usage 1350414336B exceeded threshold of 1263825536B"""
CREATION = """The actor died because of an error raised in its creation task, \
\x1b[36mray::_Seat.__init__()\x1b[39m (pid=29424, ip=10.0.0.7)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
RuntimeError: The actor with name _Seat failed to import on the worker. This may be because needed \
library dependencies are not installed in the worker environment:

\x1b[36mray::_Seat.__init__()\x1b[39m (pid=468, ip=10.0.0.7, actor_id=17625ce2ab47ac7e)
                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^
ModuleNotFoundError: No module named 'batchgen'"""


def test_a_crash() -> None:
    told = "its process on 10.0.0.7 was killed or crashed, often the kernel out of memory"
    assert death_told(HEAD + EXIT + CRASH) == told


def test_an_exit_code() -> None:
    detail = "Worker exits unexpectedly. Worker exits with an exit code 4."
    assert death_told(HEAD + EXIT + detail) == f"its process on 10.0.0.7 ended: {detail}"


def test_a_node_that_died() -> None:
    told = death_told(HEAD + NODE)
    assert told.startswith("its process on 10.0.0.7 ended: The actor died because its node has")
    assert "health check failed due to missing heartbeats" in told


def test_somebody_killed_it() -> None:
    reason = "The actor is dead because it was killed by `ray.kill`."
    assert death_told(HEAD + reason) == f"its process on 10.0.0.7 ended: {reason}"


def test_it_could_not_be_made() -> None:
    told = "it does not start: ModuleNotFoundError: No module named 'batchgen'; the same "
    assert death_told(CREATION) == told + "batchgen has to be installed on every node"
    with_code = "raised in its creation task\n  File\n    x = 1\nValueError: a"
    assert death_told(with_code) == "it does not start: ValueError: a"


def test_words_not_known_yet_are_passed_on() -> None:
    told = death_told(HEAD + "A new kind\nof end.")
    assert told == "its process on 10.0.0.7 ended: A new kind of end."


def test_out_of_memory() -> None:
    assert "Memory on the node (IP: 10.0.0.7, ID: 5a80438a) was 22.9GB used" in death_told(MEMORY)


def test_the_end_of_a_traceback() -> None:
    assert end_of_traceback("  File\n    x = 1\nValueError: a\nb") == "ValueError: a b"
    assert end_of_traceback("plain") == "plain"
    assert end_of_traceback("  only\n  code") == "only code"


def test_one_line_is_short() -> None:
    assert one_line(" a\n\tb ") == "a b"
    assert len(one_line("x" * 1000)) == 400


def test_a_refusal_says_what_to_do() -> None:
    assert refusal(None, OSError("full")) == "Ray does not start on this machine: full"
    assert "`ray start --address=HOST:6379`" in refusal("auto", ConnectionError("no"))


def test_counting() -> None:
    assert [counted(n, "node") for n in (0, 1, 2.5)] == ["0 nodes", "1 node", "2.5 nodes"]
