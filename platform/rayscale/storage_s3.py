"""The S3 half of `storage.py`: AWS or any server that speaks its protocol; what it refuses, in our words."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rayscale.errors import (
    ConfigError,
    ConflictError,
    MissingError,
    RayscaleError,
    ResourceError,
    UnavailableError,
)
from rayscale.observe import log
from rayscale.s3_client import Gets, check_object, client, endpoint, gets
from rayscale.s3_wire import Answer
from rayscale.storage import Entry, Got, Store, join, os_errors, overwritten, whole

T = TypeVar("T")

TRIES = 10  # of a whole request, its body included; where boto3 sends it, each with botocore's own three
BACKOFF_S = 0.2  # before the second try; doubles, up to BACKOFF_MAX_S, with jitter
BACKOFF_MAX_S = 8.0
ARROW_ATTEMPTS = 12  # of pyarrow, with pauses that double up to 10 s or so
GIVE_UP_S = 180.0  # after the first try no other one begins later than this


@dataclass(frozen=True)
class S3Store(Store):
    """A prefix of a bucket, on AWS or any server that speaks its protocol."""

    uri: str
    remote: ClassVar[bool] = True

    @property
    def bucket(self) -> str:
        return self.uri.removeprefix("s3://").partition("/")[0]

    def _full(self, key: str) -> str:
        folder = self.uri.removeprefix("s3://").partition("/")[2]
        return f"{folder}/{key}" if folder else key

    def _at(self, key: str) -> dict[str, str]:
        if not key:
            raise ConfigError("key", key, "must name an object", f"give a key below {self.uri}")
        return {"Bucket": self.bucket, "Key": self._full(key)}

    def list(self, prefix: str = "") -> Iterator[Entry]:
        root, page = self._full(""), dict[str, str]()
        while True:
            query = {"Bucket": self.bucket, "Prefix": root + prefix, **page}
            reply = _request(self.uri, partial(_list_page, query))
            for item in reply.get("Contents", ()):
                key = item["Key"].removeprefix(root)
                if key and not key.endswith("/"):  # consoles make empty objects to show folders
                    yield Entry(key, item["Size"], item["ETag"].strip('"'))
            if not reply.get("IsTruncated"):
                return
            page = {"ContinuationToken": reply["NextContinuationToken"]}

    def get(self, key: str, *, start: int = 0, length: int | None = None, etag: str = "") -> Got:
        query = self._at(key)
        if length == 0:
            return Got(b"", etag)
        headers = {"If-Match": f'"{etag}"'} if etag else {}
        if start or length is not None:
            headers["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        uri = join(self.uri, key)

        def attempt(s3: Gets) -> Got:
            answer = s3.send(query["Bucket"], query["Key"], headers)
            if answer.status == 412 or (
                etag and answer.etag not in (etag, "")
            ):  # also of a server that knows no If-Match
                raise overwritten(uri)
            return Got(_body(answer, start, length) if "Range" in headers else answer.data, answer.etag)

        return _request(uri, attempt, gets)

    def write(self, key: str, data: bytes | bytearray, *, if_absent: bool = False) -> None:
        query = self._at(key) | ({"IfNoneMatch": "*"} if if_absent else {})
        unsure = False  # an earlier try may have arrived although its answer did not

        def put(s3: Any) -> None:
            nonlocal unsure
            try:
                s3.put_object(Body=bytes(data) if isinstance(data, bytearray) else data, **query)
            except Exception as error:
                reply = getattr(error, "response", {}).get("ResponseMetadata", {})
                refused = reply.get("HTTPStatusCode") == 412
                unsure = unsure or not refused or reply.get("RetryAttempts", 0) > 0
                raise

        try:
            _request(join(self.uri, key), put)
        except ConflictError:
            if not (unsure and self.read(key) == data):
                raise

    def upload(self, path: Path, key: str) -> None:
        at = self._at(key)
        with os_errors(path), path.open("rb"):  # a missing file is told here, not as a failed request
            pass
        _request(join(self.uri, key), lambda s3: s3.upload_file(str(path), **at))

    def download(self, key: str, path: Path) -> None:
        def stream(s3: Any) -> None:
            with temporary.open("wb") as file:
                reply = s3.get_object(**self._at(key))
                check_object(reply.get("ETag"))
                for chunk in reply["Body"].iter_chunks(1 << 20):
                    file.write(chunk)

        with whole(path) as temporary:
            _request(join(self.uri, key), stream)

    def exists(self, key: str) -> bool:
        try:
            _request(join(self.uri, key), lambda s3: s3.head_object(**self._at(key)))
        except MissingError:
            return False
        return True

    def delete(self, key: str) -> None:
        _request(join(self.uri, key), lambda s3: s3.delete_object(**self._at(key)))

    def sweep(self, folder: str, names: re.Pattern[str]) -> None:
        """Nothing: parts of a killed upload are no objects; a lifecycle rule of the bucket ends their cost."""


def _list_page(query: dict[str, str], s3: Any) -> Any:
    return s3.list_objects_v2(**query)


def _body(answer: Answer, start: int, length: int | None) -> bytes:
    """The bytes that a ranged GET asked for, their number checked: a truncated answer is an error, no short read."""
    from botocore.exceptions import IncompleteReadError

    if answer.status == 416:  # starts at or beyond the end
        return b""
    if answer.status == 200:  # a server may ignore the range
        return answer.data[start:] if length is None else answer.data[start : start + length]
    found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("content-range", ""))
    first, last, size = (int(n) for n in found.groups()) if found else (-1, -1, 0)
    end = size if length is None else min(start + length, size)
    if (first, last + 1) != (start, end) or len(answer.data) != end - start:
        raise IncompleteReadError(actual_bytes=len(answer.data), expected_bytes=end - start)
    return answer.data


def _request(uri: str, attempt: Callable[[Any], T], connect: Callable[[], Any] = client) -> T:
    """`attempt(client)`, its body included: again after what may pass, in plain words after what will not."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    began = time.monotonic()
    for trial in range(TRIES):
        error: Exception
        try:
            return attempt(connect())
        except (ClientError, BotoCoreError, Boto3Error) as caught:
            # upload_file wraps what the server said in an exception of its own
            wrapped = isinstance(caught, Boto3Error) and (caught.__cause__ or caught.__context__)
            error = wrapped if isinstance(wrapped, Exception) else caught
        final = _final(error, uri)
        if final is not None:
            raise final from None
        pause_s = random.uniform(0.5, 1.0) * min(BACKOFF_S * 2**trial, BACKOFF_MAX_S)
        if trial + 1 == TRIES or time.monotonic() + pause_s - began > GIVE_UP_S:
            break
        told = " ".join(str(error).split())
        log.warning("%s: failed (%s); try %d of %d in %.1f s", uri, told, trial + 2, TRIES, pause_s)
        time.sleep(pause_s)
    rule = f"the object store failed {trial + 1} times ({error})"
    raise UnavailableError("uri", uri, rule, "check AWS_ENDPOINT_URL, try later")


_DENIED = {"AccessDenied", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_PASSING = {"SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "ConditionalRequestConflict",
            "OperationAborted", "BadDigest", "IncompleteBody"}  # fmt: skip


def _final(error: Exception, uri: str) -> RayscaleError | None:
    """What to tell the user of a failure that trying again does not mend; None for one that may pass."""
    from botocore import exceptions as boto

    key_id = os.environ.get("AWS_ACCESS_KEY_ID") or "(not in the environment)"
    if isinstance(error, boto.ClientError):
        code = error.response.get("Error", {}).get("Code", "")
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        if code == "NoSuchBucket":
            return MissingError("bucket", uri, "there is no such bucket", "create it, or correct the address")
        if code in _DENIED or status in (401, 403):
            rule = f"access to {uri} was refused ({code}: {error.response.get('Error', {}).get('Message', '')})"
            return ConfigError("AWS_ACCESS_KEY_ID", key_id, rule, "check the credentials and what they may do")
        if code in _PASSING or status == 429 or (status >= 500 and status not in (501, 507)):
            return None
        if status == 404:
            return MissingError("object", uri, "there is no such object", "check the address")
        if status == 412:
            return ConflictError("object", uri, "exists already", "choose another name or remove it first")
        if status == 507:
            return ResourceError("uri", uri, "the object store is full", "free some space and run again")
        return ConfigError("uri", uri, str(error), "check the address, AWS_ENDPOINT_URL and AWS_DEFAULT_REGION")
    no_credentials = (boto.NoCredentialsError, boto.PartialCredentialsError, boto.CredentialRetrievalError,
                      boto.NoAuthTokenError, boto.TokenRetrievalError)  # fmt: skip
    if isinstance(error, no_credentials):
        return ConfigError("AWS_ACCESS_KEY_ID", key_id, str(error), "set credentials as for any AWS tool")
    passing = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.ChecksumError,
               boto.FlexibleChecksumError)  # fmt: skip
    if isinstance(error, passing):
        return None
    return ConfigError("uri", uri, str(error), "check the address and the AWS_* settings")


def arrow_filesystem(bucket: str) -> Any:
    """`pyarrow.fs.S3FileSystem` for a bucket, at the endpoint and in the region that boto3 would use.

    Raises: MissingError for a bucket that AWS does not know.
    """
    import boto3
    from pyarrow import fs

    region = boto3.session.Session().region_name
    scheme, _, host = endpoint().partition("://")
    if host:
        return _patient(region=region or "us-east-1", endpoint_override=host.rstrip("/"), scheme=scheme)
    try:
        return _patient(region=region or fs.resolve_s3_region(bucket))
    except OSError as error:
        rule = f"its region is unknown ({error})"
        raise MissingError("bucket", bucket, rule, "check the name, or set AWS_DEFAULT_REGION") from None


def _patient(**options: str) -> Any:
    """A `pyarrow.fs.S3FileSystem` that outlives a store away for a minute; its own three attempts take a second.

    Ray Train sends it to other processes, and pyarrow forgets the attempts on that way.
    """
    from pyarrow import fs

    class Patient(fs.S3FileSystem):  # type: ignore[misc]
        def __reduce__(self) -> Any:
            return partial(_patient, **options), ()

    return Patient(**options, retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ARROW_ATTEMPTS))
