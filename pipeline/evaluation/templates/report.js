"use strict";
// The line in a timeline follows its player; a click in the timeline seeks.
const players = [...document.querySelectorAll("figure.side")].flatMap((figure) => {
  const audio = figure.querySelector("audio");
  const drawing = figure.querySelector("svg.timeline");
  return audio && drawing ? [{ audio, drawing, head: drawing.querySelector(".head") }] : [];
});
for (const { audio, drawing, head } of players) {
  const start = Number(drawing.dataset.start);
  const end = Number(drawing.dataset.end);
  const draw = () => {
    const x = start + ((end - start) * audio.currentTime) / (audio.duration || 1);
    head.setAttribute("x1", x);
    head.setAttribute("x2", x);
    head.setAttribute("visibility", "visible");
    if (!audio.paused) requestAnimationFrame(draw);
  };
  audio.addEventListener("play", () => {
    for (const other of players) if (other.audio !== audio) other.audio.pause();
    draw();
  });
  audio.addEventListener("seeking", draw);
  drawing.addEventListener("click", (event) => {
    const box = drawing.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * drawing.viewBox.baseVal.width;
    const share = Math.min(1, Math.max(0, (x - start) / (end - start)));
    if (audio.duration) audio.currentTime = share * audio.duration;
  });
}
