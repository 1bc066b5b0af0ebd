// Compare: one prompt, up to four models, side by side.

import { useEffect, useRef, useState } from "preact/hooks";
import { key } from "../api.js";
import {
  MAX_COLUMNS,
  addColumn,
  ask,
  bodyOf,
  change,
  choose,
  columns,
  removeColumn,
  restore,
  runAll,
  setup,
  shareLink,
  stop,
} from "../compare_run.js";
import { difference } from "../diff.js";
import { number, seconds } from "../format.js";
import { html } from "../html.js";
import { Chip, CopyButton, Field, ModelSelect, Problem } from "../parts.js";
import { asCurl, asPython } from "../snippets.js";
import { models, route } from "../state.js";

const busy = (column) => ["waiting", "streaming"].includes(column.status.value);

export function Compare() {
  const query = route.value.query;
  useEffect(() => restore(query, models.value), [query]);
  const shown = columns.value;
  return html`<section class="compare">
    <h1 class="hidden">Compare</h1>
    <${Ask} />
    <div class="columns" data-count=${shown.length}>
      ${shown.map(
        (column, index) => html`<${Column}
        key=${column.id}
        column=${column}
        first=${index ? shown[0] : null}
        removable=${shown.length > 1}
      />`,
      )}
    </div>
  </section>`;
}

function Ask() {
  const { mode, system, prompt, sampling } = setup.value;
  const shown = columns.value;
  const place = useRef();
  // Two buttons, not one that changes: one that became a submit button while it is clicked would send again.
  const running = shown.some(busy);
  const sendable = prompt.trim() && shown.length;
  const typed = (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && sendable) {
      event.preventDefault();
      runAll();
    }
  };
  const sampled = (name, step, limits) => html`<${Field} label=${name.replace("_", " ")}>
    <input
      type="number"
      step=${step}
      ...${limits}
      value=${sampling[name] ?? ""}
      onInput=${(event) =>
        change({ sampling: { ...sampling, [name]: event.target.value === "" ? null : event.target.valueAsNumber } })}
    />
  <//>`;
  return html`<form
    class="panel ask"
    onKeyDown=${typed}
    onSubmit=${(event) => (event.preventDefault(), sendable && runAll())}
  >
    <div class="row spread wrap">
      <div class="segments" role="group" aria-label="Kind of prompt">
        ${["chat", "text"].map(
          (kind) => html`<button type="button" aria-pressed=${mode === kind} onClick=${() => change({ mode: kind })}>
            ${kind === "chat" ? "Chat" : "Completion"}
          </button>`,
        )}
      </div>
      <div class="row">
        <${CopyButton} text=${shareLink} label="Copy link" title="An address that opens this comparison" />
        <button
          type="button"
          disabled=${shown.length >= MAX_COLUMNS}
          onClick=${() => addColumn(another())}
        >Add column</button>
      </div>
    </div>
    ${
      mode === "chat" &&
      html`<${Field} label="System message" wide>
      <textarea
        rows="1"
        value=${system}
        placeholder="Optional"
        onInput=${(event) => change({ system: event.target.value })}
      ></textarea>
    <//>`
    }
    <${Field} label=${mode === "chat" ? "Message" : "Text to continue"} wide>
      <textarea
        ref=${place}
        rows="3"
        value=${prompt}
        placeholder=${mode === "chat" ? "Ask all columns the same" : "Once upon a time"}
        onInput=${(event) => change({ prompt: event.target.value })}
      ></textarea>
    <//>
    <div class="row spread bottom">
      <div class="row fields">
        ${sampled("temperature", 0.1, { min: 0, max: 2 })} ${sampled("top_p", 0.05, { min: 0, max: 1 })}
        ${sampled("max_tokens", 1, { min: 1 })} ${sampled("seed", 1, {})}
      </div>
      ${
        running
          ? html`<button key="stop" type="button" onClick=${() => shown.forEach(stop)}>Stop all</button>`
          : html`<button key="send" class="primary" disabled=${!sendable}>Send <kbd>Ctrl ↵</kbd></button>`
      }
    </div>
  </form>`;
}

// The first model that no column has yet; the base by one of its names only.
function another() {
  const [base] = models.value;
  const taken = new Set(columns.value.map((column) => column.model.value));
  return (models.value.find((model) => !taken.has(model.id) && (model.parent || model === base)) ?? base).id;
}

function Column({ column, first, removable }) {
  const turns = column.turns.value;
  const model = column.model.value;
  const [path, body] = bodyOf(column, answered(turns));
  return html`<article class="panel column" aria-label=${model}>
    <header>
      <${ModelSelect} label="Model of this column" value=${model} onChange=${(name) => choose(column, name)} />
      <button
        type="button"
        class="quiet icon"
        aria-label=${`Remove column ${model}`}
        disabled=${!removable}
        onClick=${() => removeColumn(column)}
      >✕</button>
    </header>
    <div
      class="turns"
      role="log"
      aria-live="polite"
      aria-busy=${busy(column)}
      tabindex="0"
      aria-label=${`Answers of ${model}`}
    >
      ${!turns.length && html`<p class="muted">${model}'s answer will appear here.</p>`}
      ${turns.map(
        (turn, index) => html`<${Turn}
        turn=${turn}
        other=${first?.turns.value[index]}
        column=${column}
        first=${first}
      />`,
      )}
      <${Problem} error=${column.error.value} />
    </div>
    <${Figures} column=${column} />
    <${Continue} column=${column} />
    <footer class="row">
      <${CopyButton} label="Copy as curl" text=${() => asCurl(location.origin, path, body, Boolean(key.value))} />
      <${CopyButton} label="Copy as Python" text=${() => asPython(location.origin, path, body, Boolean(key.value))} />
    </footer>
  </article>`;
}

// The request behind the last answer: everything up to the question.
const answered = (turns) =>
  turns.at(-1)?.role === "assistant"
    ? turns.slice(0, -1)
    : turns.length
      ? turns
      : [{ role: "user", content: setup.value.prompt }];

function Turn({ turn, other, column, first }) {
  const isAnswer = turn.role !== "user";
  const compared = isAnswer && first && other?.role === turn.role && !busy(column) && !busy(first);
  const pieces = compared ? difference(other.content, turn.content) : [{ text: turn.content, differs: false }];
  return html`<div class=${`turn ${turn.role}`}>
    <span class="hidden">${turn.role}: </span>
    <span class="text">${pieces.map(({ text, differs }) => (differs ? html`<mark>${text}</mark>` : text))}</span>
    ${isAnswer && busy(column) && html`<span class="caret" aria-hidden="true"></span>`}
  </div>`;
}

const ENDS = { length: "cut at max tokens", stop: "finished" };

function Figures({ column }) {
  const figures = column.figures.value;
  const status = column.status.value;
  const text = {
    idle: "Ready",
    waiting: "Waiting",
    streaming: "Streaming",
    stopped: "Stopped",
    error: "Failed",
    done: ENDS[figures?.finish] ?? "finished",
  };
  return html`<div class="row spread wrap measured">
    <dl class="figures">
    <div><dt>TTFT</dt><dd data-figure="ttft">${seconds(figures?.ttft)}</dd></div>
    <div><dt>tokens/s</dt><dd data-figure="rate">${number(figures?.rate)}</dd></div>
    <div><dt>tokens</dt><dd data-figure="tokens">${figures?.tokens || "–"}</dd></div>
    </dl>
    <${Chip} kind=${status}>${text[status]}<//>
  </div>`;
}

function Continue({ column }) {
  const [text, setText] = useState("");
  const isText = setup.value.mode === "text";
  const go = (event) => {
    event.preventDefault();
    if (!isText && !text.trim()) return;
    ask(column, text);
    setText("");
  };
  if (busy(column)) return html`<button type="button" class="full" onClick=${() => stop(column)}>Stop</button>`;
  if (!column.turns.value.length) return null;
  return html`<form class="row continue" onSubmit=${go}>
    <input
      type="text"
      value=${text}
      aria-label=${`Continue with ${column.model.value}`}
      placeholder=${isText ? "Add text, or just continue" : "Continue this column"}
      onInput=${(event) => setText(event.target.value)}
    />
    <button>${isText ? "Continue" : "Send"}</button>
  </form>`;
}
