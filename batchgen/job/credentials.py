"""Finds credentials written into a job file, so that it can be refused before anything is kept.

A job's tables go into plans, manifests and error texts, and its file into version control. What
is found is named by its key and never repeated.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

_SECRET_KEY = re.compile(
    r"(?:.*[_-])?(?:api_?key|secret|password|passwd|credentials?|private_key|authorization"
    r"|access_key|access_key_id|secret_key|account_key|connection_string)"
    r"|(?:hf|use_auth|auth|access|api|bearer|session|security|refresh|sas)?_?token",
    re.IGNORECASE,
)
_USER_INFO = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@?#]*:[^/\s@?#]+@", re.IGNORECASE)
_SIGNED = re.compile(
    r"://\S*[?&](?:X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token)|sig|signature|token"
    r"|(?:access|auth|api|sas|session)[_-]?token|access_?key(?:_?id)?|AWSAccessKeyId|api_?key|key"
    r"|secret\w*|password|auth)=[^&\s]",
    re.IGNORECASE,
)
_KNOWN_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|AIza[\w-]{35}"
    r"|(?:AKIA|ASIA)[0-9A-Z]{16}\b|xox[abpr]-[\w-]{20,})|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_INSTEAD = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
    "hf": "the environment variable HF_TOKEN, or `hf auth login`",
}
_ELSEWHERE = "an environment variable of the service, or fsspec's own files in ~/.config/fsspec"
_SCHEMES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "adl": "az"}
_COLUMN_NAMES = "input.types"
"""Its keys are names of columns, and `password` is a fine one."""


def find_credentials(tables: dict[str, Any]) -> list[str]:
    """Return a line for every credential in the tables of a job, without the credential."""
    return [
        f"{key}: {what}, which job files must not hold; take it out (and revoke it if the file "
        f"was shared) and use {instead}"
        for key, what, instead in _found(tables, "")
    ]


def redacted(override: str) -> str:
    """A `--set` for an error, or a stand-in if it may hold a credential."""
    name = override.partition("=")[0].rpartition(".")[2].strip()
    is_secret = any(_in_text(override)) or _SECRET_KEY.fullmatch(name)
    return "(not shown)" if is_secret else repr(override)


def _found(value: object, key: str) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, dict):
        for name, item in value.items():
            inner = f"{key}.{name}" if key else str(name)
            is_named = key != _COLUMN_NAMES and _SECRET_KEY.fullmatch(str(name))
            if is_named and item and isinstance(item, str | list | dict):
                yield inner, "is a credential by its name", _instead_of_key(inner)
            else:
                yield from _found(item, inner)
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _found(item, f"{key}[{at}]")
    elif isinstance(value, str):
        for what, instead in _in_text(value):
            yield key, what, instead


def _in_text(text: str) -> Iterator[tuple[str, str]]:
    scheme = text.partition("://")[0].rpartition(" ")[2].lower()
    instead = _INSTEAD.get(_SCHEMES.get(scheme, scheme), _ELSEWHERE)
    if _USER_INFO.search(text):
        yield "has a password in a URL", instead
    if _SIGNED.search(text):
        yield "has a signature or a token in a URL", instead
    if shape := _KNOWN_SHAPES.search(text):
        is_hub = shape[0].startswith("hf_")
        yield "looks like a secret key", _INSTEAD["hf"] if is_hub else instead


def _instead_of_key(key: str) -> str:
    is_hub = key.startswith("model.") and "token" in key
    return _INSTEAD["hf"] if is_hub else _ELSEWHERE
