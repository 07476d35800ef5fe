// Runs in the audio thread: gathers frames of 1 920 samples, silence where there is no input.
const FRAME = 1920;
registerProcessor("capture", class extends AudioWorkletProcessor {
  constructor() { super(); this.frame = new Float32Array(FRAME); this.used = 0; }
  process(inputs) {
    const samples = inputs[0][0] || new Float32Array(128);
    for (const sample of samples) {
      this.frame[this.used++] = sample;
      if (this.used === FRAME) { this.port.postMessage(this.frame.slice()); this.used = 0; }
    }
    return true;
  }
});
