// Microphone, playback with a jitter buffer, loudness, and WAV files. 24 kHz mono throughout.
export const RATE = 24000, FRAME = 1920, FRAME_S = FRAME / RATE;

// What is heard from a microphone is given to `onFrame` in frames of 80 ms, silence without one.
export class Microphone {
  async start(context, withMicrophone, onFrame) {
    await context.audioWorklet.addModule(new URL("capture.js", import.meta.url));
    this.node = new AudioWorkletNode(context, "capture");
    this.node.port.onmessage = (event) => onFrame(event.data);
    this.node.connect(context.destination);  // it puts out silence; unconnected it would not run
    if (!withMicrophone) return;
    this.stream = await navigator.mediaDevices.getUserMedia(
      { audio: { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true } });
    if (this.stopped) return this.stop();  // stopped while the browser asked
    context.createMediaStreamSource(this.stream).connect(this.node);
  }

  stop() {
    this.stopped = true;
    if (this.node) this.node.port.onmessage = null;
    if (this.stream) this.stream.getTracks().forEach((track) => track.stop());
  }
}

// Plays frames one behind the other. After a gap it waits a little longer than before, so that
// the next late frame leaves none; while nothing is late the wait grows shorter again.
export class Player {
  static LEAST_S = 0.06;
  static MOST_S = 0.4;

  constructor(context, pan) {
    this.context = context;
    this.wait = Player.LEAST_S;
    this.until = 0;   // context time up to which frames are scheduled
    this.gaps = 0;
    this.out = new StereoPannerNode(context, { pan });
    this.out.connect(context.destination);
  }

  play(samples) {
    const buffer = this.context.createBuffer(1, samples.length, RATE);
    buffer.copyToChannel(samples, 0);
    const source = new AudioBufferSourceNode(this.context, { buffer });
    source.connect(this.out);
    const now = this.context.currentTime;
    if (this.until < now) {
      if (this.until > 0) { this.gaps += 1; this.wait = Math.min(Player.MOST_S, this.wait + 0.04); }
      this.until = now + this.wait;
    } else if (this.until - now > this.wait + 0.5) {
      this.until = now + this.wait;  // far behind: what piled up is talked over, not played late
    } else {
      this.wait = Math.max(Player.LEAST_S, this.wait - 0.0005);
    }
    source.start(this.until);
    this.until += buffer.duration;
  }
}

export function loudness(samples) {
  let sum = 0;
  for (const sample of samples) sum += sample * sample;
  return Math.sqrt(sum / samples.length);
}

export function toInt16(samples) {
  const view = new DataView(new ArrayBuffer(2 * samples.length));
  samples.forEach((s, i) => view.setInt16(2 * i, Math.round(Math.max(-1, Math.min(1, s)) * 32767), true));
  return new Uint8Array(view.buffer);
}

export function fromInt16(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const samples = new Float32Array(bytes.byteLength >> 1);
  for (let i = 0; i < samples.length; i++) samples[i] = view.getInt16(2 * i, true) / 32767;
  return samples;
}

// A stereo WAV: left the model, right the user, as training data has them.
export function wavFile(model, user) {
  const length = Math.max(model.length, user.length) * FRAME;
  const view = new DataView(new ArrayBuffer(44 + 4 * length));
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 4 * length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 2, true);
  view.setUint32(24, RATE, true); view.setUint32(28, 4 * RATE, true); view.setUint16(32, 4, true);
  view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 4 * length, true);
  [model, user].forEach((frames, channel) => frames.forEach((frame, number) => {
    for (let i = 0; i < frame.length; i++) {
      const sample = Math.round(Math.max(-1, Math.min(1, frame[i])) * 32767);
      view.setInt16(44 + 4 * (number * FRAME + i) + 2 * channel, sample, true);
    }
  }));
  return new Blob([view.buffer], { type: "audio/wav" });
}
