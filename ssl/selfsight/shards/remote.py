"""Files at URLs, through fsspec: s3, gs, http and what else is installed, each request tried until it answers.

A range of bytes is one request. Whatever goes wrong with it, an error, silence, or another number of bytes than asked
for, it is asked again after a pause that doubles, unless the answer is that there is no such file or no permission.
Credentials and endpoints are found as fsspec and the clouds' own libraries find them: AWS_PROFILE, AWS_ENDPOINT_URL,
FSSPEC_S3_ANON=true, GOOGLE_APPLICATION_CREDENTIALS …
"""

import errno
import hashlib
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO, UnsupportedOperation
from typing import Any, cast

from selfsight.errors import UserError
from selfsight.shards.cache import Cache, Opened

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}
SLOWEST = 256 * 1024  # bytes per second below which a request counts as silent
WHOLE = 256 * 1024 * 1024  # what is waited for where the length is not known
CONNECTIONS = 64
LISTED = 10_000  # files of which the names are listed
NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}


class Unreachable(OSError):
    """Nothing came, however often it was asked for: the place is at fault and not the file."""


@dataclass(frozen=True)
class Patience:
    """How often a request is made, how long the first pause is, and how long the other side may be silent; seconds."""

    tries: int = 6
    pause: float = 0.2
    longest: float = 5.0
    silence: float = 30.0

    @classmethod
    def of_environment(cls) -> "Patience":
        """SELFSIGHT_TRIES, SELFSIGHT_PAUSE and SELFSIGHT_SILENCE where they are set. Raises UserError if wrongly."""
        try:
            tries = int(os.environ.get("SELFSIGHT_TRIES", cls.tries))
            pause = float(os.environ.get("SELFSIGHT_PAUSE", cls.pause))
            silence = float(os.environ.get("SELFSIGHT_SILENCE", cls.silence))
        except ValueError as e:
            raise UserError(f"SELFSIGHT_TRIES, SELFSIGHT_PAUSE or SELFSIGHT_SILENCE is no number: {e}") from None
        if tries < 1 or not 0 <= pause < 3600 or not 0 < silence < 86400:
            raise UserError("SELFSIGHT_TRIES must be 1 or more, SELFSIGHT_PAUSE 0 or more, SELFSIGHT_SILENCE above 0")
        return cls(tries, pause, max(pause, cls.longest), silence)

    def before(self, attempt: int) -> float:
        """Seconds to wait before attempt 1, 2, …: doubled each time; half by chance, so that crowds come apart."""
        return min(self.longest, self.pause * 2 ** (attempt - 1)) * (0.5 + random.random() / 2)


class RemoteFiles:
    """Of one process: after a fork, make another. URLs come complete."""

    def __init__(self, cache: Cache | None = None, patience: Patience | None = None) -> None:
        self.cache = cache or Cache()
        self.patience = patience or Patience.of_environment()
        self._lock = threading.Lock()
        self._systems: dict[str, Any] = {}

    def read(self, url: str) -> bytes:
        """The whole file as it is now. Raises OSError naming the URL, as the others do."""

        def whole() -> bytes:
            size = self._size(url)
            return self._ask(url, "cat_file", WHOLE) if size is None else self._range(url, 0, size)

        return self._tried(url, whole)

    def kept(self, url: str, digest: str) -> Opened:
        """The whole file, whose SHA-256 should be `digest`, from the cache if it is there; for the caller to close."""
        key = _key("file", digest)

        def whole() -> bytes:
            return self._tried(url, lambda: self._ask(url, "cat_file", WHOLE, start=0))

        def is_right(file: Opened) -> bool:
            right = hashlib.file_digest(file, "sha256").hexdigest() == digest
            file.seek(0)
            return right

        for _ in range(2):  # damaged in the cache; damaged on its way
            file = self.cache.take(key, None, whole)
            if is_right(file):
                return file
            file.close()
            self.cache.drop(key)
        return BytesIO(whole())

    def span(self, url: str, start: int, stop: int, *, run: tuple[int, int], digest: str, again: bool) -> bytes:
        """See `Store.span`."""
        key, length = _key("run", digest, *run), run[1] - run[0]
        if again:
            self.cache.drop(key)
        if again or not self.cache.keeps(length) or not run[0] <= start <= stop <= run[1]:
            return self._tried(url, lambda: self._range(url, start, stop))
        with self.cache.take(key, length, lambda: self._tried(url, lambda: self._range(url, *run))) as file:
            file.seek(start - run[0])
            return file.read(stop - start)

    def names(self, url: str) -> set[str] | None:
        """Of the files in a folder; None where the place does not tell."""
        system, _ = self._system(url)
        if "http" in system.protocol:  # a page of links, perhaps
            return None
        try:
            return {found["name"].rpartition("/")[2] for found in self._ask(url, "ls", 0, detail=True)}
        except FileNotFoundError:
            return set()
        except Exception:  # no permission to list, or no answer: opening the files will tell
            return None

    def _tried(self, url: str, attempt: Callable[[], bytes]) -> bytes:
        problem = ""
        for number in range(self.patience.tries):
            if number:
                time.sleep(self.patience.before(number))
            try:
                return attempt()
            except UserError:
                raise
            except Exception as e:  # every file system raises its own
                if refusal := _refusal(e, url):
                    raise refusal from e
                problem = " ".join(f"{type(e).__name__}: {e}".split())
        raise Unreachable(errno.EIO, f"nothing came in {self.patience.tries} tries ({problem})", url)

    def _range(self, url: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) by one request; fewer only where the file ends before."""
        if stop <= start:
            return b""
        try:
            data = self._ask(url, "cat_file", stop - start, start=start, end=stop)
        except Exception as e:
            if getattr(e, "status", None) != 416 and getattr(e, "errno", None) != errno.EINVAL:
                raise
            data = b""  # no such range
        if len(data) < stop - start:
            size = self._size(url)
            if size is None or len(data) != max(0, size - start):
                raise OSError(f"{len(data)} bytes came of {stop - start}")
        elif len(data) > stop - start:
            raise UnsupportedOperation(f"{len(data)} bytes came of {stop - start}")
        return data

    def _size(self, url: str) -> int | None:
        return self._ask(url, "info", 0).get("size")

    def _ask(self, url: str, method: str, length: int, **how: Any) -> Any:
        """One request, with a limit to the time that an answer of `length` bytes may take."""
        from fsspec.asyn import sync

        system, path = self._system(url)
        if not system.async_impl:
            return getattr(system, method)(path, **how)
        limit = self.patience.silence + length / SLOWEST
        return sync(system.loop, getattr(system, f"_{method}"), path, timeout=limit, **how)

    def _system(self, url: str) -> tuple[Any, str]:
        """fsspec's file system for a URL, one per host or bucket, and what it calls the file."""
        from fsspec.core import url_to_fs

        scheme, _, rest = url.partition("://")
        place = f"{scheme}://{rest.partition('/')[0]}"
        with self._lock:
            system = self._systems.get(place)
            if system is None:
                try:
                    system, _ = url_to_fs(url, **self._options(scheme))
                except (ImportError, ValueError) as e:
                    raise _not_installed(url, scheme, e) from None
                if scheme in ("s3", "s3a"):
                    system.retries = 1
                self._systems[place] = system
        return system, system._strip_protocol(url)

    def _options(self, scheme: str) -> dict[str, Any]:
        """What makes a file system leave the trying again to us, and notice that nothing comes."""
        import fsspec.config

        given, silence = fsspec.config.conf.get(scheme, {}), self.patience.silence
        if scheme in ("s3", "s3a"):
            own = {
                "connect_timeout": silence,
                "read_timeout": silence,
                "retries": {"total_max_attempts": 1},
                "max_pool_connections": CONNECTIONS,
            }
            return {"use_listings_cache": False, "config_kwargs": own | given.get("config_kwargs", {})}
        if scheme in ("http", "https"):
            from aiohttp import ClientTimeout

            own = {"timeout": ClientTimeout(total=None, sock_connect=silence, sock_read=silence)}
            return {"use_listings_cache": False, "client_kwargs": own | given.get("client_kwargs", {})}
        return {}


def _key(*parts: object) -> str:
    return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()


def _refusal(problem: Exception, url: str) -> OSError | None:
    """What asking again would not change, as an error that names the URL."""
    if type(problem.__cause__).__module__.startswith("aiohttp"):  # fsspec's HTTP calls any trouble "not found"
        problem = cast(Exception, problem.__cause__)
    if isinstance(problem, UnsupportedOperation):
        return OSError(errno.ENOTSUP, f"the server does not give ranges of bytes ({problem})", url)
    status = getattr(problem, "status", None)
    text = " ".join(str(problem).split())
    if isinstance(problem, FileNotFoundError) or status in (404, 410):
        return FileNotFoundError(errno.ENOENT, "there is no such file", url)
    if isinstance(problem, PermissionError) or status in (401, 403) or type(problem).__name__ in NO_CREDENTIALS:
        return PermissionError(errno.EACCES, f"access is denied ({text})", url)
    return None


def _not_installed(url: str, scheme: str, problem: Exception) -> UserError:
    if extra := EXTRAS.get(scheme):
        return UserError(f"{url} needs a package that is not installed: pip install 'selfsight[{extra}]'")
    what = " ".join(str(problem).split())
    return UserError(f"{url} cannot be opened ({what}): install what fsspec needs for {scheme}://, or check the URL")
