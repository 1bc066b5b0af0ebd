// A new job: the data, what the trainer makes of it, the recipe, and what the run will take.

import { useEffect, useState } from "preact/hooks";
import { post, upload } from "../api.js";
import { bytes, plural, seconds } from "../format.js";
import { html } from "../html.js";
import { readMetrics, sum } from "../metrics.js";
import { Bar, Check, Drop, Field, ModelSelect, Problem } from "../parts.js";
import { NUMBERS, bodyOf, change, changeField, clear, draft, timeOf } from "../recipe.js";
import { base } from "../state.js";
import { Preview } from "./train_preview.js";

const TARGETS = {
  "": "Automatic",
  "all-linear": "All linears",
  attention: "Attention",
  "attention-qv": "Attention, q and v",
};
const PLAN_DELAY_MS = 400;

export function NewJob() {
  const { file, validation, model, suffix, prompt, fields } = draft.value;
  const [plan, setPlan] = useState(null);
  const [planning, setPlanning] = useState(false);
  const [fault, setFault] = useState(null); // of the data or the recipe
  const [error, setError] = useState(null); // of the start
  const [starting, setStarting] = useState(false);
  const [time, setTime] = useState([null, ""]);

  // The server plans anew a moment after the last change; an answer that was overtaken is dropped.
  useEffect(() => {
    setFault(null);
    if (!file) return setPlan(null);
    const abort = new AbortController();
    const timer = setTimeout(async () => {
      setPlanning(true);
      try {
        const found = await post("/v1/fine_tuning/plan", bodyOf(draft.value, base.value.id), { signal: abort.signal });
        setPlan(found);
        setTime(
          await readMetrics().then(
            (samples) => timeOf(found, samples, sum),
            () => [null, "this key may not see how fast the server is"],
          ),
        );
      } catch (failure) {
        if (failure.name === "AbortError") return;
        setFault(failure);
        if (failure.param?.endsWith("_file")) setPlan(null);
        if (failure.code === "file_not_found") change({ file: null, validation: null });
      }
      setPlanning(false);
    }, PLAN_DELAY_MS);
    return () => {
      clearTimeout(timer);
      abort.abort();
    };
  }, [file?.id, validation?.id, model, JSON.stringify(fields)]);

  const start = async (event) => {
    event.preventDefault();
    setStarting(true);
    setError(null);
    try {
      const job = await post("/v1/fine_tuning/jobs", bodyOf(draft.value, base.value.id));
      clear();
      location.hash = `#/train/${job.id}`;
    } catch (failure) {
      setError(failure);
      setStarting(false);
    }
  };
  return html`<section>
    <div class="row spread"><h1>New fine-tuning job</h1><a href="#/train">All jobs</a></div>
    <div class="split wide">
      <div>
        <${Data}
          label="Drop training data here"
          file=${file}
          onFile=${(taken) => change({ file: taken })}
          hint="JSONL: a conversation, a prompt with its completion, or a text on every line."
        />
        ${
          file &&
          html`<${Data}
          label="Validation data, if you have some"
          small
          file=${validation}
          onFile=${(taken) => change({ validation: taken })}
        />`
        }
        <${Problem}
          error=${fault}
          title=${fault?.param?.endsWith("_file") ? "The data cannot be trained on yet" : "The recipe does not work"}
        />
        ${plan && html`<${Preview} plan=${plan} />`}
      </div>
      <form class="panel recipe" onSubmit=${start}>
        <h2>Recipe</h2>
        <p class="muted">Fields left empty are chosen from the data.</p>
        <div class="fields">
          <${Field} label="Model to train" wide><${ModelSelect}
            label="Model to train on"
            value=${model || base.value?.id}
            onChange=${(name) => change({ model: name })}
          /><//>
          <${Field} label="Name" hint="becomes part of the adapter's name" wide>
            <input
              type="text"
              value=${suffix}
              placeholder="support"
              pattern="[A-Za-z0-9._\\-]{1,64}"
              title="1 to 64 letters, digits and . _ -"
              onInput=${(event) => change({ suffix: event.target.value })}
            />
          <//>
          ${Object.entries(NUMBERS).map(
            ([name, { label, ...limits }]) => html`<${Field} label=${label} hint=${plan?.why[name]}>
              <input
                type="number"
                ...${limits}
                value=${fields[name] ?? ""}
                placeholder=${plan?.hyperparameters[name] ?? (name === "max_steps" ? "never" : "auto")}
                onInput=${(event) => changeField(name, event.target.value === "" ? "" : event.target.valueAsNumber)}
              />
            <//>`,
          )}
          <${Field} label="Target modules" wide>
            <select
              value=${fields.target_modules ?? ""}
              onChange=${(event) => changeField("target_modules", event.target.value)}
            >
              ${Object.entries(TARGETS).map(([value, text]) => html`<option value=${value}>${text}</option>`)}
            </select>
          <//>
          <${Field} label="Prompt for samples" hint="answered by the base and by every checkpoint" wide>
            <textarea
              rows="2"
              value=${prompt}
              placeholder="What your adapter should do, as a user would ask"
              onInput=${(event) => change({ prompt: event.target.value })}
            ></textarea>
          <//>
        </div>
        <${Check}
          label="Pack short rows together"
          checked=${fields.packing}
          onChange=${(on) => changeField("packing", on)}
        />
        <${Check}
          label="Train on the user's words too"
          checked=${fields.train_on_inputs}
          onChange=${(on) => changeField("train_on_inputs", on)}
        />
        <${Estimate} plan=${plan} planning=${planning} time=${time} />
        <${Problem} error=${error} />
        <button class="primary full" disabled=${!plan || fault || planning || starting}>Start training</button>
      </form>
    </div>
  </section>`;
}

function Data({ label, hint, file, onFile, small }) {
  const [sent, setSent] = useState(null);
  const [error, setError] = useState(null);
  const take = async ([chosen]) => {
    setError(null);
    setSent(0);
    const form = new FormData();
    form.append("purpose", "fine-tune");
    form.append("file", chosen);
    try {
      const { id, filename, bytes: size } = await upload("/v1/files", form, { onProgress: setSent });
      onFile({ id, filename, bytes: size });
    } catch (failure) {
      setError(failure);
    }
    setSent(null);
  };
  return html`<div class=${small ? "small" : ""}>
    <${Drop} label=${file ? file.filename : label} accept=".jsonl,.json,.txt" onFiles=${take}>
      ${
        file
          ? html`<p class="muted">${bytes(file.bytes)} <button type="button" class="quiet" onClick=${() => onFile(null)}>Remove</button></p>`
          : hint && html`<p class="muted">${hint}</p>`
      }
    <//>
    ${sent !== null && html`<div class="progress" role="status"><${Bar} label="Upload" value=${sent} /> Sending, ${Math.round(sent * 100)} %</div>`}
    <${Problem} error=${error} />
  </div>`;
}

function Estimate({ plan, planning, time: [spent, basis] }) {
  if (!plan)
    return html`<p class="note" role="status">${planning ? "Reading the data…" : "Drop training data to see what the run will take."}</p>`;
  const { memory } = plan;
  const parts = [
    ["optimizer and factors", memory.adapter + memory.gradients + memory.optimizer],
    ["layer inputs", memory.layer_inputs],
    ["activations or logits", Math.max(memory.layer_activations, memory.logits)],
  ];
  return html`<dl class="estimate" aria-busy=${planning} aria-label="Estimate">
    <dt>Steps</dt><dd>${plan.total_steps.toLocaleString("en")}</dd>
    <dt>Memory beside serving</dt><dd>${bytes(memory.total)} <span class="hint">${parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", ")}</span></dd>
    <dt>Time</dt><dd>${spent === null ? "unknown" : `about ${seconds(spent)}`} <span class="hint">${basis}; requests that are served meanwhile add to it</span></dd>
    <dt>Trainable</dt><dd>${plural(plan.trainable_parameters, "parameter")}</dd>
  </dl>`;
}
