"""S3's GETs on the wire: signed as botocore signs, read as http.client reads, and nothing odd or short is believed."""

from __future__ import annotations

import io
import socket
import threading
from http.client import HTTPResponse, IncompleteRead

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from rayscale.s3_wire import Connections, UnusualError, read_answer, sign

NOW = "20261231T235959Z"
GOOD = b'HTTP/1.1 206 Partial Content\r\nETag: "e"\r\ncontent-length:  4 \r\nX-Odd: \xe9, a:b\r\n\r\n12\r\n'


class _Socket:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def makefile(self, mode: str) -> io.BytesIO:
        return io.BytesIO(self.data)


@given(
    host=st.sampled_from(["127.0.0.1:9000", "s3.amazonaws.com", "[::1]:8000"]),
    name=st.text("abc~/%20.-_", min_size=1),
    headers=st.dictionaries(st.sampled_from(["Range", "If-Match"]), st.text('ab "=-1', min_size=1)),
    keys=st.tuples(st.text("aA1/+", min_size=1), st.text("aA1/+", min_size=1), st.sampled_from(["", "token=="])),
    region=st.sampled_from(["us-east-1", "eu-west-3"]),
)
def test_requests_are_signed_as_botocore_signs_them(host, name, headers, keys, region):
    credentials = Credentials(*keys[:2], keys[2] or None)
    request = AWSRequest("GET", f"http://{host}/b/{name}", headers=headers)
    request.context["timestamp"] = NOW
    auth = S3SigV4Auth(credentials.get_frozen_credentials(), "s3", region)
    auth._modify_request_before_signing(request)
    text = auth.string_to_sign(request, auth.canonical_request(request))
    auth._inject_signature_to_request(request, auth.signature(text, request))
    found = sign(host, f"/b/{name}", headers, credentials.get_frozen_credentials(), region, NOW)
    assert found == {**{k.lower(): v for k, v in request.headers.items()}, "host": host}
    other = sign(host, f"/b/{name}x", headers, credentials.get_frozen_credentials(), region, NOW)  # negative control
    assert found["authorization"] != other["authorization"]


HEADERS = st.dictionaries(
    st.from_regex(r"X-[a-zA-Z0-9-]{1,8}", fullmatch=True), st.from_regex(r"[!-~]{0,9}", fullmatch=True)
)


@given(status=st.sampled_from([200, 206]), headers=HEADERS, body=st.binary(max_size=40), close=st.booleans())
def test_answers_are_read_as_http_client_reads_them(status, headers, body, close):
    all_headers = {**headers, "Content-Length": str(len(body)), **({"Connection": "close"} if close else {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in all_headers.items())
    data = f"HTTP/1.1 {status} Fine\r\n{lines}\r\n".encode() + body
    reply = HTTPResponse(_Socket(data), method="GET")  # type: ignore[arg-type]
    reply.begin()
    answer, stays = read_answer(io.BytesIO(data + b"the next"))
    assert (answer.status, answer.data, stays) == (reply.status, reply.read(), not reply.will_close)
    seen: dict[str, str] = {}
    for name, value in reply.getheaders():
        seen[name.lower()] = f"{seen[name.lower()]}, {value}" if name.lower() in seen else value
    assert answer.headers == seen


def test_an_answer_cut_anywhere_is_an_error():
    answer, stays = read_answer(io.BytesIO(GOOD))
    assert (answer.status, answer.etag, answer.data, stays) == (206, "e", b"12\r\n", True)
    for cut in range(len(GOOD)):
        with pytest.raises((ConnectionError, IncompleteRead)):
            read_answer(io.BytesIO(GOOD[:cut]))


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/2 200\r\n\r\n",
        b"ICY 200 OK\r\n\r\n",
        GOOD.replace(b"206 Partial Content\r\n", b"206 Partial Content\n"),
        GOOD.replace(b"ETag:", b"ETag :"),
        GOOD.replace(b"X-Odd", b" folded"),
        GOOD.replace(b"X-Odd", b"Content-Length: 5\r\nX-Odd"),
        GOOD.replace(b"X-Odd", b"Transfer-Encoding: chunked\r\nX-Odd"),
        GOOD.replace(b"content-length:  4", b"a: b"),
        GOOD.replace(b":  4", b": -4"),
        GOOD.replace(b":  4", b": +4"),
        GOOD.replace(b":  4", b": 4\0"),
        GOOD.replace(b"X-Odd: ", b"X-Odd: " + b"x" * (8 << 10)),
        GOOD.replace(b"X-Odd", b"a: b\r\n" * 100 + b"X-Odd"),
    ],
)
def test_what_is_odd_is_left_to_a_full_client(data):
    with pytest.raises(UnusualError):
        read_answer(io.BytesIO(data))


def test_a_connection_is_used_again_only_after_a_whole_body():
    replies = [GOOD, GOOD, GOOD.replace(b"206", b"412"), GOOD, GOOD.replace(b"1.1", b"1.0"), GOOD[:-1]]
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            left = iter(replies)
            for _ in range(4):
                peer = server.accept()[0]
                accepted.append(0)
                with peer, peer.makefile("rb") as file:
                    while file.readline():
                        while file.readline() != b"\r\n":
                            pass
                        accepted[-1] += 1
                        peer.sendall(reply := next(left))
                        if reply == GOOD[:-1]:
                            break

        thread = threading.Thread(target=serve)
        thread.start()
        connections = Connections(f"127.0.0.1:{server.getsockname()[1]}", None)
        answers = [connections.get("/x", {"host": "h"}) for _ in range(5)]
        with pytest.raises(IncompleteRead):
            connections.get("/x", {"host": "h"})
        with pytest.raises(UnusualError):
            connections.get("/x", {"host": "h\r\nmore: x"})
        for connection in connections.idle:
            connection.close()
        socket.create_connection(server.getsockname()).close()
        thread.join(20)
    assert [answer.status for answer in answers] == [206, 206, 412, 206, 206]
    assert accepted == [3, 2, 1, 0]
    assert connections.idle == []
