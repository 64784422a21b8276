// Playback without an AudioWorklet: browsers have none on a page that came over plain HTTP from
// another machine. Each piece of samples is scheduled where the last one ends.

const LEAD_S = 0.1;

export class ScheduledPlayback {
  constructor(context, rate, report) {
    Object.assign(this, { context, rate, report, sources: [], stats: { done: true } });
    setInterval(() => this.stats.done || this.#update(), 50);
  }

  post({ stream, kind, samples }) {
    if (kind === "begin") {
      this.#silence();
      this.ended = false;
      this.time = 0; // when the next piece starts
      this.queued = 0;
      this.stats = { stream, played: 0, squares: 0, underruns: 0, done: false };
    } else if (stream !== this.stats.stream || this.stats.done) return;
    else if (kind === "samples") this.#schedule(samples);
    else if (kind === "end") this.ended = true;
    else this.#finish();
  }

  #schedule(samples) {
    const now = this.context.currentTime;
    if (this.time < now) {
      if (this.time) this.stats.underruns++;
      this.time = now + LEAD_S;
    }
    const buffer = this.context.createBuffer(1, samples.length, this.rate);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.context.destination);
    source.start(this.time);
    this.sources.push(source);
    this.time += buffer.duration;
    this.queued += samples.length;
    for (const x of samples) this.stats.squares += x * x;
  }

  #update() {
    const ahead = Math.max(0, this.time - this.context.currentTime) * this.rate;
    this.stats.played = Math.max(0, this.queued - ahead);
    if (this.ended && ahead <= 0) this.#finish();
    else this.report({ ...this.stats });
  }

  #finish() {
    this.#silence();
    this.stats.done = true;
    this.report({ ...this.stats });
  }

  #silence() {
    this.sources.forEach((source) => source.stop());
    this.sources = [];
  }
}
