"use strict";
// The data of the page, its numbers, and the parts that all sections use. Token text goes into the page as text alone
// (textContent), never as HTML.

const page = JSON.parse(document.getElementById("page").textContent);
const state = { layer: 0, head: 0, asks: 0, asked: 0, language: firstLanguage() };
const views = []; // functions that draw again when the state changes
let figures = null; // what the page shows of one text
let numbers = null; // the same with its packed arrays unpacked, {shape, values}
let T = 0; // tokens of the text

function firstLanguage() {
  const wanted = (navigator.languages || ["en"]).map((name) => name.split("-")[0]);
  return wanted.find((name) => name in page.strings) || "en";
}

// Words

function say(key, values = {}) {
  const text = page.strings[state.language][key] ?? page.strings.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (all, name) => (name in values ? values[name] : all));
}

function shown(number, digits = 3) {
  if (number === null || Number.isNaN(number)) return "–";
  if (number === -Infinity) return "−∞";
  return number.toFixed(digits).replace("-", "−");
}

// A token's text; what nobody would see, blanks and an empty text, as signs.
function word(id) {
  return (figures.vocabulary[id] ?? `[${id}]`).replaceAll(" ", "␣") || "∅";
}

function token(t) {
  return word(figures.tokens[t].id);
}

function quoted(t) {
  return `“${token(t)}” (${t})`;
}

// Elements

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function table(heads, rows, caption) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col", class: "text" }, text)));
  const body = rows.map(([first, ...rest]) =>
    make("tr", {}, make("th", { scope: "row", class: "text" }, first), ...rest.map(cell)));
  return make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": caption },
    make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...body)));
}

function cell(content) {
  return make("td", { class: typeof content === "string" ? "text" : null },
    typeof content === "number" ? shown(content) : content);
}

function announce(text) {
  document.getElementById("live").textContent = text;
}

// Numbers

async function unzip(text) {
  const letters = atob(text), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = letters.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack({ shape, data }) {
  const planes = await unzip(data);
  const count = planes.length / 4, whole = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0; i < count; i++) whole[4 * i + plane] = planes[plane * count + i];
  return { shape, values: new Float32Array(whole.buffer) };
}

// {name: packed or not, however deep} -> the same with unpacked arrays
async function unpacked(value) {
  if (value === null || typeof value !== "object") return value;
  if ("shape" in value && "data" in value) return unpack(value);
  if ("shape" in value && "bytes" in value) return { shape: value.shape, values: (await unzip(value.bytes)) };
  if (Array.isArray(value)) return typeof value[0] === "object" ? Promise.all(value.map(unpacked)) : value;
  const entries = await Promise.all(Object.entries(value).map(async ([name, each]) => [name, await unpacked(each)]));
  return Object.fromEntries(entries);
}

// The part of an array at the given first indices: at(numbers.q, layer, head, token) is a vector.
function at({ shape, values }, ...indices) {
  let size = values.length, start = 0;
  indices.forEach((index, i) => { size /= shape[i]; start += index * size; });
  return indices.length === shape.length ? values[start] : values.subarray(start, start + size);
}

function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

const groupSize = () => figures.model.n_head / figures.model.n_kv_head; // heads of queries for one of keys
const isExact = (layer) => numbers.layers[layer] !== null;
const query = (layer, head, t) => at(numbers.layers[layer].q, head, t);
const key = (layer, head, s) => at(numbers.layers[layer].k, Math.floor(head / groupSize()), s);
const value = (layer, head, s) => at(numbers.layers[layer].v, Math.floor(head / groupSize()), s);

const kept = new Map(); // of what is slow to compute

function once(name, compute) {
  if (!kept.has(name)) kept.set(name, compute());
  return kept.get(name);
}

// Scores (T, T) of a head: row t has the products of query t with each key, / sqrt(head size).
function scores(layer, head) {
  return once(`scores ${layer} ${head}`, () => {
    const found = new Float64Array(T * T), scale = Math.sqrt(figures.model.head_size);
    for (let t = 0; t < T; t++)
      for (let s = 0; s < T; s++) found[t * T + s] = dot(query(layer, head, t), key(layer, head, s)) / scale;
    return found;
  });
}

function softmax(row) {
  const most = Math.max(...row), powers = row.map((x) => Math.exp(x - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map((x) => x / sum);
}

// Weights (T, T) of a head: the softmax of each row of scores, up to the token itself. In a page without the queries and
// keys they are rounded.
function weights(layer, head) {
  if (!isExact(layer)) return once(`rounded ${layer} ${head}`, () => Array.from(at(numbers.overview, layer, head), (w) => w / 255));
  return once(`weights ${layer} ${head}`, () => {
    const found = new Float64Array(T * T), all = scores(layer, head);
    for (let t = 0; t < T; t++)
      softmax(Array.from(all.subarray(t * T, t * T + t + 1))).forEach((w, s) => { found[t * T + s] = w; });
    return found;
  });
}

// What a head gives token t: the weighted mean of the values (head size numbers).
function output(layer, head, t) {
  const row = weights(layer, head), found = new Float64Array(figures.model.head_size);
  for (let s = 0; s <= t; s++) {
    const v = value(layer, head, s);
    for (let c = 0; c < found.length; c++) found[c] += row[t * T + s] * v[c];
  }
  return found;
}

// State

function set(changes) {
  Object.assign(state, changes);
  views.forEach((draw) => draw());
  loadLayer();
}

// The server of a live page has the exact numbers of a layer.
async function loadLayer() {
  const { layer } = state, before = figures;
  if (!page.live || isExact(layer)) return;
  const found = await unpacked(await ask("layer", { ids: figures.tokens.map(({ id }) => id), layer }));
  if (figures !== before || isExact(layer)) return;
  numbers.layers[layer] = found;
  set({});
}

async function ask(name, asked) {
  const answer = await fetch(`/${name}`, {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(asked) });
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

function shapeOf(name) {
  const { n_head, n_kv_head, head_size, n_embd, vocab_size } = figures.model;
  return {
    q: `Q (B, nh, T, hs) = (1, ${n_head}, ${T}, ${head_size})`,
    k: `K (B, nkv, T, hs) = (1, ${n_kv_head}, ${T}, ${head_size})`,
    v: `V (B, nkv, T, hs) = (1, ${n_kv_head}, ${T}, ${head_size})`,
    scores: `Q Kᵀ (B, nh, T, T) = (1, ${n_head}, ${T}, ${T})`,
    stream: `x (B, T, C) = (1, ${T}, ${n_embd})`,
    logits: `logits (B, T, V) = (1, ${T}, ${vocab_size})`,
    tokens: `idx (B, T) = (1, ${T})`,
  }[name];
}

// Colours: cividis for what is from 0 up, blue to orange for what has a sign; both are safe for colour-blind readers.

const CIVIDIS = [[0, 32, 77], [0, 51, 111], [57, 71, 108], [87, 92, 109], [112, 113, 115], [138, 134, 121], [167, 157, 117],
  [197, 180, 106], [229, 206, 87], [255, 234, 70]];
const DIVERGING = [[20, 80, 160], [110, 160, 215], [245, 245, 242], [240, 165, 95], [185, 80, 0]];

function mixed(colours, share) {
  const place = share * (colours.length - 1), i = Math.min(Math.floor(place), colours.length - 2), part = place - i;
  return `rgb(${colours[i].map((from, c) => Math.round(from + (colours[i + 1][c] - from) * part)).join(",")})`;
}

const SHADES = 255; // steps of a scale: made once, since a picture has thousands of cells
const scaleOf = (colours) => Array.from({ length: SHADES + 1 }, (_, i) => mixed(colours, i / SHADES));
const FROM_ZERO = scaleOf(CIVIDIS), SIGNED = scaleOf(DIVERGING);
const shade = (scale, share) => scale[Math.round(Math.min(Math.max(share, 0), 1) * SHADES)];

// A matrix on a canvas: one stop for Tab, arrows inside; the live region reads the cell.
// get(row, column) -> number, or null for a cell that the mask hides. read(row, column) -> what is said of it.
// names(i) -> the token that stands beside row i and above column i, where there is room for it.
function matrix({ rows, columns, get, signed, title, axes, read, choose, chosen, names }) {
  const canvas = make("canvas", { tabindex: 0, role: "application", "aria-roledescription": say("matrix") });
  const caption = make("figcaption", {});
  const switchTo = make("button", { type: "button", "aria-pressed": "false" });
  const holder = make("div", { class: "scroll" }, canvas), instead = make("div", { hidden: true });
  const figure = make("figure", {}, make("h3", {}, title()), holder, instead, caption, switchTo);
  const side = Math.max(5, Math.min(26, Math.floor(420 / Math.max(rows, columns))));
  const margin = names && side >= 12 ? 64 : 0, width = margin + columns * side, height = margin + rows * side;
  figure.style.maxWidth = `${Math.max(width, 300)}px`;

  function draw() {
    const scale = window.devicePixelRatio || 1, ink = canvas.getContext("2d");
    canvas.width = width * scale;
    canvas.height = height * scale;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    ink.scale(scale, scale);
    if (margin) writeNames(ink, names, side, margin, chosen());
    ink.translate(margin, margin);
    const cells = Array.from({ length: rows * columns }, (_, i) => get(Math.floor(i / columns), i % columns));
    const largest = cells.reduce((most, number) => Math.max(most, Math.abs(number ?? 0)), 1e-9);
    ink.fillStyle = "#8a8f98";
    ink.fillRect(0, 0, columns * side, rows * side);
    ink.beginPath(); // of the hatching of hidden cells
    cells.forEach((number, i) => {
      const y = Math.floor(i / columns) * side, x = (i % columns) * side;
      if (number === null) {
        ink.moveTo(x, y + side);
        ink.lineTo(x + side, y);
      } else {
        ink.fillStyle = signed ? shade(SIGNED, 0.5 + number / largest / 2) : shade(FROM_ZERO, number / largest);
        ink.fillRect(x, y, side, side);
      }
    });
    ink.strokeStyle = "#33373d";
    ink.stroke();
    const [row, column] = chosen();
    ink.lineWidth = 2;
    ink.strokeStyle = "#ff2fd0";
    ink.strokeRect(column * side + 1, row * side + 1, side - 2, side - 2);
    figure.querySelector("h3").textContent = title();
    canvas.setAttribute("aria-label", `${title()}. ${axes()}. ${read(row, column)}`);
    caption.textContent = `${axes()}. ${read(row, column)}`;
    switchTo.textContent = say("as_table");
    if (!instead.hidden) fillTable();
  }

  function fillTable() {
    const heads = [say("place"), ...Array.from({ length: columns }, (_, c) => `${c}`)];
    const body = Array.from({ length: rows }, (_, r) =>
      [`${r}`, ...Array.from({ length: columns }, (_, c) => shown(get(r, c) ?? -Infinity))]);
    instead.replaceChildren(table(heads, body, title()));
  }

  function go(row, column) {
    choose(Math.min(Math.max(row, 0), rows - 1), Math.min(Math.max(column, 0), columns - 1));
    announce(read(...chosen()));
  }

  switchTo.addEventListener("click", () => {
    instead.hidden = !instead.hidden;
    holder.hidden = !instead.hidden;
    switchTo.setAttribute("aria-pressed", String(!instead.hidden));
    draw();
  });
  canvas.addEventListener("click", (event) => {
    const box = canvas.getBoundingClientRect();
    go(Math.floor((event.clientY - box.top - margin) / side), Math.floor((event.clientX - box.left - margin) / side));
  });
  canvas.addEventListener("keydown", (event) => {
    const [row, column] = chosen();
    const moves = { ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1],
      ArrowRight: [row, column + 1], Home: [row, 0], End: [row, columns - 1] };
    if (!(event.key in moves)) return;
    event.preventDefault();
    go(...moves[event.key]);
  });
  views.push(draw);
  draw();
  return figure;
}

// The names of rows at their left, and of columns above them, cut where they are too long.
function writeNames(ink, names, side, margin, [row, column]) {
  ink.fillStyle = getComputedStyle(document.body).color;
  ink.textAlign = "right";
  ink.textBaseline = "middle";
  for (let i = 0; i < T; i++) {
    ink.font = `${i === row ? "bold " : ""}${Math.min(13, side)}px system-ui, "Noto Sans Devanagari", sans-serif`;
    ink.fillText(names(i).slice(0, 9), margin - 4, margin + (i + 0.5) * side);
    ink.font = ink.font.replace("bold ", "");
    if (i === column) ink.font = `bold ${ink.font}`;
    ink.save();
    ink.translate(margin + (i + 0.5) * side, margin - 4);
    ink.rotate(Math.PI / 2);
    ink.fillText(names(i).slice(0, 9), 0, 0);
    ink.restore();
  }
}

// Sections: {id: fill(element)}, in the order in which the files come

const sections = [];

function section(id, fill, isThere = () => figures !== null) {
  sections.push([id, fill, isThere]);
}

function drawn(element, draw) { // draws now, and again when the state changes
  const again = () => element.replaceChildren(...[draw()].flat());
  views.push(again);
  again();
  return element;
}

function buildSections() {
  const main = document.getElementById("sections");
  views.length = 0;
  main.replaceChildren();
  for (const [id, fill, isThere] of sections) {
    if (!isThere()) continue;
    const element = make("section", { id, "aria-labelledby": `${id}-title` },
      make("h2", { id: `${id}-title` }, say(`${id}.title`)), make("p", {}, say(`${id}.about`)));
    fill(element);
    if (page.code[id])
      element.append(make("details", {}, make("summary", {}, say("code")),
        make("pre", { tabindex: 0 }, page.code[id])));
    main.append(element);
  }
  document.getElementById("foot").replaceChildren(make("p", { class: "note" }, say("standing")));
}

// The bar that stays

function buildBar() {
  const bar = document.getElementById("bar");
  const choice = (name, count, label) => {
    const select = make("select", { id: name, onchange: (event) => set({ [name]: Number(event.target.value) }) },
      ...Array.from({ length: count }, (_, i) => make("option", { value: i }, `${i}`)));
    select.value = state[name];
    views.push(() => { select.value = state[name]; });
    return make("label", {}, `${label} `, select);
  };
  const languages = make("select", { id: "language", onchange: (event) => start(event.target.value) },
    ...Object.keys(page.strings).map((name) => make("option", { value: name, lang: name }, page.strings[name].language)));
  languages.value = state.language;
  const ofLanguage = make("label", {}, `${say("language_label")} `, languages);
  if (!figures) return bar.replaceChildren(make("div", { class: "controls" }, make("h1", {}, "kqv"), ofLanguage));
  const shape = drawn(make("span", { class: "shape" }), () => shapeOf("q"));
  const strip = make("div", { class: "tokens", role: "group", "aria-label": say("tokens") },
    ...figures.tokens.map((_, t) => make("button", { type: "button", tabindex: -1, onclick: () => set({ asks: t }) }, token(t))));
  roving(strip, () => state.asks, (t) => set({ asks: t }));
  bar.replaceChildren(
    ...(page.live ? [buildAsking()] : []),
    make("div", { class: "controls" }, make("h1", {}, `kqv: ${figures.model.name}`), choice("layer", figures.model.n_layer, say("layer")),
      choice("head", figures.model.n_head, say("head")), ofLanguage, shape), strip);
}

// A group of buttons that is one stop for Tab: arrows move within it.
function roving(group, chosen, choose) {
  const buttons = [...group.children];
  const mark = () => buttons.forEach((button, i) => {
    button.tabIndex = i === chosen() ? 0 : -1;
    button.setAttribute("aria-current", String(i === chosen()));
  });
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(Math.min(Math.max(chosen() + step, 0), buttons.length - 1));
    buttons[chosen()].focus();
  });
  views.push(mark);
  mark();
}

// A text of the reader's own, in a live page
function buildAsking() {
  const field = make("textarea", { id: "text", rows: 2, cols: 60 }), problem = make("p", { role: "alert" });
  field.value = page.text;
  const read = async () => {
    problem.textContent = say("reading");
    try {
      page.text = field.value;
      await show(await ask("figures", { text: field.value }));
    } catch (error) {
      problem.textContent = error.message;
    }
  };
  return make("div", { class: "controls" }, make("label", { for: "text" }, say("text")), field,
    make("button", { type: "button", onclick: read }, say("read")), problem);
}

async function show(found) {
  numbers = await unpacked(found);
  figures = found;
  T = figures.tokens.length;
  kept.clear();
  Object.assign(state, { layer: Math.min(state.layer, figures.model.n_layer - 1), asks: T - 1, asked: Math.max(0, T - 2) });
  start(state.language);
  loadLayer();
}

function start(language) {
  state.language = language;
  document.documentElement.lang = language;
  document.title = figures ? say("page_title", { name: figures.model.name }) : say("runs.title");
  document.getElementById("skip").textContent = say("skip");
  buildSections();
  buildBar();
}

async function begin() {
  if (page.figures) await show(page.figures);
  else start(state.language);
  document.documentElement.dataset.ready = "true";
}
