"""The chat page with a base model, which goes on with a text in place and leads no conversation."""

from page_driver import FIXTURES
from page_server import Answer

browser, server, chat = FIXTURES


def pick_base(chat):
    chat.page.select_option("#model", "d4-base")
    return chat.page.get_by_role("textbox", name="Text")


def test_a_base_model_goes_on_with_a_text_in_place(chat, server):
    server.script = [Answer([" upon", " a", " time"], hold=2), Answer([" there was"], finish="length")]
    text = pick_base(chat)
    assert not chat.page.locator("#box").is_visible()
    text.fill("Once")
    chat.button("Go on").click()
    chat.wait_for_text("Once upon a")
    assert not text.is_editable()
    server.release.set()
    chat.button("Go on").wait_for()
    text.press("Control+Enter")
    chat.wait_for_text("Once upon a time there was")
    chat.button("Go on").wait_for()
    first, second = (body for body, _ in server.requests)
    assert first == {"model": "d4-base", "prompt": "Once", "stream": True, "stream_options": {"include_usage": True},
                     "temperature": 0.8, "top_k": 50, "top_p": 1, "max_tokens": 512,
                     "truncate_prompt_tokens": 2048 - 1 - 512}
    assert second["prompt"] == "Once upon a time"
    chat.reload()
    assert text.input_value() == "Once upon a time there was" and chat.titles() == []


def test_a_text_can_be_stopped_taken_back_and_begun_anew(chat, server):
    server.script = [Answer([" two", " three"], hold=1)]
    text = pick_base(chat)
    text.fill("One")
    chat.button("Go on").click()
    chat.wait_for_text("One two")
    chat.button("Stop").click()
    chat.button("Go on").wait_for()
    assert server.hung_up.wait(5) and text.input_value() == "One two"
    chat.button("Undo").click()
    assert text.input_value() == "One" and not chat.button("Undo").is_enabled()
    chat.button("Redo").click()
    assert text.input_value() == "One two"
    chat.button("New conversation").click()
    assert text.input_value() == ""
    chat.button("Undo").click()
    assert text.input_value() == "One two"


def test_a_text_that_fails_keeps_what_came_and_says_why(chat, server):
    server.script = [Answer([" two", " three"], cut=1), Answer(status=400, message="scripted refusal"), Answer([]),
                     Answer(status=429, headers={"Retry-After": "20"}), Answer([" three"])]
    text = pick_base(chat)
    text.fill("One")
    chat.button("Go on").click()
    chat.see("The connection was lost before the answer was complete.")
    assert text.input_value() == "One two"
    chat.button("Go on").click()
    chat.see("scripted refusal")
    chat.button("Go on").click()
    chat.see("for the model the text ends here")
    chat.button("Go on").click()
    chat.see("Trying again in 20 s.")
    chat.button("Try now").click()
    chat.wait_for_text("One two three")
    assert not chat.page.get_by_text("scripted refusal").is_visible()


def test_a_conversation_is_never_led_with_a_base_model(chat, server):
    chat.say("Hi")
    text = pick_base(chat)
    assert text.is_visible() and chat.turns() == []
    chat.button("Hi").click()
    assert chat.page.input_value("#model") == "d4-sft" and chat.turns()[0] == ["user", "Hi"]
    del server.models["d4-sft"]
    chat.reload()
    chat.say("And now?")
    chat.see("d4-base goes on with a text, it does not chat")
    assert len(server.requests) == 1


def test_beginnings_are_offered_while_there_is_no_text(chat, server):
    server.models["d4-base"] = {"stage": "base", "examples": ["Once upon a time", "The <b>capital</b>"]}
    server.script = [Answer([" there was"])]
    chat.reload()
    text = pick_base(chat)
    offered = chat.page.locator("#write .examples button")
    assert offered.all_inner_texts() == ["Once upon a time", "The <b>capital</b>"]
    text.fill("My")
    assert offered.count() == 0
    text.fill("")
    offered.first.click()
    chat.wait_for_text("Once upon a time there was")
    chat.button("Go on").wait_for()
    assert offered.count() == 0 and server.requests[0][0]["prompt"] == "Once upon a time"


def test_another_continuation_of_the_same_text(chat, server):
    server.script = [Answer([" two"]), Answer([" zwei"])]
    text = pick_base(chat)
    text.fill("One")
    assert not chat.button("Try another").is_enabled()
    chat.button("Go on").click()
    chat.wait_for_text("One two")
    chat.button("Try another").click()
    chat.wait_for_text("One zwei")
    chat.button("Go on").wait_for()
    assert [body["prompt"] for body, _ in server.requests] == ["One", "One"]
    chat.button("Undo").click()
    chat.button("Undo").click()
    assert text.input_value() == "One two"  # nothing that was written is lost
    text.press("End")
    text.press_sequentially("!")
    assert not chat.button("Try another").is_enabled()


def test_the_figures_of_a_continuation_are_told_and_the_text_is_copied(chat, server):
    server.script = [Answer([" a"] * 12, pace_s=0.02, finish="length")]
    text = pick_base(chat)
    text.fill("One")
    chat.button("Go on").click()
    chat.see("cut at the setting Max tokens")
    note = chat.page.locator("#write-note").inner_text()
    assert note.startswith("12 tokens · ") and "tok/s · first after" in note
    assert chat.page.locator("#meter").inner_text() == "112 of 2,048 tokens"  # the stand-in says 100 for any prompt
    chat.button("Copy text").click()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "One" + " a" * 12
