// Keys, shown only where the server asks for them: for admins a table of them, where they are made and revoked; for everybody
// else which one this tab uses.

import { useRef, useState } from "preact/hooks";
import { get, key, post, remove } from "../api.js";
import { ago, day } from "../format.js";
import { html } from "../html.js";
import { Check, Chip, Confirm, CopyButton, Empty, Field, Modal, Problem } from "../parts.js";
import { usePoll } from "../poll.js";

const EVERY_S = 5;
const HEADS = ["Key", "Tenant", "May", "State", "Expires", "Requests/min", "Tokens/min", "Made"];
const STATES = { active: "good", expired: "warn" };
const SCOPES = {
  infer: "infer: ask models",
  adapters: "adapters: upload, change, export",
  train: "train: files and jobs",
  metrics: "metrics: figures of everybody",
  admin: "admin: everything, of everybody",
};
const DAY = 86_400;
const LIVES = [
  ["", "never"],
  [DAY, "in a day"],
  [30 * DAY, "in 30 days"],
  [90 * DAY, "in 90 days"],
  [365 * DAY, "in a year"],
];

export function Keys() {
  const [keys, setKeys] = useState(null);
  const [error, setError] = useState(null);
  const [asking, setAsking] = useState(null); // "new", or the key to revoke
  const refused = useRef(false);
  const refresh = usePoll(async (alive) => {
    if (!key.value || refused.current) return;
    try {
      const { data } = await get("/v1/keys");
      if (alive()) {
        setKeys(data.toSorted((a, b) => (b.state === "active") - (a.state === "active") || b.created - a.created));
        setError(null);
      }
    } catch (failure) {
      refused.current = failure.status === 403; // no admin, and will not become one
      if (alive()) setError(failure);
    }
  }, EVERY_S);
  if (!key.value) return null;
  if (refused.current)
    return html`<div class="panel">
      <h2>Keys</h2>
      <p>This tab uses the key that ends in <code>${key.value.slice(-4)}</code>. What it may not see is refused with a sentence that says so; keys are for admins.</p>
    </div>`;
  return html`<div class="panel keys">
    <div class="row spread wrap">
      <h2>Keys</h2>
      <button type="button" onClick=${() => setAsking("new")}>New key…</button>
    </div>
    <${Problem} error=${error} />
    ${
      keys?.length === 0 &&
      html`<${Empty} title="No keys but those that the server was started with">Make one for each program or person that uses it, with no more than it needs.<//>`
    }
    ${
      keys?.length > 0 &&
      html`<div class="scroll" tabindex="0" role="region" aria-label="Table of keys">
      <table>
        <thead><tr>
          ${HEADS.map((head) => html`<th scope="col">${head}</th>`)}
          <th scope="col"><span class="hidden">Actions</span></th>
        </tr></thead>
        <tbody>${keys.map((one) => html`<${Row} key=${one.id} one=${one} onRevoke=${() => setAsking(one)} />`)}</tbody>
      </table>
    </div>`
    }
    ${asking === "new" && html`<${NewKey} onClose=${() => (setAsking(null), refresh())} />`}
    ${
      asking?.id &&
      html`<${Confirm}
        title=${`Revoke ${asking.name || asking.id}?`}
        verb="Revoke"
        act=${async () => (await remove(`/v1/keys/${asking.id}`), refresh())}
        onClose=${() => setAsking(null)}
      >
      <p>It opens nothing any more, for good. Requests that it has begun finish.${asking.current && " It is the key of this tab: you will be asked for another one."}</p>
    <//>`
    }
  </div>`;
}

const limit = (amount) => (amount === null ? "the server's" : amount || "none");

function Row({ one, onRevoke }) {
  return html`<tr data-key=${one.id}>
    <th scope="row">${one.name || one.id} ${one.current && html`<${Chip}>this tab's<//>`}${one.name && html`<br /><code class="muted">${one.id}</code>`}</th>
    <td>${one.scopes.includes("admin") ? "–" : one.tenant}</td>
    <td>${one.scopes.join(", ")}</td>
    <td><${Chip} kind=${STATES[one.state]}>${one.state}<//></td>
    <td>${one.expires === null ? "never" : day(one.expires)}</td>
    <td>${limit(one.requests_per_minute)}</td>
    <td>${limit(one.tokens_per_minute)}</td>
    <td>${ago(one.created)}</td>
    <td class="actions">${one.state !== "revoked" && html`<button type="button" class="danger" aria-label=${`Revoke ${one.name || one.id}`} onClick=${onRevoke}>Revoke…</button>`}</td>
  </tr>`;
}

const EMPTY = { name: "", tenant: "default", scopes: ["infer"], expires_in: "", requests_per_minute: "", tokens_per_minute: "" };

function NewKey({ onClose }) {
  const [wanted, setWanted] = useState(EMPTY);
  const [made, setMade] = useState(null); // in this component alone: nobody finds it in the tab afterwards
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const change = (fields) => setWanted({ ...wanted, ...fields });
  const create = async (event) => {
    event.preventDefault();
    setError(null);
    setBusy(true); // a second click would make a second key, which nobody is shown
    const body = Object.fromEntries(Object.entries(wanted).filter(([, value]) => value !== ""));
    try {
      setMade(await post("/v1/keys", body));
    } catch (failure) {
      setError(failure);
      setBusy(false);
    }
  };
  if (made)
    return html`<${Modal} title="The key is made" onClose=${onClose}>
      <p>It is shown this once: copy it now. The server keeps no more of it than it takes to recognize it.</p>
      <p class="row"><code class="secret grow" tabindex="0">${made.key}</code><${CopyButton} text=${() => made.key} label="Copy" /></p>
      <div class="row end"><button type="button" class="primary" onClick=${onClose}>Done</button></div>
    <//>`;
  const amount = (name, label) => html`<${Field} label=${label} hint="empty: the server's; 0: none">
    <input
      type="number"
      min="0"
      step="1"
      value=${wanted[name]}
      onInput=${({ target }) => change({ [name]: target.value === "" ? "" : target.valueAsNumber })}
    />
  <//>`;
  return html`<${Modal} title="New key" onClose=${onClose}>
    <form onSubmit=${create}>
      <${Field} label="Name" hint="what it is for"><input
        type="text"
        maxlength="128"
        value=${wanted.name}
        onInput=${({ target }) => change({ name: target.value })}
      /><//>
      <${Field} label="Tenant" hint="whose adapters, files and jobs it reaches, beside what is shared"><input
        type="text"
        required
        value=${wanted.tenant}
        onInput=${({ target }) => change({ tenant: target.value })}
      /><//>
      <fieldset>
        <legend>What it may do</legend>
        ${Object.entries(SCOPES).map(
          ([scope, label]) => html`<${Check}
            label=${label}
            checked=${wanted.scopes.includes(scope)}
            onChange=${(on) => change({ scopes: [...wanted.scopes.filter((other) => other !== scope), ...(on ? [scope] : [])] })}
          />`,
        )}
      </fieldset>
      <${Field} label="Expires"><select
        value=${wanted.expires_in}
        onChange=${({ target }) => change({ expires_in: target.value && Number(target.value) })}
      >
        ${LIVES.map(([value, text]) => html`<option value=${value}>${text}</option>`)}
      </select><//>
      ${amount("requests_per_minute", "Requests a minute")} ${amount("tokens_per_minute", "Tokens a minute")}
      <${Problem} error=${error} />
      <div class="row end">
        <button type="button" onClick=${onClose}>Cancel</button>
        <button class="primary" disabled=${busy || !wanted.scopes.length}>Make key</button>
      </div>
    </form>
  <//>`;
}
