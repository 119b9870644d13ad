"""What the OpenAPI page says of bodies, answers and headers that FastAPI cannot read off a signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rayscale.serve import problems
from rayscale.serve.answers import MEDIA
from rayscale.serve.body import FORM, JSON

DESCRIPTION = """\
Enlarges, restores, generates, embeds and compares pictures with quality-gated models. What is served is what was
scored: a large picture is cut into tiles that give exactly the bytes of the untiled one, and an answer comes from one
model version.

    curl --data-binary @photo.jpg 'http://localhost:8000/v1/upscale' -o photo-x2.png
    curl -F image=@photo.jpg -F mask=@holes.png 'http://localhost:8000/v1/restore?model=fill' -o filled.png
    curl -d '{"seed": 7, "n": 4, "truncation": 0.7}' -H 'Accept: application/json' 'http://localhost:8000/v1/generate'
    curl -F a=@one.jpg -F b=@two.jpg 'http://localhost:8000/v1/similarity'

**Pictures in** are the body itself, a part `image` of a form, or base64 in JSON (`{"image": "..."}`): JPEG, PNG, WebP,
TIFF, BMP or PPM. They are turned upright by their EXIF orientation; nothing else of EXIF is passed on.
**Pictures out** are PNG, JPEG or WebP by `Accept`, or JSON with base64 for `Accept: application/json`.

**What is kept**: an RGB colour profile goes into the answer (one of gray or CMYK is applied instead). Alpha is enlarged
by bicubic; JPEG, which has none, is laid over white. A 16-bit picture goes through the model in float32 and comes back
with 16 bits as PNG; `X-Rayscale-Bits` says what was written. Classical methods work on 8 bits.

**Models** are named `name`, `name@alias` or `name:version`; without a name, the only one that fits the route answers.
`/v1/models` lists them. `method` asks for a classical method instead, to compare with.

**Canaries**: a new version may answer a share of the requests to `name` or `name@alias` before it answers all of
them. One client meets one version: who it is, is told by its bearer key, or without keys by `X-Request-Id`: send the
same one to be answered by the same version. `X-Rayscale-Model` and `X-Rayscale-Digest` say which answered.

**Keys**: where this service has any, `/v1/` answers to `Authorization: Bearer KEY` alone.

Errors are `application/problem+json` (RFC 9457), with a request id; a 429 or 503 says when to come back.
"""

_BINARY = {"type": "string", "format": "binary"}
BINARY: dict[str, Any] = {"schema": _BINARY}
_BASE64 = {"type": "string", "format": "byte", "description": "base64 of an encoded picture"}

HEADERS = {
    "X-Request-Id": "the request's own id, or one that was made for it",
    "X-Rayscale-Model": "name:version that answered, or classical:method",
    "X-Rayscale-Digest": "SHA-256 of its artifact",
    "X-Rayscale-Provider": "ONNX Runtime's execution provider",
    "Server-Timing": "where the time went, in ms",
}
OF_PICTURES = {
    "X-Rayscale-Tiling": "`whole`, or `tiled` and the number of tiles: the same bytes, unless it says within how much",
    "X-Rayscale-Bits": "of the answer's samples: 8 or 16",
}


def headers(**more: str) -> dict[str, Any]:
    """`more`: with _ for -."""
    named = HEADERS | {name.replace("_", "-"): text for name, text in more.items()}
    return {name: {"description": text, "schema": {"type": "string"}} for name, text in named.items()}


def pictures_json(**facts: str | int) -> dict[str, Any]:
    """The schema of pictures in JSON; `facts`: what stands beside them, as an example."""
    known = {"output_format": "png", "model": "photos-x2:3", "digest": "4e07408562be...", **facts}
    texts = {name: {"type": "integer" if isinstance(value, int) else "string"} for name, value in known.items()}
    entry = {"type": "object", "required": ["b64_json"], "properties": {"b64_json": _BASE64}}
    data = {"type": "array", "items": entry}
    properties = {"created": {"type": "integer"}, **texts, "data": data}
    example = {"created": 1767225600, **known, "data": [{"b64_json": "iVBORw0KGgo..."}]}
    schema = {"type": "object", "required": ["created", "data"], "properties": properties}
    return {"schema": schema, "example": example}


def picture_answers(shown: Mapping[str, Any], json_schema: Mapping[str, Any], *errors: int) -> dict[int | str, Any]:
    """The answers of a route that gives pictures."""
    content = {**dict.fromkeys(MEDIA, BINARY), JSON: json_schema}
    text = "The picture, in the format that `Accept` likes best (PNG by default)"
    return {200: {"description": text, "content": content, "headers": shown}, **problems.responses(*errors)}


def body(
    parts: Mapping[str, str],
    *,
    raw: bool = True,
    required: tuple[str, ...] = ("image",),
    least: int = 0,
    pairs: bool = False,
) -> dict[str, Any]:
    """`requestBody` of a route that takes pictures; `parts`: what each is.

    `least`: so many of each, in a list or as several parts; 0: one. `pairs`: or a list of them, in JSON.
    """
    binary = {n: {**_several(_BINARY, least), "description": text} for n, text in parts.items()}
    base64 = {n: {**_several(_BASE64, least), "description": text} for n, text in parts.items()}
    if least == 1:
        base64 = {n: {"oneOf": [_BASE64, several], "description": parts[n]} for n, several in base64.items()}
    shape = {"type": "object", "required": list(required), "additionalProperties": False}
    example: Any = ["iVBORw0KGgo..."] * least if least > 1 else "iVBORw0KGgo..."
    content: dict[str, Any] = {
        FORM: {"schema": {**shape, "properties": binary}},
        JSON: {"schema": {**shape, "properties": base64}, "example": dict.fromkeys(required, example)},
    }
    if pairs:
        single = content[JSON]["schema"]
        several = {"type": "array", "minItems": 1, "items": single}
        content[JSON] = {
            "schema": {"oneOf": [single, {**shape, "required": ["pairs"], "properties": {"pairs": several}}]},
            "examples": {
                "a pair": {"value": {"a": "iVBORw0KGgo...", "b": "/9j/4AAQ..."}},
                "several": {"value": {"pairs": [{"a": "iVBORw0KGgo...", "b": "/9j/4AAQ..."}]}},
            },
        }
    if raw:
        content = {**dict.fromkeys(("image/jpeg", "image/png", "image/webp", "image/*"), BINARY), **content}
    return {"requestBody": {"required": True, "content": content}}


def _several(one: dict[str, Any], least: int) -> dict[str, Any]:
    return {"type": "array", "minItems": least, "items": one} if least else one
