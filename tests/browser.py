"""Pages in a real browser, as wide as asked: what is cut, what overlaps, what is empty.

The page lies in a frame, because a headless window is never as narrow as a phone.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from typing import Any

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>
addEventListener('load', () => {
  const found = {wide: document.documentElement.scrollWidth, window: innerWidth, cut: [], overlapping: [], empty: [],
                 svgs: document.querySelectorAll('svg').length, texts: 0, dark: getComputedStyle(document.body).color};
  const box = e => e.getBoundingClientRect(), name = e => e.textContent.trim().slice(0, 40);
  for (const e of document.querySelectorAll('.wide, td, th, li, h1, h2, h3'))
    if (e.offsetParent && e.scrollWidth > e.clientWidth + 1) found.cut.push(e.tagName + ': ' + name(e));
  for (const svg of document.querySelectorAll('figure svg')) {
    const whole = box(svg), texts = [...svg.querySelectorAll('text')].filter(t => name(t));
    const label = svg.getAttribute('aria-label');
    found.texts += texts.length;
    if (whole.height < 60 || whole.width < 200 || texts.length < 2 || svg.querySelectorAll('path').length < 3)
      found.empty.push(label);
    texts.forEach((t, i) => {
      const a = box(t);
      if (a.left < whole.left - 1 || a.right > whole.right + 1 || a.top < whole.top - 1 || a.bottom > whole.bottom + 1)
        found.cut.push(label + ': ' + name(t));
      for (const other of texts.slice(i + 1)) {
        const b = box(other), wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (wide > 2 && high > 4) found.overlapping.push(label + ': ' + name(t) + ' / ' + name(other));
      }
    });
  }
  for (const e of document.querySelectorAll('section, figure, ul, table'))
    if (!name(e) || box(e).height < 5) found.empty.push(e.tagName);
  parent.document.title = 'found' + JSON.stringify(found);
});
</script>
"""


def look(page: str, width: int, folder: Path) -> dict[str, Any]:
    """What the browser says of a whole HTML page in a window of `width` CSS pixels."""
    inner = escape(page.replace("</html>", PROBE + "</html>"), quote=True)
    look_at = f'srcdoc="{inner}" width="{width}" height="900" style="border:0"'
    frame = f"<!doctype html><title>waiting</title><iframe {look_at}>"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "frame.html").write_text(frame, encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    done = subprocess.run(
        [str(BROWSER), *flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,1000",
         "--virtual-time-budget=20000", "--dump-dom", (folder / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = unescape(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert title.startswith("found"), title[:200] + done.stderr[-400:]
    found: dict[str, Any] = json.loads(title.removeprefix("found"))
    return found


def assert_readable(found: dict[str, Any], figures: int) -> None:
    """Nothing is cut, overlapping or empty, nothing scrolls sideways, and all figures are there."""
    assert found["wide"] <= found["window"], found
    assert found["cut"] == [] and found["overlapping"] == [] and found["empty"] == [], found
    assert found["svgs"] == figures and found["texts"] >= 5 * figures, found
