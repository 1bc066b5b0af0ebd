// Upload: two files or an archive, dropped or chosen; progress, and the gate's faults one a line.

import { useRef, useState } from "preact/hooks";
import { upload } from "../api.js";
import { bytes } from "../format.js";
import { html } from "../html.js";
import { Bar, Check, Drop, Field, Problem } from "../parts.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";
const ARCHIVE = /\.(zip|tar|tar\.gz|tgz|tar\.zst)$/i;
const OPTIONS = { overwrite: false, pinned: false, verify: true };

export function Upload({ onDone }) {
  const [files, setFiles] = useState([]);
  const [name, setName] = useState("");
  const [options, setOptions] = useState(OPTIONS);
  const [sent, setSent] = useState(null); // null, or a share of the bytes
  const [error, setError] = useState(null);
  const [said, say] = useState("");
  const abort = useRef(null);

  const take = (given) => {
    setError(null);
    say("");
    const kept = [...given, ...files.filter((old) => !given.some((one) => one.name === old.name))];
    setFiles(kept);
    const archive = kept.find((file) => ARCHIVE.test(file.name));
    if (archive && !name) setName(archive.name.replace(ARCHIVE, "").replace(/[^A-Za-z0-9._-]+/g, "-"));
  };
  const [parts, missing] = partsOf(files);
  const clear = () => {
    setFiles([]);
    setName("");
    setOptions(OPTIONS);
    setError(null);
  };
  const send = async (event) => {
    event.preventDefault();
    setError(null);
    setSent(0);
    abort.current = new AbortController();
    const form = new FormData();
    for (const [field, value] of Object.entries({ name, ...options })) form.append(field, String(value));
    for (const [part, file] of parts) form.append(part, file);
    try {
      const adapter = await upload("/v1/adapters", form, { onProgress: setSent, signal: abort.current.signal });
      clear();
      say([`${adapter.id} is ready to be called.`, ...(adapter.warnings ?? [])].join(" "));
      onDone();
    } catch (failure) {
      if (failure.name !== "AbortError") setError(failure);
    } finally {
      setSent(null);
    }
  };
  return html`<form class="panel upload" onSubmit=${send}>
    <${Drop} label="Drop an adapter here" multiple accept=".json,.safetensors,.zip,.tar,.gz,.tgz,.zst" onFiles=${take}>
      <p class="muted">${CONFIG} and ${WEIGHTS}, or one archive of them (.zip, .tar, .tar.gz, .tar.zst).</p>
    <//>
    ${
      files.length > 0 &&
      html`<ul class="files">${files.map((file) => html`<li>${file.name} <span class="muted">${bytes(file.size)}</span></li>`)}</ul>
      ${missing && html`<p class="note">${missing}</p>`}
      <div class="row wrap bottom">
        <${Field} label="Name"><input
          type="text"
          required
          value=${name}
          placeholder="support-bot"
          onInput=${(event) => setName(event.target.value)}
        /><//>
        <${Check}
          label="Replace if the name is taken"
          checked=${options.overwrite}
          onChange=${(overwrite) => setOptions({ ...options, overwrite })}
        />
        <${Check}
          label="Pin to the device"
          checked=${options.pinned}
          onChange=${(pinned) => setOptions({ ...options, pinned })}
        />
        <${Check}
          label="Verify against PEFT"
          checked=${options.verify}
          onChange=${(verify) => setOptions({ ...options, verify })}
        />
        <span class="grow"></span>
        <button type="button" onClick=${() => (sent === null ? clear() : abort.current.abort())}>Cancel</button>
        <button class="primary" disabled=${sent !== null || missing || !name}>Upload</button>
      </div>`
    }
    ${
      sent !== null &&
      html`<div class="progress" role="status">
      <${Bar} label="Upload" value=${sent < 1 ? sent : undefined} />
      ${sent < 1 ? `Sending, ${Math.round(sent * 100)} %` : options.verify ? "Checking the files and verifying against PEFT…" : "Checking the files…"}
    </div>`
    }
    <${Problem} error=${error} title="The adapter was not taken" />
    <p class="said" role="status">${said}</p>
  </form>`;
}

// The parts of the form, and what is still missing, as a sentence.
function partsOf(files) {
  const archives = files.filter((file) => ARCHIVE.test(file.name));
  if (archives.length)
    return [[["archive", archives[0]]], files.length > 1 ? "An archive comes alone: cancel and drop it again." : ""];
  const config = files.find((file) => file.name.endsWith(".json"));
  const weights = files.find((file) => file.name.endsWith(".safetensors"));
  const missing = config && weights ? "" : `${config ? WEIGHTS : CONFIG} is missing: drop it, too.`;
  return [
    [
      [CONFIG, config],
      [WEIGHTS, weights],
    ].filter(([, file]) => file),
    missing,
  ];
}
