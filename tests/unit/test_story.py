"""The story script: what it means, and what is said about one that cannot be read."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anystory_core.story import MOST_PANELS, SEEDS, StoryError, parse_story

SCRIPT = """
# a comment
Style: soft light
role Fox: a red fox
Role Fox Cub: a small fox
ROLE Ann: a girl in blue

Panel: Fox meets the fox cub,
   and Anna waves.
Panel (ann, Fox): A quiet evening.
Panel: An empty beach.
"""


def test_prompts_subjects_and_seeds() -> None:
    story = parse_story(SCRIPT, seed=7)
    assert [role.name for role in story.roles] == ["Fox", "Fox Cub", "Ann"]
    first, second, third = story.panels
    # The longer of overlapping names is meant, and Ann is not in Anna.
    assert first.prompt == "a red fox meets the a small fox, and Anna waves, soft light"
    assert first.subjects == (0, 1)
    # Subjects keep the script's order; those that the text does not name are appended.
    assert second.prompt == "A quiet evening, a red fox, a girl in blue, soft light"
    assert second.subjects == (0, 2)
    assert third.prompt == "An empty beach, soft light" and third.subjects == ()
    assert [panel.seed for panel in story.panels] == [7, 8, 9]


@pytest.mark.parametrize(
    ("name", "text", "prompt"),
    [
        ("小狐", "小狐在雪地里", "x在雪地里"),
        ("小狐", "雪地里的小狐。", "雪地里的x。"),
        ("Fox", "森林里的Fox在跑", "森林里的x在跑"),
        ("ポチ", "ポチは雪の中を走る", "xは雪の中を走る"),
        ("แมว", "เห็นแมวดำ", "เห็นxดำ"),
        ("Ann", "Anna和Joann", None),
        ("Åsa", "Åsas", None),
        ("여우", "여우들", None),
    ],
)
def test_names_in_scripts_without_spaces(name: str, text: str, prompt: str | None) -> None:
    (panel,) = parse_story(f"Role {name}：x\nPanel：{text}").panels
    assert panel.subjects == (() if prompt is None else (0,))
    assert panel.prompt == (prompt or text)


def test_full_width_signs() -> None:
    script = (
        "Style：水彩\nRole 狐：a fox\nRole 鸟：a bird\nPanel（狐，鸟）：雪。\nPanel (鸟、狐): 海"
    )
    prompts = [panel.prompt for panel in parse_story(script).panels]
    assert prompts == ["雪, a fox, a bird, 水彩", "海, a fox, a bird, 水彩"]


def test_a_description_is_never_read_again() -> None:
    story = parse_story("Role Sun: the Moon\nRole Moon: the Sun\nPanel: Sun and Moon")
    assert story.panels[0].prompt == "the Moon and the Sun"


@pytest.mark.parametrize(
    ("name", "written"),
    [("Ali", "ALİ"), ("Ali", "alı"), ("Ǆ", "ǆ"), ("Σας", "σασ"), ("Åse", "åſe")],
)
def test_capitals_of_every_script(name: str, written: str) -> None:
    """One rule decides in texts and in lists; these pairs have no common lower case."""
    story = parse_story(f"Role {name}: a girl\nPanel: {written} runs\nPanel ({written}): A hill")
    assert [panel.subjects for panel in story.panels] == [(0,), (0,)]
    assert story.panels[0].prompt == "a girl runs"


def test_keys_in_other_capitals() -> None:
    story = parse_story("ſTYLE: soft\nRole A: x\nPANEL: A")
    assert [panel.prompt for panel in story.panels] == ["x, soft"]


def test_seeds_wrap() -> None:
    story = parse_story("Panel: a\nPanel: b", seed=SEEDS - 1)
    assert [panel.seed for panel in story.panels] == [SEEDS - 1, 0]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("", "it has no panel"),
        ("Role A: x", "it has no panel"),
        ("hello\nPanel: a", "line 1: got 'hello', expected a line that begins with"),
        ("Role A:\nPanel: a", "line 1: role 'A' has no description"),
        ("Role A: x\nrole a: y\nPanel: a", "line 2: role 'a' is defined twice"),
        ("Role Ali: x\nRole ALİ: y\nPanel: a", "line 2: role 'ALİ' is defined twice"),
        ("Panel: a\nRole A: x", "line 2: a role after the first panel"),
        ("Role A: x\nPanel (B): a", "line 2: unknown role 'B', expected among: A"),
        ("Panel (B): a", "line 1: unknown role 'B', expected among: none"),
        ("Style: a\nStyle: b\nPanel: c", "line 2: expected one line 'Style: text'"),
        ("Role A+B: x\nPanel: a", "line 1: got the role name 'A\\+B'"),
        ("Panel B: a", "line 1: got 'Panel B', expected 'Panel:'"),
        ("Panel:", "line 1: an empty panel"),
        ("Panel: a\n" * (MOST_PANELS + 1), f"got {MOST_PANELS + 1} panels, expected at most"),
    ],
)
def test_what_cannot_be_read(script: str, message: str) -> None:
    with pytest.raises(StoryError, match=message):
        parse_story(script)


# Letters of which two have one capital, or whose capital has two letters.
ODD_LETTERS = "iıİIſsSßẞKkKåÅÅσςΣǆǅǄŉŋﬁﬅﬆµμΜ"
NAMES = st.one_of(
    st.text(ODD_LETTERS, min_size=1, max_size=4),
    st.text(st.characters(categories=("L", "N")), min_size=1, max_size=6),
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(NAMES, NAMES)
def test_names_of_any_letters(name: str, other: str) -> None:
    """Texts and lists agree on which words are a role's name, whatever its letters."""
    script = f"Role {name}: x\nPanel: {name}"
    assert parse_story(script).panels[0].prompt == "x"
    for written in (other, name.upper(), name.lower(), name.title()):
        if not written.isalnum():
            continue  # İ in small letters is i and a mark that belongs to no word
        found = parse_story(f"Role {name}: x\nPanel: {written}").panels[0].subjects
        try:
            listed = parse_story(f"Role {name}: x\nPanel ({written}): a").panels[0].subjects
        except StoryError:
            listed = ()
        assert found == listed


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_words(text: str) -> None:
    for script in (text, f"Role A: x\nPanel: {text}"):
        try:
            story = parse_story(script)
        except StoryError as error:
            assert str(error)
        else:
            assert story.panels
            assert all(0 <= i < len(story.roles) for p in story.panels for i in p.subjects)
