(function start() {
  const data = JSON.parse(byId("data").textContent);
  const box = byId("viewer");
  const state = { token: 0, generation: 0 };
  const pictures = new Map();
  const tiles = [];
  let current = null; // look, head and what is drawn

  const unique = (values) => [...new Set(values)];
  const value = (id) => byId(id).value;

  function fill(id, options, wanted) {
    const select = byId(id);
    select.replaceChildren(...options.map(([key, text]) => element("option", { value: key }, text)));
    if (options.some(([key]) => String(key) === String(wanted))) select.value = wanted;
  }

  const layerKey = (look) => `${look.component}/${look.layer}`;
  const matching = () => data.looks.filter((look) => look.method === value("method"));

  /** Offer what was captured of the chosen method and layer, keeping the choice where it exists. */
  function offer() {
    const looks = matching();
    const layers = new Map(looks.map((look) => [layerKey(look), `${look.layer} (${look.name})`]));
    fill("layer", [...layers], value("layer"));
    const here = looks.filter((look) => layerKey(look) === value("layer"));
    fill("step", here.map((look) => [look.step, look.dense ? `${look.step} (dense: ${look.dense})` : `${look.step}`]), value("step"));
    const look = here.find((one) => String(one.step) === value("step"));
    fill("head", look.heads.map((head, i) => [i, `${head} (${look.orders[i]})`]), value("head"));
    return look;
  }

  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  function about(look, head) {
    if (look.density === null) return `Dense attention (${look.dense || "no plan"}), head ${look.heads[head]}: every block is computed.`;
    const before = look.ordered ? `; in the model's order as many of the best blocks would hold ${percent(look.raster_recall[head])}` : "";
    const use = look.dense ? `This step is dense (${look.dense}); the plan made here serves later steps. ` : "";
    return `${use}Head ${look.heads[head]} computes ${percent(look.density[head])} of the blocks, which hold ${percent(look.recall[head])} of the softmax mass${before}.`;
  }

  function pictureOf(method) {
    const sheet = data.frames[method];
    if (!sheet) return Promise.resolve(null);
    if (!pictures.has(method)) {
      pictures.set(method, new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => reject(new Error("the frames cannot be decoded"));
        image.src = `data:image/webp;base64,${sheet.picture}`;
      }));
    }
    return pictures.get(method);
  }

  function drawMaps() {
    const { look, head, maps } = current;
    const gain = Number(value("gain"));
    const token = data.tokens[state.token];
    const kept = byId("show-kept").checked ? maps.kept : null;
    const placed = look.place ? look.place[head][state.token] : token;
    byId("ordered-box").hidden = maps.ordered === null;
    drawMap(byId("raster"), look, maps.raster, maps.ordered === null ? kept : null, gain, rowOf(look, Math.floor(token / look.block_q)));
    if (maps.ordered) drawMap(byId("ordered"), look, maps.ordered, kept, gain, rowOf(look, Math.floor(placed / look.block_q)));
    byId("raster-text").textContent = maps.ordered ? "the model's order" : "the model's order, which the method keeps for this head";
    byId("ordered-text").textContent = `order ${look.orders[head]}, blocks of ${look.block_q} × ${look.block_k} tokens`;
  }

  function tellToken() {
    const { look, head } = current;
    const token = data.tokens[state.token];
    const mass = look.mass ? ` ${percent(look.mass[head][state.token])} of its attention lies where the method computes.` : "";
    const text = data.prefix + data.suffix ? ` ${percent(look.extra[head][state.token])} goes to text.` : "";
    byId("token-text").textContent = `Token ${token} (${nameOf(data, token)}):${mass} ${percent(look.own[head][state.token])} stays in its own frame.${text}`;
    byId("peak-text").textContent = `${(100 * current.attention.peak).toFixed(2)} % on one token; colours follow the square root`;
    byId("token").value = state.token;
  }

  async function drawToken() {
    const generation = ++state.generation;
    const { look, head } = current;
    const attention = await tokenOf(data, look, head, state.token);
    const picture = await pictureOf(look.method);
    if (generation !== state.generation) return;
    current.attention = attention;
    const options = { onlySeen: byId("only-seen").checked, picture: Number(value("picture")) / 100 };
    drawFrames(data, tiles, data.frames[look.method], picture, attention, options, placeOf(data, data.tokens[state.token]));
    tellToken();
    drawMaps();
    box.dataset.token = data.tokens[state.token];
    box.dataset.look = `${look.method}/${look.layer}/${look.step}/${look.heads[head]}`;
  }

  const failed = (error) => { byId("about").textContent = error.message; };

  async function show() {
    const generation = ++state.generation;
    const look = offer();
    const head = Number(value("head"));
    const maps = await headOf(look, head);
    if (generation !== state.generation) return;
    current = { look, head, maps, attention: null };
    byId("about").textContent = [about(look, head), ...look.notes.map((note) => `${note[0].toUpperCase()}${note.slice(1)}.`)].join(" ");
    byId("only-seen").disabled = byId("show-kept").disabled = look.kept === null;
    await drawToken();
  }

  const refresh = () => show().catch(failed);

  function pickToken(index) {
    if (index === null || index === undefined) return;
    state.token = index;
    drawToken().catch(failed);
  }

  function onFrame(event, frame) {
    const [, height, width] = data.grid;
    const bounds = event.currentTarget.querySelector("canvas").getBoundingClientRect();
    // A press of Enter on a tile has no place: it takes the middle.
    const x = event.detail === 0 ? width / 2 : ((event.clientX - bounds.left) / bounds.width) * width;
    const y = event.detail === 0 ? height / 2 : ((event.clientY - bounds.top) / bounds.height) * height;
    pickToken(nearest(data, [frame, clamp(Math.floor(y), 0, height - 1), clamp(Math.floor(x), 0, width - 1)]));
  }

  function onMap(event, ordered) {
    const { look, head, maps } = current;
    const map = ordered ? maps.ordered : maps.raster;
    const cell = cellAt(event, look);
    byId("map-text").textContent = tellCell(look, map, ordered || maps.ordered === null ? maps.kept : null, cell);
    if (event.type !== "click") return;
    const block = look.rows[cell.y];
    const at = (i) => (ordered ? look.place[head][i] : data.tokens[i]) / look.block_q - 0.5;
    let best = 0;
    data.tokens.forEach((_, i) => { if (Math.abs(at(i) - block) < Math.abs(at(best) - block)) best = i; });
    pickToken(best);
  }

  function move(axis, sign) {
    const place = placeOf(data, data.tokens[state.token]);
    if (place) pickToken(nearest(data, place, axis, sign));
  }

  function turn(id, by) {
    const select = byId(id);
    const next = select.selectedIndex + by;
    if (next < 0 || next >= select.options.length) return;
    select.selectedIndex = next;
    refresh();
  }

  function toggle(id) {
    if (byId(id).disabled) return;
    byId(id).checked = !byId(id).checked;
    drawToken().catch(failed);
  }

  const KEYS = {
    ArrowLeft: () => move(2, -1), ArrowRight: () => move(2, 1), ArrowUp: () => move(1, -1), ArrowDown: () => move(1, 1),
    "<": () => move(0, -1), ",": () => move(0, -1), ">": () => move(0, 1), ".": () => move(0, 1),
    "[": () => turn("head", -1), "]": () => turn("head", 1), "-": () => turn("step", -1), "+": () => turn("step", 1), "=": () => turn("step", 1),
    k: () => toggle("show-kept"), o: () => toggle("only-seen"),
  };

  box.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || isEditing(event)) return;
    const act = KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });

  const [frames, height, width] = data.grid;
  for (let f = 0; f < frames; f++) {
    const canvas = element("canvas", { width: width * SCALE, height: height * SCALE });
    const tile = element("button", { type: "button", "aria-label": `Frame ${f}: choose a token` }, canvas, element("span", {}, `${f}`));
    tile.addEventListener("click", (event) => onFrame(event, f));
    tiles.push(tile);
  }
  byId("frames").append(...tiles);
  fill("method", unique(data.looks.map((look) => look.method)).map((name) => [name, name]));
  fill("token", data.tokens.map((token, i) => [i, `${token}: ${nameOf(data, token)}`]));
  const middle = [frames, height, width].map((size) => Math.floor(size / 2));
  state.token = nearest(data, middle) ?? 0;
  const first = matching();
  const sparse = first.filter((look) => look.dense === null && look.kept !== null);
  // Begin where the order of a head gains the most.
  const gains = (look) => look.heads.map((_, i) => look.recall[i] - (look.ordered ? look.raster_recall[i] : 1));
  const begin = sparse.reduce((a, b) => (Math.max(...gains(b)) > Math.max(...gains(a)) ? b : a), sparse[0] || first[0]);
  const best = begin.kept === null ? 0 : gains(begin).indexOf(Math.max(...gains(begin)));
  for (const [id, key] of [["layer", layerKey(begin)], ["step", begin.step], ["head", best]]) fill(id, [[key, ""]], key);
  for (const id of ["method", "layer", "head", "step"]) byId(id).addEventListener("change", refresh);
  byId("token").addEventListener("change", () => pickToken(Number(value("token"))));
  for (const id of ["show-kept", "only-seen"]) byId(id).addEventListener("change", () => drawToken().catch(failed));
  byId("gain").addEventListener("input", () => { byId("gain-text").textContent = value("gain"); drawMaps(); });
  byId("picture").addEventListener("input", () => { byId("picture-text").textContent = `${value("picture")} %`; drawToken().catch(failed); });
  for (const [id, ordered] of [["raster", false], ["ordered", true]]) {
    for (const type of ["pointermove", "click"]) byId(id).addEventListener(type, (event) => onMap(event, ordered));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => current && drawMaps());
  drawScale(byId("heat-scale"));
  refresh();
})();
