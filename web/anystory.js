// What AnyStory adds to the editor: a viewer of the routes on RoutingMapPreview, what a node says of
// its work on all others, and as many inputs on SubjectRouter as are needed. Every node works without
// this file.

import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { sayOn } from "./note.js";
import { manageInputs, tidyAll } from "./router_inputs.js";
import { textsFor } from "./texts.js";
import { RouteViewer } from "./viewer.js";
import { attach, grow } from "./widget.js";

const CATEGORY = "AnyStory"; // of all our nodes
const LEAST_WIDTH = 340;
const viewers = new WeakMap(); // node -> RouteViewer

function addStyle() {
  for (const name of ["viewer", "note"]) {
    const link = document.createElement("link");
    link.rel = "stylesheet";
    link.href = new URL(`./${name}.css`, import.meta.url).href;
    document.head.append(link);
  }
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
  attach(node, "anystory_routes", viewer.element, () => viewer.height, { stretch: true });
  viewers.set(node, viewer);
  return viewer;
}

/** Show what a run of a node gave: its routes, and what it said. */
function show(node, output) {
  const entries = output?.anystory_routes;
  if (!entries) return sayOn(node, output?.text ?? []);
  if (viewers.get(node)?.entries === entries) return;
  viewerOf(node).show(entries, output.text);
  if (node.size[0] < LEAST_WIDTH) node.setSize([LEAST_WIDTH, node.size[1]]);
  grow(node);
}

/** Whether a node is one of ours. */
function isOurs(node) {
  return node?.constructor?.nodeData?.category === CATEGORY;
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
      const node = (output?.anystory_routes || output?.text) && nodeOf(key);
      if (isOurs(node)) show(node, output);
    }
  },
  nodeCreated(node) {
    if (isOurs(node)) watchOutputs(node, show);
    if (node.comfyClass === "SubjectRouter") manageInputs(node);
  },
});
