"""Pictures from seeds: a picture is a function of (model, seed, index), whatever else is asked for beside it."""

from __future__ import annotations

import secrets

import numpy as np
import pydantic

from rayscale import imaging, latents
from rayscale.contract import ModelCard
from rayscale.errors import ConfigError, TooLargeError, UnavailableError, nearest
from rayscale.imaging import F32, Media
from rayscale.serve import calls
from rayscale.serve.answers import Answer, Format, pictures_json, timing_header
from rayscale.serve.batching import stacks
from rayscale.serve.calls import Ask
from rayscale.serve.gateway import Gateway
from rayscale.serve.table import Release

SAMPLES = 8  # of one call: bounds what others wait for, and memory


class GenerateRequest(pydantic.BaseModel, extra="forbid", strict=True):
    """All of it may be left out. Strict: `"class": false` is no class 0."""

    model: str = pydantic.Field("", max_length=300, description="as everywhere", examples=["flowers"])
    seed: int | None = pydantic.Field(
        None, ge=0, lt=2**53, description="of the noise; without it, one is drawn and told", examples=[7]
    )
    n: int = pydantic.Field(1, ge=1, description="pictures; more than one are answered as JSON", examples=[4])
    first: int = pydantic.Field(0, ge=0, lt=2**31, description="index of the first one: 8 are 0..3 and then 4..7")
    class_: int | str | None = pydantic.Field(
        None,
        alias="class",
        description="name or number, of a model that knows classes; without it they take turns by index",
        examples=["daisy"],
    )
    truncation: float = pydantic.Field(
        latents.Z_MAX, ge=0, le=latents.Z_MAX, description="less is more typical and less varied", examples=[0.7]
    )
    to_seed: int | None = pydantic.Field(
        None, ge=0, lt=2**53, description="walk from `seed` to this one in `n` steps, both included", examples=[8]
    )
    output_format: Media = pydantic.Field("png", description="of the pictures in a JSON answer", examples=["webp"])

    @pydantic.model_validator(mode="after")
    def _whole(self) -> GenerateRequest:
        if self.to_seed is not None and (self.seed is None or self.n < 2 or self.first):
            raise ValueError("to_seed goes with seed and n of at least 2, and without first")
        return self


def inputs_of(card: ModelCard, ask: GenerateRequest, seed: int) -> dict[str, F32]:
    """The noise f32[n, size] and, for a model of classes, their one-hot rows. Raises: ConfigError."""
    by_name = {t.name: t for t in card.spec.inputs}
    if not set(by_name) <= {"z", "label"} or "z" not in by_name:
        raise ConfigError("model", ", ".join(by_name), "is fed by other than noise and class", "see /v1/models")
    size, bound = int(by_name["z"].shape[1]), by_name["z"].high
    truncation = min(ask.truncation, bound)
    if ask.to_seed is None:
        z = latents.latents(seed, ask.n, size, truncation=truncation, first=ask.first)
    else:
        ends = [latents.latents(s, 1, size, truncation=truncation)[0] for s in (seed, ask.to_seed)]
        z = latents.interpolate(ends[0], ends[1], ask.n)
    if "label" not in by_name:
        if ask.class_ is not None:
            raise ConfigError("class", ask.class_, "this model knows no classes", "leave it out")
        return {"z": z}
    count = int(by_name["label"].shape[1])
    if ask.class_ is not None:
        labels = [_class(card, ask.class_)] * ask.n
    else:
        labels = [0] * ask.n if ask.to_seed is not None else [(ask.first + i) % count for i in range(ask.n)]
    return {"z": z, "label": latents.one_hot(labels, count)}


def _class(card: ModelCard, wanted: int | str) -> int:
    if isinstance(wanted, int):
        return wanted  # `one_hot` checks it
    if wanted not in card.classes:
        raise ConfigError("class", wanted, "this model does not know it", nearest(wanted, card.classes))
    return card.classes.index(wanted)


def check(gateway: Gateway, ask: GenerateRequest, form: Format) -> None:
    """What needs no model. Raises: TooLargeError, ConfigError."""
    if ask.n > gateway.settings.max_items:
        raise TooLargeError("n", ask.n, f"at most {gateway.settings.max_items} at once", "ask again with `first`")
    if ask.n > 1 and not form.as_json:
        raise ConfigError(
            "n", ask.n, "one picture fits into an image", "Accept: application/json, or n = 1 and `first`"
        )
    if not form.as_json and "output_format" in ask.model_fields_set:
        raise ConfigError("output_format", ask.output_format, "is of JSON answers", "Accept names an image's format")


async def generate(gateway: Gateway, ask: GenerateRequest, release: Release, form: Format) -> Answer:
    """The pictures, in calls of at most `SAMPLES`."""
    deadline = gateway.deadline()
    card = gateway.card(release, "generate")
    seed = secrets.randbelow(2**53) if ask.seed is None else ask.seed
    inputs, latent_s = await gateway.codec(deadline, inputs_of, card, ask, seed)
    gateway.admit(release.digest, ask.n, deadline, f"{ask.n} pictures")
    pictures: dict[int, F32] = {}
    most = SAMPLES if stacks(card.spec) else 1

    async def some(call: Ask, index: int) -> None:
        samples = slice(index * most, (index + 1) * most)
        outputs = await call({name: value[samples] for name, value in inputs.items()})
        pictures[index] = outputs[card.spec.outputs[0].name]

    timing = await calls.run(gateway.engine, release.digest, some, -(-ask.n // most), deadline)
    media = ask.output_format if form.as_json else form.media
    encoded, encode_s = await gateway.codec(
        deadline, _encode, [pictures[i] for i in range(len(pictures))], media, gateway.settings.quality
    )
    gateway.meters.add("rayscale_queue_seconds", timing.queue_s, model=release.name)
    spans = {"latents": latent_s, "queue": timing.queue_s, "infer": timing.run_s, "encode": encode_s}
    headers = {**gateway.headers(release), "X-Rayscale-Seed": str(seed), "Server-Timing": timing_header(spans)}
    if not form.as_json:
        return Answer(body=encoded[0], media_type=form.media_type, headers=headers)
    each = [{"index": ask.first + i} for i in range(ask.n)]
    about = {**gateway.about(release), "seed": seed}
    body, _ = await gateway.codec(deadline, pictures_json, encoded, media, about, each)
    return Answer(body=body, media_type=form.media_type, headers=headers)


def _encode(pictures: list[F32], media: Media, quality: int) -> list[bytes]:
    made = np.concatenate(pictures)
    if not np.isfinite(made).all():
        raise UnavailableError("model", "NaN", "the picture is not finite", "try another seed")
    return [imaging.encode(imaging.to_hwc_u8(made[i : i + 1]), media, quality) for i in range(len(made))]
