const VEIL = 0.2; // how much shows through where nothing is computed

/** Draw a block map: colour is the square root of the mass, grey is not computed, the frame marks the token's row. */
function drawMap(canvas, look, map, kept, gain, marked) {
  const [tall, wide] = [look.rows.length, look.columns];
  [canvas.width, canvas.height] = [wide, tall];
  const context = canvas.getContext("2d");
  const image = context.createImageData(wide, tall);
  const grey = matchMedia("(prefers-color-scheme: dark)").matches ? 70 : 205;
  for (let i = 0; i < wide * tall; i++) {
    const colour = ramp(Math.sqrt(gain / 5) * (map.levels[i] / 255));
    const share = kept ? VEIL + (1 - VEIL) * (kept[i] / 255) : 1;
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = colour[c] * share + grey * (1 - share);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  if (marked !== null) {
    context.fillStyle = "rgba(255, 255, 255, .28)";
    context.fillRect(0, marked, wide, 1);
  }
}

/** Row of the map nearest to a query block. */
function rowOf(look, block) {
  let best = 0;
  look.rows.forEach((row, i) => { if (Math.abs(row - block) < Math.abs(look.rows[best] - block)) best = i; });
  return best;
}

/** Cell of a map under the pointer. */
function cellAt(event, look) {
  const bounds = event.currentTarget.getBoundingClientRect();
  const x = clamp(Math.floor(((event.clientX - bounds.left) / bounds.width) * look.columns), 0, look.columns - 1);
  const y = clamp(Math.floor(((event.clientY - bounds.top) / bounds.height) * look.rows.length), 0, look.rows.length - 1);
  return { x, y };
}

function tellCell(look, map, kept, cell) {
  const i = cell.y * look.columns + cell.x;
  const mass = map.peak * (map.levels[i] / 255) ** 2;
  const keys = look.group === 1 ? `key block ${cell.x}` : `key blocks ${cell.x * look.group} to ${(cell.x + 1) * look.group - 1}`;
  const state = kept ? (kept[i] === 0 ? ", not computed" : kept[i] === 255 ? ", computed" : `, ${Math.round(kept[i] / 2.55)} % computed`) : "";
  return `query block ${look.rows[cell.y]}, ${keys}: ${(100 * mass).toFixed(2)} % of the row's mass${state}`;
}
