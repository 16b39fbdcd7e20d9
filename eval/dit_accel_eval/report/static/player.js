/** Clips of one prompt, frame by frame in step: side by side, wiped over each other, or all at once. */
function player(data) {
  const KEPT = 4; // prompts whose pictures stay decoded
  const state = { prompt: 0, frame: 0, playing: false, count: 1, screens: [], generation: 0 };
  const box = byId("player");
  const sheets = new Map(data.sheets.map((sheet, i) => [`${sheet.index}/${sheet.seed}/${sheet.name}`, { ...sheet, id: i }]));
  const decoded = new Map();
  const dense = data.rows.find((row) => row.dense);

  function sheetOf(prompt, name) {
    return sheets.get(`${prompt.index}/${prompt.seed}/${name}`);
  }

  function load(sheet) {
    if (!decoded.has(sheet.id)) {
      decoded.set(sheet.id, new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = () => resolve(image);
        image.onerror = () => reject(new Error(`the picture of ${sheet.name} cannot be decoded`));
        image.src = `data:image/webp;base64,${byId(`sheet-${sheet.id}`).textContent}`;
      }));
    }
    return decoded.get(sheet.id);
  }

  function forgetOthers() {
    const near = new Set(data.prompts.filter((_, i) => Math.abs(i - state.prompt) < KEPT).map((p) => `${p.index}/${p.seed}`));
    for (const sheet of data.sheets.keys()) {
      const { index, seed } = data.sheets[sheet];
      if (!near.has(`${index}/${seed}`)) decoded.delete(sheet);
    }
  }

  function screen(title, note, sheet, draw) {
    const canvas = element("canvas", { width: sheet.width, height: sheet.height, role: "img", "aria-label": `${title} ${note}` });
    const caption = element("figcaption", {}, element("b", {}, title), element("span", {}, note));
    const figure = element("figure", draw.name === "difference" ? { class: "difference" } : {}, canvas, caption);
    return { figure, canvas, draw };
  }

  const place = (clip, frame) => {
    const at = clamp(frame, 0, clip.count - 1);
    return [(at % clip.columns) * clip.width, Math.floor(at / clip.columns) * clip.height, clip.width, clip.height];
  };

  function paint(context, clip, frame) {
    context.drawImage(clip.image, ...place(clip, frame), 0, 0, context.canvas.width, context.canvas.height);
  }

  const plain = (clip) => function clipFrame(context) { paint(context, clip, state.frame); };

  function differing(a, b) {
    const other = element("canvas", { width: a.width, height: a.height }).getContext("2d", { willReadFrequently: true });
    return function difference(context) {
      const { width, height } = context.canvas;
      const gain = Number(byId("gain").value);
      paint(context, a, state.frame);
      paint(other, b, state.frame);
      const one = context.getImageData(0, 0, width, height);
      const two = other.getImageData(0, 0, width, height).data;
      for (let i = 0; i < two.length; i++) if (i % 4 !== 3) one.data[i] = Math.abs(one.data[i] - two[i]) * gain;
      context.putImageData(one, 0, 0);
    };
  }

  function wiped(a, b) {
    return function wipe(context) {
      const { width, height } = context.canvas;
      const edge = (Number(byId("wipe").value) / 100) * width;
      paint(context, b, state.frame);
      context.save();
      context.beginPath();
      context.rect(0, 0, edge, height);
      context.clip();
      paint(context, a, state.frame);
      context.restore();
      context.fillStyle = "#fff";
      context.fillRect(edge - 1, 0, 2, height);
    };
  }

  function worstRow(prompt) {
    const rows = data.rows.filter((row) => row.number && sheetOf(prompt, row.name));
    const value = (row) => prompt.values[row.name] ?? Infinity;
    return rows.length ? rows.reduce((a, b) => (value(b) < value(a) ? b : a)).name : byId("choice").value;
  }

  const label = (row) => (row.number ? `${row.number} ${row.name}` : row.name);

  async function layOut() {
    const generation = ++state.generation;
    const prompt = data.prompts[state.prompt];
    const view = byId("view").value;
    const known = data.rows.filter((row) => sheetOf(prompt, row.name));
    const chosen = known.find((row) => row.name === byId("choice").value) || known.find((row) => row.number) || known[0];
    const wanted = view === "all" ? known : known.filter((row) => row.dense || row === chosen);
    const clips = new Map();
    for (const row of wanted) {
      const sheet = sheetOf(prompt, row.name);
      clips.set(row.name, { ...sheet, image: await load(sheet) });
    }
    if (generation !== state.generation) return; // another prompt was chosen meanwhile
    const base = dense && clips.get(dense.name);
    const note = (row) => (row.dense ? "" : `PSNR ${decibel(prompt.values[row.name])}`);
    const made = [];
    if (view === "wipe" && base && chosen !== dense) {
      made.push(screen(`dense | ${label(chosen)}`, note(chosen), base, wiped(base, clips.get(chosen.name))));
    } else {
      for (const row of wanted) made.push(screen(label(row), note(row), clips.get(row.name), plain(clips.get(row.name))));
      if (view === "side" && base && chosen !== dense) made.push(screen("difference", "", base, differing(clips.get(chosen.name), base)));
    }
    state.screens = made;
    state.count = Math.max(...[...clips.values()].map((clip) => clip.count));
    state.source = [...clips.values()][0].source;
    byId("screens").replaceChildren(...made.map((one) => one.figure));
    byId("screens").classList.toggle("one", view === "wipe");
    byId("prompt").textContent = `${prompt.text} (seed ${prompt.seed})`;
    byId("frame").max = state.count - 1;
    byId("gain-label").hidden = view !== "side";
    byId("wipe-label").hidden = view !== "wipe";
    show(clamp(state.frame, 0, state.count - 1));
  }

  function show(frame) {
    state.frame = ((frame % state.count) + state.count) % state.count;
    for (const one of state.screens) one.draw(one.canvas.getContext("2d", { willReadFrequently: one.draw.name === "difference" }));
    byId("frame").value = state.frame;
    byId("frame-text").textContent = `${state.source[state.frame]}`;
    box.dataset.frame = state.frame;
  }

  function failed(error) {
    byId("prompt").textContent = error.message;
  }

  function select(prompt) {
    state.prompt = clamp(prompt, 0, data.prompts.length - 1);
    [...byId("prompts").children].forEach((option, i) => option.setAttribute("aria-selected", String(i === state.prompt)));
    const option = byId("prompts").children[state.prompt];
    byId("prompts").setAttribute("aria-activedescendant", option.id);
    const list = byId("prompts");
    // Not scrollIntoView: that would move the page, too.
    list.scrollTop += Math.min(0, option.offsetTop - list.offsetTop - list.scrollTop) + Math.max(0, option.offsetTop + option.offsetHeight - list.offsetTop - list.scrollTop - list.clientHeight);
    list.scrollLeft += Math.min(0, option.offsetLeft - list.offsetLeft - list.scrollLeft) + Math.max(0, option.offsetLeft + option.offsetWidth - list.offsetLeft - list.scrollLeft - list.clientWidth);
    forgetOthers();
    layOut().catch(failed);
  }

  function play(on) {
    state.playing = on;
    byId("play").textContent = on ? "Pause" : "Play";
    byId("play").setAttribute("aria-pressed", String(on));
    if (!on) return;
    let last = performance.now();
    let owed = 0;
    const tick = (now) => {
      if (!state.playing) return;
      const kept = state.count / (state.source[state.source.length - 1] + 1);
      owed += ((now - last) / 1000) * data.fps * kept * Number(byId("rate").value);
      last = now;
      if (owed >= 1) {
        show(state.frame + Math.floor(owed));
        owed %= 1;
      }
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  function step(by) {
    play(false);
    show(state.frame + by);
  }

  function nudge(by) {
    const slider = byId(byId("view").value === "wipe" ? "wipe" : "gain");
    slider.value = Number(slider.value) + by * (slider.id === "wipe" ? 5 : 1);
    slider.dispatchEvent(new Event("input"));
  }

  function cycle(by) {
    const choice = byId("choice");
    choice.selectedIndex = (choice.selectedIndex + by + choice.options.length) % choice.options.length;
    layOut().catch(failed);
  }

  const KEYS = {
    ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => select(state.prompt - 1), ArrowDown: () => select(state.prompt + 1),
    Home: () => select(0), End: () => select(data.prompts.length - 1), " ": () => play(!state.playing),
    "[": () => cycle(-1), "]": () => cycle(1), "-": () => nudge(-1), "+": () => nudge(1), "=": () => nudge(1),
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || isEditing(event)) return;
    if (event.key === " " && event.target.closest("button")) return;
    const act = KEYS[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  function fill() {
    const options = data.prompts.map((prompt, i) => {
      const option = element("div", { role: "option", id: `prompt-${i}`, "aria-selected": "false" },
        element("span", { class: "text" }, prompt.text), element("small", {}, `worst ${decibel(prompt.worst)}, seed ${prompt.seed}`));
      option.addEventListener("click", () => select(i));
      return option;
    });
    byId("prompts").append(...options);
    const rows = [...data.rows].filter((row) => !row.dense).sort((a, b) => (a.number || 999) - (b.number || 999));
    byId("choice").append(...rows.map((row) => element("option", { value: row.name }, `dense and ${label(row)}`)));
  }

  fill();
  byId("choice").value = worstRow(data.prompts[0]); // what is hard to look at comes first
  box.addEventListener("keydown", onKey);
  byId("play").addEventListener("click", () => play(!state.playing));
  byId("back").addEventListener("click", () => step(-1));
  byId("forth").addEventListener("click", () => step(1));
  byId("frame").addEventListener("input", () => { play(false); show(Number(byId("frame").value)); });
  for (const id of ["choice", "view"]) byId(id).addEventListener("change", () => layOut().catch(failed));
  byId("gain").addEventListener("input", () => { byId("gain-text").textContent = byId("gain").value; show(state.frame); });
  byId("wipe").addEventListener("input", () => { byId("wipe-text").textContent = `${byId("wipe").value} %`; show(state.frame); });
  select(0);
}
