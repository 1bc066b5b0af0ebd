// A request as a command and as a program, for people to take along.

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

export function asCurl(origin, path, body, hasKey) {
  const lines = [`curl ${origin}${path}`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $LORAMUX_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

export function asPython(origin, path, body, hasKey) {
  const method = path.endsWith("/chat/completions") ? "chat.completions" : "completions";
  const fields = Object.entries(body).map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  const key = hasKey ? 'os.environ["LORAMUX_API_KEY"]' : '"none"';
  const text = method === "completions" ? "answer.choices[0].text" : "answer.choices[0].message.content";
  return [
    ...(hasKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(`${origin}/v1`)}, api_key=${key})`,
    `answer = client.${method}.create(`,
    ...fields,
    ")",
    `print(${text})`,
    "",
  ].join("\n");
}

// JSON's strings are Python's; its true, false and null are not.
function literal(value, indent) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) {
    return `[\n${value.map((one) => `${indent}    ${literal(one, `${indent}    `)},\n`).join("")}${indent}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value)
      .map(([name, one]) => `${JSON.stringify(name)}: ${literal(one, indent)}`)
      .join(", ")}}`;
  }
  return JSON.stringify(value);
}
