"""The chat page with two models that are asked the same questions, side by side."""

import pytest
from page_driver import FIXTURES, Chat, open_page
from page_server import Answer

browser, server, _ = FIXTURES
TWO = {"d4-sft": {"stage": "sft"}, "d4-base": {"stage": "base"}, "d4-rl": {"stage": "rl"}}


@pytest.fixture
def chat(browser, server):
    """A page on which d4-sft is chosen, and d4-rl beside it."""
    server.models = TWO
    with open_page(browser, server) as chat:
        chat.page.select_option("#other", "d4-rl")
        yield chat


def contents(server, model):
    """What the model was sent, request by request."""
    bodies = [body for body, _ in server.requests if body["model"] == model]
    return [[message["content"] for message in body["messages"]] for body in bodies]


def places(chat):
    """[(left, top)] of the answers on screen."""
    boxes = [answer.bounding_box() for answer in chat.page.locator(".turn.assistant").all()]
    return [(box["x"], box["y"]) for box in boxes]


def test_a_question_goes_to_both_models_and_each_remembers_its_own_answers(chat, server):
    server.scripts = {"d4-sft": [Answer(["A1"]), Answer(["A2"])], "d4-rl": [Answer(["B1"]), Answer(["B2"])]}
    chat.say("One?")
    chat.say("Two?")
    turns = [["user", "One?"], ["assistant", "A1"], ["assistant", "B1"],
             ["user", "Two?"], ["assistant", "A2"], ["assistant", "B2"]]
    assert chat.turns() == turns
    assert contents(server, "d4-sft") == [["One?"], ["One?", "A1", "Two?"]]
    assert contents(server, "d4-rl") == [["One?"], ["One?", "B1", "Two?"]]
    assert chat.page.locator(".model").all_inner_texts() == ["d4-sft", "d4-rl"] * 2
    chat.reload()
    assert chat.turns() == turns and chat.page.input_value("#other") == "d4-rl"


def test_the_answers_are_side_by_side_and_on_a_phone_one_below_the_other(chat, server):
    chat.say("One?")
    (left, top), (other_left, other_top) = places(chat)
    assert left + 200 < other_left and top == other_top
    chat.page.set_viewport_size({"width": 390, "height": 800})
    (left, top), (other_left, other_top) = places(chat)
    assert left == other_left and top + 50 < other_top
    assert chat.page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_fault_of_one_model_is_its_own(chat, server):
    server.scripts = {"d4-sft": [Answer(["A1"]), Answer(["A2"])],
                      "d4-rl": [Answer(["B"], cut=0), Answer(status=400), Answer(["B3"])]}
    chat.say("One?")
    chat.see("The connection was lost")
    assert chat.turns() == [["user", "One?"], ["assistant", "A1"], ["assistant", ""]]
    chat.button("Retry").click()
    chat.wait()
    assert chat.turns() == [["user", "One?"], ["assistant", "A1"], ["assistant", ""]]
    assert len(contents(server, "d4-sft")) == 1
    chat.say("Two?")
    assert chat.turns()[3:] == [["user", "Two?"], ["assistant", "A2"], ["assistant", "B3"]]
    assert contents(server, "d4-rl")[-1] == ["Two?"]  # it never answered the first question


def test_one_answers_while_the_other_waits_and_stop_ends_both(chat, server):
    server.scripts = {"d4-sft": [Answer(["A", " more"], hold=1)], "d4-rl": [Answer(["B", " more"], hold=1)]}
    chat.send("One?")
    chat.page.locator(".turn.assistant p").nth(1).wait_for()
    chat.button("Stop").click()
    chat.wait()
    assert chat.turns() == [["user", "One?"], ["assistant", "A"], ["assistant", "B"]]
    assert chat.page.locator(".note", has_text="Stopped.").count() == 2


def test_the_second_models_answers_have_versions_and_go_on_by_themselves(chat, server):
    server.scripts = {"d4-sft": [Answer(["A"])], "d4-rl": [Answer(["B1"]), Answer(["B2"], finish="length"),
                                                           Answer([" and on"])]}
    chat.say("One?")
    second = Chat.answer(chat)
    chat.button("Regenerate", second).click()
    chat.wait()
    chat.button("Continue", second).click()
    chat.wait()
    assert chat.turns() == [["user", "One?"], ["assistant", "A"], ["assistant", "B2 and on"]]
    chat.button("Previous version").click()
    assert chat.turns()[1:] == [["assistant", "A"], ["assistant", "B1"]]
    chat.say("Two?")
    assert contents(server, "d4-rl")[-1] == ["One?", "B1", "Two?"]
    assert contents(server, "d4-sft") == [["One?"], ["One?", "A", "Two?"]]


def test_comparing_begins_and_ends_within_a_conversation(chat, server):
    chat.page.select_option("#other", "")
    server.scripts = {"d4-sft": [Answer(["A1"]), Answer(["A2"]), Answer(["A3"])], "d4-rl": [Answer(["B2"])]}
    chat.say("One?")
    chat.page.select_option("#other", "d4-rl")
    chat.say("Two?")
    chat.page.select_option("#other", "")
    chat.say("Three?")
    assert [text for _, text in chat.turns()] == ["One?", "A1", "Two?", "A2", "B2", "Three?", "A3"]
    assert contents(server, "d4-rl") == [["One?", "A1", "Two?"]]
    assert contents(server, "d4-sft")[-1] == ["One?", "A1", "Two?", "A2", "Three?"]
    chat.button("Regenerate", chat.page.locator(".turn.paired").last).click()
    chat.wait()
    assert contents(server, "d4-rl") == [["One?", "A1", "Two?"]] * 2  # also now by the model that gave it


def test_an_edited_question_is_asked_of_both(chat, server):
    chat.say("One?")
    chat.page.locator(".turn.user").hover()
    chat.button("Edit message").click()
    chat.page.get_by_role("textbox", name="Edit message").fill("Uno?")
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert contents(server, "d4-sft") == contents(server, "d4-rl") == [["One?"], ["Uno?"]]
    chat.button("Previous version").click()
    assert [text for _, text in chat.turns()] == ["One?", "Hello there.", "Hello there."]


def test_only_chat_models_can_be_compared(chat, server):
    assert chat.page.locator("#other option").all_inner_texts() == ["Compare", "+ d4-sft", "+ d4-rl"]
    chat.page.select_option("#model", "d4-base")
    assert not chat.page.locator("#other").is_visible()
    server.models = {"d4-sft": {"stage": "sft"}, "d4-base": {"stage": "base"}}
    chat.reload()
    chat.page.select_option("#model", "d4-sft")
    assert not chat.page.locator("#other").is_visible()
    chat.say("One?")
    assert chat.turns() == [["user", "One?"], ["assistant", "Hello there."]]


def test_a_comparison_is_exported_and_imported_whole(chat, server, tmp_path):
    server.scripts = {"d4-sft": [Answer(["A"])], "d4-rl": [Answer(["B"])]}
    chat.say("One?")
    before = chat.turns()
    chat.export_all(tmp_path / "chats.json")
    chat.page.evaluate("localStorage.clear()")
    chat.page.goto(server.url)
    chat.page.set_input_files("#import", tmp_path / "chats.json")
    chat.button("One?").click()
    assert chat.turns() == before
