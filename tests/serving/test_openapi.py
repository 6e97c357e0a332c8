"""Requests made of the server's own description, good and bad ones: none is an error of the server."""

import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core import NOT_SET

from jaxfed.export.bundle import export_run
from jaxfed.serving.app import make_app
from jaxfed.serving.engine import open_served
from tests.export.test_export import MODELS, make_run


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    root = tmp_path_factory.mktemp("openapi")
    export_run(make_run(root / "run", **MODELS["mf"]), root / "out", users=True)
    with TestClient(make_app(open_served(root / "out")), raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_no_request_is_an_error_of_the_server(client, mode):
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    seen = set()

    def check(case):
        body, headers = {}, {"content-type": "application/json", **(case.headers or {})}
        if case.body is not NOT_SET:
            body = {"content": case.body if isinstance(case.body, bytes) else json.dumps(case.body)}
        answer = client.request(case.method, case.formatted_path, params=case.query, headers=headers, **body)
        seen.add((case.formatted_path, answer.status_code))
        assert answer.status_code < 500

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not {"parameters", "requestBody"} & operation.definition.raw.keys():
            continue  # it takes nothing that could be wrong
        strategy = operation.as_strategy(generation_mode=mode)
        settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))(given(strategy)(check))()
    assert ("/recommend", 422) in seen
    assert len({path for path, _ in seen}) >= (3 if mode is GenerationMode.NEGATIVE else 5)
