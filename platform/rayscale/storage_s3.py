"""The S3 half of `storage.py`: AWS or any server that speaks its protocol. The home of boto3.

Where it is, and whose, comes from boto3's own chain (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, profiles, roles).
"""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import quote

from rayscale.errors import (
    ConfigError,
    ConflictError,
    MissingError,
    RayscaleError,
    ResourceError,
    UnavailableError,
)
from rayscale.observe import log
from rayscale.storage import Entry, Got, Store, join, os_errors, overwritten, whole

T = TypeVar("T")

TRIES = 10  # of a whole request, its body included; where boto3 sends it, each with botocore's own three
BACKOFF_S = 0.2  # before the second try; doubles, up to BACKOFF_MAX_S, with jitter
BACKOFF_MAX_S = 8.0
GIVE_UP_S = 180.0  # after the first try no other one begins later than this
TIMEOUTS_S = (10.0, 60.0)  # to connect; between two packets
CONNECTIONS = 32


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

        def attempt(gets: _Gets) -> Got:
            answer = gets.send(query["Bucket"], query["Key"], headers)
            if answer.status == 412 or (
                etag and answer.etag not in (etag, "")
            ):  # also of a server that knows no If-Match
                raise overwritten(uri)
            return Got(_body(answer, start, length) if "Range" in headers else answer.data, answer.etag)

        return _request(uri, attempt, _gets)

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
                _check_object(reply.get("ETag"))
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

    def sweep(self) -> None:
        """Nothing: parts of a killed upload are no objects; a lifecycle rule of the bucket ends their cost."""


def _list_page(query: dict[str, str], s3: Any) -> Any:
    return s3.list_objects_v2(**query)


def _request(uri: str, attempt: Callable[[Any], T], connect: Callable[[], Any] | None = None) -> T:
    """`attempt(client)`, its body included: again after what may pass, in plain words after what will not."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    began = time.monotonic()
    for trial in range(TRIES):
        error: Exception
        try:
            return attempt((connect or _client)())
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


class _Answer(NamedTuple):
    status: int  # 200, 206, 412 or 416
    headers: Mapping[str, str]
    data: bytes

    @property
    def etag(self) -> str:
        return self.headers.get("etag", "").strip('"')


class _Address(NamedTuple):
    """Where boto3 sent a GET of a bucket, and for which region it signed it."""

    pool: Any  # urllib3's, of the host
    base: str  # URL before the key
    path: str  # the same, without the host
    region: str
    agent: str


class _Gets:
    """A client, and its GETs without the 1 ms of CPU that boto3 spends around each.

    boto3 sends the first of a bucket, and finds address, region and credentials. Those of parts of objects are then the
    same request for another key: botocore signs, urllib3 sends. What has no plain answer is asked again through boto3.
    """

    def __init__(self, s3: Any, session: Any) -> None:
        self.s3, self._credentials = s3, session.get_credentials()
        bundle = session._session.get_config_variable("ca_bundle")  # there is no public way to it
        self._authorities = bundle or os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._addresses: dict[str, _Address | None] = {}  # None: of a kind that boto3 must send
        self._sent = threading.local()
        s3.meta.events.register_last("before-send.s3.GetObject", self._note)

    def _note(self, request: Any, **_: Any) -> None:
        self._sent.request = request

    def send(self, bucket: str, key: str, headers: Mapping[str, str]) -> _Answer:
        """Raises: what botocore raises."""
        address = self._addresses.get(bucket)
        if address is not None and "Range" in headers:  # a whole object has a checksum, which boto3 looks at
            answer = self._repeat(address, key, headers)
            if answer.status in (200, 206, 412, 416):
                return answer
        answer = self._ask(bucket, key, headers)
        if bucket not in self._addresses and answer.status in (200, 206):
            self._addresses[bucket] = self._learn(quote(key, safe="/~"))
        return answer

    def _repeat(self, address: _Address, key: str, headers: Mapping[str, str]) -> _Answer:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import ResponseStreamingError
        from urllib3.exceptions import HTTPError

        name = quote(key, safe="/~")
        request = AWSRequest("GET", address.base + name, headers={**headers, "User-Agent": address.agent})
        S3SigV4Auth(self._credentials.get_frozen_credentials(), "s3", address.region).add_auth(request)
        try:
            plain = {"headers": dict(request.headers), "redirect": False, "decode_content": False}
            reply = address.pool.urlopen("GET", address.path + name, **plain)
        except HTTPError as error:
            raise ResponseStreamingError(error=error) from None
        if reply.status >= 500:  # boto3 would send it thrice more
            raise ResponseStreamingError(error=f"{reply.status} {reply.reason}")
        if reply.status in (200, 206):
            _check_object(reply.headers.get("etag"))
        return _Answer(reply.status, reply.headers, reply.data)

    def _ask(self, bucket: str, key: str, headers: Mapping[str, str]) -> _Answer:
        from botocore.exceptions import ClientError

        named = {name.replace("-", ""): value for name, value in headers.items()}
        try:
            reply = self.s3.get_object(Bucket=bucket, Key=key, **named)
        except ClientError as error:
            status = error.response["ResponseMetadata"].get("HTTPStatusCode")
            if status not in (412, 416):
                raise
            return _Answer(status, {}, b"")
        _check_object(reply.get("ETag"))
        about = reply["ResponseMetadata"]
        return _Answer(about["HTTPStatusCode"], about["HTTPHeaders"], reply["Body"].read())

    def _learn(self, name: str) -> _Address | None:
        import urllib3
        from botocore.httpsession import get_cert_path
        from botocore.utils import get_environ_proxies

        request = self._sent.request
        url, signature = request.url.partition("?")[0], _header(request, "Authorization")
        signed = re.match(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d+/([^/]+)/s3/aws4_request", signature)
        if not signed or not url.endswith(f"/{name}") or get_environ_proxies(url):
            return None
        base = url.removesuffix(name)
        timeout = urllib3.Timeout(connect=TIMEOUTS_S[0], read=TIMEOUTS_S[1])
        options = {"maxsize": CONNECTIONS, "retries": False, "timeout": timeout}
        if base.startswith("https:"):
            options |= {"cert_reqs": "CERT_REQUIRED", "ca_certs": get_cert_path(self._authorities)}
        pool = urllib3.connection_from_url(base, **options)
        return _Address(pool, base, "/" + base.split("/", 3)[3], signed[1], _header(request, "User-Agent"))


def _header(request: Any, name: str) -> str:
    value = request.headers.get(name, "")
    return value.decode() if isinstance(value, bytes) else value


def _check_object(etag: str | None) -> None:
    """A proxy's or a server's page about an error may come with status 200; objects have an ETag."""
    from botocore.exceptions import ResponseStreamingError

    if not etag:
        raise ResponseStreamingError(error="an answer with status 200 that is no object")


def _body(answer: _Answer, start: int, length: int | None) -> bytes:
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


_clients: dict[tuple[Any, ...], _Gets] = {}
_clients_lock = threading.Lock()


def _client() -> Any:
    """This process's S3 client for the AWS settings of this moment. Clients are thread-safe, making one is not."""
    return _gets().s3


def _gets() -> _Gets:
    settings = (os.getpid(), *sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
    with _clients_lock:
        if settings not in _clients:
            _clients[settings] = _new_client()
        return _clients[settings]


def _new_client() -> _Gets:
    import boto3
    from botocore.config import Config

    # A server of one's own answers to HOST/bucket; bucket.HOST needs DNS that it seldom has.
    config = Config(
        retries={"mode": "standard", "total_max_attempts": 3},
        connect_timeout=TIMEOUTS_S[0],
        read_timeout=TIMEOUTS_S[1],
        max_pool_connections=CONNECTIONS,
        s3={"addressing_style": "path"} if endpoint() else None,
    )
    session = boto3.session.Session()
    try:
        return _Gets(session.client("s3", config=config), session)
    except ValueError as error:
        raise ConfigError("AWS_ENDPOINT_URL", endpoint(), str(error), "give a URL such as http://host:9000") from None
