"""A browser without a window, told what to do by the DevTools protocol of Chromium."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time

from websockets.sync.client import connect

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]


class Page:
    """A page that is open in the browser."""

    def __init__(self, socket):
        self.socket, self.numbers, self.problems = socket, itertools.count(1), []

    def call(self, method, **params):
        """The result of a method; events that come meanwhile are looked through for errors of the page."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=30))
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.problems.append(message["params"])
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]

    def run(self, script):
        """The value of an expression of JavaScript, awaited."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script, seconds=20):
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"it never came to hold: {script}"
            time.sleep(0.05)

    def press(self, key, code, text=""):
        """A key, as of a keyboard."""
        words = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **words)
        self.call("Input.dispatchKeyEvent", type="keyUp", **words)

    def write(self, text):
        """Text into what has the focus."""
        self.call("Input.insertText", text=text)


@contextlib.contextmanager
def open_page(address):
    """A `Page` at an address."""
    assert CHROMIUM
    with tempfile.TemporaryDirectory() as folder:
        browser = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=subprocess.PIPE, text=True
        )
        try:
            port = next(found[1] for line in browser.stderr if (found := re.search(r"ws://127.0.0.1:(\d+)/", line)))
            import urllib.request

            listed = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port}/json/list"))
            target = next(each["webSocketDebuggerUrl"] for each in listed if each["type"] == "page")
            with connect(target, max_size=1 << 26) as socket:
                page = Page(socket)
                for domain in ("Page", "Runtime", "Log"):
                    page.call(f"{domain}.enable")
                page.call("Page.navigate", url=address)
                page.wait('document.readyState === "complete"')
                yield page
        finally:
            browser.terminate()
            browser.wait(30)
