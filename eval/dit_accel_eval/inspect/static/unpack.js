/** Bytes of a blob, unpacked when first asked for. */
const unpacked = new Map();

async function inflate(id) {
  const text = atob(byId(`blob-${id}`).textContent);
  const packed = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  if (typeof DecompressionStream === "undefined") throw new Error("this browser is too old: it cannot unpack deflate streams");
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function bytesOf(id) {
  if (!unpacked.has(id)) unpacked.set(id, inflate(id));
  return unpacked.get(id);
}

/** Everything that one head of one look needs. */
async function headOf(look, head) {
  const size = look.rows.length * look.columns;
  const slice = async (id, length) => (id === null ? null : (await bytesOf(id)).subarray(head * length, (head + 1) * length));
  const map = async (packed) => (packed === null ? null : { levels: await slice(packed.blob, size), peak: packed.peak[head] });
  const [raster, ordered, kept] = await Promise.all([map(look.raster), map(look.ordered), slice(look.kept, size)]);
  return { raster, ordered, kept };
}

/** Attention of one sampled token over the grid, and what is computed of it. */
async function tokenOf(data, look, head, token) {
  const visual = data.grid[0] * data.grid[1] * data.grid[2];
  const row = head * data.tokens.length + token;
  const levels = (await bytesOf(look.attention.blob)).subarray(row * visual, (row + 1) * visual);
  const wide = Math.ceil(visual / 8);
  const bits = look.visible === null ? null : (await bytesOf(look.visible)).subarray(row * wide, (row + 1) * wide);
  const seen = (i) => bits === null || ((bits[i >> 3] >> (i & 7)) & 1) === 1;
  return { levels, seen, peak: look.attention.peak[row] };
}
