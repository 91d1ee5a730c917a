// What AnyStory adds to the editor: a viewer of the routes on RoutingMapPreview, and as many inputs
// on SubjectRouter as are needed. Every node works without this file.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { manageInputs, tidyAll } from "./router_inputs.js";
import { textsFor } from "./texts.js";
import { isMiddle, RouteViewer } from "./viewer.js";

const LEAST_WIDTH = 340;
const MARGIN = 10; // pixels around the viewer
const NOTE = "$$node-text-preview"; // the editor's widget for what a node says
// Over nodes on the canvas the wheel zooms, and the middle button moves the canvas.
const FORWARDED = {
  wheel: "processMouseWheel",
  pointerdown: "processMouseDown",
  pointermove: "processMouseMove",
  pointerup: "processMouseUp",
};
const viewers = new WeakMap(); // node -> RouteViewer

function addStyle() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./viewer.css", import.meta.url).href;
  document.head.append(link);
}

/** A file that a node's output names. */
async function load({ filename, subfolder, type }) {
  const reply = await api.fetchApi(`/view?${new URLSearchParams({ filename, subfolder, type })}`);
  if (!reply.ok) throw new Error(`${filename}: ${reply.status} ${reply.statusText}`);
  return reply.blob();
}

/** The node's viewer, made when there is something to see for the first time. */
function viewerOf(node) {
  const known = viewers.get(node);
  if (known) return known;
  const texts = textsFor(app.extensionManager?.setting?.get("Comfy.Locale"));
  const viewer = new RouteViewer(load, texts, () => grow(node));
  const widget = node.addDOMWidget("anystory_routes", "anystory_routes", viewer.element, {
    serialize: false,
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => viewer.height + 2 * MARGIN,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // looking around does not change a graph
  for (const [kind, forward] of Object.entries(FORWARDED)) {
    viewer.element.addEventListener(kind, (event) => {
      if (viewer.element.closest("[data-node-id]")) return; // Vue nodes pass on by themselves
      if (kind === "wheel" || isMiddle(event)) app.canvas?.[forward]?.(event);
    });
  }
  viewers.set(node, viewer);
  return viewer;
}

function show(node, output) {
  const entries = output?.anystory_routes;
  if (!entries || viewers.get(node)?.entries === entries) return;
  if (!entries.length) {
    viewers.get(node)?.show(entries); // the editor shows the node's note
    return;
  }
  forgetNote(node); // of a run without routes; warnings are in the viewer
  viewerOf(node).show(entries, output.text);
  if (node.size[0] < LEAST_WIDTH) node.setSize([LEAST_WIDTH, node.size[1]]);
  grow(node);
}

/** Give a node the height that its widgets need. */
function grow(node) {
  const [, height] = node.computeSize();
  if (node.size[1] < height) node.setSize([node.size[0], height]);
  node.setDirtyCanvas?.(true, true);
}

/** Take away what a node said in an earlier run; the editor has no message for that. */
function forgetNote(node) {
  const note = node.widgets?.find((widget) => widget.name === NOTE);
  if (note) node.removeWidget(note);
  node.setDirtyCanvas?.(true, true);
}

/** Call `act(node, output)` after each run of a node. */
function watchOutputs(node, act) {
  const before = node.onExecuted;
  node.onExecuted = function (output) {
    before?.apply(this, arguments);
    act(this, output);
  };
}

/** The node of an output's key: "id"; inside of a subgraph "uuid:id", or the ids of the nodes on the
 * way to it, as in "12:5". */
function nodeOf(key) {
  const path = key.split(":");
  const id = path.pop();
  const root = app.rootGraph ?? app.graph;
  const inside = (graph, through) => graph?.getNodeById(through)?.subgraph;
  return (root.subgraphs?.get(path[0]) ?? path.reduce(inside, root))?.getNodeById(id);
}

app.registerExtension({
  name: "AnyStory",
  setup: addStyle,
  afterConfigureGraph: tidyAll,
  // A graph that is opened again, or from the history, gets outputs without being run.
  onNodeOutputsUpdated(outputs) {
    for (const [key, output] of Object.entries(outputs ?? {})) {
      const node = output?.anystory_routes && nodeOf(key);
      if (node?.comfyClass === "RoutingMapPreview") show(node, output);
    }
  },
  nodeCreated(node) {
    if (node.comfyClass === "RoutingMapPreview") watchOutputs(node, show);
    if (node.comfyClass === "EncodeSubject") {
      watchOutputs(node, (self, output) => output?.text?.length || forgetNote(self));
    }
    if (node.comfyClass === "SubjectRouter") manageInputs(node);
  },
});
