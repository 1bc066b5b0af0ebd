// The form of a new fine-tuning job: what was filled in, kept over a reload, and the body that the API takes.

import { signal } from "@preact/signals";

const KEPT = "loramux.recipe";
const EMPTY = { model: "", file: null, validation: null, suffix: "", prompt: "", fields: {} };

export const draft = signal(restore());

function restore() {
  try {
    return { ...EMPTY, ...JSON.parse(sessionStorage.getItem(KEPT) ?? "{}") };
  } catch {
    return { ...EMPTY };
  }
}

export function change(values) {
  draft.value = { ...draft.value, ...values };
  sessionStorage.setItem(KEPT, JSON.stringify(draft.value));
}

export const changeField = (name, value) => change({ fields: { ...draft.value.fields, [name]: value } });
export const clear = () => change(EMPTY);

// Empty fields are left to the server, which says what it chose and why.
export const NUMBERS = {
  n_epochs: { label: "Epochs", step: 1, min: 1 },
  batch_size: { label: "Batch size", step: 1, min: 1 },
  learning_rate: { label: "Learning rate", step: "any", min: 0 },
  r: { label: "Rank r", step: 1, min: 1 },
  lora_alpha: { label: "LoRA alpha", step: "any", min: 0 },
  max_seq_length: { label: "Longest row, tokens", step: 1, min: 8 },
  max_steps: { label: "Stop after steps", step: 1, min: 1 },
  save_steps: { label: "Checkpoint every", step: 1, min: 1 },
};

export function bodyOf({ model, file, validation, suffix, prompt, fields }, baseName) {
  const hyperparameters = Object.fromEntries(
    Object.entries(fields).filter(([, value]) => value !== "" && value !== false && value !== null),
  );
  return {
    model: model || baseName,
    training_file: file.id,
    ...(validation && { validation_file: validation.id }),
    ...(suffix && { suffix }),
    ...(prompt && { metadata: { sample_prompt: prompt.slice(0, 512) } }),
    method: { type: "supervised", supervised: { hyperparameters } },
  };
}

// Seconds that a plan takes, from what this server has measured, and in which words to say so.
export function timeOf(plan, samples, sum) {
  const trained = sum(samples, "loramux_training_tokens_total");
  const spent = sum(samples, "loramux_training_seconds_total");
  const epochs = plan.total_steps / plan.steps_per_epoch;
  if (trained > 0 && spent > 0)
    return [(plan.trained_tokens * epochs * spent) / trained, "at the speed of this server's training so far"];
  // Forward, forward again and backward are about three times what reading a prompt takes.
  const read = sum(samples, "loramux_request_prompt_tokens_sum");
  const reading = sum(samples, "loramux_request_prefill_time_seconds_sum");
  if (read > 0 && reading > 0)
    return [(3 * plan.tokens * epochs * reading) / read, "a guess from how fast this server reads prompts"];
  return [null, "not known before this server has answered a request"];
}
