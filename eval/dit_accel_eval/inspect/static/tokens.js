/** Where a token sits: [frame, row, column]; null for text. */
function placeOf(data, token) {
  const [frames, height, width] = data.grid;
  const at = token - data.prefix;
  if (at < 0 || at >= frames * height * width) return null;
  return [Math.floor(at / (height * width)), Math.floor(at / width) % height, at % width];
}

function nameOf(data, token) {
  const place = placeOf(data, token);
  return place ? `frame ${place[0]}, row ${place[1]}, column ${place[2]}` : `text ${token}`;
}

/** Sampled token nearest to a place; beyond it in a direction, if one is given. */
function nearest(data, place, axis = null, sign = 0) {
  let best = null;
  let least = Infinity;
  data.tokens.forEach((token, i) => {
    const other = placeOf(data, token);
    if (!other) return;
    const away = other.map((value, a) => value - place[a]);
    if (axis !== null && away[axis] * sign <= 0) return;
    // Along the direction asked for a step is cheap, across it is not.
    const cost = away.reduce((sum, value, a) => sum + Math.abs(value) * (axis === null || a === axis ? 1 : 50) * (a === 0 ? 3 : 1), 0);
    if (cost < least) [best, least] = [i, cost];
  });
  return best;
}

const SCALE = 8; // pixels for each token of a frame

/** Draw every frame of the grid: the picture in grey, the heat over it, the token framed. */
function drawFrames(data, tiles, sheet, picture, attention, options, chosen) {
  const [frames, height, width] = data.grid;
  const heat = element("canvas", { width, height }).getContext("2d");
  for (let f = 0; f < frames; f++) {
    const context = tiles[f].querySelector("canvas").getContext("2d");
    const image = heat.createImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      const token = f * height * width + i;
      const level = options.onlySeen && !attention.seen(token) ? 0 : attention.levels[token] / 255;
      ramp(level).forEach((value, c) => { image.data[4 * i + c] = value; });
      image.data[4 * i + 3] = sheet ? 255 * Math.min(1, 1 - options.picture + level * 1.2) : 255;
    }
    heat.putImageData(image, 0, 0);
    const [w, h] = [context.canvas.width, context.canvas.height];
    context.fillStyle = "#000";
    context.fillRect(0, 0, w, h);
    if (picture) {
      const at = clamp(f, 0, sheet.count - 1);
      const x = (at % sheet.columns) * sheet.width;
      context.drawImage(picture, x, Math.floor(at / sheet.columns) * sheet.height, sheet.width, sheet.height, 0, 0, w, h);
    }
    context.imageSmoothingEnabled = false;
    context.drawImage(heat.canvas, 0, 0, w, h);
    const mine = chosen !== null && chosen[0] === f;
    tiles[f].setAttribute("aria-current", String(mine));
    if (mine) {
      context.strokeStyle = "#fff";
      context.lineWidth = 2;
      context.strokeRect(chosen[2] * SCALE, chosen[1] * SCALE, SCALE, SCALE);
    }
  }
}
