// Speaks a text that is still being written, and saves it as 24 kHz 16-bit PCM, over the WebSocket.
// echo "Hello there. How are you?" | node examples/live_text.mjs speech.pcm [http://localhost:8000]
// Node 22 or newer has WebSocket; Node 20 needs: node --experimental-websocket
import { createWriteStream } from "node:fs";
import { text } from "node:stream/consumers";

const [path, server = "http://localhost:8000"] = process.argv.slice(2);
const words = (await text(process.stdin)).split(/(?<=\s)/);
const file = createWriteStream(path);
const socket = new WebSocket(`${server.replace(/^http/, "ws")}/v1/audio/speech/stream`);
const send = (type, fields = {}) => socket.send(JSON.stringify({ type, ...fields }));
socket.binaryType = "arraybuffer";

socket.onopen = async () => {
  for (const word of words) {
    send("text", { text: word });
    await new Promise((resolve) => setTimeout(resolve, 50)); // a language model's pace
  }
  send("close");
};
socket.onmessage = ({ data }) => {
  if (data instanceof ArrayBuffer) return file.write(new Uint8Array(data));
  const event = JSON.parse(data);
  if (event.type === "sentence.begin") console.log(event.text);
  if (event.type === "error") {
    console.error(event.message);
    process.exitCode = 1;
  }
};
socket.onclose = () => file.end();
