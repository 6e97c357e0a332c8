"""Recommendations over HTTP: what is answered is what the run recommends, and no question brings the server down."""

import asyncio
import concurrent.futures
import json
import re
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxfed.cli.serve import open_socket
from jaxfed.export.bundle import export_run
from jaxfed.serving import app as http
from jaxfed.serving import batching
from jaxfed.serving.app import make_app
from jaxfed.serving.engine import Question, RefusedQuestionError, answer_questions, find_similar, open_served
from jaxfed.training.best_model import open_best_model
from tests.export.test_export import MODELS, expected_items, make_run
from tests.small import child_environment


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """served(model) -> (run, export, the server's client), each made once."""
    made, clients = {}, []

    def find(name):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            run = make_run(root / "run", **MODELS[name])
            export_run(run, root / "out", users=True)
            client = TestClient(make_app(open_served(root / "out")), raise_server_exceptions=False)
            client.__enter__()
            clients.append(client)
            made[name] = run, root / "out", client
        return made[name]

    yield find
    for client in clients:
        client.__exit__(None, None, None)


def ask(client, path="/recommend", **body):
    """(status, answer) of a question."""
    answer = client.post(path, json=body)
    return answer.status_code, answer.json()


def post(client, content, path="/recommend"):
    """The answer to bytes that say they are JSON."""
    return client.post(path, content=content, headers={"content-type": "application/json"})


def user_names(run):
    parts, _, _ = open_best_model(run)
    return [str(name) for name in parts.data.population.asked.user_names]


@pytest.mark.parametrize("name", ["mf", "sasrec", "ease"])
def test_users_are_recommended_what_the_run_recommends(served, name):
    run, _, client = served(name)
    for user in user_names(run)[:10]:
        status, answer = ask(client, user=user, k=7)
        assert status == 200
        best, scores = expected_items(run, user, 7)
        assert [item["id"] for item in answer["items"]] == best
        np.testing.assert_allclose([item["score"] for item in answer["items"]], scores, rtol=1e-5, atol=2e-6)


def test_a_device_that_sends_its_own_part_gets_what_the_server_would_find_with_it(served):
    run, out, client = served("mf")
    with np.load(out / "users.npz") as users:
        found = dict(users)
    for number, user in enumerate(found["ids"][:5]):
        private = {
            name.partition(":")[2]: leaf[found["client"][number]].tolist()
            for name, leaf in found.items()
            if name.startswith("private:")
        }
        parts, _, _ = open_best_model(run)
        past = found["history"][found["start"][number] : found["start"][number + 1]]
        history = [str(parts.data.source.items[item]) for item in past]
        status, answer = ask(client, private=private, history=history, k=5)
        assert status == 200
        assert answer["items"] == ask(client, user=str(user), k=5)[1]["items"]


def test_items_of_the_history_and_excluded_ones_are_not_recommended(served):
    _, _, client = served("sasrec")
    _, first = ask(client, history=["3", "5"], k=10)
    ids = [item["id"] for item in first["items"]]
    assert not {"3", "5"} & set(ids)
    _, second = ask(client, history=["3", "5"], k=9, exclude=ids[:1])
    assert [item["id"] for item in second["items"]] == ids[1:]


def test_the_order_of_a_history_counts_for_a_model_that_reads_it(served):
    _, _, client = served("sasrec")
    scores = [
        [item["score"] for item in ask(client, history=some, k=20)[1]["items"]] for some in (["3", "5"], ["5", "3"])
    ]
    assert scores[0] != scores[1]


def test_why(served):
    _, out, client = served("sasrec")
    _, answer = ask(client, history=["3", "5", "7", "9"], k=3, explain=True)
    vectors = open_served(out).vectors
    ids = open_served(out).export.item_numbers
    for item in answer["items"]:
        assert len(item["why"]) == 3
        cosines = [float(vectors[ids[item["id"]]] @ vectors[ids[near]]) for near in ("3", "5", "7", "9")]
        assert item["why"][0]["score"] == pytest.approx(max(cosines), abs=1e-5)
        assert [near["score"] for near in item["why"]] == sorted((near["score"] for near in item["why"]), reverse=True)


@pytest.mark.parametrize("name", ["mf", "ease"])
def test_similar(served, name):
    _, out, client = served(name)
    status, answer = ask(client, "/similar", item="4", k=6)
    assert status == 200
    found = [item["id"] for item in answer["items"]]
    assert len(found) == 6
    assert "4" not in found
    if name == "mf":
        opened = open_served(out)
        cosines = opened.vectors @ opened.vectors[opened.export.item_numbers["4"]]
        cosines[opened.export.item_numbers["4"]] = -np.inf
        assert found == [opened.export.items[i] for i in np.argsort(-cosines, kind="stable")[:6]]


def test_an_index_finds_what_its_manifest_says(served, tmp_path):
    """The share of the nearest items that it finds, measured again; an item is not like itself."""
    run, out, _ = served("mf")
    manifest = export_run(run, tmp_path / "out", index=True)
    opened, exact = open_served(tmp_path / "out"), open_served(out)
    assert opened.index is not None
    share = []
    for item in range(manifest["num_items"]):
        found, cosines = find_similar(opened, item, 9)
        nearest, _ = find_similar(exact, item, 9)
        assert item not in found
        assert cosines == sorted(cosines, reverse=True)
        share.append(len(set(found) & set(nearest)) / len(nearest))
    assert np.mean(share) >= manifest["index"]["recall@10"] - 0.05  # nine of ten, as the item itself is left out
    with pytest.raises(ValueError, match="no vector"):
        export_run(served("ease")[0], tmp_path / "ease", index=True)


def test_questions_of_all_kinds_and_numbers_are_answered_as_each_alone(served):
    """Batches are padded, and kinds are told apart: no answer depends on its neighbours."""
    _, out, _ = served("mf")
    opened = open_served(out)
    random = np.random.default_rng(0)
    questions = []
    for number in range(71):
        history = random.choice(50, random.integers(0, 9), replace=False).tolist()
        questions.append(Question(history, [], number=number % 30 if number % 3 else -1))
    together = answer_questions(opened, questions)
    for question, (items, scores) in zip(questions, together, strict=True):
        alone, values = answer_questions(opened, [question])[0]
        np.testing.assert_array_equal(items, alone)
        np.testing.assert_allclose(scores, values, rtol=1e-5, atol=1e-6)  # of another size of batch


# --- bad input ----------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"user": "nobody"}, 404, "no user"),
        ({"history": ["none"]}, 404, "no item"),
        ({"history": ["1"], "exclude": ["none"]}, 404, "no item"),
        ({"history": ["1"], "k": 0}, 422, ""),
        ({"history": ["1"], "k": 10**30}, 422, ""),
        ({"history": ["1"], "k": 101}, 422, "at most"),
        ({}, 422, "who it is for"),
        ({"user": "1", "history": ["1"]}, 422, "who it is for"),
        ({"history": "1"}, 422, ""),
        ({"history": ["1"] * 5000}, 422, ""),
        ({"history": ["1"], "more": 1}, 422, ""),
        ({"history": ["x" * 300]}, 422, ""),
        ({"private": {}}, 422, "its parts are"),
        ({"private": {"private/user": "words"}}, 422, "no array"),
        ({"private": {"private/user": [[1, 2]]}}, 422, "numbers up to"),
        ({"private": {"private/user": [[1, 2, 3, 1e39]]}}, 422, "numbers up to"),
        ({"private": {"private/user": [[1, 2, 3, 3e38]]}}, 422, "numbers up to"),
        ({"private": {"private/user": [[1, 2, 3, "\ud800"]]}}, 422, ""),
        ({"history": ["1"], "times": [1, 2]}, 422, "times"),
    ],
)
def test_bad_questions(served, body, status, says):
    _, _, client = served("mf")
    answer = post(client, json.dumps(body))
    assert answer.status_code == status
    assert says in json.dumps(answer.json())
    assert client.get("/health").json()["status"] == "ok"


def test_a_near_item_is_hinted_at_and_no_user(served):
    """Ids of users may be addresses: nothing says which there are."""
    run, _, client = served("mf")
    assert "did you mean '1'" in ask(client, history=["1 "])[1]["detail"]
    user = user_names(run)[0]
    assert "did you mean" not in ask(client, user=user + "x")[1]["detail"]


def test_ids_that_are_numbers_are_taken_for_words(served):
    _, _, client = served("mf")
    assert ask(client, history=[1, 2])[1] == ask(client, history=["1", "2"])[1]


def test_a_name_that_is_not_this_machines_is_refused(served):
    """What a page elsewhere could ask through a browser (DNS rebinding)."""
    app = make_app(open_served(served("mf")[1]), hosts=("127.0.0.1",))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        assert client.get("/health").status_code == 200
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400


def test_malformed_json_and_large_bodies(served):
    _, _, client = served("mf")
    assert post(client, b'{"history": ["1"').status_code == 422
    assert post(client, b"\xff\xfe").status_code in (400, 422)
    assert post(client, b"[" * 200_000).status_code in (400, 422)
    assert post(client, b" " * (http.LARGEST_BODY + 1)).status_code == 413

    def parts():
        for _ in range(40):
            yield b" " * (http.LARGEST_BODY // 20)

    assert post(client, parts()).status_code == 413
    assert ask(client, history=["1"])[0] == 200


WORDS = st.sampled_from(["user", "history", "private", "k", "times", "exclude", "explain", "item"])
BODIES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(WORDS, inner),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(body=BODIES)
def test_no_body_is_an_error_of_the_server(served, body):
    _, _, client = served("mf")
    for path in ("/recommend", "/similar"):
        assert post(client, json.dumps(body), path).status_code < 500


def test_a_server_that_is_busy_says_so(served):
    """The queue is full while a batch is computed; who waits is answered all the same."""
    _, out, _ = served("sasrec")
    opened = open_served(out)

    async def main():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ask_one, task = batching.make_batcher(pool, most=4)
            every = await asyncio.gather(
                *(ask_one(opened, Question([1], [])) for _ in range(30)), return_exceptions=True
            )
            task.cancel()
            return every

    every = asyncio.run(main())
    refused = [each for each in every if isinstance(each, RefusedQuestionError)]
    assert refused
    assert all(each.args[1] == "busy" for each in refused)
    assert len(every) - len(refused) >= 4


def test_the_fault_of_a_batch_is_told_to_those_who_asked(served, monkeypatch):
    _, out, _ = served("sasrec")
    opened = open_served(out)
    real = batching.answer_questions
    monkeypatch.setattr(batching, "answer_questions", lambda *args: 1 / 0)

    async def main():
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ask_one, task = batching.make_batcher(pool)
            with pytest.raises(ZeroDivisionError):
                await ask_one(opened, Question([1], []))
            monkeypatch.setattr(batching, "answer_questions", real)
            found = await ask_one(opened, Question([1], []))
            task.cancel()
            return found

    assert (asyncio.run(main())[0] >= 0).any()


# --- pages ----------------------------------------


@pytest.mark.parametrize(
    ("path", "names"),
    [
        ("/", {"page.js", "page.css", "icon.svg", "#result"}),
        ("/docs", {"docs.js", "swagger-ui.js", "swagger-ui.css", "icon.svg"}),
    ],
)
def test_a_page_and_all_that_it_refers_to_come_from_this_server(served, path, names):
    """Its policy lets a browser load nothing else, whatever the scripts ask for."""
    _, _, client = served("mf")
    page = client.get(path)
    assert page.status_code == 200
    allowed = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    assert {allowed.pop("default-src"), allowed.pop("img-src")} == {"'self'", "'self' data:"}
    assert set(allowed.values()) == {"'none'"}
    assert set(re.findall(r'(?:src|href)="([^"]*)"', page.text)) == names
    assert "//" not in page.text  # no address of elsewhere
    for name in names:
        found = client.get(f"/{name}")
        assert (found.status_code, found.content != b"") == (200, True)
        kind = {"js": "javascript", "css": "css", "svg": "svg"}.get(name.rpartition(".")[2], "html")
        assert kind in found.headers["content-type"]


def test_pages(served):
    _, _, client = served("mf")
    assert client.get("/").status_code == 200
    assert client.get("/none").status_code == 404
    assert client.get("/docs.js").text.count('url: "openapi.json"') == 1
    assert "/recommend" in client.get("/openapi.json").json()["paths"]
    text = client.get("/metrics").text
    assert 'jaxfed_requests_total{path="/",status="200"}' in text


def test_every_control_of_the_page_has_a_label(served):
    """What a screen reader says: each input a label, each region a name, each table a caption."""
    text = served("mf")[2].get("/").text
    inputs = re.findall(r'<input id="([^"]+)"', text)
    assert inputs
    assert all(f'<label for="{name}"' in text for name in inputs)
    assert text.count("<section") == text.count("aria-labelledby=") - text.count('<ol id="history"')
    assert "<caption>" in text
    assert '<html lang="en">' in text
    used = re.findall(r'find\("([^"]+)"\)', served("mf")[2].get("/page.js").text)
    assert used
    assert all(f'id="{name}"' in text for name in used)


def test_search(served):
    _, _, client = served("mf")
    found = client.get("/items", params={"query": "7"}).json()
    assert found
    assert all("7" in item["id"] + item["title"] for item in found)
    assert client.get("/items", params={"query": "x" * 500}).status_code == 422


# --- the program ----------------------------------------


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]


def test_a_port_in_use_is_said_in_a_line():
    with (
        socket.create_server(("127.0.0.1", 0)) as held,
        pytest.raises(ValueError, match="pass another --host or --port"),
    ):
        open_socket("127.0.0.1", held.getsockname()[1])
    with pytest.raises(ValueError, match="--host is empty"):
        open_socket("", 0)
    with pytest.raises(ValueError, match="--port is 70000"):
        open_socket("127.0.0.1", 70000)


@pytest.mark.long
def test_an_export_is_swapped_without_a_failed_request(tmp_path):
    """As users run it: two models in turn, requests all the time; and one that is damaged is left alone."""
    runs = [make_run(tmp_path / name, rounds=rounds) for name, rounds in (("a", 1), ("b", 2))]
    out, port = tmp_path / "out", free_port()
    export_run(runs[0], out)
    server = subprocess.Popen(
        [sys.executable, "-m", "jaxfed", "serve", str(out), "--port", str(port)],
        env=child_environment(), stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_for(lambda: client.get("/health").status_code == 200)
            first = client.get("/health").json()["model"]

            def model():
                answer = client.post("/recommend", json={"history": ["1"]})
                assert answer.status_code == 200
                return answer.json()["model"]

            assert model() == first
            export_run(runs[1], out, replace=True)
            wait_for(lambda: model() != first)
            second = model()
            (out / "weights.safetensors").write_bytes(b"damaged")
            text = (out / "manifest.json").read_text()
            (out / "manifest.json").write_text(text + "\n")
            time.sleep(2)
            (out / "manifest.json").write_text('{"format": 1, "files": {"a": 1}}')
            begin = time.monotonic()
            while time.monotonic() < begin + 3:
                assert model() == second
    finally:
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert "Traceback" not in said
    assert "cannot be served" in said


def wait_for(check, seconds=120):
    """Waits until something holds; errors of a server that does not listen yet are none."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if check():
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError("it never came to hold")
