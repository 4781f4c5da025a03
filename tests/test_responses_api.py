"""OpenAI's Responses API: what /v1/responses answers, whole and streamed."""

import json

import pytest
from starlette.testclient import TestClient

from scripts.chat_web import create_app
from tests.servers import HELLO, MODEL, URL, Scripted, chat, tiny_service, tool_script, wait_for
from tests.test_constraint import FACT, FACTS, needs_llguidance

ASK = {"input": HELLO["messages"][0]["content"], "seed": 3, "max_output_tokens": 8}
ADD = {"type": "function", "name": "add", "parameters": {
    "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}}


@pytest.fixture(scope="module")
def client(tokenizer):
    service = tiny_service(tokenizer, sequence_len=512)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


def ask(client, **fields):
    response = client.post("/v1/responses", json={**ASK, **fields})
    assert response.status_code == 200, response.text
    return response


def events_of(response):
    """The events of a stream, whose names are told twice."""
    events = []
    for block in response.text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            events.append(json.loads(data.removeprefix("data: ")))
            assert events[-1]["type"] == name.removeprefix("event: ")
    return events


def text_of(document):
    (item,) = document["output"]
    return item["content"][0]["text"]


def test_an_answer_is_that_of_a_chat(client):
    document, told = ask(client).json(), chat(client).json()
    assert text_of(document) == told["choices"][0]["message"]["content"] != ""
    assert document["object"] == "response" and document["model"] == MODEL
    assert document["nanochat"] == told["nanochat"]
    assert document["usage"]["input_tokens"] == told["usage"]["prompt_tokens"]
    assert document["usage"]["output_tokens"] == 8 and document["status"] == "incomplete"
    assert document["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_stream_says_what_the_whole_response_says(client):
    document, events = ask(client).json(), events_of(ask(client, stream=True))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events if "text.delta" not in event["type"]]
    assert kinds == ["created", "in_progress", "output_item.added", "content_part.added", "output_text.done",
                     "content_part.done", "output_item.done", "incomplete"]
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    last = events[-1]["response"]
    assert deltas == text_of(document) == text_of(last) and last["usage"] == document["usage"]
    assert events[-3]["part"]["text"] == deltas and "[DONE]" not in ask(client, stream=True).text


def test_a_conversation_is_that_of_the_messages(client):
    items = [{"role": "developer", "content": "Be brief."},
             {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "What is 2+3?"}]},
             {"type": "function_call", "call_id": "c", "name": "add", "arguments": '{"a": 2}'},
             {"type": "function_call_output", "call_id": "c", "output": "5"},
             {"role": "assistant", "content": [{"type": "output_text", "text": "Five", "annotations": []}]},
             {"role": "user", "content": "sure?"}]
    call = {"function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [{"role": "system", "content": "Speak."}, {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "What is 2+3?"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "5"}, {"role": "assistant", "content": "Five"},
                {"role": "user", "content": "sure?"}]
    document = ask(client, input=items, instructions="Speak.").json()
    told = chat(client, messages=messages).json()
    assert document["usage"]["input_tokens"] == told["usage"]["prompt_tokens"]
    assert text_of(document) == told["choices"][0]["message"]["content"]


def test_logprobs_are_told_where_asked_for(client):
    document = ask(client, include=["message.output_text.logprobs"], top_logprobs=2).json()
    entries = document["output"][0]["content"][0]["logprobs"]
    assert len(entries) == 8 and len(entries[0]["top_logprobs"]) == 2


def test_a_calculation_is_left_out_of_the_text(tokenizer):
    script = tool_script(tokenizer)
    service = tiny_service(tokenizer)
    service.batchers[0].load = scripted(service.batchers[0].load, script, tokenizer)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        for fields in ({}, {"stream": True}):
            response = ask(client, input="What is 2+3?", max_output_tokens=100, temperature=0, **fields)
            document = events_of(response)[-1]["response"] if fields else response.json()
            assert text_of(document) == "Let me add them: It is **five**." and document["status"] == "completed"


def scripted(load, script, tokenizer):
    """`load` of a service whose model writes the ids of a script."""
    from nanochat.engine import Engine
    from nanochat.scheduler import Scheduler
    return lambda: {MODEL: Scheduler(Engine(Scripted(script, tokenizer), tokenizer), 1, 32)}


@needs_llguidance
def test_a_text_format_is_followed(client):
    format = {"type": "json_schema", "name": "fact", "schema": FACT, "strict": True}
    document = ask(client, text={"format": format}, max_output_tokens=100, temperature=2).json()
    assert text_of(document) in FACTS and document["status"] == "completed"


@needs_llguidance
def test_a_call_is_an_item_whole_and_streamed(client):
    fields = dict(tools=[ADD], tool_choice="required", max_output_tokens=100)
    (item,) = ask(client, **fields).json()["output"]
    assert item["type"] == "function_call" and item["name"] == "add" and json.loads(item["arguments"])["a"] in (1, 2)
    events = events_of(ask(client, **fields, stream=True))
    kinds = [event["type"].removeprefix("response.") for event in events]
    assert kinds == ["created", "in_progress", "output_item.added", "function_call_arguments.delta",
                     "function_call_arguments.done", "output_item.done", "completed"]
    assert events[4]["arguments"] == events[5]["item"]["arguments"] == item["arguments"]


@needs_llguidance
def test_tools_that_are_no_functions_are_not_offered(client):
    """Coding agents send them in every request."""
    group = {"type": "namespace", "name": "agents", "tools": [ADD]}
    others = [{"type": "web_search"}, group, {"type": "custom", "name": "add"}]
    fields = dict(tool_choice="required", max_output_tokens=100)
    document = ask(client, tools=[*others, ADD], **fields).json()
    alone = ask(client, tools=[ADD], **fields).json()
    assert document["output"][0]["arguments"] == alone["output"][0]["arguments"]
    assert document["usage"] == alone["usage"]  # the prompt is the same
    assert [tool["name"] for tool in document["tools"]] == ["add"]
    assert text_of(ask(client, tools=others).json()) == text_of(ask(client).json())


@pytest.mark.parametrize("fields, hint", [
    ({"previous_response_id": "resp_1"}, "send the whole conversation as input"), ({"background": True}, "background"),
    ({"messages": HELLO["messages"]}, "use input"), ({"input": []}, "input"), ({"n": 2}, "n"),
    ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input.0"),
    ({"tools": [{"type": "web_search"}], "tool_choice": "required"}, "there are no tools"),
    ({"tools": [{"name": "add"}]}, "tools.0.type"),
    ({"text": {"format": {"type": "json_schema"}}}, "schema"),
    ({"tools": [ADD], "tool_choice": {"type": "function", "name": "sub"}}, "which no tool has"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"max_output_tokens": 0}, "max_output_tokens"),
])
def test_what_is_not_there_is_refused_by_name(client, fields, hint):
    response = client.post("/v1/responses", json={**ASK, **fields})
    assert response.status_code == 400 and hint in response.json()["error"]["message"]


def test_old_messages_are_left_out_only_if_the_request_allows_it(client):
    items = [{"role": role, "content": "word " * 80} for role in ("user", "assistant") * 5]
    items.append({"role": "user", "content": "hi"})
    refused = client.post("/v1/responses", json={**ASK, "input": items})
    error = refused.json()["error"]
    assert refused.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == "input"
    assert ask(client, input=items, truncation="auto").json()["nanochat"]["dropped_messages"] > 0
