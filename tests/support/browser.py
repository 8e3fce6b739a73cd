"""A page as a browser shows it, at any width, and a browser that is steered."""

import base64
import html
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium that draws the page")

WINDOW = """<!doctype html><title></title>
<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe>"""

# A script's beginning: which texts of drawings lie outside of them or on each other, and how wide the page is.
PLACES = """
  const texts = [...document.querySelectorAll("svg text")].filter(text => text.textContent.trim());
  const box = node => node.getBoundingClientRect();
  const outside = (a, b) => a.left < b.left || a.right > b.right || a.top < b.top || a.bottom > b.bottom;
  const meet = (a, b) => a.left + 1 < b.right && b.left + 1 < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom;
  const covered = texts.flatMap((one, index) => texts.slice(index + 1)
    .filter(other => one.ownerSVGElement === other.ownerSVGElement && meet(box(one), box(other)))
    .map(other => one.textContent + " on " + other.textContent));
  const cut = texts.filter(text => outside(box(text), box(text.ownerSVGElement))).map(text => text.textContent);
  const places = {cut, covered, texts: texts.length, inner: innerWidth, wide: document.documentElement.scrollWidth};
"""


def look(page, folder, width, script):
    """What `script` returns inside the page, which is `width` pixels wide, and what came onto its console.

    A window of Chromium is no narrower than 500 pixels; a frame is.
    """
    said = f"<script>parent.document.title = JSON.stringify((() => {{{script}}})())</script></body>"
    inner = html.escape(page.replace("</body>", said))
    (folder / "window.html").write_text(WINDOW.format(width=width, page=inner), encoding="utf-8")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--window-size=1400,2100", "--dump-dom", f"file://{folder / 'window.html'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (title,) = re.findall("<title>(.*?)</title>", done.stdout, re.DOTALL)[:1]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert title, (console, done.stderr)
    return json.loads(html.unescape(title)), console


# Chromium reads commands from descriptor 3 and writes to 4; they are free once Python has started.
AS_3_AND_4 = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execvp(sys.argv[3], sys.argv[3:])"
)
ANSWERS_S = 60


class Browser:
    """Chromium with one page, steered by the DevTools protocol over a pipe.

    Attributes:
        console: what the page wrote, and what the browser said of it.
        requests: those that left the page, as the protocol describes them, by their ids.
    """

    def __init__(self, folder, width=1280, height=900, dark=False):
        """Args: folder, which is the browser's own; whether the user likes it dark."""
        ours, theirs = os.pipe(), os.pipe()
        command = [
            sys.executable,
            "-c",
            AS_3_AND_4,
            str(ours[0]),
            str(theirs[1]),
            CHROMIUM,
            "--headless",
            "--no-sandbox",
        ]
        command += ["--remote-debugging-pipe", "--disable-gpu", f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(
            command, pass_fds=(ours[0], theirs[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(ours[0])
        os.close(theirs[1])
        self.to, self.out, self.rest = ours[1], theirs[0], b""
        self.number, self.session, self.console, self.requests = 0, None, [], {}
        page = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")
        self.look(width, height, dark)

    def __call__(self, method, **params):
        """The result of a command."""
        self.number += 1
        said = {"id": self.number, "method": method, "params": params}
        if self.session:
            said["sessionId"] = self.session
        os.write(self.to, json.dumps(said).encode() + b"\0")
        while (answer := self._message()).get("id") != self.number:
            self._note(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _message(self):
        until = time.monotonic() + ANSWERS_S
        while b"\0" not in self.rest:
            ready, _, _ = select.select([self.out], [], [], until - time.monotonic())
            assert ready, "the browser says nothing"
            part = os.read(self.out, 1 << 20)
            assert part, "the browser has ended"
            self.rest += part
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event):
        params = event.get("params", {})
        if event["method"] == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in params["args"]))
        elif event["method"] == "Runtime.exceptionThrown":
            self.console.append(str(params["exceptionDetails"]))
        elif event["method"] == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        elif event["method"] == "Network.requestWillBeSent":
            self.requests[params["requestId"]] = params["request"]

    def look(self, width, height=900, dark=False):
        """As a screen of this size shows it; below 600 pixels that of a phone."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setTouchEmulationEnabled", enabled=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, url):
        self("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def get(self, script):
        """The value of an expression in the page, as if a user had caused it."""
        found = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, script, seconds=ANSWERS_S):
        """Until an expression holds; its value."""
        end = time.monotonic() + seconds
        while not (found := self.get(script)):
            assert time.monotonic() < end, (script, self.console)
            time.sleep(0.02)
        return found

    def middle(self, selector):
        """Where an element is, after it was scrolled into view."""
        node = f"document.querySelector({json.dumps(selector)})"
        self.get(f"{node}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        box = self.get(f"(b => [b.left + b.width / 2, b.top + b.height / 2])({node}.getBoundingClientRect())")
        return {"x": box[0], "y": box[1]}

    def click(self, selector):
        place = self.middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self("Input.dispatchMouseEvent", type=kind, **place, button="left", clickCount=1)

    def write(self, selector, text):
        """In the place of what a field holds."""
        self.get(f"(field => (field.focus(), field.select()))(document.querySelector({json.dumps(selector)}))")
        self("Input.insertText" if text else "Input.dispatchKeyEvent", **({"text": text} if text else DELETE))

    def press(self, key, **more):
        for kind in ("keyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, **more)

    def drop(self, selector, *files):
        """Drag files from elsewhere onto an element, and let go."""
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        place = self.middle(selector)
        for kind in ("dragEnter", "dragOver", "drop"):
            self("Input.dispatchDragEvent", type=kind, **place, data=data)

    def screenshot(self, path):
        """Of the whole page, also what must be scrolled to."""
        size = self("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self):
        self.session = None
        self("Browser.close")
        self.process.wait(timeout=60)
        os.close(self.to)
        os.close(self.out)


DELETE = {"type": "keyDown", "key": "Delete", "code": "Delete", "windowsVirtualKeyCode": 46}
