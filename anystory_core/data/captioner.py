"""Captions by a vision-language model on a disk, such as Qwen2-VL and its successors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from .libraries import SetupError, library

Captioner = Callable[[Sequence[Image.Image], Sequence[Sequence[str]]], list[str]]


@dataclass(frozen=True, kw_only=True)
class CaptionSettings:
    """What the model is asked, and how long it may answer; the table of --config. ``words`` is
    added where the subjects have words; {words} are they."""

    prompt: str = (
        "Describe this picture in one sentence of at most forty words for an image generator: the "
        "subject, what it does, and where it is. Begin with the subject."
    )
    words: str = "Call what is in it by these words: {words}."
    most_tokens: int = 70
    longest_side: int = 768  # pictures are scaled down to it
    trim: bool = True  # to the last whole sentence, where the model did not come to an end


def load_captioner(path: str, device: Any, settings: CaptionSettings) -> Captioner:
    """A model of a local folder. DataError when it is none that answers to pictures."""
    transformers, torch = library("transformers"), library("torch")
    try:
        processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
        model = transformers.AutoModelForImageTextToText.from_pretrained(
            path, local_files_only=True, dtype="auto"
        )
        processor.tokenizer.padding_side = "left"  # so that all answers begin at the same place
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, AttributeError) as error:
        detail = " ".join(str(error).split())[:200]
        raise SetupError(
            f"--model: {path} holds no model that reads pictures and writes text ({detail})"
        ) from error
    model.to(device).eval()

    def caption(pictures: Sequence[Image.Image], words: Sequence[Sequence[str]]) -> list[str]:
        texts = [
            processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [{"type": "image"}, {"type": "text", "text": _ask(settings, w)}],
                    }
                ],
                tokenize=False,
                add_generation_prompt=True,
            )
            for w in words
        ]
        small = [_scaled(picture, settings.longest_side) for picture in pictures]
        inputs = processor(text=texts, images=small, padding=True, return_tensors="pt").to(device)
        with torch.no_grad():
            written = model.generate(**inputs, max_new_tokens=settings.most_tokens, do_sample=False)
        answers: list[str] = processor.batch_decode(
            written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return [
            with_words(_clean(answer, settings.trim), named)
            for answer, named in zip(answers, words, strict=True)
        ]

    return caption


def with_words(caption: str, words: Sequence[str]) -> str:
    """A caption that has every word, since routing by text finds subjects by them: those that the
    model left out follow it."""
    missing = [w for w in dict.fromkeys(words) if w.lower() not in caption.lower()]
    return ", ".join([caption.rstrip(".") if missing else caption, *missing]).lstrip(", ")


def _ask(settings: CaptionSettings, words: Sequence[str]) -> str:
    if not words:
        return settings.prompt
    return f"{settings.prompt} {settings.words.replace('{words}', ', '.join(dict.fromkeys(words)))}"


def _clean(answer: str, trim: bool) -> str:
    text = " ".join(answer.replace("\ufffd", "").split())
    end = text.rfind(". ")
    if trim and not text.endswith((".", "!", "?")) and end > 0:
        return text[: end + 1]
    return text


def _scaled(picture: Image.Image, longest: int) -> Image.Image:
    if max(picture.size) <= longest:
        return picture
    copy = picture.copy()
    copy.thumbnail((longest, longest))
    return copy
