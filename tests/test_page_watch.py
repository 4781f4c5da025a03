"""The page of `scripts.watch` in a real browser, on runs that this test writes: they grow, die and go on meanwhile."""

import json
import threading
import time
from types import SimpleNamespace

import pytest
import uvicorn
from page_driver import browser, open_page  # noqa: F401, a fixture

from nanochat.locks import hold_lock
from nanochat.metrics_log import MetricsLog
from nanochat.web import listen
from scripts.watch import create_app


@pytest.fixture
def server(tmp_path):
    with listen("127.0.0.1", 0) as sock:
        server = uvicorn.Server(uvicorn.Config(create_app(tmp_path), log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            yield SimpleNamespace(url=f"http://127.0.0.1:{sock.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()


class Run:
    """A run that this process stands in for."""

    def __init__(self, folder, iterations=100, step=0, **facts):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.lock = hold_lock(folder.with_name(f".{folder.name}.lock"))
        self.facts = {"started": time.time(), "iterations": iterations, "world_size": 1, "command": "train it", **facts}
        self.log = MetricsLog(folder / "metrics.jsonl", step=step)
        self.write("running")

    def write(self, state):
        (self.folder / "run.json").write_text(json.dumps({"state": state, **self.facts}))

    def train(self, steps, loss=5.0):
        for step in steps:
            self.log.log({"step": step, "time": self.facts["started"] + step, "tokens": 1000 * step,
                          "train/loss": loss, "smooth_loss": loss, "lr/embedding": 0.3, "lr/matrix": 0.02,
                          "grad_norm": 1.0, "tok_per_sec": 900, "memory_bytes": 2e9, "mfu": None})

    def kill(self):
        self.log.close()
        self.lock.__exit__(None, None, None)


def curve(page, title):
    """{x: value} of the first curve of a chart, as its page has it."""
    return page.evaluate("""title => {
        const titled = one => one.querySelector("h2").innerText === title;
        const figure = [...document.querySelectorAll("figure")].find(titled);
        if (!figure || figure.hidden) return null;
        const [{ points }] = figure.querySelector(".chart").scale.curves;
        return points.map(({ x, last }) => [x, last]); }""", title)


def wait_for(page, condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, page.locator("main").inner_text()
        page.wait_for_timeout(50)


def test_a_run_that_grows_is_killed_and_goes_on(browser, server, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("nanochat.run_status.QUIET_S", 0.5)
    folder = tmp_path / "base_checkpoints" / "d4"
    with open_page(browser, server) as opened:
        page = opened.page
        page.get_by_text("No run yet").wait_for()
        run = Run(folder)
        run.train(range(1, 11))
        wait_for(page, lambda: curve(page, "Loss") == [[step, 5] for step in range(1, 11)])
        run.train(range(11, 41), loss=4.0)
        page.get_by_text("step 40 of 100 · 1m left").wait_for()
        assert curve(page, "Loss")[-1] == [40, 4] and "40%" in page.title()
        assert curve(page, "MFU") is None

        with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 41, "tra')
        run.kill()
        page.get_by_text("it was killed, or its machine was out of memory").wait_for()
        assert len(curve(page, "Loss")) == 40

        run = Run(folder, step=20)
        run.train(range(21, 31), loss=3.0)
        wait_for(page, lambda: curve(page, "Loss")[-1] == [30, 3])
        assert [value for _, value in curve(page, "Loss")] == [5] * 10 + [4] * 10 + [3] * 10
        page.locator(".card").get_by_text("running").wait_for()
        run.write("finished")
        page.locator(".card").get_by_text("finished").wait_for()
        run.kill()


def test_runs_are_laid_over_each_other_by_steps_tokens_and_time(browser, server, tmp_path):  # noqa: F811
    for stage, steps in (("base", 50), ("mid", 20)):
        run = Run(tmp_path / f"{stage}_checkpoints" / "d4")
        run.train(range(1, steps + 1))
        last = {"step": steps, "time": run.facts["started"] + steps, "tokens": 1000 * steps}
        run.log.log({**last, "val/bpb": 1.25})
        run.write("finished")
        run.kill()
    with open_page(browser, server) as opened:
        page = opened.page
        wait_for(page, lambda: page.locator(".card").count() == 1)
        for box in page.get_by_role("checkbox").all():
            box.set_checked(True)
        wait_for(page, lambda: page.locator(".card").count() == 2)
        loss = page.get_by_role("slider", name="Loss, position")
        wait_for(page, lambda: loss.locator(".curve").count() == 4)
        page.get_by_text("Tokens", exact=True).click()
        assert curve(page, "Bits per byte") in ([[50_000, 1.25]], [[20_000, 1.25]])
        page.get_by_text("Time", exact=True).click()
        assert {len(curve(page, "Gradient norm")), curve(page, "Gradient norm")[-1][0]} in ({50, 49}, {20, 19})
        assert "x=time" in page.url and "runs=" in page.url
        page.reload()
        wait_for(page, lambda: page.locator(".card").count() == 2)
        assert page.get_by_role("radio", name="Time").is_checked()


def test_values_are_read_with_the_mouse_and_with_keys(browser, server, tmp_path):  # noqa: F811
    run = Run(tmp_path / "base_checkpoints" / "d4")
    for step in range(1, 11):
        run.train([step], loss=10.0 - step)
    with open_page(browser, server) as opened:
        page = opened.page
        loss = page.get_by_role("slider", name="Loss, position")
        loss.focus()
        page.keyboard.press("Home")
        assert loss.get_attribute("aria-valuetext") == "step 1:, each step9, smoothed9"
        page.keyboard.press("ArrowRight")
        legends = page.locator("figure:not([hidden]) .legend")
        assert all("step 2:" in text for text in legends.all_inner_texts())
        page.keyboard.press("Escape")
        assert "step" not in loss.get_attribute("aria-valuetext").replace("each step", "")
        box = loss.bounding_box()
        for place, step in ((0.1, "1:"), (0.999, "10:")):
            page.mouse.move(box["x"] + box["width"] * place, box["y"] + 50)
            assert loss.get_attribute("aria-valuetext").startswith(f"step {step}")
        run.kill()


def test_samples_and_errors_are_text(browser, server, tmp_path):  # noqa: F811
    markup = "<img src=x onerror=alert(1)>"
    run = Run(tmp_path / "base_checkpoints" / "d4", world_size=2, command=markup)
    run.train(range(1, 4))
    run.log.log({"step": 3, "time": 3.0, "samples": [{"prompt": "Once", "text": "Once " + markup}]})
    (run.folder / "error_rank1.txt").write_text(f"RuntimeError: {markup}\n\nTraceback (most recent call last)\nlast")
    run.write("failed")
    with open_page(browser, server) as opened:
        page = opened.page
        page.locator(".texts li").get_by_text(markup).wait_for()
        page.get_by_text(f"rank 1: RuntimeError: {markup}").click()
        page.get_by_text("Traceback").wait_for()
        assert page.locator("img").count() == 0
        run.log.log({"step": 3, "time": 4.0, "samples": [{"prompt": "And", "text": "And now"}]})
        page.locator(".texts li").get_by_text("And now").wait_for()
        assert page.get_by_text("Traceback").is_visible()
        run.kill()


def test_the_theme_is_kept_and_a_lost_server_is_told(browser, tmp_path):  # noqa: F811
    run = Run(tmp_path / "base_checkpoints" / "d4")
    run.train(range(1, 4))
    run.kill()
    sock = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(tmp_path), log_level="error", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    with open_page(browser, SimpleNamespace(url=f"http://127.0.0.1:{sock.getsockname()[1]}")) as opened:
        page = opened.page
        page.get_by_label("Theme").select_option("dark")
        page.reload()
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "dark"
        page.locator(".card").wait_for()
        server.should_exit = True
        thread.join()
        sock.close()
        page.get_by_text("The server does not answer").wait_for()
        assert page.locator(".card").is_visible()
