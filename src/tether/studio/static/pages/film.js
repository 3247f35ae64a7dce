// The recorded film of an episode in a simulator: one image that holds its frames in rows from left to right.

import { h } from "../dom.js";

export class Film {
  /** `cut`: how the image is cut, as the episode's details say. */
  constructor(url, cut) {
    this.cut = cut;
    this.step = 0;
    this.image = new Image();
    this.canvas = h("canvas", { class: "film", role: "img", "aria-label": "The frame of this step" });
    this.element = h("div", { class: "film-box" }, this.canvas);
    this.image.addEventListener("load", () => this.show(this.step));
    this.image.src = url;
  }

  show(step) {
    this.step = step;
  }
}
