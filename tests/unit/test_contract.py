"""Documents that cross the platform: equal after a round trip, and refused in one line where they are not ours."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayscale.contract import (
    SCHEMA,
    Lineage,
    ModelCard,
    Scores,
    Spec,
    TensorSpec,
    digest,
    dumps,
    loads,
    to_json,
)
from rayscale.errors import ConfigError

IMAGE = TensorSpec(name="image", shape=("n", 3, "h", "w"))
CARD = ModelCard(
    family="compact",
    spec=Spec(kind="transform", inputs=(IMAGE,), outputs=(dataclasses.replace(IMAGE, shape=("n", 3, "2*h", "2*w")),),
              scale=2, align=4, halo_px=8),
    licence="MIT",
    classes=("tulip", "Löwenzahn"),
    lineage=Lineage(recipe="m:f", images_seen=12),
    parity_max_abs=3e-7,
)  # fmt: skip
SCORES = Scores(subject="s", suite="t", keys=("a", "b"), metrics={"psnr_y": (30.0, 31.5), "ssim_y": (0.9, 1.0)})

texts = st.text(max_size=8)
axes = st.one_of(st.integers(1, 4096), st.sampled_from(["n", "h", "w", "2*h"]))
tensors = st.builds(TensorSpec, name=texts, shape=st.lists(axes, max_size=5).map(tuple), low=st.floats(-4, 0))
specs = st.builds(
    Spec,
    kind=st.sampled_from(["transform", "burst", "generate", "embed"]),
    inputs=st.lists(tensors, max_size=2).map(tuple),
    outputs=st.lists(tensors, max_size=2).map(tuple),
    halo_px=st.one_of(st.none(), st.integers(0, 400)),
    halo_why_none=st.just("attention"),
)
cards = st.builds(
    ModelCard,
    family=texts,
    spec=specs,
    licence=texts,
    classes=st.lists(texts, max_size=3).map(tuple),
    lineage=st.builds(Lineage, recipe=texts, images_seen=st.integers(0, 2**60)),
    parity_max_abs=st.one_of(st.none(), st.floats(0, 1)),
)


def refusal(data: Any, cls: type = ModelCard) -> str:
    with pytest.raises(ConfigError) as error:
        loads(cls, data if isinstance(data, str | bytes) else json.dumps(data), "card.json")
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith("card.json")
    assert error.value.exit_code == 2
    return line


def changed(path: str, value: Any) -> dict[str, Any]:
    """The card as JSON values with one value set, or removed where it is `...`."""
    data = json.loads(dumps(CARD))
    *parents, last = (int(part) if part.isdigit() else part for part in path.split("."))
    node: Any = data
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return data


@settings(max_examples=40)
@given(cards)
def test_a_card_comes_back_equal(card: ModelCard) -> None:
    text = dumps(card)
    assert loads(ModelCard, text, "card.json") == card
    assert loads(ModelCard, text.encode(), "card.json") == card
    assert dumps(loads(ModelCard, text, "card.json")) == text


@given(st.lists(st.tuples(texts, st.floats(allow_nan=False)), max_size=5))
def test_scores_come_back_equal(rows: list[tuple[str, float]]) -> None:
    scores = Scores(subject="s", suite="t", keys=tuple(k for k, _ in rows), metrics={"m": tuple(v for _, v in rows)})
    again = loads(Scores, dumps(scores), "scores")
    assert again == scores
    assert isinstance(again.metrics["m"], tuple)


def test_nan_survives_and_means_are_means() -> None:
    again = loads(Scores, dumps(dataclasses.replace(SCORES, metrics={"m": (1.0, math.nan)})), "scores")
    assert again.metrics["m"][0] == 1.0
    assert math.isnan(again.mean("m"))
    assert SCORES.mean("psnr_y") == 30.75
    assert math.isnan(Scores(subject="s", suite="t", keys=(), metrics={"m": ()}).mean("m"))


def test_json_is_canonical_and_the_digest_is_of_it() -> None:
    assert dumps({"b": 1, "a": (2, {"d": CARD.spec.align, "c": None})}) == (
        '{\n  "a": [\n    2,\n    {\n      "c": null,\n      "d": 4\n    }\n  ],\n  "b": 1\n}\n'
    )
    assert "Löwenzahn" in dumps(CARD)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest(CARD) == digest(loads(ModelCard, dumps(CARD), "card.json"))
    others = [dataclasses.replace(CARD, licence="GPL"), dataclasses.replace(CARD, parity_max_abs=None), SCORES]
    assert len({digest(value) for value in (CARD, *others)}) == 4
    assert to_json(CARD)["spec"]["inputs"][0]["shape"] == ["n", 3, "h", "w"]


def test_a_newer_schema_is_refused_whatever_else_is_in_it() -> None:
    for data in (changed("schema", SCHEMA + 1), {"schema": SCHEMA + 1, "nothing": ["we", "know"]}):
        line = refusal(data)
        assert f"card.json.schema={SCHEMA + 1}" in line
        assert "upgrade rayscale" in line


def test_an_older_document_is_read() -> None:
    """Fields that came later have defaults; a document without them, or without a schema, is of the first version."""
    old = {"family": "compact", "spec": to_json(CARD.spec), "licence": "MIT"}
    card = loads(ModelCard, json.dumps(old), "card.json")
    assert card == ModelCard(family="compact", spec=CARD.spec, licence="MIT")


def test_fields_of_schema_one_are_fixed() -> None:
    """Readers refuse unknown fields: one more needs a new schema number, or yesterday's replicas refuse the card."""
    assert SCHEMA == 1
    fields = {cls.__name__: " ".join(f.name for f in dataclasses.fields(cls)) for cls in (ModelCard, Spec, TensorSpec,
                                                                                         Lineage, Scores)}  # fmt: skip
    assert fields == {
        "ModelCard": "family spec licence classes lineage parity_max_abs schema",
        "Spec": "kind inputs outputs scale align halo_px halo_error halo_why_none",
        "TensorSpec": "name shape low high",
        "Lineage": "recipe recipe_digest manifest manifest_digest code_version run_id images_seen",
        "Scores": "subject suite keys metrics provider schema",
    }


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("licence", ..., "card.json.licence=(missing)"),
        ("spec.kind", ..., "card.json.spec.kind=(missing)"),
        ("lineage.reciep", "x", "did you mean 'recipe'?"),
        ("zzz", 1, "choose one of"),
        ("family", 7, "card.json.family=7: must be str"),
        ("spec.scale", "2", "card.json.spec.scale=2: must be int"),
        ("spec.scale", 2.0, "must be int"),
        ("spec.scale", True, "must be int"),
        ("spec.inputs.0.low", True, "must be float"),
        ("spec.kind", "upscale", "card.json.spec.kind=upscale"),
        ("spec.halo_px", 1.5, "card.json.spec.halo_px"),
        ("spec.inputs", {"image": 1}, "card.json.spec.inputs"),
        ("spec.inputs.0", "image", "card.json.spec.inputs[0]=image: must be an object with the fields of TensorSpec"),
        ("spec.inputs.0.shape.2", None, "card.json.spec.inputs[0].shape[2]"),
        ("spec.inputs.0.nam", "x", "card.json.spec.inputs[0].nam"),
        ("classes", "tulip", "card.json.classes"),
        ("classes", None, "card.json.classes"),
        ("spec", None, "card.json.spec"),
        ("schema", "1", "card.json.schema"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(path: str, value: Any, says: str) -> None:
    assert says in refusal(changed(path, value))


def test_whole_numbers_are_floats_and_lists_are_tuples() -> None:
    """Negative control: JSON writers of other languages write 1.0 as 1."""
    card = loads(ModelCard, json.dumps(changed("parity_max_abs", 0)), "card.json")
    assert type(card.parity_max_abs) is float
    assert loads(ModelCard, json.dumps(changed("spec.inputs.0.high", 1)), "card.json") == CARD


@pytest.mark.parametrize("text", ["", "{", "null", "[]", "3", '"card"', b"\xff\xfe", '{"family": "x"} trailing'])
def test_what_is_no_document_is_refused(text: str | bytes) -> None:
    refusal(text)


def test_long_values_do_not_flood_the_line() -> None:
    assert len(refusal(changed("spec.scale", "x" * 10_000))) < 400


def test_mappings_unions_and_fixed_tuples() -> None:
    @dataclass(frozen=True)
    class Everything:
        pair: tuple[int, str]
        either: int | None
        choice: Literal["a", 2]
        table: Mapping[str, tuple[float, ...]]
        anything: Any = field(default=None)

    # Names of a function's scope are unknown to typing.get_type_hints under postponed annotations.
    Everything.__annotations__ = {
        "pair": tuple[int, str], "either": int | None, "choice": Literal["a", 2],
        "table": Mapping[str, tuple[float, ...]], "anything": Any,
    }  # fmt: skip
    good = {"pair": [1, "x"], "either": None, "choice": 2, "table": {"m": [1, 2.5]}, "anything": {"deep": [1]}}
    assert loads(Everything, json.dumps(good), "e") == Everything((1, "x"), None, 2, {"m": (1.0, 2.5)}, {"deep": [1]})
    for wrong in ({"pair": [1]}, {"pair": ["x", 1]}, {"either": "3"}, {"choice": "b"}, {"table": {"m": 1}}):
        with pytest.raises(ConfigError):
            loads(Everything, json.dumps(good | wrong), "e")


def test_an_image_model_states_its_halo_or_why_it_has_none() -> None:
    for kind in ("transform", "burst"):
        with pytest.raises(ConfigError, match="halo"):
            Spec(kind=kind, inputs=(), outputs=())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"spec\.halo_px=None"):
        loads(ModelCard, json.dumps(changed("spec.halo_px", None)), "card.json")
    assert Spec(kind="transform", inputs=(), outputs=(), halo_why_none="attention").halo_px is None
    assert Spec(kind="embed", inputs=(), outputs=()).halo_px is None


def test_every_image_can_import_it() -> None:
    """Standard library only: the serve image, a client and a notebook read cards without the rest."""
    code = "import sys; before = set(sys.modules); import rayscale.contract; print(*set(sys.modules) - before)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True,
                           env={"PYTHONPATH": str(Path(__file__).parents[2] / "platform")})  # fmt: skip
    tops = {name.partition(".")[0] for name in shown.stdout.split()}
    assert tops - set(sys.stdlib_module_names) == {"rayscale"}
