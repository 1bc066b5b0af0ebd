// Adapters: what is registered, what each of them is doing, and everything that can be done to them.

import { useState } from "preact/hooks";
import { download, get, patch, post, remove } from "../api.js";
import { linkTo } from "../compare_run.js";
import { ago, bytes } from "../format.js";
import { html } from "../html.js";
import { Chip, Confirm, Empty, Problem } from "../parts.js";
import { usePoll } from "../poll.js";
import { base, refreshModels, route } from "../state.js";
import { Details } from "./adapter_details.js";
import { Upload } from "./adapter_upload.js";
import { Exports } from "./exports.js";

export const pathOf = (name) => `/v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}`;

const HEADS = ["Name", "State", "Generation", "Rank", "Targets", "Size", "Tier", "Requests", "Last used"];
const NUMERIC = new Set(["Rank", "Size", "Requests"]);
const PAGE = 200;
let known = null; // kept over a change of tabs, so that coming back shows something at once

async function list() {
  const found = [];
  for (let after = ""; ;) {
    const page = await get(`/v1/adapters?limit=${PAGE}${after && `&after=${encodeURIComponent(after)}`}`);
    found.push(...page.data);
    if (!page.has_more) return found;
    after = page.last_id;
  }
}

export function Adapters() {
  const [adapters, setAdapters] = useState(known);
  const [error, setError] = useState(null);
  const [wanted, setWanted] = useState("");
  const open = route.value.rest;
  const refresh = usePoll(async (alive) => {
    try {
      known = await list();
      if (alive()) {
        setAdapters(known);
        setError(null);
      }
    } catch (failure) {
      if (alive()) setError(failure);
    }
  }, 2);
  const changed = () => {
    refresh();
    refreshModels();
  };
  const shown = adapters?.filter((adapter) => adapter.id.toLowerCase().includes(wanted.toLowerCase()));
  return html`<section>
    <h1 class="hidden">Adapters</h1>
    <${Upload} onDone=${changed} />
    <${Problem} error=${adapters ? null : error} />
    ${!adapters && !error && html`<p class="muted">Asking the server…</p>`}
    ${
      adapters?.length === 0 &&
      html`<${Empty} title="No adapters yet"
      >Upload one above, or train one under <a href="#/train">Train</a>. The base answers without any.<//
    >`
    }
    ${
      adapters?.length > 8 &&
      html`<input
        class="filter"
        type="search"
        aria-label="Filter by name"
        placeholder="Filter by name"
        value=${wanted}
        onInput=${(event) => setWanted(event.target.value)}
      />`
    }
    ${
      shown?.length > 0 &&
      html`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of adapters">
      <table class="adapters">
        <thead>
          <tr>
            ${HEADS.map((head) => html`<th scope="col" class=${NUMERIC.has(head) ? "n" : ""}>${head}</th>`)}
            <th scope="col"><span class="hidden">Actions</span></th>
          </tr>
        </thead>
        <tbody>
          ${shown.map(
            (adapter) => html`<${Row}
            key=${adapter.id}
            adapter=${adapter}
            isOpen=${open === adapter.id}
            onChanged=${changed}
          />`,
          )}
        </tbody>
      </table>
    </div>`
    }
    ${open && adapters && !adapters.some(({ id }) => id === open) && html`<p class="note" role="status">There is no adapter ${open} here any more.</p>`}
    ${shown?.length === 0 && adapters.length > 0 && html`<p class="muted">No adapter's name has “${wanted}” in it.</p>`}
  </section>`;
}

const STATES = { ready: "good", failed: "bad", loading: "busy", available: "" };

function Row({ adapter, isOpen, onChanged }) {
  const { id } = adapter;
  const targets = adapter.target_modules?.map((name) => name.replace(/_proj$/, "")).join(" ") ?? "–";
  return html`<tr class=${isOpen ? "open" : ""} data-adapter=${id}>
      <th scope="row">
        <a href=${isOpen ? "#/adapters" : `#/adapters/${encodeURIComponent(id)}`} aria-expanded=${isOpen}>${id}</a>
        ${adapter.pinned && html`<${Chip}>pinned<//>`}
        ${adapter.verification?.verdict && !["ok", "skipped"].includes(adapter.verification.verdict) && html`<${Chip} kind="bad">${adapter.verification.verdict}<//>`}
      </th>
      <td><${Chip} kind=${STATES[adapter.state]}>${adapter.state}<//></td>
      <td><code title=${adapter.generation}>${adapter.generation.slice(0, 8)}</code></td>
      <td class="n" data-label="rank">${adapter.rank ?? "–"}</td>
      <td class="targets" title=${adapter.target_modules?.join(", ")}>${targets}</td>
      <td class="n">${bytes(adapter.bytes)}</td>
      <td>${adapter.tier}</td>
      <td class="n" data-label="requests" title="running now / since the server started">${adapter.in_flight ? `${adapter.in_flight} / ` : ""}${adapter.requests}</td>
      <td>${adapter.last_used ? ago(adapter.last_used) : "not yet"}</td>
      <td class="actions"><div class="row end">
        <a class="button" href=${linkTo([base.value?.id, id].filter(Boolean))}>Compare</a>
        <a
          class="button"
          href=${isOpen ? "#/adapters" : `#/adapters/${encodeURIComponent(id)}`}
          aria-label=${`${isOpen ? "Close" : "Manage"} ${id}`}
        >${isOpen ? "Close" : "Manage"}</a>
      </div></td>
    </tr>
    ${
      isOpen &&
      html`<tr class="detail">
      <td colspan="10"><${Manage} adapter=${adapter} onChanged=${onChanged} /></td>
    </tr>`
    }`;
}

function Manage({ adapter, onChanged }) {
  const [error, setError] = useState(null);
  const [asking, setAsking] = useState("");
  const path = pathOf(adapter.id);
  const earlier = adapter.generations.filter((one) => one.generation !== adapter.generation);
  const [target, setTarget] = useState("");
  const doing = async (act) => {
    setError(null);
    try {
      await act();
      onChanged();
    } catch (failure) {
      setError(failure);
    }
  };
  const deleted = async () => {
    await remove(path);
    location.hash = "#/adapters";
    onChanged();
  };
  return html`<div class="manage">
    <${Problem} error=${adapter.failure && { message: adapter.failure }} />
    <${Problem} error=${error} />
    <div class="row wrap">
      <button
        type="button"
        onClick=${() => doing(() => patch(path, { pinned: !adapter.pinned }))}
      >${adapter.pinned ? "Unpin" : "Pin to the device"}</button>
      <button
        type="button"
        onClick=${() => doing(() => download(`${path}/download`, `${adapter.id.replaceAll("/", "-")}.tar.gz`))}
      >Download</button>
      ${
        earlier.length > 0 &&
        html`<span class="row group">
        <select
          aria-label="Generation to roll back to"
          value=${target || earlier[0].generation}
          onChange=${(event) => setTarget(event.target.value)}
        >
          ${earlier.map((one) => html`<option value=${one.generation}>${one.generation.slice(0, 8)}, ${ago(one.created)}, ${one.source}</option>`)}
        </select>
        <button
          type="button"
          onClick=${() => doing(() => post(`${path}/rollback`, { generation: target || earlier[0].generation }))}
        >Roll back</button>
      </span>`
      }
      <span class="grow"></span>
      <button type="button" class="danger" onClick=${() => setAsking("delete")}>Delete…</button>
    </div>
    <div class="split">
      <${Details} adapter=${adapter} />
      <${Exports} adapter=${adapter} />
    </div>
    ${
      asking === "delete" &&
      html`<${Confirm} title=${`Delete ${adapter.id}?`} verb="Delete" act=${deleted} onClose=${() => setAsking("")}>
      <p>New requests for this name will be refused at once; those that run finish. Its files go when nothing needs them any more.</p>
    <//>`
    }
  </div>`;
}
