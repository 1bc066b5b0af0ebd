// Bundle src/ into the package: one script, one style sheet, the page, and the licences of what is in the bundle.
//   node build.mjs [directory]     default: ../loramux_server/page
// The same sources and the same lockfile give the same bytes; sources.sha256 says which sources those were.

import { createHash } from "node:crypto";
import { copyFileSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const out = process.argv[2] ?? join(here, "../loramux_server/page");
const bundled = ["@preact/signals", "@preact/signals-core", "htm", "preact"];

// htm ignores white space around line breaks; left in templates it would be a tenth of the script.
const unindented = {
  name: "unindented",
  setup: ({ onLoad }) =>
    onLoad({ filter: /\/page\/src\/.*\.js$/ }, ({ path }) => ({
      contents: readFileSync(path, "utf8").replace(/\n\s+/g, "\n"),
    })),
};

mkdirSync(out, { recursive: true });
await build({
  absWorkingDir: here,
  entryPoints: { app: "src/main.js" },
  outdir: out,
  bundle: true,
  format: "esm",
  minify: true,
  target: "es2022",
  charset: "utf8",
  legalComments: "none",
  plugins: [unindented],
});
for (const name of ["index.html", "icon.svg"]) copyFileSync(join(here, "src", name), join(out, name));

const texts = bundled.map((name) => {
  const folder = join(here, "node_modules", name);
  const { version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  return `${name} ${version} (${license})\n\n${readFileSync(join(folder, "LICENSE"), "utf8").trim()}\n`;
});
const head = "app.js and app.css contain these works, each under its own licence.\n";
writeFileSync(join(out, "licenses.txt"), [head, ...texts].join("\n" + "-".repeat(80) + "\n\n"));

// As `sha256sum` prints it, of all the files that the bundle is made from.
const inside = readdirSync(join(here, "src"), { recursive: true, withFileTypes: true }).filter((entry) =>
  entry.isFile(),
);
const sources = [
  "build.mjs",
  "package-lock.json",
  ...inside.map((entry) => relative(here, join(entry.parentPath, entry.name))),
].sort();
const lines = sources.map(
  (name) =>
    `${createHash("sha256")
      .update(readFileSync(join(here, name)))
      .digest("hex")}  ${name}\n`,
);
writeFileSync(join(out, "sources.sha256"), lines.join(""));
