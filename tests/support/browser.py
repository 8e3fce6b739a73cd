"""A page as a browser shows it, at any width."""

import html
import json
import re
import shutil
import subprocess

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium that draws the page")

WINDOW = """<!doctype html><title></title>
<iframe style="border: 0; width: {width}px; height: 2000px" srcdoc="{page}"></iframe>"""


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
