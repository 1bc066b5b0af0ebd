// What the trainer makes of a file: counts, warnings, and the first rows with what is learned from them marked.

import { useState } from "preact/hooks";
import { plural } from "../format.js";
import { html } from "../html.js";

export function Preview({ plan }) {
  const [place, setPlace] = useState(0);
  const [asTokens, setAsTokens] = useState(false);
  const row = plan.preview[Math.min(place, plan.preview.length - 1)];
  const about = plan.exact ? "" : "about ";
  return html`<div class="panel preview">
    <dl class="figures">
      <div><dt>rows</dt><dd>${plan.rows.toLocaleString("en")}</dd></div>
      <div><dt>tokens</dt><dd>${about}${plan.tokens.toLocaleString("en")}</dd></div>
      <div><dt>trained on</dt><dd>${about}${plan.trained_tokens.toLocaleString("en")}</dd></div>
      <div><dt>longest row</dt><dd>${plural(plan.longest, "token")}</dd></div>
      ${plan.validation_rows > 0 && html`<div><dt>validation rows</dt><dd>${plan.validation_rows.toLocaleString("en")}</dd></div>`}
    </dl>
    ${plan.warnings.map((warning) => html`<p class="note">${warning[0].toUpperCase() + warning.slice(1)}.</p>`)}
    <div class="row spread wrap">
      <span class="row">
        <button
          type="button"
          aria-label="Previous row"
          disabled=${place === 0}
          onClick=${() => setPlace(place - 1)}
        >‹</button>
        <span>Line ${row.line}, ${plural(row.tokens, "token")}, <mark class="learned">${row.trained_tokens} trained on</mark></span>
        <button
          type="button"
          aria-label="Next row"
          disabled=${place >= plan.preview.length - 1}
          onClick=${() => setPlace(place + 1)}
        >›</button>
      </span>
      <div class="segments" role="group" aria-label="How rows are shown">
        <button type="button" aria-pressed=${!asTokens} onClick=${() => setAsTokens(false)}>As a chat</button>
        <button
          type="button"
          aria-pressed=${asTokens}
          onClick=${() => setAsTokens(true)}
        >As the trainer reads it</button>
      </div>
    </div>
    ${
      asTokens
        ? html`<pre class="tokens" tabindex="0">${row.parts.map(({ text, trained }) => (trained ? html`<mark class="learned">${text}</mark>` : text))}</pre>`
        : html`<div class="turns">
          ${row.turns.map(
            ({ role, content, trained }) => html`<div class=${`turn ${role}`}>
              <span class="role">${role}</span>
              <span class="text">${trained ? html`<mark class="learned">${content}</mark>` : content}</span>
            </div>`,
          )}
        </div>`
    }
  </div>`;
}
