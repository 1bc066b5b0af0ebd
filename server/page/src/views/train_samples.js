// What every checkpoint answers to one prompt, beside the base. Greedy, one question at a time, each asked once.

import { useEffect, useRef, useState } from "preact/hooks";
import { post, reconnections } from "../api.js";
import { linkTo } from "../compare_run.js";
import { number } from "../format.js";
import { html } from "../html.js";
import { Problem } from "../parts.js";

const MAX_TOKENS = 64;
const answers = new Map(); // of this visit: [model, prompt] -> text

export function Samples({ job, checkpoints }) {
  const [prompt, setPrompt] = useState(job.metadata?.sample_prompt ?? "");
  const [typed, setTyped] = useState(prompt);
  const [times, setTimes] = useState(0); // asked by hand: what failed is asked again
  const [, redraw] = useState(0);
  const faults = useRef(new Map()).current; // by the same keys: one that is gone does not keep the others from answering
  const rows = [
    { model: job.model, label: `${job.model}, before` },
    ...checkpoints
      .toSorted((a, b) => a.step_number - b.step_number)
      .map((one) => ({
        model: one.fine_tuned_model_checkpoint,
        label: `step ${one.step_number}`,
        loss: one.metrics.valid_loss ?? one.metrics.train_loss,
      })),
    ...(job.fine_tuned_model ? [{ model: job.fine_tuned_model, label: "finished" }] : []),
  ];
  const wanted = checkpoints.length || job.fine_tuned_model ? rows : [];
  useEffect(() => {
    const abort = new AbortController();
    (async () => {
      for (const { model } of prompt ? wanted : []) {
        const key = JSON.stringify([model, prompt]);
        if (answers.has(key)) continue;
        try {
          answers.set(key, await sample(model, prompt, abort.signal));
          faults.delete(key);
        } catch (failure) {
          if (failure.name === "AbortError") return;
          faults.set(key, failure);
        }
        redraw((count) => count + 1);
      }
    })();
    return () => abort.abort();
  }, [prompt, times, wanted.map((row) => row.model).join(), reconnections.value]);
  return html`<div class="panel">
    <h2>Samples</h2>
    <form class="row" onSubmit=${(event) => (event.preventDefault(), setPrompt(typed.trim()), setTimes(times + 1))}>
      <input
        type="text"
        class="grow"
        value=${typed}
        aria-label="Prompt for samples"
        placeholder="A prompt that the base and every checkpoint answer"
        onInput=${(event) => setTyped(event.target.value)}
      />
      <button>Ask all</button>
    </form>
    ${!wanted.length && html`<p class="muted">Checkpoints appear here as they are made; each can be called at once.</p>`}
    <ul class="samples">
      ${wanted.map(({ model, label, loss }) => {
        const key = JSON.stringify([model, prompt]);
        return html`<li key=${model} data-sample=${model}>
          <div class="row spread"><strong>${label}</strong><span class="row">${loss != null && html`<span class="muted">loss ${number(loss)}</span>`}<a href=${linkTo([job.model, model], prompt)}>Compare</a></span></div>
          ${prompt && (faults.has(key) && !answers.has(key) ? html`<${Problem} error=${faults.get(key)} />` : html`<p class="text">${answers.get(key) ?? "…"}</p>`)}
        </li>`;
      })}
    </ul>
  </div>`;
}

async function sample(model, prompt, signal) {
  const messages = [{ role: "user", content: prompt }];
  const answer = await post(
    "/v1/chat/completions",
    { model, messages, temperature: 0, max_tokens: MAX_TOKENS },
    { signal },
  );
  return answer.choices[0].message.content;
}
