"""Opens a page in headless Chromium at a given width and returns what a script found in it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# The page lies in a frame of the wanted width (a headless window is never narrower than 500 px), unchanged.
_OUTER = """<!DOCTYPE html><html><body style="margin:0">
<iframe id="frame" style="border:0;width:{width}px;height:900px" srcdoc="{page}"></iframe><pre id="result"></pre>
<script>
const frame = document.getElementById("frame");
frame.addEventListener("load", () => {{
  let found;
  try {{ found = inspect(frame.contentWindow); }} catch (error) {{ found = {{ failed: String(error.stack) }}; }}
  document.getElementById("result").textContent = JSON.stringify(found);
  frame.remove();
}});
{script}
</script></body></html>"""


def browser() -> str | None:
    """Path of a Chromium, or None where there is none."""
    return next((found for name in _NAMES if (found := shutil.which(name))), None)


def inspect(page: str, script: str, *, width: int, folder: Path) -> Any:
    """What ``script``'s function ``inspect(window)`` returned for ``page`` in a frame of ``width`` px."""
    program = browser()
    assert program is not None, "the caller skips where there is no browser"
    outer = folder / "outer.html"
    outer.write_text(_OUTER.format(width=width, page=html.escape(page), script=script), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    flags += [f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, 500)},1000"]
    done = subprocess.run(
        [program, *flags, "--virtual-time-budget=10000", "--dump-dom", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    match = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, f"the page was not inspected: {done.stderr[-2000:]}"
    return json.loads(html.unescape(match[1]))
