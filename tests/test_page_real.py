"""The chat page on the real server, whose events, errors and headers the stand-in of the other page tests imitates."""

from types import SimpleNamespace

import pytest
from page_driver import open_browser, open_page

from nanochat.engine import Engine
from nanochat.scheduler import Scheduler
from nanochat.service import Service
from tests.servers import MODEL, QUESTION, TOOL_ANSWER, Scripted, running_server, tiny_service, tool_script, wait_for


@pytest.fixture(scope="module")
def browser():
    with open_browser() as browser:
        yield browser


def test_an_answer_streams_shows_its_tokens_is_found_again_and_goes_back_as_it_was_written(browser, tokenizer):
    script = tool_script(tokenizer)
    model = Scripted(script, tokenizer, hold=len(tokenizer.encode(TOOL_ANSWER[0]["text"])))
    service = Service(lambda i: {MODEL: Scheduler(Engine(model, tokenizer), 1, 32)}, [MODEL])
    with running_server(service) as (address, _), open_page(browser, SimpleNamespace(url=address)) as chat:
        chat.send(QUESTION["content"])
        chat.see("Let me add them:")
        assert chat.page.get_attribute("#thread", "aria-busy") == "true"  # the rest has not been said yet
        model.release.set()
        chat.wait()
        turns = [["user", "What is 2+3?"], ["assistant", "Let me add them:\n\n2+3 = 5\n\nIt is five."]]
        assert chat.turns() == turns
        assert chat.answer().locator(".facts").inner_text().startswith(f"{len(script)} tokens")

        chat.button("Tokens").click()
        written = [text for text in map(tokenizer.id_to_token, script) if not text.startswith("<|output_")]
        assert chat.answer().locator(".tokens > span").all_text_contents() == written
        assert chat.answer().locator(".tokens > .forced").all_text_contents() == ["5"]  # by the tool, not the model
        chat.button("Tokens").click()

        chat.reload()
        assert chat.titles() == ["What is 2+3?"] and chat.turns() == turns
        with chat.page.expect_request("**/v1/chat/completions") as asked:
            chat.say("Sure?")
        assert asked.value.post_data_json["messages"][:2] == [QUESTION, {"role": "assistant", "content": TOOL_ANSWER}]
        assert chat.turns()[2:] == [["user", "Sure?"], turns[1]]


def test_stopping_frees_the_row_and_a_refusal_is_told(browser, tokenizer):
    service = tiny_service(tokenizer, sequence_len=8192, endless=True, num_rows=1)
    with running_server(service) as (address, _), open_page(browser, SimpleNamespace(url=address)) as chat:
        chat.button("Settings").click()
        chat.page.fill("[name=max_tokens]", "8000")  # longer than a browser needs, also on a busy machine
        chat.page.keyboard.press("Escape")
        chat.send("Go on for ever")
        assert wait_for(lambda: chat.page.evaluate("runsOf(current)[0]?.turn.parts.length"))
        assert service.num_running() == 1
        chat.button("Stop").click()
        chat.wait()
        assert wait_for(lambda: service.num_running() == 0)
        chat.say("word " * 5000)
        chat.see("the newest message takes")


def scripted_service(tokenizer, *names):
    """Models whose every answer is TOOL_ANSWER."""
    script = tool_script(tokenizer)
    models = {name: Engine(Scripted(script, tokenizer), tokenizer) for name in names}
    service = Service(lambda i: {name: Scheduler(engine, 1, 64) for name, engine in models.items()}, names)
    service.about = {name: {"stage": name.split("-")[0], "examples": ["Who are you?"]} for name in names}
    return service


def test_an_answer_cut_by_max_tokens_goes_on_to_its_end(browser, tokenizer):
    service = scripted_service(tokenizer, MODEL)
    with running_server(service) as (address, _), open_page(browser, SimpleNamespace(url=address)) as chat:
        chat.button("Settings").click()
        chat.page.fill("[name=max_tokens]", "4")
        chat.page.keyboard.press("Escape")
        chat.say(QUESTION["content"])
        chat.see("Cut at the setting Max tokens.")
        assert "Let me add them:".startswith(chat.turns()[1][1])
        chat.page.evaluate("changeSettings({ max_tokens: 500 })")
        chat.button("Continue").click()
        chat.wait()
        assert chat.turns() == [
            ["user", "What is 2+3?"], ["assistant", "Let me add them:\n\n2+3 = 5\n\nIt is five."]]
        assert chat.page.evaluate("pathOf(current).at(-1).stats.finish") == "stop"


def test_two_models_answer_side_by_side(browser, tokenizer):
    service = scripted_service(tokenizer, "sft-tiny", "rl-tiny")
    with running_server(service) as (address, _), open_page(browser, SimpleNamespace(url=address)) as chat:
        chat.page.select_option("#other", "rl-tiny")
        chat.button("Who are you?").click()
        chat.wait()
        answer = "Let me add them:\n\n2+3 = 5\n\nIt is five."
        assert chat.turns() == [["user", "Who are you?"], ["assistant", answer], ["assistant", answer]]
        assert chat.page.locator(".model").all_inner_texts() == ["sft-tiny", "rl-tiny"]


def test_an_answer_that_fills_the_context_cannot_go_on(browser, tokenizer):
    service = tiny_service(tokenizer, sequence_len=128, endless=True, num_rows=1)
    with running_server(service) as (address, _), open_page(browser, SimpleNamespace(url=address)) as chat:
        chat.page.evaluate("changeSettings({ seed: 3 })")
        chat.say("the light of the sun")
        chat.see("The context is full.")
        assert chat.page.locator("#meter").inner_text() == "128 of 128 tokens"
        assert chat.button("Continue").count() == 0 and chat.button("New conversation", chat.answer()).is_visible()
        with chat.page.expect_response("**/v1/chat/completions") as refused:
            chat.page.evaluate("generate(current, pathOf(current).at(-1))")
        assert refused.value.json()["error"]["code"] == "context_length_exceeded"
        chat.wait()
        assert chat.answer().locator(".note.error").inner_text().startswith("The context is full.")
