// The page: navigation, what every view needs to know, and the view that the address names.

import { render } from "preact";
import { useEffect } from "preact/hooks";
import { effect } from "@preact/signals";
import { html } from "./html.js";
import { key, keyWanted, reachable, signOut } from "./api.js";
import { usePoll } from "./poll.js";
import { Problem } from "./parts.js";
import { base, dark, models, modelsError, refreshModels, route, toggleTheme } from "./state.js";
import { Adapters } from "./views/adapters.js";
import { Compare } from "./views/compare.js";
import { Login } from "./views/login.js";
import { Server } from "./views/server.js";
import { Train } from "./views/train.js";
import "./style/base.css";
import "./style/controls.css";
import "./style/views.css";

const VIEWS = {
  compare: ["Compare", Compare],
  adapters: ["Adapters", Adapters],
  train: ["Train", Train],
  server: ["Server", Server],
};
const MODELS_EVERY_S = 5; // which also finds out that the server is gone

effect(() => {
  document.title = `${VIEWS[route.value.view]?.[0] ?? "Not found"} · loramux`;
});

function App() {
  usePoll(async () => keyWanted.value || (await refreshModels()), MODELS_EVERY_S);
  useEffect(() => document.getElementById("main").focus({ preventScroll: true }), [route.value.view]);
  const [, View] = VIEWS[route.value.view] ?? [];
  return html`
    <a
      class="skip"
      href="#main"
      onClick=${(event) => (event.preventDefault(), document.getElementById("main").focus())}
    >Skip to content</a>
    <header class="top">
      <a class="brand" href="#/compare"><img src="/page/icon.svg" alt="" width="24" height="24" />loramux</a>
      <nav aria-label="Views">
        ${Object.entries(VIEWS).map(
          ([name, [label]]) =>
            html`<a href=${`#/${name}`} aria-current=${route.value.view === name ? "page" : undefined}>${label}</a>`,
        )}
      </nav>
      <span class="grow"></span>
      <span class="serving">${base.value && !keyWanted.value && html`<span class=${reachable.value ? "dot" : "dot off"}></span>${base.value.id}`}</span>
      ${
        key.value &&
        html`<button type="button" class="quiet" onClick=${signOut}>Sign out</button>`
      }
      <button
        type="button"
        class="quiet icon"
        aria-label=${dark.value ? "Light colours" : "Dark colours"}
        title=${dark.value ? "Light colours" : "Dark colours"}
        onClick=${toggleTheme}
      >${dark.value ? "☀" : "☾"}</button>
    </header>
    <div aria-live="assertive">
      ${!reachable.value && html`<p class="banner">The server cannot be reached. What runs there goes on; this page is trying to reconnect…</p>`}
    </div>
    <main id="main" tabindex="-1">
      ${
        keyWanted.value
          ? html`<${Login} />`
          : !models.value
            ? html`<${Problem} error=${modelsError.value} />${!modelsError.value && html`<p class="muted">Asking the server…</p>`}`
            : View
              ? html`<${View} />`
              : html`<p>There is no such view. <a href="#/compare">Compare models</a> instead.</p>`
      }
    </main>
    <footer class="foot muted">
      ${!keyWanted.value && !key.value && html`<a href="/openapi.json">API description</a><a href="/metrics">Metrics</a>`}
      <a href="/page/licenses.txt">Licences</a>
    </footer>
  `;
}

render(html`<${App} />`, document.body);
