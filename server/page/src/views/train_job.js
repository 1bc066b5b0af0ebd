// One job: its curves as they grow, what happened, what its checkpoints say, and what can be done with it.

import { useEffect, useState } from "preact/hooks";
import { download, get, post, reconnections, stream } from "../api.js";
import { Chart } from "../chart.js";
import { ago, bytes, clock, number, plural, seconds } from "../format.js";
import { html } from "../html.js";
import { Bar, Chip, Confirm, Problem } from "../parts.js";
import { usePoll } from "../poll.js";
import { linkTo } from "../compare_run.js";
import { Samples } from "./train_samples.js";
import { KINDS, WORDS } from "./train.js";

const ENDED = ["succeeded", "failed", "cancelled"];

export function Job({ id }) {
  const path = `/v1/fine_tuning/jobs/${encodeURIComponent(id)}`;
  const [job, setJob] = useState(null);
  const [checkpoints, setCheckpoints] = useState([]);
  const [error, setError] = useState(null);
  const [asking, setAsking] = useState(false);
  const events = useEvents(path);
  const refresh = usePoll(
    async (alive) => {
      try {
        const [found, made] = await Promise.all([get(path), get(`${path}/checkpoints?limit=1000`)]);
        if (!alive()) return;
        setJob(found);
        setCheckpoints((old) => (JSON.stringify(old) === JSON.stringify(made.data) ? old : made.data));
      } catch (failure) {
        if (alive()) setError(failure);
      }
    },
    job && ENDED.includes(job.status) ? 30 : 2,
    [path],
  );
  const doing = (verb) => async () => {
    setError(null);
    try {
      setJob(await post(`${path}/${verb}`));
      refresh();
    } catch (failure) {
      setError(failure);
    }
  };
  if (!job)
    return html`<section><${Problem} error=${error} />${!error && html`<p class="muted">Asking the server…</p>`}</section>`;
  const { status } = job;
  const model = job.fine_tuned_model;
  return html`<section>
    <div class="row spread wrap">
      <h1 class="name">${model ?? job.id}</h1>
      <span class="row wrap">
        ${
          model &&
          html`<a
          class="button primary"
          href=${linkTo([job.model, model], job.metadata?.sample_prompt)}
        >Try it</a>`
        }
        ${["queued", "running"].includes(status) && html`<button type="button" onClick=${doing("pause")}>Pause</button>`}
        ${status === "paused" && html`<button type="button" onClick=${doing("resume")}>Resume</button>`}
        ${!ENDED.includes(status) && html`<button type="button" class="danger" onClick=${() => setAsking(true)}>Cancel…</button>`}
        <a class="button" href="#/train">All jobs</a>
      </span>
    </div>
    <${Problem} error=${job.error} title="The job ended with an error" />
    <${Problem} error=${error} />
    <${Progress} job=${job} steps=${events.steps} />
    <${Curves} steps=${events.steps} />
    <div class="split">
      <${Happened} events=${events.said} />
      <${Recipe} job=${job} />
    </div>
    <${Samples} job=${job} checkpoints=${checkpoints} />
    ${
      asking &&
      html`<${Confirm}
        title="Cancel this job?"
        verb="Cancel the job"
        act=${doing("cancel")}
        onClose=${() => setAsking(false)}
      >
      <p>It cannot be resumed. Its checkpoints stay and can be called.</p>
    <//>`
    }
  </section>`;
}

// All events from the beginning on, then live; from the beginning again when the connection was lost.
function useEvents(path) {
  const [found, setFound] = useState({ steps: new Map(), said: [] });
  useEffect(() => {
    const abort = new AbortController();
    const steps = new Map();
    const said = [];
    let due = 0;
    const show = () => {
      due = 0;
      setFound({ steps: new Map(steps), said: [...said] });
    };
    (async () => {
      for await (const event of stream("GET", `${path}/events?stream=true`, { signal: abort.signal })) {
        if (event.type === "metrics") steps.set(event.data.step, { ...steps.get(event.data.step), ...event.data });
        else said.push(event);
        due ||= requestAnimationFrame(show);
      }
    })().catch(() => {}); // a lost server shows in the banner, and comes back as a reconnection
    return () => {
      cancelAnimationFrame(due);
      abort.abort();
    };
  }, [path, reconnections.value]);
  return found;
}

function Progress({ job, steps }) {
  const last = [...steps.values()].findLast((step) => step.train_loss !== undefined);
  const left = job.status === "running" && job.estimated_finish ? job.estimated_finish - Date.now() / 1000 : null;
  return html`<div class="panel">
    <dl class="figures">
      <div><dt>status</dt><dd><${Chip} kind=${KINDS[job.status]}>${WORDS[job.status] ?? job.status}<//></dd></div>
      <div><dt>step</dt><dd>${last ? `${last.step} of ${last.total_steps}` : "–"}</dd></div>
      <div><dt>loss</dt><dd>${number(last?.train_loss)}</dd></div>
      <div><dt>tokens/s</dt><dd>${number(last?.tokens_per_second)}</dd></div>
      <div><dt>learning rate</dt><dd>${number(last?.learning_rate, 2)}</dd></div>
      <div><dt>${left === null ? "created" : "left"}</dt><dd>${left === null ? ago(job.created_at) : seconds(Math.max(0, left))}</dd></div>
    </dl>
    ${last && !ENDED.includes(job.status) && html`<${Bar} label="Training" value=${last.step / last.total_steps} />`}
  </div>`;
}

function Curves({ steps }) {
  const xs = [...steps.keys()].sort((a, b) => a - b);
  const curve = (label, name, points) => ({ label, points, values: xs.map((step) => steps.get(step)[name] ?? null) });
  const series = [curve("training loss", "train_loss"), curve("validation loss", "valid_loss", true)];
  const known = series.filter(({ values }) => values.some((value) => value !== null));
  if (!known.length)
    return html`<div class="panel"><p class="muted">The loss appears here with the first step.</p></div>`;
  return html`<div class="panel"><h2>Loss</h2><${Chart}
    label="Loss by step"
    xs=${xs}
    series=${known}
    format=${number}
    describe=${(step) => `step ${step}`}
  /></div>`;
}

function Happened({ events }) {
  const warned = events.filter((event) => event.level !== "info");
  return html`<div class="panel">
    ${
      warned.length > 0 &&
      html`<h2>Diagnoses</h2>
      ${warned.map(
        (event) => html`<p
        class=${event.level === "error" ? "problem" : "note"}
        key=${event.id}
      >${event.message}</p>`,
      )}`
    }
    <h2>Events</h2>
    <div class="events" role="log" aria-live="polite" tabindex="0" aria-label="Events">
      <ol>
      ${events.toReversed().map((event) => html`<li key=${event.id}><time>${clock(event.created_at)}</time> ${event.message}</li>`)}
    </ol>
    </div>
  </div>`;
}

const SHOWN = [
  "n_epochs",
  "batch_size",
  "learning_rate",
  "r",
  "lora_alpha",
  "max_seq_length",
  "target_modules",
  "total_steps",
];

function Recipe({ job }) {
  const values = job.hyperparameters;
  const text = (value) =>
    Array.isArray(value) ? value.join(" ") : typeof value === "number" ? number(value) : String(value);
  return html`<div class="panel">
    <h2>Recipe</h2>
    <dl class="facts">
      <dt>trained on</dt><dd>${job.model}</dd>
      ${SHOWN.filter((name) => values[name] !== undefined).map((name) => html`<dt>${name}</dt><dd>${text(values[name])}</dd>`)}
      <dt>seed</dt><dd>${job.seed}</dd>
      ${job.trained_tokens !== null && html`<dt>trained</dt><dd>${plural(job.trained_tokens, "token")}</dd>`}
    </dl>
    ${job.result_files.map((id) => html`<${ResultFile} id=${id} />`)}
  </div>`;
}

function ResultFile({ id }) {
  const [file, setFile] = useState(null);
  useEffect(() => void get(`/v1/files/${id}`).then(setFile, () => {}), [id]);
  if (!file) return null;
  return html`<button
    type="button"
    class="quiet"
    onClick=${() => download(`/v1/files/${id}/content`, file.filename)}
  >${file.filename} <span class="muted">${bytes(file.bytes)}</span></button>`;
}
