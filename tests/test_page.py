"""The chat page in a real browser, against the stand-in server of page_server.py. Faults are in test_page_faults.py."""

import json
import math

from page_driver import FIXTURES, open_page
from page_server import Answer, demo_answer, token_odds

browser, server, chat = FIXTURES


def test_an_answer_is_shown_while_it_streams(chat, server):
    server.script = [Answer(["Once", " upon", " a", " time"], hold=2)]
    chat.send("Tell me a story")
    chat.see("Once upon")
    assert chat.turns() == [["user", "Tell me a story"], ["assistant", "Once upon"]]
    server.release.set()
    chat.wait()
    assert chat.turns()[-1] == ["assistant", "Once upon a time"]


def test_the_request_carries_the_conversation_and_the_settings(chat, server):
    chat.button("Settings").click()
    for name, value in {"system": "Be brief.", "temperature": "0.5", "top_k": "7", "top_p": "0.9", "max_tokens": "33",
                        "seed": "5"}.items():
        chat.page.fill(f"#settings [name={name}]", value)
    chat.page.keyboard.press("Escape")
    chat.say("One")
    chat.say("Two")
    body, _ = server.requests[-1]
    assert body == {
        "model": "d4-sft", "stream": True, "stream_options": {"include_usage": True},
        "logprobs": True, "top_logprobs": 5, "temperature": 0.5, "top_k": 7, "top_p": 0.9, "max_tokens": 33, "seed": 5,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "One"},
                     {"role": "assistant", "content": "Hello there."}, {"role": "user", "content": "Two"}]}


def test_settings_last_and_reset(chat, server):
    chat.button("Settings").click()
    chat.page.fill("[name=temperature]", "1.5")
    chat.page.fill("[name=top_k]", "-3")  # out of range: not taken
    chat.reload()
    assert chat.page.evaluate("[settings.temperature, settings.top_k]") == [1.5, 50]
    chat.button("Settings").click()
    chat.button("Reset settings").click()
    assert chat.page.input_value("[name=temperature]") == "0.8"
    chat.page.fill("[name=top_k]", "0")
    chat.page.keyboard.press("Escape")
    chat.say("Hi")
    assert server.requests[0][0]["top_k"] == -1 and "seed" not in server.requests[0][0]


def test_the_model_that_is_picked_is_asked(chat, server):
    server.models["d4-rl"] = {"stage": "rl"}
    chat.reload()
    chat.page.select_option("#model", "d4-rl")
    chat.say("Hi")
    chat.reload()
    chat.say("Again")
    assert [body["model"] for body, _ in server.requests] == ["d4-rl", "d4-rl"]


def test_the_examples_are_those_of_the_model_six_at_most(chat, server):
    examples = chat.page.locator("#empty .examples button")
    assert examples.count() == 0  # nobody knows what this model answers
    server.models["d4-rl"] = {"stage": "rl", "examples": ["One?", "<b>Two</b>?", "Three?", *"45678"]}
    chat.reload()
    chat.page.select_option("#model", "d4-rl")
    assert examples.all_inner_texts() == ["One?", "<b>Two</b>?", "Three?", "4", "5", "6"]
    chat.button("Three?").click()
    chat.wait()
    assert chat.turns() == [["user", "Three?"], ["assistant", "Hello there."]]


def test_stop_keeps_the_text_and_hangs_up(chat, server):
    server.script = [Answer(["One", " two", " three"], hold=2)]
    chat.send("Count")
    chat.see("One two")
    chat.page.keyboard.press("Escape")
    chat.wait()
    assert server.hung_up.wait(5)
    assert chat.turns() == [["user", "Count"], ["assistant", "One two"]]
    chat.say("Go on")
    assert [m["content"] for m in server.requests[-1][0]["messages"]] == ["Count", "One two", "Go on"]


def test_regenerate_keeps_both_versions(chat, server):
    server.script = [Answer(["First"]), Answer(["Second"]), Answer(["Third"])]
    chat.say("Hi")
    chat.button("Regenerate").click()
    chat.see("2/2")
    assert chat.turns() == [["user", "Hi"], ["assistant", "Second"]]
    assert server.requests[0][0]["messages"] == server.requests[1][0]["messages"]
    chat.button("Previous version").click()
    assert chat.turns() == [["user", "Hi"], ["assistant", "First"]]
    chat.say("And?")
    assert [m["content"] for m in server.requests[-1][0]["messages"]] == ["Hi", "First", "And?"]


def test_edit_makes_a_version_that_leaves_the_old_one_whole(chat, server):
    server.script = [Answer(["A"]), Answer(["B"]), Answer(["C"])]
    chat.say("one")
    chat.say("two")
    chat.page.locator(".turn.user").first.hover()
    chat.button("Edit message", chat.page.locator(".turn.user").first).click()
    chat.page.get_by_role("textbox", name="Edit message").fill("ONE")
    chat.page.keyboard.press("Enter")
    chat.see("2/2")
    chat.wait()
    assert chat.turns() == [["user", "ONE"], ["assistant", "C"]]
    chat.button("Previous version").click()
    assert chat.turns() == [["user", "one"], ["assistant", "A"], ["user", "two"], ["assistant", "B"]]
    assert "undefined" not in chat.page.inner_text("#app")


def test_a_reload_finds_the_conversation_and_the_draft_again(chat, server):
    server.script = [demo_answer()]
    chat.say("How many r?")
    before = chat.turns()
    chat.page.fill("#prompt", "And how many")
    chat.reload()
    assert chat.turns() == before
    assert chat.titles() == ["How many r?"] and chat.page.input_value("#prompt") == "And how many"


def test_conversations_are_listed_searched_renamed_and_deleted(chat, server):
    for text in ("About cats", "About dogs"):
        chat.button("New conversation").click()
        chat.say(text)
    assert chat.titles() == ["About dogs", "About cats"]
    chat.page.fill("#search", "cat")
    assert chat.titles() == ["About cats"]
    chat.page.fill("#search", "")
    chat.button("Rename About dogs").click()
    chat.page.get_by_role("textbox", name="Title").fill("Hounds")
    chat.page.keyboard.press("Enter")
    assert chat.titles() == ["Hounds", "About cats"]
    chat.button("Delete Hounds").click()
    assert chat.titles() == ["About cats"] and chat.turns() == []
    chat.button("Undo").click()
    chat.reload()
    assert chat.titles() == ["Hounds", "About cats"] and chat.turns()[0] == ["user", "About dogs"]


def test_export_and_import_round_trip(chat, server, tmp_path):
    server.script = [demo_answer(), Answer(["Second"])]
    chat.say("How many r?")
    chat.button("Regenerate").click()
    chat.wait()
    stored = chat.page.evaluate("JSON.stringify([...chats.values()].map(cleanChat))")
    chat.export_all(tmp_path / "chats.json")
    chat.page.evaluate("localStorage.clear()")
    chat.page.goto(server.url)
    assert chat.titles() == []
    chat.page.set_input_files("#import", tmp_path / "chats.json")
    chat.see("Imported 1 of 1")
    assert chat.page.evaluate("JSON.stringify([...chats.values()].map(cleanChat))") == stored
    chat.page.set_input_files("#import", tmp_path / "chats.json")
    chat.see("Imported 0 of 1")
    assert len(chat.titles()) == 1


def test_what_is_typed_and_answered_stays_text(chat, server):
    nasty = "<script>window.owned = 1</script><img src=x onerror='window.owned = 1'> <|assistant_start|> &amp;"
    server.script = [Answer([nasty, " [a](javascript:alert(1)) [b](data:text/html,x) [c](https://example.org/)"])]
    chat.say(nasty)
    assert [text for _, text in chat.turns()] == [nasty, nasty + " [a](javascript:alert(1)) [b](data:text/html,x) c"]
    assert server.requests[0][0]["messages"] == [{"role": "user", "content": nasty}]
    assert chat.page.evaluate("window.owned") is None
    assert chat.page.evaluate("[...document.querySelectorAll('.md a')].map(a => [a.href, a.rel])") == [
        ["https://example.org/", "noopener noreferrer nofollow"]]


def test_markdown_becomes_elements(chat, server):
    server.script = [demo_answer()]
    chat.say("How many r?")
    counts = {"h5": 1, "ol > li": 2, "ol ul > li": 2, "table tr": 4, "td[style*=right]": 3, "blockquote p": 1, "a": 1,
              "strong": 4, "em": 1, ".code pre": 1, "p code": 1}
    assert {css: chat.answer().locator(f".md {css}").count() for css in counts} == counts
    chat.button("Copy code").click()
    assert chat.page.evaluate("navigator.clipboard.readText()").startswith('def count(word, letter):\n    # one pass')
    chat.button("Copy message", chat.answer()).click()
    assert "### How it was counted\n\n1. Spell" in chat.page.evaluate("navigator.clipboard.readText()")


def test_a_tool_call_is_a_block_that_opens_and_goes_back_as_parts(chat, server):
    parts = [("python", "'strawberry'.count('r')"), ("python_output", "3")]
    server.script = [Answer(["Let me see.", *parts, "Three."])]
    chat.say("How many r?")
    tool = chat.answer().locator("details.tool")
    assert tool.locator("summary").inner_text() == "'strawberry'.count('r') = 3"
    assert not tool.locator("dl").is_visible()
    tool.locator("summary").click()
    assert tool.locator("pre").all_inner_texts() == ["'strawberry'.count('r')", "3"]
    chat.say("Sure?")
    assert server.requests[-1][0]["messages"][1]["content"] == [
        {"type": kind, "text": text} for kind, text in [("text", "Let me see."), *parts, ("text", "Three.")]]


def test_token_view_tints_each_token_and_names_the_others(chat, server):
    pieces = ["The", " capital", " is", " Paris", ".\n"]
    server.script = [Answer(pieces)]
    chat.say("Where?")
    chat.button("Tokens").click()
    spans = chat.answer().locator(".tokens > span")
    assert [text.replace("⏎", "") for text in spans.all_text_contents()] == pieces
    doubts = [float(spans.nth(i).evaluate("e => e.style.getPropertyValue('--doubt')")) for i in range(len(pieces))]
    logprobs = [token_odds(piece)[0] for piece in pieces]
    assert sorted(range(5), key=lambda i: doubts[i]) == sorted(range(5), key=lambda i: -logprobs[i])
    spans.nth(3).hover()
    cells = chat.page.locator("#tip td").all_inner_texts()  # token, bar, percentage
    shown = [(cells[i], round(float(cells[i + 2].strip("<%")))) for i in range(0, 15, 3)]
    odds = [(token, round(100 * math.exp(logprob))) for token, logprob in token_odds(" Paris")[1]]
    assert shown == [(token.replace(" ", "␣").replace("\n", "⏎"), p) for token, p in odds]
    spans.nth(0).click()
    chat.page.keyboard.press("ArrowRight")
    assert chat.page.evaluate("document.activeElement.textContent") == " capital"


def test_figures_of_an_answer_and_the_context_meter(chat, server):
    server.script = [Answer(["a"] * 12, pace_s=0.05, finish="length", prompt_tokens=500)]
    chat.say("Hi")
    facts = chat.answer().locator(".facts").inner_text()
    assert facts.startswith("12 tokens · ") and "tok/s · first after" in facts
    rate = chat.page.evaluate("pathOf(current).at(-1).stats.rate")
    assert 5 < rate < 55  # 11 gaps of at least 50 ms; the first token may be read late, when the machine is busy
    assert chat.page.locator("#meter").inner_text() == "512 of 2,048 tokens"


def test_an_answer_cut_by_its_length_goes_on_as_one_message(chat, server):
    server.script = [Answer(["One,", " two"], finish="length"), Answer([" three,"], finish="length"),
                     Answer([" four."])]
    chat.say("Count")
    for _ in range(2):
        chat.see("Cut at the setting Max tokens.")
        chat.button("Continue").click()
        chat.wait()
    assert chat.turns() == [["user", "Count"], ["assistant", "One, two three, four."]]
    assert chat.button("Continue").count() == 0
    bodies = [body for body, _ in server.requests]
    assert [[message["content"] for message in body["messages"]] for body in bodies] == [
        ["Count"], ["Count", "One, two"], ["Count", "One, two three,"]]
    assert bodies[1]["messages"][1]["role"] == "assistant"
    assert [body["max_tokens"] for body in bodies] == [512, 512, 512]  # a quarter of 2,048 is as much
    assert chat.answer().locator(".facts").inner_text().startswith("4 tokens")
    chat.button("Tokens").click()
    assert chat.answer().locator(".tokens > span").all_text_contents() == ["One,", " two", " three,", " four."]
    chat.reload()
    assert chat.turns()[1][0] == "assistant" and len(chat.turns()) == 2


def test_a_stopped_answer_goes_on_until_a_question_follows(chat, server):
    server.script = [Answer(["One", " two"], hold=1), Answer([" three"], hold=0)]
    chat.send("Count")
    chat.see("One")
    chat.page.keyboard.press("Escape")
    chat.wait()
    chat.button("Continue").click()
    chat.button("Stop").click()
    chat.wait()
    assert chat.turns()[-1] == ["assistant", "One"] and chat.button("Continue").is_visible()
    chat.say("Next?")
    assert chat.button("Continue").count() == 0


def test_enter_that_confirms_a_word_of_an_input_method_does_not_send(chat, server):
    press = """options => $("#prompt").dispatchEvent(new KeyboardEvent("keydown",
        { key: "Enter", bubbles: true, cancelable: true, ...options }))"""
    chat.page.fill("#prompt", "かんじ")
    chat.page.evaluate(press, {"isComposing": True})
    chat.page.evaluate(press, {"isComposing": False, "keyCode": 229})  # as WebKit does
    assert chat.turns() == [] and chat.page.input_value("#prompt") == "かんじ"
    chat.page.evaluate(press, {"keyCode": 13})
    chat.wait()
    assert chat.turns()[0] == ["user", "かんじ"] and len(server.requests) == 1


def test_escape_of_an_input_method_does_not_stop_an_answer(chat, server):
    server.script = [Answer(["One", " two"], hold=1)]
    chat.send("Count")
    chat.see("One")
    chat.page.evaluate("""$("#prompt").dispatchEvent(new KeyboardEvent("keydown",
        { key: "Escape", bubbles: true, keyCode: 229 }))""")
    server.release.set()
    chat.wait()
    assert chat.turns()[-1] == ["assistant", "One two"]


def test_shortcuts(chat, server):
    page = chat.page
    page.keyboard.type("first\n")
    chat.wait()
    page.keyboard.press("Control+Shift+O")
    assert chat.turns() == []
    page.locator("#search").focus()
    page.keyboard.press("Control+k")
    assert page.evaluate("document.activeElement.id") == "search"
    page.locator("#toggle-side").focus()
    page.keyboard.press("/")
    page.keyboard.type("a")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("b")
    page.keyboard.press("Enter")
    chat.wait()
    assert [body["messages"][0]["content"] for body, _ in server.requests] == ["first", "a\nb"]


def test_every_control_has_a_name_and_the_thread_is_a_log(chat, server):
    chat.say("Hi")
    unnamed = chat.page.evaluate("""[...document.querySelectorAll("button, input, textarea, select, summary")]
        .filter(e => !(e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label")))
        .map(e => e.outerHTML)""")
    assert unnamed == []
    assert chat.page.get_by_role("log", name="Conversation").get_attribute("aria-live") == "polite"


def test_a_narrow_window_has_no_sideways_scroll_and_a_sidebar_on_top(browser, server):
    server.script = [demo_answer()]
    phone = {"viewport": {"width": 360, "height": 640}, "has_touch": True, "is_mobile": True}
    with open_page(browser, server, **phone) as chat:
        chat.say("How many r? " + "x" * 200)
        chat.button("Tokens").click()
        assert chat.page.evaluate("document.documentElement.scrollWidth") == 360
        assert chat.page.evaluate("[$('#scroll').scrollWidth - $('#scroll').clientWidth, innerWidth]") == [0, 360]
        assert chat.page.evaluate("parseFloat(getComputedStyle($('#prompt')).fontSize)") >= 16
        assert chat.page.locator("#side").evaluate("e => e.inert && e.getBoundingClientRect().right <= 0")
        chat.button("Conversations").tap()
        chat.button("New conversation").tap()
        assert chat.turns() == [] and chat.page.locator("#side").evaluate("e => e.inert")


def test_the_page_is_served_with_its_nonce_everywhere(chat):
    assert chat.page.evaluate("[...document.querySelectorAll('style, script')].every(e => e.nonce.length > 10)")
    assert "__NONCE__" not in json.dumps(chat.page.content())
