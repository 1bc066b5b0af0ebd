// The small pieces that all views are made of.

import { useEffect, useId, useRef, useState } from "preact/hooks";
import { html } from "./html.js";
import { models } from "./state.js";

// An error as a sentence, and what it found, one a line.
export function Problem({ error, title }) {
  if (!error) return null;
  const [sentence, ...faults] = partsOf(error);
  return html`<div class="problem" role="alert">
    ${title && html`<strong>${title}</strong>`}
    <p>${sentence}</p>
    ${
      faults.length > 0 &&
      html`<ul>
      ${faults.map((fault) => html`<li>${fault}</li>`)}
    </ul>`
    }
  </div>`;
}

// The gate lists its faults beside a message that repeats them; those of a training file stand in its message only, as in
// "Invalid file format of x. Line 3, ...; Line 5, ...".
function partsOf({ message, faults }) {
  if (faults?.length) return [message.split(": ")[0], ...faults.map(({ where, problem }) => `${where}: ${problem}`)];
  return message.split(/(?:;|\.) (?=Line \d+,|and \d+ more lines)/);
}

export function Empty({ title, children }) {
  return html`<div class="empty"><h3>${title}</h3>${children}</div>`;
}

export function Field({ label, hint, children, wide }) {
  return html`<label class=${wide ? "field wide" : "field"}>
    <span class="label">${label}</span>${children}${hint && html`<span class="hint">${hint}</span>`}
  </label>`;
}

export function Check({ label, checked, onChange, hint }) {
  return html`<label class="check" title=${hint}>
    <input type="checkbox" checked=${checked} onChange=${(event) => onChange(event.target.checked)} /> ${label}
  </label>`;
}

export function Bar({ value, label }) {
  return html`<progress max="1" value=${value ?? undefined} aria-label=${label}></progress>`;
}

// Base first, then adapters by name; a name that is gone stays chosen and says so.
export function ModelSelect({ value, onChange, label }) {
  const known = models.value ?? [];
  const listed = known.some((model) => model.id === value);
  return html`<select aria-label=${label} value=${value} onChange=${(event) => onChange(event.target.value)}>
    ${!listed && value && html`<option value=${value}>${value} (not here)</option>`}
    ${known.map((model) => html`<option value=${model.id}>${model.id}${model.parent ? "" : " (base)"}</option>`)}
  </select>`;
}

export function CopyButton({ text, label, title }) {
  const [said, say] = useState("");
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text());
      say("Copied");
    } catch {
      say("The browser did not allow it");
    }
    setTimeout(() => say(""), 1600);
  };
  return html`<button class="quiet" type="button" title=${title} onClick=${copy}>
    <span aria-live="polite">${said || label}</span>
  </button>`;
}

export function Modal({ title, onClose, children }) {
  const place = useRef();
  const id = useId();
  useEffect(() => {
    place.current.showModal();
  }, []);
  return html`<dialog ref=${place} aria-labelledby=${id} onClose=${onClose}>
    <h2 id=${id}>${title}</h2>
    ${children}
  </dialog>`;
}

// Asks before something that cannot be taken back; `act` is awaited, its error shown.
export function Confirm({ title, verb, act, onClose, children }) {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const go = async () => {
    setBusy(true);
    try {
      await act();
      onClose();
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  return html`<${Modal} title=${title} onClose=${onClose}>
    ${children}
    <${Problem} error=${error} />
    <div class="row end">
      <button type="button" onClick=${onClose}>Cancel</button>
      <button type="button" class="danger" disabled=${busy} onClick=${go}>${verb}</button>
    </div>
  <//>`;
}

// Files by dropping them anywhere on it, or by choosing them.
export function Drop({ label, accept, multiple = false, onFiles, children }) {
  const [over, setOver] = useState(false);
  const id = useId();
  const dropped = (event) => {
    event.preventDefault();
    setOver(false);
    if (event.dataTransfer.files.length) onFiles([...event.dataTransfer.files]);
  };
  const chosen = (event) => {
    if (event.target.files.length) onFiles([...event.target.files]);
    event.target.value = "";
  };
  return html`<div
    class=${over ? "drop over" : "drop"}
    onDragOver=${(event) => (event.preventDefault(), setOver(true))}
    onDragLeave=${() => setOver(false)}
    onDrop=${dropped}
  >
    <strong>${label}</strong>
    <input
      id=${id}
      class="hidden"
      type="file"
      accept=${accept}
      multiple=${multiple}
      onChange=${chosen}
    />
    <label class="button" for=${id}>${multiple ? "Choose files" : "Choose a file"}<span class="hidden">: ${label}</span></label>
    ${children}
  </div>`;
}

// Below a list that is asked for from its newest on: the API gives up to 1000 at once.
export const Older = ({ page, count, onMore }) =>
  page?.has_more && count < 1000 ? html`<button type="button" onClick=${onMore}>Show older</button>` : null;

export const Chip = ({ kind = "", children }) => html`<span class=${`chip ${kind}`}>${children}</span>`;
