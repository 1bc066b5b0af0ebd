// Exports of one adapter: merged checkpoints as jobs of the server, which go on whether anybody looks or not.

import { useEffect, useState } from "preact/hooks";
import { download, get, post, remove, stream } from "../api.js";
import { ago, bytes, number, seconds } from "../format.js";
import { html } from "../html.js";
import { Bar, Chip, Older, Problem } from "../parts.js";
import { usePoll } from "../poll.js";
import { pathOf } from "./adapters.js";

const FORMATS = { bf16: "bf16", fp16: "fp16", fp32: "fp32", nf4: "NF4 (4 bit)" };
const PAGE = 20;
const KINDS = { succeeded: "good", failed: "bad", running: "busy" };

export function Exports({ adapter }) {
  const path = `${pathOf(adapter.id)}/exports`;
  const [page, setPage] = useState(null);
  const [count, setCount] = useState(PAGE);
  const [format, setFormat] = useState("bf16");
  const [onto, setOnto] = useState("dequantized");
  const [verify, setVerify] = useState(8);
  const [error, setError] = useState(null);
  const refresh = usePoll(
    async (alive) => {
      const found = await get(`${path}?limit=${count}`);
      if (alive()) setPage(found);
    },
    3,
    [path, count],
  );
  const start = async (event) => {
    event.preventDefault();
    setError(null);
    try {
      await post(path, { format, onto, verify });
      refresh();
    } catch (failure) {
      setError(failure);
    }
  };
  return html`<div class="block">
    <h3>Export</h3>
    <p class="muted">The base and this adapter merged into one checkpoint, proven to answer as it is served here.</p>
    <form class="row wrap bottom" onSubmit=${start}>
      <label class="field"><span class="label">Format</span>
        <select value=${format} onChange=${(event) => setFormat(event.target.value)}>
          ${Object.entries(FORMATS).map(([value, text]) => html`<option value=${value}>${text}</option>`)}
        </select>
      </label>
      <label class="field"><span class="label">Merged onto</span>
        <select value=${onto} onChange=${(event) => setOnto(event.target.value)}>
          <option value="dequantized">the weights as served</option>
          <option value="original">the original weights</option>
        </select>
      </label>
      <label class="field"><span class="label">Prompts to prove it on</span>
        <input
          type="number"
          min="0"
          max="8"
          required
          value=${verify}
          onInput=${(event) => setVerify(event.target.valueAsNumber)}
        />
      </label>
      <button>Start export</button>
    </form>
    <${Problem} error=${error} />
    ${page?.data.map((job) => html`<${Job} key=${job.id} job=${job} path=${`${path}/${job.id}`} onChanged=${refresh} />`)}
    <${Older} page=${page} count=${count} onMore=${() => setCount(count + PAGE)} />
  </div>`;
}

function Job({ job, path, onChanged }) {
  const [progress, setProgress] = useState(null);
  const [error, setError] = useState(null);
  const isOpen = ["queued", "running"].includes(job.status);
  useEffect(() => {
    if (!isOpen) return;
    const abort = new AbortController();
    follow(path, abort.signal, setProgress).then(onChanged, () => {});
    return () => abort.abort();
  }, [path, isOpen]);
  const act = (work) => async () => {
    try {
      await work();
      onChanged();
    } catch (failure) {
      setError(failure);
    }
  };
  const now = progress ?? job.progress;
  return html`<div class="job" data-export=${job.id}>
    <div class="row spread">
      <span><${Chip} kind=${KINDS[job.status]}>${job.status}<//> ${FORMATS[job.format]}, ${ago(job.created)}${job.bytes ? `, ${bytes(job.bytes)}` : ""}</span>
      <span class="row">
        ${
          job.status === "succeeded" &&
          html`<button
          type="button"
          onClick=${act(() => download(`${path}/download`, `${job.adapter.replaceAll("/", "-")}-${job.format}.tar`))}
        >Download</button>`
        }
        ${isOpen && html`<button type="button" onClick=${act(() => post(`${path}/cancel`))}>Cancel</button>`}
        ${!isOpen && html`<button type="button" class="quiet" onClick=${act(() => remove(path))}>Remove</button>`}
      </span>
    </div>
    ${
      isOpen &&
      html`<div class="progress" role="status">
      <${Bar} label="Export" value=${now.fraction} />
      ${now.phase}, ${number(now.fraction * 100)} %${now.eta_seconds ? `, about ${seconds(now.eta_seconds)} left` : ""}
    </div>`
    }
    <${Problem} error=${job.error ?? error} />
  </div>`;
}

async function follow(path, signal, onProgress) {
  for await (const event of stream("GET", `${path}/events?stream=true`, { signal })) {
    if (event.object === "adapter.export.progress") onProgress(event);
  }
}
