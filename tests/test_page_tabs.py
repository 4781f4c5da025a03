"""The chat page where things cross: two tabs, an edit or a title half typed, odd imports, a server that changed."""

import json

from page_driver import FIXTURES, Chat, open_page
from page_server import Answer

browser, server, chat = FIXTURES


def another_tab_writes(chat, **change):
    """What this tab sees when another one stores every conversation, with these fields changed."""
    chat.page.evaluate("""change => { for (const { id } of [...chats.values()]) {
        localStorage.setItem(CHAT + id, JSON.stringify({ ...readStored(CHAT + id), ...change }));
        dispatchEvent(new StorageEvent("storage", { key: CHAT + id })); } }""", change)


def test_two_tabs_on_one_conversation_keep_the_turns_of_both(chat, server):
    server.script = [Answer(["First", " half"], hold=1), Answer(["Other"])]
    chat.send("one")
    chat.see("First")
    other = Chat(chat.page.context.new_page())
    other.page.goto(chat.page.url)
    other.see("There is no answer.")
    other.say("two")
    server.release.set()
    chat.wait()
    texts = ["First half", "Other", "one", "two"]
    assert sorted(chat.page.evaluate("current.turns.map(textOf)")) == texts
    other.reload()
    assert sorted(other.page.evaluate("current.turns.filter(turn => !isEmpty(turn)).map(textOf)")) == texts


def test_a_retry_after_another_tab_wrote_removes_no_other_turn(chat, server):
    server.script = [Answer(status=500), Answer(["A"])]
    chat.say("one")
    chat.say("two")
    another_tab_writes(chat)
    chat.button("Retry").click()
    chat.wait()
    assert chat.turns() == [["user", "one"], ["assistant", "Hello there."]]
    chat.button("Previous version").click()
    assert chat.turns() == [["user", "one"], ["assistant", ""], ["user", "two"], ["assistant", "A"]]


def test_a_title_half_typed_outlives_what_another_tab_writes(chat):
    chat.say("old")
    chat.button("New conversation").click()
    chat.say("new")
    chat.button("old").hover()
    chat.button("Rename old").click()
    chat.page.keyboard.type("er")
    another_tab_writes(chat, title="moved", updated=1)
    chat.page.keyboard.type("!\n")
    assert sorted(chat.titles()) == ["moved", "older!"]


def test_an_edit_outlives_an_answer_and_the_delete_of_another_conversation(chat, server):
    chat.say("another")
    chat.button("New conversation").click()
    chat.say("Hi")
    chat.page.locator(".turn.user").hover()
    chat.button("Edit message").click()
    field = chat.page.get_by_role("textbox", name="Edit message")
    field.fill("Hi there")
    server.script = [Answer(["Going", " on"], hold=1)]
    chat.send("Go on")
    chat.see("Going")
    field.press("Enter")
    chat.button("another").hover()
    chat.button("Delete another").click()
    assert field.count() == 1 and field.input_value() == "Hi there"
    server.release.set()
    chat.wait()
    field.press("Enter")
    chat.wait()
    assert chat.turns()[0] == ["user", "Hi there"]


def test_the_search_field_of_a_closed_sidebar_is_reached(browser, server):
    with open_page(browser, server, reduced_motion="no-preference") as chat:  # the sidebar slides
        chat.button("Conversations").click()
        chat.page.locator("#search").wait_for(state="hidden")
        chat.page.keyboard.press("Control+k")
        assert chat.page.evaluate("document.activeElement.id") == "search"


def test_the_focus_stays_on_the_page(chat):
    focus = "document.activeElement.id"
    chat.say("Hi")
    chat.button("Regenerate").focus()
    chat.page.keyboard.press("Enter")
    chat.wait()
    assert chat.page.evaluate(focus) == "prompt"
    chat.button("Edit message").focus()
    chat.page.keyboard.press("Enter")
    chat.page.keyboard.press("Escape")
    assert chat.page.evaluate(focus) == "prompt"


def test_an_import_with_odd_values_leaves_a_page_that_works(chat, server, tmp_path):
    turns = [{"id": "u", "role": "user", "parts": [{"text": "Odd?"}]},
             {"id": "a", "role": "assistant", "parent": "u", "parts": [{"text": "Yes"}], "stats": {"rate": "5"}}]
    file = json.dumps({"format": "nanochat.chats", "chats": [{"id": "a b", "title": "Odd", "turns": turns}]})
    (tmp_path / "odd.json").write_text(file, encoding="utf-8")
    chat.page.set_input_files("#import", tmp_path / "odd.json")
    chat.see("Imported 1 of 1")
    chat.button("Odd").click()
    chat.reload()
    assert chat.turns() == [["user", "Odd?"], ["assistant", "Yes"]]
    chat.page.wait_for_selector("#model:has(option[value=d4-sft])", state="attached")


def test_a_key_given_with_a_message_lets_the_models_be_read_too(browser, server):
    server.api_key = "secret"
    with open_page(browser, server) as chat:
        chat.button("Cancel").click()
        chat.send("Hi")
        chat.page.fill("#key input", "пароль")  # no header can hold it
        chat.button("Continue").click()
        assert chat.page.locator("#key[open]").count() == 1
        chat.page.fill("#key input", "secret")
        chat.button("Continue").click()
        chat.page.wait_for_selector("#model:has(option[value=d4-sft])")


def test_a_server_restarted_with_another_model_is_asked_for_its_name(chat, server):
    server.models = {"d6-sft": {"stage": "sft"}}
    server.script = [Answer(status=404, message="The model 'd4-sft' is not served here")]
    chat.say("Hi")
    chat.page.wait_for_selector("#model:has(option[value=d6-sft])")
    chat.button("Retry").click()
    chat.wait()
    assert server.requests[-1][0]["model"] == "d6-sft" and chat.turns()[-1] == ["assistant", "Hello there."]


def test_more_turns_than_a_request_may_have(chat, server):
    chat.say("Hi")
    chat.page.evaluate("""() => { settings.system = "Be brief."; for (let i = 0; i < 1100; i += 1) {
        addTurn(current, current.leaf, "user", [{ type: "text", text: "again" }]);
        addTurn(current, current.leaf, "assistant", [{ type: "text", text: "yes" }]); } }""")
    chat.say("Last")
    roles = [message["role"] for message in server.requests[-1][0]["messages"]]
    assert len(roles) == 2000 and roles[:2] == ["system", "user"]


def test_a_long_row_of_openers_is_drawn_quickly(chat):
    draw = """text => { const begin = performance.now(); parseBlocks(text).map(drawBlock);
        return performance.now() - begin; }"""
    for opener in ("**a ", "*a ", "_a ", "~~a ", "[a ", "# ", "[a](", "` ``"):
        assert chat.page.evaluate(draw, opener * (100_000 // len(opener))) < 2000, opener  # ms
