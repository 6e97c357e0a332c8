"""The page of the server in a real browser: by the keyboard alone, without an error."""

import base64
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from jaxfed.export.bundle import export_run
from tests.export.test_export import MODELS, make_run
from tests.serving.browser import CHROMIUM, open_page
from tests.serving.test_serving import free_port, wait_for
from tests.small import child_environment

pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a server of a small model listens."""
    root, port = tmp_path_factory.mktemp("page"), free_port()
    export_run(make_run(root / "run", **MODELS["mf"]), root / "out", users=True)
    command = [sys.executable, "-m", "jaxfed", "serve", str(root / "out"), "--port", str(port)]
    with subprocess.Popen(command, env=child_environment(), stderr=subprocess.DEVNULL) as server:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            wait_for(lambda: client.get("/health").status_code == 200)
        yield f"http://127.0.0.1:{port}/"
        server.terminate()


def test_a_history_is_built_and_answered_by_the_keyboard_alone(address):
    with open_page(address) as page:
        page.wait('document.querySelector("#about").textContent.includes("items")')
        page.run('document.querySelector("#search").focus()')
        page.write("7")
        page.wait('document.querySelectorAll("#found button").length > 1')
        for _ in range(2):
            page.press("Tab", 9)
            page.press("Enter", 13, "\r")
        page.wait('document.querySelectorAll("#history li").length === 2')
        assert page.run("document.activeElement.getAttribute('aria-label')").startswith("Add ")
        page.run('document.querySelector("#ask").focus()')
        page.press("Enter", 13, "\r")
        page.wait('document.querySelectorAll("#table tbody tr").length === 10')
        assert page.run("document.activeElement.id") == "result"  # a screen reader goes on here
        assert "10 items, in" in page.run('document.querySelector("#status").textContent')
        why = page.run('document.querySelector("#table tbody td:last-child").textContent')
        assert len(why.split(";")) == 2  # both items of the history
        if folder := os.environ.get("JAXFED_SCREENSHOTS"):
            data = page.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
            Path(folder, "page.png").write_bytes(base64.b64decode(data))
        assert not page.problems


def test_an_unknown_user_is_said_to_be_one(address):
    with open_page(address) as page:
        page.wait('!document.querySelector("#by-user").hidden')
        page.run('document.querySelector("#user").focus()')
        page.write("<img src=x onerror=alert(1)>")
        page.press("Enter", 13, "\r")
        page.wait('document.querySelector("#status").className === "problem"')
        assert "no user" in page.run('document.querySelector("#status").textContent')
        assert page.run('document.querySelectorAll("#status img").length') == 0
        page.run('document.querySelector("#user").value = ""')
        page.write("0")
        page.press("Enter", 13, "\r")
        page.wait('document.querySelectorAll("#table tbody tr").length === 10')


def test_the_description_asks_this_server_and_no_other(address):
    """A question is sent from it, too. What its policy refuses would be a problem of the page."""
    with open_page(f"{address}docs") as page:
        page.wait("document.querySelectorAll('.opblock').length >= 5")
        page.run("document.querySelector('[id$=search_items_get] .opblock-summary-control').click()")
        for name in (".try-out__btn", ".execute"):
            page.wait(f"document.querySelector('{name}') !== null")
            page.run(f"document.querySelector('{name}').click()")
        page.wait("document.querySelector('.live-responses-table tr.response .response-col_status') !== null")
        status = page.run(
            "document.querySelector('.live-responses-table tr.response .response-col_status').textContent"
        )
        assert status.startswith("200")
        asked = page.run("performance.getEntriesByType('resource').map((entry) => entry.name)")
        assert {f"{address}openapi.json", f"{address}items", f"{address}swagger-ui.js"} <= set(asked)
        assert all(name.startswith((address, "data:")) for name in asked)
        assert not page.problems


def test_every_control_has_a_name_for_screen_readers(address):
    """By the browser's own tree of accessibility."""
    with open_page(address) as page:
        page.wait('!document.querySelector("#by-user").hidden')
        page.call("Accessibility.enable")
        nodes = page.call("Accessibility.getFullAXTree")["nodes"]
        roles = [
            (node["role"]["value"], node.get("name", {}).get("value")) for node in nodes if not node.get("ignored")
        ]
        controls = [(role, name) for role, name in roles if role in ("button", "textbox", "searchbox", "region")]
        assert len(controls) >= 5
        assert all(name for _, name in controls), controls
        assert ("heading", "Recommendations") in roles
