"""
The pictures of README.md: the chat page with a real conversation, and the curves of a whole run.

    python -m dev.pictures                      of the models in the base directory, into dev/docs/pictures/
    python -m dev.pictures --parts=curves       one of them

For the page, scripts/chat_web serves the model of the last stage on a free port, and a browser sends MESSAGES one after
the other. The picture is taken of whatever the model answers, always its likeliest tokens. The curves come from
metrics.jsonl of each stage. Needs playwright (`uv sync --group dev`) and Chromium for the page.
"""

import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import requests

from nanochat.checkpoint_manager import find_checkpoint_dir
from nanochat.common import UserError, run_script, write_text
from nanochat.configurator import override_from_cli
from nanochat.curves import read_panels, shorten, to_svg

parts: str = "page,curves"             # what to make, with commas between
source: str = "rl"                     # stage of the model on the page
out: str = "dev/docs/pictures"         # folder of the pictures

MESSAGES = ("What is 12 + 35?", "Tell me a story about a fox")
WINDOW = {"width": 1100, "height": 740}  # pixels
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_S = 120  # for the server to load the model

CURVES = {
    "base": "Pretraining",
    "mid": "Midtraining",
    "sft": "Supervised finetuning",
}

# -----------------------------------------------------------------------------
# The page


@contextmanager
def serve(stage):
    """Run scripts/chat_web on a free port; yields its address when the model is loaded."""
    command = [sys.executable, "-m", "scripts.chat_web", "-i", stage, "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # its first line begins with the address; no line at all if it ended with an error
        address = server.stdout.readline().split(" ")[0]
        deadline = time.monotonic() + START_S
        while not is_ready(address):
            if server.poll() is not None or time.monotonic() > deadline:
                raise UserError("the server did not start", f"try {' '.join(command[1:])}")
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def is_ready(address):
    try:
        return requests.get(f"{address}/ready", timeout=5).ok
    except requests.RequestException:
        return False


@contextmanager
def open_browser():
    """A playwright browser: Chromium of the system, else the one that playwright installed."""
    try:
        from playwright.sync_api import Error, sync_playwright
    except ImportError:
        raise UserError("playwright is not installed", "uv sync --group dev") from None

    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            raise UserError("Chromium cannot be started", "playwright install chromium") from error
        yield browser
        browser.close()


def photograph_page(path, stage, messages=MESSAGES):
    """Have a conversation on the page and write its picture, a PNG. Returns the texts of all turns."""
    with serve(stage) as address, open_browser() as browser:
        page = browser.new_page(viewport=WINDOW, color_scheme="light", reduced_motion="reduce")
        page.goto(address)

        # the likeliest tokens, so that the same model gives the same picture
        page.get_by_role("button", name="Settings", exact=True).click()
        page.fill("#settings [name=temperature]", "0")
        page.keyboard.press("Escape")

        for message in messages:
            page.fill("#prompt", message)
            page.click("#send")
            page.wait_for_selector('#thread[aria-busy="false"]', state="attached")
        page.mouse.move(0, 0)  # else a button shows that the mouse is over it
        page.screenshot(path=path)
        return page.locator("#thread .turn .body").all_inner_texts()


# -----------------------------------------------------------------------------
# The curves


def draw_curves():
    """A matplotlib Figure with the training loss of each stage of the newest run."""
    from matplotlib.figure import Figure  # imported here, as in nanochat/curves.py

    figure = Figure(figsize=(9.2, 2.6), layout="constrained")  # inches
    for place, (stage, title) in enumerate(CURVES.items(), 1):
        path = find_checkpoint_dir(stage) / "metrics.jsonl"
        losses = read_panels(path).get("loss", {}).get("train/loss")
        if not losses:
            raise UserError(f"no train/loss in {path}", "bash dev/runcpu.sh trains all stages")
        steps, values = shorten(losses)
        axes = figure.add_subplot(1, len(CURVES), place, title=title, xlabel="step")
        axes.plot(steps, values, label="training loss")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def main():
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts.split(","):
        if part == "page":
            for text in photograph_page(folder / "page.png", source):
                print(f"{text}\n")
        elif part == "curves":
            write_text(folder / "curves.svg", to_svg(draw_curves()))
        else:
            raise UserError(f"--parts={parts}: there is no part {part!r}", "--parts=page,curves")
    for path in sorted(folder.iterdir()):
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    override_from_cli(globals(), prefix="--")
    run_script(main)
