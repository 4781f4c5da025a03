"""The server's fields of sampling: each changes the text as OpenAI's and vLLM's servers have it, or is refused."""

import pytest
from starlette.testclient import TestClient

from nanochat.api_fields import UNSUPPORTED
from scripts.chat_web import create_app
from tests.servers import HELLO, URL, chat, tiny_service, wait_for


@pytest.fixture(scope="module")
def client(tokenizer):
    service = tiny_service(tokenizer, endless=True)
    with TestClient(create_app(service), base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        yield client


def text_of(client, **fields):
    response = chat(client, temperature=0, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [{"repetition_penalty": 1.5}, {"presence_penalty": 2}, {"frequency_penalty": 2},
                                    {"repeat_penalty": 1.5}])
def test_penalties_change_the_text(client, fields):
    fields |= {"max_tokens": 30}
    assert text_of(client, **fields) != text_of(client, max_tokens=30)


def test_a_penalty_has_one_name_at_a_time(client):
    assert text_of(client, repeat_penalty=1.5) == text_of(client, repetition_penalty=1.5)
    refused = chat(client, repeat_penalty=1.5, repetition_penalty=1.2)
    assert refused.status_code == 400 and "another name" in refused.json()["error"]["message"]


def test_a_bias_forces_and_bans_tokens(client, tokenizer):
    (token,) = tokenizer.encode("x")
    assert text_of(client, logit_bias={str(token): 100}) == "x" * HELLO["max_tokens"]
    most = tokenizer.get_vocab_size() - 1
    banned = {str(i): -100 for i in range(most) if i != token}
    assert text_of(client, logit_bias=banned) == "x" * HELLO["max_tokens"]


@pytest.mark.parametrize("fields, hint", [
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"), ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "99999 is not in the vocabulary"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, "2000 tokens, at most 1024"),
    ({"max_tokens": 0}, "-1 for as many as fit"), ({"max_tokens": -2}, "max_tokens"),
    ({"continue_final_message": True}, "continue_final_message"),
])
def test_values_that_cannot_be_are_refused_by_name(client, fields, hint):
    response = chat(client, **fields)
    assert response.status_code == 400 and hint in response.json()["error"]["message"]


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_would_change_the_text_and_is_not_there_is_refused(client, name):
    for body, path in [({**HELLO, name: 7}, "/v1/chat/completions"), ({"prompt": "a", name: 7}, "/v1/completions")]:
        response = client.post(path, json=body)
        assert response.status_code == 400 and f"{name} is not supported: " in response.json()["error"]["message"]


def test_max_tokens_of_minus_one_is_as_many_as_fit(client):
    body = chat(client, max_tokens=-1).json()
    assert body["usage"]["total_tokens"] == body["nanochat"]["max_context"]
    assert body["choices"][0]["finish_reason"] == "length"
    body = client.post("/v1/completions", json={"prompt": "the", "max_tokens": -1}).json()
    assert body["usage"]["total_tokens"] == body["nanochat"]["max_context"]


def test_a_seed_of_minus_one_is_drawn_and_said(client):
    bodies = [chat(client, seed=-1, temperature=2).json() for _ in range(2)]
    seeds = [body["nanochat"]["seed"] for body in bodies]
    assert seeds[0] != seeds[1] and min(seeds) >= 0
    again = chat(client, seed=seeds[0], temperature=2).json()
    assert again["choices"] == bodies[0]["choices"]


# -- what does not fit


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_a_message_that_does_not_fit_is_openai_s_error(client, system):
    long = [{"role": "user", "content": "word " * 500}]
    response = chat(client, messages=system + long)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] == "context_length_exceeded" and error["param"] == "messages"
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However, the newest message")
    assert ("system message" in error["message"]) == bool(system)


def test_a_prompt_that_does_not_fit_is_openai_s_error(client):
    response = client.post("/v1/completions", json={"prompt": [1] * 128})
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded" and error["param"] == "prompt"
    assert client.post("/v1/completions", json={"prompt": [1] * 127, "max_tokens": 1}).status_code == 200
