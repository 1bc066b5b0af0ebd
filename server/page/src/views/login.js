// Shown instead of everything when the server wants a key.

import { useState } from "preact/hooks";
import { keyWanted, setKey } from "../api.js";
import { html } from "../html.js";
import { Field } from "../parts.js";

export function Login() {
  const [typed, setTyped] = useState("");
  const enter = (event) => {
    event.preventDefault();
    sessionStorage.clear();
    setKey(typed.trim());
    location.reload(); // whoever was here before leaves nothing, no prompt and no draft; a key that is refused brings this form back, with the reason
  };
  return html`<form class="panel login" onSubmit=${enter}>
    <h1>This server asks for a key</h1>
    <p role="alert">${keyWanted.value}</p>
    <${Field} label="API key" wide>
      <input
        type="password"
        autocomplete="current-password"
        required
        autofocus
        value=${typed}
        onInput=${(event) => setTyped(event.target.value)}
      />
    <//>
    <button class="primary full">Sign in</button>
    <p class="hint">It is kept in this tab until you close it.</p>
  </form>`;
}
