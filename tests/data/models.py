"""Models of the kinds that the commands load, at toy sizes and untrained, saved as theirs are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.convert_slow_tokenizer import bytes_to_unicode

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{% for c in m['content'] %}"
    "{% if c['type']=='image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{c['text']}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Qwen2VLSizes:
    """Widths of Qwen2-VL; ``vocabulary`` counts words that no text uses, beside the letters."""

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    most_pixels: int
    vocabulary: int = 0
    dtype: torch.dtype = torch.float32


TOY = Qwen2VLSizes(
    text={
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
    },
    vision={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
    most_pixels=4 * 56 * 56,
)  # fmt: skip


def write_qwen2_vl(folder: Path, sizes: Qwen2VLSizes = TOY) -> None:
    """Qwen2-VL whose words are single letters."""
    torch.manual_seed(0)
    letters = [*bytes_to_unicode().values(), *SPECIAL]
    letters += [f"unused {number}" for number in range(sizes.vocabulary)]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={letter: i for i, letter in enumerate(letters)},
        merges=[],
        additional_special_tokens=list(SPECIAL),
    )
    number = {name: int(tokenizer.convert_tokens_to_ids(name)) for name in SPECIAL}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=sizes.most_pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(),
        chat_template=TEMPLATE,
    )
    text = {
        **sizes.text,
        "vocab_size": len(tokenizer),
        "bos_token_id": number["<|im_start|>"],
        "eos_token_id": number["<|im_end|>"],
        "pad_token_id": number["<|endoftext|>"],
    }
    config = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=dict(sizes.vision),
        image_token_id=number["<|image_pad|>"],
        video_token_id=number["<|video_pad|>"],
        vision_start_token_id=number["<|vision_start|>"],
        vision_end_token_id=number["<|vision_end|>"],
    )
    model = transformers.Qwen2VLForConditionalGeneration(config).to(sizes.dtype)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def write_mask2former(folder: Path) -> None:
    """Mask2Former of 8 queries that knows cats and dogs."""
    torch.manual_seed(0)
    swin = transformers.SwinConfig(
        image_size=64, embed_dim=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=16, dim_feedforward=16, encoder_layers=2, decoder_layers=2,
        num_attention_heads=2, num_queries=8, id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
    )  # fmt: skip
    transformers.Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    transformers.Mask2FormerImageProcessor(size=size).save_pretrained(folder)


def write_sam2(folder: Path) -> None:
    """SAM 2 with a backbone of four small stages."""
    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 1, 1],
        "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [8, 4, 4, 4], "global_attention_blocks": [],
        "window_positional_embedding_background_size": [2, 2], "num_attention_heads": 1,
    }  # fmt: skip
    vision = {
        "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]], "fpn_hidden_size": 32,
    }  # fmt: skip
    config = transformers.Sam2Config(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 32, "image_size": 64},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2,
                             "iou_head_hidden_dim": 16},
    )  # fmt: skip
    transformers.Sam2Model(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    images = transformers.Sam2ImageProcessor(size=size, mask_size={"height": 16, "width": 16})
    transformers.Sam2Processor(images, target_size=64).save_pretrained(folder)
