"use strict";
const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs, points = report.points;
const $ = (id) => document.getElementById(id);

// ---- words and numbers

const RATE = { wer: "word error rate", accuracy: "accuracy" };
const CURVE = { wer: "word error rate, %", accuracy: "accuracy, %", eval_loss: "loss on held-out users", train_loss: "training loss of the round's users", epsilon: "epsilon" };
const AXIS = { both: "bytes up and down, whole run", up: "bytes up, whole run", down: "bytes down, whole run", epsilon: "epsilon, measured", extrapolated: "epsilon, extrapolated to a larger cohort", round: "round", seconds: "seconds of rounds", users: "users trained" };
const LAYERS = {
  layer_clipped: ["Clip fraction: share of users clipped", "share of users", 100, "%"],
  layer_norm: ["Norm of a user's update before the clip, mean", "norm", 1, ""],
  layer_snr: ["Signal to noise of what was released: 1 is nothing but noise", "ratio", 1, ""],
  layer_sparsity: ["Update sparsity: share of zeros in what was sent", "share of zeros", 100, "%"],
  trust_ratio: ["Trust ratio of the server's step", "ratio", 1, ""],
};
const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];  // Okabe and Ito
const SYMBOLS = [["circle", "●"], ["square", "■"], ["diamond", "◆"], ["triangle-up", "▲"], ["cross", "✚"], ["x", "✖"], ["triangle-down", "▼"], ["star", "★"]];
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"], STROKES = ["", "7 4", "2 3", "7 3 2 3", "12 5", "12 3 2 3"];

const number = (v, digits = 3) => v === null || v === undefined ? "" : Math.abs(v) >= 1e15 ? v.toExponential(digits - 1) : Math.abs(v) >= 1e5 || Number.isInteger(v) ? Math.round(v).toLocaleString("en") : Math.abs(v) >= 1e3 ? Number(v.toPrecision(digits)).toLocaleString("en") : String(Number(v.toPrecision(digits)));
function epsilon(v) {  // never less than it is
  if (!(v > 0) || !Number.isFinite(v)) return number(v);
  const unit = 10 ** (Math.floor(Math.log10(v)) - 3);
  return number(Math.ceil(v / unit * (1 - 1e-12)) * unit, 4);
}
const percent = (v) => (100 * v).toFixed(1);
function bytes(v) {
  const unit = v >= 1e12 ? [1e12, "TB"] : v >= 1e9 ? [1e9, "GB"] : v >= 1e6 ? [1e6, "MB"] : v >= 1e3 ? [1e3, "kB"] : [1, "B"];
  return `${Number((v / unit[0]).toPrecision(3))} ${unit[1]}`;
}
function plain(v) {
  if (v === null || v === undefined) return "";
  return Array.isArray(v) ? v.map(plain).join(" + ") : typeof v === "number" ? String(v) : String(v);
}
const KINDS = {
  text: plain, number: (v) => typeof v === "number" ? number(v, 4) : plain(v), count: (v) => number(v), percent, epsilon,
  megabytes: (v) => number(v / 1e6, 4), minutes: (v) => number(v / 60),
};
const SCALE = { percent: 100, megabytes: 1e-6, minutes: 1 / 60 };
// A trial that waits has no configuration but what its sweep sets.
const configOf = (run) => run.known ? { ...report.common, ...run.config } : run.config;
function valueOf(run, column) {
  const place = column.from === "config" ? configOf(run) : column.from === "results" ? run.results : run;
  return place[column.key] ?? null;
}
const cell = (run, column) => { const v = valueOf(run, column); return v === null ? "" : KINDS[column.kind](v); };

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// ---- styles: colour, sign and dash of each point are in the report; seeds of one point differ in the dash, where it is free, or are thinner

const FEW = points.length <= COLOURS.length + 1;
const colour = (n) => n % (COLOURS.length + 1) === COLOURS.length ? ink() : COLOURS[n % (COLOURS.length + 1)];
const styleOf = (point) => ({ colour: colour(point.style[0]), symbol: SYMBOLS[point.style[1] % SYMBOLS.length] });
function styleOfRun(run) {
  const point = points.find((p) => p.runs.includes(run.id));
  if (!point) return { colour: ink(), symbol: SYMBOLS[0], dash: "solid", width: 1.8 };
  const seed = point.runs.indexOf(run.id);
  return { ...styleOf(point), dash: DASHES[(FEW ? seed : point.style[2]) % DASHES.length], width: FEW || !seed ? 1.9 : 1 };
}
// Where colours say one thing and signs another, a legend of both is shorter than one of all points.
function legendOf(those) {
  const { colours, signs } = report.legend, used = (side) => [...new Set(those.map((p) => p.style[side]))].sort((a, b) => a - b);
  if (!colours) return those.map((p) => ({ label: p.label, ...styleOf(p) }));
  return [...used(0).map((n) => ({ label: colours[n], colour: colour(n), symbol: [null, "▬"] })), ...used(1).map((n) => ({ label: signs[n], colour: css("--soft"), symbol: SYMBOLS[n] }))];
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const ink = () => css("--ink");
const narrow = () => window.innerWidth < 560;

function layoutOf(x, y, more = {}) {
  const axis = (title, extra) => ({ title: { text: title, font: { size: 13 } }, gridcolor: css("--grid"), linecolor: css("--rule"), zeroline: false, automargin: true, ...extra });
  return {
    height: narrow() ? 320 : 420, margin: { l: 56, r: 14, t: 12, b: 48 }, showlegend: false, hovermode: "closest",
    paper_bgcolor: css("--back"), plot_bgcolor: css("--back"), font: { color: ink(), size: narrow() ? 11 : 12.5, family: "system-ui, sans-serif" },
    hoverlabel: { align: "left" }, xaxis: axis(x[0], x[1]), yaxis: axis(y[0], y[1]), ...more,
  };
}

// ---- figures: each function gives traces, a layout, a sentence and a legend, or nothing where there is nothing to show

const rateNow = () => $("rate").value || report.rates[0];
const better = (rate) => (a, b) => rate === "wer" ? a.y.mean - b.y.mean : b.y.mean - a.y.mean;
const runsLabel = (p) => p.runs.length === 1 ? "one run" : p.seeds === p.runs.length ? `${p.seeds} seeds` : `${p.runs.length} runs of ${p.seeds} seed${p.seeds > 1 ? "s" : ""}`;

function tradeoff(axis) {
  const rate = rateNow(), those = points.filter((p) => p.rate === rate), there = those.filter((p) => p.x[axis]);
  if (!there.length) return null;
  const privacy = axis === "epsilon" || axis === "extrapolated", write = privacy ? epsilon : bytes;
  const front = report.fronts[rate][axis].map((id) => points[id]);
  const traces = there.map((p) => {
    const style = styleOf(p), bar = (s, of) => ({ type: "data", symmetric: false, array: [of(s.high - s.mean)], arrayminus: [of(s.mean - s.low)], color: style.colour, thickness: 1.2, width: 3 });
    return {
      type: "scatter", mode: "markers", name: p.label, x: [p.x[axis].mean], y: [100 * p.y.mean], customdata: [p.id],
      error_y: bar(p.y, (v) => 100 * v), error_x: bar(p.x[axis], (v) => v),
      marker: { color: style.colour, symbol: style.symbol[0] + (p.ended ? "" : "-open"), size: front.includes(p) ? 13 : 10, opacity: front.includes(p) ? 1 : 0.75, line: { color: p.ended ? css("--back") : style.colour, width: 1 } },
      hovertemplate: `<b>${escapeHtml(p.label)}</b><br>${RATE[rate]} ${percent(p.y.mean)}% (${percent(p.y.low)} to ${percent(p.y.high)}; ${runsLabel(p)})<br>${privacy ? "epsilon " : ""}${write(p.x[axis].mean)}<extra></extra>`,
    };
  });
  traces.unshift({ type: "scatter", mode: "lines", name: "Pareto front", x: front.map((p) => p.x[axis].mean), y: front.map((p) => 100 * p.y.mean), line: { color: css("--soft"), width: 1.4, dash: "dot" }, hoverinfo: "skip" });
  // What had noise of an infinite epsilon, or is not finished, is nothing to measure the others by.
  const without = those.filter((p) => !p.x[axis] && p.ended && !(axis === "epsilon" && p.noisy)).sort(better(rate))[0];
  const shapes = [], annotations = [];
  if (without) {
    const what = { epsilon: "best without noise", extrapolated: "best of the others" }[axis] || "best without messages";
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: 100 * without.y.mean, y1: 100 * without.y.mean, line: { color: css("--soft"), width: 1, dash: "dash" } });
    annotations.push({ xref: "paper", x: 0, y: 100 * without.y.mean, xanchor: "left", bgcolor: css("--back"), yanchor: "bottom", showarrow: false, text: `${what}: ${percent(without.y.mean)}%`, font: { size: 11, color: css("--soft") } });
  }
  const finished = there.filter((p) => p.ended), best = [...(finished.length ? finished : there)].sort(better(rate))[0], least = front[0];
  const open = there.length - finished.length;
  const sentence = `${RATE[rate][0].toUpperCase() + RATE[rate].slice(1)} of ${there.length} configuration${there.length > 1 ? "s" : ""} against ${AXIS[axis]}: the best, ${percent(best.y.mean)}%, is ${best.label} at ${write(best.x[axis].mean)}${least ? `; the least is ${least.label} at ${write(least.x[axis].mean)} and ${percent(least.y.mean)}%` : ""}. The dotted line joins those that none beats in both. Bars: least to greatest of several seeds; of one run the 95% interval.${open ? ` Hollow: ${open} not finished, in no front.` : ""}`;
  return { traces, sentence, legend: legendOf(there), layout: layoutOf([AXIS[axis], { type: "log", ...decades(there.map((p) => p.x[axis].mean), write) }], [`${RATE[rate]}, %`, {}], { shapes, annotations }) };
}

// Few enough ticks to stand side by side: of each decade as few as give three, of less than a decade round numbers at even steps.
function decades(values, write) {
  const low = Math.min(...values), high = Math.max(...values), pad = Math.max(0.08, 0.06 * Math.log10(high / low));
  const range = [Math.log10(low) - pad, Math.log10(high) + pad], from = 10 ** range[0], to = 10 ** range[1];
  let ticks = [];
  for (const steps of [[1], [1, 3], [1, 2, 5]]) {
    ticks = [];
    for (let e = Math.floor(range[0]); e <= range[1]; e++) ticks.push(...steps.map((s) => s * 10 ** e).filter((t) => t >= from && t <= to));
    if (ticks.length >= 3) break;
  }
  if (ticks.length < 3) {
    const rough = (to - from) / 4, power = 10 ** Math.floor(Math.log10(rough)), step = power * [1, 2, 5, 10].find((s) => s * power >= rough);
    ticks = [];
    for (let t = Math.ceil(from / step) * step; t <= to; t += step) ticks.push(t);
  }
  const most = narrow() ? 4 : 9, every = Math.ceil(ticks.length / most);
  const shown = ticks.filter((_, i) => i % every === 0);
  return { range, tickmode: "array", tickvals: shown, ticktext: shown.map(write) };
}

const pairStyle = (run) => ({ colour: COLOURS[run === pairNow()[0] ? 0 : 1], symbol: SYMBOLS[0], width: 1.9, dash: run === pairNow()[0] ? "solid" : "dash" });

function curves(chosen, measure, against, look = styleOfRun) {
  const factor = measure === "wer" || measure === "accuracy" ? 100 : 1, traces = [], drawn = [];
  for (const run of chosen) {
    const ys = run.curves[measure], xs = run.curves[against];
    if (!ys || !xs) continue;
    const at = ys.map((_, i) => i).filter((i) => ys[i] !== null && xs[i] !== null);
    if (!at.length) continue;
    const style = look(run), low = run.curves[`${measure}_low`], high = run.curves[`${measure}_high`];
    if (low && chosen.length <= 4) {
      const band = [...at, ...[...at].reverse()], edge = at.map((i) => high[i]).concat([...at].reverse().map((i) => low[i]));
      traces.push({ type: "scatter", mode: "lines", x: band.map((i) => xs[i]), y: edge.map((v) => factor * v), fill: "toself", fillcolor: style.colour + "22", line: { width: 0 }, hoverinfo: "skip", showlegend: false, name: `${run.name}, 95% interval` });
    }
    traces.push({ type: "scatter", mode: at.length < 60 ? "lines+markers" : "lines", name: run.name, x: at.map((i) => xs[i]), y: at.map((i) => factor * ys[i]), line: { color: style.colour, dash: style.dash, width: style.width }, marker: { symbol: style.symbol[0], size: 5, color: style.colour }, customdata: at.map(() => run.id),
      hovertemplate: `<b>${escapeHtml(run.name)}</b><br>${AXIS[against]} %{x:,.4~g}<br>${CURVE[measure]} %{y:.4~g}<extra></extra>` });
    drawn.push({ run, last: factor * ys[at[at.length - 1]], style });
  }
  if (!drawn.length) return null;
  const sentence = `${CURVE[measure][0].toUpperCase() + CURVE[measure].slice(1)} against ${AXIS[against]} of ${drawn.length} run${drawn.length > 1 ? "s" : ""}; at the end ${drawn.slice(0, 3).map((d) => `${d.run.name} ${number(d.last)}`).join(", ")}${drawn.length > 3 ? " and others" : ""}.${chosen.length <= 4 && factor === 100 ? " Bands: 95% interval." : ""}`;
  const si = against === "both" ? { tickformat: "~s", ticksuffix: "B" } : { tickformat: against === "epsilon" ? "~g" : "~s" };
  return { traces, sentence, legend: drawn.map((d) => ({ label: d.run.name, ...d.style, line: true })), layout: layoutOf([AXIS[against], si], [CURVE[measure], {}]) };
}

// A layer's name in few letters: first the modules above it by their initials, then its middle left out.
function shortName(name, most) {
  if (name.length <= most) return name;
  const parts = name.split("."), brief = parts.map((part, i) => i === parts.length - 1 || /^\d+$/.test(part) ? part : part[0]).join(".");
  return brief.length <= most ? brief : brief.slice(0, Math.ceil(most / 2)) + "…" + brief.slice(1 - Math.floor(most / 2));
}

function heat(run, key) {
  const found = run && run.layers[key];
  if (!found) return null;
  const [title, unit, factor, suffix] = LAYERS[key], log = factor === 1;
  const raw = found.values.map((layer) => layer.map((v) => v === null ? null : factor * v));
  const positive = raw.flat().filter((v) => v !== null && (!log || v > 0));
  const low = positive.reduce((a, b) => Math.min(a, b), Infinity), high = positive.reduce((a, b) => Math.max(a, b), -Infinity);
  const z = log ? raw.map((layer) => layer.map((v) => v > 0 ? Math.log10(v) : null)) : raw;
  const labels = found.names.map((name) => shortName(name, narrow() ? 14 : window.innerWidth < 900 ? 22 : 32));
  const names = found.names, every = Math.ceil(names.length / (narrow() ? 24 : 40)), rows = names.map((_, i) => i), shown = rows.filter((i) => i % every === 0);
  const bar = { title: { text: unit, side: "right" }, thickness: 11, outlinewidth: 0, len: 1, ticksuffix: suffix };
  const scale = log && positive.length ? { ...bar, tickmode: "array", ...(({ tickvals, ticktext }) => ({ tickvals: tickvals.map(Math.log10), ticktext }))(decades([low, Math.max(high, low * 1.01)], (v) => v >= 1e5 || v < 1e-3 ? v.toExponential(0) : number(v))) } : bar;
  const traces = [{ type: "heatmap", name: title, x: found.rounds, y: rows, z, customdata: raw, colorscale: "Cividis", ...(log ? {} : { zmin: 0, zmax: 100 }), colorbar: scale, text: names.map((name) => found.rounds.map(() => escapeHtml(name))),
    hovertemplate: `<b>%{text}</b><br>round %{x}<br>${unit} %{customdata:.4~g}${suffix}<extra></extra>`, hoverongaps: false }];
  const last = raw.map((layer) => layer[layer.length - 1]), order = rows.filter((i) => last[i] !== null).sort((a, b) => last[b] - last[a]);
  const ends = order.length ? ` In round ${found.rounds[found.rounds.length - 1]} the most is ${names[order[0]]} (${number(last[order[0]])}${suffix}), the least ${names[order[order.length - 1]]} (${number(last[order[order.length - 1]])}${suffix}).` : "";
  const layout = layoutOf(["round", {}], ["", { tickmode: "array", tickvals: shown, ticktext: shown.map((i) => labels[i]), autorange: "reversed" }]);
  layout.margin.l = 16 + (narrow() ? 6.6 : 7.4) * Math.max(...labels.map((label) => label.length));
  layout.height = Math.min(900, 110 + Math.max(100, names.length * (names.length > 40 ? 8 : 20)));
  return { traces, layout, sentence: `${title}, by layer and round, in ${run.name}.${ends}`, legend: [], heading: title };
}

function speakers(chosen) {
  const there = chosen.filter((run) => run.speakers.count);
  if (!there.length) return null;
  const traces = there.map((run) => {
    const rates = run.speakers.wer, style = styleOfRun(run);
    return { type: "scatter", mode: "lines", name: run.name, x: rates.map((_, i) => rates.length > 1 ? 100 * i / (rates.length - 1) : 100), y: rates.map((v) => 100 * v), line: { color: style.colour, dash: style.dash, width: style.width }, customdata: rates.map(() => run.id), text: run.speakers.who.map((who) => escapeHtml(who)),
      hovertemplate: `<b>${escapeHtml(run.name)}</b><br>%{text}<br>%{x:.0f}% of speakers are at or below<br>%{y:.1f}% WER<extra></extra>` };
  });
  const shapes = [{ type: "rect", xref: "x", yref: "paper", x0: 90, x1: 100, y0: 0, y1: 1, fillcolor: css("--soft"), opacity: 0.13, line: { width: 0 } }];
  const said = there.slice(0, 3).map((run) => `${run.name} ${run.speakers.wer_worst_decile === undefined ? "" : percent(run.speakers.wer_worst_decile) + "%"}`).join(", ");
  return { traces, legend: there.map((run) => ({ label: run.name, ...styleOfRun(run), line: true })), layout: layoutOf(["share of held-out speakers, best first, %", { range: [0, 101] }], ["word error rate, %", { rangemode: "tozero" }], { shapes }),
    sentence: `Word error rates of the held-out speakers in ascending order; shaded the worst tenth, whose rate over all its words is ${said}.` };
}

const escapeHtml = (text) => String(text).replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

// ---- drawing

const FIGURES = {
  bytes: () => tradeoff($("bytes").value),
  epsilon: () => tradeoff($("claim").value),
  curves: () => curves(shownRuns(), $("measure").value, $("against").value),
  speakers: () => speakers(shownRuns()),
  pair: () => pairNow()[0] === pairNow()[1] ? null : curves(pairNow(), pairNow()[0].rate || $("measure").value, pairNow().every((run) => run.results.both) ? "both" : "round", pairStyle),
  ...Object.fromEntries(Object.keys(LAYERS).map((key) => [key, () => heat(runs[Number($("layerrun").value)], key)])),
};
const drawn = {};

function draw(name) {
  const figure = document.querySelector(`figure[data-figure="${name}"]`), made = FIGURES[name]();
  figure.hidden = !made;
  drawn[name] = made;
  const section = figure.closest("section");
  if (section.id !== "pair") section.hidden = [...section.querySelectorAll("figure")].every((f) => f.hidden) && !["course"].includes(section.id);
  if (!made) return;
  if (!figure.firstChild) {
    figure.append(...(LAYERS[name] ? [make("h3", { class: "small" })] : []), make("div", { class: "plot", role: "img" }), make("ul", { class: "legend" }), make("figcaption"),
      make("div", { class: "tools" }, ...["png", "svg"].map((format) => make("button", { type: "button", "aria-label": `Save as ${format.toUpperCase()}`, onclick: () => save(name, format) }, format.toUpperCase()))));
  }
  if (made.heading) figure.querySelector("h3").textContent = made.heading;
  const plot = figure.querySelector(".plot");
  plot.setAttribute("aria-label", made.sentence);
  figure.querySelector("figcaption").textContent = made.sentence;
  figure.querySelector(".legend").replaceChildren(...made.legend.slice(0, 40).map((entry) => legendEntry(entry)), ...(made.legend.length > 40 ? [make("li", {}, `and ${made.legend.length - 40} more`)] : []));
  Plotly.react(plot, made.traces, made.layout, { displayModeBar: false, responsive: true });
}
function legendEntry(entry) {
  const sign = make("span", { "aria-hidden": "true", style: `color:${entry.colour}` });
  if (entry.line) sign.innerHTML = `<svg width="30" height="10"><path d="M0 5h30" stroke="currentColor" stroke-width="${entry.width}" stroke-dasharray="${STROKES[DASHES.indexOf(entry.dash)]}"/></svg>`;
  else sign.textContent = entry.symbol[1];
  return make("li", {}, sign, entry.label);
}
function drawAll() { Object.keys(FIGURES).forEach(draw); }

async function save(name, format) {
  const { traces, layout } = drawn[name];
  const those = LAYERS[name] ? [runs[Number($("layerrun").value)]] : name === "pair" ? pairNow() : runs, each = (of) => [...new Set(those.flatMap(of))].filter(Boolean);
  const claims = [each((run) => run.stamps).join(", "), ...each((run) => [run.privacy])].filter(Boolean);
  const legend = { showlegend: traces.length > 1 && traces[0].type !== "heatmap", width: 1100, height: Math.max(560, layout.height), title: { text: [escapeHtml(report.title), ...claims.map((claim) => `<sub>${escapeHtml(claim)}</sub>`)].join("<br>"), yref: "container", y: 1, yanchor: "top", pad: { t: 28 } }, margin: { ...layout.margin, t: 66 + 24 * claims.length } };
  const holder = make("div", { style: "position:absolute;left:-9999px" });
  document.body.append(holder);
  await Plotly.newPlot(holder, structuredClone(traces), { ...structuredClone(layout), ...legend });
  const url = await Plotly.toImage(holder, { format, width: 1100, height: legend.height, scale: format === "png" ? 2 : 1 });
  Plotly.purge(holder);
  holder.remove();
  download(`${name}.${format}`, url);
}
function download(name, url) {
  const link = make("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
}
const downloadText = (name, text, type) => download(name, URL.createObjectURL(new Blob([text], { type })));

// ---- the table

const state = { sort: null, down: false, shown: new Set(), open: new Set() };
const shownRuns = () => runs.filter((run) => state.shown.has(run.id));
const isNumber = (column) => column.kind !== "text";

function accepts(filter, run, column) {
  if (!filter) return true;
  const value = valueOf(run, column), scaled = typeof value === "number" ? value * (SCALE[column.kind] || 1) : null;
  const range = filter.match(/^(-?[\d.eE+-]+)\.\.(-?[\d.eE+-]+)$/), compared = filter.match(/^(<=|>=|<|>|=)\s*(-?[\d.eE+-]+)$/);
  if (range || compared) {
    if (scaled === null) return false;
    if (range) return scaled >= Number(range[1]) && scaled <= Number(range[2]);
    const at = Number(compared[2]);
    return { "<": scaled < at, ">": scaled > at, "<=": scaled <= at, ">=": scaled >= at, "=": scaled === at }[compared[1]];
  }
  return cell(run, column).toLowerCase().includes(filter.toLowerCase());
}
function tableRuns() {
  const find = $("find").value.trim().toLowerCase(), filters = [...document.querySelectorAll("#table thead input")].map((input) => input.value.trim());
  const found = runs.filter((run) => report.columns.every((column, i) => accepts(filters[i], run, column)) && (!find || report.columns.some((c) => cell(run, c).toLowerCase().includes(find)) || JSON.stringify(run.config).toLowerCase().includes(find)));
  if (state.sort === null) return found;
  const column = report.columns[state.sort];
  return found.sort((a, b) => {
    const [x, y] = [valueOf(a, column), valueOf(b, column)];
    if (x === null || y === null) return (x === null) - (y === null);
    return (typeof x === "number" && typeof y === "number" ? x - y : plain(x).localeCompare(plain(y), "en", { numeric: true })) * (state.down ? -1 : 1);
  });
}
function makeHead() {
  const heads = report.columns.map((column, i) => make("th", { scope: "col", class: isNumber(column) ? "n" : null, "aria-sort": "none" }, make("button", { type: "button", onclick: () => { state.down = state.sort === i && !state.down; state.sort = i; keep(); fillTable(); } }, column.title)));
  const filters = report.columns.map((column) => make("th", {}, make("input", { type: "search", "aria-label": `Filter ${column.title}`, oninput: () => { keep(); fillTable(); } })));
  $("table").append(make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "draw"), ...heads), make("tr", {}, make("th", {}), ...filters)), make("tbody"));
}
function fillTable() {
  const found = tableRuns();
  $("count").textContent = `${found.length} of ${runs.length} run${runs.length > 1 ? "s" : ""}`;
  document.querySelectorAll("#table thead tr:first-child th[aria-sort]").forEach((head, i) => head.setAttribute("aria-sort", state.sort === i ? (state.down ? "descending" : "ascending") : "none"));
  const rows = found.flatMap((run) => {
    const cells = report.columns.map((column, i) => make("td", { class: isNumber(column) ? "n" : null }, i ? cell(run, column) : make("button", { type: "button", class: "open", "aria-expanded": String(state.open.has(run.id)), onclick: () => { state.open.has(run.id) ? state.open.delete(run.id) : state.open.add(run.id); keep(); fillTable(); } }, run.name)));
    const box = make("input", { type: "checkbox", "aria-label": `Draw ${run.name}`, onchange: () => { state.shown.has(run.id) ? state.shown.delete(run.id) : state.shown.add(run.id); keep(); draw("curves"); draw("speakers"); } });
    box.checked = state.shown.has(run.id);
    const row = make("tr", { "data-run": run.id }, make("td", {}, box), ...cells);
    return state.open.has(run.id) ? [row, detailsOf(run)] : [row];
  });
  $("table").querySelector("tbody").replaceChildren(...rows);
}
function detailsOf(run) {
  const inside = make("div", {}, make("p", {}, `Folder ${run.folder}. ${run.note} ${run.privacy} ${run.error}`.trim()));
  const said = (r, key) => plain(configOf(r)[key]) || (r.known ? "not set" : "");  // a trial that waits may yet get it
  const keys = [...new Set([run, ...runs].flatMap((r) => Object.keys(r.config)))].filter((key) => key !== "run.out");
  const differing = keys.map((key) => [key, said(run, key), [...new Set(runs.filter((r) => r !== run).map((r) => said(r, key)).filter(Boolean))]]).filter(([, here, others]) => others.some((value) => value !== here));
  if (runs.length > 1) {
    inside.append(make("b", {}, "What differs from the others"), tableOf([["key", "here", "others"], ...differing.map(([key, here, others]) => [key, here || "not known yet", others.slice(0, 6).join(", ")])]));
  }
  const all = Object.entries(configOf(run)).sort(([a], [b]) => a < b ? -1 : 1);
  inside.append(make("details", { open: runs.length === 1 }, make("summary", {}, "Whole configuration"), tableOf([["key", "value"], ...all.map(([key, value]) => [key, plain(value)])])));
  inside.append(make("button", { type: "button", onclick: () => { $("first").value = run.id; drawPair(); $("pair").scrollIntoView(); } }, "Put beside another"));
  return make("tr", { class: "details" }, make("td", { colspan: report.columns.length + 1 }, inside));
}
function tableOf(rows) {
  const line = (values, tag) => make("tr", {}, ...values.map((v) => make(tag, {}, v)));
  return make("table", {}, make("thead", {}, line(rows[0], "th")), make("tbody", {}, ...rows.slice(1).map((row) => line(row, "td"))));
}
const csvCell = (text) => /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
function asCsv() {
  const raw = (run, column) => { const v = valueOf(run, column); return typeof v === "number" ? String(v * (SCALE[column.kind] || 1)) : plain(v); };
  return [report.columns.map((c) => csvCell(c.title)), ...tableRuns().map((run) => report.columns.map((c) => csvCell(raw(run, c))))].map((row) => row.join(",")).join("\n") + "\n";
}
const tex = (text) => text.replace(/[\\&%$#_{}~^]/g, (c) => ({ "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}" })[c] || "\\" + c);
function asLatex() {
  const rows = [report.columns.map((c) => tex(c.title)), ...tableRuns().map((run) => report.columns.map((c) => tex(cell(run, c))))].map((row) => "  " + row.join(" & ") + " \\\\");
  return [`\\begin{tabular}{${report.columns.map((c) => isNumber(c) ? "r" : "l").join("")}}`, "  \\toprule", rows[0], "  \\midrule", ...rows.slice(1), "  \\bottomrule", "\\end{tabular}", ""].join("\n");
}

// ---- two runs, speakers' table, head

const pairNow = () => [runs[Number($("first").value)], runs[Number($("second").value)]];
function drawPair() {
  const [a, b] = pairNow(), [x, y] = [configOf(a), configOf(b)];
  const settings = [...new Set([...Object.keys(x), ...Object.keys(y)])].filter((key) => key !== "run.out" && plain(x[key]) !== plain(y[key])).sort();
  const results = report.columns.filter((c) => c.from === "results").map((c) => [c.title, cell(a, c), cell(b, c)]).filter(([, v, w]) => v || w);
  const line = (values, tag) => make("tr", {}, ...values.map((v, i) => make(tag, { class: i && tag === "td" && /^[-\d.,]+$/.test(v) ? "n" : null }, v)));
  $("differences").replaceChildren(make("thead", {}, line(["", a.name, b.name], "th")), make("tbody", {}, ...results.map((row) => line(row, "td")), ...settings.map((key) => line([key, plain(x[key]) || "not set", plain(y[key]) || "not set"], "td"))));
  draw("pair");
}
function drawSpread() {
  const names = [["wer_speakers_q25", "lower quartile, %"], ["wer_speakers_median", "median, %"], ["wer_speakers_q75", "upper quartile, %"], ["wer_speakers_sd", "standard deviation, points"], ["wer_worst_decile", "worst tenth, %"]];
  const there = runs.filter((run) => run.speakers.count);
  const row = (values, tag) => make("tr", {}, ...values.map((v, i) => make(tag, { class: i ? "n" : null }, v)));
  $("spread").replaceChildren(make("thead", {}, row(["run", "speakers", ...names.map((n) => n[1])], "th")), make("tbody", {}, ...there.map((run) => row([run.name, String(run.speakers.count), ...names.map(([key]) => run.speakers[key] === undefined ? "" : percent(run.speakers[key]))], "td"))));
}
function drawHead() {
  $("sentence").textContent = report.sentence;
  const meaning = { private: "user-level differential privacy was accounted for", "not private": "no noise, or none that gives a finite epsilon", "noise without a finite epsilon": "so little noise that no epsilon was found: no privacy is claimed", nominal: "seeded simulation: the noise can be repeated, so that epsilon is a figure, no guarantee", extrapolated: "a figure for a larger cohort than was run", insecure: "without the protections of a deployment" };
  $("stamps").replaceChildren(...report.stamps.map((stamp) => make("li", { title: meaning[stamp], "data-good": stamp === "private", "data-warn": stamp !== "private" }, `${stamp}${runs.length > 1 ? ` (${runs.filter((r) => r.stamps.includes(stamp)).length})` : ""}`)));
  $("claims").textContent = [...report.privacy, ...report.notes].join(". ");
  const rate = rateNow(), those = points.filter((p) => p.rate === rate).sort((a, b) => b.ended - a.ended || better(rate)(a, b)), tiles = [];
  if (those.length) {
    const best = those[0], sign = rate === "wer" ? 1 : -1;
    tiles.push([`best ${RATE[rate]}`, `${percent(best.y.mean)}%`, best.label]);
    const near = those.filter((p) => p.x.both && p.ended === best.ended && sign * (p.y.mean - best.y.mean) <= 0.01).sort((a, b) => a.x.both.mean - b.x.both.mean)[0];
    if (near) tiles.push([near === best ? "bytes it took, both ways" : "fewest bytes within 1 point of it", bytes(near.x.both.mean), near.label]);
    const guarded = those.filter((p) => p.x.epsilon);
    if (guarded.length) tiles.push([`best ${RATE[rate]} under noise`, `${percent(guarded[0].y.mean)}%`, `epsilon ${epsilon(guarded[0].x.epsilon.mean)}: ${guarded[0].label}`]);
  }
  const states = [...new Set(runs.map((r) => r.status))].map((s) => `${runs.filter((r) => r.status === s).length} ${s}`).join(", ");
  tiles.push(["runs", String(runs.length), states]);
  $("tiles").replaceChildren(...tiles.map(([what, value, more]) => make("div", {}, make("dt", {}, what), make("dd", {}, value, make("small", {}, more)))));
}

// ---- start

function options(select, entries) { $(select).replaceChildren(...entries.map(([value, text]) => make("option", { value }, text))); }
const named = runs.map((run) => [run.id, run.name]);
options("rate", report.rates.map((rate) => [rate, RATE[rate]]));
options("measure", Object.keys(CURVE).filter((key) => runs.some((run) => run.curves[key])).map((key) => [key, CURVE[key]]));
options("layerrun", named.filter(([id]) => Object.keys(runs[id].layers).length));
options("first", named);
options("second", named);
$("second").value = runs.length > 1 ? 1 : 0;
for (const [id, there] of [["rate", report.rates.length > 1], ["claim", runs.some((run) => run.results.extrapolated)]]) document.querySelector(`[data-for="${id}"]`).hidden = !there;
if (!runs.some((run) => run.curves.epsilon)) $("against").querySelector('[value="epsilon"]').remove();
if (!runs.some((run) => run.results.both)) $("against").querySelector('[value="both"]').remove();
$("pair").hidden = runs.length < 2;
document.querySelector("[data-rate]").textContent = report.rates.includes("wer") ? "Error against bytes" : "Accuracy against bytes";
$("privacy").querySelector("h2").textContent = report.rates.includes("wer") ? "Error against epsilon" : "Accuracy against epsilon";
const favourites = [...new Set(report.rates.flatMap((rate) => Object.values(report.fronts[rate]).flat()))].map((id) => points[id].runs[0]);
for (const id of runs.length <= 8 ? runs.map((run) => run.id) : (favourites.length ? favourites : runs.map((run) => run.id)).slice(0, 6)) state.shown.add(id);

const store = { get: (key) => { try { return sessionStorage.getItem(`${report.title} ${key}`); } catch { return null; } }, set: (key, value) => { try { sessionStorage.setItem(`${report.title} ${key}`, value); } catch { /* a page from a file may have no store */ } } };
for (const select of document.querySelectorAll("select")) {
  const kept = store.get(`select ${select.id}`);
  if (kept !== null && [...select.options].some((o) => o.value === kept)) select.value = kept;
  select.addEventListener("change", () => store.set(`select ${select.id}`, select.value));
}
// What was picked, sorted and opened outlives a page that loads itself anew; runs by folder, columns by title.
const filterFields = () => [...document.querySelectorAll("#table thead input")];
function keep() {
  const folders = (ids) => [...ids].map((id) => runs[id].folder), filters = Object.fromEntries(filterFields().map((field, i) => [report.columns[i].title, field.value]));
  store.set("table", JSON.stringify({ sort: state.sort === null ? null : report.columns[state.sort].title, down: state.down, open: folders(state.open), boxes: runs.map((run) => [run.folder, state.shown.has(run.id)]), find: $("find").value, filters }));
}
function restore() {
  const kept = JSON.parse(store.get("table") || "null");
  if (!kept) return;
  const place = report.columns.findIndex((column) => column.title === kept.sort), boxes = new Map(kept.boxes);
  [state.sort, state.down] = [place < 0 ? null : place, kept.down];
  for (const run of runs) {
    if (kept.open.includes(run.folder)) state.open.add(run.id);
    if (boxes.has(run.folder)) state.shown[boxes.get(run.folder) ? "add" : "delete"](run.id);
  }
  $("find").value = kept.find;
  filterFields().forEach((field, i) => { field.value = kept.filters[report.columns[i].title] || ""; });
}
const dark = matchMedia("(prefers-color-scheme: dark)");
function setTheme(theme) { document.documentElement.dataset.theme = theme; drawAll(); }
$("theme").addEventListener("click", () => { const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark"; store.set("theme", theme); setTheme(theme); });
dark.addEventListener("change", () => { if (!store.get("theme")) setTheme(dark.matches ? "dark" : "light"); });
document.documentElement.dataset.theme = store.get("theme") || (dark.matches ? "dark" : "light");

for (const [select, figures] of Object.entries({ bytes: ["bytes"], claim: ["epsilon"], measure: ["curves"], against: ["curves"], layerrun: Object.keys(LAYERS), rate: ["bytes", "epsilon"] })) $(select).addEventListener("change", () => { figures.forEach(draw); if (select === "rate") drawHead(); });
for (const select of ["first", "second"]) $(select).addEventListener("change", drawPair);
$("find").addEventListener("input", () => { keep(); fillTable(); });
$("csv").addEventListener("click", () => downloadText("runs.csv", asCsv(), "text/csv"));
$("latex").addEventListener("click", () => downloadText("runs.tex", asLatex(), "application/x-tex"));
let wasNarrow = narrow();
addEventListener("resize", () => { if (narrow() !== wasNarrow) { wasNarrow = narrow(); drawAll(); } });
drawHead();
makeHead();
restore();
fillTable();
drawSpread();
drawAll();
drawPair();
document.documentElement.dataset.ready = "yes";
