// Reads the atlas of RoutingMapPreview: a picture whose grey levels, line by line, are the region
// ids of all blocks of the first step, then of the next step. The layout tells names and sizes.

/** Region ids of a picture's pixels: red level / `level`, rounded. */
export async function readAtlas(blob, layout) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const picture = await createImageBitmap(blob, options);
  const canvas = document.createElement("canvas");
  canvas.width = picture.width;
  canvas.height = picture.height;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(picture, 0, 0);
  picture.close();
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
  const ids = new Uint8Array(pixels.length / 4);
  for (let i = 0; i < ids.length; i++) ids[i] = Math.round(pixels[4 * i] / layout.level);
  return new Atlas(ids, layout);
}

/** Routes by step and block. A map is { ids, height, width }; block 0 stands for all blocks. */
export class Atlas {
  constructor(ids, layout) {
    this.layout = layout;
    this.blocks = Object.keys(layout.blocks).map(Number).sort((a, b) => a - b);
    this.regions = layout.labels.length;
    this.majorities = new Map();
    let place = 0;
    this.steps = layout.steps.map((step) => {
      const maps = new Map();
      for (const [block, height, width] of layout.grids[step.grid]) {
        const end = place + height * width;
        maps.set(block, { ids: ids.subarray(place, end), height, width });
        place = end;
      }
      return maps;
    });
  }

  /** The map of a block at a step, or null where nothing was recorded. */
  map(step, block) {
    return block ? (this.steps[step].get(block) ?? null) : this.majority(step);
  }

  /** What most blocks of a step say, on the finest grid. Coarser blocks vote for all they cover. */
  majority(step) {
    if (!this.majorities.has(step)) this.majorities.set(step, this.count(step));
    return this.majorities.get(step);
  }

  count(step) {
    const maps = [...this.steps[step].values()];
    if (!maps.length) return null;
    const finest = maps.reduce((a, b) => (b.ids.length > a.ids.length ? b : a));
    const { height, width } = finest;
    const votes = new Uint16Array(height * width * this.regions);
    for (const map of maps) {
      for (let y = 0, place = 0; y < height; y++) {
        const row = Math.floor((y * map.height) / height) * map.width;
        for (let x = 0; x < width; x++, place++) {
          votes[place * this.regions + map.ids[row + Math.floor((x * map.width) / width)]]++;
        }
      }
    }
    const ids = new Uint8Array(height * width);
    for (let place = 0; place < ids.length; place++) {
      const start = place * this.regions;
      for (let i = 1; i < this.regions; i++) {
        if (votes[start + i] > votes[start + ids[place]]) ids[place] = i;
      }
    }
    return { ids, height, width };
  }
}

/** Share of a map that each region has, 0 to 1. */
export function shares(map, regions) {
  const counts = new Array(regions).fill(0);
  for (const id of map.ids) counts[id]++;
  return counts.map((count) => count / map.ids.length);
}
