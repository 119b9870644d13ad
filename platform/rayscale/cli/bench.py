"""`rayscale bench`: what an endpoint does under a load that does not wait for it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import typer

from rayscale.bulk.work import READ, suffix
from rayscale.client import KEY, AsyncClient, calls
from rayscale.client.calls import Call
from rayscale.client.load import Shot, arrivals, fire, summary
from rayscale.errors import ConfigError, MissingError, UnavailableError
from rayscale.imaging import Media, encode
from rayscale.observe import progress
from rayscale.storage import open_store

PICTURES = 16  # of a made-up load, all different


def bench(
    url: Annotated[str, typer.Argument(help=f"Of the endpoint, e.g. `http://127.0.0.1:8000`. Its key is ${KEY}.")],
    rate: Annotated[float, typer.Option(min=0.01, help="Requests a second, whatever the answers.")] = 20.0,
    seconds: Annotated[float, typer.Option(min=0.1, help="How long requests leave.")] = 30.0,
    file: Annotated[
        list[Path] | None, typer.Option(help="A picture or a folder of some, sent in turn; may be repeated.")
    ] = None,
    size: Annotated[
        str, typer.Option(help="WIDTHxHEIGHT of made-up pictures, in pixels.", show_default="256x256")
    ] = "",
    model: Annotated[str, typer.Option(help="What is asked for.", show_default="the server's default")] = "",
    task: Annotated[Literal["upscale", "restore", "models"], typer.Option(help="Which route is asked.")] = "upscale",
    media: Annotated[Media, typer.Option("--format", help="Of the answers.")] = "png",
    timeout_s: Annotated[float, typer.Option("--timeout", help="Of a request, in seconds.")] = 60.0,
    poisson: Annotated[bool, typer.Option("--poisson", help="Arrivals by chance instead of evenly.")] = False,
    seed: Annotated[int, typer.Option(help="Of the chance and of made-up pictures.")] = 0,
    max_in_flight: Annotated[int, typer.Option(min=1, help="More are not sent, and count as errors.")] = 500,
) -> dict[str, Any]:
    """Measure an endpoint under open-loop load: requests leave by a clock, and nothing is tried again.

    Latencies count from when a request was due, so a stall is seen whole. `sent_late_ms` is how late this program sent
    them: where it is not small, the load generator is the bottleneck.
    """
    if file and size:
        raise ConfigError("--size", size, "has no effect with --file", "leave one out")
    if task == "models" and (file or size or model):
        raise ConfigError("--task", task, "takes no picture and no model", "leave them out")
    asked = _calls(task, [calls.encoded(path) for path in _files(file)] if file else made_up(size or "256x256", seed),
                   model, media)  # fmt: skip
    due = arrivals(rate, seconds, seed if poisson else None)
    shots = asyncio.run(_fire(url, timeout_s, asked, due, max_in_flight))
    found = summary(shots)
    print(table(found))
    if shots and not found["answered"]:
        raise UnavailableError("url", url, f"no answer in {len(shots)} requests", shots[0].line or shots[0].error)
    return {"url": url, "task": task, "rate": rate, "seconds": seconds, **found}


async def _fire(url: str, timeout_s: float, asked: Sequence[Call[Any]], due: Sequence[float], num: int) -> list[Shot]:
    async with AsyncClient(url, key=os.environ.get(KEY, ""), timeout_s=timeout_s, retries=0) as client:
        with progress("seconds", round(due[-1]) if due else 0, "s") as bar:
            firing = asyncio.create_task(fire(client, asked, due, max_in_flight=num))
            for second in range(10**9):
                bar.update(min(second, bar.total))
                if (await asyncio.wait({firing}, timeout=1.0))[0]:
                    break
        return firing.result()


def _calls(task: str, pictures: Sequence[bytes], model: str, media: Media) -> list[Call[Any]]:
    if task == "models":
        return [calls.models()]
    if task == "restore":
        return [calls.restore(data, model=model, media=media) for data in pictures]
    return [calls.upscale(data, model=model, media=media) for data in pictures]


def _files(given: Sequence[Path]) -> list[Path]:
    found = [path for path in given if not path.is_dir()]
    for folder in (path for path in given if path.is_dir()):
        found += [folder / entry.key for entry in open_store(folder).list() if suffix(entry.key) in READ]
    if not found:
        raise MissingError("--file", given[0], "holds no picture", "name a picture, or a folder of some")
    return found


def made_up(size: str, seed: int) -> list[bytes]:
    """Different smooth pictures with a little noise, as PNG. Raises: ConfigError."""
    width, x, height = size.lower().partition("x")
    if not (x and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ConfigError("--size", size, "must be WIDTHxHEIGHT in pixels", "e.g. 512x384")
    found = []
    for i in range(PICTURES):
        draw = np.random.default_rng([seed, i])
        coarse = draw.integers(0, 256, (6, 8, 3)).astype(np.float32)
        smooth = cv2.resize(coarse, (int(width), int(height)), interpolation=cv2.INTER_CUBIC)
        noisy = smooth + draw.integers(-2, 3, smooth.shape)
        found.append(encode(np.clip(noisy, 0, 255).astype(np.uint8), "png"))
    return found


def table(found: Mapping[str, Any]) -> str:
    """A summary for people."""
    columns = list(found["latency_ms"] or found["sent_late_ms"])
    lines = [f"{'ms':<14}" + "".join(f"{name:>10}" for name in columns)]
    for title, key in (("latency", "latency_ms"), ("sent late", "sent_late_ms")):
        lines.append(f"{title:<14}" + "".join(f"{value:>10.1f}" for value in found[key].values()))
    lines.append(f"{found['answered']} of {found['sent']} answered, {found['answers_per_s']:.1f}/s; "
                 f"longest gap between answers {found['longest_gap_ms']:.0f} ms")  # fmt: skip
    lines += [f"{count:>6} x {kind}" for kind, count in found["errors"].items()]
    lines += [f"{count:>6} by {name}" for name, count in found["models"].items()]
    return "\n".join(lines)
