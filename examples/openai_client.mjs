// Saves speech as it arrives, with OpenAI's client: npm install openai
// node examples/openai_client.mjs "Hello there." hello.mp3 [http://localhost:8000]
import { createWriteStream } from "node:fs";
import OpenAI from "openai";

const [text, path, server = "http://localhost:8000"] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${server}/v1`, apiKey: "none" });
const start = performance.now();
const response = await client.audio.speech.create({
  model: "tts-1",
  voice: "alloy",
  input: text,
  response_format: path.split(".").pop(),
});
const file = createWriteStream(path);
let first;
for await (const chunk of response.body) {
  first ??= performance.now() - start;
  file.write(chunk);
}
await new Promise((resolve) => file.end(resolve));
console.log(`first bytes after ${Math.round(first)} ms, ${path} after ${Math.round(performance.now() - start)} ms`);
