"""The story script: roles and panels in a few plain lines -> prompts, subsets of subjects, seeds.

    Style: children's picture book, soft light
    Role Fox: a red fox with a blue scarf
    Role Owl: a grey owl

    Panel: Fox walks through the snowy forest.
    Panel (Fox, Owl): The two friends watch the moon.
    Panel: An empty beach at night.

* ``Role NAME: description`` — one line per subject, in the order in which the subjects are
  connected. In a prompt the name is replaced by the description.
* ``Panel: text`` — a picture. Roles whose names stand in the text as whole words are in it.
  ``Panel (NAME, NAME): text`` says who is in it instead; those the text does not name are appended.
* ``Style: text`` — appended to every prompt; at most one.
* Empty lines and lines that begin with ``#`` are skipped; a line without a key continues the one
  before. Keys and names are read without regard to capitals.
* Full-width signs (``：（），、``) mean the same. Where a script has no spaces between words, as
  Chinese, Japanese and Thai, a name is found wherever it stands.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from .errors import AnyStoryError

_KEY = re.compile(r"^(style|role|panel)\b([^:：]*)[:：](.*)$", re.IGNORECASE)
_NAME = re.compile(r"[^\W_][\w'-]*(?: [^\W_][\w'-]*){0,3}")  # one to four words
# Letters of scripts without spaces: Thai to Myanmar, Khmer, kana, Chinese characters.
_UNSPACED = (
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
# No word goes on here: one of the two neighbours is no letter, or of a script without spaces.
_BEGIN = rf"(?:(?<!\w)|(?<={_UNSPACED})|(?={_UNSPACED}))"
_END = rf"(?:(?!\w)|(?<={_UNSPACED})|(?={_UNSPACED}))"
SEEDS = 2**64
MOST_PANELS = 64


class StoryError(AnyStoryError):
    """A script that cannot be read; names the line."""


@dataclass(frozen=True)
class Role:
    """A subject's name in the script and what a prompt says instead."""

    name: str
    description: str


@dataclass(frozen=True)
class Panel:
    """One picture: prompt for the text encoder, its subjects (numbers of roles, ascending), seed
    and the line as written."""

    prompt: str
    subjects: tuple[int, ...]
    seed: int
    text: str


@dataclass(frozen=True)
class Story:
    """A parsed script."""

    roles: tuple[Role, ...]
    panels: tuple[Panel, ...]


def parse_story(script: str, seed: int = 0) -> Story:
    """Read a script. Panel k gets ``seed + k``, so that one panel can be drawn again alone.

    StoryError names the line: an unknown key or role, a role defined twice, a role without a
    description, no panel.
    """
    style = ""
    roles: list[Role] = []
    drafts: list[tuple[int, str | None, str]] = []  # line number, list of names, text
    for number, key, argument, text in _statements(script):
        if key == "style":
            if argument or style or not text:
                raise StoryError(
                    f"line {number}: expected one line 'Style: text' in the whole script"
                )
            style = text
        elif key == "role":
            if drafts:
                raise StoryError(
                    f"line {number}: a role after the first panel; put all roles before the panels"
                )
            roles.append(_role(number, argument, text, roles))
        else:
            drafts.append((number, _names_of(number, argument), text))
    if not drafts:
        raise StoryError("script: it has no panel; add a line such as 'Panel: a quiet morning'")
    if len(drafts) > MOST_PANELS:
        raise StoryError(f"script: got {len(drafts)} panels, expected at most {MOST_PANELS}")
    panels = [
        _panel(number, names, text, roles, style, (seed + place) % SEEDS)
        for place, (number, names, text) in enumerate(drafts)
    ]
    return Story(tuple(roles), tuple(panels))


def _statements(script: str) -> list[tuple[int, str, str, str]]:
    """(line number, key, what stands between key and colon, text), continuation lines joined."""
    found: list[tuple[int, str, str, str]] = []
    for number, raw in enumerate(script.splitlines(), start=1):
        line = " ".join(raw.split())
        if not line or line.startswith("#"):
            continue
        match = _KEY.match(line)
        if match:
            key, argument, text = match.groups()
            found.append((number, key.casefold(), argument.strip(), text.strip()))
        elif found:
            first, key, argument, text = found[-1]
            found[-1] = (first, key, argument, f"{text} {line}".strip())
        else:
            raise StoryError(
                f"line {number}: got {line[:40]!r}, expected a line that begins with 'Style:', "
                "'Role NAME:' or 'Panel:'"
            )
    return found


def _role(number: int, name: str, description: str, before: list[Role]) -> Role:
    if not _NAME.fullmatch(name):
        raise StoryError(
            f"line {number}: got the role name {name!r}, expected one to four words of letters and "
            "digits, as in 'Role Fox: a red fox'"
        )
    if not description:
        raise StoryError(
            f"line {number}: role {name!r} has no description; write what the prompt should say, "
            f"as in 'Role {name}: a red fox'"
        )
    if any(_same(name, role.name) for role in before):
        raise StoryError(f"line {number}: role {name!r} is defined twice")
    return Role(name, description)


def _names_of(number: int, argument: str) -> str | None:
    """The text between the parentheses of 'Panel (A, B)'; None without parentheses."""
    if not argument:
        return None
    if not (argument.startswith(("(", "（")) and argument.endswith((")", "）"))):
        raise StoryError(
            f"line {number}: got 'Panel {argument[:40]}', expected 'Panel:' or "
            "'Panel (NAME, NAME):'"
        )
    return argument[1:-1]


def _panel(
    number: int, names: str | None, text: str, roles: list[Role], style: str, seed: int
) -> Panel:
    prompt, named = _describe(text, roles)
    chosen = named
    if names is not None:
        listed = [name for name in re.split("[,，、]", names) if name.strip()]
        chosen = sorted({_lookup(number, name, roles) for name in listed})
    missing = [roles[i].description for i in chosen if i not in named]
    parts = [prompt.rstrip(" .。") if missing or style else prompt, *missing, style]
    prompt = ", ".join(part for part in parts if part)
    if not prompt:
        raise StoryError(f"line {number}: an empty panel; write what the picture shows")
    return Panel(prompt, tuple(chosen), seed, text)


def _lookup(number: int, name: str, roles: list[Role]) -> int:
    wanted = " ".join(name.split())
    for i, role in enumerate(roles):
        if _same(wanted, role.name):
            return i
    known = ", ".join(role.name for role in roles) or "none"
    raise StoryError(f"line {number}: unknown role {wanted!r}, expected among: {known}")


def _describe(text: str, roles: list[Role]) -> tuple[str, list[int]]:
    """The text with names replaced by descriptions, and the numbers of the roles that it names.

    Names are whole words ('Ann' is not in 'Anna') where a script has spaces, and of overlapping
    names ('Fox', 'Fox Cub') the longer one is meant. All are replaced at once, so that a
    description is never read again."""
    if not roles:
        return text, []
    longest_first = sorted(range(len(roles)), key=lambda i: len(roles[i].name), reverse=True)
    names = "|".join(f"({re.escape(roles[i].name)})" for i in longest_first)
    pattern = re.compile(f"{_BEGIN}(?:{names}){_END}", re.IGNORECASE)
    named: set[int] = set()

    def describe(match: re.Match[str]) -> str:
        assert match.lastindex is not None  # one group per name
        number = longest_first[match.lastindex - 1]
        named.add(number)
        return roles[number].description

    return pattern.sub(describe, text), sorted(named)


def _same(a: str, b: str) -> bool:
    """Whether two names differ in capitals at most, by the rule that finds names in a text."""
    return re.fullmatch(re.escape(a), b, re.IGNORECASE) is not None
