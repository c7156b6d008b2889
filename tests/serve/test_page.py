"""The page in a browser: what a person types, stops and gets wrong."""

import pytest
from browser import CHROMIUM, Browser
from serving import serving

pytestmark = pytest.mark.skipif(not CHROMIUM, reason="there is no Chromium: apt-get install chromium")


def send(browser, text):
    browser.run("document.querySelectorAll('main p').forEach(p => p.remove())")
    browser.run(f"document.getElementById('prompt').value = '{text}'")
    browser.run("document.getElementById('form').requestSubmit()")


IDLE = "document.getElementById('send').textContent === 'Send' && document.querySelector('main p') !== null"
TEXTS = "document.querySelector('main').textContent"


def test_a_text_is_continued_stopped_and_refused(engine, tmp_path):
    with serving(engine, key="secret", slots=2) as server, Browser(tmp_path, dark=True) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.until(f"{TEXTS}.includes('API key is missing or wrong')")
        browser.run("document.getElementById('key').value = 'secret'; document.getElementById('temperature').value = 0")
        browser.run("document.getElementById('tokens').value = 20")
        send(browser, "hello")
        browser.until(IDLE)
        assert browser.run("document.getElementById('model').textContent") == "tiny"
        assert browser.run(TEXTS) == "hello" + "".join(engine.generate("hello", max_tokens=20))
        browser.run("document.getElementById('tokens').value = 500")
        send(browser, "hello")
        browser.until(IDLE)
        assert browser.run(TEXTS) == "hellomax_tokens is 500: at most 400 may be asked for"
        browser.run("document.getElementById('tokens').value = 400")
        send(browser, "hello")
        browser.until(f"{TEXTS}.length > 'hello'.length")
        browser.run("document.getElementById('form').requestSubmit()")  # stop
        browser.until(IDLE)
        server.until(lambda: not server.scheduler.running)
