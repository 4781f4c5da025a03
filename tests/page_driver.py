"""
A browser on the chat page, for the tests: finds Chromium, opens the page and speaks of it in the words of a user.

    with open_browser() as browser, PageServer() as server, open_page(browser, server) as chat:
        chat.say("Hello")
        chat.turns()          # [("user", "Hello"), ("assistant", "Hello there.")]

Leaving `open_page` fails when the page broke its content security policy, asked another host for anything, or wrote
an error to the console. (What Chromium itself writes about a response of 4xx or 5xx is no error of the page.) The
fixtures at the end are what a test module takes by `browser, server, chat = FIXTURES`.
"""

import os
import shutil
from contextlib import contextmanager

import pytest
from page_server import PageServer

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WATCH_CSP = """window.violations = [];
    addEventListener("securitypolicyviolation", e => violations.push(e.violatedDirective));"""


@contextmanager
def open_browser():
    """Skips the test where playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: uv sync --group dev")
    with playwright.sync_playwright() as driver:
        path = next(filter(None, map(shutil.which, NAMES)), None) or driver.chromium.executable_path
        if not os.path.exists(path):
            pytest.skip("needs Chromium: apt-get install chromium, or playwright install chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def open_page(browser, server, init_script="", **settings):
    """A fresh profile with the page open; `settings` are those of playwright's new_context."""
    defaults = {"viewport": {"width": 1200, "height": 800}, "reduced_motion": "reduce"}
    context = browser.new_context(**(defaults | settings))
    context.set_default_timeout(30_000)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page, troubles = context.new_page(), []

    def hear(message):
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            troubles.append(message.text)

    page.on("console", hear)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:", "blob:"))
            else troubles.append(f"asked {request.url}"))
    page.add_init_script(WATCH_CSP + init_script)
    page.goto(server.url)
    yield Chat(page)
    troubles += page.evaluate("violations")
    context.close()
    assert troubles == []


class Chat:
    def __init__(self, page):
        self.page = page

    def send(self, text):
        self.page.fill("#prompt", text)
        self.page.click("#send")

    def wait(self):
        """Until no answer is under way."""
        self.page.wait_for_selector('#thread[aria-busy="false"]', state="attached")

    def say(self, text):
        self.send(text)
        self.wait()

    def turns(self):
        return self.page.evaluate("""() => [...document.querySelectorAll("#thread .turn")].map(turn =>
            [turn.classList.contains("user") ? "user" : "assistant", turn.querySelector(".body").innerText.trim()])""")

    def answer(self):
        return self.page.locator(".turn.assistant").last

    def see(self, text):
        """Wait until `text` is visible somewhere."""
        self.page.get_by_text(text).first.wait_for()

    def wait_for_text(self, text):
        """Until the text of the base model is `text`."""
        from playwright.sync_api import expect  # not needed where there is no browser
        expect(self.page.locator("#text")).to_have_value(text, timeout=30_000)

    def button(self, name, within=None):
        return (within or self.page).get_by_role("button", name=name, exact=True)

    def titles(self):
        return self.page.locator(".chat-row .name").all_inner_texts()

    def export_all(self, path):
        """Save all conversations to a file, by the page's own button."""
        self.button("Settings").click()
        with self.page.expect_download() as download:
            self.button("Export all").click()
        download.value.save_as(path)

    def reload(self):
        self.page.reload()
        self.page.wait_for_selector("#model option", state="attached")


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


@pytest.fixture
def server():
    with PageServer() as server:
        yield server


@pytest.fixture
def chat(browser, server):
    with open_page(browser, server) as chat:
        yield chat


FIXTURES = browser, server, chat
