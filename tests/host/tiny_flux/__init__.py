"""A node for the tests' host process: a tiny FLUX and everything around it, with the outputs of
LoadAnyStoryMini in its order."""

import sys
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).resolve().parents[2]


class LoadTinyFlux:
    """The host's older form of a node."""

    CATEGORY = "tests"
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL", "CLIP", "VAE", "CLIP_VISION", "ANYSTORY")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def load(self) -> tuple[Any, ...]:
        # Behind the host's own folders: there, our `nodes` would hide its.
        sys.path += [str(folder) for folder in (_TESTS / "host", _TESTS / "unit", _TESTS.parent)]
        import flux_parts

        (nodes,) = (n.removesuffix(".mini") for n in sys.modules if n.endswith(".nodes.mini"))
        return (
            flux_parts.flux_patcher(),
            flux_parts.clip(),
            sys.modules[f"{nodes}.mini"].load_vae(),
            flux_parts.siglip(),
            flux_parts.anystory(nodes),
        )


NODE_CLASS_MAPPINGS = {"LoadTinyFlux": LoadTinyFlux}
