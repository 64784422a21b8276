// Streams speech and prints when each part arrives: node examples/stream.mjs "Hello there." hello.wav [http://localhost:8000]
// In a browser the same loop feeds an AudioWorklet; ctrl-C, or controller.abort(), ends the speech on the server too.
import { createWriteStream } from "node:fs";

const [text, path, server = "http://localhost:8000"] = process.argv.slice(2);
const controller = new AbortController();
process.once("SIGINT", () => controller.abort());

const started = performance.now();
const response = await fetch(`${server}/generate`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ text, streaming: true }),
  signal: controller.signal,
});
if (!response.ok) {
  console.error(response.status, (await response.json()).detail);
  process.exit(1);
}
const file = createWriteStream(path);
let bytes = 0;
for await (const chunk of response.body) {
  if (bytes === 0) console.log(`first audio after ${Math.round(performance.now() - started)} ms`);
  bytes += chunk.length;
  file.write(chunk);
}
file.end();
console.log(`${path}: ${bytes} bytes, request ${response.headers.get("x-request-id")}`);
