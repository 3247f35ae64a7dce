// The recorded film of an episode in a simulator: one image that holds its frames in rows from left to right.

import { h, button } from "../dom.js";

const PACE = 50; // milliseconds from step to step when it plays

export class Film {
  /** `cut`: {frames, columns, width, height, every}, as the episode's details say; `walk(step)` moves the page on. */
  constructor(url, cut, steps, walk) {
    Object.assign(this, { cut, steps, walk, step: 0, timer: 0 });
    this.image = new Image();
    this.canvas = h("canvas", { class: "film", width: cut.width, height: cut.height, role: "img", "aria-label": "The frame of this step" });
    this.play = button("Play", () => (this.timer ? this.stop() : this.start()), { class: "quiet" });
    this.element = h("div", { class: "film-box" }, this.canvas, this.play);
    this.image.addEventListener("load", () => this.show(this.step));
    this.image.src = url;
  }

  show(step) {
    this.step = step;
    const { frames, columns, width, height, every } = this.cut;
    const frame = Math.min(frames - 1, Math.floor(step / every));
    const [left, top] = [(frame % columns) * width, Math.floor(frame / columns) * height];
    this.canvas.dataset.frame = frame;
    if (this.image.complete && this.image.naturalWidth) this.canvas.getContext("2d").drawImage(this.image, left, top, width, height, 0, 0, width, height);
  }

  start() {
    this.play.textContent = "Pause";
    if (this.step >= this.steps - 1) this.walk(0);
    this.timer = setInterval(() => {
      if (this.step >= this.steps - 1 || !this.canvas.isConnected) this.stop();
      else this.walk(this.step + 1);
    }, PACE);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.play.textContent = "Play";
  }
}
