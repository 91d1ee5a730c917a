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


def say(lines: Sequence[str]) -> tuple[str, ...]:
    """Show ``lines`` on the node that runs, to whoever queued it; returns them for its ``ui``.
    Editors ignore a message without text: web/anystory.js takes away what was said before."""
    context = get_executing_context()
    # Loaded already where there is one; a host without a server need not load it for us.
    module: Any = sys.modules.get("server")
    server = None if module is None else getattr(module.PromptServer, "instance", None)
    if lines and context is not None and server is not None:
        # Labels and names of files are other people's, and editors draw this as HTML.
        text = html.escape("\n".join(lines))
        server.send_progress_text(text, context.node_id, server.client_id)
    return tuple(lines)
