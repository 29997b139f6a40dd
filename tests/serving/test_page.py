"""The page at `/`: what it is made of, what it asks for, and how it works in Chromium."""

from __future__ import annotations

import base64
import io
import os
import re
import shutil
import threading
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from foveate import FoveateError
from foveate.core.method import methods
from foveate.insight.target import Target
from foveate.insight.trace import trace
from foveate.scenes import questions, world
from foveate.serving import explore
from tests.serving.conftest import PATIENCE, data_uri, question, running, scene, wait_for

NUMBER = 3  # the scene that is asked about
ASKED = "Is there a car in the image?"


def held_out(number: int) -> world.Scene:
    return world.sample(questions.FIRST_HELD_OUT + number)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return world.draw(held_out(NUMBER))


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server.url, timeout=PATIENCE) as client:
        yield client


@pytest.fixture
def body(picture) -> dict[str, Any]:
    return {"image": data_uri(picture), "question": ASKED, "max_tokens": 4}


def told(response: httpx.Response) -> str:
    """The one sentence of a refusal."""
    message = response.json()["error"]["message"]
    assert message.endswith(".")
    return message


# -- what the page is made of ----------------------------------------------------------------------


def test_the_page_comes_whole_from_the_server_and_needs_nothing_else(http):
    files = {"/": http.get("/").text}
    for name in re.findall(r'(?:src|href)="([^#:"]+)"', files["/"]):
        files[name] = http.get(f"/{name}").text
    for name in re.findall(r'from "\./([^"]+)"', files["page.js"]):
        files[name] = http.get(f"/{name}").text
    assert {"style.css", "page.css", "page.js", "draw.js"} < set(files)
    for name in files:
        response = http.get(name)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        kind = {"s": "javascript", "c": "css"}.get(name.rpartition(".")[2][-1], "html")
        kind = "css" if name.endswith(".css") else kind
        assert kind in response.headers["content-type"]
    everything = "".join(files.values())
    assert not re.search(r"https?://|@import|url\(", everything)
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\("
    assert not re.search(markup, everything)
    assert http.get("/nothing.js").status_code == 404


def test_what_is_offered(http, server):
    offer = http.get("/explore/start").json()
    assert offer["model"] == "pocket"
    names = [method["name"] for method in offer["methods"]]
    assert names[0] == "vanilla"
    assert [f"pocket:{name}" for name in names[1:]] == server.service.catalogue.ids[1:]
    clvs = offer["methods"][names.index("clvs")]
    assert clvs["paper"] == methods()["clvs"].paper
    assert clvs["parameters"]["smoothing"] == "0.8"
    assert [s["number"] for s in offer["scenes"]] == list(range(len(offer["scenes"])))
    assert all(_decoded(s["image"]).size == (96, 96) for s in offer["scenes"])


def _decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_scene_is_the_drawn_one_with_questions_and_their_answers(http, picture):
    found = http.get(f"/explore/scenes/{NUMBER}").json()
    assert np.array_equal(np.asarray(_decoded(found["image"])), np.asarray(picture))
    own = held_out(NUMBER)
    assert found["things"] == list(world.counts(own))
    assert {q["answer"] for q in found["questions"]} >= {"yes", "no"}
    for asked in found["questions"]:
        named = [thing for thing in found["things"] if re.search(rf"\b{thing}", asked["text"])]
        assert asked["thing"] in (named or [None])
        sought = re.match(r"Is there a (\w+) in the image\?", asked["text"])
        if sought:
            assert asked["answer"] == ("yes" if sought[1] in found["things"] else "no")


@pytest.mark.parametrize("number", ["x", "-1", "1000000", "٣", "1.5"])
def test_other_scenes_are_refused(http, number):
    response = http.get(f"/explore/scenes/{number}")
    assert response.status_code == 400
    assert "from 0 to 999999" in told(response)


# -- maps of attention -----------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["vanilla", "clvs(smoothing=0.7)", "vicrop"])
def test_a_trace_is_that_of_the_model(http, vlm, picture, body, method):
    mask = world.masks(held_out(NUMBER))[[t.kind == "car" for t in held_out(NUMBER).things]].max(0)
    target = Target("car", mask.astype(np.float32))
    offline = trace(vlm, picture, ASKED, [method], object=target, max_new_tokens=4).runs[0]
    more = {"method": method, "scene": NUMBER, "thing": "car"}
    found = http.post("/explore/trace", json=body | more).json()
    (run,) = found["runs"]
    assert run["method"] == offline.method
    assert run["tokens"] == list(offline.tokens)
    assert found["layers"] == list(offline.layers)
    assert np.allclose(run["on_object"], offline.on_object, rtol=1e-3)
    assert len(run["pictures"]) == len(offline.pictures)
    for told, kept in zip(run["pictures"], offline.pictures, strict=True):
        root = np.frombuffer(base64.b64decode(told["heat"]), np.uint8) / 255
        heat = root.reshape(kept.heat.shape) ** 2 * np.array(told["peaks"])[..., None, None]
        assert np.allclose(heat, kept.heat, atol=kept.heat.max() / 100)
        assert told["frame"] == (None if kept.part == (0, 0, 1, 1) else list(kept.part))
    assert _decoded(found["images"][0]).size == (480, 480)


def test_a_box_on_a_picture_of_ones_own(http, vlm, picture, body):
    upper = picture.crop((0, 0, 768, 300))
    offline = trace(vlm, upper, ASKED, ["vanilla"], object=(0, 0, 384, 300), max_new_tokens=4)
    more = {"image": data_uri(upper), "box": [0, 0, 0.5, 1]}
    run = http.post("/explore/trace", json=body | more).json()["runs"][0]
    assert np.allclose(run["on_object"], offline.runs[0].on_object, rtol=1e-3)
    run = http.post("/explore/trace", json=body).json()["runs"][0]
    assert run["on_object"] is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"thing": "car"}, "send one, with its number"),
        ({"thing": "zebra", "scene": NUMBER}, "There is no 'zebra' in this scene"),
        ({"thing": "car", "scene": NUMBER, "image": data_uri(scene(1).resize((9, 9)))}, "send one"),
        ({"box": [0, 0, 1, 2]}, "fractions"),
        ({"box": [0.5, 0, 0.5, 1]}, "empty"),
        ({"box": [0, 0, 1]}, "box"),
        ({"max_tokens": 129}, "128 tokens"),
        ({"method": "clvz"}, "did you mean 'clvs'"),
        ({"method": "adhh(heads='/etc/passwd')"}, "name no files"),
        ({"question": " "}, "empty"),
        ({"image": "/etc/passwd"}, "data URI"),
        ({"temperature": 1}, "does not know the parameter temperature"),
    ],
)
def test_refusals(http, body, change, sentence):
    response = http.post("/explore/trace", json=body | change)
    assert response.status_code == 400
    assert sentence in told(response)


def test_the_key_is_wanted_for_all_but_the_page(vlm, body):
    with running(vlm, api_key="secret") as server, httpx.Client(base_url=server.url) as http:
        assert all(http.get(path).status_code == 200 for path in ("/", "/page.js", "/style.css"))
        for path in ("/explore/start", "/explore/scenes/1"):
            assert http.get(path).status_code == 401
            with_key = {"Authorization": "Bearer secret"}
            assert http.get(path, headers=with_key, timeout=PATIENCE).status_code == 200
        assert http.post("/explore/trace", json=body).status_code == 401


def test_the_worker_traces_and_survives_failures(http, body, monkeypatch):
    threads = []

    def fails(*args: Any, **options: Any) -> None:
        threads.append(threading.current_thread().name)
        raise RuntimeError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(explore, "trace", fails)
        response = http.post("/explore/trace", json=body)
    assert response.status_code == 500
    assert "no more" not in told(response)
    assert threads == ["foveate-worker"]
    assert http.post("/explore/trace", json=body).status_code == 200


@pytest.mark.long
def test_traces_wait_in_the_same_queue_as_answers(vlm, gate, body):
    asked = {"model": "pocket", "messages": question(ASKED, scene(1)), "max_tokens": 2}
    with (
        running(vlm, queue=1) as server,
        httpx.Client(base_url=server.url, timeout=PATIENCE) as http,
    ):
        worker = server.service.worker

        def send(path: str, json: Any) -> tuple[threading.Thread, list[httpx.Response]]:
            found: list[httpx.Response] = []
            thread = threading.Thread(
                target=lambda: found.append(http.post(path, json=json, timeout=PATIENCE))
            )
            thread.start()
            return thread, found

        first, answered = send("/v1/chat/completions", asked)
        wait_for(lambda: gate.waits_at(1))
        with pytest.raises(httpx.ReadTimeout):  # one that hangs up frees its place
            http.post("/explore/trace", json=body, timeout=httpx.Timeout(PATIENCE, read=2))
        wait_for(lambda: not worker.waiting)
        second, traced = send("/explore/trace", body)
        wait_for(lambda: worker.waiting)
        assert http.post("/explore/trace", json=body).status_code == 429
        assert http.post("/v1/chat/completions", json=asked).status_code == 429
        worker.stop()  # what is held is finished
        assert http.post("/explore/trace", json=body).status_code == 503
        gate.open.set()
        first.join(PATIENCE)
        second.join(PATIENCE)
        assert (answered[0].status_code, traced[0].status_code) == (200, 200)


def test_a_job_raises_what_it_raises(server):
    def refused() -> None:
        raise FoveateError("Not like this.")

    with pytest.raises(FoveateError, match="Not like this"):
        server.service.worker.run(refused).result(PATIENCE)
    assert server.service.worker.run(lambda: 7).result(PATIENCE) == 7


# -- the page in Chromium --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chromium():
    reason = "needs Chromium and playwright: apt-get install chromium, pip install playwright"
    sync_api = pytest.importorskip("playwright.sync_api", reason=reason)
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip(reason)
    root = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=root)
        yield browser
        browser.close()


class Tab:
    """A page of the browser that keeps what went wrong and what was asked for elsewhere."""

    def __init__(self, browser: Any, url: str, fragment: str = "", **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page, self.url = self.context.new_page(), url
        self.page.set_default_timeout(1000 * PATIENCE)
        self.wrong: list[str] = []
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("dialog", lambda dialog: self.wrong.append(dialog.message))
        self.page.on("request", self._request)
        self.page.on("console", self._said)
        self.page.goto(f"{url}/{fragment}")

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.wrong.append(request.url)

    def _said(self, message: Any) -> None:
        if "Content Security Policy" in message.text:
            self.wrong.append(message.text)

    def ready(self) -> Tab:
        self.page.wait_for_selector("body[data-ready]")
        return self

    def done(self) -> None:
        """Wait until every answer has its maps or says why not."""
        self.page.wait_for_selector("#stop[hidden]", state="attached")

    def ask(self) -> None:
        self.page.click("#ask")
        self.done()

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def pressed(self) -> list[str]:
        return self.texts("article [aria-pressed=true]")

    def pixels(self) -> list[str]:
        script = "all => all.map((canvas) => canvas.toDataURL())"
        return self.page.locator("article canvas").evaluate_all(script)

    @property
    def fragment(self) -> dict[str, list[str]]:
        self.page.wait_for_timeout(500)  # the address is written a little later
        return parse_qs(urlsplit(self.page.url).fragment)

    @property
    def link(self) -> str:
        self.page.click("#link")
        self.page.locator("#told", has_text="link").wait_for()
        return "#" + urlsplit(self.page.url).fragment


@pytest.fixture
def tab(chromium, server):
    tabs = []

    def opened(url: str = server.url, **options: Any) -> Tab:
        tabs.append(Tab(chromium, url, **options))
        return tabs[-1] if url != server.url else tabs[-1].ready()

    yield opened
    for one in tabs:
        one.context.close()
        assert one.wrong == []


def test_answers_side_by_side_and_a_link_that_restores_them(tab, vlm, picture):
    one = tab()
    one.page.click(f"#scenes label:nth-child({NUMBER + 1})")
    one.page.locator("#about", has_text=f"Drawn scene {NUMBER}").wait_for()
    known = explore._scene(NUMBER)["questions"][0]
    one.page.click("#known button")
    assert one.page.input_value("#question") == known["text"]
    one.page.select_option("#object", "car")
    one.page.press("#question", "Enter")
    one.done()
    answers = [vlm.ask(picture, known["text"], m, max_new_tokens=48) for m in ("vanilla", "clvs")]
    assert one.texts(".answer") == [answer.text for answer in answers]
    assert one.texts("article h2") == ["vanilla", "clvs"]
    assert one.texts("#truth") == [f"Known answer: {known['answer']}"]
    assert one.texts("article:first-of-type .tokens button") == [
        "whole answer",
        *(token.strip() for token in answers[0].tokens),
        "(end)",
    ]
    assert all("on the car" in text for text in one.texts(".numbers"))
    assert one.page.locator("#chart .curve").count() == 2

    first = one.pixels()
    layer = int(one.fragment["layer"][0])
    one.page.focus("#layer")
    one.page.keyboard.press("ArrowLeft")
    assert one.fragment["layer"] == [str(layer - 1)]
    last = vlm.model.get_decoder().config.num_hidden_layers - 1
    assert one.texts("#which") == [f"{layer - 1} (0 to {last})"]
    lower = one.pixels()
    assert len(set(first + lower)) == 4
    one.page.click("article:first-of-type .tokens button:nth-child(2)")
    token = answers[0].tokens[0].strip()
    assert one.pressed()[0] == token
    assert one.fragment["token"] == ["0"]
    one.page.keyboard.press("ArrowRight")
    assert one.pressed()[0] == "(end)"
    assert one.page.evaluate("document.activeElement.textContent") == "(end)"
    at_end = one.pixels()
    assert set(at_end).isdisjoint(lower)

    other = tab(fragment=one.link)
    other.done()
    assert other.pressed()[0] == "(end)"
    assert other.pixels() == at_end
    assert other.fragment == one.fragment


def test_a_picture_of_ones_own_and_a_box(tab, picture, server):
    one = tab()
    stream = io.BytesIO()
    picture.resize((96, 96)).save(stream, "PNG")
    small = {"name": "<b>mine</b>.png", "mimeType": "image/png", "buffer": stream.getvalue()}
    dropped = one.page.evaluate_handle(
        """([name, type, bytes]) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(bytes)], name, {type}));
          return data;
        }""",
        [small["name"], small["mimeType"], list(small["buffer"])],
    )
    one.page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    one.page.locator("#about", has_text="<b>mine</b>.png").wait_for()
    assert one.page.locator("#known button").count() == 0
    assert one.texts("#object option") == ["the image", "a box"]
    one.page.fill("#question", ASKED)
    one.page.select_option("#object", "box")
    one.page.click("#ask")
    assert "Draw the box" in one.texts("#told")[0]
    within = one.page.locator("#shown").bounding_box()
    one.page.mouse.move(within["x"] + 1, within["y"] + within["height"] / 2)
    one.page.mouse.down()
    one.page.mouse.move(within["x"] + within["width"] / 2, within["y"] + within["height"] - 1)
    one.page.mouse.up()
    left, top, right, bottom = map(int, one.page.input_value("#box").split(","))
    assert (left, right) == (pytest.approx(1, abs=1), pytest.approx(50, abs=1))
    assert (top, bottom) == (pytest.approx(50, abs=1), pytest.approx(99, abs=1))
    one.ask()
    assert all("on the box" in text for text in one.texts(".numbers"))
    assert one.fragment["object"] == [f"{left},{top},{right},{bottom}"]
    assert _decoded(one.fragment["image"][0]).size == (96, 96)

    one.page.set_input_files("#file", small | {"buffer": _noise()})
    one.page.select_option("#object", "")
    one.ask()
    assert "image" not in one.fragment
    other = tab(fragment=one.link)
    assert "choose it" in other.texts("#told")[0]
    assert other.page.input_value("#question") == ASKED
    other.page.set_input_files("#file", small)
    other.page.locator("#about", has_text="mine").wait_for()
    other.ask()
    assert len(other.pixels()) == 2


def _noise() -> bytes:
    """A picture that is too large for a link."""
    stream = io.BytesIO()
    dots = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(dots).save(stream, "PNG")
    return stream.getvalue()


def test_words_of_users_stay_words_and_refusals_are_told(tab):
    one = tab()
    evil = "<img src=x onerror=alert(1)>"
    one.page.fill("#question", evil)
    for box in one.page.locator("#methods input").all():
        box.uncheck()
    one.page.click("#ask")
    assert "No method is chosen" in one.texts("#told")[0]
    for bad, says in ((evil, "Cannot read the method"), ("clvs(smoothing=2)", "between 0 and 1"),
                      ("clvz", "did you mean 'clvs'")):  # fmt: skip
        one.page.fill("#stack", bad)
        one.page.press("#stack", "Enter")
        one.page.locator("#told.failed", has_text=says).wait_for()
        assert one.page.input_value("#stack") == bad
    one.page.fill("#stack", "vicrop+CLVS(smoothing=0.7)")
    one.ask()
    assert one.texts("#asked") == [evil]
    assert one.texts("article h2") == ["vicrop+clvs(smoothing=0.7)"]
    (good,) = one.page.locator("article").all()
    assert good.locator("canvas").count() == 3  # whole, crop, and where it lies
    assert "pixels" in good.locator("figcaption").inner_text()


def test_a_key_is_asked_for_once(tab, vlm):
    with running(vlm, api_key="secret") as server:
        one = tab(server.url)
        one.page.fill("#key", "guess")
        one.page.press("#key", "Enter")
        one.page.locator("#wanted", has_text="does not know").wait_for()
        one.page.fill("#key", "secret")
        one.page.press("#key", "Enter")
        one.ready().ask()
        assert len(one.pixels()) == 2
        one.page.reload()
        one.ready().done()
        assert len(one.pixels()) == 2
        assert "secret" not in one.link


def test_answers_stream_and_can_be_stopped(tab, gate, server):
    one = tab()
    one.page.uncheck("#methods input[value=clvs]")
    one.page.fill("#question", "Please describe this image in detail.")
    one.page.click("#ask")
    answer = one.page.locator(".answer")
    for _ in range(6):
        gate.steps.release()
    answer.filter(has_text=re.compile(r"\w+ \w+")).wait_for()
    assert answer.get_attribute("aria-busy") == "true"
    one.page.click("#stop")
    one.page.locator(".state", has_text="stopped").wait_for()
    assert answer.get_attribute("aria-busy") == "false"
    reached = gate.reached
    gate.open.set()
    one.ask()
    assert gate.batches == [1, 1]
    assert reached <= 7
    assert len(one.pixels()) == 1


def test_on_a_laptop_what_matters_is_in_sight(tab):
    one = tab(viewport={"width": 1280, "height": 720})

    def in_sight(selector: str) -> bool:
        box = one.page.locator(selector).bounding_box()
        return box["y"] >= 0 and box["y"] + box["height"] <= 720

    assert in_sight("#methods label:first-child")
    assert in_sight("#ask")
    one.ask()
    for part in ("#asked", "article:first-of-type .answer", "article:first-of-type .state"):
        assert in_sight(part)
    assert re.fullmatch(r"probability [01]\.\d\d", one.texts(".state")[0])
    assert one.texts("#legend li") == ["vanilla", "clvs"]
    wrong = {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"}
    one.page.set_input_files("#file", wrong)
    one.page.locator("#told", has_text="is not a picture").wait_for()
    assert in_sight("#told")


def test_on_a_phone_a_method_fits_a_screen(tab):
    one = tab(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    one.ask()
    assert 0 <= one.page.locator("#results").bounding_box()["y"] < 300
    for article in one.page.locator("article").all():
        assert article.bounding_box()["height"] <= 844


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1400])
def test_it_fits_and_reads(tab, width, scheme):
    one = tab(viewport={"width": width, "height": 800}, color_scheme=scheme)
    one.page.fill("#stack", "clvs(smoothing=0.7,stop_threshold=0.4,unified_positions=False)")
    one.ask()
    assert one.page.evaluate("document.documentElement.scrollWidth") == width
    sides = [article.bounding_box()["x"] for article in one.page.locator("article").all()]
    assert (len(set(sides)) == 1) == (width == 360)
    for control in one.page.locator("input, select, textarea, button, svg, canvas, img").all():
        named = control.evaluate(
            "n => n.ariaLabel || n.alt || n.textContent.trim() || n.labels?.length"
            " || n.getAttribute('aria-labelledby') || n.ariaHidden || n.hidden"
        )
        assert named, control.evaluate("n => n.outerHTML.slice(0, 200)")
    folder = os.environ.get("FOVEATE_SCREENSHOTS")
    if folder:  # as high as the page, where nothing sticks to an edge
        height = one.page.evaluate("document.documentElement.scrollHeight")
        one.page.set_viewport_size({"width": width, "height": height})
        one.page.screenshot(path=f"{folder}/page-{width}-{scheme}.png", full_page=True)


def test_the_keyboard_reaches_everything_in_order(tab):
    one = tab()
    one.ask()
    order = []
    one.page.locator(".skip").press("Tab")
    for _ in range(80):
        order.append(
            one.page.evaluate(
                "(n => n.id || n.name || n.closest('[id]')?.id)(document.activeElement)"
            )
        )
        one.page.keyboard.press("Tab")
    wanted = ["file", "scene", "number", "question", "known", "object", "methods", "stack", "add",
              "tokens", "ask", "link", "layer", "heat", "answers", "measure"]  # fmt: skip
    places = [order.index(name) for name in wanted]
    assert places == sorted(places)
    assert order.count("answers") >= 2  # one stop per answer, however many tokens
