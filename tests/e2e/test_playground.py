"""The page at `/` in a real browser: every task, by mouse, by finger and by keyboard, at 1280 and 360 px."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import runpy
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image

ROOT = Path(__file__).parents[2]
chromium = runpy.run_path(str(ROOT / "tests/chromium.py"))
tools = runpy.run_path(str(ROOT / "tests/service.py"))
kinds = runpy.run_path(str(ROOT / "tests/small_kinds.py"))
small = runpy.run_path(str(ROOT / "tests/small_onnx.py"))

pytestmark = pytest.mark.long

AT = "getComputedStyle(document.querySelector('#picture .pair')).getPropertyValue('--at')"
SLIDER = "#picture .pair input"


@pytest.fixture(scope="module")
def serve_app() -> Iterator[Callable[[Any], str]]:
    """Puts a service on a port of this machine; returns its URL."""
    with ExitStack() as stack:

        def start(service: Any) -> str:
            running = uvicorn.Server(uvicorn.Config(service.app, host="127.0.0.1", port=0, log_level="warning"))
            thread = threading.Thread(target=running.run)
            thread.start()
            stack.callback(service.gateway.close)
            stack.callback(thread.join)
            stack.callback(setattr, running, "should_exit", True)
            while not running.started:
                time.sleep(0.02)
            return f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}/"

        yield start


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_app: Callable[[Any], str]) -> tuple[str, Any]:
    """A gateway over one small model of each kind: its URL and the service."""
    folder = tmp_path_factory.mktemp("models")
    service = tools["Service"](folder / "up", small["write"](folder / "up"))
    names = {"inverse": "negative", "holes": "filler", "flowers": "generator", "colours": "embedder", "frames": "burst"}
    for kind in names.values():
        kinds[kind](folder / kind)
    service.serve(**{name: folder / kind for name, kind in names.items()})
    return serve_app(service), service


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = chromium["find"]()
    if program is None:
        pytest.skip("NO BROWSER: the playground is not driven; `apt-get install chromium` and run this again")
    profile = tmp_path_factory.mktemp("browser") / "profile"
    opened = chromium["Browser"](program, profile)
    yield opened
    opened.close()


@pytest.fixture
def page(tab: Any, server: tuple[str, Any]) -> Iterator[Any]:
    """The page, fresh and ready, at 1280 px; it has nothing to complain of when it is done."""
    tab.events.clear()
    tab.size(1280, 900)
    tab.open("about:blank")
    tab.open(server[0])
    tab.until("document.querySelector('.health').dataset.state === 'ready'")
    tab.until("!document.querySelector('nav a[href=\"#compare\"]').hidden")
    yield tab
    assert tab.complaints() == []


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (90, 60)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def go(page: Any, task: str) -> None:
    page.run(f"location.hash = {json.dumps(task)}")
    page.until(f"document.querySelector('nav a[aria-current]').hash === '#{task}'")


def choose(page: Any, section: str, value: str) -> None:
    """A model, as a person's choice would be noticed."""
    page.run(
        f"(s => {{ s.value = {json.dumps(value)}; s.dispatchEvent(new Event('input', {{ bubbles: true }})) }})"
        f"(document.querySelector('{section} select'))"
    )
    assert page.run(f"document.querySelector('{section} select').value") == value


def submit(page: Any, section: str) -> None:
    page.click(f"{section} .primary")
    page.until(f"!document.querySelector('{section}').classList.contains('busy')")
    assert page.run(f"document.querySelector('{section} .error').hidden"), page.run(
        f"document.querySelector('{section} .error').textContent"
    )
    page.until(f"[...document.querySelectorAll('{section} .result img')].every(i => i.complete)")


def facts(page: Any, section: str) -> dict[str, str]:
    rows = page.run(
        f"[...document.querySelectorAll('{section} .facts div')].map(d => [d.children[0].textContent,"
        " d.children[1].firstElementChild?.title || d.children[1].textContent])"
    )
    return dict(rows)


def colours(page: Any, path: Path, *shares: float) -> list[int]:
    """Gray levels on the screen, at these shares of the slider's width and a third of its height."""
    x, y, width, height = page.centre(SLIDER)
    page.screenshot(path)
    gray = Image.open(path).convert("L")
    ratio = gray.width / page.run("innerWidth")
    found = [gray.getpixel((int((x + (s - 0.5) * width) * ratio), int((y - height / 6) * ratio))) for s in shares]
    return [int(level) for level in found]  # type: ignore[call-overload]


def test_a_picture_is_upscaled_and_told_of(page: Any, server: tuple[str, Any], tmp_path: Path) -> None:
    sent = picture(tmp_path / "sent.png", (200, 120, 40))
    page.choose("[data-drop=image] input", sent)
    submit(page, "#picture")
    told = facts(page, "#picture")
    assert told["Model"] == "photos:3"
    assert told["Digest"] == server[1].release.digest
    assert told["Size"].replace("\xa0", " ") == "90 × 60 → 180 × 120"
    assert page.run("document.querySelectorAll('#picture .legend li').length") == 5
    drawn = page.run("""(i => { const c = Object.assign(document.createElement("canvas"), {
        width: i.naturalWidth, height: i.naturalHeight }); c.getContext("2d").drawImage(i, 0, 0);
        return c.toDataURL("image/png"); })(document.querySelector("#picture .after"))""")
    served = Image.open(io.BytesIO(base64.b64decode(drawn.partition(",")[2]))).convert("RGB")
    wanted = httpx.post(f"{server[0]}v1/upscale", params={"model": "photos"}, content=sent.read_bytes()).content
    np.testing.assert_array_equal(np.asarray(served), np.asarray(Image.open(io.BytesIO(wanted))))
    assert page.run("document.querySelector('.download').download") == "sent-upscaled.png"


def test_the_slider_works_by_mouse_finger_and_keyboard(page: Any, tmp_path: Path) -> None:
    """White in, black out: what is on the screen is the one on its left and the other on its right."""
    go(page, "restore")
    choose(page, "#picture", "inverse@champion")
    page.choose("[data-drop=image] input", picture(tmp_path / "white.png", (255, 255, 255)))
    submit(page, "#picture")
    shot = tmp_path / "shot.png"
    assert colours(page, shot, 0.3, 0.7) == [255, 0]

    x, y, width, height = page.centre(SLIDER)
    page.mouse("Pressed", x, y + height / 3)
    for step in range(1, 6):
        page.mouse("Moved", x + width * 0.06 * step, y + height / 3)
    page.mouse("Released", x + width * 0.3, y + height / 3)
    assert abs(float(page.run(AT).rstrip("%")) - 80) < 1
    assert colours(page, shot, 0.7, 0.9) == [255, 0]

    page.press("Home", 36)  # the mouse gave it the focus
    assert page.run(AT) == "0%"
    for _ in range(20):
        page.press("ArrowRight", 39)
    assert page.run(AT) == "10%"
    assert colours(page, shot, 0.05, 0.2) == [255, 0]
    assert page.run(f"document.querySelector('{SLIDER}').getAttribute('aria-valuetext')") == "10 % before"

    page.size(360, 760, phone=True)
    x, y, width, height = page.centre(SLIDER)
    page.touch((x - width * 0.4, y), (x, y), (x + width * 0.15, y))
    page.until(f"parseFloat({AT}) > 60")
    assert abs(float(page.run(AT).rstrip("%")) - 65) < 3
    assert colours(page, shot, 0.6, 0.7) == [255, 0]


# --- by keyboard alone: Tab, Enter, Space, arrows

ENTER, SPACE = ("Enter", 13, "\r"), (" ", 32, " ")
CONTROLS = """[...document.querySelectorAll('a[href], button, input, select, summary, [tabindex="0"]')]
  .filter((e) => e.checkVisibility())"""
FOCUSED = "document.activeElement"


def marked(page: Any, folder: Path) -> int:
    """Pixels on the screen that tell which control has the focus."""
    page.screenshot(folder / "with.png")
    page.run(f"focused = {FOCUSED}, focused.blur()")
    page.screenshot(folder / "without.png")
    page.run("focused.focus({ preventScroll: true })")
    with_it, without = (np.asarray(Image.open(folder / f"{name}.png")) for name in ("with", "without"))
    return int((with_it != without).any(axis=2).sum())


def tab_to(page: Any, selector: str, folder: Path | None = None) -> None:
    """Tab until this has the focus, which can be seen."""
    for _ in range(40):
        page.press("Tab", 9)
        if page.run(f"{FOCUSED}.matches({json.dumps(selector)})"):
            if folder is not None:
                assert marked(page, folder) > 150, selector
            return
    pytest.fail(f"40 times Tab and not at {selector}")


def go_by_key(page: Any, task: str) -> None:
    tab_to(page, f'nav a[href="#{task}"]')
    page.press(*ENTER)
    page.until(f"document.querySelector('nav a[aria-current]').hash === '#{task}'")


def pick_by_key(page: Any, value: str) -> None:
    """With the focus on a select."""
    for _ in range(20):
        if page.run(f"{FOCUSED}.value") == value:
            return
        page.press("ArrowDown", 40)
    pytest.fail(f"no {value} among {page.run(f'[...{FOCUSED}.options].map((o) => o.value)')}")


def finished(page: Any, section: str) -> None:
    page.until(f"!document.querySelector('{section}').classList.contains('busy')")
    assert page.run(f"document.querySelector('{section} [role=status]').textContent") == "Done.", page.run(
        f"document.querySelector('{section} .error').textContent"
    )


def slid_by_key(page: Any, slider: str) -> None:
    """The slider that has the focus goes where arrows, Home and End say."""
    at = f"getComputedStyle(document.querySelector('{slider}').parentElement).getPropertyValue('--at')"
    for keys, place in (
        ([("Home", 36)], "0%"),
        ([("ArrowRight", 39)] * 4, "2%"),
        ([("End", 35)], "100%"),
        ([("ArrowLeft", 37)] * 3, "98.5%"),
    ):
        for key in keys:
            page.press(*key)
        assert page.run(at) == place


@pytest.mark.parametrize("phone", [False, True], ids=["desktop", "phone"])
def test_tab_reaches_every_control_there_and_back_and_it_is_seen(page: Any, tmp_path: Path, phone: bool) -> None:
    page.choose("[data-drop=image] input", picture(tmp_path / "a.png", (9, 99, 200)))
    submit(page, "#picture")  # whose result has controls too
    page.size(*((360, 560) if phone else (1280, 560)), phone=phone)  # low: much is scrolled away
    for task in ("upscale", "restore", "generate", "compare"):
        go(page, task)
        if task == "restore":
            choose(page, "#picture", "holes@champion")
            page.until("!document.querySelector('[data-drop=mask]').hidden")
            page.run("document.querySelector('details').open = true")
        page.run(f"{FOCUSED}.blur(), order = {CONTROLS}, 0")
        count = page.run("order.length")
        assert count > 10
        page.run("order[0].focus()")
        for way, places in (("on", range(1, count)), ("back", range(count - 2, -1, -1))):
            for place in places:
                page.press("Tab", 9, shift=way == "back")
                at = page.run(f"order.indexOf({FOCUSED})")
                assert at == place, (task, way, page.run(f"{FOCUSED}.outerHTML"))
                assert marked(page, tmp_path) > 150, (task, way, page.run(f"{FOCUSED}.outerHTML"))


def test_a_focus_that_is_not_seen_is_caught(page: Any, tmp_path: Path) -> None:
    """Negative control."""
    tab_to(page, ".primary", tmp_path)
    page.run(f"{FOCUSED}.style.outline = 'none'")
    assert marked(page, tmp_path) < 150


def test_a_picture_is_upscaled_by_keyboard(page: Any, tmp_path: Path) -> None:
    page.press("Tab", 9)
    assert page.run(f"{FOCUSED}.className") == "skip"
    tab_to(page, "[data-drop=image] input", tmp_path)
    page.chosen_by_key(*ENTER, picture(tmp_path / "a.png", (9, 99, 200)))
    tab_to(page, "#picture .primary", tmp_path)
    page.press(*ENTER)
    finished(page, "#picture")
    tab_to(page, SLIDER, tmp_path)
    slid_by_key(page, SLIDER)
    tab_to(page, "[name=actual]", tmp_path)
    page.press(*SPACE)
    assert page.run("document.querySelector('.comparison').classList.contains('actual')")


def test_a_hole_is_filled_by_keyboard(page: Any, tmp_path: Path) -> None:
    """The mask is a file: there is nothing to draw."""
    mask = Image.new("L", (90, 60))
    mask.paste(255, (60, 0, 90, 60))
    mask.save(tmp_path / "mask.png")
    go_by_key(page, "restore")
    tab_to(page, "[data-drop=image] input", tmp_path)
    page.chosen_by_key(*SPACE, picture(tmp_path / "white.png", (255, 255, 255)))
    tab_to(page, "#picture [name=model]", tmp_path)
    pick_by_key(page, "holes@champion")
    page.until("!document.querySelector('[data-drop=mask]').hidden")
    tab_to(page, "[data-drop=mask] input", tmp_path)
    page.chosen_by_key(*ENTER, tmp_path / "mask.png")
    tab_to(page, "#picture .primary", tmp_path)
    page.press(*SPACE)
    finished(page, "#picture")
    tab_to(page, SLIDER, tmp_path)
    page.press("Home", 36)
    assert colours(page, tmp_path / "shot.png", 0.4, 0.9) == [255, 153]


def test_pictures_are_generated_by_keyboard(page: Any, tmp_path: Path) -> None:
    made = "[...document.querySelectorAll('#generate .gallery img')].map(i => i.src)"
    go_by_key(page, "generate")
    tab_to(page, "[name=seed]", tmp_path)
    page.type("7")  # instead of what is there: Tab has selected it
    page.press(*ENTER)
    finished(page, "#generate")
    first = page.run(made)
    assert len(set(first)) == 4
    assert page.run("document.querySelector('#generate .gallery span').textContent") == "Seed 7, no. 0"
    tab_to(page, "[name=truncation]", tmp_path)
    page.press("ArrowLeft", 37)
    assert page.run("document.querySelector('[name=truncation-shown]').value") == "3.9"
    tab_to(page, "#generate .primary", tmp_path)
    tab_to(page, "[data-act=dice]", tmp_path)
    page.press(*SPACE)
    page.until(f"{made}.length === 4 && {made}[0] !== {json.dumps(first[0])}")
    tab_to(page, ".gallery a", tmp_path)


def test_two_pictures_are_compared_by_keyboard(page: Any, tmp_path: Path) -> None:
    go_by_key(page, "compare")
    for name, level in (("a", 60), ("b", 80)):
        tab_to(page, f"[data-drop={name}] input", tmp_path)
        page.chosen_by_key(*ENTER, picture(tmp_path / f"{name}.png", (level,) * 3, (180, 180)))
    tab_to(page, "#compare .primary", tmp_path)
    page.press(*ENTER)
    finished(page, "#compare")
    assert page.run("document.querySelector('.measures div:nth-child(2) dd').textContent") == "400"  # of 20 levels
    tab_to(page, "#compare .pair input", tmp_path)
    slid_by_key(page, "#compare .pair input")


def test_work_is_stopped_by_keyboard_and_the_focus_is_kept(page: Any, tmp_path: Path) -> None:
    page.choose("[data-drop=image] input", picture(tmp_path / "large.png", (9, 99, 200), (3000, 3000)))
    tab_to(page, "#picture .primary")
    page.press(*ENTER)
    tab_to(page, "#picture [data-act=stop]")
    page.press(*ENTER)
    page.until("document.querySelector('#picture [role=status]').textContent === 'Stopped.'")
    assert page.run(f"{FOCUSED}.className") == "primary"  # Stop, which had it, is gone


def test_what_is_larger_than_its_frame_is_scrolled_by_keyboard(page: Any, tmp_path: Path) -> None:
    frame = "document.querySelector('#picture .frame')"
    page.choose("[data-drop=image] input", picture(tmp_path / "wide.png", (9, 99, 200), (900, 60)))
    submit(page, "#picture")
    assert page.run(f"{frame}.tabIndex") == -1  # it all fits: nothing to stop at
    tab_to(page, "[name=actual]")
    page.press(*SPACE)
    for _ in range(2):
        page.press("Tab", 9, shift=True)
    assert page.run(f"{FOCUSED} === {frame}")
    assert marked(page, tmp_path) > 150
    page.press("ArrowRight", 39)
    page.until(f"{frame}.scrollLeft > 0")


def test_the_skip_link_leads_past_the_bar_and_stays_at_the_task(page: Any) -> None:
    go(page, "compare")
    page.run("document.activeElement.blur(); document.querySelector('.skip').focus()")
    page.press("Enter", 13, "\r")
    page.until("location.hash === '#main' && document.activeElement.id === 'main'")
    assert not page.run("document.querySelector('#compare').hidden")


def test_stop_ends_the_work_here_and_there(page: Any, server: tuple[str, Any], tmp_path: Path) -> None:
    page.choose("[data-drop=image] input", picture(tmp_path / "large.png", (9, 99, 200), (3000, 3000)))
    page.run("document.querySelector('#picture .primary').click()")
    page.run(
        "new Promise(r => setTimeout(r, 700)).then(() => document.querySelector('#picture [data-act=stop]').click())"
    )
    page.until("document.querySelector('#picture [role=status]').textContent === 'Stopped.'")
    assert page.run("document.querySelector('#picture .error').hidden")
    deadline = time.monotonic() + 10
    while server[1].engine.backlog_s() > 0:  # its tiles are gone from the queue
        assert time.monotonic() < deadline
        time.sleep(0.05)


# --- what is done while the answer is on its way

HOLD = """(() => { const theirs = window.fetch, free = new Promise((resolve) => { window.release = resolve });
  window.fetch = async (path, options) => { if (options?.method === "POST") await free;
    return theirs(path, options); }; })()"""


def widths(page: Any, section: str) -> list[int]:
    """Of the pictures shown, before and after."""
    pair = f"['before', 'after'].map((side) => document.querySelector(`{section} .result .${{side}}`))"
    page.until(f"{pair}.every((i) => i.complete)")
    return list(page.run(f"{pair}.map((i) => i.naturalWidth)"))


def test_another_picture_chosen_meanwhile_is_not_the_one_shown(page: Any, tmp_path: Path) -> None:
    sent = picture(tmp_path / "A.png", (200, 120, 40))
    page.run(HOLD)
    page.choose("[data-drop=image] input", sent)
    page.click("#picture .primary")
    page.choose("[data-drop=image] input", picture(tmp_path / "B.png", (9, 99, 200), (300, 200)))
    assert page.run("document.querySelector('[data-drop=image] b').textContent") == "B.png"
    page.run("release()")
    finished(page, "#picture")
    assert widths(page, "#picture") == [90, 180]
    assert page.run("document.querySelector('.download').download") == "A-upscaled.png"
    told = {name: text.replace("\xa0", " ") for name, text in facts(page, "#picture").items()}
    assert told["Size"] == "90 × 60 → 180 × 120"
    assert told["File"].startswith(f"{sent.stat().st_size} B → ")
    submit(page, "#picture")  # it is the next one's turn
    assert widths(page, "#picture") == [300, 600]
    assert page.run("document.querySelector('.download').download") == "B-upscaled.png"


def test_frames_chosen_meanwhile_are_not_those_told_of(page: Any, tmp_path: Path) -> None:
    go(page, "burst")
    frames = [picture(tmp_path / f"{level}.png", (level,) * 3) for level in (50, 100, 210)]
    page.run(HOLD)
    page.choose("[data-drop=image] input", *frames)
    page.click("#picture .primary")
    page.choose("[data-drop=image] input", picture(tmp_path / "B.png", (9, 99, 200), (300, 200)))
    page.run("release()")
    finished(page, "#picture")
    assert widths(page, "#picture") == [90, 180]
    assert page.run("document.querySelector('.download').download") == "50-merged.png"
    assert facts(page, "#picture")["File"].startswith(f"{sum(f.stat().st_size for f in frames)} B → ")


def test_pictures_chosen_meanwhile_are_not_those_compared(page: Any, tmp_path: Path) -> None:
    go(page, "compare")
    page.run(HOLD)
    for name, level in (("a", 60), ("b", 80)):
        page.choose(f"[data-drop={name}] input", picture(tmp_path / f"{name}.png", (level,) * 3, (180, 180)))
    page.click("#compare .primary")
    for name in ("a", "b"):
        page.choose(f"[data-drop={name}] input", picture(tmp_path / f"other {name}.png", (9, 99, 200), (300, 200)))
    page.run("release()")
    finished(page, "#compare")
    assert widths(page, "#compare") == [180, 180]
    assert page.run("document.querySelector('.measures div:nth-child(2) dd').textContent") == "400"  # of 20 levels


@pytest.mark.parametrize("elsewhere", ["generate", "compare"])
def test_a_result_that_comes_while_one_is_elsewhere_is_kept(page: Any, tmp_path: Path, elsewhere: str) -> None:
    page.run(HOLD)
    page.choose("[data-drop=image] input", picture(tmp_path / "A.png", (200, 120, 40)))
    page.click("#picture .primary")
    go(page, elsewhere)
    page.run("release()")
    finished(page, "#picture")
    assert page.run(f"document.querySelector('#{elsewhere} .result').hidden")
    go(page, "upscale")
    assert page.run("document.querySelector('#picture .result').checkVisibility()")
    assert widths(page, "#picture") == [90, 180]
    assert page.run("document.querySelector('.download').download") == "A-upscaled.png"


@pytest.mark.parametrize("answer", ["blob", "json"], ids=["a picture", "a refusal"])
def test_no_task_shows_what_came_of_another(page: Any, tmp_path: Path, answer: str) -> None:
    """It is left for another of the same form just when the answer is here, too late to take back."""
    sent = picture(tmp_path / "A.png", (200, 120, 40))
    if answer == "json":
        sent.write_bytes(b"no picture at all")
    page.choose("[data-drop=image] input", sent)
    page.run(f"""(() => {{ const read = Response.prototype.{answer};
      Response.prototype.{answer} = async function () {{ const found = await read.call(this);
        if (this.url.includes("v1/upscale")) {{ location.hash = "restore"; dispatchEvent(new Event("hashchange")); }}
        return found; }}; }})()""")
    page.click("#picture .primary")
    page.until("document.querySelector('nav a[aria-current]').hash === '#restore'")
    page.until("!document.querySelector('#picture').classList.contains('busy')")
    assert page.run("document.querySelector('#picture [role=status]').textContent") == "Stopped."
    assert page.run("['.result', '.error'].map((s) => document.querySelector(`#picture ${s}`).hidden)") == [True, True]
    if answer == "json":
        assert len(page.complaints()) == 1  # the browser's own line about the status
        page.events.clear()


def test_a_mask_goes_with_the_models_that_fill_in(page: Any, tmp_path: Path) -> None:
    go(page, "restore")
    hidden = "document.querySelector('[data-drop=mask]').hidden"
    choose(page, "#picture", "inverse@champion")
    page.until(hidden)
    choose(page, "#picture", "holes@champion")
    page.until(f"!{hidden}")
    page.choose("[data-drop=image] input", picture(tmp_path / "white.png", (255, 255, 255)))
    mask = Image.new("L", (90, 60))
    mask.paste(255, (60, 0, 90, 60))
    mask.save(tmp_path / "mask.png")
    page.choose("[data-drop=mask] input", tmp_path / "mask.png")
    submit(page, "#picture")
    page.run(f"document.querySelector('{SLIDER}').focus()")
    page.press("Home", 36)
    assert colours(page, tmp_path / "shot.png", 0.4, 0.9) == [255, 153]  # 0.6 where it was white
    choose(page, "#picture", "method:telea")
    page.until(f"!{hidden}")
    submit(page, "#picture")
    assert "telea" in facts(page, "#picture")["Model"]


def test_frames_are_merged(page: Any, tmp_path: Path) -> None:
    """The model takes the mean of three, twice as wide."""
    go(page, "burst")
    page.choose(
        "[data-drop=image] input", *(picture(tmp_path / f"{level}.png", (level,) * 3) for level in (50, 100, 210))
    )
    assert page.run("document.querySelector('[data-drop=image] b').textContent") == "3 pictures"
    submit(page, "#picture")
    told = facts(page, "#picture")
    assert told["Model"] == "frames:1"
    assert told["Size"].replace("\xa0", " ") == "90 × 60 → 180 × 120"
    page.run(f"document.querySelector('{SLIDER}').focus()")
    page.press("Home", 36)
    assert colours(page, tmp_path / "shot.png", 0.5) == [120]
    go(page, "upscale")  # which takes one
    assert page.run("document.querySelector('[data-drop=image] b').textContent") == "50.png"


def test_the_servers_line_is_shown_and_goes_away(page: Any, server: tuple[str, Any], tmp_path: Path) -> None:
    text = tmp_path / "notes.png"
    text.write_bytes(b"no picture at all")
    page.choose("[data-drop=image] input", text)
    page.click("#picture .primary")
    page.until("!document.querySelector('#picture .error').hidden")
    said = page.run("document.querySelector('#picture .error').firstChild.textContent")
    assert said == httpx.post(f"{server[0]}v1/upscale?model=photos", content=text.read_bytes()).json()["detail"]
    assert page.run("document.querySelector('#picture .error').getAttribute('role')") == "alert"
    refused = page.complaints()
    assert len(refused) == 1  # the browser's own line about the status
    assert "415" in refused[0]
    page.events.clear()
    page.choose("[data-drop=image] input", picture(tmp_path / "a.png", (9, 99, 200)))
    submit(page, "#picture")


def test_pictures_are_generated_by_seed(page: Any) -> None:
    go(page, "generate")

    def made() -> list[str]:
        submit(page, "#generate")
        return list(page.run("[...document.querySelectorAll('#generate .gallery img')].map(i => i.src)"))

    page.run("document.querySelector('#generate [name=n]').value = 6")
    first = made()
    assert len(set(first)) == 6
    assert made() == first
    page.run("document.querySelector('#generate [name=seed]').value = 2")
    assert not set(made()) & set(first)
    page.run("document.querySelector('#generate [name=class]').value = 'rose'")
    page.run("document.querySelector('#generate [name=to_seed]').value = 5")
    assert len(set(made())) == 6
    assert page.run("document.querySelector('#generate .gallery span').textContent") == "Step 1 of 6"


def test_two_pictures_are_compared(page: Any, tmp_path: Path) -> None:
    page.choose("[data-drop=image] input", picture(tmp_path / "small.png", (9, 99, 200)))
    submit(page, "#picture")
    go(page, "compare")
    noise = np.random.default_rng(0).integers(0, 256, (180, 180, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    Image.fromarray(noise // 2 + 64).save(tmp_path / "b.png")
    page.choose("[data-drop=a] input", tmp_path / "a.png")
    page.choose("[data-drop=b] input", tmp_path / "b.png")
    submit(page, "#compare")
    shown = page.run("Object.fromEntries([...document.querySelectorAll('.measures dt')].map(d =>"
                     "[d.firstChild.textContent, d.nextElementSibling.textContent]))")  # fmt: skip
    assert set(shown) == {
        "PSNR", "Mean squared error", "Euclidean distance", "SSIM", "MS-SSIM", "SIFT matches", "Cosine"
    }  # fmt: skip
    go(page, "upscale")  # whose answer is still there to be taken
    assert page.run("document.querySelector('#picture .result').checkVisibility()")
    assert page.run("fetchable = new Image(), fetchable.src = document.querySelector('#picture .after').src,"
                    "fetchable.decode().then(() => true)")  # fmt: skip
    error = np.mean((noise.astype(float) - (noise // 2 + 64)) ** 2)
    assert float(shown["Mean squared error"]) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_it_fits_a_phone_and_everything_has_a_name(page: Any, tmp_path: Path, dark: bool) -> None:
    page.size(360, 760, phone=True, dark=dark)
    for task in ("upscale", "restore", "burst", "generate", "compare"):
        go(page, task)
        assert page.run("document.documentElement.scrollWidth") == 360, task
        small_targets = page.run(
            "[...document.querySelectorAll('button, select, nav a, input:not([type=range])')].filter(e => "
            "e.checkVisibility() && e.getBoundingClientRect().height < 28).map(e => e.outerHTML)"
        )
        assert small_targets == []
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        roles = {"button", "link", "textbox", "combobox", "slider", "spinbutton", "checkbox"}
        nameless = [n for n in nodes if not n.get("ignored") and n.get("role", {}).get("value") in roles
                    and not n.get("name", {}).get("value")]  # fmt: skip
        assert nameless == []
    assert faint(page) == []


def faint(page: Any) -> list[list[Any]]:
    """Texts whose contrast with the nearest opaque ground is below WCAG's 4.5."""
    return list(
        page.run("""(() => {
      const rgb = (c) => (c.match(/[\\d.]+/g) ?? []).map(Number);
      const linear = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
      const light = (c) => { const [r, g, b] = c.map(linear);
        return .2126 * r + .7152 * g + .0722 * b; };
      const ground = (e) => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor);
        if (c.length === 3 || c[3] === 1) return c.slice(0, 3); } return [255, 255, 255]; };
      const found = [];
      for (const e of document.querySelectorAll("body *")) {
        if (!e.checkVisibility() || ![...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim())) continue;
        const [a, b] = [light(rgb(getComputedStyle(e).color).slice(0, 3)), light(ground(e))].sort((x, y) => y - x);
        if ((a + .05) / (b + .05) < 4.5) found.push([e.outerHTML.slice(0, 80), (a + .05) / (b + .05)]);
      }
      return found; })()""")
    )


def test_the_contrast_check_can_tell(page: Any) -> None:
    """Negative control."""
    page.run("document.querySelector('h1').style.color = '#999'")
    assert len(faint(page)) == 1


def test_no_script_but_its_own_runs(tab: Any, server: tuple[str, Any]) -> None:
    tab.open(server[0])
    inline = (
        "(s => { s.textContent = 'window.planted = 1'; document.body.append(s) })(document.createElement('script'))"
    )
    tab.run(inline)
    assert tab.run("window.planted") is None
    tab.open(f"{server[0]}livez")  # negative control: a page without the policy
    tab.run(inline)
    assert tab.run("window.planted") == 1


def test_a_key_is_asked_for_where_the_server_wants_one(
    tab: Any, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, serve_app: Callable[[Any], str]
) -> None:
    """By keyboard alone."""
    from rayscale.serve.keys import parse

    folder = tmp_path_factory.mktemp("locked") / "a"
    keys = parse(f"me {hashlib.sha256(b'open-sesame').hexdigest()}")
    service = tools["Service"](folder, small["write"](folder), keys=keys)
    tab.open(serve_app(service))
    kept = "sessionStorage.getItem('key')"
    for given, state in (("wrong", "away"), ("open-sesame", "ready")):
        tab.until("document.querySelector('dialog').open")
        assert tab.run(f"{FOCUSED}.name") == "key"
        tab.run(f"{FOCUSED}.select()")
        tab.type(given)
        if state == "away":
            tab.press(*ENTER)
            tab.until("!document.querySelector('dialog .error').hidden")
            assert "not known" in tab.run("document.querySelector('dialog .error').textContent")
        else:
            tab_to(tab, "dialog .primary", tmp_path)
            tab.press(*SPACE)
        tab.until(f"document.querySelector('.health').dataset.state === '{state}'")
        assert tab.run(kept) == given
    for leave in ("Escape", "Cancel"):  # what was typed is not kept
        tab_to(tab, "[data-act=key]", tmp_path)
        tab.press(*ENTER)
        tab.until("document.querySelector('dialog').open")
        tab.type("x")
        if leave == "Escape":
            tab.press("Escape", 27)
        else:
            tab_to(tab, "dialog [value=cancel]", tmp_path)
            tab.press(*ENTER)
        tab.until("!document.querySelector('dialog').open")
        assert tab.run(f"{FOCUSED}.dataset.act") == "key"  # back where it was opened
        assert tab.run(kept) == "open-sesame", leave
    tab.click("[data-act=chart]")
    tab.until("document.querySelector('.drop.full')")
    submit(tab, "#picture")
