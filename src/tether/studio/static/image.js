// A chart as a file: PNG from its canvas, SVG drawn from its numbers. Both carry title and legend.

import { s, download } from "./dom.js";
import { axisNumbers } from "./format.js";

const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const fileName = (chart, kind) => `${chart.spec.title.replace(/[^\p{L}\p{N}]+/gu, "-")}.${kind}`;

export function saveChartPng(chart) {
  const source = chart.plot.ctx.canvas;
  const scale = source.width / chart.plot.width;
  const head = 48 * scale;
  const canvas = document.createElement("canvas");
  canvas.width = source.width + 24 * scale;
  canvas.height = source.height + head + 8 * scale;
  const ctx = canvas.getContext("2d");
  ctx.fillStyle = value("panel");
  ctx.fillRect(0, 0, canvas.width, canvas.height);
  ctx.fillStyle = value("text");
  ctx.font = `600 ${14 * scale}px Inter, system-ui, sans-serif`;
  ctx.fillText(`${chart.spec.title}  by ${chart.group.axis.label}`, 12 * scale, 21 * scale);
  ctx.font = `${11 * scale}px Inter, system-ui, sans-serif`;
  let left = 12 * scale;
  for (const series of chart.spec.series) {
    ctx.fillStyle = value(series.colour);
    ctx.fillRect(left, 33 * scale, 12 * scale, 3 * scale);
    ctx.fillStyle = value("faint");
    ctx.fillText(series.label, left + 17 * scale, 38 * scale);
    left += ctx.measureText(series.label).width + 34 * scale;
  }
  ctx.drawImage(source, 12 * scale, head);
  canvas.toBlob((blob) => download(fileName(chart, "png"), blob), "image/png");
}

const WIDTH = 720;
const HEIGHT = 360;
const EDGE = { left: 64, right: 16, top: 56, bottom: 34 };

export function chartSvg(chart) {
  const { scales } = chart.plot;
  const across = (x) => EDGE.left + ((x - scales.x.min) / (scales.x.max - scales.x.min)) * (WIDTH - EDGE.left - EDGE.right);
  const up = (y) => HEIGHT - EDGE.bottom - ((y - scales.y.min) / (scales.y.max - scales.y.min)) * (HEIGHT - EDGE.top - EDGE.bottom);
  const text = (x, y, words, props = {}) => s("text", { x, y, fill: value("faint"), "font-size": 12, ...props }, words);
  const table = chart.table();
  const x = table[0];
  const inside = (i) => x[i] >= scales.x.min && x[i] <= scales.x.max;
  const points = (column) => x.flatMap((at, i) => (Number.isFinite(column[i]) && inside(i) ? [[across(at), up(column[i])]] : []));
  const path = (list) => list.map(([a, b], i) => `${i ? "L" : "M"}${a.toFixed(1)} ${b.toFixed(1)}`).join("");
  const svg = s("svg", { xmlns: "http://www.w3.org/2000/svg", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, "font-family": "Inter, system-ui, sans-serif" },
    s("rect", { width: WIDTH, height: HEIGHT, fill: value("panel") }),
    text(16, 24, chart.spec.title, { fill: value("text"), "font-size": 15, "font-weight": 600 }),
    text((WIDTH + EDGE.left) / 2, HEIGHT - 4, chart.group.axis.label, { "text-anchor": "middle" }));
  const levels = ticks(scales.y.min, scales.y.max, 5);
  const names = axisNumbers(levels);
  for (const [i, y] of levels.entries()) {
    svg.append(s("path", { d: `M${EDGE.left} ${up(y).toFixed(1)}H${WIDTH - EDGE.right}`, stroke: value("line") }));
    svg.append(text(EDGE.left - 8, up(y) + 4, names[i], { "text-anchor": "end" }));
  }
  const places = ticks(scales.x.min, scales.x.max, 8);
  for (const [i, name] of axisNumbers(places).entries()) svg.append(text(across(places[i]), HEIGHT - EDGE.bottom + 16, name, { "text-anchor": "middle" }));
  let left = 16;
  chart.spec.series.forEach((series, i) => {
    const [raw, line, low, high] = table.slice(1 + 4 * i, 5 + 4 * i);
    const stroke = value(series.colour);
    const band = [...points(low), ...points(high).reverse()];
    if (band.length) svg.append(s("path", { d: `${path(band)}Z`, fill: stroke, opacity: 0.16 }));
    if (points(raw).length) svg.append(s("path", { d: path(points(raw)), fill: "none", stroke, opacity: 0.3 }));
    svg.append(s("path", { d: path(points(line)), fill: "none", stroke, "stroke-width": 2, "stroke-dasharray": series.dashed ? "5 4" : null }));
    svg.append(s("path", { d: `M${left} 40h14`, stroke, "stroke-width": 3 }), text(left + 19, 44, series.label));
    left += 40 + 7 * series.label.length;
  });
  return svg;
}

export function saveChartSvg(chart) {
  const text = new XMLSerializer().serializeToString(chartSvg(chart));
  download(fileName(chart, "svg"), new Blob([text], { type: "image/svg+xml" }));
}

function ticks(min, max, wanted) {
  const rough = (max - min) / wanted;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = size * [1, 2, 5, 10].find((factor) => factor * size >= rough);
  const found = [];
  for (let at = Math.ceil(min / step) * step; at <= max + step * 1e-9; at += step) found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
  return found;
}
