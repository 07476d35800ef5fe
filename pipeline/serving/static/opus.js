// Ogg-Opus both ways by WebCodecs: an eighth of PCM's bits. RFC 3533 (Ogg), RFC 7845 (Opus in it).
import { FRAME, RATE } from "./sound.js";

const CODEC = { codec: "opus", sampleRate: RATE, numberOfChannels: 1 };
const BITRATE = 48000;

export async function hasOpus() {
  if (!("AudioEncoder" in window) || !("AudioDecoder" in window)) return false;
  const [encoder, decoder] = await Promise.all([
    AudioEncoder.isConfigSupported({ ...CODEC, bitrate: BITRATE }).catch(() => ({})),
    AudioDecoder.isConfigSupported(CODEC).catch(() => ({}))]);
  return Boolean(encoder.supported && decoder.supported);
}

const CRC = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index << 24;
  for (let bit = 0; bit < 8; bit++) value = value & 0x80000000 ? (value << 1) ^ 0x04c11db7 : value << 1;
  return value >>> 0;
});

// One packet in one page. kind: 2 for the first page of a stream, 0 for others.
function page(packet, serial, number, ticks, kind) {
  const lengths = Math.floor(packet.length / 255) + 1;
  const bytes = new Uint8Array(27 + lengths + packet.length), view = new DataView(bytes.buffer);
  bytes.set([0x4f, 0x67, 0x67, 0x53, 0, kind]);  // "OggS"
  view.setBigUint64(6, BigInt(ticks), true);
  view.setUint32(14, serial, true);
  view.setUint32(18, number, true);
  bytes[26] = lengths;
  bytes.fill(255, 27, 27 + lengths - 1);
  bytes[27 + lengths - 1] = packet.length % 255;
  bytes.set(packet, 27 + lengths);
  let crc = 0;
  for (const byte of bytes) crc = ((crc << 8) ^ CRC[((crc >>> 24) ^ byte) & 255]) >>> 0;
  view.setUint32(22, crc, true);
  return bytes;
}

// Frames of 1 920 samples in, Ogg pages out by `onPage`.
export class OpusWriter {
  constructor(onPage, onError) {
    this.onPage = onPage;
    this.serial = Math.floor(Math.random() * 2 ** 31);
    this.number = this.ticks = this.samples = 0;
    const head = new Uint8Array(19), view = new DataView(head.buffer);
    head.set(new TextEncoder().encode("OpusHead"));
    head[8] = 1; head[9] = 1;
    view.setUint16(10, 312, true);
    view.setUint32(12, RATE, true);
    const tags = new Uint8Array(8 + 4 + 6 + 4);
    tags.set(new TextEncoder().encode("OpusTags"));
    tags[8] = 6;
    tags.set(new TextEncoder().encode("duplex"), 12);
    this.write(head, 2);
    this.write(tags, 0);
    this.encoder = new AudioEncoder({
      output: (chunk) => {
        const packet = new Uint8Array(chunk.byteLength);
        chunk.copyTo(packet);
        this.ticks += Math.round((chunk.duration || 20000) * 48 / 1000);
        this.write(packet, 0);
      },
      error: onError,
    });
    this.encoder.configure({ ...CODEC, bitrate: BITRATE });
  }

  write(packet, kind) {
    this.onPage(page(packet, this.serial, this.number, this.ticks, kind));
    this.number += 1;
  }

  add(frame) {
    const timestamp = Math.round(this.samples * 1e6 / RATE);
    const data = new AudioData({
      format: "f32-planar", sampleRate: RATE, numberOfFrames: frame.length, numberOfChannels: 1,
      timestamp, data: frame });
    this.samples += frame.length;
    this.encoder.encode(data);
    data.close();
  }

  close() { if (this.encoder.state !== "closed") this.encoder.close(); }
}

// Ogg bytes in, frames of 1 920 samples out by `onFrame`. Pages may be cut anywhere.
export class OpusReader {
  constructor(onFrame, onError) {
    this.onFrame = onFrame;
    this.bytes = new Uint8Array(0);
    this.packet = [];
    this.left = new Float32Array(0);
    this.ticks = 0;
    this.decoder = new AudioDecoder({ output: (data) => this.decoded(data), error: onError });
    this.decoder.configure(CODEC);
  }

  add(more) {
    const bytes = new Uint8Array(this.bytes.length + more.length);
    bytes.set(this.bytes);
    bytes.set(more, this.bytes.length);
    let at = 0;
    for (;;) {
      const lengths = bytes[at + 26], body = at + 27 + lengths;
      if (at + 27 > bytes.length || body > bytes.length) break;
      const table = bytes.subarray(at + 27, body), size = table.reduce((sum, one) => sum + one, 0);
      if (body + size > bytes.length) break;
      this.page(table, bytes.subarray(body, body + size));
      at = body + size;
    }
    this.bytes = bytes.slice(at);
  }

  page(table, body) {
    let at = 0;
    for (const length of table) {
      this.packet.push(body.slice(at, at + length));
      at += length;
      if (length < 255) this.whole();
    }
  }

  whole() {
    const size = this.packet.reduce((sum, part) => sum + part.length, 0), packet = new Uint8Array(size);
    let at = 0;
    for (const part of this.packet) { packet.set(part, at); at += part.length; }
    this.packet = [];
    const name = String.fromCharCode(...packet.subarray(0, 8));
    if (name === "OpusHead" || name === "OpusTags") return;
    this.decoder.decode(new EncodedAudioChunk({ type: "key", timestamp: this.ticks, data: packet }));
    this.ticks += 20000;
  }

  decoded(data) {
    // A decoder may answer at 48 kHz whatever it was asked for: every second sample then.
    const step = Math.max(1, Math.round(data.sampleRate / RATE)), own = new Float32Array(data.numberOfFrames);
    data.copyTo(own, { planeIndex: 0, format: "f32-planar" });
    data.close();
    const some = step === 1 ? own : own.filter((_, index) => index % step === 0);
    let all = new Float32Array(this.left.length + some.length);
    all.set(this.left);
    all.set(some, this.left.length);
    while (all.length >= FRAME) { this.onFrame(all.slice(0, FRAME)); all = all.slice(FRAME); }
    this.left = all;
  }

  close() { if (this.decoder.state !== "closed") this.decoder.close(); }
}
