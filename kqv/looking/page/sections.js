"use strict";
// One function for each question. The numbers come from core.js.

section("tokens", (element) => {
  element.append(drawn(make("div"), () => [
    make("p", { class: "shape" }, shapeOf("tokens")),
    table([say("place"), say("token"), say("id"), say("loss"), say("chance")],
      figures.tokens.map(({ id, loss }, t) => [`${t}`, word(id), `${id}`, shown(loss), loss === null ? "–" : shown(Math.exp(-loss))]),
      say("tokens.table")),
  ]));
});

// How alike two places are, by the kind of positions: learnt ones from the model, the others computed here.
function likeness(kind, a, b) {
  const { n_embd, head_size, rope_theta } = figures.model;
  if (kind === "learned") return at(numbers.places, a, b);
  const pairs = Math.floor((kind === "rotary" ? head_size : n_embd) / 2), theta = kind === "rotary" ? rope_theta : 10000;
  return once(`likeness ${kind} ${Math.abs(a - b)}`, () => {
    let sum = 0;
    for (let i = 0; i < pairs; i++) sum += Math.cos((a - b) / theta ** (i / pairs));
    return sum / pairs;
  });
}

section("places", (element) => {
  const kinds = ["learned", "sinusoidal", "rotary"].filter((kind) => kind !== "learned" || numbers.places);
  const side = make("div", { class: "side" });
  for (const kind of kinds)
    side.append(matrix({
      rows: T, columns: T, signed: true, title: () => say(`places.${kind}`), axes: () => say("places.axes"),
      get: (r, c) => likeness(kind, r, c), choose: (r, c) => set({ asks: r, asked: c }), chosen: () => [state.asks, state.asked],
      read: (r, c) => say("places.read", { a: r, b: c, number: shown(likeness(kind, r, c)) }),
    }));
  element.append(side, make("p", {}, say(`places.of_${figures.model.positions}`)),
    drawn(make("p", { class: "note" }), () => say("places.removed", {
      before: shown(figures.what_if.as_trained.loss), after: shown(figures.what_if.no_positions.loss) })));
});

section("vectors", (element) => {
  const choose = (name) => {
    const select = make("select", { onchange: (event) => set({ [name]: Number(event.target.value) }) },
      ...figures.tokens.map((_, t) => make("option", { value: t }, quoted(t))));
    views.push(() => { select.value = state[name]; });
    select.value = state[name];
    return make("label", {}, `${say(name)} `, select);
  };
  element.append(make("div", { class: "controls" }, choose("asks"), choose("asked")),
    drawn(make("div"), () => {
      if (!isExact(state.layer)) return make("p", { class: "note" }, say("rounded"));
      const { layer, head, asks, asked } = state, q = query(layer, head, asks), k = key(layer, head, asked), v = value(layer, head, asked);
      const sum = dot(q, k), scale = Math.sqrt(q.length);
      const rows = Array.from(q, (x, c) => [`${c}`, x, k[c], x * k[c], v[c]]);
      return [
        make("p", { class: "shape" }, `${shapeOf("q")}; ${shapeOf("k")}; ${shapeOf("v")}`),
        make("p", {}, say("vectors.sum", { q: quoted(asks), k: quoted(asked), sum: shown(sum), scale: shown(scale), score: shown(sum / scale) })),
        figures.model.n_head === figures.model.n_kv_head ? null
          : make("p", {}, say("vectors.shared", { heads: groupSize(), kv: Math.floor(head / groupSize()) })),
        table([say("channel"), say("vectors.q"), say("vectors.k"), say("vectors.product"), say("vectors.v")], rows, say("vectors.table")),
      ].filter(Boolean);
    }));
});

const selected = () => [state.asks, state.asked];
const readCell = (number, name) => (t, s) => say(s > t ? "scores.hidden" : "scores.read", {
  asks: quoted(t), asked: quoted(s), name: say(name), number: shown(number(t, s)) });

// A part of a score in the first layer: of the parts "token", "place" and "rest" of a query and a key.
function part(vectors, name, head, t) {
  const at_ = (which) => at(numbers.parts[vectors][which], vectors === "q" ? head : Math.floor(head / groupSize()), t);
  if (name !== "place") return at_(name);
  const whole = vectors === "q" ? query(0, head, t) : key(0, head, t), token = at_("token"), rest = at_("rest");
  return whole.map((x, c) => x - token[c] - rest[c]);
}

const PARTS = { // what is multiplied with what; what is left of the whole score is "the rest"
  token_token: [["token", "token"]],
  token_place: [["token", "place"], ["place", "token"]],
  place_place: [["place", "place"]],
};
const partNames = () => (figures.model.positions === "rotary" ? ["whole", "token_token", "others"] : ["whole", ...Object.keys(PARTS), "others"]);

function partOfScore(name, head, t, s) {
  const whole = scores(0, head)[t * T + s], scale = Math.sqrt(figures.model.head_size);
  const sum = (pairs) => pairs.reduce((all, [q, k]) => all + dot(part("q", q, head, t), part("k", k, head, s)) / scale, 0);
  if (name === "whole") return whole;
  if (name !== "others") return sum(PARTS[name]);
  return whole - partNames().filter((each) => each in PARTS).reduce((all, each) => all + sum(PARTS[each]), 0);
}

section("scores", (element) => {
  let shownPart = "whole";
  const raw = (t, s) => {
    if (!isExact(state.layer)) return 0;
    if (state.layer !== 0 || shownPart === "whole") return scores(state.layer, state.head)[t * T + s];
    return once(`part ${shownPart} ${state.head} ${t} ${s}`, () => partOfScore(shownPart, state.head, t, s));
  };
  const weight = (t, s) => weights(state.layer, state.head)[t * T + s];
  const hidden = (number) => (t, s) => (s > t ? null : number(t, s));
  const common = { rows: T, columns: T, names: token, axes: () => say("scores.axes"), choose: (t, s) => set({ asks: t, asked: s }), chosen: selected };
  const select = make("select", { id: "part", onchange: (event) => { shownPart = event.target.value; set({}); } },
    ...partNames().map((name) => make("option", { value: name }, say(`scores.${figures.model.positions === "rotary" && name === "others" ? "rotation" : name}`))));
  views.push(() => { select.disabled = state.layer !== 0; });
  element.append(drawn(make("p", { class: "shape" }), () => shapeOf("scores")),
    drawn(make("p", { class: "note" }), () => (isExact(state.layer) ? [] : say("rounded"))),
    make("div", { class: "controls" }, make("label", {}, `${say("scores.part")} `, select)), make("div", { class: "side" },
    matrix({ ...common, signed: true, get: raw, title: () => say("scores.raw"), read: (t, s) => say("scores.read", { asks: quoted(t), asked: quoted(s), name: say("score"), number: shown(raw(t, s)) }) }),
    matrix({ ...common, signed: true, get: hidden(raw), title: () => say("scores.masked"), read: readCell(raw, "score") }),
    matrix({ ...common, signed: false, get: hidden(weight), title: () => say("scores.weights"), read: readCell(weight, "weight") })),
    drawn(make("div"), () => (isExact(state.layer)
      ? table([say("channel"), say("scores.output")], Array.from(output(state.layer, state.head, state.asks), (x, c) => [`${c}`, x]), say("scores.outputs", { asks: quoted(state.asks) }))
      : [])));
});

section("what_if", (element) => {
  const names = Object.keys(figures.what_if);
  const list = (pairs) => pairs.map(([id, p]) => `${word(id)} ${shown(p, 2)}`).join(" | ");
  const trainIt = async (name, result) => {
    result.textContent = say("what_if.training");
    try {
      const { loss, last_loss } = await ask("train", { change: name });
      result.textContent = say("what_if.trained_now", { change: say(`what_if.${name}`), loss: shown(loss), last: shown(last_loss) });
    } catch (error) {
      result.textContent = error.message;
    }
  };
  if (page.live) {
    const select = make("select", {}, ...names.map((name) => make("option", { value: name }, say(`what_if.${name}`))));
    const result = make("p", { role: "status" });
    element.append(make("div", { class: "controls" }, make("label", {}, `${say("what_if.change")} `, select),
      make("button", { type: "button", onclick: () => trainIt(select.value, result) }, say("what_if.train"))), result);
  }
  element.append(drawn(make("div"), () => table(
    [say("what_if.change"), say("what_if.loss"), say("what_if.last"), say("what_if.trained"), say("what_if.trained_last"), say("what_if.top"), say("what_if.goes_on")],
    names.map((name) => {
      const { loss, last_loss, top, continuation } = figures.what_if[name], { trained } = page.trained[name];
      return [say(`what_if.${name}`), loss, last_loss, trained.loss, trained.last_loss, list(top), continuation.map(word).join("")];
    }), say("what_if.table"))), make("p", { class: "note" }, say("what_if.note")));
});

section("it", (element) => {
  const rows = Object.keys(figures.edges).map(Number);
  element.append(drawn(make("div"), () => {
    const { layer, asks, asked } = state, { n_head } = figures.model;
    const heads = Array.from({ length: n_head }, (_, h) => {
      const w = asked <= asks ? weights(layer, h)[asks * T + asked] : 0;
      return [`${h}`, w, w * at(numbers.reach, layer, h, asked)];
    });
    const cut = numbers.edges[asks];
    const parts = [make("p", {}, say("it.looks", { asks: quoted(asks), asked: quoted(asked), layer })),
      table([say("head"), say("weight"), say("it.reach")], heads, say("it.heads"))];
    if (cut)
      parts.push(table([say("asked"), say("it.change")], Array.from(cut.values, (x, s) => [quoted(s), x]),
        say("it.cut", { asks: quoted(asks), next: asks + 1 < T ? token(asks + 1) : word(figures.what_if.as_trained.top[0][0]) })));
    if (cut && asked <= asks) {
      const change = cut.values[asked], kind = change < -0.02 ? "down" : change > 0.02 ? "up" : "same";
      parts.push(make("p", { class: "note" }, say(`it.${kind}`, { asks: quoted(asks), asked: quoted(asked), number: shown(change) })));
    }
    if (!cut) parts.push(make("p", {}, say("it.not_cut", { first: rows[0], last: rows[rows.length - 1] })));
    if (asks + 1 < T)
      parts.push(make("p", { class: "note" }, say("it.endings", { asks: quoted(asks),
        masked: figures.endings.as_trained[asks].toExponential(1), unmasked: figures.endings.no_mask[asks].toExponential(1) })));
    return parts;
  }));
});

section("heads", (element) => {
  const { n_layer, n_head } = figures.model, change = (l, h) => at(numbers.heads, l, h);
  element.append(matrix({
    rows: n_layer, columns: n_head, signed: true, get: change, title: () => say("heads.grid"), axes: () => say("heads.axes"),
    choose: (layer, head) => set({ layer, head }), chosen: () => [state.layer, state.head],
    read: (layer, head) => say("heads.read", { layer, head, number: shown(change(layer, head), 4) }),
  }));
});

section("guess", (element) => {
  element.append(drawn(make("div"), () => {
    const t = state.asks, L = figures.model.n_layer, rows = [];
    for (let l = 0; l <= L; l++) {
      const tops = figures.stream.ids[l][t].map((id, i) => `${word(id)} ${shown(at(numbers.stream.p, l, t, i), 2)}`);
      rows.push([l === 0 ? say("guess.embedding") : say("guess.block", { layer: l - 1 }), at(numbers.stream.length, l, t), tops.join(" | ")]);
    }
    return [make("p", { class: "shape" }, shapeOf("stream")),
      table([say("guess.after"), say("guess.length"), say("guess.says")], rows, say("guess.table", { asks: quoted(t) }))];
  }));
});

// The tokens after token t, with their probabilities, as temperature, top-k, top-p and min-p leave them.
function choices(t, { temperature, top_k, top_p, min_p }) {
  const ids = figures.next.ids[t], logits = Array.from(at(numbers.next.logits, t));
  let kept = ids.map((id, i) => ({ id, p: 0, logit: logits[i] })).slice(0, top_k || ids.length);
  const scaled = softmax(kept.map(({ logit }) => logit / Math.max(temperature, 1e-6)));
  let before = 0;
  kept = kept.map((one, i) => ({ ...one, p: scaled[i] })).filter(({ p }) => {
    const stays = before < top_p && p >= min_p * scaled[0];
    before += p;
    return stays;
  });
  const sum = kept.reduce((all, { p }) => all + p, 0);
  return kept.map((one) => ({ ...one, p: one.p / sum }));
}

section("next", (element) => {
  const asked = { temperature: 1, top_k: 0, top_p: 1, min_p: 0 };
  const limits = { temperature: [0, 3, 0.1], top_k: [0, 64, 1], top_p: [0.05, 1, 0.05], min_p: [0, 1, 0.05] };
  const result = make("div"), drawnToken = make("p", { role: "status" });
  const show = () => {
    const found = choices(state.asks, asked);
    result.replaceChildren(make("p", { class: "shape" }, shapeOf("logits")), table([say("token"), say("chance"), say("next.share")],
      found.slice(0, 20).map(({ id, p }) => [word(id), p, make("span", { class: "bar-cell" })]), say("next.table", { asks: quoted(state.asks) })));
    result.querySelectorAll(".bar-cell").forEach((bar, i) => { bar.style.width = `${found[i].p * 12}rem`; });
  };
  const inputs = Object.entries(limits).map(([name, [min, max, step]]) => make("label", {}, `${say(`next.${name}`)} `,
    make("input", { type: "number", min, max, step, value: asked[name], oninput: (event) => {
      if (event.target.value !== "" && event.target.checkValidity()) { asked[name] = Number(event.target.value); show(); }
    } })));
  const draw = () => {
    let left = Math.random();
    const u = left, found = choices(state.asks, asked);
    const one = found.find(({ p }) => (left -= p) < 0) ?? found[found.length - 1];
    drawnToken.textContent = say("next.drawn", { u: shown(u), token: word(one.id), p: shown(one.p) });
  };
  views.push(show);
  show();
  element.append(make("div", { class: "controls" }, ...inputs, make("button", { type: "button", onclick: draw }, say("next.draw"))), drawnToken, result);
});
