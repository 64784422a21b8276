// WAV files: read while they arrive, and written.

/** Reads a WAV piece by piece. Header chunks other than the format are skipped. */
export class WavReader {
  rate = 24000;
  #bytes = new Uint8Array(0); // not yet used
  #left = null; // bytes of samples that are still to come; null before the samples

  /** Takes bytes as they arrive and returns their samples, an Int16Array that may be empty. */
  push(bytes) {
    const all = new Uint8Array(this.#bytes.length + bytes.length);
    all.set(this.#bytes);
    all.set(bytes, this.#bytes.length);
    this.#bytes = all;
    while (this.#left === null && this.#skipChunk());
    if (this.#left === null) return new Int16Array(0);
    const length = Math.min(this.#bytes.length, this.#left) & ~1;
    const samples = new Int16Array(this.#bytes.slice(0, length).buffer);
    this.#bytes = this.#bytes.slice(length);
    this.#left -= length;
    return samples;
  }

  /** Reads one chunk of the header; false if it is not complete yet. */
  #skipChunk() {
    const bytes = this.#bytes;
    if (bytes.length < 8) return false;
    const view = new DataView(bytes.buffer, bytes.byteOffset);
    const id = String.fromCharCode(...bytes.subarray(0, 4));
    let size = 8 + view.getUint32(4, true);
    if (id === "RIFF") size = 12;
    else if (id === "data") {
      // A stream does not know its length: its header has the largest number.
      this.#left = size === 8 + 0xffffffff ? Infinity : size - 8;
      size = 8;
    } else size += size & 1;
    if (bytes.length < size) return false;
    if (id === "fmt ") this.rate = view.getUint32(12, true);
    this.#bytes = bytes.slice(size);
    return true;
  }
}

// IPTC's term for media that a trained model made; nobody loads it.
const SOURCE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia";

/** A LIST INFO chunk with a note in ASCII on where the speech comes from, as the server writes it. */
function infoChunk(note) {
  const field = ([name, text]) => {
    const ended = `${text}\0`;
    return name + size(ended.length) + ended + (ended.length % 2 ? "\0" : "");
  };
  const size = (n) => String.fromCharCode(n & 255, (n >> 8) & 255, (n >> 16) & 255, n >> 24);
  const fields = [["ICMT", note], ["ISFT", "VoxKern"], ["ISRC", SOURCE]].map(field).join("");
  return Uint8Array.from(`LIST${size(fields.length + 4)}INFO${fields}`, (c) => c.charCodeAt(0));
}

/** A mono 16-bit WAV file of samples in pieces (Int16Array each), marked with a note if it has one. */
export function wavFile(pieces, rate, note = null) {
  const info = note === null ? new Uint8Array(0) : infoChunk(note);
  const numBytes = 2 * pieces.reduce((sum, piece) => sum + piece.length, 0);
  const view = new DataView(new ArrayBuffer(44));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + numBytes + info.length, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, numBytes, true);
  return new Blob([view, ...pieces, info], { type: "audio/wav" });
}

/** Samples as floats in -1 to 1. */
export const toFloat = (samples) => Float32Array.from(samples, (sample) => sample / 32768);

/** Floats as 16-bit samples. */
export const toInt16 = (samples) =>
  Int16Array.from(samples, (x) => Math.max(-32768, Math.min(32767, Math.round(x * 32768))));
