// The player: samples in as they arrive, sound out. One stream plays at a time.
import { ScheduledPlayback } from "./scheduled.js";

export const RATE = 24000;

export class Player {
  /** Of the stream that plays: frames played, their squares' sum, gaps, and whether it is done. */
  stats = { stream: 0, played: 0, squares: 0, underruns: 0, done: true };
  #stream = 0;
  #ready = null;
  #finished = () => {};

  /** Call this in the handler of a click or key: browsers let no other code start sound. */
  unlock() {
    this.#ready ??= this.#open().catch((error) => {
      this.#ready = null;
      throw error;
    });
    if (!this.isRunning) this.context?.resume();
    return this.#ready;
  }

  async #open() {
    this.context = new AudioContext({ sampleRate: RATE, latencyHint: "interactive" });
    if (!this.context.audioWorklet) {
      const playback = new ScheduledPlayback(this.context, RATE, (stats) => this.#take(stats));
      this.#post = (message) => playback.post(message);
      return;
    }
    await this.context.audioWorklet.addModule(new URL("playback.js", import.meta.url));
    const node = new AudioWorkletNode(this.context, "playback", {
      numberOfInputs: 0,
      outputChannelCount: [1],
      processorOptions: { rate: RATE },
    });
    node.port.onmessage = ({ data }) => this.#take(data);
    node.connect(this.context.destination);
    this.#post = (message) => node.port.postMessage(message);
  }

  #post = () => {};

  #take(stats) {
    if (stats.stream !== this.#stream) return;
    this.stats = stats;
    this.onprogress?.(stats);
    if (stats.done) this.#finished();
  }

  /** Begins a stream, in place of any other. Returns a promise that resolves when it has ended. */
  begin() {
    this.#finished();
    this.#stream++;
    this.stats = { stream: this.#stream, played: 0, squares: 0, underruns: 0, done: false };
    this.#post({ stream: this.#stream, kind: "begin" });
    return new Promise((resolve) => (this.#finished = resolve));
  }

  /** Adds samples (Float32Array). */
  push(samples) {
    this.#post({ stream: this.#stream, kind: "samples", samples });
  }

  /** Says that no more samples come. */
  end() {
    this.#post({ stream: this.#stream, kind: "end" });
  }

  stop() {
    this.#post({ stream: this.#stream, kind: "stop" });
    this.#finished();
  }

  /** False while the browser holds the sound back, or has no device for it. */
  get isRunning() {
    return this.context?.state === "running";
  }

  /** Milliseconds of the stream that the listener has heard. */
  get heardMs() {
    const delay = this.context?.outputLatency ?? 0;
    return Math.max(0, (this.stats.played / RATE - delay) * 1000);
  }
}
