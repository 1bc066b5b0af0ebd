// A comparison: what is asked, the columns that answer, and their streams. No markup.

import { signal } from "@preact/signals";
import { ApiError, stream } from "./api.js";
import { decode, encode } from "./share.js";

const KEPT = "loramux.compare";
export const MAX_COLUMNS = 4;
export const SAMPLING = { temperature: 0.7, top_p: 1, max_tokens: 128, seed: 42 };

const EMPTY = { mode: "chat", system: "", prompt: "", sampling: SAMPLING };

export const setup = signal({ ...EMPTY });
export const columns = signal([]);

let counter = 0;

// `status`: idle, waiting, streaming, done, stopped, error. A turn is { role, content }; in text mode the one turn is text.
function newColumn(model) {
  return {
    id: ++counter,
    model: signal(model),
    turns: signal([]),
    status: signal("idle"),
    error: signal(null),
    figures: signal(null),
    abort: null,
  };
}

export function change(fields) {
  if (fields.mode && fields.mode !== setup.value.mode) {
    for (const column of columns.value) {
      stop(column);
      column.turns.value = [];
      column.figures.value = null;
    }
  }
  setup.value = { ...setup.value, ...fields };
  keep();
}

export function choose(column, model) {
  column.model.value = model;
  keep();
}

export function addColumn(model) {
  if (columns.value.length < MAX_COLUMNS) columns.value = [...columns.value, newColumn(model)];
  keep();
}

export function removeColumn(column) {
  stop(column);
  columns.value = columns.value.filter((one) => one !== column);
  keep();
}

export const described = () => ({ ...setup.value, models: columns.value.map((column) => column.model.value) });

// From an address, from before a reload, or the base beside the first adapter.
export function restore(query, models) {
  const shared = query.get("s");
  const given = shared ? decode(shared) : columns.value.length ? null : decode(sessionStorage.getItem(KEPT) ?? "");
  if (given && Array.isArray(given.models)) {
    setup.value = {
      mode: given.mode === "text" ? "text" : "chat",
      system: String(given.system ?? ""),
      prompt: String(given.prompt ?? ""),
      sampling: { ...SAMPLING, ...numbers(given.sampling) },
    };
    columns.value.forEach(stop);
    columns.value = given.models.slice(0, MAX_COLUMNS).map((model) => newColumn(String(model)));
    keep();
    if (shared) history.replaceState(null, "", "#/compare"); // a reload must bring back what was changed since
  }
  if (!columns.value.length) {
    const adapters = models.filter((model) => model.parent && !model.id.includes(":"));
    const first = models.find((model) => !model.parent);
    columns.value = [first, ...adapters.slice(0, 1)].filter(Boolean).map((model) => newColumn(model.id));
  }
}

const numbers = (given) =>
  Object.fromEntries(
    Object.entries(given ?? {}).filter(
      ([name, value]) => name in SAMPLING && (value === null || typeof value === "number"),
    ),
  );

const keep = () => sessionStorage.setItem(KEPT, encode(described()));

export const shareLink = () => `${location.origin}/#/compare?s=${encode(described())}`;
export const linkTo = (models, prompt = "") => `#/compare?s=${encode({ ...EMPTY, prompt, models })}`;

// The body of the request that a column would send now.
export function bodyOf(column, turns) {
  const { mode, system, sampling } = setup.value;
  const given = Object.fromEntries(Object.entries(sampling).filter(([, value]) => value !== null));
  if (mode === "text")
    return ["/v1/completions", { model: column.model.value, prompt: turns[0]?.content ?? "", ...given }];
  const messages = [...(system.trim() ? [{ role: "system", content: system }] : []), ...turns];
  return ["/v1/chat/completions", { model: column.model.value, messages, ...given }];
}

export function runAll() {
  for (const column of columns.value) {
    stop(column);
    column.turns.value = [];
    column.figures.value = null;
    ask(column, setup.value.prompt);
  }
}

export function stop(column) {
  column.abort?.abort();
}

// A new turn in one column: in a chat a message and its answer, in a text simply more of it.
export async function ask(column, text) {
  stop(column);
  const abort = (column.abort = new AbortController());
  const isText = setup.value.mode === "text";
  const before = column.turns.value;
  const asked = isText
    ? [{ role: "text", content: (before[0]?.content ?? "") + text }]
    : [...before, { role: "user", content: text }];
  const [path, body] = bodyOf(column, asked);
  column.error.value = null;
  column.status.value = "waiting";
  column.turns.value = isText ? asked : [...asked, { role: "assistant", content: "" }];
  const meter = new Meter(column);
  const paint = painter(column, asked, isText);
  try {
    const options = {
      body: { ...body, stream: true, stream_options: { include_usage: true, continuous_usage_stats: true } },
      signal: abort.signal,
    };
    for await (const chunk of stream("POST", path, options)) {
      const choice = chunk.choices[0];
      const piece = isText ? choice?.text : choice?.delta.content;
      meter.saw(chunk.usage, Boolean(piece), choice?.finish_reason);
      if (piece) paint(piece);
    }
    column.status.value = "done";
  } catch (error) {
    if (abort !== column.abort) return;
    column.status.value = error.name === "AbortError" ? "stopped" : "error";
    if (error.name !== "AbortError")
      column.error.value = error instanceof ApiError ? error : new ApiError(String(error.message));
  } finally {
    paint("", true);
    if (abort === column.abort) column.abort = null;
  }
}

// Text as it comes, at most once a frame: a fast stream must not cost a drawing a token.
function painter(column, asked, isText) {
  let answer = "";
  let due = 0;
  const show = () => {
    due = 0;
    column.turns.value = isText
      ? [{ role: "text", content: asked[0].content + answer, from: asked[0].content.length }]
      : [...asked, { role: "assistant", content: answer }];
  };
  return (piece, atOnce = false) => {
    answer += piece;
    if (atOnce) {
      cancelAnimationFrame(due);
      if (answer || !isText) show();
    } else due ||= requestAnimationFrame(show);
  };
}

// Time to first token, and tokens a second after it; as the reader sees them, network included.
class Meter {
  constructor(column) {
    this.column = column;
    this.began = performance.now();
    this.first = null;
    this.figures = { ttft: null, tokens: 0, rate: null, finish: null };
  }

  saw(usage, hasText, finish) {
    const now = performance.now();
    if (hasText && this.first === null) {
      this.first = now;
      this.column.status.value = "streaming";
      this.figures.ttft = (now - this.began) / 1000;
    }
    if (usage) this.figures.tokens = usage.completion_tokens;
    if (finish) this.figures.finish = finish;
    const passed = (now - (this.first ?? now)) / 1000;
    if (this.figures.tokens > 1 && passed > 0.05) this.figures.rate = (this.figures.tokens - 1) / passed;
    this.column.figures.value = { ...this.figures };
  }
}
