"""Row values to prompt: templates, and the key that tells equal requests.

Pure: no file, no model. The chat template is the model's business and is applied where the
tokenizer is, in the engine. Templates run sandboxed and immutable; an undefined or null value in
one is that row's error, never the word "None" in a prompt.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

import orjson
from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError, nodes

from batchgen.core.data import NotText, NotTextError, holder_of, value_at
from batchgen.core.errors import ConfigError, nearest
from batchgen.core.records import (
    Messages,
    Passages,
    Prompt,
    RowError,
    is_continued,
    writable_text,
)
from batchgen.prompt.sandbox import MAX_CHARS, NULL, BudgetError, NullPrintedError, Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from batchgen.job.model import Example, PromptConfig

    Values = Mapping[str, Any]
    Render = Callable[[dict[str, Any]], str]

ROW_VARIABLE = "row"
"""In templates, the whole row as a mapping, for columns whose names are no identifiers."""

_TABLE = "[prompt]"
_GLOBALS = frozenset(Sandbox().names)
"""`range` and the like: known to every template, unless a column has the name."""
_MAX_ERROR_CHARS = 300
TEMPLATES = ("user", "system", "prefill", "template", "query", "passage", "continuation")
"""Keys of `[prompt]` that hold one."""
BYTE_ORDER_MARK = "\ufeff"
"""Where some editors begin a file in UTF-8: no text of it. The recipe has it, prompts do not."""
_BRACED = re.compile(r"(?<!\{)\{\s*([^{}]+?)\s*\}(?!\})")
_HOST = re.compile(r"https?://([A-Za-z0-9.-]+)(?::[0-9]+)?(?:[/?#]|$)")
"""No user, no backslash, no brackets: what all parsers of URLs take for the same host."""
_MEDIA = re.compile("image|audio|video|embeds")
"""In the types of parts and in their keys, where vLLM looks for what it loads:
vllm/renderers/chat_utils.py, MM_PARSER_MAP and _parse_chat_message_content_mm_part, 0.32."""


class PromptBuilder:
    """The `[prompt]` table, compiled. Reused for every row; holds no row."""

    def __init__(
        self, config: PromptConfig, prefix: str = "", *, may_be_empty: bool = False
    ) -> None:
        """Compile the templates.

        Args:
            config: The table.
            prefix: Goes before each raw text.
            may_be_empty: Whether a raw text without any letter is a prompt: it has a vector.

        Raises:
            ConfigError: A template has a syntax error.
        """
        self._config = config
        self._prefix = prefix
        self._may_be_empty = may_be_empty
        self._templates = {
            key: _compile(f"prompt.{key}", text)
            for key in TEMPLATES
            if (text := getattr(config, key)) is not None
        }
        self._user, self._system, self._prefill = map(self._templates.get, TEMPLATES[:3])
        columns = (config.messages, config.text, config.images)
        templates = self._templates.values()
        self._names = frozenset(name for name in columns if name is not None).union(
            *(template.names for template in templates)
        )
        self._may_lack = frozenset().union(*(template.may_lack for template in templates))
        self._images = ImageRules(config)
        self._examples = [message for example in config.examples for message in turns(example)]
        self._globals = _GLOBALS if self._templates else frozenset()

    def columns(self, available: Sequence[str]) -> frozenset[str]:
        """Return the columns that prompts need, out of those available.

        Raises:
            ConfigError: A template or key names a column that the input lacks.
        """
        if ROW_VARIABLE in self._names and ROW_VARIABLE not in available:
            return frozenset(available)
        problems = [
            f"no column {name!r} in the input{_near(name, available)}"
            for name in sorted(self.missing(available) - self._may_lack)
        ]
        if problems:
            raise ConfigError(_TABLE, problems)
        return self._held(available)

    def _held(self, available: Sequence[str]) -> frozenset[str]:
        return frozenset(holder_of(name, available) for name in self._names).intersection(available)

    def missing(self, available: Sequence[str]) -> frozenset[str]:
        """Return the columns that are named and not available, those with a default too."""
        known = {*available, ROW_VARIABLE, *self._globals}
        return frozenset(name for name in self._names if holder_of(name, available) not in known)

    def notes(self, available: Sequence[str]) -> list[str]:
        """Tell what makes prompts more alike than they are likely meant to be, one line each.

        Args:
            available: The input's columns.
        """
        if not self._templates:
            return []
        found = [
            f"prompt.{key}: {{{name}}} in single braces is text; a column is {{{{ {name} }}}}"
            for key, template in self._templates.items()
            for name in dict.fromkeys(_BRACED.findall(template.text))
            if name in available and name not in self._names
        ]
        found += [
            f"prompt: no column {name!r} in the input, so that its default stands in every row"
            for name in sorted(self._may_lack.difference(available))
        ]
        if ROW_VARIABLE not in self._names and not self._held(available):
            text = "no column is used, so that every row has the same prompt; a column is written"
            found.append(f"prompt.{self._config.form}: {text} {{{{ name }}}}")
        return found

    def probe(self) -> Messages | None:
        """Return messages with the roles that every row's have.

        Empty where rows bring their own, None where prompts are no chats.
        """
        if self._user is None:
            return [] if self._config.is_chat else None
        begun = [{"role": "assistant", "content": "x"}] if self._prefill is not None else []
        system = [{"role": "system", "content": "x"}] if self._system is not None else []
        return [*system, *self._examples, {"role": "user", "content": "x"}, *begun]

    def build(self, values: Values) -> Prompt | RowError:
        """Return the row's prompt, or why it has none. Never raises for a row's fault."""
        try:
            is_column = self._config.text is not None or self._config.messages is not None
            prompt = self._from_column(values) if is_column else self._rendered(self._scope(values))
            if self._prefill is not None and isinstance(prompt, list):
                prompt = _begun(prompt, self._prefill.render(self._scope(values)))
            if self._config.images is not None and isinstance(prompt, list):
                return with_images(prompt, values.get(self._config.images), self._images)
        except Exception as error:  # noqa: BLE001 - the row border: templates run users' code
            return self._error(error, values)
        return prompt

    def _error(self, error: Exception, values: Values) -> RowError:
        match error:
            case NullPrintedError():
                nulls = sorted(name for name in self._names if values.get(name, "") is None)
                here = f"; null here: {', '.join(nulls)}" if nulls else ""
                return RowError("null_value", f"the prompt needs a value that is null{here}")
            case NotTextError():
                bad = sorted(name for name in self._names if isinstance(values.get(name), NotText))
                here = f": {', '.join(bad)}" if bad else ""
                return RowError("invalid_utf8", f"the prompt needs text, found no UTF-8{here}")
            case UndefinedError():
                what = shortened(f"the prompt needs a value that is absent: {error}")
                return RowError("missing_value", what)
            case ImageRefusedError():
                return RowError("bad_image", shortened(str(error)))
            case BudgetError():
                return RowError("template_error", str(error))
        return RowError("template_error", _told(error))

    def _scope(self, values: Values) -> dict[str, Any]:
        """What templates see: the row's columns, and all of them as `row`."""
        scope: dict[str, Any] = {ROW_VARIABLE: values, **values}
        for name in self._names:
            if scope.get(name, "") is None:
                scope[name] = NULL
        return scope

    def _rendered(self, scope: dict[str, Any]) -> Prompt | RowError:
        if self._user is None:
            return self._raw(scope)
        user = self._user.render(scope)
        if not user.strip():
            return RowError("empty_prompt", "prompt.user renders to nothing")
        # What all rows share comes first, so that the prefix cache serves it.
        messages: list[dict[str, Any]] = [*self._examples, {"role": "user", "content": user}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system.render(scope)})
        return messages

    def _raw(self, scope: dict[str, Any]) -> Prompt | RowError:
        if isinstance(passages := scope.get("passage"), Passages):
            return self._templates["query"].render(scope), *passages
        texts = {key: template.render(scope) for key, template in self._templates.items()}
        empty = [key for key, text in texts.items() if not text.strip()]
        if empty and not self._may_be_empty:
            return RowError("empty_prompt", f"prompt.{empty[0]} renders to nothing")
        if "continuation" in texts:
            # As lm-eval does (lm_eval/api/model.py, TemplateLM._encode_pair, 0.4): models have
            # learnt tokens that begin with a blank.
            prompt = texts["template"].rstrip()
            return prompt, texts["template"][len(prompt) :] + texts["continuation"]
        if "template" in texts:
            return self._prefix + texts["template"]
        return texts["query"], texts["passage"]

    def _from_column(self, values: Values) -> Prompt | RowError:
        name = self._config.text or self._config.messages or ""
        value = value_at(values, name)
        if value is None:
            return RowError("null_value", f"column {name!r} is null, expected a prompt")
        if isinstance(value, NotText):
            raise NotTextError
        if self._config.messages is not None and (not isinstance(value, dict) or len(value) != 1):
            return _checked_messages(name, value, self._images)
        value = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(value, str):
            found = type(value).__name__
            return RowError("bad_prompt", f"column {name!r} is {found}, expected a string")
        if not value.strip() and not self._may_be_empty:
            return RowError("empty_prompt", f"column {name!r} is empty")
        return self._prefix + value


def _begun(chat: Messages, text: str) -> Prompt | RowError:
    """A chat with the beginning of the assistant's turn; an empty one begins nothing."""
    if is_continued(chat):
        problem = "the chat ends with the assistant already, and prompt.prefill begins its turn"
        return RowError("bad_messages", problem)
    return [*chat, {"role": "assistant", "content": text}] if text else chat


class _Template(NamedTuple):
    """A template, compiled."""

    render: Render
    names: frozenset[str]
    """What it looks up."""
    may_lack: frozenset[str]
    """Of these, what it has a default for, or asks whether it is there."""
    text: str
    """What it has beside expressions and statements."""


def _compile(where: str, source: str) -> _Template:
    """Compile a template. A constant renders once."""
    sandbox, source = Sandbox(), source.removeprefix(BYTE_ORDER_MARK)
    try:
        render, names = sandbox.compile_template(source)
    except TemplateSyntaxError as error:
        problem = f"{where}: template error in line {error.lineno}: {error.message}"
        raise ConfigError(_TABLE, [problem]) from error
    except Exception as error:  # The compiler's own limits: brackets, loops, digits.
        problem = f"{where}: template cannot be compiled: {_told(error)}"
        raise ConfigError(_TABLE, [problem]) from error
    tree = sandbox.parse(source)
    text = "\0".join(node.data for node in tree.find_all(nodes.TemplateData))
    if names:
        may_lack = frozenset(_with_default(tree)) & names - {ROW_VARIABLE}
        return _Template(_with_shortcut(tree, render), names, may_lack, text)
    try:
        constant = render({})
    except NullPrintedError as error:
        raise ConfigError(_TABLE, [f"{where}: prints a null"]) from error
    except (TemplateError, BudgetError) as error:
        raise ConfigError(_TABLE, [f"{where}: {shortened(str(error))}"]) from error
    except Exception as error:  # A template can raise anything; this one does for every row.
        raise ConfigError(_TABLE, [f"{where}: {_told(error)}"]) from error
    return _Template(lambda _: constant, names, frozenset(), text)


def _with_default(tree: nodes.Template) -> Iterator[str]:
    for node in tree.find_all((nodes.Filter, nodes.Test)):
        of = node.node if node.name in {"default", "d", "defined", "undefined"} else None
        while isinstance(of, nodes.Getattr | nodes.Getitem):
            of = of.node
        if isinstance(of, nodes.Name):
            yield of.name


def _with_shortcut(tree: nodes.Template, render: Render) -> Render:
    """The same, but of texts that a template only puts together, without a detour by Jinja.

    Whatever else it is given (a null, a number, nothing at all) goes the whole way.
    """
    pattern, wanted = "", []
    for node in (child for output in tree.body for child in output.iter_child_nodes()):
        if isinstance(node, nodes.TemplateData):
            pattern += node.data.replace("%", "%%")
        elif isinstance(node, nodes.Name) and node.name != "self":  # Jinja's, in any template.
            pattern += "%s"
            wanted.append(node.name)
        else:
            return render

    def render_texts(values: dict[str, Any]) -> str:
        found: tuple[Any, ...] = tuple([values.get(name) for name in wanted])
        if {*map(type, found)} != {str} or sum(map(len, found)) > MAX_CHARS:
            return render(values)
        return pattern % found

    is_plain = all(isinstance(output, nodes.Output) for output in tree.body)
    return render_texts if is_plain else render


def _told(error: Exception) -> str:
    return shortened(f"{type(error).__name__}: {error}")


def shortened(text: str) -> str:
    """One line of valid UTF-8: a template can put anything into an error, lone surrogates too."""
    text = text if len(text) <= _MAX_ERROR_CHARS else f"{text[:_MAX_ERROR_CHARS]}..."
    return " ".join(writable_text(text).split())


def _checked_messages(name: str, value: object, images: ImageRules) -> Prompt | RowError:
    if not isinstance(value, list) or not value:
        found = type(value).__name__ if value != [] else "an empty list"
        return RowError(
            "bad_messages", f"column {name!r} is {found}, expected a list of {{role, content}}"
        )
    messages = []
    for at, message in enumerate(map(_with_role, value)):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            problem = f"column {name!r}[{at}] has no role, expected {{role, content}}"
            return RowError("bad_messages", problem)
        if not _is_content(message.get("content")):
            expected = "expected a string or a list of parts {type, ...}"
            problem = f"column {name!r}[{at}].content is neither text nor parts, {expected}"
            return RowError("bad_messages", problem)
        # Parquet structs carry every field of every message: null means absent.
        kept = {key: item for key, item in message.items() if item is not None}
        if isinstance(content := kept.get("content"), list):
            kept["content"] = [_checked_part(part, images) for part in content]
        messages.append(kept)
    return messages


_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    **{role: role for role in ("user", "assistant", "system", "tool")},
}
"""Of those who speak in ShareGPT's `conversations`."""


def _with_role(message: object) -> object:
    """A message as OpenAI's API has it, if it is one of ShareGPT's: {from, value}."""
    if not isinstance(message, dict) or message.get("role") is not None:
        return message
    role = _ROLES.get(str(message.get("from")))
    return message if role is None else {"role": role, "content": message.get("value")}


def _is_content(content: object) -> bool:
    """Whether a chat may hold it: nothing, a text, or parts as OpenAI's API has them."""
    if isinstance(content, list):
        return all(isinstance(p, dict) and isinstance(p.get("type"), str) for p in content)
    return content is None or isinstance(content, str)


def turns(example: Example) -> list[dict[str, Any]]:
    """The two messages of an example: question and answer."""
    answer = example.assistant
    if not isinstance(answer, str):
        try:
            answer = orjson.dumps(answer).decode()
        except TypeError:  # An integer of more than 64 bits, which JSON has.
            answer = json.dumps(answer, ensure_ascii=False, separators=(",", ":"))
    return [
        {"role": "user", "content": example.user},
        {"role": "assistant", "content": answer},
    ]


class ImageRefusedError(Exception):
    """A row names an image that the job does not let it have."""


class ImageRules:
    """Tells which images the job lets its rows name. Reads none of them."""

    def __init__(self, config: PromptConfig) -> None:
        folders = config.images_folder or ([] if config.images is None else ["."])
        folders = [folders] if isinstance(folders, str) else folders
        self._folders = [Path(folder).absolute() for folder in folders]
        self._resolved = [folder.resolve() for folder in self._folders]
        self._domains = frozenset(map(str.lower, config.image_domains))

    def url_of(self, image: str) -> str:
        """Return the image as a URL; `http`, `https` and `data` as they are, a path as `file`.

        Raises:
            ImageRefusedError: It is neither below one of the job's folders, links resolved, nor at
                one of its hosts.
        """
        if image.startswith("data:"):
            return image
        if image.startswith(("http://", "https://")):
            return self._allowed_address(image)
        if "://" in image and not image.startswith("file://"):
            msg = f"image {image!r:.120}: expected a path, or a URL of http, https, file or data"
            raise ImageRefusedError(msg)
        is_url = image.startswith("file://")
        path = Path(unquote(urlsplit(image).path) if is_url else image)
        path = self._folders[0] / path if self._folders else path
        self._refuse_outside(image, path)
        return image if is_url else path.as_uri()

    def _allowed_address(self, image: str) -> str:
        host = _HOST.match(image)
        if "*" in self._domains or (host is not None and host[1].lower() in self._domains):
            return image
        raise ImageRefusedError(f"image {image!r:.120}: its host is none of prompt.image_domains")

    def _refuse_outside(self, image: str, path: Path) -> None:
        try:
            resolved = path.resolve()
        except (OSError, RuntimeError, ValueError) as error:  # A link to itself, a NUL.
            raise ImageRefusedError(f"image {image!r:.120} is no path: {error}") from error
        if any(resolved.is_relative_to(folder) for folder in self._resolved):
            return
        folders = f"({', '.join(map(str, self._folders)):.120})" if self._folders else "(not set)"
        raise ImageRefusedError(f"image {image!r:.120} is not below prompt.images_folder {folders}")


def _checked_part(part: dict[str, Any], images: ImageRules) -> dict[str, Any]:
    """Return a part of a row's own message, its image with a URL that the job allows."""
    kind = part["type"]
    media = {key for key, item in part.items() if item is not None and _MEDIA.search(key)}
    if kind != "image_url":
        if media or _MEDIA.search(kind):
            found = f"a part of type {kind!r:.60}" + (f" with {min(media)!r:.60}" if media else "")
            raise ImageRefusedError(f"{found}, expected text or image_url")
        return part
    image = part.get("image_url")
    url = image.get("url") if isinstance(image, dict) else image
    # vLLM keeps images by `uuid` (part of the request): one row's would be another's.
    if not isinstance(url, str) or media != {"image_url"} or part.get("uuid") is not None:
        raise ImageRefusedError("a part of type 'image_url' is no {type, image_url: {url}}")
    is_absolute = url.startswith("/")
    checked = images.url_of(url)
    if checked == url or is_absolute:  # As it stands in the row: it is part of the request's key.
        return part
    return {**part, "image_url": {**image, "url": checked} if isinstance(image, dict) else checked}


def with_images(messages: Messages, images: object, rules: ImageRules) -> Prompt | RowError:
    """Put a row's images before the text of its last user message, as content parts.

    Args:
        messages: The chat.
        images: A path, a URL or bytes, or a list of these; null is no image.
        rules: What the row may name.

    Raises:
        ImageRefusedError: It may not name one of them.
    """
    given = images if isinstance(images, list) else [images]
    parts = []
    for image in given:
        if image is None:
            continue
        if not isinstance(image, str | bytes):
            found = type(image).__name__
            return RowError("bad_image", f"an image is {found}, expected a path, URL or bytes")
        url = _data_url(image) if isinstance(image, bytes) else rules.url_of(image)
        parts.append({"type": "image_url", "image_url": {"url": url}})
    last = max((at for at, m in enumerate(messages) if m["role"] == "user"), default=None)
    if not parts or last is None:
        return messages
    content = messages[last].get("content")
    text = [{"type": "text", "text": content}] if isinstance(content, str) else (content or [])
    changed = {**messages[last], "content": [*parts, *text]}
    return [*messages[:last], changed, *messages[last + 1 :]]


def _data_url(image: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"


def _near(name: str, available: Sequence[str]) -> str:
    if "{{" in name or "{%" in name:
        return "; a template of a raw prompt goes in prompt.template, prompt.text names a column"
    if near := nearest(name, available):
        return f", did you mean {near!r}?"
    return f", it has: {', '.join(available)}"
