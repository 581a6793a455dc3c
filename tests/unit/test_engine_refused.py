"""Which errors of vLLM's start are the job file's fault. The classes here are named as vLLM's."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from batchgen.core.errors import ConfigError, EngineError
from batchgen.engine.vllm.settings import known_keywords, read_keywords, start_error


@dataclass
class SchedulerConfig:
    max_num_seqs: int = Field(1, ge=1)
    dtype: Literal["auto", "half"] | float = "auto"
    folder: str = ""

    def __post_init__(self):
        if self.max_num_seqs == 7:
            msg = "max_num_batched_tokens (3) must be greater than\nor equal to max_num_seqs (7)."
            raise ValueError(msg)
        if self.folder:
            try:
                Path(self.folder).read_text()
            except OSError as exc:
                msg = "Invalid repository ID or local directory specified"
                raise ValueError(msg) from exc


class EngineArgs:
    def __init__(self, max_num_seqs=1, dtype="auto", folder="", broken=None):
        self.fields = {"max_num_seqs": max_num_seqs, "dtype": dtype, "folder": folder}
        self.broken = broken

    def create_engine_config(self):
        if self.broken == "in config":
            msg = "no device"
            raise RuntimeError(msg)
        if self.broken == "gpu gone":
            msg = "World size (2) is larger than the number of available GPUs (1) in this node."
            raise ValueError(msg)
        return SchedulerConfig(**self.fields)


class LLMEngine:
    @classmethod
    def from_engine_args(cls, args):
        args.create_engine_config()
        if args.broken == "loading":
            msg = "Free memory on device (1/2 GiB) on startup is less than desired"
            raise ValueError(msg)
        return cls()


class LLM:
    def __init__(self, broken=None, **kwargs):
        if broken == "keywords":
            msg = "LLM(data_parallel_size=2) is not supported"
            raise ValueError(msg)
        self.llm_engine = LLMEngine.from_engine_args(EngineArgs(broken=broken, **kwargs))
        if broken == "up":
            msg = "no such chat template"
            raise ValueError(msg)


class SamplingParams:
    def __post_init__(self):
        self._verify_args()

    def _verify_args(self):
        msg = "bad_words cannot contain\nan empty string"
        raise ValueError(msg)


def error_of(**kwargs):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - of each kind
        LLM(**kwargs)
    return start_error(caught.value)


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        (
            {"max_num_seq": 3},
            "engine.max_num_seq: vLLM has no such setting; did you mean 'max_num_seqs'?",
        ),
        (
            {"zzqqy": 3},
            "engine.zzqqy: vLLM has no such setting; see the arguments of vLLM's EngineArgs",
        ),
        ({"dtype": "fp16"}, "vLLM refuses dtype = 'fp16': Input should be 'auto' or 'half'"),
        (
            {"max_num_seqs": 7},
            "vLLM refuses the settings: max_num_batched_tokens (3) must be greater than or equal "
            "to max_num_seqs (7).",
        ),
        (
            {"broken": "keywords"},
            "vLLM refuses the settings: ValueError: LLM(data_parallel_size=2) is not supported",
        ),
    ],
)
def test_what_is_wrong_with_the_settings_is_the_jobs_fault(kwargs, told):
    error = error_of(**kwargs)
    assert isinstance(error, ConfigError)
    assert str(error) == f"[model]: {told}"


def test_what_is_wrong_with_the_sampling_is_the_jobs_fault():
    with pytest.raises(ValueError, match="empty string") as caught:
        SamplingParams().__post_init__()
    error = start_error(caught.value)
    assert isinstance(error, ConfigError)
    told = "ValueError: bad_words cannot contain an empty string"
    assert str(error) == f"[sampling]: vLLM refuses it: {told}"


def test_every_wrong_field_is_told():
    error = error_of(max_num_seqs=0, dtype="fp16")
    assert isinstance(error, ConfigError)
    assert [text.partition(":")[0] for text in error.problems] == [
        "vLLM refuses max_num_seqs = 0",
        "vLLM refuses dtype = 'fp16'",
    ]


@pytest.mark.parametrize(
    ("kwargs", "told"),
    [
        ({"broken": "in config"}, "RuntimeError: no device"),
        ({"broken": "gpu gone"}, "ValueError: World size"),
        ({"broken": "loading"}, "ValueError: Free memory on device"),
        ({"broken": "up"}, "ValueError: no such chat template"),
        ({"folder": "/nowhere/at/all"}, "ValidationError: 1 validation error"),
    ],
)
def test_what_may_be_better_the_next_time_is_not(kwargs, told):
    error = error_of(**kwargs)
    assert isinstance(error, EngineError)
    assert str(error).startswith(told)
    assert "\n" not in str(error)


def test_an_error_of_ours_is_not_the_jobs_fault():
    with pytest.raises(ValueError, match="invalid literal") as caught:
        int("x")
    assert isinstance(start_error(caught.value), EngineError)


@pytest.mark.vllm
def test_the_installed_vllms_keywords_are_read():
    known = known_keywords()
    assert known is not None
    assert {
        "model",
        "dtype",
        "chat_template",
        "max_num_seqs",
        "load_format",
        "max_logprobs",
    } <= known
    assert not {"self", "kwargs", "max_num_seq", "create_engine_config"} & known


ARGS = """
class EngineArgs:
    model: str = "x"
    kinds: ClassVar[list[str]] = []
    max_num_seqs: int | None = None
    def create_engine_config(self): ...
"""
LLM_PY = """
class LLM:
    def __init__(self, model: str, *, chat_template=None, **kwargs): ...
"""


@pytest.mark.parametrize(
    ("args", "llm", "found"),
    [
        (ARGS, LLM_PY, {"model", "chat_template", "max_num_seqs"}),
        (ARGS.replace("EngineArgs", "EngineArgs(Base)"), LLM_PY, None),  # Its fields are elsewhere.
        (ARGS.replace("EngineArgs", "Moved"), LLM_PY, None),
        (ARGS, "def __init__(self): ...", None),
        (ARGS, "class LLM: pass", None),
        (ARGS, "class LLM(", None),
        (ARGS, None, None),
    ],
)
def test_a_source_that_is_not_as_expected_tells_nothing(tmp_path, args, llm, found):
    for name, text in (("engine/arg_utils.py", args), ("entrypoints/llm.py", llm)):
        (tmp_path / name).parent.mkdir()
        if text is not None:
            (tmp_path / name).write_text(text)
    assert read_keywords(tmp_path) == found
