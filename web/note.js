// What a node says of its work, below its widgets. The editor's own text previews go when a job ends.

import { attach, grow, isMiddle } from "./widget.js";

const NAME = "anystory_note";
const PICTURES = "$$canvas-image-preview"; // the editor's widget for a node's pictures
const LEAST_WIDTH = 60; // pixels of a note that has been laid out
const notes = new WeakMap(); // node -> the widget that shows its note

/** Show lines of text on a node, in place of those of the run before; none take the note away. */
export function sayOn(node, lines) {
  if (!lines.length) return forget(node);
  const note = notes.get(node) ?? make(node);
  // Labels and names of files are other people's: text, never HTML.
  note.element.replaceChildren(
    ...lines.map((line) => Object.assign(document.createElement("p"), { textContent: line })),
  );
  grow(node);
}

function make(node) {
  const element = document.createElement("div");
  element.className = "anystory-note";
  element.setAttribute("role", "status"); // screen readers tell of a change
  // Text can be selected: pressing on it must not drag the node.
  for (const kind of ["pointerdown", "pointermove", "pointerup"]) {
    element.addEventListener(kind, (event) => {
      if (!isMiddle(event)) event.stopPropagation();
    });
  }
  let height = 0; // while the editor hides the note, or gives it no width yet, the last that was seen
  const needed = () => {
    const seen = [...element.children].reduce((sum, line) => sum + line.offsetHeight, 0);
    if (element.clientWidth > LEAST_WIDTH) height = seen;
    return height;
  };
  const widget = attach(node, NAME, element, needed, { stretch: false });
  const pictures = node.widgets.findIndex(({ name }) => name === PICTURES);
  if (pictures >= 0) node.widgets.splice(pictures, 0, ...node.widgets.splice(-1)); // above them
  new ResizeObserver(() => grow(node)).observe(element);
  notes.set(node, widget);
  return widget;
}

function forget(node) {
  const note = notes.get(node);
  if (!note) return;
  notes.delete(node);
  node.removeWidget(note);
  node.setDirtyCanvas?.(true, true);
}
