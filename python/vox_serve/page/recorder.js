// The microphone, recorded as a WAV file at its own rate.
import { toInt16, wavFile } from "./wav.js";

/**
 * Makes a button record: one press begins, the next one ends. `begin()` may refuse by returning
 * false, `take(blob)` gets the recording, `fail(error)` what went wrong.
 */
export function recordWith(button, { begin = () => true, take, fail }) {
  const label = button.textContent;
  let recording = null;
  button.addEventListener("click", async () => {
    if (!recording && !begin()) return;
    button.disabled = true; // until the browser has asked for permission
    try {
      if (recording) {
        const stopped = recording;
        recording = null;
        button.textContent = label;
        await take(await stopped.stop());
      } else {
        recording = await record((seconds) => {
          if (recording) button.textContent = `Stop recording (${seconds.toFixed(0)} s)`;
        });
      }
    } catch (error) {
      fail(error);
    }
    button.disabled = false;
    button.setAttribute("aria-pressed", String(recording !== null));
  });
}

/** Starts recording. `onSeconds` gets the length so far; the result's stop() returns a WAV Blob. */
export async function record(onSeconds) {
  if (!navigator.mediaDevices) {
    throw new Error("The browser gives the microphone only to pages on localhost or over HTTPS.");
  }
  const stream = await navigator.mediaDevices.getUserMedia({ audio: { channelCount: 1, echoCancellation: false } });
  const context = new AudioContext();
  await context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
  const node = new AudioWorkletNode(context, "capture", { numberOfOutputs: 0 });
  const pieces = [];
  let length = 0;
  node.port.onmessage = ({ data }) => {
    pieces.push(toInt16(data));
    length += data.length;
    onSeconds(length / context.sampleRate);
  };
  context.createMediaStreamSource(stream).connect(node);
  return {
    async stop() {
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      return wavFile(pieces, context.sampleRate);
    },
  };
}
