"""Other people's clients against a real server on 127.0.0.1, where they are installed: their own errors are raised."""

import pytest

from tests.servers import MODEL, running_server, tiny_service, wait_for

LONG = "word " * 500


@pytest.fixture(scope="module")
def address(tokenizer):
    service = tiny_service(tokenizer)
    with running_server(service) as (address, _):
        assert wait_for(lambda: service.trouble is None)
        yield f"{address}/v1"


def test_langchain_knows_an_overflow_of_the_context(address):
    langchain_openai = pytest.importorskip("langchain_openai")
    from langchain_core.exceptions import ContextOverflowError
    for more in ({}, {"use_responses_api": True}):
        model = langchain_openai.ChatOpenAI(base_url=address, api_key="none", model=MODEL, max_retries=0, **more)
        with pytest.raises(ContextOverflowError):
            model.invoke(LONG)
        assert model.invoke("the light of the sun", max_tokens=8).content


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_knows_an_overflow_of_the_context(address, monkeypatch, stream):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it downloads a table of prices
    litellm = pytest.importorskip("litellm")
    fields = dict(model=f"openai/{MODEL}", api_base=address, api_key="none", num_retries=0, stream=stream)
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": LONG}], **fields)
    assert litellm.completion(messages=[{"role": "user", "content": "the light"}], max_tokens=8, **fields)
