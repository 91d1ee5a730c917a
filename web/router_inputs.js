// SubjectRouter in the editor: one more subject and mask than is used. The node keeps its plain
// named inputs; only free slots are taken off the drawing, and they come back when needed. A saved
// graph names every linked input, so it opens with or without this script.

const NUMBERED = /^(?:subject|mask)_(\d+)$/;
const INPUT = 1; // LiteGraph's NodeSlotType.INPUT

/** The number in "subject_3" or "mask_3"; 0 for any other input. */
function numberOf(name) {
  const match = NUMBERED.exec(name);
  return match ? Number(match[1]) : 0;
}

/** How many pairs to show: one more than the highest that is linked, within those that exist. */
export function pairsToShow(inputs, most) {
  const used = inputs.filter((input) => input.link != null).map((input) => numberOf(input.name));
  return Math.min(most, Math.max(0, ...used) + 1);
}

function linkOf(graph, id) {
  return graph?.links?.get ? graph.links.get(id) : graph?.links?.[id];
}

/** Take inputs off the drawing; returns how many. */
function removeInputs(node, unwanted) {
  const before = node.inputs.length;
  for (let i = before - 1; i >= 0; i--) if (unwanted(node.inputs[i])) node.removeInput(i);
  return before - node.inputs.length;
}

/** Tell links and drawing that inputs are in other places now. A node that leaves a subgraph comes
 * with the numbers that its links had there; here they are those of other nodes' links. */
function renumber(node) {
  node.inputs.forEach((input, i) => {
    const link = linkOf(node.graph, input.link);
    if (link && String(link.target_id) === String(node.id)) link.target_slot = i;
  });
  // Nodes that are drawn by Vue take their slots anew on this event.
  node.graph?.trigger?.("node:slot-links:changed", { nodeId: node.id, slotType: INPUT });
}

/** Show the pairs that are needed, in the order of the node's definition. */
function tidy(node, definition) {
  const numbers = definition.map((slot) => numberOf(slot.name));
  const shown = pairsToShow(node.inputs, Math.max(...numbers));
  const wanted = definition.filter((slot, i) => numbers[i] <= shown);
  const rank = new Map(definition.map((slot, i) => [slot.name, i]));
  const sorted = (inputs) =>
    inputs.every((input, i) => !i || rank.get(inputs[i - 1].name) <= rank.get(input.name));

  const tight = node.size[1] <= node.computeSize()[1] + 1;
  const removed = removeInputs(node, (input) => numberOf(input.name) > shown);
  const present = new Set(node.inputs.map((input) => input.name));
  const missing = wanted.filter((slot) => !present.has(slot.name));
  for (const { name, type, ...rest } of missing) node.addInput(name, type, rest);
  if (!removed && !missing.length && sorted(node.inputs)) return;

  if (!sorted(node.inputs)) {
    const place = (input) => rank.get(input.name) ?? definition.length;
    node.inputs = [...node.inputs].sort((a, b) => place(a) - place(b));
  }
  renumber(node);
  const least = node.computeSize()[1];
  node.setSize([node.size[0], tight ? least : Math.max(least, node.size[1])]);
  node.setDirtyCanvas?.(true, true);
}

const waiting = new Map(); // node -> its definition

/** Tidy the nodes that wait for it. The editor calls this when it has built a graph, before it
 * remembers the graph's state; otherwise it happens as soon as the graph stands still. */
export function tidyAll() {
  for (const [node, definition] of waiting) {
    waiting.delete(node);
    if (node.graph) tidy(node, definition);
  }
}

/** Keep a new SubjectRouter tidy. Work waits until the graph stands still: while links are moved,
 * slots must stay where they are. */
export function manageInputs(node) {
  const definition = node.inputs.map(({ name, type, shape, localized_name, tooltip }) => ({
    name,
    type,
    shape,
    localized_name,
    tooltip,
  }));
  const soon = () => {
    if (!waiting.size) setTimeout(tidyAll);
    waiting.set(node, definition);
  };
  // The editor gives a configured node all its defined inputs, and then links pasted nodes by the
  // numbers of the slots that were saved.
  const configure = node.configure;
  node.configure = function (data) {
    const saved = new Set(data?.inputs?.map((input) => input.name));
    const result = configure.apply(this, arguments);
    const free = (input) => numberOf(input.name) && input.link == null && !saved.has(input.name);
    if (saved.size && this.inputs.some(free)) {
      const kept = this.inputs.filter((input) => !free(input));
      this.inputs.splice(0, this.inputs.length, ...kept); // removeInput would move others' links
      renumber(this);
    }
    return result;
  };
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...values) {
    soon();
    return before?.apply(this, values);
  };
  soon();
}
