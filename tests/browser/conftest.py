"""A real browser on a real host, with the oldest and the newest editor that we promise."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from editor import FIRST_VERSION, NEWEST_VERSION, Editor

from devkit import environment
from devkit.browser import chromium, prepare_front_end, programs
from devkit.client import Client
from devkit.environment import SetupError
from devkit.graphs import INPUTS
from devkit.host import running


@pytest.fixture(scope="session", params=[FIRST_VERSION, NEWEST_VERSION])
def browser(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Editor]:
    """A browser on a host that serves one version of the editor; nothing is open yet. A machine
    without a browser skips these tests; CI counts a skip as a failure."""
    try:
        programs()
    except SetupError as error:
        pytest.skip(str(error))
    version: str = request.param
    interpreter = environment.python()
    files = prepare_front_end(version, interpreter)
    base = tmp_path_factory.mktemp("browser")
    arguments = ("--front-end-root", str(files))
    with (
        chromium(base / "profile") as driver,
        running(environment.prepare_host(), interpreter, base, arguments=arguments) as host,
    ):
        client = Client(host.url)
        for picture in INPUTS.iterdir():
            client.upload(picture)
        yield Editor(driver, client, version)


@pytest.fixture(scope="module", params=[False, True], ids=["canvas", "vue"])
def loaded(browser: Editor, request: pytest.FixtureRequest) -> Editor:
    """The editor's page, with nodes on the canvas or drawn by Vue."""
    browser.open(vue=request.param)
    return browser


@pytest.fixture
def editor(loaded: Editor) -> Iterator[Editor]:
    """The page, and no errors of ours in its console afterwards."""
    loaded.errors()
    yield loaded
    assert loaded.errors() == []
