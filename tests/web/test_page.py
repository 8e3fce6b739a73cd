"""The page at /, as people use it: in a browser, held against the package's own answers."""

import base64
import json
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from support.browser import Browser, needs_chromium
from support.web import encoded, serving

from clip_deploy.core.images import read_image
from clip_deploy.data import scenes
from clip_deploy.inference.classifier import ZeroShotClassifier
from clip_deploy.inference.embed import EmbedSettings, embed_folder
from clip_deploy.inference.search import search
from clip_deploy.web.page import HEADERS, PAGE

pytestmark = needs_chromium
IMAGES = 40
SHOWN = 12  # labels, the others are counted
LABELS = ["red circle", "yellow star", "green triangle", "<b>dog</b> & “cat”"]
ENTER = {"code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
TEXT = "a photo of a yellow star"


@pytest.fixture(scope="module")
def classifier(package):
    return ZeroShotClassifier.open(package, threads=2)


@pytest.fixture(scope="module")
def folder(classifier, tmp_path_factory):
    base = tmp_path_factory.mktemp("page")
    (base / "images").mkdir()
    for number in range(IMAGES):
        scenes.render("page", number, number)[0].save(base / "images" / f"{number:02}.png")
    embed_folder(classifier, base / "images", base / "parts", EmbedSettings())
    return base


@pytest.fixture(scope="module")
def server(package, folder):
    """Its limit on a request's size is the lowest that there is."""
    with serving(package, "--index", folder / "parts", "--images", folder / "images", "--max-body-mb", "1") as running:
        yield running


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.fixture
def opened(chromium, server):
    """The page, fresh. In the end nothing was written to the console, and nobody else was asked."""
    browser = begin(chromium, server)
    yield browser
    assert browser.console == []
    addresses = [request["url"] for request in browser.requests.values()]
    assert all(address.startswith((server.url, f"blob:{server.url}", "data:")) for address in addresses), addresses


def begin(browser, server):
    browser.look(1280)
    browser.open("about:blank")
    browser.console.clear()
    browser.requests.clear()
    browser.open(f"{server.url}/")
    browser.wait("!document.querySelector('#all').hidden || !document.querySelector('#keys').hidden")
    return browser


def text(browser, selector):
    return browser.get(f"document.querySelector({json.dumps(selector)}).innerText")


def answers(browser, count):
    """Labels and probabilities that are shown, once there are so many and nothing is running."""
    cells = "[...row.children].slice(0, 2).map(cell => cell.innerText)"
    rows = f"[...document.querySelectorAll('#answers li')].map(row => {cells})"
    browser.wait(f"{rows}.length === {count} && !document.querySelector('#classify-told').innerText.includes('…')")
    found = browser.get(rows)
    widths = browser.get("[...document.querySelectorAll('.bar span')].map(bar => bar.style.width)")
    assert [float(width.rstrip("%")) for width in widths] == pytest.approx([number(row[1]) for row in found], abs=0.06)
    return [label for label, _ in found], [number(share) for _, share in found]


def number(share):
    assert re.fullmatch(r"\d+\.\d %", share)
    return float(share.split()[0])


def found(browser, count):
    """Names and cosines that are shown, once all pictures are."""
    browser.wait(f"[...document.querySelectorAll('#found img')].filter(image => image.naturalWidth).length === {count}")
    captions = "[...document.querySelectorAll('#found figcaption')].map(caption => caption.innerText.split('\\n'))"
    rows = [re.split(r"\s+", " ".join(row)) for row in browser.get(captions)]
    return [name for name, _ in rows], [float(cosine) for _, cosine in rows]


def equal(shown, expected):
    """Whether labels and probabilities in percent are the package's own; equal ones may change places."""
    assert shown[1] == pytest.approx([100 * answer.probability for answer in expected], abs=0.06)
    by_label = {answer.text: answer.probability for answer in expected}
    assert shown[1] == pytest.approx([100 * by_label[label] for label in shown[0]], abs=0.06)


def sent(browser, path):
    """The body of the last request to a path."""
    number = [number for number, request in browser.requests.items() if request["url"].endswith(path)][-1]
    return json.loads(browser("Network.getRequestPostData", requestId=number)["postData"])


def picture_of(body):
    return Image.open(BytesIO(base64.b64decode(body["image"].partition(",")[2])))


def test_a_picture_that_is_dropped_is_among_the_packages_classes(opened, classifier, folder):
    opened.drop("#drop", folder / "images/20.png")
    expected = classifier.predict(folder / "images/20.png")
    equal(answers(opened, SHOWN), expected[:SHOWN])
    assert text(opened, "#rest").startswith(f"{len(scenes.CLASSES) - SHOWN} more, each ")
    assert text(opened, "#classify-told").startswith(f"{expected[0].text}, ")
    assert opened.get("document.querySelector('#preview').naturalWidth") == 64


def test_a_drop_beside_the_frame_counts_too_and_the_page_stays(opened, classifier, folder):
    opened.drop("#labels", folder / "images/03.png")
    equal(answers(opened, SHOWN), classifier.predict(folder / "images/03.png")[:SHOWN])
    assert opened.get("document.querySelector('#labels').value") == ""


def test_labels_stand_in_the_template(opened, classifier, folder):
    opened.write("#labels", f"{LABELS[0]}, {LABELS[1]}\n{LABELS[2]},,\n {LABELS[3]} \n{LABELS[0]}")
    opened.drop("#drop", folder / "images/03.png")  # of which a template changes much
    prompts = {f"a photo of a {label}": label for label in LABELS}
    expected = classifier.predict(folder / "images/03.png", list(prompts))
    assert max(answer.probability for answer in expected) < 0.9
    equal(answers(opened, 4), [answer._replace(text=prompts[answer.text]) for answer in expected])
    assert opened.get("document.querySelector('#answers b')") is None
    opened.write("#template", "")
    opened.press("Enter", **ENTER)
    expected = classifier.predict(folder / "images/03.png", LABELS)
    assert max(answer.probability for answer in expected) > 0.95
    equal(answers(opened, 4), expected)


def test_a_file_may_be_chosen(opened, classifier, folder):
    opened.write("#labels", "\n".join(LABELS))
    opened.write("#template", "{}")
    root = opened("DOM.getDocument")["root"]["nodeId"]
    for number, selector in ((28, "#file"), (29, "#camera input")):
        node = opened("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        path = folder / f"images/{number:02}.png"
        opened("DOM.setFileInputFiles", nodeId=node, files=[str(path)])
        opened.wait(f"document.querySelector('#call').innerText.startsWith('{path.name}')")
        equal(answers(opened, 4), classifier.predict(path, LABELS))


def test_a_picture_may_be_pasted(opened, classifier, folder):
    opened("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    image = Image.open(folder / "images/11.png")
    opened.get(f"({COPY})({json.dumps(encoded(image, 'PNG'))})")
    opened.press("v", code="KeyV", windowsVirtualKeyCode=86, modifiers=2, commands=["paste"])
    equal(answers(opened, SHOWN), classifier.predict(folder / "images/11.png")[:SHOWN])


COPY = """text => navigator.clipboard.write([new ClipboardItem({"image/png":
  new Blob([Uint8Array.from(atob(text), letter => letter.charCodeAt(0))], {type: "image/png"})})])"""


def test_a_photo_of_a_phone_is_made_smaller_and_stays_upright(opened, classifier, tmp_path):
    """12 million pixels of a sensor that lay on its side: as a file far more than the server takes."""
    scene = scenes.render("page", 7, 7)[0].resize((4032, 3024), Image.Resampling.BICUBIC)
    noise = np.random.default_rng(0).integers(-20, 21, (3024, 4032, 3))
    pixels = np.clip(np.asarray(scene, np.int16) + noise, 0, 255).astype(np.uint8)
    pixels[:300, :300] = (255, 0, 0)  # top left as the sensor has it, top right once it is upright
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).save(path, quality=95, exif=exif)
    assert path.stat().st_size > 5_000_000
    opened.drop("#drop", path)
    shown = answers(opened, SHOWN)
    body = sent(opened, "/v1/zero-shot")
    assert len(json.dumps(body)) < 1_000_000
    picture = picture_of(body)
    assert picture.size == (1024, 1365)
    assert not picture.getexif()
    red, green, _ = picture.getpixel((1000, 20))
    assert red > 200 > 100 > green
    small, upright = (np.asarray(each.resize((32, 32)), float) for each in (picture, read_image(path)))
    assert np.abs(small - upright).mean() < 3
    equal(shown, classifier.predict(picture)[:SHOWN])
    assert shown[0][0] == classifier.predict(path)[0].text


def test_what_is_transparent_is_white_and_what_is_huge_is_shrunk(opened, tmp_path):
    Image.new("RGBA", (6000, 1200), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    opened.drop("#drop", tmp_path / "clear.png")
    answers(opened, SHOWN)
    picture = picture_of(sent(opened, "/v1/zero-shot"))
    assert picture.size == (5120, 1024)
    assert np.asarray(picture).min() > 250


def test_a_search_by_text_shows_what_the_command_finds(opened, classifier, folder):
    assert text(opened, "#size") == f"{IMAGES} pictures"
    opened.write("#query", TEXT)
    opened.press("Enter", **ENTER)
    names, cosines = found(opened, 24)
    expected = search(classifier, folder / "parts", TEXT, 24).hits
    assert names == [hit.path for hit in expected]
    assert cosines == pytest.approx([hit.cosine for hit in expected], abs=6e-4)
    assert [hit for hit in opened.get("[...document.querySelectorAll('#found img')].map(image => image.alt)")] == names


def test_a_search_by_the_picture_finds_it_first(opened, folder):
    assert opened.get("document.querySelector('#alike').disabled")
    opened.drop("#drop", folder / "images/33.png")
    answers(opened, SHOWN)
    opened.get("document.querySelector('#count').value = 12")
    opened.click("#alike")
    names, cosines = found(opened, 12)
    assert (names[0], cosines[0]) == ("33.png", 1.0)
    assert cosines == sorted(cosines, reverse=True)


def test_what_goes_wrong_is_a_sentence_and_what_is_right_again_ends_it(opened, folder):
    opened.click("#classify button")
    assert opened.wait("document.querySelector('#classify-error').innerText") == "Choose a picture first."
    opened.click("#search .main")
    assert opened.wait("document.querySelector('#search-error').innerText") == "Write what the pictures show first."
    opened.drop("#drop", folder / "parts/part-00000.parquet")
    assert opened.wait("document.querySelector('#refused').innerText") == "part-00000.parquet is no picture."
    opened.drop("#drop", folder / "images/00.png")
    answers(opened, SHOWN)
    assert text(opened, "#refused") == text(opened, "#classify-error") == ""
    opened.write("#labels", "star")
    opened.write("#template", "a photo")
    opened.press("Enter", **ENTER)
    said = "Template is \"a photo\": give a text with {} in the place of a label, for example 'a photo of a {}'."
    assert opened.wait("document.querySelector('#classify-error').innerText") == said
    assert opened.console.pop().startswith("Failed to load resource")  # the browser's own word on a 400


def count(browser, selector):
    return browser.get(f"document.querySelectorAll({json.dumps(selector)}).length")


def test_an_answer_goes_when_another_request_fails_or_the_picture_changes(opened, folder):
    opened.drop("#drop", folder / "images/00.png")
    answers(opened, SHOWN)
    assert text(opened, "#rest")
    opened.write("#labels", "star")
    opened.write("#template", "a photo")
    opened.press("Enter", **ENTER)
    opened.wait("document.querySelector('#classify-error').innerText")
    assert (count(opened, "#answers li"), text(opened, "#rest")) == (0, "")
    opened.write("#template", "{}")
    opened.press("Enter", **ENTER)
    answers(opened, 1)
    opened.click("#alike")
    found(opened, 24)
    opened.get("(window.fetch = () => new Promise(() => {}), 0)")
    opened.drop("#drop", folder / "images/01.png")
    opened.wait("document.querySelectorAll('#answers li, #found li').length === 0")
    assert opened.console.pop().startswith("Failed to load resource")  # the browser's own word on a 400


def test_what_was_found_goes_when_another_search_fails_and_stays_when_it_was_a_text(opened, folder):
    opened.write("#query", TEXT)
    opened.press("Enter", **ENTER)
    found(opened, 24)
    opened.drop("#drop", folder / "images/01.png")
    answers(opened, SHOWN)
    assert count(opened, "#found li") == 24
    opened.write("#query", "")
    opened.press("Enter", **ENTER)
    opened.wait("document.querySelector('#search-error').innerText")
    assert count(opened, "#found li") == 0


def test_a_server_that_is_gone_is_told(package, folder, chromium):
    with serving(package) as server:
        browser = begin(chromium, server)
        assert browser.get("document.querySelector('#searching').hidden")  # no index
        browser.drop("#drop", folder / "images/00.png")
        answers(browser, SHOWN)
        assert server.stop() == 0
        browser.click("#classify button")
        assert browser.wait("document.querySelector('#classify-error').innerText") == "The server cannot be reached."


def test_a_key_is_asked_for_where_one_is_needed_and_kept_in_memory_alone(package, folder, chromium, tmp_path):
    (tmp_path / "keys").write_text("right-key")
    (tmp_path / "keys").chmod(0o600)
    arguments = "--index", folder / "parts", "--images", folder / "images", "--api-key-file", tmp_path / "keys"
    with serving(package, *arguments) as server:
        browser = begin(chromium, server)
        assert text(browser, "#failed") == "This server asks for a key."
        assert browser.get("document.querySelector('#all').hidden")
        for key, said in (("wrong", "The server does not accept this key."), ("schlüssel", "A key has letters")):
            browser.write("#key", key)
            browser.press("Enter", **ENTER)
            browser.wait(f"document.querySelector('#failed').innerText.startsWith({json.dumps(said)})")
        browser.write("#key", "right-key")
        browser.click("#keys button")
        browser.wait("!document.querySelector('#all').hidden && document.querySelector('#keys').hidden")
        browser.write("#query", TEXT)
        browser.press("Enter", **ENTER)
        assert len(found(browser, 24)[0]) == 24
        stored = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
        assert "right" not in browser.get(stored)
        browser.open(f"{server.url}/")
        browser.wait("!document.querySelector('#keys').hidden")


def test_of_several_packages_one_is_picked(package, folder, chromium):
    with serving(f"one={package}", f"two={package}") as server:
        browser = begin(chromium, server)
        assert len(browser.get("[...document.querySelector('#model').options].map(option => option.text)")) == 2
        padding = browser.get("getComputedStyle(document.querySelector('#model')).paddingRight")
        assert float(padding.removesuffix("px")) >= 28  # where the list's arrow is, no name may be
        browser.drop("#drop", folder / "images/00.png")
        answers(browser, SHOWN)
        assert sent(browser, "/v1/zero-shot")["model"].startswith("one:")
        browser.get("document.querySelector('#model').focus()")
        browser.press("ArrowDown", code="ArrowDown", windowsVirtualKeyCode=40)
        browser.wait("document.querySelector('#model').selectedIndex === 1")
        browser.wait("!document.querySelector('#classify-told').innerText.includes('…')")
        assert sent(browser, "/v1/zero-shot")["model"].startswith("two:")


LOOK = """(() => {
  const box = node => node.getBoundingClientRect();
  const shown = [...document.querySelectorAll("body *")].filter(node => node.checkVisibility() && box(node).width > 1);
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = ([red, green, blue]) => [red, green, blue].map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const behind = node => {
    for (; node; node = node.parentElement) {
      const colour = rgb(getComputedStyle(node).backgroundColor);
      if (colour.length === 3) return colour;
    }
  };
  const contrast = node => {
    const [low, high] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const words = shown.filter(node => [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()));
  const name = node => node.tagName + "#" + node.id + " " + node.innerText.slice(0, 40);
  return {
    wide: document.documentElement.scrollWidth, inner: innerWidth,
    outside: shown.filter(node => box(node).right > innerWidth + 1 || box(node).left < -1).map(name),
    faint: words.filter(node => !(contrast(node) >= 4.5)).map(node => [name(node), contrast(node)]),
    words: words.length,
    low: shown.filter(node => node.matches("button, input:not([type=file]), select, .button"))
      .filter(node => box(node).height < 38).map(name),
  };
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_off_or_faint(opened, folder, tmp_path, width, dark):
    opened.look(width, dark=dark)
    opened.write("#labels", ", ".join([*LABELS, "x" * 200]))
    opened.drop("#drop", folder / "images/09.png")
    answers(opened, 5)
    opened.write("#query", TEXT)
    opened.press("Enter", **ENTER)
    found(opened, 24)
    look = opened.get(LOOK)
    assert (look["wide"] <= width, look["inner"]) == (True, width)
    assert (look["outside"], look["faint"], look["low"]) == ([], [], [])
    assert look["words"] > 60
    assert opened.get("getComputedStyle(document.querySelector('#camera')).display") == (
        "block" if width < 600 else "none"
    )


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_documentation_fits_a_phone_and_its_policy(chromium, server, dark):
    chromium.look(400, dark=dark)
    chromium.console.clear()
    chromium.open(f"{server.url}/docs")
    colour = chromium.wait("getComputedStyle(document.querySelector('pre')).backgroundColor")
    assert colour == ("rgb(42, 47, 54)" if dark else "rgb(243, 243, 243)")  # the style is one that the policy allows
    assert chromium.get("document.documentElement.scrollWidth") <= 400
    assert chromium.console == []


def test_every_control_is_reached_by_the_keyboard_and_has_a_name(opened, folder):
    opened.drop("#drop", folder / "images/09.png")
    answers(opened, SHOWN)
    opened.get("document.querySelector('header a').focus()")
    reached = []
    for _ in range(8):
        opened.press("Tab", code="Tab", windowsVirtualKeyCode=9)
        reached.append(opened.get("document.activeElement.id || document.activeElement.innerText"))
        ring = opened.get(
            "getComputedStyle(document.activeElement.closest('.file') || document.activeElement).outlineStyle"
        )
        assert ring == "solid", reached[-1]
    assert reached == ["file", "labels", "template", "Classify", "query", "Search", "count", "alike"]
    nodes = opened("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in nodes:
        if any(each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", [])):
            named.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert all(name.strip() for role, names in named.items() if role != "RootWebArea" for name in names), named
    live = [node["role"]["value"] for node in nodes if node["role"]["value"] in ("alert", "status")]
    assert live.count("status") >= 1


def test_the_page_stands_alone_and_its_policy_holds_it_to_that(server):
    status, headers, content = server.fetch("GET", "/")
    assert (status, content.decode()) == (200, PAGE)
    assert {name: headers[name] for name in HEADERS} == HEADERS
    policy = dict(part.split(" ", 1) for part in HEADERS["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert "unsafe" not in str(policy)
    assert not re.findall(r"(?:https?:)?//\w+\.|\son\w+=|\sstyle=|innerHTML", PAGE)


@pytest.mark.parametrize(
    "script",
    [
        "document.body.innerHTML = '<b>'",
        "Object.assign(document.createElement('script'), {src: '/other.js'})",
        "fetch('https://example.com/')",
        "new Promise((done, fail) => Object.assign(new Image(), {src: 'https://example.com/', onerror: fail}))",
    ],
)
def test_the_browser_runs_and_asks_for_nothing_else(opened, script):
    assert opened.get(f"(async () => {script})().then(() => 'done', () => 'refused')") == "refused"
    assert re.search("Content Security Policy|Trusted", opened.console[0])
    opened.console.clear()
    opened.requests.clear()
