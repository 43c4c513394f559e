"""What an object store answers when it refuses or fails, in words that say what to do, and without any credential."""

import re
from collections.abc import Generator
from contextlib import contextmanager

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotSupportedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from fcache.cache_spec.errors import DataError, NoSpaceError

# S3 code or HTTP status of a store without room.
FULL = ("XMinioStorageFull", "QuotaExceeded", "InsufficientStorage", "507 ")


@contextmanager
def explained(url: str, name: str = "") -> Generator[None]:
    """Turns errors of obstore into FileNotFoundError, DataError and NoSpaceError that name the object.

    The store's own text is not shown whole, nor chained: it holds request addresses, which may be signed.
    """
    where = f"{url}/{name}" if name else url
    try:
        yield
    except FileNotFoundError as e:
        if "NoSuchBucket" in str(e):
            raise DataError(_no_bucket(url)) from None
        raise FileNotFoundError(where) from None
    except (BaseError, PermissionError, ValueError) as e:
        raise _error(e, url, where) from None


def is_refused(error: Exception) -> bool:
    """Whether a conditional write failed on its condition (or, the answer being lost, on its own first attempt)."""
    refusals = (AlreadyExistsError, PreconditionError, FileNotFoundError)
    return isinstance(error, refusals) and "NoSuchBucket" not in str(error)


def is_lost(error: Exception) -> bool:
    """Whether the connection failed before an answer was whole, and obstore has not repeated it as often as it may."""
    text = str(error)
    if "NoSuchUpload" in text:
        # What ends an upload was done, and when asked again the store knows of none.
        return True
    unanswered = isinstance(error, GenericError) and not _status(text) and "HTTP error" in text
    return unanswered and not re.search(r"after (\d+) retries, max_retries: \1\b", text)


def is_unknown(error: Exception) -> bool:
    """Whether nobody knows if a write was done: no answer came, or one that says that the server failed."""
    return isinstance(error, GenericError) and not _status(str(error)).startswith(("3", "4"))


def is_past_the_end(error: Exception) -> bool:
    """Whether a range begins after the end of its object."""
    return isinstance(error, GenericError) and (_status(str(error)).startswith("416") or "StartTooLarge" in str(error))


def _error(error: Exception, url: str, where: str) -> DataError | NoSpaceError:
    text = str(error)
    code = _code(text)
    if "NoSuchBucket" in text:
        return DataError(_no_bucket(url))
    denied = isinstance(error, (PermissionDeniedError, UnauthenticatedError, PermissionError))
    if denied or _status(text)[:3] in ("401", "403"):
        return DataError(
            f"access to {where} was denied ({code}); check the credentials in the environment (AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN) and that they may list, read, write and delete there"
        )
    if any(word in text for word in FULL):
        return NoSpaceError(f"no space left (or quota exceeded) in the object store at {where} ({code}); free some")
    if isinstance(error, NotSupportedError):
        return DataError(f"{url}: the object store lacks an operation that a cache needs ({code})")
    if "BadScheme" in text:
        return DataError(f"{url}: the endpoint in AWS_ENDPOINT_URL is plain http; set AWS_ALLOW_HTTP=true to use it")
    if "169.254.169.254" in text or "credential" in text.lower():
        return DataError(
            f"{url}: no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
            "AWS_SKIP_SIGNATURE=true for a public bucket"
        )
    if _status(text).startswith("3"):
        return DataError(f"{url}: the bucket is in another region ({code}); set AWS_REGION")
    return DataError(
        f"{where}: the object store failed ({code}), after retries where they make sense; check the network and "
        "AWS_ENDPOINT_URL, then run the same command again"
    )


def _no_bucket(url: str) -> str:
    return f"{url}: there is no such bucket; make it first, or check the name, AWS_REGION and AWS_ENDPOINT_URL"


def _status(text: str) -> str:
    found = re.search(r"status code: (\d{3} [A-Za-z ]*)", text)
    return found[1].strip() if found else ""


def _code(text: str) -> str:
    """HTTP status and S3 code, or else the kind of failure, of an error's text."""
    code = re.search(r"<Code>(\w+)</Code>", text)
    if parts := [p for p in (_status(text), code[1] if code else "") if p]:
        return ", ".join(parts)
    for word, meaning in (
        ("TimedOut", "timed out"),
        ("timed out", "timed out"),
        ("ConnectionRefused", "connection refused"),
        ("ConnectionReset", "connection reset"),
        ("IncompleteMessage", "connection closed in mid-answer"),
        ("dns error", "unknown host"),
        ("HTTP error", "no answer"),
    ):
        if word in text:
            return meaning
    return re.sub(r"\S+://\S+", "…", text.splitlines()[0])[:120]
