"use strict";
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
for (const button of document.querySelectorAll(".heat-switch")) {
  button.addEventListener("click", () => {
    document.querySelector("table.heat").classList.toggle("rank", button.dataset.heat === "rank");
    for (const other of document.querySelectorAll(".heat-switch")) other.classList.toggle("on", other === button);
  });
}
for (const plot of document.querySelectorAll(".plot")) {
  const frame = JSON.parse(plot.dataset.plot);
  const svg = plot.querySelector("svg"), tip = plot.querySelector(".tip"), cursor = plot.querySelector(".cursor");
  const nearest = (points, x) => points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * frame.width;
    const span = frame.width - frame.left - frame.right;
    const x = frame.x0 + ((at - frame.left) / span) * (frame.x1 - frame.x0);
    const step = nearest(frame.series.flatMap((s) => s.points), x)[0];
    const there = frame.series.filter((s) => s.points[0][0] <= step && step <= s.points.at(-1)[0]);
    const line = frame.left + ((step - frame.x0) / (frame.x1 - frame.x0)) * span;
    cursor.setAttribute("x1", line);
    cursor.setAttribute("x2", line);
    cursor.style.visibility = "visible";
    tip.hidden = false;
    tip.textContent = `${frame.x} ${step}\n` + there.map((s) => `${s.name} ${nearest(s.points, step)[1]}${frame.unit}`).join("\n");
    const left = (line / frame.width) * box.width;
    tip.style.left = left > box.width / 2 ? `${left - tip.offsetWidth - 12}px` : `${left + 12}px`;
  });
  plot.addEventListener("pointerleave", () => { tip.hidden = true; cursor.style.visibility = "hidden"; });
}
addEventListener("beforeprint", () => { for (const d of document.querySelectorAll("details")) d.open = true; });
