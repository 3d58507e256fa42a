"""How large the page of counterfactuals is, and how long a browser takes to open it.

    python benchmarks/page.py [--images 200] [--rounds 7] [--json FILE]

One photograph with one target and six budgets, and many images (random crops of the sample photographs),
opened from disk in headless Chromium, a new context each time. Opened is the
second frame after the load event.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _result import finish
from PIL import Image

from ratioctl.cli import main as ratioctl
from ratioctl.utils import resources

FRAMES = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"


def crops(folder: Path, count: int, seed: int) -> None:
    """`count` PNGs of 64x64, cut at random from the sample photographs."""
    generator = np.random.default_rng(seed)
    photographs = [
        np.asarray(Image.open(path).convert("RGB"))
        for path in sorted((resources.folder("assets") / "samples").glob("*.jpg"))
    ]
    for k in range(count):
        whole = photographs[k % len(photographs)]
        side = int(generator.integers(64, min(whole.shape[:2]) + 1))
        top, left = (int(generator.integers(0, size - side + 1)) for size in whole.shape[:2])
        Image.fromarray(whole[top : top + side, left : left + side]).resize((64, 64)).save(
            folder / f"{k:03}.png"
        )


def opened(page: Path, rounds: int) -> dict[str, Any]:
    """Bytes of the page, and seconds to open it and to move its slider by one."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no chromium on this machine; install it")
    seconds, steps = [], []
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium, args=options)
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
        "opened_s": {"median": statistics.median(seconds), "range": [min(seconds), max(seconds)]},
        "slider_step_s": {"median": statistics.median(steps), "range": [min(steps), max(steps)]},
        "chromium": version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=5, help="of the search; the page's size hardly depends on it"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "benchmark": "the page of counterfactuals",
        "images": options.images,
        "rounds": options.rounds,
        "steps": options.steps,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "many").mkdir()
        crops(folder / "many", options.images, seed=0)
        cat = resources.folder("assets") / "samples" / "cat.jpg"
        for key, source in (("one", cat), ("many", folder / "many")):
            out = folder / f"out-{key}"
            line = [
                "counterfactual",
                str(source),
                "--target",
                "dog",
                "--eps",
                "0.5..3",
                "--out",
                str(out),
                "-q",
            ]
            code = ratioctl([*line, "--steps", str(options.steps)])
            if code != 0:
                sys.exit(f"counterfactual ended with code {code}")
            result[key] = opened(out / "index.html", options.rounds)
    finish(result, options.json)


if __name__ == "__main__":
    main()
