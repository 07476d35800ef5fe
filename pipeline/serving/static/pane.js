// What is seen of one conversation: state in words, both waveforms, what the model says and when.
import { FRAME_S } from "./sound.js";

const SHOWN_FRAMES = 250;   // 20 s
const PAUSE_S = 1.0;        // a longer one starts a new line
const LOUD = 0.012;         // RMS from which a frame counts as speech
const QUIET_FRAMES = 3;     // before an answer
const SPOKEN_FRAMES = 4;    // so many make a turn of the user's

export class Pane {
  constructor(parent, title) {
    const part = document.getElementById("pane").content.cloneNode(true);
    this.root = part.firstElementChild;
    parent.append(part);
    this.part = (name) => this.root.querySelector("." + name);
    this.part("title").textContent = title;
    this.part("title").hidden = !title;
    this.reset();
  }

  reset() {
    this.user = []; this.model = [];      // loudness by frame
    this.lines = []; this.heardLines = []; this.delays = []; this.waits = []; this.echoes = 0;
    this.spoken = 0; this.quietSince = null;
    for (const name of ["proof", "transcript", "lag"]) this.part(name).textContent = "";
    this.part("warning").hidden = true;
    this.draw();
  }

  show(text, kind = "") {
    this.part("state").textContent = text;
    this.part("state").dataset.kind = kind;
  }

  // A frame of the conversation: what was said by both, loudness each, and how many seconds later
  // than it was due: who waits for an answer waits for those too.
  frame(user, model, behind) {
    this.user.push(user); this.model.push(model);
    const at = this.model.length;
    if (user > LOUD) {
      this.spoken += 1;
      this.quietSince = at;
    } else if (this.quietSince !== null && this.begins()) {
      if (this.spoken >= SPOKEN_FRAMES) this.answered((at - 1 - this.quietSince) * FRAME_S, Math.max(0, behind));
      this.spoken = 0; this.quietSince = null;
    }
    this.draw();
  }

  // Whether the model starts to speak in this frame: what it said while you spoke is no answer.
  begins() {
    const last = this.model.slice(-QUIET_FRAMES - 1);
    return last.pop() > LOUD && last.every((loud) => loud <= LOUD);
  }

  // delay: in the conversation's own time; who talks waits for what the server is behind, too.
  answered(delay, behind) {
    this.delays.push(Number(delay.toFixed(2)));
    this.pending = delay + behind;
    this.waits.push(Number(this.pending.toFixed(2)));
    const sorted = [...this.waits].sort((a, b) => a - b);
    this.median = sorted[sorted.length >> 1];
  }

  said(text) {
    const now = this.model.length * FRAME_S;
    const last = this.lines[this.lines.length - 1];
    if (!last || now - last.until > PAUSE_S) {
      this.lines.push({ start_s: Number(now.toFixed(2)), text: "", at_s: [], until: now, node: this.newLine(now) });
    }
    const line = this.lines[this.lines.length - 1];
    line.text += text; line.until = now;
    const words = line.text.split(/\s+/).filter(Boolean).length;
    while (line.at_s.length < words) line.at_s.push(Number(now.toFixed(2)));  // each as it begins
    line.node.firstChild.nextSibling.textContent = line.text;
    if (this.pending !== undefined) {
      line.node.lastChild.textContent = ` · answered after ${this.pending.toFixed(2)} s`;
      this.pending = undefined;
    }
    this.scroll();
  }

  newLine(now, kind = "said") {
    const node = document.createElement("p"), time = document.createElement("time");
    const words = document.createElement("span"), delay = document.createElement("span");
    time.textContent = `${Math.floor(now / 60)}:${String(Math.floor(now % 60)).padStart(2, "0")}`;
    words.className = kind; delay.className = "delay";
    node.append(time, words, delay);
    node.dataset.start = now;
    const later = [...this.part("transcript").children].find((line) => Number(line.dataset.start) > now);
    this.part("transcript").insertBefore(node, later || null);
    return node;
  }

  // What the server's recogniser heard of the user.
  heard({ text, start_s, end_s }) {
    this.heardLines.push({ start_s, end_s, text });
    this.newLine(start_s, "heard").firstChild.nextSibling.textContent = "You: " + text;
    this.scroll();
  }

  // The reply only repeated the user.
  echoed() {
    this.echoes += 1;
    this.part("warning").hidden = false;
    this.part("warning").textContent =
      `The model repeated you instead of answering (${this.echoes}×). Start afresh, or word the prompt more firmly.`;
  }

  scroll() {
    const box = this.part("transcript");
    box.scrollTop = box.scrollHeight;
  }

  lag(text) { this.part("lag").textContent = text; }

  // Bars by frame: the user's above the middle, the model's below.
  draw() {
    const canvas = this.part("wave"), ratio = devicePixelRatio || 1;
    const width = canvas.clientWidth || 600, height = canvas.clientHeight || 96;
    if (canvas.width !== Math.round(width * ratio)) canvas.width = Math.round(width * ratio);
    if (canvas.height !== Math.round(height * ratio)) canvas.height = Math.round(height * ratio);
    const pen = canvas.getContext("2d");
    const colour = (name) => getComputedStyle(this.part(name)).backgroundColor;  // as resolved
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.fillStyle = "#8886";
    pen.fillRect(0, height / 2, width, 1);
    const first = Math.max(0, this.model.length - SHOWN_FRAMES), step = width / SHOWN_FRAMES;
    const size = (loud) => Math.min(1, Math.max(0, 1 + Math.log10(Math.max(loud, 1e-4)) / 2.5)) * (height / 2 - 3);
    [[this.user, "key.you", -1], [this.model, "key.it", 1]].forEach(([frames, name, side]) => {
      pen.fillStyle = colour(name);
      for (let i = first; i < frames.length; i++) {
        const tall = frames[i] > 0.001 ? size(frames[i]) : 0;
        pen.fillRect((i - first) * step, side < 0 ? height / 2 - tall : height / 2 + 1, Math.max(1, step - 0.5), tall);
      }
    });
  }
}
