"""Where an output is: in a folder, or in an object store."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from batchgen.core.errors import OutputError

_SEGMENT = re.compile(r"[A-Za-z0-9!_.*'()=@,+-]+")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


@dataclass(frozen=True, slots=True)
class Bucket:
    """An output in an object store, and how it is reached; credentials are the cloud's own."""

    url: str
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    kms_key: str | None = None
    timeout_s: float = 120.0

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        """Of the bucket."""
        return self.url.split("/")[2]

    @property
    def prefix(self) -> str:
        """Of every key, without slashes around it."""
        return "/".join(self.url.split("/")[3:])


Root = Path | Bucket
"""Where an output is."""


def bucket_url(url: str) -> str:
    """Return a URL of an output as it is kept, without slashes at its end.

    Raises:
        ValueError: It is none of an object store's that is supported, or its keys would be odd.
    """
    scheme, _, rest = url.partition("://")
    name, *segments = rest.rstrip("/").split("/")
    if scheme != "s3":
        near = {"s3a": f", such as s3://{rest}", "file": f", such as {rest}"}.get(scheme, "")
        msg = f"{scheme}:// is not supported, expected a folder or s3://BUCKET/PREFIX{near}"
    elif "@" in name:
        msg = "holds credentials; they come from the environment, see storage.profile"
    elif not _BUCKET.fullmatch(name):
        msg = f"{name!r} is no name of a bucket, expected s3://BUCKET/PREFIX"
    elif not segments:
        msg = "is a whole bucket, expected a prefix in it, such as s3://BUCKET/labels"
    elif odd := [one for one in segments if not _SEGMENT.fullmatch(one) or set(one) <= {"."}]:
        msg = f"{odd[0]!r} cannot be in a prefix, expected letters, digits and !_.*'()=@,+-"
    else:
        return f"s3://{'/'.join((name, *segments))}"
    raise ValueError(msg)


def folder_of(root: Root) -> Path:
    """Return an output's folder, for what works on files only.

    Raises:
        OutputError: It is in an object store.
    """
    if isinstance(root, Bucket):
        msg = f"{root}: is in an object store, expected a folder; this is not supported there yet"
        raise OutputError(msg)
    return root
