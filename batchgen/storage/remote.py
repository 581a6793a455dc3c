"""An output in an object store: a bucket and a prefix, with conditional writes instead of links.

`RemoteStorage` keeps the promises of `LocalStorage` by one rule: a name is put once, by a PUT that
the store refuses if the name is there (`If-None-Match: *`). What such a PUT's answer says is not
believed where it could be wrong: after a refusal, a timeout or an error the object is read back,
and it is ours if it has our bytes. The library's own retries would hide that its first try has
landed, so they are off for this PUT.

Readers want files. What is read, and what was written here, lies in a folder of this process's in
the temporary folder, and goes with it. Only names that are put once are read from there again.

A lock is an object that its holder rewrites every few seconds. It is taken over where that stops,
so no two clocks are compared; as everywhere, it only saves what two runs would compute twice.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from batchgen.core.errors import (
    BatchgenError,
    ConfigError,
    OutputError,
    StorageError,
    StoreAwayError,
)
from batchgen.core.places import Bucket, Root
from batchgen.storage import Disk, LocalStorage, PendingFile, saying_where

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from obstore.store import S3Credential, S3Store

_WAITS_S, _PATIENCE_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0), 60.0
_SILENCES = 5
"""A whole request may last this many times as long as silence in it."""
_BEAT_S, _LOST_S, _LOOK_S = 5.0, 20.0, 0.5
_SCRATCH = "batchgen-output-"
_CREDENTIALS_S = 300
_REFUSED = re.compile("status code: 40[134] ")
_NOT_VALID = (
    "ExpiredToken|InvalidAccessKeyId|SignatureDoesNotMatch|InvalidToken|401 Unauthorized|"
    "(?<=AWS credential provider: ).*?(?= Debug source)"
)
_REASONS = {
    "NoSuchBucket": "there is no such bucket; expected one that exists",
    "RequestTimeTooSkewed": "this machine's clock is wrong; set it",
    "PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocation\\w+|incorrectly configured "
    "region": "the bucket is in another region; set storage.region",
    _NOT_VALID: "the credentials are not valid, or not any more; log in again",
    "403 Forbidden": "access is denied; the credentials need s3:ListBucket on the bucket, and "
    "s3:GetObject, s3:PutObject and s3:DeleteObject on the prefix",
}
"""What an error's text has -> what that means."""


def storage_at(root: Root, *, temp_tag: str = "", disk: Disk | None = None) -> LocalStorage:
    """Bind to an output, wherever it is; nothing is created.

    Raises:
        OutputError: There is no way to the object store.
    """
    if isinstance(root, Bucket):
        return RemoteStorage(root)
    return LocalStorage(root, temp_tag=temp_tag, disk=disk)


class _Scratch(Disk):
    """A disk whose files nobody misses after a crash."""

    def sync(self, file: IO[bytes]) -> None:
        """Only let other readers see what was written."""
        file.flush()

    def sync_folder(self, path: Path) -> None:
        """Do nothing."""


class _Upload(PendingFile):
    """A file that is written here and put as a whole."""

    def __init__(self, storage: RemoteStorage, temp: Path, name: str) -> None:
        super().__init__(_Scratch(), temp, storage.root / name)
        self._storage = storage
        self._name = name

    def commit(self, name: str | None = None) -> bool:
        """See `PendingFile`."""
        folder, slash, own = self._name.rpartition("/")
        try:
            with saying_where(self._temp):
                self._file.close()
                data = self._temp.read_bytes()
            return self._storage.put_if_absent(f"{folder}{slash}{name or own}", data)
        finally:
            self.discard()


class RemoteStorage(LocalStorage):
    """A prefix in a bucket; names are relative to it. `root` is where its files are read here."""

    shows = False

    def __init__(self, bucket: Bucket) -> None:
        """Bind; nothing is asked of the store yet.

        Raises:
            OutputError: A library or the credentials are missing.
        """
        self._bucket = bucket
        self._store = _store(bucket)
        self._grace_s = 0.0
        self._is_stopped: Callable[[], bool] = lambda: False
        self._tell: Callable[[StorageError], None] = lambda _: None
        root, let_go = _scratch_folder()
        weakref.finalize(self, let_go)
        super().__init__(root, disk=_Scratch())

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self._bucket,)

    @property
    def where(self) -> str:
        """The URL."""
        return str(self._bucket)

    def check(self, state: str, *, is_dry: bool = False) -> None:
        """Refuse a prefix that is not this job's, and a store that cannot keep what it holds.

        Raises:
            OutputError: The store is not reached, is not open to this user, holds something else
                under the prefix, or puts over what is there although it was asked not to.
        """
        probe = f"{state}/probe-{secrets.token_hex(8)}"
        try:
            found = self.list("")
            if found and state not in found:
                msg = f"{self.where}: holds objects that are not batchgen's; choose another prefix"
                raise OutputError(msg)
            if is_dry:
                return
            is_kept = self.put_if_absent(probe, b"1") and not self.put_if_absent(probe, b"2")
            self.remove(probe)
        except StorageError as error:
            msg = f"{self.where}: {_why(error.__cause__)}"
            raise OutputError(msg) from error
        if not is_kept:
            msg = (
                f"{self.where}: this store ignores If-None-Match, so two runs could put over each "
                "other's results; expected one with conditional writes, as S3 has them"
            )
            raise OutputError(msg)

    @contextmanager
    def patient(
        self, grace_s: float, is_stopped: Callable[[], bool], tell: Callable[[StorageError], None]
    ) -> Iterator[None]:
        """See `LocalStorage`; `tell` hears of each try that failed after the usual ones."""
        self._grace_s, self._is_stopped, self._tell = grace_s, is_stopped, tell
        try:
            yield
        finally:
            self._grace_s = 0.0

    def path(self, name: str) -> Path:
        """Return where a file that is put once can be read; fetches it if need be.

        Raises:
            StorageError: It cannot be fetched right now.
        """
        here = super().path(name)

        def fetch() -> None:
            whole = self._api.get(self._store, name).stream()
            self._keep(name, map(bytes, whole))

        if name and not here.exists():
            self._ask(name, fetch)
        return here

    def _keep(self, name: str, pieces: Iterator[bytes]) -> None:
        temp = self.temp_for(name)
        try:
            with saying_where(temp):
                with temp.open("xb") as file:
                    file.writelines(pieces)
                temp.replace(self.root / name)
        finally:
            temp.unlink(missing_ok=True)

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """See `LocalStorage`."""
        began_s = time.monotonic()
        for number in itertools.count():
            try:
                self._api.put(self._store, name, data, mode="create", use_multipart=False)
                break
            except (self._errors.BaseError, OSError) as error:
                # A 409 lets nobody win; after an error or silence it may be there all the same.
                if not _REFUSED.search(str(error)) and (found := self.read(name)) is not None:
                    if found != data:
                        return False
                    break
                self._wait(name, error, number, began_s)
        self._keep(name, iter([data]))
        return True

    def begin(self, name: str) -> PendingFile:
        """See `LocalStorage`."""
        return _Upload(self, self.temp_for(name), name)

    def replace(self, name: str, data: bytes) -> None:
        """See `LocalStorage`; what another run puts over it meanwhile is lost, or this is."""
        self._ask(name, lambda: self._api.put(self._store, name, data, use_multipart=False))

    def upload(self, name: str) -> None:
        """See `LocalStorage`."""
        here = self.root / name
        with saying_where(here):
            data = here.read_bytes() if here.exists() else None
        if data is not None:
            self.replace(name, data)

    def expose(
        self, name: str, alias: str, is_wanted: Callable[[Path], bool] = lambda _: True
    ) -> bool:
        """Do nothing: an object has one name."""
        return False

    def protect(self, name: str) -> None:
        """Do nothing: whoever may write may do so."""

    def settle(self, folder: str) -> None:
        """Do nothing: what can be listed is durable."""

    def temps(self, folder: str) -> Sequence[str]:
        """None: a PUT that was cut off leaves nothing."""
        return ()

    def read(self, name: str) -> bytes | None:
        """See `LocalStorage`."""
        api = self._api
        found: bytes | None = self._ask(name, lambda: bytes(api.get(self._store, name).bytes()))
        return found

    def list(self, folder: str) -> list[str]:
        """See `LocalStorage`."""
        found = self._ask(
            folder, lambda: self._api.list_with_delimiter(self._store, folder or None)
        )
        # What is made as a folder by hand is an object of no name.
        objects = (one["path"] for one in found["objects"] if one["path"] != folder)
        return sorted({*objects, *found["common_prefixes"]})

    def mark(self, name: str) -> Sequence[int] | None:
        """See `LocalStorage`.

        Raises:
            StorageError: The store does not say.
        """
        found = self._ask(name, lambda: self._api.head(self._store, name))
        if found is None:
            inside = [_changed_ns(one) for one in self._all(name)]
            return [-1, max(inside), 0] if inside else None
        tag = hashlib.sha256(str(found["e_tag"]).encode()).hexdigest()[:12]
        return [found["size"], _changed_ns(found), int(tag, 16)]

    def num_bytes(self, name: str) -> int:
        """See `LocalStorage`; of a folder only."""
        return sum(one["size"] for one in self._all(name))

    def _all(self, folder: str) -> Sequence[Any]:
        """What the store says of each object in a folder, at any depth."""
        return [*chain(*self._ask(folder, lambda: [*self._api.list(self._store, folder)]))]

    def remove(self, name: str) -> None:
        """See `LocalStorage`."""
        self._ask(name, lambda: self._api.delete(self._store, name))
        with suppress(OSError):
            (self.root / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """See `LocalStorage`."""
        for one in self._all(name):
            self.remove(one["path"])

    def lock(self, name: str, who: bytes, *, steal: bool = False) -> Callable[[], None] | None:
        """See `LocalStorage`; one that is taken over notices at its next sign of life."""
        if not self.put_if_absent(name, who):
            if not steal and not self._is_given_up(name):
                return None
            self.replace(name, who)
        has_ended, facts = threading.Event(), json.loads(who)

        def is_ours() -> bool:
            found = _facts(self.read(name))
            return all(found.get(key) == value for key, value in facts.items())

        def live() -> None:
            for beat in itertools.count(1):
                if has_ended.wait(_BEAT_S):
                    return
                with suppress(StorageError):
                    if not is_ours():
                        return
                    self.replace(name, json.dumps({**facts, "beat": beat}).encode())

        def let_go() -> None:
            has_ended.set()
            thread.join()
            with suppress(StorageError):
                if is_ours():
                    self.remove(name)

        thread = threading.Thread(target=live, name="sign of life", daemon=True)
        thread.start()
        return let_go

    def _is_given_up(self, name: str) -> bool:
        """Whether a lock's holder gives no sign of life any more; waits for one for a while."""
        first, until_s = self.read(name), time.monotonic() + _LOST_S
        while time.monotonic() < until_s and not _is_dead(_facts(first)):
            time.sleep(_LOOK_S)
            if (now := self.read(name)) != first:
                return now is None
        return True

    def is_locked(self, name: str) -> bool:
        """Whether its holder has been heard of lately, as far as the clocks agree. For people."""
        mark, facts = self.mark(name), _facts(self.read(name))
        return mark is not None and time.time() - mark[1] / 1e9 < _LOST_S and not _is_dead(facts)

    @property
    def _api(self) -> Any:  # noqa: ANN401 - a library that is an extra
        import obstore

        return obstore

    @property
    def _errors(self) -> Any:  # noqa: ANN401 - of the same
        from obstore import exceptions

        return exceptions

    def _ask(self, name: str, ask: Callable[[], Any]) -> Any:  # noqa: ANN401 - the library's
        """Ask what may be asked again; None of what is absent.

        Raises:
            StorageError: There is no answer right now.
        """
        began_s = time.monotonic()
        for number in itertools.count():
            try:
                return ask()
            except (self._errors.BaseError, OSError) as error:
                if isinstance(error, FileNotFoundError) and "NoSuchBucket" not in str(error):
                    return None
                self._wait(name, error, number, began_s)
        raise AssertionError  # Not reached.

    def _wait(self, name: str, error: Exception, number: int, began_s: float) -> None:
        """Wait before what failed is tried again.

        Raises:
            StorageError: It is not: it was refused, or has been tried for long enough.
        """
        trouble = self._trouble(name, error)
        waited_s = time.monotonic() - began_s
        is_usual = number < len(_WAITS_S) and waited_s <= _PATIENCE_S
        if not is_usual or _REFUSED.search(str(error)):
            if waited_s >= self._grace_s or self._is_stopped():
                raise trouble from error
            self._tell(trouble)
        time.sleep(_WAITS_S[min(number, len(_WAITS_S) - 1)])

    def _trouble(self, name: str, error: Exception) -> StorageError:
        is_invalid = re.search(_NOT_VALID, str(error))
        if is_invalid:  # Who is asked to log in again has to be seen then.
            with suppress(BatchgenError):
                self._store = _store(self._bucket)
        is_refused = _REFUSED.search(str(error)) and not is_invalid
        kind = StorageError if is_refused else StoreAwayError
        return kind(f"{self.where}/{name}", _why(error))


def _store(bucket: Bucket) -> S3Store:
    try:
        import botocore.session
        from botocore.exceptions import BotoCoreError, NoCredentialsError
        from obstore.store import S3Store
    except ImportError as error:
        msg = f"{bucket}: needs obstore and botocore; install the extra: batchgen-vllm[s3]"
        raise OutputError(msg) from error

    def credentials() -> Any:  # noqa: ANN401 - botocore's
        # Of a session of its own: somebody may have logged in again meanwhile.
        return botocore.session.Session(profile=bucket.profile).get_credentials()

    try:
        session = botocore.session.Session(profile=bucket.profile)
        is_known = credentials() is not None
        region = bucket.region or os.environ.get("AWS_REGION")
        region = region or session.get_config_variable("region") or "us-east-1"
        endpoint = bucket.endpoint or os.environ.get("AWS_ENDPOINT_URL_S3")
        endpoint = endpoint or os.environ.get("AWS_ENDPOINT_URL")
    except BotoCoreError as error:
        raise ConfigError(str(bucket), [str(error)]) from error
    if not is_known:
        msg = f"{bucket}: found no credentials; set AWS_PROFILE, or log in, as for the aws command"
        raise OutputError(msg)

    def current() -> S3Credential:
        if (found := credentials()) is None:
            raise NoCredentialsError
        frozen = found.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + timedelta(seconds=_CREDENTIALS_S),
        }

    kms = {"server_side_encryption": "aws:kms", "sse_kms_key_id": bucket.kms_key}
    key: Any = kms if bucket.kms_key else {}
    return S3Store(
        bucket.name,
        prefix=bucket.prefix,
        config={"region": region, **({"endpoint": endpoint} if endpoint else {}), **key},
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=10),
            "read_timeout": timedelta(seconds=bucket.timeout_s),
            "timeout": timedelta(seconds=_SILENCES * bucket.timeout_s),
        },
        # Of a PUT that is refused, only we know whether it was refused for what we put ourselves.
        retry_config={"max_retries": 0, "retry_timeout": timedelta(0)},
        credential_provider=current,
    )


def _changed_ns(found: Any) -> int:  # noqa: ANN401 - the library's
    return int(found["last_modified"].timestamp() * 1e9)


def _why(error: BaseException | None) -> str:
    """Say in a line what the store did not do, and what helps."""
    text = " ".join(str(error).split())
    for pattern, why in _REASONS.items():
        if found := re.search(pattern, text):
            return f"{why} ({found[0]})"
    return f"the store does not answer as it should ({text[:300]})"


def _scratch_folder() -> tuple[Path, Callable[[], None]]:
    """Make a folder that is this object's, and what removes it; removes what killed ones left."""
    for left in Path(tempfile.gettempdir()).glob(f"{_SCRATCH}*"):
        with suppress(OSError):  # Another's, or at work.
            os.close(_locked(left))
            shutil.rmtree(left, ignore_errors=True)
    while True:
        root = Path(tempfile.mkdtemp(prefix=_SCRATCH))
        with suppress(OSError):  # Somebody has just removed it as a killed one's.
            descriptor = _locked(root)
            return root, partial(_remove, root, descriptor)


def _locked(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _remove(root: Path, descriptor: int) -> None:
    shutil.rmtree(root, ignore_errors=True)
    os.close(descriptor)


def _facts(data: bytes | None) -> dict[str, Any]:
    """Who holds a lock; nothing of one that is gone, or is no lock."""
    with suppress(ValueError, TypeError):
        return dict(json.loads(data or b"{}"))
    return {}


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether a lock's holder was a process of this machine that is gone."""
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
