"""The API key, on every route that there is."""

from __future__ import annotations

import pytest
from starlette.testclient import TestClient
from tests.server.conftest import FakeLLM, wait_for

from shoal.server.app import Policy, create_app
from shoal.server.keys import Keys
from shoal.server.page.routes import OPEN_PATHS
from shoal.server.service import Service
from shoal.server.worker import EngineWorker

KEY = "sk-gehe1m-ü"


@pytest.fixture
def client() -> TestClient:
    worker = EngineWorker(FakeLLM)  # type: ignore[arg-type]
    return TestClient(
        create_app(Service(name="fake", worker=worker), Policy(keys=Keys(["sk-other-key", KEY]))),
        base_url="http://127.0.0.1",
    )


def test_every_route_but_health_asks_for_the_key(client: TestClient) -> None:
    routes = [(route.path, method) for route in client.app.routes for method in route.methods]  # type: ignore[attr-defined]
    assert len(routes) >= 6
    with client:
        wait_for(lambda: client.get("/health").status_code == 200)
        for path, method in routes:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}".encode()}):
                response = client.request(method, path.replace("{name:path}", "fake"), headers=headers)
                if path == "/health" or path in OPEN_PATHS:
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, (path, method)
                if method != "HEAD":
                    assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("//v1/models", "/V1/models", "/v1/models?api_key=" + KEY, "/nowhere", "/health/"):
            assert client.get(path).status_code == 401


def test_the_key_opens(client: TestClient) -> None:
    with client:
        for scheme in ("Bearer", "bearer"):
            response = client.get("/v1/models", headers={"authorization": f"{scheme} {KEY}".encode()})
            assert response.status_code == 200


def test_hosts_of_a_loopback_server(client: TestClient) -> None:
    with client:
        for host, expected in (
            ("localhost", 401),
            ("LOCALHOST:8000", 401),
            ("[::1]:8000", 401),
            ("127.0.0.1.evil.example", 403),
            ("evil.example", 403),
            ("", 403),
            ("[", 403),
        ):
            assert client.get("/v1/models", headers={"host": host}).status_code == expected, host


def test_an_open_server_answers_to_any_name() -> None:
    app = create_app(Service(name="fake", worker=EngineWorker(FakeLLM)), Policy(hosts=None))  # type: ignore[arg-type]
    with TestClient(app, base_url="http://box.example") as client:
        assert client.get("/version").status_code == 200
