/** Heat map of the share computed: layers against heads at one step, or layers against steps. */
function densityMap(cubes) {
  const MARGIN = { left: 34, top: 20 };
  const canvas = byId("density-map");
  let cells = null;
  let cursor = null;

  const current = () => cubes[Number(byId("density-choice").value)];

  function table() {
    const cube = current();
    if (byId("density-view").value === "heads") {
      const at = Number(byId("density-step").value);
      const rows = cube.values[at];
      const name = (y, x) => `${cube.layers[y]}, head ${x}, step ${cube.steps[at]}`;
      return { rows, name, columns: rows[0].map((_, x) => x), axis: "head" };
    }
    const rows = cube.layers.map((_, layer) => cube.values.map((step) => {
      const there = step[layer].filter((value) => value >= 0);
      return there.length ? there.reduce((a, b) => a + b, 0) / there.length : -1;
    }));
    return { rows, name: (y, x) => `${cube.layers[y]}, step ${cube.steps[x]}, mean of heads`, columns: cube.steps, axis: "step" };
  }

  function draw() {
    cells = table();
    const [tall, wide] = [cells.rows.length, cells.columns.length];
    const room = Math.max(canvas.parentElement.clientWidth - MARGIN.left - 4, 120);
    const size = clamp(Math.floor(Math.min(room / wide, 420 / tall)), 9, 30);
    const density = window.devicePixelRatio || 1;
    const [width, height] = [MARGIN.left + wide * size, MARGIN.top + tall * size];
    [canvas.width, canvas.height] = [width * density, height * density];
    [canvas.style.width, canvas.style.height] = [`${width}px`, `${height}px`];
    const context = canvas.getContext("2d");
    context.scale(density, density);
    context.font = "11px system-ui, 'DejaVu Sans', sans-serif";
    context.fillStyle = css("--soft");
    const skip = Math.ceil(22 / size);
    context.fillText(cells.axis, 0, 12);
    cells.columns.forEach((name, x) => { if (x % skip === 0) context.fillText(name, MARGIN.left + x * size + 1, 12); });
    cells.rows.forEach((row, y) => {
      context.fillStyle = css("--soft");
      if (y % Math.ceil(13 / size) === 0) context.fillText(y, 4, MARGIN.top + (y + 0.5) * size + 4);
      row.forEach((value, x) => {
        context.fillStyle = value < 0 ? css("--line") : `rgb(${ramp(value / 1000).join(",")})`;
        context.fillRect(MARGIN.left + x * size, MARGIN.top + y * size, size - 1, size - 1);
      });
    });
    if (cursor) {
      cursor = { x: clamp(cursor.x, 0, wide - 1), y: clamp(cursor.y, 0, tall - 1) };
      context.strokeStyle = css("--ink");
      context.lineWidth = 2;
      context.strokeRect(MARGIN.left + cursor.x * size, MARGIN.top + cursor.y * size, size - 1, size - 1);
    }
    canvas.dataset.size = size;
    tell();
  }

  function tell() {
    const cube = current();
    const told = cursor ? cells.rows[cursor.y][cursor.x] : null;
    const where = cursor ? `${cells.name(cursor.y, cursor.x)}: ${told < 0 ? "not recorded" : `${(told / 10).toFixed(1)} % computed`}. ` : "";
    byId("density-text").textContent = `${where}Rows are layers; mean over ${cube.samples} sample${cube.samples === 1 ? "" : "s"}.`;
  }

  function onPointer(event) {
    const bounds = canvas.getBoundingClientRect();
    const size = Number(canvas.dataset.size);
    const x = Math.floor((event.clientX - bounds.left - MARGIN.left) / size);
    const y = Math.floor((event.clientY - bounds.top - MARGIN.top) / size);
    if (x < 0 || y < 0 || y >= cells.rows.length || x >= cells.columns.length) return;
    cursor = { x, y };
    draw();
  }

  function onKey(event) {
    const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!by) return;
    event.preventDefault();
    cursor = cursor ? { x: cursor.x + by[0], y: cursor.y + by[1] } : { x: 0, y: 0 };
    draw();
  }

  function refresh() {
    const slider = byId("density-step");
    slider.max = current().steps.length - 1;
    byId("density-step-text").textContent = current().steps[Number(slider.value)];
    byId("density-step-label").hidden = byId("density-view").value !== "heads";
    draw();
  }

  byId("density-choice").append(...cubes.map((cube, i) => element("option", { value: i }, `${cube.number} ${cube.name}`)));
  byId("density-step").value = byId("density-step").max = cubes[0].steps.length - 1;
  canvas.tabIndex = 0;
  canvas.addEventListener("keydown", onKey);
  canvas.addEventListener("pointermove", onPointer);
  canvas.addEventListener("pointerdown", onPointer);
  for (const id of ["density-choice", "density-view"]) byId(id).addEventListener("change", refresh);
  byId("density-step").addEventListener("input", refresh);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  window.addEventListener("resize", draw);
  drawScale(byId("density-scale"));
  refresh();
}
