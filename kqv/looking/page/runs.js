"use strict";
// Curves of runs: how the numbers of training went.

const LINES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"]; // Okabe and Ito's colours

function chart(runs, name, isLog) {
  const width = 640, height = 320, left = 56, bottom = 28, scale = window.devicePixelRatio || 1;
  const canvas = make("canvas", { role: "img", "aria-label": say("runs.chart", { name }) });
  canvas.width = width * scale;
  canvas.height = height * scale;
  canvas.style.width = `${width}px`;
  const ink = canvas.getContext("2d"), colour = getComputedStyle(document.body).color;
  ink.scale(scale, scale);
  const points = runs.flatMap(({ curves }) => curves[name] ?? []).filter(([, y]) => !isLog || y > 0);
  if (!points.length) return canvas;
  const f = (y) => (isLog ? Math.log10(y) : y);
  const most = points.reduce((all, [x]) => Math.max(all, x), 1);
  let low = points.reduce((all, [, y]) => Math.min(all, f(y)), Infinity), high = points.reduce((all, [, y]) => Math.max(all, f(y)), -Infinity);
  if (high - low < 1e-12) [low, high] = [low - 1, high + 1];
  const px = (x) => left + (x / most) * (width - left - 8), py = (y) => height - bottom - ((f(y) - low) / (high - low)) * (height - bottom - 8);
  ink.font = "12px system-ui, sans-serif";
  ink.fillStyle = ink.strokeStyle = colour;
  for (let i = 0; i <= 4; i++) {
    const y = low + ((high - low) * i) / 4, line = height - bottom - ((height - bottom - 8) * i) / 4;
    ink.globalAlpha = 0.25;
    ink.beginPath();
    ink.moveTo(left, line);
    ink.lineTo(width - 8, line);
    ink.stroke();
    ink.globalAlpha = 1;
    ink.fillText((isLog ? 10 ** y : y).toPrecision(3), 2, line + 4);
    ink.fillText(String(Math.round((most * i) / 4)), px((most * i) / 4) - 10, height - 8);
  }
  runs.forEach(({ curves }, i) => {
    ink.strokeStyle = LINES[i % LINES.length];
    ink.setLineDash([[], [6, 3], [2, 2]][Math.floor(i / 2) % 3]);
    ink.lineWidth = 2;
    ink.beginPath();
    (curves[name] ?? []).filter(([, y]) => !isLog || y > 0).forEach(([x, y], j) => (j ? ink.lineTo(px(x), py(y)) : ink.moveTo(px(x), py(y))));
    ink.stroke();
  });
  return canvas;
}

const RISES = /reward$|^pass_at|^exact_match$|^distinct/;  // numbers whose highest value is the best

section("runs", (element) => {
  const names = [...new Set(page.runs.flatMap(({ curves }) => Object.keys(curves)))];
  let name = ["val_loss", "val_reward"].find((each) => names.includes(each)) ?? names[0], isLog = false;
  const holder = make("div");
  const draw = () => {
    const rows = page.runs.filter(({ curves }) => curves[name]).map((run) => {
      const points = run.curves[name], best = points.reduce((a, b) => ((RISES.test(name) ? b[1] > a[1] : b[1] < a[1]) ? b : a));
      return [run.name, `${points[0][0]}–${points[points.length - 1][0]}`, points[points.length - 1][1], best[1], `${best[0]}`];
    });
    const legend = make("p", {}, ...page.runs.map((run, i) => {
      const sign = make("span", { "aria-hidden": "true" }, "■ ");
      sign.style.color = LINES[i % LINES.length];
      return make("span", {}, sign, `${run.name}  `);
    }));
    holder.replaceChildren(make("figure", {}, make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": say("runs.chart", { name }) }, chart(page.runs, name, isLog)), legend),
      table([say("runs.run"), say("runs.steps"), say("runs.last"), say(RISES.test(name) ? "runs.most" : "runs.least"), say("runs.at")], rows, say("runs.table", { name })));
  };
  const select = make("select", { onchange: (event) => { name = event.target.value; draw(); } }, ...names.map((each) => make("option", { value: each }, each)));
  select.value = name;
  const log = make("input", { type: "checkbox", onchange: (event) => { isLog = event.target.checked; draw(); } });
  element.append(make("div", { class: "controls" }, make("label", {}, `${say("runs.number")} `, select), make("label", {}, log, ` ${say("runs.log")}`)), holder);
  draw();
}, () => page.runs.length > 0);

begin();
