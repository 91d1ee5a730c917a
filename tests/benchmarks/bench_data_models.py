"""CPU seconds of the data commands that run networks, with networks of real size.

    python3 dev.py bench data-models [mask-rcnn mask2former qwen2-vl encode] [--count 4]

Nobody's weights: a segmenter is told to find all that it can (100 instances a picture, more than
pictures have), a captioner writes as many words as it may. Each command, its start and the loading
of its network included, runs on COUNT scenes of 640x480; beside it the same networks on the same
pictures without the command, once they are loaded, and a plain read of the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "training"))
sys.path.append(str(Path(__file__).resolve().parents[2]))

import diffusers
import models
import tiny
import torch
import torchvision
import transformers
from bench_data import SIZE, call, timed, write_pictures
from PIL import Image
from torchvision.transforms import functional

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.data import shards
from anystory_core.data.captioner import CaptionSettings, load_captioner
from anystory_core.data.segmenters import load_segmenter
from anystory_core.training.hosts.frozen import load_frozen
from anystory_core.training.settings import BaseSettings

CPU = torch.device("cpu")
CAPTION = "a photograph of a lion and a cheetah that look at a tower in the evening light"
RESOLUTION = 1024
QWEN2_VL_2B = models.Qwen2VLSizes(
    text={
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]},
    },
    vision={"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": 1536, "mlp_ratio": 4},
    most_pixels=SIZE[0] * SIZE[1],
    vocabulary=151_672,
    dtype=torch.bfloat16,
)  # fmt: skip
RUN = """
[base]
path = "base"
model = "base/config.json"
[data]
paths = ["{scenes}"]
resolution = {resolution}
cache = "cache-{scenes}"
[run]
folder = "run"
steps = 1
batch = 1
precision = "bf16"
[router]
subject_file = "none"
"""
Command = Callable[[Path], list[Any]]  # on a folder of scenes
Alone = Callable[[Sequence[Image.Image]], object]  # the networks of it, on the pictures


def mask_rcnn(folder: Path) -> tuple[Command, Alone]:
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    model.roi_heads.box_predictor.cls_score.bias.data[1] = 20.0
    torch.save(model.state_dict(), folder / "mask_rcnn.pth")
    return masks(folder / "mask_rcnn.pth")


def mask2former(folder: Path) -> tuple[Command, Alone]:
    config = transformers.Mask2FormerConfig()  # Swin-T, 100 queries
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    model.class_predictor.bias.data[0] = 20.0
    model.save_pretrained(folder / "mask2former")
    transformers.Mask2FormerImageProcessor().save_pretrained(folder / "mask2former")
    return masks(folder / "mask2former")


def masks(path: Path) -> tuple[Command, Alone]:
    segmenter = load_segmenter(str(path), CPU, least_score=0.7, trust_code=False)
    return lambda scenes: ["masks", scenes, "--model", path], segmenter


def qwen2_vl(folder: Path) -> tuple[Command, Alone]:
    path = folder / "qwen2_vl"
    models.write_qwen2_vl(path, QWEN2_VL_2B)
    captioner = load_captioner(str(path), CPU, CaptionSettings())
    return (
        lambda scenes: ["captions", scenes, "--model", path],
        lambda pictures: captioner(pictures, [[] for _ in pictures]),
    )


def encode(folder: Path) -> tuple[Command, Alone]:
    base = folder / "base"
    write_base(base)

    def command(scenes: Path) -> list[Any]:
        run = scenes.with_suffix(".toml")
        run.write_text(RUN.format(scenes=scenes.name, resolution=RESOLUTION))
        return ["encode", run]

    settings = BaseSettings(path=str(base), model=str(base / "config.json"))
    frozen = load_frozen(settings).to(CPU, torch.bfloat16)

    def alone(pictures: Sequence[Image.Image]) -> object:
        squares = [functional.resize(picture, RESOLUTION) for picture in pictures]
        tensors = [functional.center_crop(functional.to_tensor(p), RESOLUTION) for p in squares]
        states = frozen.text([f"{number} {CAPTION}" for number in range(len(pictures))])
        return states, frozen.encode_picture(2 * torch.stack(tensors) - 1)

    return command, alone


def write_base(folder: Path) -> None:
    """SDXL's VAE and text encoders at their size; the U-Net and CLIP vision, which encoding does
    not call, at the mini model's."""
    whole, mini = AnyStoryConfig.sdxl().unet, AnyStoryConfig.mini()
    unet = dataclasses.replace(
        mini.unet, context_dim=whole.context_dim, adm_channels=whole.adm_channels
    )
    qformer = dataclasses.replace(mini.subject_qformer, output_dim=whole.context_dim)
    tiny.write_base(folder, model=dataclasses.replace(mini, unet=unet, subject_qformer=qformer))
    shutil.rmtree(folder / "vae")
    text = {"eos_token_id": 49407, "pad_token_id": 49407}
    clip_l = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, **text,
    )  # fmt: skip
    big_g = transformers.CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
        projection_dim=1280, hidden_act="gelu", **text,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025,
    )  # fmt: skip
    for name, module in (
        ("text_encoder", transformers.CLIPTextModel(clip_l)),
        ("text_encoder_2", transformers.CLIPTextModelWithProjection(big_g)),
        ("vae", vae),
    ):
        module.half().save_pretrained(folder / name)


NETWORKS = {
    "mask-rcnn": mask_rcnn,
    "mask2former": mask2former,
    "qwen2-vl": qwen2_vl,
    "encode": encode,
}


def write_scenes(folder: Path, files: Sequence[Path], *, with_masks: bool) -> None:
    """Shards of scenes, each with a caption of its own, and with masks unless they are wanted."""
    labels = shards.labels_png([], (SIZE[1], SIZE[0]))
    more = {"masks.png": labels} if with_masks else {}
    samples = [
        (file.stem, {"image.jpg": file.read_bytes(), "caption.txt": f"{i} {CAPTION}".encode()})
        for i, file in enumerate(files)
    ]
    shards.write_shards([(key, {**parts, **more}) for key, parts in samples], folder)


def measure(name: str, folder: Path, count: int) -> None:
    command, alone = NETWORKS[name](folder)
    source = folder / "pictures"
    source.mkdir()
    write_pictures(source, count)
    files = sorted((source / "images").iterdir())
    scenes = folder / "scenes"
    write_scenes(scenes, files, with_masks=not name.startswith("mask"))
    arguments = command(scenes)
    _, whole = timed(lambda: call(arguments))
    pictures = [Image.open(file).convert("RGB") for file in files]
    size = 8 if name in ("qwen2-vl", "encode") else 4  # what the commands take at once
    parts = [pictures[i : i + size] for i in range(0, len(pictures), size)]
    _, networks = timed(lambda: [alone(part) for part in parts])
    _, read = timed(lambda: [file.read_bytes() for file in files])
    print(
        f"{name}, {count} samples: {whole:.1f} CPU s as a whole command, the networks alone "
        f"{networks:.1f} ({networks / count:.1f} a sample), a plain read {read:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", help=", ".join(NETWORKS))
    parser.add_argument("--count", type=int, default=4)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in options.networks or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, Path(folder), options.count)


if __name__ == "__main__":
    main()
