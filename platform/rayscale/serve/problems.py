"""What every HTTP answer has: a request id, a place in the metrics, and, when it is an error, RFC 9457 problem+json."""

from __future__ import annotations

import math
import re
import time
import uuid
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import pydantic
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayscale.errors import RayscaleError, UnavailableError, UserError
from rayscale.observe import ASKED, log
from rayscale.serve.access import AccessLog, asked
from rayscale.serve.lean import header
from rayscale.serve.meters import Meters

REQUEST_ID = "X-Request-Id"
MEDIA_TYPE = "application/problem+json"
WATCHED = "rayscale.watched"  # in a scope: who calls us cancels a request whose client hung up
CLIENT_GONE = 499  # nobody reads it; it stands in the metrics
_GOOD_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class Problem(pydantic.BaseModel):
    """An error, as RFC 9457 has it. `type` is for programs, `detail` for people: value, rule and remedy."""

    type: str = pydantic.Field(examples=["urn:rayscale:problem:too-large"])
    title: str = pydantic.Field(examples=["Content Too Large"])
    status: int = pydantic.Field(examples=[413])
    detail: str = pydantic.Field(
        examples=["image=40000x40000: sides have at most 32768 px; send it in parts or smaller"]
    )
    instance: str = pydantic.Field(examples=["/v1/upscale"])
    request_id: str = pydantic.Field(examples=["9f86d081884c7d65"])
    field: str | None = pydantic.Field(default=None, description="what is wrong", examples=["image"])


class BusyError(UnavailableError):
    """No capacity now; `retry_after_s` is when to come back."""

    def __init__(self, field: str, value: object, rule: str, remedy: str, *, retry_after_s: float) -> None:
        super().__init__(field, value, rule, remedy)
        self.retry_after_s = retry_after_s


def install(app: FastAPI) -> None:
    """Make `app` answer every error as a problem."""
    app.add_exception_handler(RayscaleError, _on_ours)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _internal)


def problem(
    request: Request,
    status: int,
    kind: str,
    detail: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """One error as a response, its detail in one line whatever of the request it shows."""
    line = " ".join(detail.split())
    body = Problem(
        type=f"urn:rayscale:problem:{kind}",
        title=HTTPStatus(status).phrase,
        status=status,
        detail=line.encode(errors="backslashreplace").decode(),  # half a surrogate pair out of JSON is no text
        instance=request.url.path,
        request_id=request.scope.get("rayscale.request_id", ""),
        field=field and field.encode(errors="backslashreplace").decode(),
    )
    content = body.model_dump_json(exclude_none=True)
    return Response(content, status, headers, MEDIA_TYPE)


def _on_ours(request: Request, error: Exception) -> Response:
    assert isinstance(error, RayscaleError)
    if not isinstance(error, UserError | UnavailableError):
        return _internal(request, error)
    headers = {}
    if isinstance(error, UnavailableError):
        after_s = error.retry_after_s if isinstance(error, BusyError) else 1.0
        headers["Retry-After"] = str(max(1, math.ceil(after_s)))
    kind = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", type(error).__name__.removesuffix("Error")).lower()
    return problem(request, error.http_status, kind, str(error), error.field, headers)


def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail, status = str(error.detail), error.status_code
    if detail == HTTPStatus(status).phrase:  # Starlette's own: say what can be done
        detail = {
            404: f"there is nothing at {request.url.path}; the routes are at /docs",
            405: f"{request.url.path} does not take {request.method}; see the Allow header",
        }.get(status, detail)
    kind = HTTPStatus(status).phrase.lower().replace(" ", "-")
    return problem(request, status, kind, detail, headers=error.headers)


def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    shown = str(first.get("input", ""))[:200]
    return problem(request, 422, "validation", f"{where}={shown}: {first['msg']}; see /docs", where)


def _internal(request: Request, error: Exception) -> Response:
    """Ours to mend: the log gets the traceback, the client an id to name it by."""
    request_id = request.scope.get("rayscale.request_id", "")
    log.error("request %s: %s", request_id, error, exc_info=error)
    detail = f"something of ours failed; report it with the request id {request_id}"
    return problem(request, 500, "internal", detail)


class Envelope:
    """Around every request, errors included: the request id in and out, status and time into metrics and access log.

    `behind_ray`: Ray Serve names requests itself, in the request's header and in the answer's, and cancels those whose
    clients hang up.
    """

    def __init__(self, app: ASGIApp, meters: Meters, access: AccessLog, behind_ray: bool) -> None:
        self.app, self.meters, self.access, self.behind_ray = app, meters, access, behind_ray

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope, b"x-request-id")
        request_id = given if self.behind_ray or _GOOD_ID.fullmatch(given) else uuid.uuid4().hex
        scope["rayscale.request_id"], scope[WATCHED] = request_id, self.behind_ray
        about = asked(scope, request_id)
        ASKED.set(about)
        started, status, complete = time.monotonic(), CLIENT_GONE, False

        async def send_named(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.behind_ray:
                    MutableHeaders(scope=message)[REQUEST_ID] = request_id
            else:
                complete = not message.get("more_body", False)
            await send(message)

        try:
            await self.app(scope, receive, send_named)
        except Exception as error:
            if status == CLIENT_GONE:
                await _internal(Request(scope), error)(scope, receive, send_named)
            elif not complete:  # half of the answer is out; one that says what failed is raised once more
                raise
        finally:
            seconds, route = time.monotonic() - started, getattr(scope.get("route"), "path", "(none)")
            release = scope.get("rayscale.release", "")
            model = str(getattr(release, "name", release))
            self.meters.add("rayscale_requests_total", route=route, model=model, status=str(status))
            self.meters.add("rayscale_request_seconds", seconds, route=route, model=model)
            self.access.add(scope, route, status, seconds, about)


_EXAMPLES = {  # status -> type, detail, field
    400: ("config", "mask=(none): fill:2 fills what a mask marks; send a second part named mask, or transparent pixels",
          "mask"),
    401: ("unauthorized", "Authorization=(none): this service answers to its keys; send Authorization: Bearer KEY",
          "Authorization"),
    404: ("missing", "model=photo@champion: is not served here; did you mean 'photos@champion'?", "model"),
    406: ("not-acceptable", "Accept=text/html: this route writes image/png, image/jpeg, image/webp, application/json; "
          "ask for one of them", None),
    408: ("request-timeout", "body: the body did not arrive within 60 s; send a smaller file", None),
    413: ("too-large", "image=40000x40000: sides have at most 32768 px; send it in parts or smaller", "image"),
    415: ("media-type", "image=GIF: this format is not read; send a JPEG, PNG, WebP, TIFF, BMP or PPM", "image"),
    422: ("image", "image=PNG, unexpected end of data: is truncated or damaged; send the whole file", "image"),
    429: ("too-many-requests", "key=app: it may ask for 5 requests a second; come back as Retry-After says", "key"),
    503: ("busy", "engine=backlog 75.4 s: this request would miss its deadline; try again later", "engine"),
}  # fmt: skip


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI page."""
    found: dict[int | str, dict[str, Any]] = {}
    for status in statuses:
        kind, detail, field = _EXAMPLES[status]
        example = Problem(
            type=f"urn:rayscale:problem:{kind}",
            title=HTTPStatus(status).phrase,
            status=status,
            detail=detail,
            instance="/v1/upscale",
            request_id="9f86d081884c7d65",
            field=field,
        )
        shown = {"schema": Problem.model_json_schema(), "example": example.model_dump(exclude_none=True)}
        found[status] = {"description": HTTPStatus(status).phrase, "content": {MEDIA_TYPE: shown}}
        if status in (429, 503):
            after = {"description": "seconds until it is worth asking again", "schema": {"type": "integer"}}
            found[status]["headers"] = {"Retry-After": after}
    return found
