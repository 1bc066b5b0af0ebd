// Prometheus' text format -> samples, and what the page shows of them.

import { getText } from "./api.js";

export const readMetrics = async () => parse(await getText("/metrics", { headers: { Accept: "text/plain" } }));

// name -> [{ labels, value }]
export function parse(text) {
  const samples = new Map();
  for (const line of text.split("\n")) {
    const match = /^([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match) continue;
    const labels = {};
    for (const [, name, value] of (match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) {
      labels[name] = value.replace(/\\n/g, "\n").replace(/\\(.)/g, "$1");
    }
    if (!samples.has(match[1])) samples.set(match[1], []);
    samples.get(match[1]).push({ labels, value: Number(match[3].replace("Inf", "Infinity")) });
  }
  return samples;
}

export const sum = (samples, name) => (samples.get(name) ?? []).reduce((total, { value }) => total + value, 0);

export const byLabel = (samples, name, label) =>
  Object.fromEntries((samples.get(name) ?? []).map(({ labels, value }) => [labels[label], value]));

// A quantile of a histogram, of what came between two readings; linear within a bucket, as Prometheus does it.
export function quantile(now, before, name, share) {
  const old = new Map((before?.get(`${name}_bucket`) ?? []).map(({ labels, value }) => [labels.le, value]));
  const buckets = (now.get(`${name}_bucket`) ?? [])
    .map(({ labels, value }) => ({
      top: labels.le === "+Inf" ? Infinity : Number(labels.le),
      count: value - (old.get(labels.le) ?? 0),
    }))
    .sort((a, b) => a.top - b.top);
  const total = buckets.at(-1)?.count ?? 0;
  if (!total) return null;
  let bottom = 0;
  let below = 0;
  for (const { top, count } of buckets) {
    if (count >= share * total) {
      if (top === Infinity) return bottom;
      return bottom + ((top - bottom) * (share * total - below)) / Math.max(1, count - below);
    }
    bottom = top;
    below = count;
  }
  return bottom;
}

// The mean of a histogram between two readings.
export function mean(now, before, name) {
  const count = sum(now, `${name}_count`) - (before ? sum(before, `${name}_count`) : 0);
  const total = sum(now, `${name}_sum`) - (before ? sum(before, `${name}_sum`) : 0);
  return count > 0 ? total / count : null;
}
