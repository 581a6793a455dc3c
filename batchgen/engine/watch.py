"""What we reach of vLLM's inside: the scheduler's statistics, the death of its core, the reasoner.

All hang on attributes that vLLM does not promise (checked in 0.26.0, 0.32.0 and 0.33.0), so each
is looked up first; a missing one costs the statistics or the early warning, never the run.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from batchgen.core.records import EngineStats

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WATCH_S = 0.2


class SchedulerWatch:
    """Keeps the latest scheduler statistics, without vLLM's per-token ones.

    vLLM's own statistics double the front end's cost per token (2.5 to 5.6 us, 0.32). So the
    core is asked to report, and the front end is told that nobody listens: `log_stats` goes off
    there and this object takes the place of its `logger_manager`.
    """

    def __init__(self) -> None:
        self.stats = EngineStats()
        self._num_preemptions: int | None = None
        self._num_prompt_tokens: int | None = None
        self._num_generated_tokens: int | None = None
        self._max_num_batched_tokens: int | None = None

    def attach(self, llm_engine: Any) -> None:  # noqa: ANN401
        """Take the front end's seat, where the parts of it are as we know them."""
        output_processor = getattr(llm_engine, "output_processor", None)
        if getattr(llm_engine, "logger_manager", None) is None or output_processor is None:
            return
        llm_engine.log_stats = False
        output_processor.log_stats = False
        llm_engine.logger_manager = self
        config = getattr(getattr(llm_engine, "vllm_config", None), "scheduler_config", None)
        self._max_num_batched_tokens = getattr(config, "max_num_batched_tokens", None)
        core = llm_engine.engine_core
        get_output = getattr(core, "get_output", None)
        if get_output is None:
            return
        self._num_preemptions = self._num_prompt_tokens = self._num_generated_tokens = 0

        def get_output_counting() -> Any:  # noqa: ANN401
            outputs = get_output()
            self._count(getattr(outputs, "outputs", ()))
            return outputs

        core.get_output = get_output_counting

    def record(self, scheduler_stats: Any = None, **_: object) -> None:  # noqa: ANN401
        """Take one step's statistics: vLLM calls this on its `logger_manager`."""
        if scheduler_stats is None:
            return
        waiting = getattr(scheduler_stats, "num_waiting_reqs", None)
        deferred = getattr(scheduler_stats, "num_skipped_waiting_reqs", 0)
        self.stats = EngineStats(
            num_running=getattr(scheduler_stats, "num_running_reqs", None),
            num_waiting=None if waiting is None else waiting + deferred,
            kv_cache_usage=getattr(scheduler_stats, "kv_cache_usage", None),
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
        num_preemptions = num_prompt_tokens = num_generated_tokens = 0
        for output in outputs:
            num_generated_tokens += len(getattr(output, "new_token_ids", ()))
            events = getattr(output, "events", None)
            if events:
                num_preemptions += sum(int(event.type) == 3 for event in events)
                prefill = getattr(output, "prefill_stats", None)
                num_prompt_tokens += getattr(prefill, "num_prompt_tokens", 0)
        self._num_preemptions = (self._num_preemptions or 0) + num_preemptions
        self._num_prompt_tokens = (self._num_prompt_tokens or 0) + num_prompt_tokens
        self._num_generated_tokens = (self._num_generated_tokens or 0) + num_generated_tokens


def wake_when_dead(core: Any, dead_error: type[Exception], closed: threading.Event) -> None:  # noqa: ANN401
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


def pass_to_reasoner(llm_engine: Any, chat_template_kwargs: Mapping[str, Any]) -> None:  # noqa: ANN401
    """Tell the core's reasoning parser how chats are rendered: whether there will be reasoning.

    A grammar binds only what follows the reasoning, and some parsers (deepseek_v3) know from
    these keywords alone. vLLM's server passes them on, its offline `add_request` cannot.

    Source:
        EngineCoreRequest.reasoning_parser_kwargs: vllm/v1/engine/async_llm.py, 0.26 to 0.33.
    """
    processor = getattr(llm_engine, "input_processor", None)
    process = getattr(processor, "process_inputs", None)
    if processor is None or process is None:
        return
    kwargs = {"chat_template_kwargs": dict(chat_template_kwargs)}

    def process_and_tell(*args: Any, **named: Any) -> Any:  # noqa: ANN401
        request = process(*args, **named)
        if hasattr(request, "reasoning_parser_kwargs"):
            request.reasoning_parser_kwargs = kwargs
        return request

    processor.process_inputs = process_and_tell
