"""Labels in any script: kept whole, and drawn wherever a font of the machine has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, features
from routes import halves, record_of

from anystory_core.bases.sdxl.config import AnyStoryConfig
from anystory_core.pictures import lettering
from anystory_core.pictures.figure import figure, overlay
from anystory_core.subject.label import clean_label, is_joiner

FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"  # three people, joined
FOXES = "\u0631\u0648\u0628\u0627\u0647\u200c\u0647\u0627"  # Persian, with a zero-width non-joiner
SNOWMAN = "\u2603\ufe0f"


def make_font(path: Path, letters: str) -> None:
    """A font whose letters are bars of different heights; a missing one is a dot."""
    order = [".notdef", *(f"u{ord(letter):x}" for letter in letters)]
    glyphs = {}
    for number, name in enumerate(order):
        pen = TTGlyphPen(None)
        top = 100 if number == 0 else 300 + 400 * number // len(order)
        for move, point in (("moveTo", (100, 0)), ("lineTo", (100, top)), ("lineTo", (900, top))):
            getattr(pen, move)(point)
        pen.lineTo((900, 0))
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap({ord(c): name for c, name in zip(letters, order[1:], strict=True)})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(order, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": path.stem, "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=900, usWinAscent=900)
    builder.setupPost()
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.save(path)


def forget() -> None:
    for cached in (lettering.parts, lettering._fonts, lettering._font, lettering._has):
        cached.cache_clear()
    lettering._glyph.cache_clear()


@pytest.fixture
def fonts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is all there is of fonts on the machine; empty yet."""
    monkeypatch.setattr(lettering, "font_folders", lambda: [tmp_path / "none", tmp_path])
    forget()
    yield tmp_path
    forget()


def files(text: str) -> list[tuple[str, str]]:
    return [(part.text, Path(part.file).stem) for part in lettering.parts(text)]


def drawn(text: str) -> torch.Tensor:
    page = Image.new("RGB", (200, 24))
    lettering.draw(page, (0, 0), text, 12, (255, 255, 255))
    return torch.frombuffer(bytearray(page.tobytes()), dtype=torch.uint8).reshape(24, 200, 3)


def test_latin_needs_no_font_of_the_machine(fonts: Path) -> None:
    assert lettering.short_label("red fox", 1) == "red fox"
    assert files("red fox") == [("red fox", "")]


def test_what_no_font_has_is_left_out(fonts: Path) -> None:
    assert lettering.short_label("\u72d0\u72f8", 2) == "subject 2"
    assert lettering.short_label("a \u72d0 fox", 2) == "a fox"
    assert lettering.short_label("\n\t", 3) == "subject 3"


def test_chinese_is_drawn_where_a_font_has_it(fonts: Path) -> None:
    (fonts / "broken.ttf").write_bytes(b"no font")
    make_font(fonts / "latin.ttf", "abc")
    make_font(fonts / "cjk" / "chinese.ttf", "\u72d0\u72f8 ")
    assert lettering.short_label("\u72d0\u72f8", 2) == "\u72d0\u72f8"
    assert files("\u72d0\u72f8") == [("\u72d0\u72f8", "chinese")]
    assert files("fox \u72d0") == [("fox ", ""), ("\u72d0", "chinese")]
    assert lettering.width("\u72d0\u72f8", 12) == 24
    assert drawn("\u72d0").any() and not torch.equal(drawn("\u72d0"), drawn("\u72f8"))


def test_one_font_for_all_of_a_label_comes_before_a_font_for_each_part(fonts: Path) -> None:
    make_font(fonts / "a.ttf", "\u72d0")
    make_font(fonts / "b.ttf", "fox \u72d0")
    assert files("fox \u72d0") == [("fox \u72d0", "b")]


def test_plain_styles_come_first(fonts: Path) -> None:
    for name in ("A-BoldItalic", "B-Regular", "C-Light"):
        make_font(fonts / f"{name}.ttf", "\u72d0")
    assert files("\u72d0") == [("\u72d0", "B-Regular")]


def test_joined_signs_stay_together(fonts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_font(fonts / "emoji.ttf", "\U0001f469\U0001f467\u2603")
    make_font(fonts / "persian.ttf", "".join(sorted(set(FOXES) - {"\u200c"})))
    assert features.check("raqm")  # in Pillow's own wheels
    for label in (FAMILY, SNOWMAN, FOXES):
        assert lettering.short_label(label, 1) == label
    assert [text for text, _ in files(f"a {FAMILY}")] == ["a ", FAMILY]
    assert lettering.short_label(FAMILY * 30, 1).count("\u200d") % 2 == 0  # cut between families
    # Without Raqm letters would stand alone and in the wrong order.
    monkeypatch.setattr(features, "check", lambda _: False)
    forget()
    assert lettering.short_label(FOXES, 3) == "subject 3"


def test_long_labels_are_cut(fonts: Path) -> None:
    make_font(fonts / "wide.ttf", "\u72d0")
    for text in ("x" * 99, "\u72d0" * 99):
        label = lettering.short_label(text, 1)
        assert label.endswith("~") and label[0] == text[0] and len(label) > 6
        assert lettering.width(label, 12) <= 12 * lettering.MOST_WIDTH
        assert len(label) <= lettering.MOST_LETTERS


def test_a_font_that_cannot_be_read_later_is_no_error(fonts: Path) -> None:
    (fonts / "folder.ttf").mkdir()
    assert lettering.short_label("\u72d0", 1) == "subject 1"


def test_figure_and_legend_draw_the_label(fonts: Path) -> None:
    """Another label is another picture, where the font has it; else they look the same."""
    pictures: list[list[torch.Tensor]] = []
    for there in (False, True):
        if there:
            make_font(fonts / "chinese.ttf", "\u72d0\u72f8")
            forget()
        pictures.append([])
        for label in ("\u72d0", "\u72f8"):
            record = record_of(AnyStoryConfig.mini(), halves(2), labels=(label, "owl"), steps=1)
            pictures[-1] += [
                figure(record, levels=record.levels), overlay(record, torch.zeros(64, 256, 3))
            ]  # fmt: skip
    (one, legend, other, other_legend), shown = pictures
    assert torch.equal(one, other) and torch.equal(legend, other_legend)
    assert not torch.equal(shown[0], shown[2]) and not torch.equal(shown[1], shown[3])


@pytest.mark.parametrize("label", [FAMILY, FOXES, SNOWMAN, "\u72d0 fox", "caf\u00e9"])
def test_labels_keep_what_joins_them(label: str) -> None:
    assert clean_label(label) == label == clean_label(f"  {label}\n")


def test_labels_are_one_line_of_what_can_be_read() -> None:
    assert clean_label("a\u202eb\tc\x00") == "a b c"
    assert clean_label("\u200d") == clean_label(" \n") == clean_label("\ufe0f") == "subject"
    assert clean_label("\u200dfox\u200c") == "fox"


@pytest.mark.parametrize("sign", ["x", FAMILY, "e\u0301", SNOWMAN])
def test_a_long_label_is_cut_between_signs(sign: str) -> None:
    label = clean_label(sign * 70)
    assert label == sign * (len(label) // len(sign)) and 55 <= len(label) <= 60
    assert clean_label(label) == label


def test_the_sixtieth_letter_is_the_last() -> None:
    letters = "a" * 59
    assert clean_label(letters + "bc") == letters + "b"
    for sign in ("e\u0301", SNOWMAN, FAMILY):  # goes as a whole where it does not fit as a whole
        assert clean_label(letters + sign + "c") == letters
    assert clean_label("X ray") == "X ray"


def test_signs_without_a_picture() -> None:
    for first, last in ((0x200C, 0x200D), (0xFE00, 0xFE0F), (0xE0020, 0xE007F)):
        assert is_joiner(chr(first)) and is_joiner(chr(last))
        assert not is_joiner(chr(first - 1)) and not is_joiner(chr(last + 1))
