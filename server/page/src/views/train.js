// Train: the jobs, a form for a new one, and one job at a time in full.

import { useState } from "preact/hooks";
import { get } from "../api.js";
import { ago } from "../format.js";
import { html } from "../html.js";
import { Chip, Empty, Older, Problem } from "../parts.js";
import { usePoll } from "../poll.js";
import { route } from "../state.js";
import { Job } from "./train_job.js";
import { NewJob } from "./train_new.js";

export const KINDS = { succeeded: "good", failed: "bad", running: "busy", paused: "warn" };
const PAGE = 100;
export const WORDS = { validating_files: "checking files" };

export function Train() {
  const { rest } = route.value;
  if (rest === "new") return html`<${NewJob} />`;
  if (rest) return html`<${Job} key=${rest} id=${rest} />`;
  return html`<${Jobs} />`;
}

function Jobs() {
  const [page, setPage] = useState(null);
  const [count, setCount] = useState(PAGE);
  const [error, setError] = useState(null);
  usePoll(
    async (alive) => {
      try {
        const found = await get(`/v1/fine_tuning/jobs?limit=${count}`);
        if (alive()) setPage(found);
      } catch (failure) {
        if (alive()) setError(failure);
      }
    },
    2,
    [count],
  );
  const jobs = page?.data;
  return html`<section>
    <div class="row spread">
      <h1>Fine-tuning</h1>
      <a class="button primary" href="#/train/new">New job</a>
    </div>
    <${Problem} error=${jobs ? null : error} />
    ${!jobs && !error && html`<p class="muted">Asking the server…</p>`}
    ${
      jobs?.length === 0 &&
      html`<${Empty} title="No jobs yet">
      A job trains an adapter on the base that is served here, while it goes on serving. It begins with a JSONL file of conversations:
      <a href="#/train/new">start a new job</a>.
    <//>`
    }
    ${
      jobs?.length > 0 &&
      html`<div class="panel scroll" tabindex="0" role="region" aria-label="Table of jobs">
      <table>
        <thead><tr>${["Job", "Status", "Base", "Result", "Created"].map((head) => html`<th scope="col">${head}</th>`)}</tr></thead>
        <tbody>
          ${jobs.map(
            (job) => html`<tr key=${job.id}>
              <th scope="row"><a href=${`#/train/${job.id}`}>${job.id}</a></th>
              <td><${Chip} kind=${KINDS[job.status]}>${WORDS[job.status] ?? job.status}<//></td>
              <td>${job.model}</td>
              <td>${job.fine_tuned_model ?? job.error?.message ?? "–"}</td>
              <td>${ago(job.created_at)}</td>
            </tr>`,
          )}
        </tbody>
      </table>
      <${Older} page=${page} count=${count} onMore=${() => setCount(count + PAGE)} />
    </div>`
    }
  </section>`;
}
