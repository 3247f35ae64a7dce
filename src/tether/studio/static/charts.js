// Line charts over uPlot: drawn in the theme's colours, with linked cursors and zoom within a group, values in the
// caption instead of a box over the lines, arrow keys, PNG and SVG. Knows columns of numbers; not what they mean.

import uPlot from "./vendor/uplot/uPlot.esm.js";
import { h, button } from "./dom.js";
import { placeOnAxis } from "./axes.js";
import { axisNumbers, number } from "./format.js";
import { saveChartPng, saveChartSvg } from "./image.js";

const HEIGHT = 172;
const FONT = "11px Inter, system-ui, sans-serif";

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function faint(name, share) {
  return colour(name) + Math.round(share * 255).toString(16).padStart(2, "0");
}

/** Charts whose cursors and zoom move together. */
export class ChartGroup {
  /** `axis`: {name, label, whole} of what the horizontal axis counts; `whole` numbers alone are labelled. */
  constructor(signal, axis = { name: "iteration", label: "iteration", whole: true }) {
    this.axis = axis;
    this.charts = new Set();
    this.range = null;
    this.smoothing = 0;
    this.sync = uPlot.sync(`group-${Math.random()}`);
    document.addEventListener("theme", () => this.each((chart) => chart.plot?.redraw(false)), { signal });
    signal.addEventListener("abort", () => this.each((chart) => chart.destroy()));
  }

  add(spec) {
    const chart = new Chart(this, spec);
    this.charts.add(chart);
    return chart;
  }

  remove(chart) {
    this.charts.delete(chart);
    chart.destroy();
  }

  each(run) {
    for (const chart of this.charts) run(chart);
  }

  /** [from, to], or null for everything. */
  zoom(range) {
    this.range = range;
    this.each((chart) => chart.fit());
  }

  smooth(weight) {
    this.smoothing = weight;
    this.each((chart) => chart.draw());
  }

  point(index) {
    this.each((chart) => chart.point(index));
  }
}

/**
 * One chart. `spec`: {title, unit, series, stacked, levels: [{value, label}], marks: () => [x], height, onPoint, apart}.
 * `apart`: its lines have points of their own, and where one has none the one before is read.
 * A series: {label, colour, dashed}; its data, given to `update`: {values, low, high}.
 */
class Chart {
  constructor(group, spec) {
    this.group = group;
    this.spec = spec;
    this.data = { x: [], columns: spec.series.map(() => ({ values: [] })) };
    this.values = spec.series.map(() => h("b", {}));
    this.where = h("span", { class: "where" });
    this.place = h("div", { class: "plot", tabindex: "0", role: "img", "aria-label": spec.title, onkeydown: (e) => this.key(e) });
    this.element = h("figure", { class: "chart", dataset: { chart: spec.title } }, this.caption(), this.place);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.place);
  }

  caption() {
    const legend = this.spec.series.map((series, i) =>
      h("span", { class: "reading" }, h("i", { class: series.dashed ? "swatch dashed" : "swatch", style: { "--c": `var(--${series.colour})` } }),
        this.spec.series.length > 1 ? h("span", { class: "of" }, series.label) : null, this.values[i]));
    const name = this.spec.title;
    return h("figcaption", {},
      h("div", { class: "titles" }, h("h3", {}, name), h("span", { class: "unit" }, this.spec.unit ?? ""), this.where,
        h("span", { class: "tools" },
          this.spec.tools ?? null,
          button("PNG", () => saveChartPng(this), { class: "tool", "aria-label": `${name} as PNG` }),
          button("SVG", () => saveChartSvg(this), { class: "tool", "aria-label": `${name} as SVG` }))),
      h("div", { class: "readings" }, legend));
  }

  update(x, columns) {
    this.data = { x, columns };
    this.draw();
  }

  /** What uPlot draws: per series the raw line (faint, when smoothed), the line, and the edges of its band. */
  table() {
    const rows = [this.data.x];
    let below = this.data.x.map(() => 0);
    for (const column of this.data.columns) {
      let values = column.values;
      if (this.spec.stacked) {
        below = below.map((base, i) => base + (values[i] ?? 0));
        values = below;
      }
      const smooth = this.group.smoothing && !this.spec.stacked;
      const line = (list) => (smooth ? smoothed(list, this.group.smoothing) : list);
      rows.push(smooth ? values : values.map(() => null), line(values));
      rows.push(column.low ? line(column.low) : values.map(() => null), column.high ? line(column.high) : values.map(() => null));
    }
    return rows;
  }

  draw() {
    this.describe();
    if (!this.place.clientWidth) return;
    const data = this.table();
    if (!this.plot) this.plot = new uPlot(this.options(), data, this.place);
    else {
      this.plot.setData(data, false);
      this.fit();
    }
    this.read(this.plot.cursor.idx ?? this.pointed ?? null);
  }

  fit() {
    if (!this.plot) return;
    const x = this.data.x;
    const [min, max] = this.group.range ?? [x[0] ?? 0, x.at(-1) ?? 1];
    this.plot.setScale("x", min === max ? { min: min - 0.5, max: max + 0.5 } : { min, max });
  }

  resize() {
    if (!this.place.clientWidth) return;
    if (!this.plot) this.draw();
    else this.plot.setSize({ width: this.place.clientWidth, height: this.spec.height ?? HEIGHT });
  }

  options() {
    const line = (series) => ({ stroke: () => colour(series.colour), width: 1.75, dash: series.dashed ? [5, 4] : undefined });
    const still = { show: true, stroke: "transparent", width: 0, points: { show: false }, spanGaps: true };
    const series = [{}];
    const bands = [];
    this.spec.series.forEach((one, i) => {
      const first = series.length;
      const under = this.spec.stacked && i ? first - 3 : null;
      const fill = this.spec.stacked && !i ? () => faint(one.colour, 0.28) : undefined;
      const points = { size: 4, fill: () => colour(one.colour), show: this.spec.stacked ? false : undefined };
      series.push(
        { ...still, stroke: () => faint(one.colour, 0.3), width: 1 },
        { ...line(one), fill, points, spanGaps: true },
        { ...still },
        { ...still },
      );
      bands.push({ series: [first + 3, first + 2], fill: () => faint(one.colour, 0.16) });
      if (under !== null) bands.push({ series: [first + 1, under], fill: () => faint(one.colour, 0.28) });
    });
    return {
      width: this.place.clientWidth,
      height: this.spec.height ?? HEIGHT,
      padding: [10, 8, 0, 0],
      legend: { show: false },
      scales: { x: { time: false, range: (u, min, max) => (min === max ? [min - 0.5, max + 0.5] : [min, max]) }, y: { range: yRange(this.spec) } },
      series,
      bands,
      axes: [this.axis({ size: 26, space: 56, values: (u, all) => axisNumbers(all.map((v) => (this.group.axis.whole && !Number.isInteger(v) ? null : v))) }), this.axis({
        size: (u, all) => 14 + 6.4 * Math.max(1, ...(all ?? []).map((text) => text?.length ?? 0)),
        space: 32,
        values: (u, all) => axisNumbers(all),
      })],
      cursor: {
        sync: { key: this.group.sync.key, setSeries: false, scales: ["x", null] },
        drag: { x: true, y: false, setScale: false },
        points: { size: 7, stroke: (u, i) => u.series[i].stroke, fill: () => colour("panel"), width: 2, show: (u, i) => u.series[i].width > 1 ? undefined : false },
        y: false,
        bind: { dblclick: () => () => this.group.zoom(null) },
      },
      hooks: {
        ready: [() => this.point(this.pointed)],
        setCursor: [(u) => this.moved(u)],
        setSelect: [(u) => this.selected(u)],
        draw: [(u) => this.drawMarks(u)],
      },
    };
  }

  axis(more) {
    return {
      stroke: () => colour("faint"),
      font: FONT,
      gap: 6,
      grid: { stroke: () => colour("line"), width: 1 },
      ticks: { show: false },
      ...more,
    };
  }

  selected(u) {
    if (u.select.width < 4) return;
    const from = u.posToVal(u.select.left, "x");
    const to = u.posToVal(u.select.left + u.select.width, "x");
    u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.group.zoom([from, to]);
  }

  /** Thresholds as dashed lines, alarms as small triangles at the foot. */
  drawMarks(u) {
    const { ctx, bbox } = u;
    const scale = devicePixelRatio;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.strokeStyle = ctx.fillStyle = colour("bad");
    for (const { value, label } of this.spec.levels ?? []) {
      const y = u.valToPos(value, "y", true);
      ctx.setLineDash([3 * scale, 3 * scale]);
      ctx.lineWidth = scale;
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.textAlign = "left";
      ctx.textBaseline = "bottom";
      ctx.font = `${10 * scale}px Inter, system-ui, sans-serif`;
      ctx.fillText(label, bbox.left + 6 * scale, y - 2 * scale);
    }
    ctx.setLineDash([]);
    for (const x of this.spec.marks?.() ?? []) {
      const at = u.valToPos(x, "x", true);
      ctx.beginPath();
      ctx.moveTo(at, bbox.top + bbox.height - 8 * scale);
      ctx.lineTo(at - 5 * scale, bbox.top + bbox.height);
      ctx.lineTo(at + 5 * scale, bbox.top + bbox.height);
      ctx.fill();
    }
    ctx.restore();
  }

  /** Put the values at `index` into the caption; the last ones where nothing is pointed at. */
  read(index) {
    const { x, columns } = this.data;
    columns.forEach((column, i) => {
      const value = index === null || index === undefined ? last(column.values) : this.spec.apart ? last(column.values.slice(0, index + 1)) : column.values[index];
      this.values[i].textContent = number(value);
    });
    const pointed = index !== null && index !== undefined && x[index] !== undefined;
    this.where.textContent = pointed ? placeOnAxis(this.group.axis, x[index]) : "";
  }

  /** Put the cursor at an index from outside: `onPoint` is not told. */
  point(index) {
    this.pointed = index;
    if (!this.plot || index === null || index === undefined) return;
    this.plot.setCursor({ left: this.plot.valToPos(this.data.x[index], "x"), top: 10 }, false);
    this.read(index);
  }

  /** The cursor moved: by the pointer, by keys, or by a linked chart. */
  moved(u) {
    const index = u.cursor.idx ?? null;
    this.read(index);
    if (this.spec.onPoint && (this.place.matches(":hover") || this.place === document.activeElement)) this.spec.onPoint(index);
    else if (this.spec.onPoint && index === null) this.spec.onPoint(null);
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this.plot || event.altKey || event.ctrlKey || event.metaKey) return;
    const end = this.data.x.length - 1;
    const here = this.plot.cursor.idx ?? end;
    let index = Math.min(end, Math.max(0, here + steps[event.key]));
    while (index > 0 && index < end && this.data.x[index] === this.data.x[here]) index += Math.sign(steps[event.key]);
    this.plot.setCursor({ left: this.plot.valToPos(this.data.x[index], "x"), top: 10 }, true, true);
    event.preventDefault();
    event.stopPropagation();
  }

  describe() {
    const parts = this.spec.series.map((series, i) => `${series.label} ${number(last(this.data.columns[i]?.values ?? []))}`);
    this.place.setAttribute("aria-label", `${this.spec.title} by ${this.group.axis.label}; at the end ${parts.join(", ")}`);
  }

  destroy() {
    this.observer.disconnect();
    this.plot?.destroy();
    this.plot = null;
  }
}

function last(values) {
  for (let i = values.length - 1; i >= 0; i -= 1) if (Number.isFinite(values[i])) return values[i];
  return null;
}

/** Room above and below; 0 stays the floor of what is never negative when the data come near it. */
function yRange(spec) {
  return (u, low, high) => {
    if (low === null || high === null) return [0, 1];
    if (spec.stacked) return [0, high * 1.05 || 1];
    const span = high - low || Math.abs(high) * 0.2 || 1;
    const floor = low >= 0 && low < span * 0.6 ? 0 : low - span * 0.08;
    return [floor, high + span * 0.08];
  };
}

/** Exponential moving average, with the bias of its start taken out (Kingma & Ba 2015, section 3). */
export function smoothed(values, weight) {
  let mean = 0;
  let norm = 0;
  return values.map((value) => {
    if (!Number.isFinite(value)) return null;
    mean = weight * mean + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return mean / norm;
  });
}
