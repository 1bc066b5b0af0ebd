// The only place that talks to the server. Every failure is an ApiError whose message is a sentence for people.
// Knows whether the server can be reached (`reachable`) and whether it wants a key (`keyWanted`).

import { signal } from "@preact/signals";
import { events } from "./sse.js";

const KEY = "loramux.key";
const ANSWER_MS = 20_000; // what is only looked up takes milliseconds: later it is a connection that died unnoticed

export const key = signal(sessionStorage.getItem(KEY) ?? "");
export const keyWanted = signal(""); // why it must be entered, once the server refused
export const reachable = signal(true);
export const reconnections = signal(0);

export class ApiError extends Error {
  constructor(message, { status = 0, code = "", param = "", faults = [] } = {}) {
    super(message);
    Object.assign(this, { status, code, param, faults });
  }
}

export function setKey(value) {
  key.value = value;
  keyWanted.value = "";
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

// Whatever this tab knows goes with it: what is in memory, too.
export function signOut() {
  sessionStorage.clear();
  location.reload();
}

export function withKey(headers = {}) {
  return key.value ? { ...headers, Authorization: `Bearer ${key.value}` } : headers;
}

// `body` becomes JSON. Resolves to the Response of a 2xx answer.
export async function request(method, path, { body, signal: abort, headers } = {}) {
  let response;
  try {
    response = await fetch(path, {
      method,
      signal: abort,
      headers: withKey(body === undefined ? headers : { "Content-Type": "application/json", ...headers }),
      body: body === undefined ? undefined : JSON.stringify(body),
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    lost();
    throw new ApiError("The server cannot be reached.", { code: "unreachable" });
  }
  if (!response.ok) throw refused(response.status, await response.text());
  return response;
}

export async function get(path, options) {
  return JSON.parse(await getText(path, options));
}

export async function getText(path, options) {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(), ANSWER_MS);
  try {
    return await (await request("GET", path, { ...options, signal: abort.signal })).text();
  } catch (error) {
    if (error instanceof ApiError) throw error;
    lost();
    throw new ApiError("The server does not answer.", { code: "unreachable" });
  } finally {
    clearTimeout(timer);
  }
}

export const post = async (path, body = {}, options) => (await request("POST", path, { ...options, body })).json();
export const patch = async (path, body) => (await request("PATCH", path, { body })).json();
export const remove = async (path) => (await request("DELETE", path)).json();

// Events of a stream; an error event is thrown like an error answer, and so is a connection that breaks.
export async function* stream(method, path, options) {
  const response = await request(method, path, options);
  try {
    for await (const event of events(response)) {
      if (event.error?.message && event.object === undefined) throw new ApiError(event.error.message, event.error);
      yield event;
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    lost();
    throw new ApiError("The connection broke before the answer was complete.", { code: "unreachable" });
  }
}

// A form, with progress from 0 to 1: fetch does not tell how much of a body was sent. It ends with the tab, so the browser
// asks before it leaves.
export function upload(path, form, { onProgress = () => {}, signal: abort } = {}) {
  return new Promise((resolve, reject) => {
    const sent = new XMLHttpRequest();
    sent.open("POST", path);
    for (const [name, value] of Object.entries(withKey())) sent.setRequestHeader(name, value);
    sent.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    sent.upload.onload = () => onProgress(1);
    const stay = (event) => event.preventDefault();
    addEventListener("beforeunload", stay);
    sent.onloadend = () => removeEventListener("beforeunload", stay);
    sent.onload = () => {
      if (sent.status < 300) resolve(JSON.parse(sent.responseText));
      else reject(refused(sent.status, sent.responseText));
    };
    sent.onerror = () => {
      lost();
      reject(new ApiError("The upload broke off: the server cannot be reached.", { code: "unreachable" }));
    };
    sent.onabort = () => reject(new DOMException("stopped", "AbortError"));
    abort?.addEventListener("abort", () => sent.abort());
    sent.send(form);
  });
}

// A link is enough without a key; with one the bytes are fetched first, because links carry no headers.
export async function download(path, filename) {
  const link = document.createElement("a");
  link.download = filename;
  if (key.value) link.href = URL.createObjectURL(await (await request("GET", path)).blob());
  else link.href = path;
  link.click();
  if (key.value) setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function refused(status, text) {
  let error = {};
  try {
    error = JSON.parse(text).error ?? {};
  } catch {
    // not ours: a proxy's page, say
  }
  const message = error.message ?? `The server answered with status ${status}.`;
  if (status === 401) {
    // To whom sent none the server says how a program sends one; people need to know where to get it.
    const reason = key.value ? message : keyWanted.value || "Enter the one that its operator has given to you.";
    setKey("");
    keyWanted.value = reason;
  }
  return new ApiError(message, { ...error, status });
}

async function lost() {
  if (!reachable.value) return;
  reachable.value = false;
  for (let wait = 500; !reachable.value; wait = Math.min(5000, wait * 1.5)) {
    await new Promise((wake) => setTimeout(wake, wait));
    try {
      await fetch("/health", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
      reachable.value = true;
      reconnections.value += 1;
    } catch {
      // still away
    }
  }
}
