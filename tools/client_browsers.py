"""Browsers as clients of client_table.py: what reaches the audio graph is measured.

A worklet in the graph counts the blocks of 1 ms in which something can be heard: as many as the
speech has, if all of it was played. A pause, since the server was too slow, does not count.
"""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

HEARD = 0.01
"""Magnitude of a sample that can be heard; lossy codecs leave less of it around speech."""

PLAY = """
const [url, raw, heard] = args;
const context = new AudioContext({ sampleRate: 48000 });
const module = `
registerProcessor("meter", class extends AudioWorkletProcessor {
  constructor() {
    super();
    this.at = this.blocks = 0;
    this.port.onmessage = () => this.port.postMessage(this.blocks);
  }
  process([[samples = []]]) {
    samples.forEach((x, i) => {
      if (Math.abs(x) < ${heard}) return;
      const block = Math.floor((this.at + i) / 48);
      if (block !== this.last) this.blocks += 1;
      this.last = block;
    });
    this.at += 128;
    return true;
  }
});`;
const script = new Blob([module], { type: "text/javascript" });
await context.audioWorklet.addModule(URL.createObjectURL(script));
const meter = new AudioWorkletNode(context, "meter");
meter.connect(context.destination);
await context.resume();

async function file() {
  const audio = new Audio(url);
  context.createMediaElementSource(audio).connect(meter);
  await new Promise((resolve, reject) => {
    audio.onended = resolve;
    audio.onerror = () => reject(new Error(audio.error.message || "error " + audio.error.code));
    audio.play().catch(reject);
  });
  return audio.currentTime;
}

function linear(code) { // of G.711's mu-law
  const x = ~code & 255;
  const magnitude = (((x & 15) << 3) + 132 << (x >> 4 & 7)) - 132;
  return x & 128 ? -magnitude : magnitude;
}

async function samples({ rate, size }) { // after two seconds: a pause between pieces adds blocks
  let at = context.currentTime + 2, clock = 0, odd = new Uint8Array(0);
  for await (const piece of (await fetch(url)).body) {
    const bytes = new Uint8Array([...odd, ...piece]);
    const even = bytes.length - bytes.length % size;
    odd = bytes.slice(even);
    if (!even) continue;
    const whole = bytes.slice(0, even);
    const values = size === 2 ? new Int16Array(whole.buffer) : Array.from(whole, linear);
    const buffer = context.createBuffer(1, even / size, rate);
    buffer.copyToChannel(Float32Array.from(values, (x) => x / 32768), 0);
    const source = new AudioBufferSourceNode(context, { buffer });
    source.connect(meter);
    at = Math.max(at, context.currentTime);
    source.start(at);
    at += buffer.duration;
    clock += buffer.duration;
  }
  await new Promise((resolve) => setTimeout(resolve, 1000 * (at - context.currentTime)));
  return clock;
}

const clock = await (raw ? samples(raw) : file());
const blocksHeard = () => new Promise((resolve) => {
  meter.port.onmessage = ({ data }) => resolve(data);
  meter.port.postMessage("tell");
});
let blocks = -1;
for (let next; blocks !== (next = await blocksHeard()); blocks = next) // the graph may be late
  await new Promise((resolve) => setTimeout(resolve, 1000));
await context.close();
return { heard: blocks / 1000, clock };
"""


def heard_s(pcm: bytes, rate_hz: int = 24_000) -> float:
    """Seconds of 16-bit samples in which something can be heard, in blocks of 1 ms."""
    samples = np.abs(np.frombuffer(pcm, "<i2").astype(np.int32))
    block = rate_hz // 1000
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    return float((blocks.max(axis=1) >= HEARD * 32768).sum()) / 1000


def cells(
    stack: ExitStack, folder: Path, raw: dict[str, tuple[str, int, int]], tolerance_s: float
) -> dict[str, tuple[str | None, Callable[[Any, str, bool], float]]]:
    """The browsers as cells of the table, each with the reason why it is missing. They start when
    they are first used.

    Args:
        stack: ends them.
        folder: for their profiles.
        raw: sample rate and bytes of a sample of formats without a header; the first item is
            ffmpeg's name.
        tolerance_s: a clock that is wrong by more is remarked on.
    """
    import firefox
    import web_driver

    open_ones: dict[str, Any] = {}

    def cell(kind: str, make: Callable[[Path], Any]) -> Callable[[Any, str, bool], float]:
        def play(server: Any, name: str, streamed: bool) -> float:
            if kind not in open_ones:
                own = folder / kind
                own.mkdir()
                open_ones[kind] = make(own)
                stack.callback(open_ones[kind].close)
            browser = open_ones[kind]
            browser.open(server.relay)
            samples = {"rate": raw[name][1], "size": raw[name][2]} if name in raw else None
            found = browser.run(PLAY, server.link(name, streamed), samples, HEARD)
            if abs(found["clock"] - server.seconds) > tolerance_s:
                server.remark = f"its clock ends at {found['clock']:.0f} s"
            heard = server.heard
            if name == "ulaw":  # what telephones leave of the speech
                heard = heard_s(server.speech("pcm", False, sample_rate=8000), 8000)
            return float(server.seconds + found["heard"] - heard)

        return play

    no_firefox = None if firefox.FIREFOX else "needs firefox-esr"
    return {
        "Chromium": (web_driver.why_missing(), cell("chromium", web_driver.Browser)),
        "Firefox": (no_firefox, cell("firefox", firefox.Firefox)),
    }
