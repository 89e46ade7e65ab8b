"""Health, readiness, models, the OpenAPI page, and the log."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys

import anyio
import httpx
import pytest
from server_fakes import FakeEngine, running, settle

from ditrelay.runtime.placement import StageSeconds, advise
from ditrelay.runtime.server_args import ServerArgs


def get(address: str, engine: FakeEngine | None = None) -> httpx.Response:
    async def main() -> httpx.Response:
        async with running(engine or FakeEngine()) as client:
            return await client.get(address)

    return asyncio.run(main())


def test_no_request_waits_for_another_thread_of_the_frameworks(monkeypatch):
    """What is not async it calls on a thread, and a thread's turn costs a quarter of a millisecond, twice."""

    async def refuse(*what: object, **how: object) -> None:
        raise AssertionError(f"on a thread: {what}")

    async def main() -> None:
        async with running(FakeEngine()) as client:
            monkeypatch.setattr(anyio.to_thread, "run_sync", refuse)
            for address in ("/", "/health", "/ready", "/metrics", "/v1/models", "/v1/topology", "/v1/jobs"):
                assert (await client.get(address)).status_code == 200, address
            drawn = await client.post("/v1/images/generations", json={"prompt": "a cat", "response_format": "url"})
            assert (await client.get(drawn.json()["data"][0]["url"])).status_code == 200
            assert (await client.get("/v1/videos")).json()["error"]["code"] == "unsupported_model"

    asyncio.run(main())


def test_health_answers_while_the_model_loads_and_ready_follows_the_workers():
    async def main() -> None:
        engine = FakeEngine()
        async with running(engine, loaded=False) as client:
            assert (await client.get("/health")).json() == {"status": "ok"}
            loading = await client.get("/ready")
            assert loading.status_code == 503
            assert loading.json() == {
                "ready": False,
                "missing": {"dit": ["rank 0 is starting", "rank 1 is starting"], "non_dit": ["rank 2 is starting"]},
                "down": ["denoise", "encode", "decode"],
            }

            engine.loaded.set()
            await settle()
            up = await client.get("/ready")
            assert (up.status_code, up.json()) == (200, {"ready": True, "missing": {}, "down": []})

            engine.down[1] = "killed by signal 9"
            lost = await client.get("/ready")
            assert lost.status_code == 503
            assert lost.json()["missing"] == {"dit": ["rank 1 is down (killed by signal 9)"]}
            assert lost.json()["down"] == []  # the other replica serves
            assert (await client.get("/health")).status_code == 200

            del engine.down[1]
            assert (await client.get("/ready")).status_code == 200

    asyncio.run(main())


def test_ready_says_which_roles_nobody_has():
    async def main() -> list[list[str]]:
        engine = FakeEngine()
        async with running(engine) as client:
            answers = []
            for rank in (2, 0, 1):
                engine.down[rank] = "killed"
                answers.append((await client.get("/ready")).json()["down"])
            return answers

    assert asyncio.run(main()) == [["encode", "decode"], ["encode", "decode"], ["denoise", "encode", "decode"]]


def test_the_topology_shows_every_rank_and_edge():
    engine = FakeEngine()
    engine.down[1] = "killed by signal 9"
    page = get("/v1/topology", engine).json()
    up, lost, non_dit = page["ranks"]
    assert (up["rank"], up["role"], up["roles"], up["replica"]) == (0, "dit", ["denoise"], 0)
    assert (up["state"], up["pid"], up["generation"], up["pending_sends"], up["kept_bytes"]) == ("up", 1000, 0, 1, 70)
    assert (lost["state"], lost["pid"], lost["generation"]) == ("down", None, 2)
    assert lost["reason"] == "killed by signal 9"
    assert (non_dit["roles"], non_dit["replica"]) == (["encode", "decode"], None)
    assert page["edges"] == [
        {"source": 2, "target": 0, "up": True, "generation": 3, "used": 1, "window": 2, "nbytes": 500}
    ]
    assert page["requests"] == {"queued": 0, "running": 0, "done": 0, "failed": 0, "cancelled": 0}
    assert page["placement"] is None


def test_the_topology_says_whether_disaggregation_pays_off():
    seconds = StageSeconds(encode=0.5, denoise=2.0, decode=0.5, requests=12)
    engine = FakeEngine()
    engine.placement = advise(engine.topology, seconds, lock_step=False, ranks=(), cores=None)
    assert get("/v1/topology", engine).json()["placement"] == {
        "requests": 12,
        "encode_seconds": 0.5,
        "denoise_seconds": 2.0,
        "decode_seconds": 0.5,
        "options": [
            {"name": "2 DiT + 1 non-DiT", "requests_per_second": 1.0},
            {"name": "3 with all roles", "requests_per_second": 1.0},
        ],
        "text": engine.placement.text,
    }


def test_ready_names_the_engine_where_every_worker_is_up_but_not_warm():
    class Cold(FakeEngine):
        ready = False

    response = get("/ready", Cold())
    assert (response.status_code, response.json()["missing"]) == (503, {"engine": ["warming up"]})


def test_head_is_answered_as_get_without_the_body():
    """Download tools and load balancers ask by it."""

    async def main() -> None:
        engine = FakeEngine()
        async with running(engine) as client:
            drawn = await client.post("/v1/images/generations", json={"prompt": "a cat", "response_format": "url"})
            job = (await client.get("/v1/jobs")).json()["data"][0]["id"]
            addresses = ["/", "/health", "/ready", "/metrics", "/v1/models", "/v1/models/tiny", "/v1/topology"]
            addresses += [drawn.json()["data"][0]["url"], "/v1/images/none/content", "/v1/videos", f"/v1/jobs/{job}"]
            for address in [*addresses, f"/v1/jobs/{job}/events", "/playground/main.js", "/docs"]:
                by_get, by_head = await client.get(address), await client.head(address)
                assert by_head.status_code == by_get.status_code, address
                assert dict(by_head.headers) == dict(by_get.headers), address
            # It has no end; its head is all that is asked for.
            assert (await client.head("/v1/activity")).headers["content-type"].startswith("text/event-stream")
            engine.down[0] = "killed"
            assert (await client.head("/ready")).status_code == 503

    asyncio.run(main())


def test_the_engine_is_closed_at_the_end_also_while_it_starts():
    async def main(loaded: bool) -> bool:
        engine = FakeEngine()
        async with running(engine, loaded=loaded):
            pass
        return engine.closed

    assert asyncio.run(main(loaded=True))
    assert asyncio.run(main(loaded=False))


@pytest.mark.parametrize("name", ["tiny", "builtin:emoji", "black-forest-labs/FLUX.1-dev", "/models/mine"])
def test_the_served_model_is_listed_and_found_under_any_name(name):
    engine = FakeEngine(args=ServerArgs(served_model_name=name))
    [model] = get("/v1/models", engine).json()["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (name, "model", "ditrelay")
    assert get(f"/v1/models/{name}", FakeEngine(args=engine.args)).json()["id"] == name


def test_the_root_says_what_there_is():
    root = get("/").json()
    assert root["model"] == "tiny"
    assert {"POST /v1/images/edits", "POST /v1/jobs/{job_id}/cancel", "GET /health"} <= set(root["endpoints"])


def test_the_page_of_the_api_takes_nothing_from_other_sites():
    page = get("/docs")
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    named = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert "docs/swagger-ui-bundle.js" in named
    for address in named:
        assert not address.startswith(("/", "http")), address  # it may lie under a path
        assert get(f"/{address}").status_code == 200, address
    assert get("/docs/start.js").headers["content-type"].startswith("text/javascript")
    assert get("/docs/index.html").status_code == 404


def test_the_openapi_page_describes_what_is_really_sent():
    page = get("/openapi.json").json()
    post = page["paths"]["/v1/images/generations"]["post"]
    assert set(post["responses"]) == {"200", "202", "4XX", "5XX"}
    request = post["requestBody"]["content"]["application/json"]["schema"]
    answer = page["components"]["schemas"]["Picture"]
    assert request["additionalProperties"] is False
    assert request["required"] == ["prompt"]
    assert {"seed", "timings", "url", "b64_json"} == set(answer["properties"])
    assert "HTTPValidationError" not in page["components"]["schemas"]
    operations = [operation for path in page["paths"].values() for operation in path.items()]
    assert {method for method, _ in operations} == {"get", "post", "delete"}
    assert len({operation["operationId"] for _, operation in operations}) == len(operations)
    assert set(page["paths"]) == {
        "/v1/images/edits",
        "/v1/images/generations",
        "/v1/images/{file_id}/content",
        "/v1/videos",
        "/v1/videos/{video_id}",
        "/v1/videos/{video_id}/content",
        "/v1/videos/{video_id}/cancel",
        "/v1/jobs",
        "/v1/jobs/{job_id}",
        "/v1/jobs/{job_id}/events",
        "/v1/jobs/{job_id}/cancel",
        "/v1/activity",
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/topology",
        "/v1/ranks/{rank}/restart",
        "/health",
        "/ready",
        "/metrics",
    }


def test_each_request_is_one_log_line_whatever_its_path(caplog):
    with caplog.at_level(logging.INFO, logger="ditrelay"):
        get("/v1/a%0Ab")
        get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "ditrelay.server.middleware"]
    assert len(lines) == 1
    assert lines[0].startswith("GET /v1/a%0Ab -> 404 in ")


def test_the_log_line_of_a_long_path_is_short(caplog):
    with caplog.at_level(logging.INFO, logger="ditrelay"):
        get("/v1/" + "é" * 5_000)
    [line] = [record.getMessage() for record in caplog.records if record.name == "ditrelay.server.middleware"]
    assert line.startswith("GET /v1/%C3%A9") and "... -> 404 in " in line and len(line) < 2000


def test_the_server_starts_without_torch():
    heavy = "{'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    check = [sys.executable, "-c", f"import sys, ditrelay.server.app; sys.exit(bool({heavy}))"]
    assert subprocess.run(check, timeout=60).returncode == 0
