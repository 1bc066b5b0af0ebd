// What several views share: where we are, how it looks, and which models there are.

import { computed, effect, signal } from "@preact/signals";
import { get } from "./api.js";

const THEME = "loramux.theme";

// "#/train/ftjob-1?x=y" -> { view: "train", rest: "ftjob-1", query }
function readRoute() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const [view, ...rest] = path.split("/");
  return { view: view || "compare", rest: rest.map(decodeURIComponent).join("/"), query: new URLSearchParams(query) };
}

export const route = signal(readRoute());
addEventListener("hashchange", () => (route.value = readRoute()));

export const theme = signal(localStorage.getItem(THEME) ?? "");
effect(() => {
  if (theme.value) document.documentElement.dataset.theme = theme.value;
  else delete document.documentElement.dataset.theme;
});

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
export const systemDark = signal(prefersDark.matches);
prefersDark.addEventListener("change", (event) => (systemDark.value = event.matches));
export const dark = computed(() => (theme.value ? theme.value === "dark" : systemDark.value));

export function toggleTheme() {
  const wanted = dark.value ? "light" : "dark";
  theme.value = wanted === (systemDark.value ? "dark" : "light") ? "" : wanted;
  if (theme.value) localStorage.setItem(THEME, theme.value);
  else localStorage.removeItem(THEME);
}

export const models = signal(null); // null until the first answer
export const base = computed(() => models.value?.find((model) => !model.parent) ?? null);

export const modelsError = signal(null); // why there are none yet: the server is restarting its worker, say

export async function refreshModels() {
  try {
    const found = (await get("/v1/models")).data;
    if (JSON.stringify(found) !== JSON.stringify(models.value)) models.value = found;
    modelsError.value = null;
  } catch (error) {
    modelsError.value = error;
  }
}
