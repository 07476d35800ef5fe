// One conversation with one server, over its WebSocket: frames out, frames and words in.
import { OpusReader, OpusWriter } from "./opus.js";
import { FRAME_S, Player, fromInt16, loudness, toInt16 } from "./sound.js";

const READY = 0, AUDIO = 1, TEXT = 2, METADATA = 4, ERROR = 5;
const CLOSE_BUSY = 1013, CLOSE_DONE = 1000, CLOSE_GOING_AWAY = 1001;

export class Talk {
  // server: {base, headers, query}; wanted: the query, `format` opus or pcm; onEnd is called once.
  constructor(server, wanted, pane, onEnd) {
    this.server = server; this.wanted = wanted; this.pane = pane; this.onEnd = onEnd;
    this.ready = this.opened = this.ended = false;
    this.sent = []; this.got = [];   // frames of both sides
    this.fed = null;
  }

  url() {
    const query = new URLSearchParams(this.wanted);
    for (const [key, value] of Object.entries(this.server.query)) query.set(key, value);
    return `${this.server.base}/api/chat?${query}`;
  }

  start(context, pan) {
    this.player = new Player(context, pan);
    this.pane.show("Connecting; the model reads the prompt …");
    this.socket = new WebSocket(this.url().replace(/^http/, "ws"));
    this.socket.binaryType = "arraybuffer";
    this.socket.onopen = () => {
      this.opened = true;
      (this.held || []).splice(0).forEach((message) => this.socket.send(message));
    };
    this.socket.onmessage = (event) => this.receive(new Uint8Array(event.data));
    this.socket.onclose = (event) => this.closed(event);
    if (this.wanted.get("format") !== "opus") return;
    const fail = (error) => { this.fault = `Opus: ${error.message}`; this.end(); this.pane.show(this.fault, "bad"); };
    this.held = [];  // pages from before the socket opened: a stream needs its start
    this.writer = new OpusWriter((page) => this.transmit(page), fail);
    this.reader = new OpusReader((frame) => this.heard(frame), fail);
  }

  transmit(payload) {
    const message = new Uint8Array(1 + payload.length);
    message[0] = AUDIO;
    message.set(payload, 1);
    if (this.socket.readyState === WebSocket.CONNECTING) this.held.push(message);
    else if (this.socket.readyState === WebSocket.OPEN) this.socket.send(message);
  }

  send(frame) {
    if (!this.ready || this.socket.readyState !== WebSocket.OPEN) return;
    if (this.writer) this.writer.add(frame);
    else this.transmit(toInt16(frame));
    this.sent.push(frame);
    const behind = this.sent.length - this.got.length;
    if (behind > 12) this.pane.show(`The server is ${(behind * FRAME_S).toFixed(1)} s behind: too slow, or the network is.`, "bad");
    else if (this.pane.part("state").dataset.kind === "bad") this.pane.show("Connected. Speak.", "good");
  }

  receive(message) {
    const kind = message[0], payload = message.subarray(1);
    const text = () => new TextDecoder().decode(payload);
    if (kind === READY) {
      this.ready = true;
      this.pane.show("Connected. Speak.", "good");
    } else if (kind === AUDIO) {
      if (this.reader) this.reader.add(payload);
      else this.heard(fromInt16(payload));
    } else if (kind === TEXT) {
      this.pane.said(text());
    } else if (kind === METADATA) {
      this.metadata(JSON.parse(text()));
    } else if (kind === ERROR) {
      this.fault = text();
      this.pane.show(this.fault, "bad");
    }
  }

  heard(frame) {
    if (this.ended) return;
    this.got.push(frame);
    this.player.play(frame);
    const behind = (this.sent.length - this.got.length) * FRAME_S;
    this.pane.frame(loudness(this.sent[this.got.length - 1] || new Float32Array(1)), loudness(frame), behind);
    this.status();
  }

  status() {
    const left = this.fed && this.fed.seconds_left ? this.fed.seconds_left - this.got.length * FRAME_S : null;
    const median = this.pane.median;
    this.pane.lag(
      `· ${(this.got.length * FRAME_S).toFixed(0)} s · ${((this.sent.length - this.got.length) * 80)} ms behind` +
      (median === undefined ? "" : ` · answers after ${median.toFixed(2)} s`) +
      (left !== null && left < 30 ? ` · ends in ${Math.max(0, left).toFixed(0)} s` : ""));
  }

  metadata(said) {
    if (said.type === "prompt") {
      this.fed = said;
      const kept = said.prefill_kept ? "kept ready" : `${said.prefill_s.toFixed(2)} s`;
      this.pane.part("proof").textContent = said.count
        ? `The model was fed ${said.count} tokens of prompt (${kept}), digest ${said.digest.slice(0, 12)}, seed ${said.seed}.`
        : `The model was fed no system text, seed ${said.seed}.`;
    } else if (said.type === "heard") {
      this.pane.heard(said);
    } else if (said.type === "echo") {
      this.pane.echoed();
    } else if (said.type === "end") {
      this.ending = said.text;
    }
  }

  async closed(event) {
    if (this.ended) return;
    if (!this.opened) {
      // A browser hides why a WebSocket was refused; a plain request of the same URL says it.
      // Without a header: that would need a permission of its own at another server.
      const said = await fetch(this.url()).then((r) => r.text()).catch(() => "the server does not answer");
      // A request that it finds nothing wrong with is told to be a WebSocket's.
      this.fault = /^No WebSocket UPGRADE/.test(said) ? "the server answers, but the connection could not be made" : said;
    }
    this.end();
    if (event.code === CLOSE_BUSY) this.pane.show("The server is busy: all its places are taken. Try again later.", "bad");
    else if (this.fault) this.pane.show("Refused: " + this.fault, "bad");
    else if (event.code === CLOSE_GOING_AWAY) this.pane.show("The server was stopped.", "bad");
    else if (this.ending) this.pane.show(`The conversation is over: ${this.ending}.`);
    else this.pane.show(event.code === CLOSE_DONE ? "The conversation is over." : `The connection was lost (${event.code}).`);
  }

  end() {
    if (this.ended) return;
    this.ended = true;
    if (this.socket) this.socket.close();
    for (const part of [this.writer, this.reader]) if (part) part.close();
    this.onEnd(this);
  }

  record() {
    return {
      prompt_digest: this.fed ? this.fed.digest : "",
      seed: this.fed ? this.fed.seed : null,
      seconds: Number((this.got.length * FRAME_S).toFixed(2)),
      words: this.pane.lines.map(({ start_s, text, at_s }) => ({ start_s, text: text.trim(), at_s })),
      heard: this.pane.heardLines,
      delays_s: this.pane.delays,
      waits_s: this.pane.waits,
      echoes: this.pane.echoes,
    };
  }
}
