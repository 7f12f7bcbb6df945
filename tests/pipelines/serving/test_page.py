"""The page in headless Chromium: upload, answers, click through, filters, two models, an error, the keyboard alone, a phone, a token."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.serving.guard import Limits
from tests.browser import PROGRAM, Browser
from tests.pipelines.serving.service import make_index, rows, running, service, write_images

COUNT = "document.querySelectorAll('{} li').length"
PICTURES = "[...document.querySelectorAll('{} img')].every(image => image.naturalWidth > 0)"
DONE = "document.getElementById('status').innerText.includes('answers in')"  # not "Searching ..."
FOCUS = "document.activeElement.closest('#results, #samples')?.id || document.activeElement.id"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if not PROGRAM:
        pytest.skip("there is no Chromium on this machine")
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two indexes, ``first`` and ``second``, and the images of their rows."""
    made = tmp_path_factory.mktemp("page")
    files = write_images(made / "images", 60)
    make_index(made / "first", rows(60, files=files), 2)
    make_index(made / "second", rows(60, 1, files), model="other")
    return made


@pytest.fixture
def page(browser: Browser, folder: Path) -> Iterator[Browser]:
    """The page of both indexes, with the sample shown."""
    with running(service(folder / "first", folder / "second", limits=Limits(body=2**20))[0]) as client:
        browser.requested.clear()
        browser.size(1100, 800)
        browser.open(str(client.base_url))
        browser.wait(f"{COUNT.format('#samples')} == 16 && {PICTURES.format('#samples')}")
        yield browser


def answers(browser: Browser) -> list[str]:
    """Ids of the answers that are shown."""
    found: list[str] = browser.run("[...document.querySelectorAll('#results button')].map(each => each.title)")
    return found


def test_an_image_is_uploaded_and_answers_are_clicked_on(page: Browser, folder: Path) -> None:
    page.upload("#file", folder / "images" / "000.png")
    page.wait(f"{COUNT.format('#results')} == 16 && {PICTURES.format('#results')}")
    distances = page.run("[...document.querySelectorAll('#results button')].map(each => +each.innerText.match(/distance (\\d+)/)[1])")
    assert distances == sorted(distances) and "in" in page.run("document.getElementById('status').innerText")
    assert "model" not in page.run("document.title") and "first: run" in page.run("document.getElementById('results').innerText")
    first = answers(page)
    page.run("document.querySelectorAll('#results button')[5].click()")
    page.wait(f"document.getElementById('asked').innerText == {first[5]!r} && {COUNT.format('#results')} == 16 && {DONE}")
    page.wait("document.querySelector('#results button').innerText.includes('distance 0')")
    second = answers(page)
    page.run("document.querySelectorAll('#results button')[9].click()")
    page.wait(f"document.getElementById('asked').innerText == {second[9]!r} && {DONE}")
    page.run("history.back()")
    page.wait(f"document.getElementById('asked').innerText == {first[5]!r} && {DONE}")
    assert answers(page) == second
    assert all(address.startswith(("http://127.0.0.1", "blob:http://127.0.0.1")) for address in page.requested)


def test_filters_and_two_models(page: Browser) -> None:
    page.run("document.querySelector('#samples button').click()")
    page.wait(f"{COUNT.format('#results')} == 16")
    page.run("label.value = 'dog'; label.dispatchEvent(new Event('change'))")
    page.wait("[...document.querySelectorAll('#results button')].every(each => each.innerText.startsWith('dog'))")
    page.run("k.value = '8'; k.dispatchEvent(new Event('change'))")
    page.wait(f"{COUNT.format('#results')} == 8")
    page.run("compare.click()")
    page.wait(f"{COUNT.format('#results')} == 16 && document.querySelectorAll('#results section').length == 2 && {PICTURES.format('#results')}")
    assert page.run("[...document.querySelectorAll('#results h2')].map(each => each.innerText)") == ["first: run", "second: other"]
    left, right = (answers(page)[:8], answers(page)[8:])
    asked = page.run("document.getElementById('asked').innerText")
    for side, index in ((left, "first"), (right, "second")):
        body = f"{{id: {asked!r}, index: '{index}', label: 'dog', k: 8}}"
        headers = "{'content-type': 'application/json'}"
        told = page.run(f"fetch('/search', {{method: 'POST', headers: {headers}, body: JSON.stringify({body})}}).then(each => each.json())")
        assert side == [row["id"] for row in told["queries"][0]["answers"]]
    assert left != right and "lacks the image" not in page.run("document.getElementById('results').innerText")
    page.size(390, 844, phone=True)
    assert page.run("document.documentElement.scrollWidth <= window.innerWidth")


def test_an_index_that_lacks_the_image_is_searched_with_its_picture(browser: Browser, folder: Path) -> None:
    table = rows(60, files=sorted((folder / "images").iterdir()))
    make_index(folder / "half", table.slice(30))
    with running(service(folder / "first", folder / "half")[0]) as client:
        browser.open(str(client.base_url))
        browser.wait(f"{COUNT.format('#samples')} == 16")
        browser.run(f"history.pushState({{}}, ''); ask({{id: {table['id'][0].as_py()!r}, index: 'first'}}); compare.click()")
        browser.wait(f"{COUNT.format('#results')} == 32")
        shown = browser.run("[...document.querySelectorAll('#results section')].map(each => each.innerText)")
        assert "lacks the image" not in shown[0] and "searched with the small picture, as this index lacks the image" in shown[1]


def test_errors_are_shown_and_go_away(page: Browser, folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"this is no image")
    (folder / "large.png").write_bytes(bytes(2**20 + 5000))
    for name, reason in (("broken.png", "image 1 of 1 cannot be read: not an image"), ("large.png", "the body is larger than 1,048,576 bytes")):
        page.upload("#file", folder / name)
        page.wait(f"document.getElementById('error').innerText == {reason!r}")
        assert answers(page) == []
    page.upload("#file", folder / "images" / "001.png")
    page.wait(f"{COUNT.format('#results')} == 16 && !document.getElementById('error').innerText")


def test_the_keyboard_is_enough(page: Browser) -> None:
    def until_in(place: str) -> None:
        for _ in range(40):
            page.press("Tab")
            if page.run(FOCUS) == place:
                return
        raise AssertionError(f"Tab does not reach {place}")

    until_in("file")
    until_in("label")
    until_in("samples")
    page.press("Enter")
    page.wait(f"{COUNT.format('#results')} == 16")
    page.run("document.body.focus(); document.getElementById('file').focus()")
    until_in("results")
    page.press("Tab", 2)
    name = page.run("document.activeElement.title")
    assert page.run("document.activeElement.getAttribute('aria-label')").endswith(f"{name}: search with it")
    page.press("Space")
    page.wait(f"document.getElementById('asked').innerText == {name!r}")


def test_a_token_is_asked_for(browser: Browser, folder: Path) -> None:
    with running(service(folder / "first", token="a secret of some length")[0]) as client:
        browser.open(str(client.base_url))
        browser.wait("!document.getElementById('token').hidden")
        for secret in ("wrong", "a secret of some length"):
            browser.run(f"secret.value = {secret!r}; document.querySelector('#token button').click()")
            if secret == "wrong":
                browser.wait("document.getElementById('error').innerText == \"The token is not the service's.\"")
        browser.wait(f"{COUNT.format('#samples')} == 16 && {PICTURES.format('#samples')} && document.getElementById('token').hidden")
