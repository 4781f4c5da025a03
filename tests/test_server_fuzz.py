"""Requests made up from the server's own OpenAPI schema, valid and broken ones: none may end in a 5xx."""

import collections
import os

import pytest
from starlette.testclient import TestClient

from scripts.chat_web import create_app
from tests.servers import URL, tiny_service, wait_for

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is a development dependency")
hypothesis = pytest.importorskip("hypothesis")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 20))  # of each mode, for each operation


@pytest.mark.parametrize("num_examples", [5, pytest.param(EXAMPLES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda mode: mode.value)
def test_no_request_of_any_kind_is_a_5xx(tokenizer, mode, num_examples):
    service, seen = tiny_service(tokenizer, sequence_len=32), collections.Counter()
    app = create_app(service)

    def fuzz(client, operation):
        @hypothesis.settings(max_examples=num_examples, deadline=None, database=None, derandomize=True,
                             suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate])
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            request = case.as_transport_kwargs(base_url=URL)
            request.pop("cookies", None)
            response = client.request(**request)
            seen[response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        send()

    with TestClient(app, base_url=URL) as client:
        assert wait_for(lambda: service.trouble is None)
        for operation in schemathesis.openapi.from_dict(app.openapi()).get_all_operations():
            if operation.ok().definition.raw.get("requestBody") or mode == schemathesis.GenerationMode.POSITIVE:
                fuzz(client, operation.ok())
    print(dict(seen))
    assert seen[400] and sum(seen.values()) >= 3 * num_examples
