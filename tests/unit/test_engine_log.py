"""Finding the cause in logs as vLLM 0.32 writes them."""

import pytest

from batchgen.engine.death import find_cause, is_vague, log_tail

CORE_FAILED = """\
(EngineCore pid=77) ERROR 11-22 17:52:40 [core.py:1164] EngineCore failed to start.
(EngineCore pid=77) ERROR 11-22 17:52:40 [core.py:1164] Traceback (most recent call last):
(EngineCore pid=77) ERROR 11-22 17:52:40 [core.py:1164]     raise ValueError(
(EngineCore pid=77) ERROR 11-22 17:52:40 [core.py:1164] ValueError: To serve at least one request

Traceback (most recent call last):
  File "llm.py", line 3, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
batchgen.core.errors.EngineError: RuntimeError: Engine core initialization failed.
"""


def test_the_cause_is_found_below_vllms_own_summary(tmp_path):
    log = tmp_path / "log"
    log.write_text(CORE_FAILED)
    assert find_cause(log_tail(str(log), 0)) == "ValueError: To serve at least one request"


def test_lines_of_an_earlier_engine_do_not_count(tmp_path):
    log = tmp_path / "log"
    log.write_text(CORE_FAILED)
    start = log.stat().st_size
    with log.open("a") as file:
        file.write("INFO 11-22 17:52:40 [core.py:1] all is well\n")
    assert log_tail(str(log), start) == ["all is well"]
    assert find_cause(log_tail(str(log), start)) is None


@pytest.mark.parametrize(
    "line",
    [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "vllm.exceptions.VLLMValidationError: too long",
        "ValueError: bad",
    ],
)
def test_exceptions_of_all_names_are_causes(line):
    assert find_cause(["before", line, "  after"]) == line


@pytest.mark.parametrize("line", ["Errors: 3", "raise ValueError: x", "    ValueError: x", "Error"])
def test_what_only_looks_like_an_exception_is_none(line):
    assert find_cause([line]) is None


def test_a_missing_log_has_no_lines(tmp_path):
    assert log_tail(None, 0) == []
    assert log_tail(str(tmp_path / "none"), 0) == []


def test_vllms_summaries_are_known():
    assert is_vague("EngineDeadError: EngineCore encountered an issue. See stack trace (above)")
    assert not is_vague("ValueError: To serve at least one request")
