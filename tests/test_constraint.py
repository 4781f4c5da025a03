"""Constrained decoding: masks against an enumeration of all answers, and answers of a model with random weights."""

import json
import random
import sys

import pytest
from starlette.testclient import TestClient

from nanochat.api_messages import ANY_OBJECT
from nanochat.constraint import get_constraints
from scripts.chat_web import create_app
from tests.servers import HELLO, URL, chat, tiny_service, wait_for

needs_llguidance = pytest.mark.skipif("not __import__('importlib').util.find_spec('llguidance')",
                                      reason="llguidance is an optional dependency")
FACT = {"type": "object", "additionalProperties": False, "required": ["n", "ok"],
        "properties": {"n": {"type": "integer", "minimum": 7, "maximum": 1234}, "ok": {"enum": [True, False, "é漢"]}}}
FACTS = [json.dumps({"n": n, "ok": ok}, ensure_ascii=False) for n in range(7, 1235) for ok in (True, False, "é漢")]
ADD = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {
    "type": "object", "properties": {"a": {"$ref": "#/$defs/digit"}, "b": {"$ref": "#/$defs/digit"}},
    "required": ["a", "b"], "additionalProperties": False,
    "$defs": {"digit": {"type": "integer", "minimum": 0, "maximum": 9}}}}}
NOW = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def client(tokenizer):
    service = tiny_service(tokenizer, sequence_len=512)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


def format_of(schema):
    return {"type": "json_schema", "json_schema": {"name": "fact", "schema": schema, "strict": True}}


def events_of(response):
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines]


# -- masks


def allowed_by(constraint):
    return set((~constraint.banned()).nonzero()[0].tolist())


@needs_llguidance
def test_a_mask_allows_exactly_the_tokens_with_which_the_answer_can_go_on(tokenizer):
    """Numbers above all: our tokens hold at most two digits, and the answer may be cut anywhere."""
    answers = {fact.encode() for fact in FACTS}
    beginnings = {answer[:i] for answer in answers for i in range(len(answer) + 1)}
    stop = tokenizer.encode_special("<|assistant_end|>")
    make = get_constraints(tokenizer).make(FACT)
    rng = random.Random(0)
    for _ in range(10):
        constraint, text = make(), b""
        while True:
            expected = {i for i, token in enumerate(tokenizer.mergeable) if text + token in beginnings}
            assert constraint.complete == (text in answers)
            if constraint.complete:
                expected.add(stop)
            assert allowed_by(constraint) == expected, text
            token = rng.choice(sorted(expected))
            constraint.feed(token)
            if token == stop:
                break
            text += tokenizer.mergeable[token]
        assert text in answers


@needs_llguidance
@pytest.mark.parametrize("more, goes_on", [({}, False), ({"additionalProperties": True}, True)])
def test_only_named_properties_are_written_unless_the_schema_says_otherwise(tokenizer, more, goes_on):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], **more}
    constraint = get_constraints(tokenizer).make(schema)()
    for token in tokenizer.encode('{"a": 1'):
        constraint.feed(token)
    assert (tokenizer.encode(",")[0] in allowed_by(constraint)) == goes_on


@needs_llguidance
def test_no_special_token_is_part_of_a_text(tokenizer):
    constraint = get_constraints(tokenizer).make(ANY_OBJECT)()
    for token in tokenizer.encode('{"a": "<|'):
        constraint.feed(token)
    special = [tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()]
    assert not allowed_by(constraint) & set(special) and allowed_by(constraint) >= set(tokenizer.encode("b"))


@needs_llguidance
def test_after_what_cannot_be_only_the_end_is_left(tokenizer):
    constraint = get_constraints(tokenizer).make(FACT)()
    constraint.feed(tokenizer.encode("x")[0])
    assert allowed_by(constraint) == {tokenizer.encode_special("<|assistant_end|>")}
    assert not constraint.complete


# -- answers


@needs_llguidance
@pytest.mark.parametrize("seed", range(4))
def test_an_answer_follows_its_schema_whole_and_streamed(client, seed):
    fields = dict(response_format=format_of(FACT), seed=seed, temperature=2, max_tokens=200, n=2)
    whole = chat(client, **fields).json()
    assert {choice["message"]["content"] for choice in whole["choices"]} <= set(FACTS)
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"stop"}
    texts = ["", ""]
    for event in events_of(chat(client, **fields, stream=True)):
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == [choice["message"]["content"] for choice in whole["choices"]]


@needs_llguidance
def test_a_json_object_is_one_and_an_answer_that_is_cut_says_so(client):
    body = chat(client, response_format={"type": "json_object"}, max_tokens=20, temperature=2).json()
    text, reason = body["choices"][0]["message"]["content"], body["choices"][0]["finish_reason"]
    assert text.startswith("{") and (reason == "length" or isinstance(json.loads(text), dict))


@needs_llguidance
def test_a_request_without_a_format_is_answered_as_before(client):
    free = chat(client).json()["choices"]
    chat(client, response_format=format_of(FACT))
    assert chat(client, response_format={"type": "text"}, tools=[]).json()["choices"] == free


@needs_llguidance
@pytest.mark.parametrize("choice, names", [("required", {"add", "now"}), (
    {"type": "function", "function": {"name": "add"}}, {"add"})])
def test_a_function_is_called_with_arguments_of_its_schema(client, choice, names):
    seen = set()
    for seed in range(8):
        fields = dict(tools=[ADD, NOW], tool_choice=choice, seed=seed, temperature=2, max_tokens=100)
        (whole,) = chat(client, **fields).json()["choices"]
        (call,) = whole["message"]["tool_calls"]
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "add":
            assert set(arguments) == {"a", "b"} and all(value in range(10) for value in arguments.values())
        seen.add(call["function"]["name"])
        assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
        deltas = [c["delta"] for e in events_of(chat(client, **fields, stream=True)) for c in e["choices"]]
        (streamed,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]
        assert streamed["function"] == call["function"] and streamed["index"] == 0
    assert seen == names


@needs_llguidance
def test_with_a_free_choice_a_brace_begins_a_call_and_anything_else_a_text(client, tokenizer):
    brace = tokenizer.encode("{")[0]
    fields = dict(tools=[ADD], max_tokens=60, temperature=2)
    (text,) = chat(client, **fields, logit_bias={str(brace): -100}).json()["choices"]
    assert text["message"]["content"] and "tool_calls" not in text["message"]
    (call,) = chat(client, **fields, logit_bias={str(brace): 100}).json()["choices"]
    assert call["message"]["tool_calls"][0]["function"]["name"] == "add"


@needs_llguidance
def test_a_call_and_its_result_are_sent_back(client, tokenizer):
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [HELLO["messages"][0], {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "3"}]
    body = chat(client, messages=messages, tools=[ADD], tool_choice="none").json()
    assert body["choices"][0]["finish_reason"] in ("stop", "length")
    tokens = client.post("/tokenize", json={"messages": messages}).json()["tokens"]
    assert body["usage"]["prompt_tokens"] == len(tokens)  # with tool_choice none the functions are not told
    assert chat(client, messages=messages, tools=[ADD]).json()["usage"]["prompt_tokens"] > len(tokens)


# -- refusals


@needs_llguidance
@pytest.mark.parametrize("fields, hint", [
    ({"response_format": format_of({"type": "integer", "not": {"const": 1}})}, "cannot be followed"),
    ({"response_format": format_of({"type": "nothing"})}, "cannot be followed"),
    ({"response_format": {"type": "json_schema"}}, "needs the field json_schema"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [NOW, NOW]}, "same name"), ({"tool_choice": "required"}, "there are no tools"),
    ({"tools": [NOW], "tool_choice": {"type": "function", "function": {"name": "add"}}}, "which no tool has"),
])
def test_a_format_that_cannot_be_is_refused(client, fields, hint):
    response = chat(client, **fields)
    assert response.status_code == 400 and hint in response.json()["error"]["message"]


def test_without_the_package_the_refusal_says_what_to_install(client, monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as if it were not installed
    get_constraints.cache_clear()
    response = chat(client, response_format={"type": "json_object"})
    assert response.status_code == 400 and "pip install llguidance" in response.json()["error"]["message"]
    assert chat(client).status_code == 200
