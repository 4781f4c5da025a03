"""The chat page when things go wrong: cut streams, dead and busy servers, missing keys, a full or damaged storage."""

import json
import time

import pytest
from page_driver import FIXTURES, open_page
from page_server import Answer, PageServer

from tests.servers import wait_for

RETRY = {"Retry-After": "20"}  # longer than a test waits: it presses the button

browser, server, chat = FIXTURES


def roles(server):
    return [message["role"] for message in server.requests[-1][0]["messages"]]


@pytest.mark.parametrize("size", [1, 50])
def test_chunks_split_anywhere_lose_nothing(chat, server, size):
    text = "naïve ☃ 漢字 🙂 – “quoted”"
    server.script = [Answer([text[:7], text[7:12], text[12:]], slice_bytes=size)]
    chat.say("Hi")
    assert chat.turns()[-1] == ["assistant", text]
    assert chat.answer().locator(".facts").inner_text().startswith("3 tokens")


def test_a_server_killed_in_mid_answer_leaves_the_text_and_a_retry(chat, server):
    server.script = [Answer(["Half", " of", " it"], cut=2), Answer(["All of it"])]
    chat.say("Hi")
    assert chat.turns() == [["user", "Hi"], ["assistant", "Half of"]]
    chat.see("The connection was lost before the answer was complete.")
    chat.reload()  # the error is part of what is kept
    chat.button("Retry").click()
    chat.wait()
    assert chat.turns() == [["user", "Hi"], ["assistant", "All of it"]]
    assert roles(server) == ["user"]


def test_a_dead_server_then_retry(browser):
    with PageServer() as server:
        port = int(server.url.rsplit(":", 1)[1])
        with open_page(browser, server) as chat:
            chat.say("One")
            server.__exit__()
            chat.say("Two")
            chat.see("The server cannot be reached.")
            with PageServer(port=port) as revived:
                chat.button("Retry").click()
                chat.wait()
                assert chat.turns() == [["user", "One"], ["assistant", "Hello there."],
                                        ["user", "Two"], ["assistant", "Hello there."]]
                assert roles(revived) == ["user", "assistant", "user"]


def test_a_message_that_failed_stays_on_screen_and_is_not_sent_again(chat, server):
    server.script = [Answer(["A"]), Answer(status=400, message="a reason"), Answer(["B"])]
    chat.say("one")
    chat.say("two")
    chat.see("a reason")
    chat.say("three")
    assert [message["content"] for message in server.requests[-1][0]["messages"]] == ["one", "A", "three"]
    turns = [["user", "one"], ["assistant", "A"], ["user", "two"], ["assistant", ""], ["user", "three"],
             ["assistant", "B"]]
    assert chat.turns() == turns
    chat.reload()
    assert chat.turns() == turns


def test_a_message_refused_for_what_it_says_is_edited_not_repeated(chat, server):
    server.script = [Answer(status=400, message="messages.0.content: a reason"), Answer(["Fine"])]
    chat.say("one")
    chat.see("messages.0.content: a reason")
    assert chat.button("Retry").count() == 0
    chat.reload()
    assert chat.button("Retry").count() == 0
    chat.button("Edit message", chat.answer()).click()
    chat.page.get_by_role("textbox", name="Edit message").fill("two")
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert chat.turns() == [["user", "two"], ["assistant", "Fine"]]


FULL = Answer(status=400, code="context_length_exceeded", message="the newest message takes 300 tokens; 128 fit")


def test_a_message_longer_than_the_context_is_shortened(chat, server):
    server.script = [FULL]
    chat.say("one")
    chat.see("the newest message takes 300 tokens; 128 fit. Shorten it, or lower Max tokens in the settings.")
    assert chat.button("Edit message", chat.answer()).is_visible() and chat.button("Retry").count() == 0


def test_an_answer_that_the_context_has_no_room_to_go_on_with_leads_to_a_new_conversation(chat, server):
    server.script = [Answer(["A"], finish="length"), FULL]
    chat.say("one")
    chat.button("Continue").click()
    chat.see("The context is full.")
    assert chat.turns()[-1] == ["assistant", "A"]
    chat.button("New conversation", chat.answer()).click()
    assert chat.turns() == [] and chat.titles() == ["one"]


def test_an_answer_that_fills_the_context_leads_to_a_new_conversation(chat, server):
    server.script = [Answer(["A"], finish="length", prompt_tokens=2047)]
    chat.say("one")
    chat.see("The context is full.")
    chat.reload()
    chat.see("The context is full.")
    assert chat.button("Continue").count() == chat.button("Retry").count() == 0
    assert chat.button("New conversation", chat.answer()).is_visible()


def test_what_may_go_well_the_next_time_is_tried_again(chat, server):
    for answer in (Answer(status=500), Answer(status=404), Answer(error="broken"), Answer(["A"], cut=0)):
        server.script = [answer]
        chat.button("New conversation").click()
        chat.say("one")
        assert chat.answer().locator(".note.error").count() == 1
        chat.button("Retry", chat.answer()).click()
        chat.wait()
        assert chat.turns() == [["user", "one"], ["assistant", "Hello there."]]


def test_an_answer_whose_connection_was_lost_goes_on(chat, server):
    server.script = [Answer(["Half", " of it"], cut=1), Answer([" and all"])]
    chat.say("one")
    chat.button("Continue").click()
    chat.wait()
    assert chat.turns()[-1] == ["assistant", "Half and all"] and chat.answer().locator(".note").count() == 0


def test_stopping_before_the_first_word_does_not_leave_two_questions(chat, server):
    server.script = [Answer(["A"], hold=0), Answer(["B"])]
    chat.send("one")
    chat.button("Stop").click()
    chat.wait()
    chat.see("Stopped before the first word.")
    chat.say("two")
    assert roles(server) == ["user"] and chat.turns()[2:] == [["user", "two"], ["assistant", "B"]]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_or_loading_server_is_waited_for(chat, server, status):
    server.script = [Answer(status=status, headers=RETRY), Answer(["Now"])]
    chat.send("Hi")
    chat.see("scripted error. Trying again in 20 s.")
    chat.button("Try now").focus()
    chat.see("scripted error. Trying again in 19 s.")
    assert chat.page.evaluate("document.activeElement.textContent") == "Try now"  # the countdown leaves it alone
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert chat.turns() == [["user", "Hi"], ["assistant", "Now"]] and len(server.requests) == 2


def test_the_wait_is_as_long_as_the_server_says(chat, server):
    server.script = [Answer(status=429, headers={"Retry-After": "1"}), Answer(["Now"])]
    begin = time.monotonic()
    chat.say("Hi")
    assert 1 <= time.monotonic() - begin and chat.turns()[-1][1] == "Now"


def test_the_wait_can_be_stopped(chat, server):
    server.script = [Answer(status=429, headers=RETRY)]
    chat.send("Hi")
    chat.see("Trying again in")
    chat.page.keyboard.press("Escape")
    chat.wait()
    assert len(server.requests) == 1 and chat.button("Retry").is_visible()


def test_a_server_that_stays_busy_is_asked_six_times_and_then_by_hand(chat, server):
    server.script = [Answer(status=429, headers=RETRY)] * 6
    chat.send("Hi")
    for num_requests in range(1, 6):
        assert wait_for(lambda n=num_requests: len(server.requests) == n)
        assert wait_for(lambda: chat.page.evaluate("!!runsOf(current)[0].notice"))  # it has heard of the refusal
        chat.page.evaluate("runsOf(current)[0].waitUntil = 0")  # as "Try now" does
    chat.wait()
    assert len(server.requests) == 6
    chat.button("Retry").click()
    chat.wait()
    assert chat.turns() == [["user", "Hi"], ["assistant", "Hello there."]]


def test_a_key_is_asked_for_and_sent(browser, server):
    server.api_key = "secret"
    with open_page(browser, server) as chat:
        chat.page.fill("#key input", "wrong")
        chat.button("Continue").click()
        chat.page.wait_for_selector("#key[open]:has-text('refused')")
        chat.page.fill("#key input", "secret")
        chat.button("Continue").click()
        chat.page.wait_for_selector("#model:has(option[value=d4-sft])")
        chat.say("Hi")
        assert server.requests[0][1]["Authorization"] == "Bearer secret"
        chat.reload()
        chat.say("Again")
        assert "secret" not in chat.page.evaluate("JSON.stringify(localStorage)")
        server.api_key = "changed"
        chat.send("And now")
        chat.button("Cancel").click()
        chat.wait()
        chat.see("The server asks for another API key. Retry, and enter it.")


def test_an_error_inside_the_stream_keeps_what_came_before(chat, server):
    server.script = [Answer(["Some", " text"], error="the engine failed"), Answer(["Fine"])]
    chat.say("Hi")
    chat.see("The server ended the answer: the engine failed")
    assert chat.turns()[-1] == ["assistant", "Some text"]
    chat.say("Go on")
    assert roles(server) == ["user", "assistant", "user"]


def test_a_loading_server_is_asked_again_for_its_models(browser, server):
    server.models_status = 503
    with open_page(browser, server) as chat:
        chat.page.wait_for_selector("#model:has-text('Loading model')")
        server.models_status = 200
        chat.page.wait_for_selector("#model:has(option[value=d4-sft])")


def test_an_answer_goes_on_in_a_conversation_that_is_not_shown(chat, server):
    server.script = [Answer(["One", " two", " three"], hold=1), Answer(["Other"])]
    chat.send("first")
    chat.see("One")
    chat.button("New conversation").click()
    chat.say("second")
    assert chat.turns() == [["user", "second"], ["assistant", "Other"]]
    server.release.set()
    chat.button("first").click()
    chat.see("One two three")
    assert chat.turns() == [["user", "first"], ["assistant", "One two three"]]


# a storage of `limit` characters; the browser's own holds about 5 million
SMALL_STORAGE = """const put = Storage.prototype.setItem; Storage.prototype.setItem = function (key, value) {
    const used = Object.entries(localStorage).reduce((sum, [k, v]) => sum + (k === key ? 0 : v.length), 0);
    if (used + value.length > %d) throw new DOMException("full", "QuotaExceededError");
    put.call(this, key, value); };"""


@pytest.mark.parametrize("apart", [True, False])
def test_a_full_storage_gives_up_the_oldest_token_probabilities_first(browser, server, apart):
    server.default = Answer(["word "] * 20)
    with open_page(browser, server, init_script=SMALL_STORAGE % 8000) as chat:
        for text in ("one", "two", "three"):
            if apart:
                chat.button("New conversation").click()
            chat.say(text)
        chat.reload()
        answers = "[...chats.values()].flatMap(chat => chat.turns).filter(turn => turn.stats)"
        kept = chat.page.evaluate(answers + ".sort((a, b) => (a.id < b.id ? -1 : 1)).map(hasTokens)")
        assert kept[0] is False and kept[2] is True


def test_a_full_storage_is_told(browser, server):
    with open_page(browser, server, init_script=SMALL_STORAGE % 600) as chat:
        chat.say("x" * 700)
        chat.see("The browser's storage is full")
        assert chat.turns()[-1] == ["assistant", "Hello there."]


def test_damaged_conversations_and_settings_are_skipped(chat):
    chat.say("Hi")
    broken = {"nanochat.chat.a": "{", "nanochat.chat.b": json.dumps({"turns": [{}]}), "nanochat.chat.c": "null",
              "nanochat.settings": json.dumps({"system": None, "tokens": 1})}
    ends = (("prompt", "send", "user"), ("send", "prompt", "assistant"))
    turns = [{"id": one, "parent": other, "role": role, "parts": []} for one, other, role in ends]
    circle = {"id": "d", "title": "Circle", "leaf": "prompt", "updated": 0, "turns": turns}
    broken["nanochat.chat.d"] = json.dumps(circle)
    chat.page.evaluate("entries => Object.assign(localStorage, entries)", broken)
    chat.reload()
    assert chat.titles() == ["Hi", "Circle"]
    chat.button("Circle").click()
    chat.reload()  # the ids of its turns are those of the page's own elements
    assert len(chat.turns()) == 2 and chat.page.input_value("#prompt") == ""
    assert chat.page.evaluate("[settings.system, settings.tokens]") == ["", False]


@pytest.mark.parametrize("content", [
    "nonsense", {"role": "x"}, {"id": "a", "role": "user", "parts": [{"type": "weird", "text": "x"}]},
    {"id": "a", "role": "assistant", "parts": [{"text": "an answer to nothing"}]}])
def test_a_bad_import_is_named_and_changes_nothing(chat, content, tmp_path):
    chat.say("Hi")
    if isinstance(content, dict):
        content = json.dumps({"format": "nanochat.chats", "chats": [{"turns": [content]}]})
    (tmp_path / "bad.json").write_text(content, encoding="utf-8")
    chat.page.set_input_files("#import", tmp_path / "bad.json")
    chat.see("Could not import bad.json")
    assert chat.titles() == ["Hi"]


def test_turns_left_out_are_told(chat, server):
    server.script = [Answer(["Yes"], dropped=4)]
    chat.say("Still there?")
    chat.see("The context is full: the first 4 messages are no longer read.")
    chat.button("New conversation", chat.answer()).click()
    assert chat.turns() == []
