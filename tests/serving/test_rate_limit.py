"""Rates by address: nobody gets more than the rate, who keeps to it is never refused, and no address costs another."""

import contextlib
import subprocess
import sys
from fractions import Fraction

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from jaxfed.cli.serve import DEFAULT_RATE, choose_rate
from jaxfed.export.bundle import export_run
from jaxfed.serving.app import make_app
from jaxfed.serving.engine import open_served
from jaxfed.serving.rate_limit import SECOND, RateLimit, find_bucket_address
from tests.export.test_export import MODELS, make_run
from tests.programs import run_program
from tests.serving.test_serving import free_port, wait_for
from tests.small import child_environment

RATES = st.sampled_from([0.01, 0.4, 1.0, 3.0, 7.5, 100.0, 12345.678])
REQUESTS = st.lists(st.tuples(st.floats(0, 3), st.integers(0, 3)), min_size=1, max_size=60)


def replay_requests(limit, rate, requests):
    """[(nanoseconds, address, wait)] of requests (tokens' time since the one before, address)."""
    now, seen = 10**15, []
    for gap, address in requests:
        now += int(gap * SECOND / rate)
        seen.append((now, address, limit.take(str(address), now)))
    return seen


@given(rate=RATES, requests=REQUESTS)
def test_in_no_window_does_an_address_get_more_than_the_rate_and_a_burst(rate, requests):
    limit = RateLimit(rate)
    seen = replay_requests(limit, rate, requests)
    for address in range(4):
        times = [now for now, who, wait in seen if who == address and not wait]
        for first, begin in enumerate(times):
            for last in range(first, len(times)):
                allowed = Fraction(rate) * Fraction(times[last] - begin, SECOND) + limit.burst
                assert last - first + 1 <= allowed


@given(rate=RATES, requests=REQUESTS)
def test_each_address_has_a_bucket_of_tokens_of_its_own(rate, requests):
    """Against a bucket that is filled bit by bit, in fractions, and knows of no other address."""
    limit = RateLimit(rate)
    tokens, before = {}, {}
    for now, address, wait in replay_requests(limit, rate, requests):
        gained = Fraction(now - before.get(address, now), limit.interval)
        tokens[address] = min(Fraction(limit.burst), tokens.get(address, limit.burst) + gained)
        before[address] = now
        assert (wait == 0) == (tokens[address] >= 1)
        if wait:
            assert wait == (1 - tokens[address]) * limit.interval  # it may go on then, and no sooner
        else:
            tokens[address] -= 1


@given(rate=RATES, count=st.integers(1, 200))
def test_who_keeps_to_the_rate_is_never_refused(rate, count):
    limit = RateLimit(rate)
    assert not any(limit.take("a", 5 + number * limit.interval) for number in range(count))


def test_memory_is_bounded_and_full_buckets_are_forgotten():
    limit = RateLimit(2.0, most=50)
    for number in range(1000):
        assert limit.take(str(number), number) == 0
        assert len(limit.full_at) <= 50
    limit.take("late", 1000 + 10 * SECOND)
    assert list(limit.full_at) == ["late"]


def test_an_empty_bucket_is_not_forgotten_while_there_is_room():
    limit = RateLimit(1.0, most=50)
    while not limit.take("greedy", 0):
        pass
    for number in range(49):
        limit.take(str(number), 1)
    assert limit.take("greedy", 2)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),  # one machine has a whole network of these
        ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("", "testclient", False),
    ],
)
def test_which_addresses_share_a_bucket(one, other, same):
    assert (find_bucket_address(one) == find_bucket_address(other)) is same


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """The folder of a small export."""
    root = tmp_path_factory.mktemp("rate")
    export_run(make_run(root / "run", **MODELS["mf"]), root / "out")
    return root / "out"


def test_an_address_that_asks_too_often_is_refused_and_no_other(export):
    app = make_app(open_served(export), rate=0.001)  # two tokens would take half an hour
    with TestClient(app, client=("10.0.0.1", 1)) as greedy:
        modest = TestClient(app, client=("10.0.0.2", 1))  # of the same server
        assert greedy.get("/items").status_code == 200
        refused = greedy.post("/similar", json={"item": "1"}, headers={"x-forwarded-for": "10.0.0.3"})
        assert refused.status_code == 429
        assert 990 <= int(refused.headers["retry-after"]) <= 1000
        assert refused.json().keys() == {"detail"}
        assert "\n" not in refused.json()["detail"]
        assert refused.headers["x-content-type-options"] == "nosniff"
        assert modest.get("/items").status_code == 200
        for _ in range(5):
            assert greedy.get("/health").status_code == 200
        assert 'jaxfed_requests_total{path="other",status="429"} 1.0' in greedy.get("/metrics").text


def test_without_a_rate_nobody_is_refused(export):
    with TestClient(make_app(open_served(export))) as client:
        assert {client.get("/items").status_code for _ in range(300)} == {200}


def test_the_description_names_it(export):
    with TestClient(make_app(open_served(export))) as client:
        paths = client.get("/openapi.json").json()["paths"]
    found = {path for path, methods in paths.items() for about in methods.values() if "429" in about["responses"]}
    assert found == {"/recommend", "/similar", "/items"}


def test_the_rate_where_none_is_given():
    assert choose_rate(None, local=True) == 0
    assert choose_rate(None, local=False) == DEFAULT_RATE
    assert [choose_rate(rate, local) for rate in (0.0, 5.0) for local in (True, False)] == [0, 0, 5, 5]


@pytest.mark.parametrize("rate", ["-1", "nan", "inf", "1e-300", "1e300"])
def test_a_rate_that_is_none_is_said_in_a_line(export, monkeypatch, capsys, rate):
    code, _, said = run_program(monkeypatch, capsys, "serve", export, f"--rate={rate}")
    assert (code, "--rate is" in said, said.count("\n")) == (2, True, 1)


@contextlib.contextmanager
def start_server(export, **environment):
    """A client of `jaxfed serve --rate 0.001`, as users run it."""
    port = free_port()
    command = [sys.executable, "-m", "jaxfed", "serve", str(export), "--port", str(port), "--rate", "0.001"]
    with subprocess.Popen(
        command, env={**child_environment(), **environment}, stderr=subprocess.DEVNULL
    ) as server, httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:  # fmt: skip
        wait_for(lambda: client.get("/health").status_code == 200)
        yield client
        server.terminate()


@pytest.mark.long
@pytest.mark.parametrize("trusted", ["", "127.0.0.1"])
def test_the_address_that_a_header_names_counts_only_where_it_is_trusted(export, trusted):
    with start_server(export, **({"FORWARDED_ALLOW_IPS": trusted} if trusted else {})) as client:
        answers = [
            client.get("/items", headers={"x-forwarded-for": f"10.0.0.{number}"}).status_code for number in (1, 2, 1)
        ]
        assert answers == ([200, 200, 429] if trusted else [200, 429, 429])
