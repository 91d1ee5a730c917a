// Draws one map of routes, over the picture where there is one.

const SIDE = 512; // longest side of the canvas, in its own pixels
const TINT = 0.5; // opacity over a picture
const EMPTY = "#2e2e36";

/** [r, g, b] of "#rrggbb". */
function rgb(colour) {
  return [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
}

/** Give the canvas the proportions of the picture, or of the map without one. */
export function fit(canvas, map, picture) {
  const width = picture?.width ?? map.width;
  const height = picture?.height ?? map.height;
  const scale = SIDE / Math.max(width, height);
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
}

/** Paint `map` with the regions for which `shown` is true; `marker` is a place in it or null. */
export function paint(canvas, { map, picture, colours, shown, marker }) {
  const context = canvas.getContext("2d");
  const { width, height } = canvas;
  context.fillStyle = EMPTY;
  context.fillRect(0, 0, width, height);
  if (picture) context.drawImage(picture, 0, 0, width, height);
  if (!map) return;
  const tints = colours.map(rgb);
  const tiles = new ImageData(map.width, map.height);
  map.ids.forEach((id, place) => {
    if (!shown[id]) return;
    tiles.data.set([...tints[id], 255], 4 * place);
  });
  const small = document.createElement("canvas");
  small.width = map.width;
  small.height = map.height;
  small.getContext("2d").putImageData(tiles, 0, 0);
  context.save();
  context.imageSmoothingEnabled = false;
  context.globalAlpha = picture ? TINT : 1;
  context.drawImage(small, 0, 0, width, height);
  context.restore();
  outline(context, map, colours, shown, width / map.width, height / map.height);
  if (marker != null) {
    const x = (marker % map.width) * (width / map.width);
    const y = Math.floor(marker / map.width) * (height / map.height);
    context.lineWidth = 2;
    context.strokeStyle = "#ffffff";
    context.strokeRect(x, y, width / map.width, height / map.height);
  }
}

/** A line in a region's colour along its border, so that regions stay apart over any picture. */
function outline(context, map, colours, shown, stepX, stepY) {
  context.lineWidth = 2;
  colours.forEach((colour, region) => {
    if (!shown[region]) return;
    const inside = (x, y) =>
      x >= 0 && y >= 0 && x < map.width && y < map.height && map.ids[y * map.width + x] === region;
    context.beginPath();
    for (let y = 0; y < map.height; y++) {
      for (let x = 0; x < map.width; x++) {
        if (!inside(x, y)) continue;
        const [left, top] = [x * stepX + 1, y * stepY + 1];
        const [right, bottom] = [(x + 1) * stepX - 1, (y + 1) * stepY - 1];
        const line = (ax, ay, bx, by) => {
          context.moveTo(ax, ay);
          context.lineTo(bx, by);
        };
        if (!inside(x - 1, y)) line(left, top, left, bottom);
        if (!inside(x + 1, y)) line(right, top, right, bottom);
        if (!inside(x, y - 1)) line(left, top, right, top);
        if (!inside(x, y + 1)) line(left, bottom, right, bottom);
      }
    }
    context.strokeStyle = colour;
    context.stroke();
  });
}
