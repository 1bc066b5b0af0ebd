// What is known of one adapter: where it is from, and what its verification found, layer by layer.

import { useEffect, useState } from "preact/hooks";
import { get } from "../api.js";
import { clock, number } from "../format.js";
import { html } from "../html.js";
import { Problem } from "../parts.js";
import { pathOf } from "./adapters.js";

const VERDICTS = {
  ok: "It changes the base's answers, and does exactly what PEFT does with the same weights.",
  noop: "It changes nothing.",
  disagrees: "It is served otherwise than PEFT computes it.",
  not_finite: "It produces numbers that are not finite.",
  skipped: "It was uploaded without verification.",
};

export function Details({ adapter }) {
  const [full, setFull] = useState(null);
  const [error, setError] = useState(null);
  useEffect(() => {
    let alive = true;
    get(pathOf(adapter.id)).then(
      (found) => alive && setFull(found),
      (failure) => alive && setError(failure),
    );
    return () => (alive = false);
  }, [adapter.id, adapter.generation]);
  const verification = full?.verification;
  const report = verification?.report;
  return html`<div class="block">
    <h3>Verification</h3>
    <${Problem} error=${error} />
    ${full && !verification && html`<p class="muted">Nobody asked for one: adapters from folders and checkpoints are not verified.</p>`}
    ${verification && html`<p>${VERDICTS[verification.verdict]} ${report && html`<span class="muted">Checked at ${clock(verification.checked_at)}.</span>`}</p>`}
    ${report && html`<${Report} report=${report} />`}
    ${
      full &&
      html`<dl class="facts">
      <dt>Source</dt><dd>${full.source}${full.origin && ` (${full.origin})`}</dd>
      <dt>Base in its config</dt><dd>${full.base_model ?? "not named"}</dd>
      <dt>Stored as</dt><dd>${full.dtype ?? "–"}</dd>
      ${full.description && html`<dt>Description</dt><dd>${full.description}</dd>`}
    </dl>`
    }
  </div>`;
}

function Report({ report }) {
  const { shift, peft } = report;
  const layers = byLayer(report.weights.modules);
  const most = Math.max(...layers.map(([, value]) => value), 1e-12);
  return html`<div class="block">
    <dl class="facts">
      ${
        shift &&
        html`<dt>Other next token than the base</dt><dd>${number(shift.top1_changed * 100)} % of ${shift.positions} positions</dd>
      <dt>KL from the base</dt><dd>${number(shift.kl)} nats</dd>`
      }
      ${
        peft &&
        html`<dt>Same next token as PEFT</dt><dd>${number(peft.top1_agreement * 100)} %</dd>
      <dt>Error against PEFT</dt><dd>${number(peft.relative_error)} of at most ${number(peft.relative_bound)}</dd>`
      }
    </dl>
    ${report.warnings.map((warning) => html`<p class="note">${warning}</p>`)}
    <h4>Size of the update, by layer <span class="muted">‖ΔW‖ / ‖W‖</span></h4>
    <ul class="bars">
      ${layers.map(
        ([layer, value]) => html`<li>
          <span>${layer}</span><span class="track"><span style=${{ width: `${(100 * value) / most}%` }}></span></span><span class="n">${number(value)}</span>
        </li>`,
      )}
    </ul>
  </div>`;
}

// Of all modules of a layer together, as one matrix: the root of the sums of squares.
function byLayer(modules) {
  const sums = new Map();
  for (const { name, delta_norm, weight_norm } of modules) {
    const layer = /\.(\d+)\./.exec(name)?.[1] ?? name;
    const [delta, weight] = sums.get(layer) ?? [0, 0];
    sums.set(layer, [delta + delta_norm ** 2, weight + weight_norm ** 2]);
  }
  return [...sums]
    .map(([layer, [delta, weight]]) => [layer, Math.sqrt(delta / (weight || 1))])
    .sort((a, b) => a[0] - b[0]);
}
