"""What a person sees, on a terminal and in a log."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import termios
from typing import TYPE_CHECKING

import pytest

from batchgen.core.records import EngineStats, RowError
from batchgen.pipeline.compute import Monitor
from batchgen.pipeline.context import RunContext, StopSwitch
from batchgen.pipeline.stats import Progress, RunStats, duration
from batchgen.store.ledger import Ledger
from batchgen.store.runs import RunLock, RunLog
from tests import fakes
from tests.fakes import batch, results

if TYPE_CHECKING:
    from collections.abc import Callable


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def sample(elapsed_s: float, **changes):
    stats = RunStats(0.0, 2000)
    return {
        **stats.sample(elapsed_s, 0, EngineStats()),
        "num_ok": 1,
        "requests_per_s": 12.4,
        "prompt_tokens_per_s": 12345.6,
        "output_tokens_per_s": 678.9,
        "num_in_flight": 1024,
        **changes,
    }


def lines(stream):
    return stream.getvalue().splitlines()


def test_in_a_log_there_is_a_plain_line_at_once_and_then_every_half_minute():
    stream = io.StringIO()
    with Progress(2000, 0, stream=stream) as progress:
        for elapsed_s in (0.0, 10.0, 29.9, 30.0, 45.0, 60.5):
            progress.update(sample(elapsed_s), round(elapsed_s), None)
    figures = "12 rows/s, 12,346 tok/s in, 679 out, 1,024 in flight"
    assert lines(stream) == [
        f"batchgen: 0/2,000 rows, {figures}",
        f"batchgen: 30/2,000 rows, {figures}",
        f"batchgen: 60/2,000 rows, {figures}",
    ]


def test_a_line_tells_kv_cache_errors_and_time_left_where_they_are_known():
    stream = io.StringIO()
    with Progress(2000, 0, stream=stream) as progress:
        progress.update(
            sample(0.0, kv_cache_usage=0.873, gpu_busy=0.5512, num_errors=1500), 1700, 185.0
        )
    assert lines(stream) == [
        "batchgen: 1,700/2,000 rows, 12 rows/s, 12,346 tok/s in, 679 out, 1,024 in flight, "
        "KV 87%, GPU 55%, 1,500 errors, 3 min 05 s left"
    ]


def test_a_line_of_a_fleet_tells_how_many_replicas_are_up():
    stream = io.StringIO()
    with Progress(2000, 0, stream=stream) as progress:
        progress.update(sample(0.0, num_replicas=8, num_replicas_up=7), 0, None)
    assert lines(stream)[0].endswith("1,024 in flight, 7/8 replicas")


def test_in_flight_is_what_the_scheduler_holds_not_what_is_tokenized_ahead_of_it():
    stream = io.StringIO()
    with Progress(2000, 0, stream=stream) as progress:
        progress.update(sample(0.0, num_in_flight=1152, num_running=64, num_waiting=62), 0, None)
        progress.update(sample(30.0, num_in_flight=0, num_running=64, num_waiting=0), 0, None)
    assert [line.rpartition(", ")[2] for line in lines(stream)] == ["126 in flight", "0 in flight"]


def test_while_no_engine_is_up_there_are_no_figures():
    stream = io.StringIO()
    with Progress(2000, 0, stream=stream) as progress:
        progress.update(sample(0.0, num_ok=0), 12, None, "starting the engine")
        progress.update(sample(30.0), 40, None)
    assert lines(stream) == [
        "batchgen: 12/2,000 rows, starting the engine",
        "batchgen: 40/2,000 rows, 12 rows/s, 12,346 tok/s in, 679 out, 1,024 in flight",
    ]


def test_the_bar_has_figures_from_when_an_engine_is_up_with_or_without_answers():
    stream = Terminal()
    with Progress(2000, 0, stream=stream) as progress:
        progress.update(sample(0.0, num_ok=0), 12, None, "starting the engines")
        assert stream.getvalue().rpartition("\r")[2].startswith("starting the engines")
        assert "rows/s" not in stream.getvalue()
        progress.update(sample(30.0, num_ok=0), 12, None)
    last = stream.getvalue().rpartition("\r")[2]
    assert last.startswith("rows   1%")
    assert "12 rows/s" in last


def test_a_run_says_that_its_engine_starts_until_it_is_up(storage):
    stream = io.StringIO()
    context = RunContext(
        job=fakes.job(),
        run_id="run-a",
        storage=storage,
        ledger=Ledger(storage),
        lock=RunLock(storage, "run-a"),
        log=RunLog(storage, "run-a"),
        stats=RunStats(0.0, 2000),
        stop=StopSwitch(),
    )
    states = iter(["starting the engine", "running"])

    def look(now_s):
        return sample(now_s), next(states), None

    with Progress(2000, 0, stream=stream) as progress:
        watch = Monitor(context, look, progress)
        watch.show(0.0, is_last=False)
        watch.show(40.0, is_last=False)
    assert lines(stream)[0] == "batchgen: 0/2,000 rows, starting the engine"
    assert "12 rows/s" in lines(stream)[1]


def test_a_note_is_a_line_of_its_own():
    stream = io.StringIO()
    with Progress(10, 0, stream=stream) as progress:
        progress.note("engine is up")
    assert lines(stream) == ["batchgen: engine is up"]


def test_on_a_terminal_there_is_a_bar_that_begins_where_earlier_runs_ended():
    stream = Terminal()
    with Progress(200, 50, stream=stream) as progress:
        assert "starting the engine  25%" in stream.getvalue()
        progress.update(sample(1.0), 100, None)
        progress.note("a note")
    shown = stream.getvalue()
    assert "rows  50%" in shown
    assert "100/200" in shown
    assert "12 rows/s" in shown
    assert "batchgen: a note\n" in shown


def test_the_bar_does_not_say_starting_while_rows_end_as_errors():
    stream = Terminal()
    with Progress(200, 0, stream=stream) as progress:
        progress.update(sample(1.0, num_ok=0, num_errors=5), 5, None)
    assert stream.getvalue().rpartition("\r")[2].startswith("rows")


def test_a_sample_of_run_stats_can_be_shown():
    stats = RunStats(0.0, 10)
    for result in results(batch([0, 1]), errors={1: RowError("x", "x")}):
        stats.note_ends([result])
    stream = io.StringIO()
    with Progress(10, 0, stream=stream) as progress:
        progress.update(stats.sample(1.0, 3, EngineStats()), 2, stats.eta_s(1.0))
    assert lines(stream) == [
        "batchgen: 2/10 rows, 0 rows/s, 0 tok/s in, 0 out, 3 in flight, 1 errors"
    ]


def test_no_speed_is_told_where_nothing_is_asked_of_an_engine():
    plain, terminal = io.StringIO(), Terminal()
    idle = sample(1.0, requests_per_s=0.0, num_in_flight=0, num_errors=0)
    for stream in (plain, terminal):
        with Progress(2, 0, stream=stream) as progress:
            progress.update({**idle, "kv_cache_usage": None, "gpu_busy": None}, 2, None)
    assert lines(plain) == ["batchgen: 2/2 rows"]
    assert "2/2" in terminal.getvalue()
    assert "/s" not in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0.0 s"),
        (9.94, "9.9 s"),
        (10.2, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (185.0, "3 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (7620.0, "2 h 07 min"),
        (360000.0, "100 h 00 min"),
    ],
)
def test_durations_read_like_this(seconds, text):
    assert duration(seconds) == text


def frames_on(columns: int, show: Callable[[Progress], None], num_rows: int = 2000) -> list[str]:
    """What a terminal of so many columns gets, frame by frame."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(slave, "w", encoding="utf-8") as terminal, os.fdopen(master, "rb") as seen:
        with Progress(num_rows, 0, stream=terminal) as progress:
            show(progress)
        terminal.write("\nthe end")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"the end"):  # The kernel hands it over in pieces.
            shown += os.read(seen.fileno(), 1 << 20)
    shown = shown.removesuffix(b"the end")
    return [frame.rstrip() for frame in re.split(r"[\r\n]+", shown.decode()) if frame.strip()]


BUSY = {"num_errors": 1500, "kv_cache_usage": 0.87, "gpu_busy": 0.55, "num_ok": 500}
WHOLE = (
    r"(\d+ min \d\d s left|12 rows/s|1,500 errors|GPU 55%|KV 87%|1,024 in flight|"
    r"12,346 tok/s in|679 out|after [\d.]+ (s|min \d\d s)|[78]/8 replicas)"
)
FRAME = rf"rows +\d+%\|[^|]{{10,}}\| \d+/\d+(, {WHOLE})*"


@pytest.mark.parametrize("columns", [200, 100, 80, 56, 48])
@pytest.mark.parametrize("num_rows", [2000, 12_345_678])
def test_the_bar_is_whole_at_any_width(columns: int, num_rows: int) -> None:
    fleet = {"num_replicas": 8, "num_replicas_up": 7}

    def show(progress: Progress) -> None:
        progress.update(sample(0.0, num_ok=0), 21, 1917.0, "starting the engine")
        for elapsed_s in (30.0, 90.0):
            progress.update(sample(elapsed_s, **BUSY, **fleet), 1028, 185.0)

    frames = frames_on(columns, show, num_rows)
    assert max(map(len, frames)) < columns
    busy = [frame for frame in frames if frame.startswith("rows")]
    assert busy
    assert [frame for frame in busy if not re.fullmatch(FRAME, frame)] == []
    if columns >= 80:
        assert all("3 min 05 s left, 12 rows/s" in frame for frame in busy)
    if columns == 200:
        assert all("tok/s in, 679 out" in frame and "7/8 replicas" in frame for frame in busy)


def test_while_the_engine_starts_no_time_left_is_told_whatever_has_ended() -> None:
    def show(progress: Progress) -> None:
        progress.update(sample(20.0, num_ok=0, num_errors=21), 21, 1917.0, "starting the engine")

    frames = frames_on(80, show)
    assert [frame for frame in frames if "left" in frame or "<" in frame] == []
    assert frames[-1].startswith("starting the engine   1%|")
    assert frames[-1].endswith("| 21/2000, after 20 s")


def test_the_last_frame_has_all_rows_and_no_time_left() -> None:
    frames = frames_on(56, lambda progress: progress.update(sample(83.0), 2000, 0.0))
    assert re.fullmatch(r"rows 100%\|█+\| 2000/2000, 12 rows/s", frames[-1])


class Aside:
    """Some rows wait for another row's answer."""

    num_set_aside = 12


def test_rows_that_wait_for_another_rows_answer_need_no_time(storage) -> None:
    stream = io.StringIO()
    context = RunContext(
        job=fakes.job(),
        run_id="run-a",
        storage=storage,
        ledger=Ledger(storage),
        lock=RunLock(storage, "run-a"),
        log=RunLog(storage, "run-a"),
        stats=RunStats(0.0, 2000, num_resumed=1988),
        stop=StopSwitch(),
    )
    with Progress(2000, 0, stream=stream) as progress:
        Monitor(context, lambda now_s: (sample(now_s), "running", None), progress, Aside()).show(
            9.0, is_last=True
        )
    assert lines(stream)[-1].startswith("batchgen: 2,000/2,000 rows, ")
