"""The S3 half of `storage.py`: AWS or any server that speaks its protocol. The home of boto3.

Where it is, and whose, comes from boto3's own chain (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, profiles, roles).
"""

from __future__ import annotations

import os
import random
import threading
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
from rayscale.storage import Entry, Store, join, os_errors, whole

T = TypeVar("T")

TRIES = 5  # of a whole request, its body included, each with botocore's own three
BACKOFF_S = 0.2  # before the second try; doubles, up to BACKOFF_MAX_S, with jitter
BACKOFF_MAX_S = 8.0


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

    def read(self, key: str, *, start: int = 0, length: int | None = None) -> bytes:
        if length == 0:
            return b""
        query = self._at(key)
        if start or length is not None:
            query["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"
        return _request(join(self.uri, key), lambda s3: _body(s3, query, start, length))

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
                for chunk in s3.get_object(**self._at(key))["Body"].iter_chunks(1 << 20):
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

    def sweep(self) -> None:
        """Nothing: parts of a killed upload are no objects; a lifecycle rule of the bucket ends their cost."""


def _list_page(query: dict[str, str], s3: Any) -> Any:
    return s3.list_objects_v2(**query)


def _body(s3: Any, query: dict[str, str], start: int, length: int | None) -> bytes:
    """The bytes a GET asked for, their number checked: a truncated answer is an error, not a short read."""
    from botocore.exceptions import ClientError, IncompleteReadError

    try:
        reply = s3.get_object(**query)
    except ClientError as error:
        if error.response["ResponseMetadata"].get("HTTPStatusCode") == 416:  # starts at or beyond the end
            return b""
        raise
    data: bytes = reply["Body"].read()
    if "Range" not in query:
        return data
    if reply["ResponseMetadata"]["HTTPStatusCode"] == 200:  # a server may ignore the range
        return data[start:] if length is None else data[start : start + length]
    first, last = (int(n) for n in reply["ContentRange"].split()[1].partition("/")[0].split("-"))
    if first != start or len(data) != last - first + 1:
        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=last - start + 1)
    return data


def _request(uri: str, attempt: Callable[[Any], T]) -> T:
    """`attempt(client)`, its body included: again after what may pass, in plain words after what will not."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    error: Exception = RuntimeError("TRIES is 0")
    for trial in range(TRIES):
        try:
            return attempt(_client())
        except (ClientError, BotoCoreError, Boto3Error) as caught:
            # upload_file wraps what the server said in an exception of its own
            wrapped = isinstance(caught, Boto3Error) and (caught.__cause__ or caught.__context__)
            error = wrapped if isinstance(wrapped, Exception) else caught
        final = _final(error, uri)
        if final is not None:
            raise final from None
        if trial + 1 < TRIES:
            time.sleep(random.uniform(0.5, 1.0) * min(BACKOFF_S * 2**trial, BACKOFF_MAX_S))
    raise UnavailableError(
        "uri", uri, f"the object store failed {TRIES} times ({error})", "check AWS_ENDPOINT_URL, try later"
    )


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
    passing = (boto.HTTPClientError, boto.ConnectionError, boto.IncompleteReadError, boto.ChecksumError)
    if isinstance(error, passing):
        return None
    return ConfigError("uri", uri, str(error), "check the address and the AWS_* settings")


def endpoint() -> str:
    """The S3 server's URL where it is not AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


def arrow_filesystem(bucket: str) -> Any:
    """`pyarrow.fs.S3FileSystem` for a bucket, at the endpoint and in the region that boto3 would use.

    Raises: MissingError for a bucket that AWS does not know.
    """
    import boto3
    from pyarrow import fs

    region = boto3.session.Session().region_name
    scheme, _, host = endpoint().partition("://")
    if host:
        return fs.S3FileSystem(region=region or "us-east-1", endpoint_override=host.rstrip("/"), scheme=scheme)
    try:
        return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket))
    except OSError as error:
        rule = f"its region is unknown ({error})"
        raise MissingError("bucket", bucket, rule, "check the name, or set AWS_DEFAULT_REGION") from None


_clients: dict[tuple[Any, ...], Any] = {}
_clients_lock = threading.Lock()


def _client() -> Any:
    """This process's S3 client for the AWS settings of this moment. Clients are thread-safe, making one is not."""
    settings = (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _clients_lock:
        if settings not in _clients:
            _clients[settings] = _new_client()
        return _clients[settings]


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    # A server of one's own answers to HOST/bucket; bucket.HOST needs DNS that it seldom has.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=10,
        read_timeout=60,
        max_pool_connections=32,
        s3={"addressing_style": "path"} if endpoint() else None,
    )
    try:
        return boto3.session.Session().client("s3", config=config)
    except ValueError as error:
        raise ConfigError("AWS_ENDPOINT_URL", endpoint(), str(error), "give a URL such as http://host:9000") from None
