// Server: what it does right now, from /metrics, every two seconds.

import { useRef, useState } from "preact/hooks";
import { get } from "../api.js";
import { Chart } from "../chart.js";
import { bytes, clock, number, seconds } from "../format.js";
import { html } from "../html.js";
import { byLabel, mean, quantile, readMetrics, sum } from "../metrics.js";
import { Problem } from "../parts.js";
import { usePoll } from "../poll.js";
import { base } from "../state.js";
import { Keys } from "./keys.js";

const EVERY_S = 2;
const KEPT = 150; // readings: five minutes
const WINDOW = 15; // readings that latencies and means are of: half a minute

export function Server() {
  const readings = useRef([]);
  const [shown, setShown] = useState(null);
  const [version, setVersion] = useState("");
  const [error, setError] = useState(null);
  usePoll(async (alive) => {
    try {
      const samples = await readMetrics();
      version || setVersion((await get("/version")).version);
      readings.current = [
        ...readings.current,
        { at: performance.now() / 1000, time: Date.now() / 1000, samples },
      ].slice(-KEPT);
      if (alive()) {
        setShown(readings.current);
        setError(null);
      }
    } catch (failure) {
      if (alive()) setError(failure);
    }
  }, EVERY_S);
  if (!shown)
    return html`<section>
      <${Problem} error=${error} />${!error && html`<p class="muted">Asking the server…</p>`}
      <${Keys} />
    </section>`;
  const now = shown.at(-1).samples;
  const before = shown.at(-1 - Math.min(WINDOW, shown.length - 1))?.samples;
  const window = shown.length > 1 ? before : null;
  return html`<section>
    <div class="row spread wrap">
      <h1>${base.value?.id ?? "Server"}</h1>
      <span class="muted">${base.value?.root !== base.value?.id && `${base.value?.root}, `}${info(now)}, loramux ${version}</span>
    </div>
    <${Tiles} now=${now} window=${window} readings=${shown} />
    <${Throughput} readings=${shown} />
    <div class="split">
      <${Latencies} now=${now} window=${window} />
      <${Memory} now=${now} />
    </div>
    <${Keys} />
  </section>`;
}

function info(now) {
  const { quantization, dtype } = now.get("loramux_model_info")?.[0]?.labels ?? {};
  return `${quantization?.toUpperCase()}, computes in ${dtype}`;
}

// Generated tokens a second between two readings; a restart of the server counts from zero again.
function rate(later, earlier, name) {
  const made = sum(later.samples, name) - sum(earlier.samples, name);
  return Math.max(0, made) / (later.at - earlier.at);
}

function Tiles({ now, window, readings }) {
  const [earlier, later] = readings.slice(-2);
  const engine = Object.entries(byLabel(now, "loramux_engine_state", "state")).find(([, value]) => value)?.[0];
  const tiles = [
    ["engine", engine ?? "–"],
    ["tokens/s", later ? number(rate(later, earlier, "loramux_generation_tokens_total")) : "–"],
    ["running", sum(now, "loramux_num_requests_running")],
    ["waiting", sum(now, "loramux_num_requests_waiting")],
    ["tokens in a step", number(mean(now, window, "loramux_batch_size"))],
    ["adapters in a step", number(mean(now, window, "loramux_batch_adapters"))],
    ["KV cache in use", `${number(100 * sum(now, "loramux_kv_cache_usage_perc"))} %`],
    ["adapter slots", `${sum(now, "loramux_adapter_slots_used")} of ${sum(now, "loramux_adapter_slots")}`],
    ["jobs training", byLabel(now, "loramux_training_jobs", "status").running ?? 0],
    ["worker restarts", sum(now, "loramux_worker_restarts_total")],
  ];
  return html`<dl class="panel figures tiles">${tiles.map(([name, value]) => html`<div><dt>${name}</dt><dd>${value}</dd></div>`)}</dl>`;
}

function Throughput({ readings }) {
  const later = readings.slice(1);
  if (!later.length) return html`<div class="panel"><h2>Tokens a second</h2><p class="muted">A moment…</p></div>`;
  const rates = (name) => later.map((one, index) => rate(one, readings[index], name));
  const series = [
    { label: "generated", values: rates("loramux_generation_tokens_total") },
    { label: "trained on", values: rates("loramux_training_tokens_total") },
  ];
  return html`<div class="panel">
    <h2>Tokens a second</h2>
    <${Chart}
      label="Tokens a second over the last minutes"
      xs=${later.map((one) => one.time)}
      series=${series}
      height=${180}
      format=${number}
      describe=${clock}
    />
  </div>`;
}

const LATENCIES = {
  "Time to first token": "loramux_time_to_first_token_seconds",
  "Between tokens": "loramux_inter_token_latency_seconds",
  "Whole request": "loramux_e2e_request_latency_seconds",
  "In the queue": "loramux_request_queue_time_seconds",
  "Engine step": "loramux_step_seconds",
};

function Latencies({ now, window }) {
  const at = (name, share) => seconds(quantile(now, window, name, share) ?? quantile(now, null, name, share));
  return html`<div class="panel"><h2>Latency</h2>
    <table>
      <thead><tr><th scope="col"><span class="hidden">Of</span></th>${["p50", "p95", "p99"].map((head) => html`<th scope="col" class="n">${head}</th>`)}</tr></thead>
      <tbody>
        ${Object.entries(LATENCIES).map(
          ([label, name]) =>
            html`<tr><th scope="row">${label}</th>${[0.5, 0.95, 0.99].map((share) => html`<td class="n">${at(name, share)}</td>`)}</tr>`,
        )}
      </tbody>
    </table>
    <p class="hint">Of the last half minute; of all time where nothing happened in it.</p>
  </div>`;
}

const MEMORY = {
  weights: "Weights of the base",
  kv_cache: "KV cache",
  adapter_pool: "Adapters on the device",
  adapter_host: "Adapters in host memory",
};

function Memory({ now }) {
  const kinds = byLabel(now, "loramux_memory_bytes", "kind");
  const most = Math.max(...Object.values(kinds), 1);
  const disk = byLabel(now, "loramux_data_disk_bytes", "state");
  return html`<div class="panel"><h2>Memory</h2>
    <ul class="bars">
      ${Object.entries(MEMORY).map(
        ([kind, label]) =>
          html`<li><span>${label}</span><span class="track"><span style=${{ width: `${(100 * (kinds[kind] ?? 0)) / most}%` }}></span></span><span class="n">${bytes(kinds[kind] ?? 0)}</span></li>`,
      )}
    </ul>
    <dl class="facts">
      <dt>Worker process</dt><dd>${bytes(sum(now, "loramux_worker_resident_memory_bytes"))}</dd>
      <dt>Free on the data disk</dt><dd>${bytes(disk.free)} of ${bytes(disk.total)}</dd>
    </dl>
  </div>`;
}
