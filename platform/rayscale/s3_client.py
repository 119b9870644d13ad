"""Clients of S3 servers, and their GETs made cheap. The home of boto3.

Where the server is, and whose, comes from boto3's own chain (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`, profiles, roles).
"""

from __future__ import annotations

import os
import re
import ssl
import threading
import time
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any, NamedTuple
from urllib.parse import quote

from rayscale.errors import ConfigError
from rayscale.observe import log
from rayscale.s3_wire import TIMEOUTS_S, Answer, Connections, UnusualError, sign

CONNECTIONS = 32  # of boto3's own pool


def endpoint() -> str:
    """The S3 server's URL where it is not AWS's own."""
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""


class _Address(NamedTuple):
    """Where boto3 sent a GET of a bucket, and for which region it signed it."""

    connections: Connections
    path: str  # before the key
    region: str
    agent: str


class Gets:
    """A client, and its GETs without the 1 ms of CPU that boto3 spends around each.

    boto3 sends the first of a bucket, and finds address, region and credentials. Those of parts of objects are then the
    same request for another key. What has no plain answer is asked again through boto3.
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

    def send(self, bucket: str, key: str, headers: Mapping[str, str]) -> Answer:
        """Raises: what botocore raises."""
        address = self._addresses.get(bucket)
        if address is not None and "Range" in headers:  # a whole object has a checksum, which boto3 looks at
            try:
                answer = self._repeat(address, key, headers)
            except UnusualError as error:  # and so would be the next
                log.warning("s3://%s/%s: %s: boto3 reads this bucket from here on", bucket, key, error)
                self._addresses[bucket] = None
            else:
                if answer.status in (200, 206, 412, 416):
                    return answer
        answer = self._ask(bucket, key, headers)
        if bucket not in self._addresses and answer.status in (200, 206):
            self._addresses[bucket] = self._learn(quote(key, safe="/~"))
        return answer

    def _repeat(self, address: _Address, key: str, headers: Mapping[str, str]) -> Answer:
        from botocore.exceptions import ResponseStreamingError

        path, host = address.path + quote(key, safe="/~"), address.connections.host
        credentials, now = self._credentials.get_frozen_credentials(), time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        sent = sign(host, path, headers, credentials, address.region, now)
        sent |= {"user-agent": address.agent, "accept-encoding": "identity"}
        try:
            answer = address.connections.get(path, sent)
        except (OSError, HTTPException) as error:
            raise ResponseStreamingError(error=error) from None
        if answer.status >= 500:  # boto3 would send it thrice more
            raise ResponseStreamingError(error=f"status {answer.status}")
        if answer.status in (200, 206):
            check_object(answer.etag)
        return answer

    def _ask(self, bucket: str, key: str, headers: Mapping[str, str]) -> Answer:
        from botocore.exceptions import ClientError

        named = {name.replace("-", ""): value for name, value in headers.items()}
        try:
            reply = self.s3.get_object(Bucket=bucket, Key=key, **named)
        except ClientError as error:
            status = error.response["ResponseMetadata"].get("HTTPStatusCode")
            if status not in (412, 416):
                raise
            return Answer(status, {}, b"")
        check_object(reply.get("ETag"))
        about = reply["ResponseMetadata"]
        return Answer(about["HTTPStatusCode"], about["HTTPHeaders"], reply["Body"].read())

    def _learn(self, name: str) -> _Address | None:
        from botocore.httpsession import get_cert_path
        from botocore.utils import get_environ_proxies

        request = self._sent.request
        url, signature = request.url.partition("?")[0], _header(request, "Authorization")
        signed = re.match(r"AWS4-HMAC-SHA256 Credential=[^/]+/\d+/([^/]+)/s3/aws4_request", signature)
        if not signed or not url.endswith(f"/{name}") or get_environ_proxies(url):
            return None
        scheme, _, host, path = url.removesuffix(name).split("/", 3)
        tls = ssl.create_default_context(cafile=get_cert_path(self._authorities)) if scheme == "https:" else None
        host = host.removesuffix(":443" if tls else ":80")
        return _Address(Connections(host, tls), f"/{path}", signed[1], _header(request, "User-Agent"))


def _header(request: Any, name: str) -> str:
    value = request.headers.get(name, "")
    return value.decode() if isinstance(value, bytes) else value


def check_object(etag: str | None) -> None:
    """A proxy's or a server's page about an error may come with status 200; objects have an ETag."""
    from botocore.exceptions import ResponseStreamingError

    if not etag:
        raise ResponseStreamingError(error="an answer with status 200 that is no object")


_clients: dict[tuple[Any, ...], Gets] = {}
_clients_lock = threading.Lock()


def client() -> Any:
    """This process's S3 client for the AWS settings of this moment. Clients are thread-safe, making one is not."""
    return gets().s3


def gets() -> Gets:
    names = sorted(name for name in os.environ if name.startswith("AWS_"))  # items() would decode all values
    settings = (os.getpid(), *((name, os.environ[name]) for name in names))
    with _clients_lock:
        if settings not in _clients:
            _clients[settings] = _new_client()
        return _clients[settings]


def _new_client() -> Gets:
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
        return Gets(session.client("s3", config=config), session)
    except ValueError as error:
        raise ConfigError("AWS_ENDPOINT_URL", endpoint(), str(error), "give a URL such as http://host:9000") from None
