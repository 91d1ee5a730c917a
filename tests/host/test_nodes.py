"""What each node gives."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scene import Scene, halves, module, picture
from torch import Tensor


def test_subjects_are_pure_and_live_on_the_offload_device(scene: Scene) -> None:
    image, mask = picture(1)
    before = image.clone(), mask.clone()
    one, two = (scene.encode_picture(image, mask=mask, label="box") for _ in range(2))
    assert torch.equal(image, before[0]) and torch.equal(mask, before[1])
    offload = module("comfy.model_management").unet_offload_device()
    for a, b in zip((one.tokens, *one.features), (two.tokens, *two.features), strict=True):
        assert torch.equal(a, b) and a.device.type == offload.type
    assert torch.equal(one.routing, two.routing)


def test_options_leave_the_subject_as_it_was(scene: Scene) -> None:
    subject = scene.subjects[0]
    weak = scene.pack.AnyStorySubjectOptions.execute(subject, 0.5, 0.25, 0.1, 0.9)[0]
    assert weak.tokens is subject.tokens
    assert (weak.options.strength, weak.options.end) == (0.5, 0.9)
    assert (subject.options.strength, subject.options.end) == (1.0, 1.0)


def test_what_is_outside_the_mask_does_not_matter(scene: Scene) -> None:
    image, mask = picture(0)
    other = torch.where(mask[..., None] > 0, image, torch.rand_like(image))
    one = scene.encode_picture(image, mask=mask)
    two = scene.encode_picture(other, mask=mask)
    # Resizing mixes pixels at the mask's edge, and only there.
    assert (one.tokens - two.tokens).norm() < 0.2 * one.tokens.norm()
    assert torch.equal(one.cutout[:, 0, 0], two.cutout[:, 0, 0])


def test_transparent_png_through_load_image(scene: Scene) -> None:
    """LoadImage gives RGB of any colour under alpha 0, and the mask 1 - alpha: with the bundled
    wiring (invert_mask on) the subject is encoded, not its background."""
    from PIL import Image

    folder = Path(module("folder_paths").get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = picture(0)
    loaded = []
    for name, background in (("white.png", 1.0), ("pink.png", 0.4)):
        rgb = torch.where(mask[0, ..., None] > 0, image[0], torch.tensor(background))
        rgba = torch.cat((rgb, mask[0, ..., None]), dim=-1)
        Image.fromarray((rgba * 255).byte().numpy(), "RGBA").save(folder / name)
        pixels, alpha = scene.comfy.LoadImage().load_image(name)[:2]
        assert pixels.shape[-1] == 3
        loaded.append(scene.encode_picture(pixels, mask=alpha, invert_mask=True))
    by_hand = scene.encode_picture(image, mask=mask)
    grey = loaded[0].cutout[0, 1, 1]  # a corner outside the ball
    assert torch.equal(grey, torch.full_like(grey, 128)) or torch.equal(grey, grey * 0 + 127)
    for subject in loaded:
        assert (subject.tokens - by_hand.tokens).norm() < 0.1 * by_hand.tokens.norm()
    inverted = scene.encode_picture(pixels, mask=alpha, invert_mask=False)
    assert (inverted.tokens - by_hand.tokens).norm() > (loaded[0].tokens - by_hand.tokens).norm()


@pytest.mark.parametrize("reading", [{"invert_mask": True}, {"mask_shows": "auto"}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_opaque_picture_through_load_image(scene: Scene, mode: str, reading: Any) -> None:
    """Its mask is zeros, of 64x64 without an alpha channel and of the picture's size with one: both
    count as no mask."""
    loaded, mask = load_image(picture(0)[0], mode)
    assert not mask.any() and (tuple(mask.shape[1:]) == (64, 64)) == (mode == "RGB")
    guessed = scene.encode_picture(loaded, mask=mask, **reading)
    assert torch.equal(guessed.tokens, scene.encode_picture(loaded).tokens)


def load_image(image: Tensor, mode: str = "RGB", painted: Tensor | None = None) -> Any:
    """(picture, mask) of the host's LoadImage for a file; ``painted`` (H,W) is what its mask editor
    was painted with, which it saves as holes in the alpha."""
    from PIL import Image

    folder = Path(module("folder_paths").get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    alpha = torch.ones(image.shape[1:3]) if painted is None else 1 - painted
    pixels = (torch.cat((image[0], alpha[..., None]), dim=-1) * 255).byte().numpy()
    file = Image.fromarray(pixels, "RGBA")
    file.convert("RGBA" if painted is not None else mode).save(folder / "loaded.png")
    return load_image_file(folder / "loaded.png")


def load_image_file(path: Path) -> Any:
    return module("nodes").LoadImage().load_image(path.name)[:2]


def test_auto_reads_alpha_and_the_mask_editor(scene: Scene) -> None:
    """Alpha marks the outside, a painted mask the subject; both give the same subject."""
    image, mask = picture(0)
    image = (image * 255).byte() / 255  # as a file has it
    wanted = scene.encode_picture(image, mask=mask)
    said = []
    for white in (mask, 1 - mask):
        pixels, given = load_image(image, painted=white[0])
        assert torch.equal(given, white)
        out = encode_as("auto", scene, pixels, given)
        assert torch.equal(out.args[0].cutout, wanted.cutout)
        said += out.ui["text"]
    assert said == [
        "The mask shows the subject, for most of the border is outside it.",
        "The mask shows the background, for it covers most of the border.",
    ]


def encode_as(shows: str, scene: Scene, image: Tensor, mask: Tensor, **inputs: Any) -> Any:
    mini = scene.mini
    return scene.pack.EncodeSubject.execute(
        anystory=mini.anystory, clip_vision=mini.clip_vision, vae=mini.vae, image=image, mask=mask,
        mask_shows=shows, **inputs,
    )  # fmt: skip


def test_what_the_mask_shows_by_hand(scene: Scene) -> None:
    """And graphs from before that input keep their meaning."""
    image, mask = picture(0)
    wanted = scene.encode_picture(image, mask=mask)
    for shows, invert, given in (
        ("subject", False, mask), ("subject", True, 1 - mask),
        ("background", False, 1 - mask), ("background", True, mask),
        ("auto", False, mask), ("auto", True, mask),
    ):  # fmt: skip
        out = encode_as(shows, scene, image, given, invert_mask=invert)
        assert torch.equal(out.args[0].tokens, wanted.tokens), (shows, invert)
    old = scene.encode_picture(image, mask=1 - mask, invert_mask=True)
    assert torch.equal(old.tokens, wanted.tokens)


def test_a_picture_of_16_bits_is_said_to_be_blank(scene: Scene) -> None:
    """This host reads its values beyond 255 of 65535 as white."""
    import numpy as np
    from PIL import Image

    folder = Path(module("folder_paths").get_input_directory())
    folder.mkdir(parents=True, exist_ok=True)
    values = np.linspace(0, 65535, 96 * 96).reshape(96, 96).astype(np.uint16)
    Image.fromarray(values).save(folder / "grey16.png")
    pixels, mask = load_image_file(folder / "grey16.png")
    text = " ".join(encode_as("auto", scene, pixels, mask).ui["text"])
    assert "There is one colour all over, #FFFFFF" in text and "16 bits" in text


def test_encode_shows_its_cut_out_and_says_what_it_assumed(scene: Scene) -> None:
    mini = scene.mini
    out = scene.pack.EncodeSubject.execute(
        anystory=mini.anystory, clip_vision=mini.clip_vision, vae=mini.vae, image=picture(0)[0]
    )
    assert len(out.ui["images"]) == 1
    assert "plain background was cut away" in " ".join(out.ui["text"])
    # Every key every time: the host joins the outputs of a list by the keys of the first.
    given = scene.pack.EncodeSubject.execute(
        anystory=mini.anystory, clip_vision=mini.clip_vision, vae=mini.vae, image=picture(0)[0],
        mask=picture(0)[1],
    )  # fmt: skip
    assert given.ui.keys() == out.ui.keys() and given.ui["text"] == ()


def test_what_is_said_waits_in_the_outputs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the host's message for text on a node, which newer editors take away with the job."""
    sent: list[Any] = []
    server = SimpleNamespace(client_id="me", send_progress_text=lambda *given: sent.append(given))
    server_module = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    mini = scene.mini
    given = {
        "anystory": mini.anystory, "clip_vision": mini.clip_vision, "vae": mini.vae,
        "image": picture(0)[0],
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "server", server_module)
    with module("comfy_execution.utils").CurrentNodeContext("prompt", "17"):
        out = scene.pack.EncodeSubject.execute(**given)
    assert out.ui["text"] and not sent


def test_a_line_is_said_once() -> None:
    say = module("anystory_pack.nodes.host.saying").say
    assert say(["one", "two", "one"]) == ("one", "two")
    assert say([]) == ()


def test_preview_outputs(scene: Scene) -> None:
    model, maps = scene.apply_with_maps()
    out = scene.sample(model, steps=3)
    decoded = torch.rand(1, 128, 128, 3)
    one = scene.preview(maps, out, steps="1")
    every = scene.preview(maps, out, steps="all", show_background=True, image=decoded)
    assert one.args[0].shape[0] == 1 and one.args[0].shape[-1] == 3
    assert every.args[0].numel() > one.args[0].numel()
    assert len(every.ui["images"]) == len(one.ui["images"]) + 1
    masks = every.args[1]
    assert masks.shape == (2, 128, 128) and masks.unique().tolist() in ([0.0, 1.0], [0.0], [1.0])
    assert float(masks.sum(dim=0).max()) <= 1  # nobody shares a pixel
    for values in every.ui.values():
        assert isinstance(values, (list, tuple))


def test_preview_warns_of_a_subject_without_a_place(scene: Scene) -> None:
    nowhere = [torch.ones(1, 8, 8), torch.zeros(1, 8, 8)]
    model, maps = scene.apply_with_maps(routing=scene.route(mode="masks", masks=nowhere))
    shown = scene.preview(maps, scene.sample(model, steps=1))
    (text,) = shown.ui["text"]
    assert text.startswith("'box' got 0.0 % of the picture")


NO_ROUTES = {
    "strength": "No subject acted",
    "window": "No subject acted",
    "nobody": "No subject acted",
    "prompt": "time range of the positive prompt",
    "second pass": "No step falls between a subject's start and end",
    "tokens": "another node changes the tokens of every block",
}


@pytest.mark.parametrize("why", NO_ROUTES)
def test_a_run_without_routes_is_no_error(
    scene: Scene, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a list it must not take the other pictures' maps away."""
    positive = scene.positive
    if why == "prompt":
        positive = module("node_helpers").conditioning_set_values(
            positive, {"start_percent": 0.4, "end_percent": 0.6}
        )
    empty = scene.pack.SubjectRouter.execute(anystory=scene.mini.anystory, mode="learned").args[0]
    given: dict[str, dict[str, Any]] = {
        "strength": {"strength": 0.0, "reference_strength": 0.0},
        "window": {"start": 0.5, "end": 0.5},
        "nobody": {"routing": empty},
        "second pass": {"end": 0.4},
    }
    model, maps = scene.apply_with_maps(**given.get(why, {}))
    with monkeypatch.context() as changed:
        if why == "tokens":
            table = module("anystory_pack.nodes.host.sdxl.patcher").BlockTable
            changed.setattr(table, "grid", lambda *_: None)
        denoise = 0.5 if why == "second pass" else 1.0
        out = scene.sample(model, steps=2, positive=positive, denoise=denoise)
    shown = scene.preview(maps, out)
    acting, some = scene.apply_with_maps()
    assert shown.ui.keys() == scene.preview(some, scene.sample(acting, steps=1)).ui.keys()
    masks = shown.args[1]
    assert masks.shape == (1 if why == "nobody" else 2, 128, 128) and not masks.any()
    (text,) = shown.ui["text"]
    assert NO_ROUTES[why] in text


def test_preview_is_blank_outside_the_window(scene: Scene) -> None:
    model, maps = scene.apply_with_maps(start=0.4)
    out = scene.sample(model, steps=4)
    record = maps.find(out).record
    assert not record.levels[0].ids and record.levels[-1].ids
    scene.preview(maps, out, steps="all")


def test_load_anystory(scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file from models/anystory; what it lacks is said; the same tensors as those saved."""
    checkpoint = module("anystory_pack.anystory_core.weights.checkpoint")
    folder_paths = module("folder_paths")
    folder_paths.add_model_folder_path("anystory", str(tmp_path))
    model = scene.mini.anystory.model
    checkpoint.save_model(tmp_path / "whole.safetensors", model, model.config)
    parts = {k: v for k, v in model.state_dict().items() if not k.startswith("routers.")}
    checkpoint.save_model(tmp_path / "no router.safetensors", parts, model.config)
    (tmp_path / "note.txt").write_text("not a model")
    folder_paths.filename_list_cache.clear()
    assert set(folder_paths.get_filename_list("anystory")) == {
        "whole.safetensors", "no router.safetensors",
    }  # fmt: skip
    load = scene.pack.LoadAnyStory
    whole = load.execute("whole.safetensors")
    (text,) = whole.ui["text"]
    assert "router" in text and "No router" not in text
    assert "No router" in load.execute("no router.safetensors").ui["text"][0]
    assert load.fingerprint_inputs(None) is None  # a link, as the host gives it
    loaded: Any = whole[0].model.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items())
    assert load.fingerprint_inputs("whole.safetensors") != load.fingerprint_inputs(
        "no router.safetensors"
    )
    subject = scene.encode(0, anystory=whole[0])
    assert torch.equal(subject.tokens, scene.encode(0).tokens)
    data = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.safetensors").write_bytes(b"hello" * 100)
    folder_paths.filename_list_cache.clear()
    for name in ("cut.safetensors", "text.safetensors", "gone.safetensors"):
        with pytest.raises(scene.errors.CheckpointError, match=f"LoadAnyStory: .*{name}"):
            load.execute(name)


def test_a_file_of_several_number_types(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8-bit matrices, fp16 norms and biases and a float32 router, from the file to the picture."""

    def pictures(*subjects: Any) -> tuple[Tensor, ...]:
        """Where the masks say, and where the router does."""
        placed = scene.route(*subjects, mode="masks", masks=halves())
        routings = (placed, scene.route(*subjects))
        return tuple(scene.sample(scene.apply(routing=r), steps=1) for r in routings)

    whole = pictures()
    checkpoint = module("anystory_pack.anystory_core.weights.checkpoint")
    model = scene.mini.anystory.model
    tensors = {
        name: tensor.float()
        if name.startswith("routers.")
        else tensor.to(torch.float8_e4m3fn if tensor.ndim > 1 else torch.float16)
        for name, tensor in model.state_dict().items()
    }
    checkpoint.save_model(tmp_path / "mixed.safetensors", tensors, model.config)
    path = str(tmp_path / "mixed.safetensors")
    monkeypatch.setattr(module("folder_paths"), "get_full_path", lambda *_: path)
    mixed = scene.pack.LoadAnyStory.execute("mixed.safetensors")[0]
    monkeypatch.setattr(scene.mini, "anystory", mixed)
    out = pictures(*(scene.encode(i, label=n) for i, n in enumerate(("ball", "box"))))
    plain = scene.sample(scene.mini.model, steps=1)
    # fp8 changes a picture by some hundredths; without the subjects half of it would be another.
    # Where a router chooses, a quarter: in noise alone rounding decides which subject some places
    # show.
    for most, own, exact in zip((0.2, 0.4), out, whole, strict=True):
        assert (own - exact).norm() < most * exact.norm() < (own - plain).norm()


def test_masks_of_any_size(scene: Scene) -> None:
    """The picture is that of larger masks: sides that belong to a subject stay its own."""

    def picture_of(*masks: Tensor) -> Tensor:
        routing = scene.route(mode="masks", masks=masks)
        return scene.sample(scene.apply(routing=routing), steps=1)

    wanted, swapped = picture_of(*halves()), picture_of(*reversed(halves()))
    for size in ((8, 8), (200, 300)):
        masks = [torch.nn.functional.interpolate(m[None], size)[0] for m in halves()]
        assert torch.equal(picture_of(*masks), wanted), size
    small = [torch.nn.functional.interpolate(m[None], (7, 13))[0] for m in halves()]
    # Their middle is half a token off.
    assert (picture_of(*small) - wanted).norm() < 0.5 * (swapped - wanted).norm()
