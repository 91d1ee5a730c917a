// Elements of ours among a node's widgets.

import { app } from "../../scripts/app.js";

const MARGIN = 10; // pixels around an element
// Over nodes on the canvas the wheel zooms, and the middle button moves the canvas.
const FORWARDED = {
  wheel: "processMouseWheel",
  pointerdown: "processMouseDown",
  pointermove: "processMouseMove",
  pointerup: "processMouseUp",
};

/** The middle button moves the editor's canvas, wherever it is pressed. */
export function isMiddle({ type, button, buttons }) {
  return type === "pointermove" ? (buttons & 4) !== 0 : button === 1;
}

/** Put an element below a node's widgets; `height()` is what it needs, in pixels. What a node has
 * beyond that is shared by its elements that `stretch`. */
export function attach(node, name, element, height, { stretch }) {
  const needed = () => height() + 2 * MARGIN;
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: needed,
    ...(stretch ? {} : { getMaxHeight: needed }),
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // what is shown does not change a graph
  for (const [kind, forward] of Object.entries(FORWARDED)) {
    element.addEventListener(kind, (event) => {
      if (element.closest("[data-node-id]")) return; // Vue nodes pass on by themselves
      if (kind === "wheel" || isMiddle(event)) app.canvas?.[forward]?.(event);
    });
  }
  return widget;
}

/** Give a node the height that its widgets need. */
export function grow(node) {
  const [, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}
