// Keys: shown only where the server asks for them. They are made and revoked where the server runs, not from a browser.

import { key } from "../api.js";
import { html } from "../html.js";

export function Keys() {
  if (!key.value) return null;
  return html`<div class="panel">
    <h2>Keys</h2>
    <p>This tab uses the key that ends in <code>${key.value.slice(-4)}</code>; what it may not see is refused with a sentence that says so.</p>
    <p class="muted">Keys are listed, made and revoked by the operator: <code>loramux keys --help</code> on the machine that serves.</p>
  </div>`;
}
