// The audio thread's end of the player: a queue of samples, played without gaps.

const FIRST_WAIT_S = 0.06; // how long the first samples wait for more: evens out the network
const LONGEST_WAIT_S = 0.64;
const REPORT_FRAMES = 1024;

class Playback extends AudioWorkletProcessor {
  constructor({ processorOptions: { rate } }) {
    super();
    this.step = rate / sampleRate; // below 1 if the context could not have our rate
    this.reset(0);
    this.port.onmessage = ({ data }) => this.take(data);
  }

  reset(stream) {
    Object.assign(this, { stream, pieces: [], place: 0, last: 0, ended: false, stopping: false });
    Object.assign(this, { playing: false, wait: FIRST_WAIT_S, waited: 0, reported: 0 });
    this.stats = { stream, played: 0, squares: 0, underruns: 0, done: false };
  }

  take({ stream, kind, samples }) {
    if (kind === "begin") this.reset(stream);
    else if (stream !== this.stream) return;
    else if (kind === "samples") this.pieces.push(samples);
    else if (kind === "end") this.ended = true;
    else this.stopping = true;
  }

  process(_, [[out]]) {
    if (this.stats.done) return true;
    if (!this.playing && (this.pieces.length || this.ended)) {
      this.waited += out.length / sampleRate;
      this.playing = this.waited >= this.wait || this.ended;
    }
    let n = 0;
    while (this.playing && n < out.length) {
      const sample = this.next();
      if (sample === null) break;
      out[n++] = sample;
    }
    if (this.playing && n < out.length) this.runDry();
    if (this.stopping) {
      for (let i = 0; i < n; i++) out[i] *= 1 - (i + 1) / n;
      this.finish();
    }
    for (let i = 0; i < n; i++) this.stats.squares += out[i] ** 2;
    this.stats.played += n * this.step;
    this.reported += n;
    if (this.reported >= REPORT_FRAMES || this.stats.done) this.report();
    return true;
  }

  /** The next sample, interpolated if the rates differ; null if there is none. */
  next() {
    while (this.pieces.length && this.place >= this.pieces[0].length) {
      this.place -= this.pieces[0].length;
      this.last = this.pieces.shift().at(-1);
    }
    if (!this.pieces.length) return null;
    const i = Math.floor(this.place);
    const part = this.place - i;
    const piece = this.pieces[0];
    this.place += this.step;
    if (this.step === 1) return piece[i];
    const before = i > 0 ? piece[i - 1] : this.last;
    return before + part * (piece[i] - before);
  }

  runDry() {
    this.playing = false;
    if (this.ended) this.finish();
    else {
      this.stats.underruns++;
      this.wait = Math.min(2 * this.wait, LONGEST_WAIT_S);
      this.waited = 0;
    }
  }

  finish() {
    this.stats.done = true;
    this.pieces = [];
    this.playing = false;
  }

  report() {
    this.reported = 0;
    this.port.postMessage({ ...this.stats });
  }
}

registerProcessor("playback", Playback);
