"""Chats with images, which vLLM itself has to render: it knows how many tokens an image takes.

That is slow (an image is fetched, decoded and scaled, on the engine's own thread, as vLLM's
offline entry points do it) and only for chats that hold one; all others go through `encoder`.
Reaches vLLM only through its `LLM` object.
"""

from __future__ import annotations

import base64
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from batchgen.core.records import RowError
from batchgen.engine.encoder import flatten_parts, one_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from batchgen.core.records import Messages
    from batchgen.engine.encoder import ChatStyle


def render_images(llm: Any, chat: Messages, style: ChatStyle) -> Any | RowError:  # noqa: ANN401
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
        messages = with_local_images(chat)
        return llm._preprocess_chat_one(  # `LLM.chat` would wait for the answer.
            messages,
            chat_template=style.chat_template,
            chat_template_kwargs=dict(style.chat_template_kwargs),
            tools=list(style.tools) or None,
            # As 0.32 does by itself: a chat template writes them (vllm#55197).
            tokenization_kwargs={"add_special_tokens": False},
        )
    except Exception as exc:  # noqa: BLE001 - row border: the network, PIL, the template
        return RowError("image_error", one_line(exc))


def with_local_images(chat: Messages) -> list[dict[str, Any]]:
    """Put the images that are local files into the chat: vLLM reads none without a setting.

    Raises:
        OSError: A file cannot be read.
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
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {**part, "image_url": {**given, "url": f"data:{kind};base64,{data}"}}
