"""What a process is told by batchgen and by Python: streams that never fail, few collections.

What a person can do next is told in the words of the door they came by: the shell needs the job's
real name with `--set` and `--date` as they were given, Python its own function and keywords. No
text spells a command out, all ask `command` or `option`.

Words that nobody can read never end the work: a reader that went away, a closed terminal or a
full disk under stderr or stdout costs what was to be said, and nothing else. `say` and `STDERR`
are for any program that calls batchgen; `own_streams` is for processes that are batchgen's own.

Python's collector of reference cycles is told that rows make none. Files are opened such that
nothing is ever waited for.
"""

from __future__ import annotations

import errno
import gc
import html
import io
import json
import os
import shlex
import signal
import stat
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

Json = TypeVar("Json", dict[str, Any], list[Any])
_YOUNG_OBJECTS = 50_000
_UNHEARD = (OSError, ValueError)
"""What a stream raises that cannot be written: ValueError, if it is closed."""


_PLAIN = {"Zs", "Co", "Cn"}
"""Categories of characters beside `str.isprintable` that move nothing on a terminal."""
_JOINERS = "\u200c\u200d"
"""Part of words in some scripts, and of emoji."""


def printable(text: str, keep: str = "\n\t") -> str:
    """Escape what would steer a terminal, or show text in another order than it has.

    Control characters (ESC, C0, C1, a carriage return), direction overrides and isolates,
    characters that cannot be seen, and halves of surrogate pairs. Whatever batchgen prints of
    data, of names of files or of other programs' texts goes through here.

    Args:
        text: Of anybody.
        keep: Control characters that stay.
    """
    if text.translate(dict.fromkeys(map(ord, keep), " ")).isprintable():
        return text
    return "".join(c if _is_harmless(c) or c in keep else _escaped(c) for c in text)


def _is_harmless(character: str) -> bool:
    is_plain = character in _JOINERS or unicodedata.category(character) in _PLAIN
    return character.isprintable() or is_plain


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


@dataclass(frozen=True, slots=True)
class Caller:
    """How a person named the job that is at work."""

    job: str = "JOB"
    """Path of the job file, or of an output folder."""
    is_folder: bool = False
    """Whether it is a folder: `run` and others need the job file."""
    overrides: Sequence[str] = ()
    """As `--set` takes them."""
    run_date: str | None = None
    """As `--date` takes it."""
    python_job: str | None = None
    """What Python gave as the job, as an expression; None: it was the shell."""


_UNKNOWN = Caller()
_CALLER = ContextVar("caller", default=_UNKNOWN)
_OF_FOLDERS = frozenset(
    {"status", "show", "verify", "snapshots", "prune", "diff", "report", "compare"}
)
"""Commands that take an output folder as well."""
_FUNCTIONS = {
    **{verb: verb for verb in ("run", "check", "plan", "doctor", "status", "show")},
    **{verb: verb for verb in ("report", "score")},
    "try": "try_out",
}
"""Command -> function of the package."""
_VALUED = (
    *("--columns", "--error-type", "--on", "--where", "--seed", "--rate", "--gpu-cost"),
    *("--gpu", "--memory", "--capability", "--count", "--output"),
    *("--gold", "--answer", "--precision", "--snapshot", "--to"),
)
_KEYWORDS = {
    "--set": "overrides",
    "--date": "run_date",
    "--no-tuned": "tuned=False",
    "-n": "num_rows",
    "--no-rows": "rows=False",
    "--json": "as_dict()",
    **{name: name[2:].replace("-", "_") for name in _VALUED},
}
"""Option -> what it is for Python, where it is no flag."""


@contextmanager
def called(caller: Caller) -> Iterator[None]:
    """Have `command` and `option` speak of this job until the block ends, in this thread."""
    token = _CALLER.set(caller)
    try:
        yield
    finally:
        _CALLER.reset(token)


def command(verb: str, *options: str) -> str:
    """Write a command that does something with the job at work, to be copied as it is.

    Args:
        verb: Of the command line. Where Python called, what it has a function for is a call of it.
        options: Words of the command line that follow the job.
    """
    caller = _CALLER.get()
    if caller.python_job is not None and verb in _FUNCTIONS:
        left = iter(options)
        others, texts = list[str](), list(caller.overrides)
        for word in left:
            if word == "--set":
                texts.append(next(left))
            else:
                others.append(word)
        sets = {key: toml_value(text) for key, _, text in (one.partition("=") for one in texts)}
        given = {"overrides": sets, "run_date": caller.run_date}
        told = [f"{name}={value!r}" for name, value in given.items() if value]
        arguments = [caller.python_job, *told, *_keywords(others)]
        return f"batchgen.{_FUNCTIONS[verb]}({', '.join(arguments)})"
    words = [caller.job]
    if caller.is_folder and verb not in _OF_FOLDERS:
        words = [_UNKNOWN.job]
    elif not caller.is_folder:
        words += [word for text in caller.overrides for word in ("--set", text)]
        words += ["--date", caller.run_date] if caller.run_date else []
    return " ".join(map(_quoted, ["batchgen", verb, *words, *options]))


def toml_value(text: str) -> Any:  # noqa: ANN401 - any TOML value, checked by the models
    """Read a value as `--set` takes it: TOML's, else a text; dates are texts."""
    try:
        value = tomllib.loads(f"value = {text.strip()}")["value"]
        return json.loads(json.dumps(value, default=str))
    except (ValueError, RecursionError):
        return text.strip()


def job_name() -> str:
    """Name the job at work for an error text: its file, or what Python called it."""
    caller = _CALLER.get()
    return caller.job if caller.job != _UNKNOWN.job and not caller.is_folder else "job"


def _quoted(word: str) -> str:
    """Quote a word for a shell; where it would steer the terminal, by the bytes of its signs."""
    if printable(word, keep="") == word:
        return shlex.quote(word)
    signs = (c if _is_harmless(c) and c not in "\\'" else _as_bytes(c) for c in word)
    return f"$'{''.join(signs)}'"


def _as_bytes(character: str) -> str:
    is_byte = "\udc80" <= character <= "\udcff"  # As Python reads names that are not UTF-8.
    encoded = character.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in encoded)


def option(*names: str) -> str:
    """Write options, such as `--retry-errors` or `--rate 250rows/s`; for Python as keywords."""
    is_python = _CALLER.get().python_job is not None
    return ", ".join(_keywords(names)) if is_python else " ".join(names)


def _keywords(words: Sequence[str]) -> list[str]:
    """Words of a command line as Python's keywords; a value goes to the option before it."""
    found: list[str] = []
    for word in words:
        if not word.startswith("-") and found:
            found[-1] += f"={int(word) if word.isdecimal() else repr(word)}"
        else:
            flag = f"{word.removeprefix('--').replace('-', '_')}=True"
            found.append(_KEYWORDS.get(word, flag))
    return found


class Told:
    """A result that Python shows as the shell prints it, also in a notebook.

    Hints in it speak of the job that was at work when it was made.
    """

    __slots__ = ("_caller",)

    def __new__(cls, *_: object, **__: object) -> Self:
        """Remember how the job was named."""
        made = super().__new__(cls)
        object.__setattr__(made, "_caller", _CALLER.get())
        return made

    def as_text(self) -> str:
        """The lines that a person reads."""
        raise NotImplementedError

    def __repr__(self) -> str:
        with called(self._caller):  # type: ignore[attr-defined] # set in `__new__`
            return printable(self.as_text())

    def _repr_html_(self) -> str:
        """For notebooks; what comes from data is escaped, as all is."""
        return f"<pre>{html.escape(repr(self))}</pre>"


class Stderr:
    """The stderr of the moment as a stream to write to, which never raises."""

    def write(self, text: str) -> int:
        """Write what can be written."""
        if sys.stderr is not None:
            with suppress(*_UNHEARD):
                sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Hand it on now."""
        if sys.stderr is not None:
            with suppress(*_UNHEARD):
                sys.stderr.flush()

    def isatty(self) -> bool:
        """Tell whether a person sits before it."""
        with suppress(*_UNHEARD):
            return sys.stderr is not None and sys.stderr.isatty()
        return False

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - `fileno` and what else tqdm asks for
        """Look up anything else in the stream itself."""
        return getattr(sys.stderr, name)


STDERR = Stderr()


def say(text: str) -> None:
    """Write a line of batchgen's to stderr, if it can be written."""
    STDERR.write(f"batchgen: {printable(text)}\n")
    STDERR.flush()


def stop_on_signals(ask: Callable[[], str | None], *, is_shell: bool = True) -> None:
    """Have SIGTERM, Ctrl-C and the end of the terminal ask for a stop, and answer at once.

    Args:
        ask: Asks for it. Returns what is said of it, if anything; `{again}` in it is what the
            person does once more.
        is_shell: False: Ctrl-C alone, as of a notebook's Stop.
    """

    def handle(signum: int, _: object) -> None:
        if text := ask():
            again = "Ctrl-C" if signum == signal.SIGINT else signal.Signals(signum).name
            line = f"batchgen: {text.format(again=f'{again} again')}\n"
            # To the descriptor: sys.stderr may be in the middle of a line of the progress, and
            # refuses to be entered again.
            with suppress(OSError):
                os.write(2, ("\n" if os.isatty(2) else "").encode() + line.encode())

    signal.signal(signal.SIGINT, handle)
    if not is_shell:
        return
    signal.signal(signal.SIGTERM, handle)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # As under nohup.
        signal.signal(signal.SIGHUP, handle)


class _Lossy(io.FileIO):
    """A file descriptor that drops what it cannot write, and remembers why."""

    lost: OSError | None = None

    def write(self, data: Any, /) -> int:  # noqa: ANN401 - any buffer
        """Write; what cannot be written, or only later, counts as written."""
        try:
            written = super().write(data)
        except OSError as error:
            self.lost = error
            written = None
        return memoryview(data).nbytes if written is None else written


def own_streams() -> None:
    """Make stdin, stdout and stderr of this process such that none of them can fail.

    Those that were closed lead nowhere from now on; otherwise the next file that is opened would
    have their number, and get what is meant for them. To be called first.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest number that is free: this one.
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__"):  # Nobody has put another in its place.
            setattr(sys, name, _unfailing(number, stream))


def _unfailing(number: int, stream: Any) -> io.TextIOWrapper:  # noqa: ANN401 - a text stream, or None
    raw = _Lossy(number, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=getattr(stream, "encoding", None) or "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or os.isatty(number),
        write_through=getattr(stream, "write_through", False),
    )


def lost_output() -> str | None:
    """Why what was printed on stdout has not arrived; None if it has, or its reader had enough."""
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    if not isinstance(raw, _Lossy):
        return None
    sys.stdout.flush()
    return raw.lost.strerror if raw.lost and raw.lost.errno != errno.EPIPE else None


@contextmanager
def rare_collection() -> Iterator[None]:
    """Let the collector begin 70 times more rarely than Python's default, until the block ends.

    It begins when so many more objects were made than freed, and a run holds hundreds of
    thousands, those of rows in flight and of the open part: to walk through them in vain took a
    third of the time of a run with the echo engine. Cycles are collected all the same.
    """
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def collect_rarely(*, freeze: bool = False) -> None:
    """Do as `rare_collection` does, until the process ends.

    Args:
        freeze: Never look again at what there is now: modules, and a model's classes.
    """
    young, middle, old = gc.get_threshold()
    gc.set_threshold(max(young, _YOUNG_OBJECTS) if young else 0, middle, old)  # 0: it is off.
    if freeze:
        gc.collect()
        gc.freeze()


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_file(path: Path) -> None:
    """Refuse a pipe, a socket or a device, which may give nothing when it is opened, or never end.

    Raises:
        OSError: It is one, or is not there.
    """
    kind = _KINDS.get(stat.S_IFMT(path.stat().st_mode))
    if kind is not None:
        raise OSError(errno.ENODEV, f"is {kind}, expected a file", str(path))


def open_file(path: Path) -> io.BufferedReader:
    """Open a file to read.

    Raises:
        OSError: It is no file, or cannot be opened.
    """
    check_file(path)
    return path.open("rb")


def read_file(path: Path) -> bytes:
    """Read a file whole.

    Raises:
        OSError: It is no file, or cannot be read.
    """
    with open_file(path) as file:
        return file.read()


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read a text whole, its line ends as Python has them.

    Raises:
        OSError: It is no file, or cannot be read.
        UnicodeDecodeError: It is not of this encoding.
    """
    with io.TextIOWrapper(open_file(path), encoding=encoding) as file:
        return file.read()


def read_json(path: Path, kind: type[Json]) -> Json:
    """Read a JSON file of a model; empty if it is not there, damaged, or not of the kind."""
    found = None
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(read_file(path))
    return found if isinstance(found, kind) else kind()


def size_text(num_bytes: float) -> str:
    """Write a size for people."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
