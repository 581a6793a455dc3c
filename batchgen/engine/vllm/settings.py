"""What vLLM is told at its start, and what it refuses of that. Imports nothing of vLLM.

Environment variables, our defaults of its keywords, the keywords that the installed one takes
(read from its source: importing it takes seconds), and which of the errors of its start the job
file is at fault for: those of its settings. `LLM(...)` goes three steps: it makes `EngineArgs` of
its keywords, `create_engine_config` makes a `VllmConfig` of these, and only then anything is
loaded or a device is touched. What the first two refuse they refuse every time, so that to run
again is of no use. All that comes later (weights, memory, CUDA, processes) may be better the next
time.

Source:
    vllm/entrypoints/llm.py, LLM.__init__, and vllm/v1/engine/llm_engine.py,
    LLMEngine.from_engine_args, alike in 0.26.0, 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import ast
import atexit
import glob
import json
import os
import re
import shutil
import sys
import tempfile
import traceback
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from batchgen.core.errors import ConfigError, EngineError, nearest, one_line, suggestion
from batchgen.core.runtime import read_json
from batchgen.engine.devices import vllm_build

if TYPE_CHECKING:
    import threading
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from batchgen.core.records import EngineSpec, WorkLeft
    from batchgen.job.model import JobConfig

TINY_WEIGHTS_BYTES = 64 << 20
TINY_KV_CACHE_BYTES = 256 << 20
GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's own default of `gpu_memory_utilization`: vllm/config/cache.py, 0.26 to 0.33."""
MAX_LOGPROBS = 20
"""vLLM's own default of `max_logprobs`: vllm/config/model.py, 0.26 to 0.33."""
LABEL_TOKENS = 128
"""vLLM lists so many tokens that are asked for: MAX_LOGPROB_TOKEN_IDS in vllm/sampling_params.py,
0.32."""
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as `max_lora_rank`: vllm/config/lora.py, MaxLoRARanks, 0.26 to 0.33."""
MAX_LORAS = 8
"""Adapters on the device at once; each takes room for `max_lora_rank` in every layer."""
MAX_CPU_LORAS = 64
"""Adapters kept in the host's memory; any beyond are read from disk again."""

OWN_CHOICE = frozenset(
    {
        *("compilation_config", "cudagraph_capture_sizes", "max_cudagraph_capture_size"),
        *("enforce_eager", "optimization_level", "performance_mode"),
        # Steps of several tokens a row, and engines of which no answers are asked for.
        *("speculative_config", "runner"),
    }
)
"""Keywords by which a job decides itself what `choose_settings` would choose."""
CAPTURED = 512
"""So many rows vLLM has CUDA graphs for by itself, at most: config/vllm.py, _set_cudagraph_sizes,
0.26 to 0.33 (data-center Blackwell: 1,024)."""
NOT_COMPILED: Mapping[str, Any] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
"""Of `compilation_config`: nothing is compiled, and only steps that decode have graphs. vLLM takes
the graphs back where an attention backend has none: config/compilation.py, 0.26 to 0.33."""
NO_GRAPHS: Mapping[str, Any] = {"mode": 0, "cudagraph_mode": "NONE"}
"""The same where nothing is decoded: without compiling vLLM has no graphs for prompts."""
COMPILE_S, CACHED_COMPILE_S = 65.0, 16.0
"""What a start takes longer where the model is compiled; and where vLLM's cache holds it: ready
after 98 and 50 s instead of 34 s (8B shape, H200, vLLM 0.26)."""
COMPILED_GAIN, FUSED_GAIN = 0.03, 0.1
"""Share of the work's time that compiling wins: 25.0 instead of 24.3 k tokens/s, the same shape.
More, though that is not measured, of models whose compiled form joins operations that the plain one
has apart: quantized, or over several GPUs (config/vllm.py, OPTIMIZATION_LEVEL_02, 0.26 to 0.33)."""
DECODED_PER_S, READ_PER_S = 20_000, 50_000
"""Tokens that the same shape decodes and reads, for jobs that have not run yet."""
TYPICAL_PROMPT, TYPICAL_ANSWER = 500, 512
"""Tokens; answers are rarely as long as they may be."""

ENVIRONMENT = {
    # It phones home otherwise.
    "VLLM_NO_USAGE_STATS": "1",
    # The model is a local folder: any lookup would be a surprise, or a hang without a network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Five seconds by default; workers that need longer are killed with the process group.
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "1",
    # As local images may have, see `images.MAX_IMAGE_BYTES`; 256 by default (0.32).
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "32",
    # A host that the job allows would send on to any other, those of the own network too.
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": "0",
    # Colour codes in a log file help no one.
    "NO_COLOR": "1",
}


CPU_ENVIRONMENT = {
    # A front end beside the core would be two more interpreters (1.2 GB, 15 s) for processor
    # cores that are busy anyway. On a GPU the default stays: it works beside the core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Else our encoder would have to wait, see `forks_core`.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

ARGS, LLM = Path("engine", "arg_utils.py"), Path("entrypoints", "llm.py")
SETTINGS = "[model]"
SAMPLING = "[sampling]"
MAX_CHARS = 500
_INIT, _START = "LLM.__init__", "LLMEngine.from_engine_args"
_CONFIG = "EngineArgs.create_engine_config"
_PARAMS = "SamplingParams.__post_init__"
_UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")
_PREFIX = re.compile(r"^(Value error|Assertion failed), ")
_MACHINES = re.compile(r"available GPUs|device count", re.IGNORECASE)
"""Of a GPU that is gone, not of the job: vllm/config/parallel.py, _verify_args, 0.26 to 0.33."""
READ_BYTES = 8 << 20
_short = Repr()
_short.maxstring = 60


def is_cpu_build() -> bool:
    """Whether the installed vLLM is one for CPUs, or there is none; found without importing it."""
    return vllm_build() in ("cpu", "")


def gpus_of(engine: Mapping[str, Any], *, is_cpu: bool) -> int:
    """How many GPUs an engine with these keywords holds.

    Args:
        engine: Keywords of vLLM's `LLM(...)`.
        is_cpu: It runs on none.
    """
    if is_cpu:
        return 0
    num = 1
    for kind in ("tensor", "pipeline", "data", "prefill_context"):
        size = engine.get(f"{kind}_parallel_size")
        num *= size if isinstance(size, int) and size > 0 else 1
    return num


def engine_gpus(job: JobConfig) -> int:
    """How many GPUs one engine of a job is spread over, if it is for GPUs."""
    model = job.model
    sizes = {**model.engine, "tensor_parallel_size": model.tensor_parallel_size}
    return gpus_of(sizes, is_cpu=False)


def prepare_environment(*, is_cpu: bool) -> None:
    """Set what vLLM and torch read from the environment; what the user has set stays.

    Must run before torch is imported: OpenMP reads its variables once, when it is loaded.
    """
    defaults = dict(ENVIRONMENT)
    if is_cpu:
        defaults |= CPU_ENVIRONMENT
    if is_cpu and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") == "0":
        # One core less than there are, for everything else, as vLLM reserves one for its front
        # end. With none left each of the model's many small operators waits for a thread that
        # is not running: 40 to 100 rows/s became 740 on two busy cores (vLLM 0.32, tiny model).
        defaults["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) - 1))
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    keep_bytecode()


def read_ahead(model: Path) -> None:
    """Read a model's weights into the page cache, while vLLM is imported: both take long.

    Not what would fill half of the machine's memory, of which others may need what is cached.
    """
    with suppress(OSError):
        paths = sorted(model.glob("*.safetensors"))
        most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
        if sum(path.stat().st_size for path in paths) > most:
            return
        buffer = bytearray(READ_BYTES)
        for path in paths:
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def forks_core() -> bool:
    """Whether vLLM forks its core from this process, its own default for a GPU.

    A core that is spawned imports vLLM a second time: with a model of 0.6B it was ready after 49 s
    instead of 27 (H200, vLLM 0.26). To fork is safe while no other thread is at work that holds a
    lock, since in the core nobody would ever release it: so what tokenizes waits until it is
    forked. What else there is waits for the parent's messages, or reads files, without a lock.
    vLLM spawns it all the same where it has to (CUDA is in use: utils/system_utils.py,
    _maybe_force_spawn, 0.26 to 0.33).
    """
    method = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    return method == "fork" and os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") != "0"


def set_when_forked(event: threading.Event) -> None:
    """Set an event once vLLM has forked its core; at once if it will not."""
    if forks_core():
        os.register_at_fork(after_in_parent=event.set)
    else:
        event.set()


def keep_bytecode() -> None:
    """Let Python keep what it compiles of vLLM, beside vLLM's own caches, if nobody else does.

    In images that forbid it, and were made without, it compiles some thousand files in each
    process of each start: 10 s of a fast core, 30 of a slow one.
    """
    folders = _vllm_folders()
    is_there = not folders or any((folder / "__pycache__").is_dir() for folder in folders)
    if is_there or not sys.dont_write_bytecode or sys.pycache_prefix is not None:
        return
    home = os.path.expanduser("~")  # noqa: PTH111 - never raises
    caches = Path(os.environ.get("XDG_CACHE_HOME") or f"{home}/.cache")
    root = Path(os.environ.get("VLLM_CACHE_ROOT") or caches / "vllm")
    sys.pycache_prefix = str(root / "batchgen_bytecode")
    sys.dont_write_bytecode = False
    # For the processes that vLLM starts.
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def cpu_kv_cache_bytes(model: Path) -> int:
    """Choose a KV cache for a CPU: vLLM 0.32 would take 92 % of the machine's memory.

    256 MiB where the weights say that the model is a toy, else half of what is available now.
    """
    weights = sum(
        path.stat().st_size for kind in ("safetensors", "bin") for path in model.glob(f"*.{kind}")
    )
    if weights < TINY_WEIGHTS_BYTES:
        return TINY_KV_CACHE_BYTES
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def llm_kwargs(spec: EngineSpec, *, is_cpu: bool) -> dict[str, Any]:
    """Build the keywords of `LLM(...)`: the job's own, over our defaults."""
    # With statistics on, the core reports its scheduler's state; see `SchedulerWatch`.
    kwargs: dict[str, Any] = {
        "disable_log_stats": False,
        # It goes out of step when a request with an image is refused after its rendering; the
        # next one with that image would fail (MultiModalCacheMissError, vLLM 0.32).
        "mm_processor_cache_gb": 0,
        **({"runner": "pooling"} if spec.is_pooling else {}),
        **_max_logprobs(spec),
        **lora_kwargs(spec.loras),
        **spec.model_kwargs,
        "model": _without_pattern(spec.model),
    }
    # For our own processes, see `images`; vLLM's offline engine warns that it takes no notice.
    kwargs.pop("renderer_num_workers", None)
    if spec.reasoning_parser is not None:
        # So that a grammar binds the answer only (vllm/engine/arg_utils.py, 0.26 to 0.33).
        kwargs.setdefault("reasoning_parser", spec.reasoning_parser)
    if is_cpu:
        # A seeded request whose prompt is cut over two steps kills the engine on a CPU: "CPU
        # Generator does not use offset" (v1/worker/gpu_model_runner.py, 0.26 and 0.32).
        kwargs.setdefault("enable_chunked_prefill", False)
    if is_cpu and spec.loras:
        kwargs |= _spare_lora_slot(kwargs, len(spec.loras))
    sized = kwargs.keys() & {"kv_cache_memory_bytes", "gpu_memory_utilization"}
    if is_cpu and not sized and not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        found = cpu_kv_cache_bytes(Path(spec.model))
        kwargs["kv_cache_memory_bytes"] = found // spec.num_sharing
    return kwargs


def leaves_open(kwargs: Mapping[str, Any]) -> bool:
    """Whether the job has nothing to say of what `choose_settings` chooses, for a GPU."""
    return vllm_build() == "cuda" and not kwargs.keys() & OWN_CHOICE


def choose_settings(spec: EngineSpec, usual_seqs: int | None) -> dict[str, Any]:
    """Choose what the job leaves open; nothing of it changes an answer but by rounding.

    CUDA graphs for as many rows as run at once; and nothing is compiled, unless the work is so
    long that it pays. What is compiled always has the same graphs, since they are in the key of
    vLLM's compile cache (CompilationConfig.compute_hash, 0.26 to 0.33).

    Args:
        spec: Of the engine; its `defaults` say whether to choose at all.
        usual_seqs: vLLM's own `max_num_seqs` for the device; None: unknown.

    Returns:
        Keywords of `LLM(...)`; none where vLLM's own defaults do.
    """
    if spec.defaults != "batchgen" or spec.model_kwargs.keys() & OWN_CHOICE:
        return {}
    seqs = spec.model_kwargs.get("max_num_seqs") or usual_seqs
    if not isinstance(seqs, int):
        return {}
    num_answers = spec.sampling_params.get("n", 1)
    gain = FUSED_GAIN if _is_fused(spec) else COMPILED_GAIN
    is_compiled = spec.work is None or pays_to_compile(spec.work, num_answers, gain)
    if spec.is_pooling:
        return {} if is_compiled else {"compilation_config": {**NO_GRAPHS}}
    if spec.work is None or is_compiled:
        return {"cudagraph_capture_sizes": capture_sizes(seqs)} if seqs > CAPTURED else {}
    sizes = capture_sizes(max(1, min(seqs, spec.work.num_rows * num_answers)))
    return {"compilation_config": {**NOT_COMPILED, "cudagraph_capture_sizes": sizes}}


def _is_fused(spec: EngineSpec) -> bool:
    if spec.model_kwargs.get("quantization") or gpus_of(spec.model_kwargs, is_cpu=False) > 1:
        return True
    return "quantization_config" in read_json(Path(spec.model) / "config.json", dict)


def pays_to_compile(work: WorkLeft, num_answers: int, gain: float = COMPILED_GAIN) -> bool:
    """Whether work is so long that a compiled model makes up for its start.

    Args:
        work: What is left.
        num_answers: Of a row.
        gain: Share of the work's time that it wins.
    """
    if work.rows_per_s is not None:
        work_s = work.num_rows / work.rows_per_s
    else:
        answers = work.num_rows * num_answers * min(work.output_tokens, TYPICAL_ANSWER)
        prompts = work.num_rows * (work.prompt_tokens or TYPICAL_PROMPT)
        work_s = answers / DECODED_PER_S + prompts / READ_PER_S
    return gain * work_s > (CACHED_COMPILE_S if work.is_compiled else COMPILE_S)


def capture_sizes(seqs: int) -> list[int]:
    """Numbers of rows that get CUDA graphs, up to all that run at once.

    Half as many as vLLM's own, which has one each 8 rows, then 16: each takes up to 0.1 s of the
    start, and the rows by which a step is padded were not seen to cost anything.
    """
    sizes = [1, 2, 4, *range(8, 32, 8), 32, 48, 64, 96, *range(128, 1024, 64)]
    sizes += range(1024, max(seqs, 1024), 128)
    return [size for size in sizes if size < seqs] + [seqs]


def settings_text(settings: Mapping[str, Any]) -> str:
    """Say what was chosen, in a line; empty if nothing."""
    told = []
    how = settings.get("compilation_config", settings)
    if sizes := how.get("cudagraph_capture_sizes"):
        told.append(f"CUDA graphs for up to {max(sizes):,} rows at once")
    if how is not settings:
        told.append("not compiled, which would take longer than it wins")
    if num := settings.get("engines_per_gpu"):
        told.append(f"{num} engines share the GPU, which would wait for one's Python")
    return "; ".join(told)


def _without_pattern(model: str) -> str:
    """Give a folder whose path has `*`, `?` or `[` another name, by a link.

    vLLM takes the path and what it looks for in it for one pattern, and would find no weights
    (vllm/model_executor/model_loader/default_loader.py, `_prepare_weights`, 0.26 to 0.33).
    """
    if not glob.has_magic(model) or not Path(model).is_dir():
        return model
    folder = tempfile.mkdtemp(prefix="batchgen-model-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    link = Path(folder) / "model"
    link.symlink_to(model)
    return str(link)


def _max_logprobs(spec: EngineSpec) -> dict[str, Any]:
    num = spec.sampling_params.get("logprobs")
    if num == "labels":
        return {"max_logprobs": LABEL_TOKENS}
    # -1 is the whole vocabulary, for vLLM's limit as well.
    return {"max_logprobs": num} if num is not None and not 0 <= num <= MAX_LOGPROBS else {}


def lora_kwargs(loras: Mapping[str, str]) -> dict[str, Any]:
    """Make room for adapters: all of them in host memory, the first few on the device.

    Those beyond `max_loras` are swapped, so a job with more should have its rows in their order.

    Args:
        loras: Name of each adapter -> its folder, in PEFT's format.

    Raises:
        EngineError: A folder holds no adapter.
    """
    if not loras:
        return {}
    max_loras = min(len(loras), MAX_LORAS)
    rank = max(read_lora_rank(name, Path(folder)) for name, folder in loras.items())
    return {
        "enable_lora": True,
        "max_loras": max_loras,
        "max_cpu_loras": min(len(loras), MAX_CPU_LORAS),
        # One beyond them all goes through, for vLLM to refuse.
        "max_lora_rank": next((known for known in LORA_RANKS if known >= rank), rank),
    }


def _spare_lora_slot(kwargs: Mapping[str, Any], num_loras: int) -> dict[str, Any]:
    """Leave the last slot for adapters empty: on a CPU requests without one are given that.

    A mark of -1 for "none" is taken for an index there, so that beside a request with an adapter
    all those without had the last one's answers (seen with vLLM 0.32: vllm/lora/ops/torch_ops/
    lora_ops.py, bgmv_shrink, mended in 0.33; vllm#48421). On a GPU -1 is understood.
    """
    num_slots = max(kwargs.get("max_loras") or 1, num_loras + 1)
    return {"max_loras": num_slots, "max_cpu_loras": max(kwargs["max_cpu_loras"], num_slots)}


def read_lora_rank(name: str, folder: Path) -> int:
    """Read an adapter's rank.

    Raises:
        EngineError: There is no adapter, or it does not say its rank.

    Source:
        `r` in adapter_config.json: peft, LoraConfig; vllm/lora/peft_helper.py, 0.26 to 0.33.
    """
    path = folder / "adapter_config.json"
    try:
        return int(json.loads(path.read_bytes())["r"])
    except OSError as exc:
        raise EngineError(f"adapter {name!r}: {path} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as exc:
        raise EngineError(f"adapter {name!r}: {path} does not say its rank, 'r'") from exc


def known_keywords() -> frozenset[str] | None:
    """Every keyword of the installed vLLM's `LLM(...)`; None if they cannot be told."""
    return next((found for folder in _vllm_folders() if (found := read_keywords(folder))), None)


def _vllm_folders() -> list[Path]:
    """Where the installed vLLM is; of a package at the top nothing is executed."""
    try:
        spec = find_spec("vllm")
    except (ImportError, ValueError):
        return []
    return [Path(place) for place in (spec and spec.submodule_search_locations) or ()]


@cache
def read_keywords(package: Path) -> frozenset[str] | None:
    """The same of a vLLM in a folder.

    Source:
        LLM.__init__ gives what it does not know itself to EngineArgs, a dataclass without a base:
        vllm/entrypoints/llm.py and vllm/engine/arg_utils.py, 0.26 to 0.33.

    Returns:
        None where the source is not there, or not as expected.
    """
    try:
        trees = [ast.parse((package / path).read_bytes()) for path in (ARGS, LLM)]
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None
    nodes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    classes = {node.name: node for node in nodes}
    args, llm = classes.get("EngineArgs"), classes.get("LLM")
    if args is None or llm is None or args.bases:
        return None
    own = frozenset(_parameters(llm, "__init__")) - {"self"}
    fields = {
        node.target.id
        for node in args.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if "ClassVar" not in ast.unparse(node.annotation)
    }
    return own | fields if own and fields else None


def _parameters(tree: ast.AST, function: str) -> list[str]:
    """Names of the parameters of a function of that name."""
    return [
        parameter.arg
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == function
        for parameter in (*node.args.args, *node.args.kwonlyargs)
    ]


def start_error(exc: Exception) -> ConfigError | EngineError:
    """What a failed start of vLLM's is to the job.

    Args:
        exc: As `LLM(...)` raised it, with its traceback.

    Returns:
        ConfigError: vLLM refuses the job's settings, before anything was loaded, or its sampling.
        EngineError: all else.
    """
    if not isinstance(exc, (TypeError, ValueError)):
        return EngineError(one_line(exc))
    if _PARAMS in _frames(exc):
        return ConfigError(SAMPLING, [f"vLLM refuses it: {one_line(exc)}"])
    if not _is_of_settings(exc):
        return EngineError(one_line(exc))
    if _MACHINES.search(str(exc)) or any(isinstance(one, OSError) for one in _causes(exc)):
        return EngineError(one_line(exc))
    return ConfigError(SETTINGS, [" ".join(text.split())[:MAX_CHARS] for text in _problems(exc)])


def _frames(exc: Exception) -> dict[str, FrameType]:
    """Of the functions that it came through, by their names."""
    return {frame.f_code.co_qualname: frame for frame, _ in traceback.walk_tb(exc.__traceback__)}


def _is_of_settings(exc: Exception) -> bool:
    """Whether it came out of the making of the configuration."""
    seen = _frames(exc)
    if _CONFIG in seen or _INIT not in seen:
        return _CONFIG in seen
    # Before the engine was begun. Without a traceback into it, it may also be after that.
    return _START not in seen and not hasattr(seen[_INIT].f_locals.get("self"), "llm_engine")


def _causes(exc: BaseException) -> Iterator[BaseException]:
    """It, and what it was raised from; pydantic keeps that of a validator's error for itself."""
    inner = [
        found
        for error in (exc.errors(include_url=False) if isinstance(exc, ValidationError) else ())
        if isinstance(found := error.get("ctx", {}).get("error"), BaseException)
    ]
    yield exc
    for cause in (exc.__cause__ or exc.__context__, *inner):
        if cause is not None:
            yield from _causes(cause)


def _problems(exc: Exception) -> list[str]:
    if found := _UNKNOWN.search(str(exc)):
        name = found[1]
        near = nearest(name, known_keywords() or ())
        hint = f"did you mean {near!r}?" if near else "see the arguments of vLLM's EngineArgs"
        return [f"engine.{name}: vLLM has no such setting; {hint}"]
    if not isinstance(exc, ValidationError):
        return [f"vLLM refuses the settings: {one_line(exc)}"]
    told: dict[str, str] = {}
    for error in exc.errors(include_url=False, include_context=False):
        name = str(error["loc"][0]) if error["loc"] else ""
        what = f"{name} = {_short.repr(error['input'])}" if name else "the settings"
        # Of a field with several types there is an error for each: the first names the values.
        why = _PREFIX.sub("", error["msg"])
        told.setdefault(name or error["msg"], f"vLLM refuses {what}: {why}")
    return list(told.values())


def refuse_sampling(fields: Iterable[str]) -> None:
    """Refuse fields that the installed vLLM's SamplingParams lack; without vLLM nothing is known.

    Raises:
        ConfigError: With every such field.
    """
    known = next(map(sampling_fields, _vllm_folders()), ()) if fields else ()
    if problems := [
        f"extra.{field}: vLLM's SamplingParams have no such field{suggestion(field, known)}"
        for field in fields
        if known and field not in known
    ]:
        raise ConfigError(SAMPLING, problems)


@cache
def sampling_fields(package: Path) -> Sequence[str]:
    """List the fields that SamplingParams are made of in a vLLM; none where it cannot be told.

    Source:
        SamplingParams.from_optional: vllm/sampling_params.py, 0.26 to 0.33.
    """
    try:
        tree = ast.parse((package / "sampling_params.py").read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return ()
    return _parameters(tree, "from_optional")
