// The official Node client: chat, streams, completions, responses, tools, errors, models.
import { writeFileSync } from "node:fs";
import OpenAI from "openai";

const [url, result] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "Say hello." }];
const assert = (condition, what) => {
  if (!condition) throw new Error(what);
};

const checks = {
  async chat() {
    const answer = await client.chat.completions.create({ model: "pirate", messages, max_tokens: 20 });
    assert(answer.choices[0].message.content, "no content");
    assert(answer.usage.completion_tokens > 0, "no usage");
  },
  async stream() {
    let text = "";
    let usage;
    for await (const chunk of await client.chat.completions.create({
      model: "demo", messages, max_tokens: 20, stream: true, stream_options: { include_usage: true },
    })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert(text && usage.completion_tokens > 0, "no text or usage");
  },
  async completions() {
    const answer = await client.completions.create({ model: "demo", prompt: "Roses are", max_tokens: 8 });
    assert(answer.choices[0].text, "no text");
  },
  async forced_tool() {
    const parameters = { type: "object", properties: { a: { type: "integer", minimum: 0, maximum: 9 } }, required: ["a"] };
    const answer = await client.chat.completions.create({
      model: "demo", messages, max_tokens: 60,
      tools: [{ type: "function", function: { name: "f", parameters } }],
      tool_choice: { type: "function", function: { name: "f" } },
    });
    JSON.parse(answer.choices[0].message.tool_calls[0].function.arguments);
  },
  async responses() {
    const first = await client.responses.create({ model: "demo", input: "Say hello.", max_output_tokens: 20 });
    assert(first.output_text, "no text");
    const kept = await client.responses.retrieve(first.id);
    assert(kept.output_text === first.output_text, "another text");
  },
  async responses_stream() {
    const stream = client.responses.stream({ model: "demo", input: "Say hello.", max_output_tokens: 20 });
    let text = "";
    for await (const event of stream) if (event.type === "response.output_text.delta") text += event.delta;
    const final = await stream.finalResponse();
    assert(text && text === final.output_text, "the stream and its end differ");
  },
  async models() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    assert(names.includes("demo") && names.includes("pirate"), names.join());
  },
  async unknown_model() {
    try {
      await client.chat.completions.create({ model: "nobody", messages });
    } catch (error) {
      assert(error instanceof OpenAI.NotFoundError && error.requestID && error.code === "model_not_found", String(error));
      return;
    }
    throw new Error("no error");
  },
};

const said = {};
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    said[name] = null;
  } catch (error) {
    console.error(error);
    said[name] = String(error);
  }
}
writeFileSync(result, JSON.stringify(said));
