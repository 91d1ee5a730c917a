"""What a node says of its work, under its widgets.

The text in a node's ``ui`` reaches whoever reads the history; the editors draw only the text of
their own nodes, and that of the message which nodes with progress send.
"""

from __future__ import annotations

import html
import sys
from collections.abc import Sequence
from typing import Any

from comfy_execution.utils import get_executing_context

_told: set[tuple[str | None, str]] = set()  # clients and nodes that show something of ours


def say(lines: Sequence[str]) -> tuple[str, ...]:
    """Show ``lines`` on the node that runs, to whoever queued it; returns them for its ``ui``.
    Without lines nothing is shown, and what the node said before goes."""
    context = get_executing_context()
    # Loaded already where there is one; a host without a server need not load it for us.
    module: Any = sys.modules.get("server")
    server = None if module is None else getattr(module.PromptServer, "instance", None)
    if context is not None and server is not None:
        place = server.client_id, context.node_id
        if lines or place in _told:
            # Labels and names of files are other people's, and editors draw this as HTML.
            text = html.escape("\n".join(lines))
            server.send_progress_text(text, context.node_id, server.client_id)
        (_told.add if lines else _told.discard)(place)
    return tuple(lines)
