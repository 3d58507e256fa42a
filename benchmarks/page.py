"""Size of the counterfactual page, and the time that a browser takes to open it.

    python -m benchmarks.page [--images 200] [--rounds 7] [--json FILE]

One photograph with one target and six budgets, and many images (random crops of the sample photographs),
opened from disk in headless Chromium with a new context each time. The page counts as open at the second
frame after the load event.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ratioctl.cli import main as ratioctl
from tools import harness

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def opened(page: Path, rounds: int) -> dict[str, Any]:
    """Bytes of the page, and seconds to open it and to move its slider by one."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("Chromium was not found. Install it, for example with: apt-get install chromium")
    seconds, steps = [], []
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        version = browser.version
        for _ in range(rounds):
            context = browser.new_context(viewport={"width": 1600, "height": 1000})
            tab = context.new_page()
            began = time.perf_counter()
            tab.goto(page.as_uri(), wait_until="load")
            tab.evaluate(FRAMES)
            seconds.append(time.perf_counter() - began)
            tab.get_by_role("slider").first.focus()
            began = time.perf_counter()
            tab.keyboard.press("ArrowLeft")
            tab.evaluate(FRAMES)
            steps.append(time.perf_counter() - began)
            context.close()
        browser.close()
    return {
        "bytes": page.stat().st_size,
        "opened_s": harness.spread(seconds),
        "slider_step_s": harness.spread(steps),
        "chromium": version,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="of the search; hardly changes the page's size")
    options = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "the page of counterfactuals"}
    result |= {name: getattr(options, name) for name in ("images", "rounds", "steps")}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        many = harness.sample_crops(folder / "many", options.images, (64, 64), suffix="png")
        for key, source in (("one", harness.SAMPLES / "cat.jpg"), ("many", many)):
            out = folder / f"out-{key}"
            line = ["counterfactual", str(source), "--target", "dog", "--eps", "0.5..3", "-q"]
            code = ratioctl([*line, "--steps", str(options.steps), "--out", str(out)])
            if code:
                sys.exit(f"counterfactual ended with {code}")
            result[key] = opened(out / "index.html", options.rounds)
    harness.finish(result, options)


if __name__ == "__main__":
    main()
