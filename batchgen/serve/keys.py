"""Who may call: a file with a line for each key, its owner's name and the key's SHA-256."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING

from batchgen.core.errors import ConfigError
from batchgen.core.runtime import read_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_PREFIX = "sk-"
_DIGITS = 64


class Keys:
    """Owners by their keys; without a file there is one owner, and no key is asked for."""

    def __init__(self, path: Path | None) -> None:
        """Read them.

        Raises:
            ConfigError: With every line that is none.
        """
        self._owners: Mapping[str, str] = {} if path is None else _read(path)
        self.are_asked = path is not None

    def owner(self, authorization: str) -> str | None:
        """Tell whose key a header holds; None if it is nobody's.

        Each key is compared, in a time that says nothing of how much of it was right.
        """
        if not self.are_asked:
            return ""
        given = hash_of(authorization.removeprefix("Bearer ").strip())
        found = None
        for digest, owner in self._owners.items():
            if hmac.compare_digest(digest, given):
                found = owner
        return found


def hash_of(key: str) -> str:
    """Return what the file has of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _read(path: Path) -> Mapping[str, str]:
    owners, problems = {}, []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or len(words[1]) != _DIGITS:
            problems.append(f"line {number}: expected NAME and the SHA-256 of a key in hex")
            continue
        owners[words[1].lower()] = words[0]
    if problems:
        raise ConfigError(str(path), problems)
    return owners


def new_key(path: Path, owner: str) -> str:
    """Add a key for an owner to the file; return it: it is written nowhere.

    Raises:
        ConfigError: The name is none.
    """
    if not owner.isidentifier() and not owner.replace("-", "_").isidentifier():
        raise ConfigError("--new-key", [f"{owner!r}: expected letters, digits, - and _"])
    key = _PREFIX + secrets.token_urlsafe(32)
    path.touch(mode=0o600)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{owner} {hash_of(key)}\n")
    return key
