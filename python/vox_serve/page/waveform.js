// The waveform: one bar for each 20 ms, drawn as it arrives; what was played is coloured.
import { RATE } from "./player.js";

const BAR_FRAMES = RATE / 50;
const FIRST_BARS = 200; // bars that fill the width at first: 4 s

export class Waveform {
  #peaks = [];
  #count = 0; // samples in the last bar
  #played = 0;
  #waiting = false;

  constructor(canvas) {
    this.canvas = canvas;
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    const draw = () => this.#draw();
    new ResizeObserver(draw).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  }

  clear() {
    this.#peaks = [];
    this.#count = this.#played = 0;
    this.#later();
  }

  push(samples) {
    for (const sample of samples) {
      if (this.#count % BAR_FRAMES === 0) this.#peaks.push(0);
      this.#count++;
      const size = Math.abs(sample) / 32768;
      if (size > this.#peaks.at(-1)) this.#peaks[this.#peaks.length - 1] = size;
    }
    this.#later();
  }

  progress(frames) {
    this.#played = frames / BAR_FRAMES;
    this.#later();
  }

  #later() {
    if (this.#waiting) return;
    this.#waiting = true;
    const draw = () => this.#draw();
    if (this.calm.matches) setTimeout(draw, 250);
    else requestAnimationFrame(draw);
  }

  #draw() {
    this.#waiting = false;
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    canvas.width = width * ratio;
    canvas.height = height * ratio;
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    pen.scale(ratio, ratio);
    const slots = Math.max(1, Math.floor(width / 4)); // 4 pixels each
    const barsEach = Math.max(FIRST_BARS, this.#peaks.length) / slots;
    for (let slot = 0; slot < slots; slot++) {
      const first = Math.floor(slot * barsEach);
      const last = Math.max(first + 1, Math.floor((slot + 1) * barsEach));
      const peak = Math.max(0, ...this.#peaks.slice(first, last));
      const size = Math.max(2, Math.sqrt(peak) * (height - 4));
      const there = first < this.#peaks.length;
      pen.fillStyle = there && first < this.#played ? style.color : style.borderColor;
      pen.globalAlpha = there ? 1 : 0.5;
      pen.fillRect(slot * 4, (height - size) / 2, 2.5, size);
    }
  }
}
