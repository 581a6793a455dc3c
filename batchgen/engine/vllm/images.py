"""Chats with images, as vLLM renders them: on the engine's thread, or in processes ahead of it.

An image is read, decoded, scaled and cut into patches: 28 ms for a JPEG of 1024 x 768, of which
decoding is 6 (Idefics3's processor, vLLM 0.32). On the engine's own thread, as vLLM's offline entry
points do it, the GPU waits meanwhile; of threads two gain a fifth, by the GIL, and six lose
(vllm#58266). So on a GPU `Renderers` starts processes when the first such chat is seen, each with
vLLM's own renderer and no engine. Until they are up, and where there are none, the engine renders.

    python -m batchgen.engine.vllm.images FD         one of them

Over the socket go pickles: in the engine's VllmConfig and the ChatStyle, then chats; out whatever
`render_images` returns for each. A chat whose process dies twice is that row's error. They are of
the engine's process group and end with it.
"""

from __future__ import annotations

import base64
import mimetypes
import os
import pickle
import queue
import socket
import stat
import subprocess
import sys
import threading
import zlib
from contextlib import suppress
from copy import copy
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from batchgen.core.errors import one_line
from batchgen.core.records import Messages, RowError
from batchgen.engine.base import end_of, flatten_parts
from batchgen.engine.vllm.settings import is_cpu_build, prepare_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.engine.vllm.encoder import ChatStyle, Encoded

MAX_IMAGE_BYTES = 32 << 20
"""Of a local file."""
MAX_IMAGE_PIXELS = 64 << 20
"""8192 x 8192; three bytes each once it is decoded. A file of some KiB can hold far more."""
MAX_RENDERERS = 8
AHEAD = 4
"""Chats that each process has to do or has done: some 10 MB each, once rendered."""
CACHE_GB = 0.5
"""Rendered images that each process keeps, for rows that show the same."""
ATTEMPTS = 2
UP = "a process renders images now"
"""What each tells the engine's log."""


class Rendered(NamedTuple):
    """A request, and what `render_images` has made of its chat; None where that is still to do."""

    encoded: Encoded
    prompt: Any | RowError | None = None


class Renderers:
    """Processes that render chats with images; a thread for each waits for it.

    Chats that show the same image first go to the same process, which has it rendered already.
    """

    def __init__(self, num: int, style: ChatStyle) -> None:
        """Bind; nothing is started yet.

        Args:
            num: Of processes; 0: the engine renders itself.
            style: The chat template to use.
        """
        self._style = style
        self._num_up = 0
        self.num_out = 0
        """Chats that were put and not taken yet."""
        self._config = b""
        self._is_configured = threading.Event()
        self._inboxes = [queue.SimpleQueue[Any]() for _ in range(num)]
        self._ready: queue.SimpleQueue[Rendered] = queue.SimpleQueue()
        self._is_started = False

    def start(self) -> None:
        """Start them, if they are not yet: as soon as it is known that there are images."""
        if not self._is_started:
            self._is_started = True
            for inbox in self._inboxes:
                threading.Thread(target=self._serve, args=(inbox,), daemon=True).start()

    def configure(self, config: Any) -> None:
        """Tell them vLLM's VllmConfig, once the engine has made it."""
        if self._inboxes:
            light = copy(config)  # Where the core is in this process, its layers hang on the other.
            light.compilation_config = type(config.compilation_config)()
            self._config = pickle.dumps(light)
            self._is_configured.set()

    @property
    def are_up(self) -> bool:
        """Whether one of them can render, so that the engine need not."""
        return self._num_up > 0

    @property
    def has_room(self) -> bool:
        """Whether another chat may be put."""
        return self.num_out < AHEAD * len(self._inboxes)

    def put(self, encoded: Encoded) -> None:
        """Hand a chat over; never waits."""
        self.num_out += 1
        number = zlib.crc32(_first_image(encoded.chat or ()).encode()) % len(self._inboxes)
        self._inboxes[number].put(encoded)

    def take(self, timeout_s: float) -> Rendered | None:
        """Return one that is ready; wait up to `timeout_s` for it, 0 for not at all."""
        try:
            ready = self._ready.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        self.num_out -= 1
        return ready

    def _serve(self, inbox: queue.SimpleQueue[Any]) -> None:
        process = self._started()
        self._num_up += 1
        while True:
            encoded = inbox.get()
            prompt: Any = RowError("image_error", "to render its images killed a process, twice")
            for _ in range(ATTEMPTS):
                try:
                    process.send_bytes(pickle.dumps((encoded.chat, encoded.params)))
                    prompt = pickle.loads(process.recv_bytes())  # noqa: S301 - our own child
                except (OSError, EOFError):
                    process = self._started()
                else:
                    break
            self._ready.put(Rendered(encoded, prompt))

    def _started(self) -> Connection:
        """A process that has said that it is ready; tried until there is one."""
        while True:
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", __spec__.name, str(theirs.fileno())]
                subprocess.Popen(  # noqa: S603 - our own module
                    command, pass_fds=[theirs.fileno()], env=_environment()
                )
            process = Connection(ours.detach())
            self._is_configured.wait()
            with suppress(OSError, EOFError):
                process.send_bytes(pickle.dumps((self._config, self._style)))
                process.recv_bytes()
                return process


def _environment() -> dict[str, str]:
    """One thread each: there are as many processes as cores are to spare."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def _first_image(chat: Messages) -> str:
    for message in chat:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "image_url":
                return str(part.get("image_url"))
    return ""


def num_renderers(kwargs: Mapping[str, Any], num_sharing: int, *, is_cpu: bool) -> int:
    """How many processes render the images of one engine.

    Args:
        kwargs: The job's keywords of `LLM(...)`: `renderer_num_workers` is vLLM's own word for it.
        num_sharing: Engines on the GPU.
        is_cpu: The engine itself keeps the processor's cores busy.
    """
    given = kwargs.get("renderer_num_workers")
    if isinstance(given, int):
        return given if given > 1 else 0
    if is_cpu:
        return 0
    return min(MAX_RENDERERS, max(0, len(os.sched_getaffinity(0)) // 2 - 1) // num_sharing)


def main(fd: int) -> None:
    """Render chats until the other end closes."""
    prepare_environment(is_cpu=is_cpu_build())
    from vllm import LLM
    from vllm.renderers import renderer_from_config

    engine = Connection(fd)
    with suppress(OSError, EOFError):
        data, style = pickle.loads(engine.recv_bytes())  # noqa: S301 - our parent
        config = pickle.loads(data)  # noqa: S301
        # With these vLLM's renderer keeps what it has rendered to itself, and sends all of it.
        config.parallel_config._api_process_count = 2
        config.model_config.multimodal_config.mm_processor_cache_gb = CACHE_GB
        llm = LLM.__new__(LLM)
        llm.model_config, llm.chat_template = config.model_config, None
        llm.renderer = renderer_from_config(config)
        print(UP, flush=True)  # noqa: T201 - into the engine's log
        engine.send_bytes(b"ready")
        while True:
            chat, params = pickle.loads(engine.recv_bytes())  # noqa: S301
            engine.send_bytes(pickle.dumps(render_images(llm, chat, style.of(params))))


def render_images(llm: Any, chat: Messages, style: ChatStyle) -> Any | RowError:
    """Render a chat with images to what vLLM's `add_request` takes.

    Args:
        llm: vLLM's LLM.
        chat: Its images are `image_url` parts, as OpenAI's API has them; the URL is one of
            http, https or data, or a path of a local file.
        style: The chat template to use.

    Source:
        LLM._preprocess_chat_one: vllm/entrypoints/offline_utils.py in 0.26,
        vllm/entrypoints/common/offline.py in 0.32 and 0.33.
    """
    if not getattr(llm.model_config, "is_multimodal_model", False):
        try:
            flatten_parts(chat)
        except TypeError as exc:
            return RowError("chat_template_error", f"{exc} by this model")
    try:
        limit_pixels()
        messages = with_local_images(chat)
        return llm._preprocess_chat_one(  # `LLM.chat` would wait for the answer.
            messages,
            chat_template=style.chat_template,
            chat_template_kwargs=dict(style.chat_template_kwargs),
            tools=list(style.tools) or None,
            **end_of(chat),
            # As 0.32 does by itself: a chat template writes them (vllm#55197).
            tokenization_kwargs={"add_special_tokens": False},
        )
    except Exception as exc:  # noqa: BLE001 - row border: the network, PIL, the template
        return RowError("image_error", one_line(exc))


def limit_pixels() -> None:
    """Make Pillow refuse images of more than `MAX_IMAGE_PIXELS`, before it decodes them.

    For this whole process: vLLM opens them, however they came (vllm/multimodal/media/image.py).

    Source:
        PIL/Image.py, _decompression_bomb_check, 13.0: an error from twice this number on.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = MAX_IMAGE_PIXELS // 2


def with_local_images(chat: Messages) -> list[dict[str, Any]]:
    """Put the images that are local files into the chat: vLLM reads none without a setting.

    Raises:
        OSError: A file cannot be read.
        ValueError: It is no plain file, or larger than `MAX_IMAGE_BYTES`.
        TypeError, KeyError: A part is not what OpenAI's API describes.
    """
    return [
        {**message, "content": [_with_image(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else dict(message)
        for message in chat
    ]


def _with_image(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") != "image_url":
        return part
    image = part["image_url"]
    given = {"url": image} if isinstance(image, str) else dict(image)
    url = str(given["url"])
    if url.startswith(("data:", "http://", "https://")):
        return {**part, "image_url": given}
    path = Path(unquote(urlsplit(url).path) if url.startswith("file://") else url)
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    data = base64.b64encode(_read_image(path)).decode("ascii")
    return {**part, "image_url": {**given, "url": f"data:{kind};base64,{data}"}}


def _read_image(path: Path) -> bytes:
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):  # A pipe would be waited for, for ever.
        raise ValueError(f"{path} is no plain file")
    if facts.st_size > MAX_IMAGE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_IMAGE_BYTES >> 20} MiB")
    return path.read_bytes()


if __name__ == "__main__":
    main(int(sys.argv[1]))
