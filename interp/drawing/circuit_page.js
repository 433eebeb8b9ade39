"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const by = id => document.getElementById(id);
const graph = by("graph"), slider = by("threshold"), tip = by("tip"), name = by("name");
const LEFT = 110, TOP = 54;
let view = "unrolled";

const made = (tag, attributes, text) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  graph.append(element);
  return element;
};

const counted = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

const ranges = numbers => {
  const parts = [];
  for (const number of [...new Set(numbers)].sort((a, b) => a - b)) {
    const last = parts[parts.length - 1];
    if (last && number === last[1] + 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : `${a}–${b}`)).join(", ");
};

/* The number of edges grows by equal factors along the slider. */
const shownEdges = () => {
  const most = data.edges.length;
  return data.edges.slice(0, Math.round(most ** (slider.value / 100)));
};

/* What is drawn: lines between places, with the names of both ends. */
const unrolledLines = edges => edges.map(([writer, reader, input, score]) => {
  const [from, to] = [data.nodes[writer], data.nodes[reader]];
  const end = input ? to.name.replace(/(@\d+)?$/, `.${input}$1`) : to.name;
  return { from, to, score, later: false, names: `${from.name} → ${end}`, about: `score ${score.toPrecision(3)}` };
});

const foldedLines = edges => {
  const lines = new Map();
  for (const [writer, reader, , score] of edges) {
    const [from, to] = [data.nodes[writer], data.nodes[reader]];
    const later = from.loop !== null && to.loop !== null && from.loop !== to.loop;
    const key = `${from.folded} → ${to.folded} ${later}`;
    if (!lines.has(key)) lines.set(key, { from, to, score: 0, later, names: `${from.folded} → ${to.folded}`, edges: 0, ahead: [], loops: [] });
    const line = lines.get(key);
    line.score += score;
    line.edges += 1;
    if (later) line.ahead.push(to.loop - from.loop);
    if (to.loop !== null) line.loops.push(to.loop);
  }
  for (const line of lines.values()) {
    const when = line.later ? `, iterations later: ${ranges(line.ahead)}` : "";
    const where = line.loops.length ? `\nread at loops ${ranges(line.loops)}` : "";
    line.about = `${counted(line.edges, "edge")}${when}${where}\nscore ${line.score.toPrecision(3)}`;
  }
  return [...lines.values()];
};

const shape = () => data.views[view];
const lowest = ticks => ticks.length ? Math.min(...ticks.map(([place]) => place)) : 0;
const highest = ticks => ticks.length ? Math.max(...ticks.map(([place]) => place)) : 0;
const pixels = (x, y) => [
  LEFT + (x - lowest(shape().columns)) * shape().width + (view === "unrolled" && data.moves.length ? 40 : 0),
  TOP + (highest(shape().rows) - y) * shape().height,
];
const at = node => pixels(...node[`${view}_at`]);

const curve = line => {
  const [[x0, y0], [x1, y1]] = [at(line.from), at(line.to)];
  if (x0 === x1 && y0 === y1) return `M${x0 - 5},${y0} C${x0 - 36},${y0 - 46} ${x0 + 36},${y0 - 46} ${x0 + 5},${y0}`;
  const bow = (y0 === y1 || line.later ? 9 : 3) * Math.sqrt(Math.abs(x1 - x0) / 76 + 0.2) * (x1 < x0 ? -2 : 1);
  return `M${x0},${y0} Q${(x0 + x1) / 2},${(y0 + y1) / 2 - 2 * bow} ${x1},${y1}`;
};

const choose = (element, names) => {
  document.querySelectorAll(".chosen").forEach(each => each.classList.remove("chosen"));
  element.classList.add("chosen");
  name.textContent = names;
  by("copy").disabled = false;
};

const acts = (element, names, about) => {
  element.addEventListener("mousemove", event => {
    tip.textContent = `${names}\n${about}`;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
  });
  element.addEventListener("mouseleave", () => { tip.hidden = true; });
  element.addEventListener("click", () => choose(element, names));
};

const axes = () => {
  const { columns, rows } = shape();
  const [right, bottom] = pixels(highest(columns), lowest(rows)).map(size => size + 52);
  for (const [y, row] of rows) made("text", { x: 12, y: pixels(0, y)[1] + 4 }, row);
  for (const [x, tick] of columns) made("text", { x: pixels(x, 0)[0], y: bottom, "text-anchor": "middle" }, tick);
  const width = right + 8;
  graph.setAttribute("viewBox", `0 0 ${width} ${bottom + 20}`);
  graph.style.minWidth = `${0.8 * width}px`;
  graph.style.maxWidth = `${width * Math.max(0.8, Math.min(1.3, 800 / bottom))}px`;
};

const drawNodes = lines => {
  const key = view === "folded" ? "folded" : "name", found = new Map();
  const note = (node, size, out) => {
    const one = found.get(node[key]) || { node, out: 0, into: 0 };
    one[out ? "out" : "into"] += size;
    found.set(node[key], one);
  };
  for (const line of lines) { note(line.from, Math.abs(line.score), true); note(line.to, Math.abs(line.score), false); }
  const loops = new Map();
  for (const [writer, reader] of shownEdges()) for (const node of [data.nodes[writer], data.nodes[reader]])
    if (node.loop !== null) loops.set(node.folded, [...(loops.get(node.folded) || []), node.loop]);
  const size = one => one.out || one.into, most = Math.max(...[...found.values()].map(size), 1e-30);
  for (const [label, one] of found) {
    const [cx, cy] = at(one.node), r = 4 + 7 * Math.sqrt(size(one) / most);
    const spoken = loops.get(one.node.folded);
    const said = view === "folded" && spoken ? `loops ${ranges(spoken)}\n` : "";
    acts(made("circle", { class: "node", cx, cy, r }), label, `${said}score ${size(one).toPrecision(3)}`);
    if (said) made("text", { class: "loops", x: cx, y: cy + r + 13, "text-anchor": "middle" }, said.trim());
  }
};

/* What heads move between positions inside, where both ends are drawn. */
const drawMoves = edges => {
  const shown = new Set(edges.flatMap(([writer, reader]) => [writer, reader]));
  for (const [start, end] of data.moves) if (shown.has(start) && shown.has(end)) {
    const [[x0, y0], [x1, y1]] = [at(data.nodes[start]), at(data.nodes[end])];
    made("path", { class: "move", d: `M${x0},${y0} Q${(x0 + x1) / 2},${y0 - 16} ${x1},${y1}` });
  }
};

const draw = () => {
  const edges = shownEdges(), lines = view === "folded" ? foldedLines(edges) : unrolledLines(edges);
  graph.replaceChildren();
  tip.hidden = true;
  axes();
  if (view === "unrolled") drawMoves(edges);
  const most = Math.max(...lines.map(line => Math.abs(line.score)), 1e-30);
  for (const line of [...lines].sort((a, b) => Math.abs(a.score) - Math.abs(b.score))) {
    const kind = `edge ${line.score < 0 ? "away" : "towards"}${line.later ? " later" : ""}`;
    const width = 0.8 + 5 * Math.sqrt(Math.abs(line.score) / most);
    acts(made("path", { class: kind, d: curve(line), "stroke-width": width }), line.names, line.about);
  }
  drawNodes(lines);
  const least = edges.length ? Math.abs(edges[edges.length - 1][3]).toPrecision(2) : "0";
  by("shown").textContent = `${edges.length} of ${counted(data.edges.length, "edge")}, score at least ${least}`;
  by("hint").textContent = view === "folded" ? "· dashed: read in a later iteration" : data.moves.length ? "· dotted: moved by a head" : "";
};

for (const each of ["unrolled", "folded"]) by(each).addEventListener("click", () => {
  view = each;
  for (const other of ["unrolled", "folded"]) by(other).setAttribute("aria-pressed", other === each);
  draw();
});
slider.addEventListener("input", draw);
by("copy").addEventListener("click", () => {
  const done = () => { by("copy").textContent = "copied"; setTimeout(() => { by("copy").textContent = "copy"; }, 1200); };
  const selected = () => { getSelection().selectAllChildren(name); document.execCommand("copy"); done(); };
  navigator.clipboard ? navigator.clipboard.writeText(name.textContent).then(done, selected) : selected();
});
slider.value = data.edges.length > 1 ? 100 * Math.min(1, Math.log(120) / Math.log(data.edges.length)) : 100;
draw();
