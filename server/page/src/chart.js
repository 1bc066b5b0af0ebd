// A line chart as SVG: grid, lines, a legend, and the values under the pointer. Colours come from the style sheet.
// The two charts of this page need no more; a chart library would be half of the whole bundle.

import { useEffect, useRef, useState } from "preact/hooks";
import { html } from "./html.js";

const MARGIN = { top: 8, right: 12, bottom: 24, left: 52 };

// `series`: [{ label, values, points }], values with null for gaps; `xs` ascending; `describe` tells of one x.
export function Chart({ label, xs, series, height = 220, format, describe }) {
  const place = useRef();
  const [width, setWidth] = useState(0);
  const [under, setUnder] = useState(null);
  useEffect(() => {
    const resized = new ResizeObserver(([entry]) => setWidth(entry.contentRect.width));
    resized.observe(place.current);
    return () => resized.disconnect();
  }, []);
  const known = series.flatMap((one) => one.values.filter((value) => value != null));
  const ys = ticks(Math.min(0, ...known), Math.max(...known, 1e-9), height / 48);
  const x = scale(xs[0], xs.at(-1), MARGIN.left, width - MARGIN.right);
  const y = scale(ys[0], ys.at(-1), height - MARGIN.bottom, MARGIN.top);
  const moved = (event) => {
    const left = event.clientX - place.current.getBoundingClientRect().left;
    setUnder(
      xs.reduce((best, value, index) => (Math.abs(x(value) - left) < Math.abs(x(xs[best]) - left) ? index : best), 0),
    );
  };
  const shown = under !== null && under < xs.length ? under : null;
  return html`<figure class="chart">
    <div ref=${place}>
      ${
        width > 0 &&
        html`<svg
          width=${width}
          height=${height}
          role="img"
          aria-label=${`${label}. ${summary(series, format)}`}
          onPointerMove=${moved}
          onPointerLeave=${() => setUnder(null)}
        >
        ${ys.map(
          (value) => html`<g><line
          class="grid"
          x1=${MARGIN.left}
          x2=${width - MARGIN.right}
          y1=${y(value)}
          y2=${y(value)}
        /><text x=${MARGIN.left - 8} y=${y(value) + 4} text-anchor="end">${format(value)}</text></g>`,
        )}
        ${xTicks(xs, width).map((value) => html`<text x=${x(value)} y=${height - 6} text-anchor="middle">${describe(value)}</text>`)}
        ${
          shown !== null &&
          html`<line
          class="cursor"
          x1=${x(xs[shown])}
          x2=${x(xs[shown])}
          y1=${MARGIN.top}
          y2=${height - MARGIN.bottom}
        />`
        }
        ${series.map(
          ({ values, points }, number) => html`<g class=${`line-${number + 1}`}>
            <path d=${path(xs, values, x, y)} />
            ${xs.map((at, index) => values[index] != null && (points || index === shown || xs.length === 1) && html`<circle cx=${x(at)} cy=${y(values[index])} r="3.5" />`)}
          </g>`,
        )}
      </svg>`
      }
    </div>
    <figcaption>
      ${shown !== null && html`<span class="muted">${describe(xs[shown])}</span>`}
      ${series.map(({ label: name, values }, number) => html`<span class=${`line-${number + 1}`}><i></i>${name} <b>${format(values[shown ?? lastKnown(values)])}</b></span>`)}
    </figcaption>
  </figure>`;
}

const scale = (low, high, from, to) => (value) =>
  high === low ? (from + to) / 2 : from + ((value - low) / (high - low)) * (to - from);

const lastKnown = (values) => values.findLastIndex((value) => value != null);

const summary = (series, format) =>
  series
    .map(
      ({ label, values }) =>
        `${label}: from ${format(values.find((value) => value != null))} to ${format(values[lastKnown(values)])}`,
    )
    .join("; ");

// A line through the known values; a single gap does not break it.
function path(xs, values, x, y) {
  const known = xs.map((at, index) => [at, values[index]]).filter(([, value]) => value != null);
  return known.map(([at, value], index) => `${index ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

// Round numbers around a range, about so many.
function ticks(low, high, wanted) {
  const rough = (high - low) / Math.max(1, wanted);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const first = Math.floor(low / step);
  return Array.from({ length: Math.ceil(high / step) - first + 1 }, (_, index) => (first + index) * step);
}

function xTicks(xs, width) {
  const count = Math.min(xs.length, Math.max(2, Math.floor(width / 110)));
  if (count < 2) return xs.slice(0, 1);
  return Array.from({ length: count }, (_, index) => xs[Math.round((index * (xs.length - 1)) / (count - 1))]);
}
