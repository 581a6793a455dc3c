"""Routes of OpenAI's Batch API, as the `openai` client calls them.

Errors have OpenAI's form. Ids are looked up, never made paths; what belongs to another key is not
there. The client asks again by itself when a reply is lost: a batch that is created twice by that
is one, see `_known`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from openai.types import Batch, BatchRequestCounts, FileDeleted, FileObject, Model
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from batchgen.core.runtime import say
from batchgen.serve.runner import Runner, names_of
from batchgen.serve.store import LIVE, Record, Store, new_id, number_now

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator, Sequence

    from starlette.datastructures import FormData
    from starlette.middleware.base import RequestResponseEndpoint

    from batchgen.serve.config import ServeConfig
    from batchgen.serve.keys import Keys
    from batchgen.serve.store import Shelf

_HOUR_S, _DAY_S = 3_600, 86_400
_SAME_S = 600
"""A request that is repeated within this time is the same one."""
_MOST_BATCHES, _MOST_FILES = 100, 10_000
_LEAST_KEPT_S, _MOST_KEPT_S = _HOUR_S, 30 * _DAY_S
_FORM_BYTES = 1 << 16
"""Of an upload, beside the file."""
_BODY_BYTES = 1 << 20
_METADATA = (16, 64, 512)
"""Most pairs; most characters of a key, and of a value."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self, status: int, message: str, code: str | None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {
            "message": message,
            "type": "authentication_error" if status == 401 else "invalid_request_error",
            "param": param,
            "code": code,
        }

    def response(self) -> JSONResponse:
        """Write it; the client does not ask again for what will not change."""
        headers = {"x-should-retry": "false"}
        return JSONResponse({"error": self.body}, self.status, headers)


@dataclass
class Served:
    """What the routes work on."""

    store: Store
    config: ServeConfig
    keys: Keys
    runner: Runner
    audit: Callable[[bytes], object]
    """Takes a line for each call; no contents and no keys are in it."""
    num_calls: Counter[tuple[str, int]] = field(default_factory=Counter)


def make_app(served: Served) -> FastAPI:
    """Make the application."""
    app = FastAPI(title="batchgen", version="1", docs_url=None, redoc_url=None)
    app.state.served = served
    app.include_router(_ROUTES)
    app.middleware("http")(_tell)
    for kind, answer in (
        (ApiError, lambda _, error: error.response()),
        (HTTPException, lambda _, error: _http_error(error).response()),
        (RequestValidationError, lambda _, error: _wrong(error).response()),
        (OSError, _no_disk),
    ):
        app.add_exception_handler(kind, answer)
    return app


def _http_error(error: HTTPException) -> ApiError:
    return ApiError(error.status_code, str(error.detail), None)


def _no_disk(_: Request, error: Exception) -> JSONResponse:
    """Have the client ask again: nothing was accepted."""
    say(f"a call failed: {error}")
    told = {"message": "the server cannot write", "type": "server_error"}
    return JSONResponse({"error": {**told, "param": None, "code": "storage_error"}}, 503)


def _wrong(error: RequestValidationError) -> ApiError:
    first = error.errors()[0]
    param = str(first["loc"][-1])
    kinds = {
        "less_than_equal": "integer_above_max_value",
        "greater_than_equal": "integer_below_min_value",
    }
    return ApiError(
        400, f"{param}: {first['msg']}", kinds.get(first["type"], "invalid_value"), param
    )


async def _tell(request: Request, answer: RequestResponseEndpoint) -> Response:
    """Write down each call."""
    served: Served = request.app.state.served
    began_s = time.monotonic()
    response = await answer(request)
    call = f"{request.method} {getattr(request.scope.get('route'), 'path', '-')}"
    served.num_calls[call, response.status_code] += 1
    line = {
        "at": round(time.time(), 3),
        "key": getattr(request.state, "owner", None),
        "call": call,
        "ids": [str(value)[:64] for value in request.path_params.values()]
        + getattr(request.state, "made", []),
        "status": response.status_code,
        "ms": round((time.monotonic() - began_s) * 1000, 1),
    }
    served.audit(orjson.dumps(line) + b"\n")
    return response


def _served(request: Request) -> Served:
    found: Served = request.app.state.served
    return found


Given = Annotated[Served, Depends(_served)]


def _owner(request: Request, served: Given) -> str:
    owner = served.keys.owner(request.headers.get("authorization", ""))
    if owner is None:
        raise ApiError(401, "the key is missing or unknown", "invalid_api_key")
    request.state.owner = owner
    return owner


Owner = Annotated[str, Depends(_owner)]
_ROUTES = APIRouter()


@_ROUTES.get("/health")
def health(served: Given) -> JSONResponse:
    """Tell whether batches are worked on."""
    is_up = served.runner.is_alive()
    return JSONResponse({"status": "ok" if is_up else "stopped"}, 200 if is_up else 503)


@_ROUTES.get("/metrics")
def metrics(served: Given, _: Owner) -> PlainTextResponse:
    """Tell figures, as Prometheus reads them."""
    return PlainTextResponse("\n".join(_metrics(served)) + "\n")


@_ROUTES.get("/v1/models")
def list_models(served: Given, _: Owner) -> dict[str, Any]:
    """List the names of the model."""
    return {"object": "list", "data": [_model(name) for name in names_of(served.config)]}


@_ROUTES.get("/v1/models/{name:path}")
def get_model(name: str, served: Given, _: Owner) -> dict[str, Any]:
    """Tell of one of its names."""
    if name not in names_of(served.config):
        raise ApiError(404, f"no model {name!r:.80}", "model_not_found", "model")
    return _model(name)


@_ROUTES.post("/v1/files")
async def upload(request: Request, served: Given, owner: Owner) -> dict[str, Any]:
    """Take a file."""
    form = await _form(request, served.config.limits.max_file_mb * 1_000_000)
    try:
        made = await run_in_threadpool(_take_file, served, form, owner)
    finally:
        await form.close()
    request.state.made = [made["id"]]
    return made


def _take_file(served: Served, form: FormData, owner: str) -> dict[str, Any]:
    file, limits = form.get("file"), served.config.limits
    if file is None or isinstance(file, str):
        raise ApiError(400, "file: expected a file", "missing_required_parameter", "file")
    if form.get("purpose") != "batch":
        text = f"purpose: {form.get('purpose')!r:.40}, expected 'batch'"
        raise ApiError(400, text, "invalid_value", "purpose")
    number, created = number_now()
    keep_s = _kept(form.get("expires_after[seconds]"), "expires_after")
    own, size = served.store.files.of(owner), file.size or 0
    num_bytes = size + sum(one.thing.bytes for one in own)
    if len(own) >= limits.max_files or num_bytes > limits.max_total_gb * 1_000_000_000:
        text = f"{len(own):,} files are kept for this key; delete some"
        raise ApiError(400, text, "storage_limit_exceeded", "file")
    thing = FileObject(
        id=new_id("file-"),
        object="file",
        bytes=size,
        created_at=created,
        expires_at=created + (keep_s or int(limits.keep_days * _DAY_S)),
        filename=PurePosixPath(file.filename or "file").name[:255],
        purpose="batch",
        status="processed",
    )
    served.store.keep(Record(thing, owner, number), file.file)
    return _told(thing)


@_ROUTES.get("/v1/files")
def list_files(
    served: Given,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_FILES)] = _MOST_FILES,
    order: Annotated[str, Query(pattern="^(asc|desc)$")] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List the caller's files."""
    found = [one.thing for one in served.store.files.of(owner)]
    found = [one for one in found if purpose in (None, one.purpose)]
    return _page(found[::-1] if order == "desc" else found, after, limit)


@_ROUTES.get("/v1/files/{name}")
def get_file(name: str, served: Given, owner: Owner) -> dict[str, Any]:
    """Tell of a file."""
    return _told(_file(served, name, owner))


@_ROUTES.delete("/v1/files/{name}")
def delete_file(name: str, served: Given, owner: Owner) -> dict[str, Any]:
    """Remove a file."""
    with served.store.lock:
        _file(served, name, owner)
        if served.store.is_needed(name):
            raise ApiError(400, f"{name}: a batch that has not ended reads it", "file_in_use")
        served.store.delete_file(name)
    return FileDeleted(id=name, object="file", deleted=True).model_dump()


@_ROUTES.get("/v1/files/{name}/content")
def get_content(name: str, served: Given, owner: Owner) -> FileResponse:
    """Give a file's bytes."""
    _file(served, name, owner)
    return FileResponse(served.store.content(name), media_type="application/octet-stream")


@_ROUTES.post("/v1/batches")
async def create_batch(
    request: Request,
    served: Given,
    owner: Owner,
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
    x_stainless_retry_count: Annotated[int, Header()] = 0,
) -> dict[str, Any]:
    """Take a batch."""
    asked = await _json(request)
    again = idempotency_key or ("" if x_stainless_retry_count else None)
    made = await run_in_threadpool(_take_batch, served, asked, owner, again)
    request.state.made = [made["id"], made["input_file_id"]]
    return made


def _take_batch(
    served: Served, asked: dict[str, Any], owner: str, again: str | None
) -> dict[str, Any]:
    store, limits = served.store, served.config.limits
    with store.lock:
        digest = hashlib.sha256(orjson.dumps(asked, option=orjson.OPT_SORT_KEYS)).hexdigest()
        own = store.batches.of(owner)
        if again is not None and (known := _known(own, digest, again)) is not None:
            return _told(known)
        _check_batch(asked, served.config.endpoints)
        file = _file(served, asked["input_file_id"], owner)
        if file.purpose != "batch":
            text = f"{file.id}: its purpose is {file.purpose!r}, expected 'batch'"
            raise ApiError(400, text, "invalid_value", "input_file_id")
        if sum(one.thing.status in LIVE for one in own) >= limits.max_batches:
            text = f"{limits.max_batches} batches of this key have not ended"
            raise ApiError(429, text, "batch_limit_exceeded")
        number, created = number_now()
        thing = Batch(
            id=new_id("batch_"),
            object="batch",
            endpoint=asked["endpoint"],
            input_file_id=file.id,
            completion_window="24h",
            status="validating",
            created_at=created,
            expires_at=created + int(limits.window_h * _HOUR_S),
            request_counts=BatchRequestCounts(total=0, completed=0, failed=0),
            metadata=asked.get("metadata"),
        )
        kept = asked.get("output_expires_after")
        kept = kept.get("seconds", 0) if isinstance(kept, dict) else kept
        seconds = _kept(kept, "output_expires_after")
        more = {"digest": digest, "again": again or None, "output_expires_s": seconds}
        store.batches.put(Record(thing, owner, number, more))
    store.changed.set()
    return _told(thing)


@_ROUTES.get("/v1/batches")
def list_batches(
    served: Given,
    owner: Owner,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=_MOST_BATCHES)] = 20,
) -> dict[str, Any]:
    """List the caller's batches, the newest first."""
    return _page([one.thing for one in reversed(served.store.batches.of(owner))], after, limit)


@_ROUTES.get("/v1/batches/{name}")
def get_batch(name: str, served: Given, owner: Owner) -> dict[str, Any]:
    """Tell of a batch."""
    return _told(_found(served.store.batches, name, owner, "batch").thing)


@_ROUTES.post("/v1/batches/{name}/cancel")
def cancel_batch(name: str, served: Given, owner: Owner) -> dict[str, Any]:
    """Have a batch end with what it has."""
    store = served.store
    with store.lock:
        found = _found(store.batches, name, owner, "batch").thing
        if found.status not in LIVE:
            raise ApiError(400, f"{name} is {found.status}", "batch_not_cancellable")
        if found.status in ("validating", "in_progress"):
            found = store.update(name, status="cancelling", cancelling_at=int(time.time()))
    store.changed.set()
    return _told(found)


def _file(served: Served, name: str, owner: str) -> FileObject:
    found: FileObject = _found(served.store.files, name, owner, "file").thing
    return found


def _told(thing: Batch | FileObject) -> dict[str, Any]:
    """As the API gives it; a batch with its empty fields."""
    return thing.model_dump(mode="json", exclude_none=isinstance(thing, FileObject))


def _model(name: str) -> dict[str, Any]:
    return Model(id=name, created=0, object="model", owned_by="batchgen").model_dump()


def _found(shelf: Shelf[Any], name: str, owner: str, what: str) -> Record[Any]:
    found = shelf.get(name, owner)
    if found is None:
        raise ApiError(404, f"no {what} {name!r:.80}", "not_found", f"{what}_id")
    return found


def _page(things: Sequence[Any], after: str | None, limit: int) -> dict[str, Any]:
    start = 0
    if after is not None:
        at = next((at for at, one in enumerate(things) if one.id == after), None)
        if at is None:
            raise ApiError(
                400, f"after: nothing has the id {after!r:.80}", "invalid_value", "after"
            )
        start = at + 1
    page = things[start : start + limit]
    return {
        "object": "list",
        "data": [_told(one) for one in page],
        "first_id": page[0].id if page else None,
        "last_id": page[-1].id if page else None,
        "has_more": start + limit < len(things),
    }


def _known(own: Sequence[Record[Batch]], digest: str, again: str) -> Batch | None:
    """Find the batch that a repeated request has made already.

    Args:
        own: The caller's.
        digest: Of the request's body.
        again: The caller's own name for it, or nothing.
    """
    for one in reversed(own):
        is_same = one.more.get("digest") == digest
        if again and one.more.get("again") == again:
            if not is_same:
                text = "this Idempotency-Key was used for another request"
                raise ApiError(400, text, "idempotency_key_reused")
            return one.thing
        if not again and is_same and time.time() - one.thing.created_at < _SAME_S:
            return one.thing
    return None


def _check_batch(asked: dict[str, Any], endpoints: Sequence[str]) -> None:
    """Refuse parameters; what is wrong with the file makes a batch that fails."""
    known = {"input_file_id", "endpoint", "completion_window", "metadata", "output_expires_after"}
    for name in ("input_file_id", "endpoint", "completion_window"):
        if not isinstance(asked.get(name), str):
            raise ApiError(400, f"{name}: expected a text", "missing_required_parameter", name)
    for name in asked:
        if name not in known:
            raise ApiError(400, f"{name!r:.80} is no parameter", "unknown_parameter", name[:80])
    if asked["endpoint"] not in endpoints:
        text = f"endpoint: {asked['endpoint']!r:.80}, expected {' or '.join(endpoints)}"
        raise ApiError(400, text, "invalid_value", "endpoint")
    if asked["completion_window"] != "24h":
        text = f"completion_window: {asked['completion_window']!r:.40}, expected '24h'"
        raise ApiError(400, text, "invalid_value", "completion_window")
    metadata = asked.get("metadata")
    if metadata is None:
        return
    most, of_key, of_value = _METADATA
    is_fine = isinstance(metadata, dict) and len(metadata) <= most
    is_fine = is_fine and all(
        len(key) <= of_key and isinstance(value, str) and len(value) <= of_value
        for key, value in metadata.items()
    )
    if not is_fine:
        text = f"metadata: expected up to {most} texts of up to {of_value} characters"
        raise ApiError(400, text, "invalid_value", "metadata")


def _kept(value: object, param: str) -> int | None:
    """Read for how many seconds a file is to be kept."""
    if value is None:
        return None
    with suppress(ValueError, TypeError):
        seconds = int(value)  # type: ignore[call-overload]
        if _LEAST_KEPT_S <= seconds <= _MOST_KEPT_S:
            return int(seconds)
    text = f"{param}: expected {_LEAST_KEPT_S} to {_MOST_KEPT_S} seconds"
    raise ApiError(400, text, "invalid_value", param)


async def _bounded(request: Request, most: int) -> AsyncGenerator[bytes, None]:
    """Yield a body, and refuse it as soon as it is too large."""
    error = ApiError(413, f"more than {most:,} bytes", "file_too_large", "file")
    told = request.headers.get("content-length", "0")
    if not told.isdigit() or int(told) > most:
        raise error
    num = 0
    async for chunk in request.stream():
        num += len(chunk)
        if num > most:
            raise error
        yield chunk


async def _form(request: Request, most: int) -> FormData:
    """Read an upload; the file goes to disk as it comes."""
    body = _bounded(request, most + _FORM_BYTES)
    try:
        return await MultiPartParser(request.headers, body, max_files=1, max_fields=16).parse()
    except (MultiPartException, KeyError) as error:
        text = f"expected multipart/form-data with a file: {error}"
        raise ApiError(400, text, "invalid_request") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the upload was broken off", "invalid_request") from error


async def _json(request: Request) -> dict[str, Any]:
    data = b"".join([chunk async for chunk in _bounded(request, _BODY_BYTES)])
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_json") from error
    if not isinstance(found, dict):
        raise ApiError(400, "the body is no object", "invalid_json")
    return found


def _metrics(served: Served) -> Iterator[str]:
    batches, files = served.store.batches.all(), served.store.files.all()
    yield "# TYPE batchgen_batches gauge"
    for state, num in sorted(Counter(one.thing.status for one in batches).items()):
        yield f'batchgen_batches{{status="{state}"}} {num}'
    counts = [one.thing.request_counts for one in batches if one.thing.request_counts is not None]
    figures = {
        "batches_at_work": served.runner.num_at_work,
        "files": len(files),
        "file_bytes": sum(one.thing.bytes for one in files),
        "requests_completed": sum(one.completed for one in counts),
        "requests_failed": sum(one.failed for one in counts),
    }
    for name, value in figures.items():
        yield f"# TYPE batchgen_{name} gauge"
        yield f"batchgen_{name} {value}"
    yield "# TYPE batchgen_calls_total counter"
    for (call, status), num in sorted(served.num_calls.items()):
        yield f'batchgen_calls_total{{call="{call}",status="{status}"}} {num}'
