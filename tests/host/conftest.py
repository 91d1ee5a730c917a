"""Two ways into a host: its code in this process, and a real process with its queue."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from devkit import environment
from devkit.client import Client
from devkit.host import Host, running


@pytest.fixture(scope="session")
def host_source() -> Path:
    """The host's folder: COMFYUI_PATH, or what dev.py got."""
    return environment.prepare_host()


@pytest.fixture(scope="session")
def comfy(host_source: Path, tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    """The host's own `nodes` module, in this process, on the CPU."""
    sys.path.insert(0, str(host_source))
    import comfy.options

    comfy.options.args_parsing = False
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = str(tmp_path_factory.mktemp("base"))
    import nodes

    return nodes


@pytest.fixture(scope="session")
def pack(comfy: ModuleType) -> ModuleType:
    """Our nodes, imported as the host imports them."""
    import importlib

    return importlib.import_module("anystory_pack.nodes")


@pytest.fixture(scope="session")
def mini(pack: ModuleType) -> SimpleNamespace:
    """The mini model through its node: model, clip, vae, clip_vision, anystory."""
    names = ("model", "clip", "vae", "clip_vision", "anystory")
    return SimpleNamespace(**dict(zip(names, pack.LoadAnyStoryMini.execute().args, strict=True)))


@pytest.fixture(scope="session")
def scene(comfy: ModuleType, pack: ModuleType, mini: SimpleNamespace) -> Any:
    """What most tests need, made once: three subjects, conditionings, a sampler."""
    from scene import Scene

    return Scene(comfy, pack, mini)


@pytest.fixture(scope="session")
def flux(comfy: ModuleType, pack: ModuleType, mini: SimpleNamespace) -> Any:
    """The same with a tiny FLUX."""
    from flux_world import FluxWorld

    return FluxWorld(comfy, pack, mini)


@pytest.fixture
def split(scene: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cond is a call of its own."""
    scene.split(monkeypatch)


@pytest.fixture(params=["by region", "masked", "masked, long rows"])
def way(pack: ModuleType, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways of injection in turn: pictures of this size take the second alone."""
    conditioner = sys.modules["anystory_pack.anystory_core.injection.call"]
    monkeypatch.setattr(conditioner, "by_region", lambda q: request.param == "by region")
    if request.param == "masked, long rows":  # as on a GPU: plain rows apart
        monkeypatch.setattr(conditioner, "LEAST_SORTED", 1)
    return request.param


@pytest.fixture
def counters() -> Iterator[dict[str, Counter[str]]]:
    """What Dynamo counts; every test compiles anew."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def host(host_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One real host process for all tests that use the queue, with a node that loads a tiny FLUX
    beside the pack's own."""
    base = tmp_path_factory.mktemp("host")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "tiny_flux").symlink_to(Path(__file__).parent / "tiny_flux")
    with running(host_source, environment.python(), base) as process:
        yield process


@pytest.fixture
def client(host: Host) -> Client:
    return Client(host.url)
