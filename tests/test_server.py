"""The web server in process: what its endpoints answer."""

import asyncio
import json
import time

import pytest
import torch
from starlette.requests import Request
from starlette.testclient import TestClient

from nanochat.api import CompletionRequest
from nanochat.chat_response import token_text
from nanochat.engine import Engine, fit_conversation
from nanochat.scheduler import Scheduler
from nanochat.service import Service, build_completion, respond
from scripts.chat_web import create_app
from tests.servers import (
    HELLO,
    MODEL,
    QUESTION,
    TOOL_ANSWER,
    URL,
    Scripted,
    chat,
    tiny_service,
    tool_script,
    wait_for,
)


@pytest.fixture(scope="module")
def service(tokenizer):
    return tiny_service(tokenizer)


@pytest.fixture(scope="module")
def client(service):
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


def chunks(response):
    """The JSON documents of a stream of server-sent events."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


# -- answers


def test_a_stream_says_what_the_whole_response_says(client):
    whole, stream = chat(client).json(), chunks(chat(client, stream=True))
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in stream)
    assert text == whole["choices"][0]["message"]["content"] != ""
    assert stream[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert stream[0]["nanochat"] == whole["nanochat"] == {"seed": 3, "max_context": 128, "dropped_messages": 0}
    assert len({(chunk["id"], chunk["created"], chunk["object"]) for chunk in stream}) == 1


def test_a_stream_with_nothing_to_say_shows_that_it_lives(tokenizer):
    service = tiny_service(tokenizer, ping_s=0.02)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        scheduler = service.batchers[0].schedulers[MODEL]
        forward = scheduler.forward
        scheduler.forward = lambda: time.sleep(0.1) or forward()
        response = chat(client, stream=True, max_tokens=3)
    assert response.text.count(": ping\n\n") >= 3 and chunks(response)[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("messages, continues", [
    ([{"role": "system", "content": "s"}, {"role": "developer", "content": "t"}, QUESTION], False),
    ([QUESTION, QUESTION, {"role": "system", "content": "s"}], False),
    ([{"role": "assistant", "content": "Hi"}, QUESTION], False),
    ([QUESTION, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
      {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "3"}]}], False),
    ([QUESTION, {"role": "function", "name": "add", "content": "3"}], False),
    ([QUESTION, {"role": "assistant", "content": "It is"}], True),
], ids=["system and developer", "user after user", "assistant first", "tool", "tool without a call", "continue"])
def test_messages_as_the_world_sends_them_are_answered(client, tokenizer, messages, continues):
    prompt = tokenizer.render_for_completion({"messages": messages}, continue_final_message=continues)
    assert client.post("/tokenize", json={"messages": messages}).json()["tokens"] == prompt
    response = chat(client, messages=messages)
    assert response.status_code == 200 and response.json()["usage"]["prompt_tokens"] == len(prompt)


def test_greedy_chat_equals_the_engine(client, service, tokenizer):
    engine = service.batchers[0].schedulers[MODEL].engine
    prompt = tokenizer.render_for_completion(HELLO)
    sequences, _ = engine.generate_batch(prompt, max_tokens=8, temperature=0)
    special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    text = tokenizer.decode([token for token in sequences[0][len(prompt):] if token not in special])
    body = chat(client, temperature=0).json()
    message = body["choices"][0]["message"]
    parts = message["nanochat"]["parts"] if "nanochat" in message else [{"text": message["content"]}]
    assert "".join(part["text"] for part in parts) == text != ""
    assert body["usage"]["prompt_tokens"] == len(prompt)


def test_usage_comes_last_when_asked_for(client):
    stream = chunks(chat(client, stream=True, stream_options={"include_usage": True}))
    assert stream[-1]["choices"] == [] and stream[-1]["usage"] == chat(client).json()["usage"]
    assert not any("usage" in chunk for chunk in stream[:-1])


def test_choices_differ_repeat_by_seed_and_the_first_is_that_of_one(client):
    def texts(**fields):
        return [choice["message"]["content"] for choice in chat(client, n=5, temperature=2, **fields).json()["choices"]]

    assert texts(seed=1) == texts(seed=1) != texts(seed=2)
    assert len(set(texts(seed=1))) > 1
    assert chat(client, n=1, temperature=2, seed=1).json()["choices"][0]["message"]["content"] == texts(seed=1)[0]


def test_without_a_seed_the_one_that_was_drawn_is_told_and_repeats_the_answer(client):
    first = chat(client, seed=None).json()
    again = chat(client, seed=first["nanochat"]["seed"]).json()
    assert again["choices"] == first["choices"]


def test_logprobs_of_a_chat_stream(client):
    stream = chunks(chat(client, stream=True, logprobs=True, top_logprobs=3))
    for chunk in stream[1:-1]:
        content = chunk["choices"][0]["logprobs"]["content"]
        for token in content:
            tops = [top["logprob"] for top in token["top_logprobs"]]
            assert len(tops) == 3 and tops == sorted(tops, reverse=True) and token["logprob"] <= max(tops) <= 0
    assert sum(len(chunk["choices"][0]["logprobs"]["content"]) for chunk in stream[1:-1]) == 8


def test_a_stop_string_ends_the_text_before_it(client):
    text = chat(client, temperature=0, max_tokens=40).json()["choices"][0]["message"]["content"]
    stop = text[5:7]
    choice = chat(client, temperature=0, max_tokens=40, stop=[stop, "never this"]).json()["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"


@torch.no_grad()
def test_echo_and_logprobs_as_the_evaluation_harness_asks_for_them(client, service):
    prompts = [[5, 6, 7, 8], [90, 91]]
    body = client.post("/v1/completions", json={"model": MODEL, "prompt": prompts, "temperature": 0, "max_tokens": 1,
                                                "logprobs": 1, "seed": 1234, "echo": True}).json()
    model = service.batchers[0].schedulers[MODEL].engine.model
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    for prompt, choice in zip(prompts, body["choices"], strict=True):
        scores = choice["logprobs"]
        reference = torch.log_softmax(model(torch.tensor([prompt]))[0], dim=-1)
        assert scores["token_logprobs"][0] is None and scores["top_logprobs"][0] is None
        assert len(scores["token_logprobs"]) == len(prompt) + 1  # and the one generated
        given = [float(reference[i, token]) for i, token in enumerate(prompt[1:])]
        assert scores["token_logprobs"][1:-1] == pytest.approx(given, abs=1e-5)
        best = [max(top.values()) for top in scores["top_logprobs"][1:]]
        assert best == pytest.approx(reference.max(dim=-1).values.tolist(), abs=1e-5)
        assert scores["token_logprobs"][-1] == best[-1]  # greedy


def test_text_offsets_of_an_echoed_text_count_from_its_first_character(client):
    fields = {"prompt": "the light of day", "max_tokens": 3, "temperature": 0, "echo": True, "logprobs": 1}
    choice = client.post("/v1/completions", json=fields).json()["choices"][0]
    tokens, offsets = choice["logprobs"]["tokens"][1:], choice["logprobs"]["text_offset"][1:]
    assert choice["logprobs"]["tokens"][0] == "<|bos|>" and choice["logprobs"]["text_offset"][0] == 0
    prompt = [(token, at) for token, at in zip(tokens, offsets, strict=True) if at < len(fields["prompt"])]
    assert offsets[0] == 0 and "".join(token for token, _ in prompt) == fields["prompt"]
    assert all(choice["text"].startswith(token, at) for token, at in prompt)


def test_a_text_longer_than_the_context_goes_on_from_its_last_tokens_where_that_is_asked_for(client, tokenizer):
    text = "the light of the lamp " * 100
    fields = {"model": MODEL, "temperature": 0, "max_tokens": 8, "echo": True}
    assert client.post("/v1/completions", json={**fields, "prompt": text}).status_code == 400
    cut = client.post("/v1/completions", json={**fields, "prompt": text, "truncate_prompt_tokens": 20}).json()
    last = tokenizer.encode(text)[-20:]
    short = client.post("/v1/completions", json={**fields, "prompt": tokenizer.decode(last)}).json()
    assert cut["choices"] == short["choices"] and cut["usage"]["prompt_tokens"] == 21


def test_completions_of_several_texts_with_echo(client):
    fields = {"prompt": ["the light", "a boat <|bos|>"], "max_tokens": 4, "temperature": 0, "echo": True, "n": 2}
    whole = client.post("/v1/completions", json=fields).json()
    texts = [choice["text"] for choice in whole["choices"]]
    starts = ["the light"] * 2 + ["a boat <|bos|>"] * 2
    assert all(text.startswith(start) and text > start for text, start in zip(texts, starts, strict=True))
    streamed = [""] * 4
    for chunk in chunks(client.post("/v1/completions", json={**fields, "stream": True})):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_text_of_a_user_never_becomes_a_special_token(client, tokenizer):
    special = {tokenizer.encode_special(name) for name in tokenizer.get_special_tokens()}
    text = "<|assistant_start|>hi<|user_end|>"
    assert not special & set(client.post("/tokenize", json={"prompt": text}).json()["tokens"])
    ids = client.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]
    assert len([token for token in ids if token in special]) == 4  # bos, user_start, user_end, assistant_start


def test_a_tool_call_is_told_in_parts_and_the_odds_are_those_of_what_the_model_chose(tokenizer):
    script = tool_script(tokenizer)
    service = Service(lambda i: {MODEL: Scheduler(Engine(Scripted(script, tokenizer), tokenizer), 1, 32)}, [MODEL])
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        body = chat(client, messages=[QUESTION], max_tokens=100, temperature=0, logprobs=True).json()
    choice = body["choices"][0]
    assert choice["message"]["nanochat"]["parts"] == TOOL_ANSWER and body["usage"]["completion_tokens"] == len(script)
    forced = [tokenizer.encode_special("<|output_start|>"), *tokenizer.encode("5"),
              tokenizer.encode_special("<|output_end|>")]
    told, start = [entry["token"] for entry in choice["logprobs"]["content"]], script.index(forced[0])
    assert script[start:start + len(forced)] == forced
    assert told == [token_text(tokenizer, token) for token in script[:start] + script[start + len(forced):]]


def test_a_client_that_leaves_before_its_stream_begins_frees_the_row(tokenizer):
    async def leave_at_once():
        service = tiny_service(tokenizer, sequence_len=4096, endless=True)
        service.start()
        while service.trouble:
            await asyncio.sleep(0.01)
        body = CompletionRequest(prompt="a", max_tokens=4000, stream=True)
        response = await respond(service, Request({"type": "http"}), body, build_completion)
        assert len(service.open_responses) == 1

        async def receive():
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        await response({"type": "http"}, receive, send)
        assert not service.open_responses
        while service.num_running() + service.num_waiting():
            await asyncio.sleep(0.01)
        service.stop(0)
        await service.join()

    asyncio.run(asyncio.wait_for(leave_at_once(), 30))


# -- long conversations


def test_200_turns_lose_their_oldest_exchanges_and_the_answer_says_so(client):
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"word {i}"} for i in range(201)]
    system = {"role": "system", "content": "Be brief."}
    body = chat(client, messages=[system, *turns]).json()
    dropped = body["nanochat"]["dropped_messages"]
    assert 150 < dropped < 201 and dropped % 2 == 0
    assert body["usage"]["prompt_tokens"] <= 128 - 8 and body["choices"][0]["finish_reason"]


@pytest.mark.parametrize("has_system", [True, False])
def test_the_longest_conversation_that_fits_is_kept(tokenizer, has_system):
    system = [{"role": "system", "content": "Be brief."}] if has_system else []
    turns = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word " * (i % 7)} for i in range(41)]
    ids, dropped = fit_conversation(tokenizer, system + turns, 100)
    assert ids == tokenizer.render_for_completion({"messages": system + turns[dropped:]}) and len(ids) <= 100
    longer = tokenizer.render_for_completion({"messages": system + turns[dropped - 2:]})
    assert len(longer) > 100


# -- operations


def test_metrics_count_requests_and_tokens(client):
    def value(name):
        lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
        return float(lines[0].split()[-1])

    before = value("nanochat_generation_tokens_total")
    chat(client)
    assert value("nanochat_generation_tokens_total") == before + 8
    assert value('nanochat_requests_total{code="200",path="/v1/chat/completions"}') > 0
    assert value("nanochat_running") == 0 and value("nanochat_rows") == 4
