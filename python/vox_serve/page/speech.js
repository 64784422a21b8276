// One utterance: from the request to the last sample played.
import { ApiError, request } from "./api.js";
import { RATE } from "./player.js";
import { WavReader, toFloat } from "./wav.js";

/**
 * Requests speech and plays it while it arrives.
 *
 * `signal` stops both at once. `onSamples` gets each piece (Int16Array).
 * Returns the pieces, the times and how it ended: "done", "stopped" or "cut".
 */
export async function speak(player, path, options, { signal, onSamples = () => {} }) {
  const speech = { pieces: [], note: null, seconds: 0, firstMs: null, madeMs: 0, ending: "done" };
  const begun = performance.now();
  const stop = () => player.stop();
  signal.addEventListener("abort", stop);
  try {
    const [answer] = await Promise.all([request(path, { ...options, signal }), player.unlock()]);
    signal.throwIfAborted();
    const played = player.begin();
    speech.note = answer.headers.get("X-Synthetic-Speech");
    try {
      for await (const samples of samplesOf(answer)) {
        speech.firstMs ??= performance.now() - begun;
        speech.madeMs = performance.now() - begun;
        speech.pieces.push(samples);
        speech.seconds += samples.length / RATE;
        player.push(toFloat(samples));
        onSamples(samples, speech);
      }
    } catch (error) {
      if (signal.aborted) throw error;
      speech.ending = "cut";
    }
    player.end();
    await played;
  } catch (error) {
    if (!signal.aborted) throw error;
  } finally {
    signal.removeEventListener("abort", stop);
  }
  if (signal.aborted) speech.ending = "stopped";
  return speech;
}

async function* samplesOf(answer) {
  const reader = answer.body.getReader();
  const wav = new WavReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const samples = wav.push(value);
    if (wav.rate !== RATE) throw new ApiError(`The server sends ${wav.rate} Hz.`, 0);
    if (samples.length) yield samples;
  }
}
