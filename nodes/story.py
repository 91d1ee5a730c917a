"""AnyStoryPanels: a story of several pictures from one short script."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..anystory_core.errors import RoutingError
from ..anystory_core.story import SEEDS, Panel, Story, parse_story
from .host import ids
from .host.sockets import Routing

EXAMPLE = """Style: a colourful picture
Role Rex: a green dinosaur
Role Polly: a red parrot

Panel: Rex on a beach.
Panel: Polly in the snow.
Panel: Rex and Polly in a forest.
Panel: a city at night.
"""


def panel_routing(routing: Routing, panel: Panel) -> Routing:
    """The routing of a panel's own subjects; the rule stays the same."""
    return dataclasses.replace(
        routing,
        subjects=tuple(routing.subjects[i] for i in panel.subjects),
        masks=tuple(routing.masks[i] for i in panel.subjects),
        labels=tuple(routing.labels[i] for i in panel.subjects) if routing.labels else (),
    )


def check_roles(story: Story, routing: Routing) -> None:
    """RoutingError unless every role has its subject."""
    names = [role.name for role in story.roles]
    labels = [subject.label for subject in routing.subjects]
    if len(names) != len(labels):
        raise RoutingError(
            f"routing: it has {len(labels)} subjects ({', '.join(labels) or 'none'}), the script "
            f"has {len(names)} roles ({', '.join(names) or 'none'}); connect one subject for each "
            "role, in the script's order"
        )


class AnyStoryPanels(io.ComfyNode):
    """See ``define_schema``."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return ids.schema(
            node_id="AnyStoryPanels",
            display_name="AnyStory Panels",
            category=ids.CATEGORY,
            description="Reads a short script and gives one prompt, one routing and one seed for "
            "each panel, as lists: the nodes behind it run once for each panel.",
            inputs=[
                ids.Routing.Input(
                    "routing",
                    tooltip="From Subject Router: subject 1 plays the script's first role, and so "
                    "on.",
                ),
                io.String.Input(
                    "script",
                    multiline=True,
                    default=EXAMPLE,
                    tooltip="'Style: ...' once; 'Role NAME: what a prompt says'; then one 'Panel: "
                    "...' line per picture. A name in a panel puts that subject into it; 'Panel "
                    "(NAME, NAME): ...' says who is in it instead.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=SEEDS - 1,
                    control_after_generate=True,
                    tooltip="Seed of the first panel; each next panel has one more.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="prompts", is_output_list=True),
                ids.Routing.Output(display_name="routings", is_output_list=True),
                io.Int.Output(display_name="seeds", is_output_list=True),
            ],
        )

    @classmethod
    @ids.named_errors
    def execute(cls, routing: Routing, script: str, seed: int = 0) -> io.NodeOutput:
        story = parse_story(script, seed)
        check_roles(story, routing)
        return io.NodeOutput(
            [panel.prompt for panel in story.panels],
            [panel_routing(routing, panel) for panel in story.panels],
            [panel.seed for panel in story.panels],
        )
