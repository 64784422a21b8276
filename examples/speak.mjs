// Saves speech from a server: node examples/speak.mjs "Hello there." hello.wav [http://localhost:8000]
import { writeFile } from "node:fs/promises";

const [text, path, server = "http://localhost:8000"] = process.argv.slice(2);
const response = await fetch(`${server}/generate`, {
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify({ text, speaker: 0 }),
});
if (!response.ok) {
  console.error(response.status, await response.text());
  process.exit(1);
}
await writeFile(path, Buffer.from(await response.arrayBuffer()));
console.log(`${path} written`);
