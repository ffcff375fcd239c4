"use strict";
// An image that is drawn in characters, two pixels in each: what a head takes, laid on the image.

const PAIRS = " .,':;\"!#"; // the shades of an upper and a lower pixel, 0 to 2 each: 3 * upper + lower

// The tokens of an image: rows of places of tokens, all equally long, with newlines between; null: there is none.
function image() {
  const rows = [[]];
  for (let t = 0; t < T; t++) {
    const text = figures.vocabulary[figures.tokens[t].id];
    if (text === "\\n") rows.push([]);
    else if (text.length === 1 && PAIRS.includes(text)) rows[rows.length - 1].push(t);
    else if (rows[rows.length - 1].length) rows.push([]);
  }
  const found = rows.filter((row) => row.length >= 4 && row.length === rows.find((other) => other.length >= 4).length);
  return found.length >= 2 ? found : null;
}

section("digits", (element) => {
  const rows = image();
  if (!rows) {
    element.append(make("pre", { tabindex: 0 }, "python prepare.py digits\npython train.py config/train_digits.py\npython look.py --out_dir=out/digits"));
    return;
  }
  const height = 2 * rows.length, width = rows[0].length, of = (r, c) => rows[Math.floor(r / 2)][c];
  const shade = (r, c) => {
    const pair = PAIRS.indexOf(figures.vocabulary[figures.tokens[of(r, c)].id]);
    return r % 2 ? pair % 3 : Math.floor(pair / 3);
  };
  const weight = (r, c) => (of(r, c) <= state.asks ? weights(state.layer, state.head)[state.asks * T + of(r, c)] : null);
  const place = () => {
    const r = rows.findIndex((row) => row.includes(state.asked));
    return r < 0 ? [0, 0] : [2 * r, rows[r].indexOf(state.asked)];
  };
  const common = { rows: height, columns: width, signed: false, axes: () => say("digits.axes"), choose: (r, c) => set({ asked: of(r, c) }), chosen: place };
  element.append(make("div", { class: "side" },
    matrix({ ...common, get: shade, title: () => say("digits.image"), read: (r, c) => say("digits.pixel", { row: r, column: c, number: shade(r, c) }) }),
    matrix({ ...common, get: weight, title: () => say("digits.taken", { asks: quoted(state.asks) }),
      read: (r, c) => say("scores.read", { asks: quoted(state.asks), asked: quoted(of(r, c)), name: say("weight"), number: shown(weight(r, c)) }) })));
});
