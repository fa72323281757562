// Values under the mouse, and tables that sort. The page says everything without it.
const short = v => v === 0 ? "0" : Math.abs(v) < 1e-3 || Math.abs(v) >= 1e6 ? v.toExponential(1) : String(+v.toPrecision(3));
for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [x0, x1, a, b] = svg.dataset.x.split(" ").map(Number), y = svg.dataset.y.split(" ");
  const [y0, y1, c, d] = y.map(Number), say = svg.closest("figure").querySelector("output");
  const step = px => x0 + (px - a) / (b - a) * (x1 - x0);
  const value = py => { const s = (py - c) / (d - c); return y[4] ? y0 * (y1 / y0) ** s : y0 + s * (y1 - y0); };
  const lines = [...svg.querySelectorAll(".line:not(.faint)")].map(g => [g.dataset.n,
    g.querySelector("path").getAttribute("d").slice(1).split(" ").map(Number)]);
  const cursor = document.createElementNS(svg.namespaceURI, "path");
  cursor.setAttribute("class", "cursor");
  svg.append(cursor);
  svg.onpointermove = e => {
    const at = new DOMPoint(e.clientX, e.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const words = [];
    let px = at, best = Infinity;
    for (const [name, p] of lines) {
      let i = 0;
      for (let j = 2; j < p.length; j += 2) if (Math.abs(p[j] - at) < Math.abs(p[i] - at)) i = j;
      if (Math.abs(p[i] - at) < best) { best = Math.abs(p[i] - at); px = p[i]; }
      words.push((lines.length > 1 ? name + " " : "") + short(value(p[i + 1])));
    }
    cursor.setAttribute("d", `M${px} ${d}V${c}`);
    say.textContent = `step ${Math.round(step(px))}: ${words.join("  ")}`;
  };
  svg.onpointerleave = () => { cursor.removeAttribute("d"); say.textContent = ""; };
}
for (const table of document.querySelectorAll("table.sort")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, i) => {
    head.classList.add("sort");
    head.onclick = () => {
      const down = !head.classList.contains("down");
      heads.forEach(h => h.classList.remove("up", "down"));
      head.classList.add(down ? "down" : "up");
      const text = r => r.cells[i].textContent, key = r => parseFloat(text(r).replace(/[\s\u202f]/g, ""));
      const order = (p, q) => i === 0 ? text(q).localeCompare(text(p), undefined, { numeric: true })
        : (isNaN(key(q)) ? -Infinity : key(q)) - (isNaN(key(p)) ? -Infinity : key(p)) || 0;
      body.append(...[...body.rows].sort((p, q) => down ? order(p, q) : order(q, p)));
    };
  });
}
