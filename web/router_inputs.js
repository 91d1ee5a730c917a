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

/** Show the pairs that are needed, in the order of the node's definition. */
function tidy(node, definition) {
  const numbers = definition.map((slot) => numberOf(slot.name));
  const shown = pairsToShow(node.inputs, Math.max(...numbers));
  const wanted = definition.filter((slot, i) => numbers[i] <= shown);
  const rank = new Map(definition.map((slot, i) => [slot.name, i]));
  const sorted = (inputs) =>
    inputs.every((input, i) => !i || rank.get(inputs[i - 1].name) <= rank.get(input.name));

  const tight = node.size[1] <= node.computeSize()[1] + 1;
  const before = node.inputs.length;
  for (let i = node.inputs.length - 1; i >= 0; i--) {
    if (numberOf(node.inputs[i].name) > shown) node.removeInput(i);
  }
  const removed = before - node.inputs.length;
  const present = new Set(node.inputs.map((input) => input.name));
  const missing = wanted.filter((slot) => !present.has(slot.name));
  for (const { name, type, ...rest } of missing) node.addInput(name, type, rest);
  if (!removed && !missing.length && sorted(node.inputs)) return;

  if (!sorted(node.inputs)) {
    const place = (input) => rank.get(input.name) ?? definition.length;
    node.inputs = [...node.inputs].sort((a, b) => place(a) - place(b));
  }
  node.inputs.forEach((input, i) => {
    const link = linkOf(node.graph, input.link);
    if (link) link.target_slot = i;
  });
  const least = node.computeSize()[1];
  node.setSize([node.size[0], tight ? least : Math.max(least, node.size[1])]);
  // Nodes that are drawn by Vue take their slots anew on this event.
  node.graph?.trigger?.("node:slot-links:changed", { nodeId: node.id, slotType: INPUT });
  node.setDirtyCanvas?.(true, true);
}

/** Keep a new SubjectRouter tidy. Work waits until the graph stands still: a graph that is being
 * loaded needs all slots until its links are in place. */
export function manageInputs(node) {
  const definition = node.inputs.map(({ name, type, shape, localized_name, tooltip }) => ({
    name,
    type,
    shape,
    localized_name,
    tooltip,
  }));
  let waiting = false;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      if (node.graph) tidy(node, definition);
    });
  };
  const before = node.onConnectionsChange;
  node.onConnectionsChange = function (...values) {
    soon();
    return before?.apply(this, values);
  };
  soon();
}
