"use strict";
/* Small charts without a library: what report.js and live.js draw with. Data come in, elements go out. */
const Charts = (() => {
  const SVG = "http://www.w3.org/2000/svg";
  const COLOURS = 8;
  const DASHES = ["", "6 3", "2 2", "8 2 2 2"];
  const PHASES = ["forward", "loss", "backward", "optimizer", "send", "data", "evaluate", "checkpoint", "room", "receive", "sync", "offload"];
  const SAID = { room: "blocked", receive: "waiting", sync: "waiting for replicas", data: "loading data", evaluate: "evaluation", offload: "waiting for a block" };
  const colour = (number) => `var(--c${number % COLOURS})`;
  const dash = (number) => DASHES[Math.floor(number / COLOURS) % DASHES.length];

  function fill(element, properties, children) {
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === null || value === undefined) continue;
      if (name === "style") Object.assign(element.style, value);
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value);
    }
    for (const child of children.flat(9)) if (child !== null && child !== undefined) element.append(child);
    return element;
  }
  const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
  const s = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

  /* Numbers as text. */
  const grouped = (value) => Math.round(value).toLocaleString("en-US");
  const percent = (value, digits = 2) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(digits)} %`);
  function number(value) {
    if (value === null || value === undefined || Number.isNaN(value)) return "–";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1000) return grouped(value);
    if (size < 0.001) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }
  function bytes(value) {
    if (value === null || value === undefined) return "–";
    const units = ["B", "kB", "MB", "GB", "TB"];
    let unit = 0;
    while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return `${unit ? value.toPrecision(3) : value} ${units[unit]}`;
  }
  function seconds(value) {
    if (value === null || value === undefined) return "–";
    if (value < 1e-3) return `${(1e6 * value).toFixed(0)} µs`;
    if (value < 1) return `${Number((1e3 * value).toPrecision(3))} ms`;
    if (value < 120) return `${value.toFixed(1)} s`;
    if (value < 7200) return `${Math.floor(value / 60)} min ${Math.round(value % 60)} s`;
    return `${Math.floor(value / 3600)} h ${Math.round((value % 3600) / 60)} min`;
  }

  /* Round numbers between two, at most `most` of them. */
  function ticks(low, high, most) {
    const span = high - low || 1;
    const rough = span / Math.max(1, most);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * span; k += 1) found.push(Number((k * step).toPrecision(12)));
    return found;
  }

  function legend(names, sample) {
    return h("ul", { class: "legend" }, names.map((name, k) => h("li", {}, sample(k), name)));
  }
  const stroke = (k) => s("svg", { viewBox: "0 0 22 10", "aria-hidden": "true" },
    s("line", { x1: 0, x2: 22, y1: 5, y2: 5, class: "line", "stroke-dasharray": dash(k), style: { stroke: colour(k) } }));
  const swatch = (name) => h("i", { style: { background: `var(--${name})` } });

  function tipOf(figure) {
    const box = h("div", { class: "tip" });
    figure.append(box);
    return {
      show(text, x, y) {
        box.textContent = text;
        box.style.visibility = "visible";
        const room = figure.clientWidth - box.offsetWidth - 4;
        box.style.left = `${Math.max(0, Math.min(x + 12, room))}px`;
        box.style.top = `${y + 14}px`;
      },
      hide() { box.style.visibility = "hidden"; },
    };
  }

  /* Lines over x. series: [{name, points: [[x, y], ...], dots}]; options: title, x, y, percent, low, high, marks: [{x, text}]. */
  function lines(series, options) {
    const drawn = series.filter((one) => one.points.length);
    const figure = h("figure", {}, h("h3", {}, options.title));
    if (!drawn.length) return fill(figure, {}, [h("p", { class: "note" }, options.empty || "Nothing was recorded.")]);
    const [width, height, left, right, top, bottom] = [560, 250, 48, 10, 8, 38];
    const all = drawn.flatMap((one) => one.points);
    const xs = all.map((point) => point[0]), ys = all.map((point) => point[1]);
    const least = (values) => values.reduce((a, b) => Math.min(a, b)), most = (values) => values.reduce((a, b) => Math.max(a, b));
    const x0 = options.from ?? Math.min(0, least(xs)), x1 = Math.max(most(xs), x0 + 1e-9);
    let y0 = options.low ?? least(ys), y1 = options.high ?? most(ys);
    if (y0 === y1) { y0 -= Math.abs(y0) * 0.1 || 0.5; y1 += Math.abs(y1) * 0.1 || 0.5; }
    const margin = 0.05 * (y1 - y0);
    if (options.low === undefined) y0 = y0 >= 0 && y0 - margin < 0.15 * y1 ? 0 : y0 - margin;
    if (options.high === undefined) y1 += margin;
    if (options.percent) y1 = Math.min(y1, 1);
    const px = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const py = (y) => top + ((y1 - y) / (y1 - y0)) * (height - top - bottom);
    const shown = options.percent ? (y) => `${Number((100 * y).toFixed(6))} %` : (y) => (Math.abs(y) >= 1e5 ? number(y) : String(y));
    const root = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": options.title });
    for (const y of ticks(y0, y1, 5)) {
      root.append(s("line", { class: "grid", x1: left, x2: width - right, y1: py(y), y2: py(y) }),
        s("text", { x: left - 7, y: py(y) + 4, "text-anchor": "end" }, shown(y)));
    }
    for (const x of ticks(x0, x1, 7)) {
      root.append(s("line", { class: "axis", x1: px(x), x2: px(x), y1: height - bottom, y2: height - bottom + 4 }),
        s("text", { x: px(x), y: height - bottom + 17, "text-anchor": "middle" }, x >= 1e4 ? grouped(x) : String(x)));
    }
    root.append(s("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }),
      s("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, options.x));
    for (const mark of options.marks || []) {
      if (mark.x < x0 || mark.x > x1) continue;
      root.append(s("line", { class: "mark", x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom }, s("title", {}, mark.text)));
    }
    series.forEach((one, k) => {
      if (!one.points.length) return;
      const path = one.points.map((point, i) => `${i ? "L" : "M"}${px(point[0]).toFixed(1)} ${py(point[1]).toFixed(1)}`).join("");
      root.append(s("path", { class: "line", d: path, "stroke-dasharray": dash(k), style: { stroke: colour(k) } }));
      if (one.points.length === 1 || (one.points.length <= 40 && one.dots !== false)) {
        for (const point of one.points) root.append(s("circle", { cx: px(point[0]), cy: py(point[1]), r: 2.4, style: { fill: colour(k) } }));
      }
    });
    const cross = s("line", { class: "cross", y1: top, y2: height - bottom });
    root.append(cross);
    figure.append(root);
    if (series.length > 1 || options.legend) figure.append(legend(series.map((one) => one.name), stroke));
    const tip = tipOf(figure);
    root.addEventListener("pointermove", (event) => {
      const box = root.getBoundingClientRect(), scale = box.width / width;
      const x = x0 + (((event.clientX - box.left) / scale - left) / (width - left - right)) * (x1 - x0);
      const near = drawn.map((one) => [one.name, one.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a))]);
      const at = near.reduce((a, b) => (Math.abs(b[1][0] - x) < Math.abs(a[1][0] - x) ? b : a))[1][0];
      cross.classList.add("on");
      cross.setAttribute("x1", px(at));
      cross.setAttribute("x2", px(at));
      const value = options.percent ? percent : options.value || number;
      const rows = near.map(([name, point]) => `${name}  ${value(point[1])}`);
      tip.show([`${options.x} ${number(at)}`, ...rows].join("\n"), event.clientX - figure.getBoundingClientRect().left, event.clientY - figure.getBoundingClientRect().top);
    });
    root.addEventListener("pointerleave", () => { cross.classList.remove("on"); tip.hide(); });
    return figure;
  }

  /* Shares of time of each worker, stacked, a strip a worker. rows: [{label, points: [[second, busy, waiting, blocked], ...]}]. */
  function strips(rows, options) {
    const [width, left, tall, gap, bottom] = [1160, 74, 46, 12, 36];
    const height = rows.length * (tall + gap) + bottom;
    const figure = h("figure", {}, options.title ? h("h3", {}, options.title) : null);
    const x0 = options.from || 0;
    const end = rows.flatMap((row) => row.points.map((point) => point[0])).reduce((a, b) => Math.max(a, b), x0 + 1e-9);
    const px = (x) => left + ((x - x0) / (end - x0)) * (width - left - 12);
    const root = s("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "busy, waiting and blocked over time" });
    rows.forEach((row, k) => {
      const y = k * (tall + gap) + 2;
      root.append(s("text", { x: left - 10, y: y + tall / 2 + 4, "text-anchor": "end" }, row.label));
      let before = x0;
      for (const [at, ...parts] of row.points) {
        const total = parts.reduce((a, b) => a + b, 0);
        let low = y + tall;
        ["busy", "blocked", "waiting"].forEach((name, part) => {
          const size = total > 0 ? (tall * parts[[0, 2, 1][part]]) / total : 0;
          low -= size;
          if (size > 0.05) root.append(s("rect", { x: px(before), y: low, width: Math.max(0.2, px(at) - px(before) + 0.3), height: size, style: { fill: `var(--${name})` } },
            s("title", {}, `${row.label}, until ${number(at)} s: ${percent(parts[0] / total, 0)} busy, ${percent(parts[1] / total, 0)} waiting, ${percent(parts[2] / total, 0)} blocked`)));
        });
        before = at;
      }
    });
    const foot = height - bottom;
    for (const x of ticks(x0, end, 10)) root.append(s("text", { x: px(x), y: foot + 12, "text-anchor": "middle" }, String(x)));
    for (const mark of options.marks || []) {
      if (mark.x >= x0 && mark.x <= end) root.append(s("line", { class: "mark", x1: px(mark.x), x2: px(mark.x), y1: 0, y2: foot - gap }, s("title", {}, mark.text)));
    }
    root.append(s("text", { x: (left + width) / 2, y: height - 4, "text-anchor": "middle" }, options.x || "seconds"));
    figure.append(h("div", { class: "scroll wide" }, root), legend(["busy", "blocked by a full neighbour", "waiting for input"], (k) => swatch(["busy", "blocked", "waiting"][k])));
    return figure;
  }

  const meter = (busy, waiting, blocked) => {
    const total = busy + waiting + blocked || 1;
    return h("div", { class: "meter", role: "img", "aria-label": `${percent(busy / total, 0)} busy, ${percent(blocked / total, 0)} blocked`, title: `busy ${percent(busy / total, 0)}, blocked ${percent(blocked / total, 0)}, waiting ${percent(waiting / total, 0)}` },
      h("span", { style: { width: `${(100 * busy) / total}%`, background: "var(--busy)" } }),
      h("span", { style: { width: `${(100 * blocked) / total}%`, background: "var(--blocked)" } }));
  };

  /* heads: [[text, "left" | "wrap" | ""], ...]; rows of texts or elements. */
  function table(heads, rows) {
    return h("div", { class: "scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, heads.map(([text, side]) => h("th", { class: side ? "left" : null, scope: "col" }, text)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, row.map((cell, k) => h("td", { class: heads[k][1] ? `left ${heads[k][1]}` : null }, cell)))))));
  }

  function figures(pairs) {
    return h("dl", { class: "figures" }, pairs.map(([name, text, key]) => h("div", {}, h("dt", {}, name), h("dd", { "data-key": key }, text))));
  }

  function confusion(matrix, caption) {
    const size = matrix.length;
    const cells = matrix.map((row, label) => {
      const sum = row.reduce((a, b) => a + b, 0) || 1;
      return h("tr", {}, h("th", { scope: "row" }, String(label)), row.map((count, answer) => {
        const share = count / sum;
        const ink = share > 0.55 ? "var(--paper)" : "var(--ink)";
        return h("td", { title: `label ${label}, answer ${answer}: ${count} of ${sum}`, style: { background: count ? `rgba(var(--heat), ${(0.08 + 0.92 * share).toFixed(3)})` : "transparent", color: ink } }, count && size <= 20 ? String(count) : "");
      }));
    });
    return h("figure", { class: "confusion scroll" }, h("table", {},
      h("thead", {}, h("tr", {}, h("th", {}, ""), matrix.map((_, k) => h("th", { scope: "col" }, String(k))))), h("tbody", {}, cells)),
    h("figcaption", {}, caption));
  }

  /* The timeline: lanes [{label, t, d, p, b, m, s}], columns of times in ms, places in `phases`, block, micro-batch and step; arrows [[from, to, ms, ms], ...]. */
  function timeline(data) {
    const [tall, gap, left, axis] = [34, 22, 74, 24];
    const height = data.lanes.length * (tall + gap) - gap + axis + 4;
    const canvas = h("canvas", { tabindex: 0, role: "img", "aria-label": "What each stage did when; plus and minus zoom, arrow keys move" });
    const map = h("canvas", { "aria-hidden": "true" });
    const figure = h("figure", { class: "timeline" });
    const end = data.lanes.reduce((most, lane) => Math.max(most, lane.t.length ? lane.t[lane.t.length - 1] + lane.d[lane.d.length - 1] : 0), 1);
    let view = [0, end];
    const place = h("input", { type: "number", min: 0, step: "any", "aria-label": "second to show" });
    const button = (text, name, act) => h("button", { type: "button", title: name, "aria-label": name, onclick: act }, text);
    const zoom = (factor, at = 0.5) => {
      const size = Math.min(end, Math.max(0.05, (view[1] - view[0]) * factor)), middle = view[0] + at * (view[1] - view[0]);
      look(middle - at * size, size);
    };
    const look = (from, size) => { const begin = Math.max(0, Math.min(from, end - size)); view = [begin, begin + size]; draw(); };
    const move = (share) => look(view[0] + share * (view[1] - view[0]), view[1] - view[0]);
    figure.append(h("div", { class: "controls" }, button("+", "zoom in", () => zoom(0.5)), button("−", "zoom out", () => zoom(2)),
      button("◀", "earlier", () => move(-0.5)), button("▶", "later", () => move(0.5)), button("all", "everything", () => look(0, end)),
      h("label", {}, "second ", place), h("span", {}, "drag to move, Ctrl and wheel or double click to zoom")), canvas, map);
    place.addEventListener("change", () => look(1000 * Number(place.value) - 1000 * data.begin, Math.min(1000, end)));

    const colours = () => {
      const style = getComputedStyle(document.documentElement);
      const names = [...PHASES, "ink", "soft", "faint", "line", "paper", "grid"];
      return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
    };
    const first = (lane, at) => { let a = 0, b = lane.t.length; while (a < b) { const c = (a + b) >> 1; if (lane.t[c] + lane.d[c] < at) a = c + 1; else b = c; } return a; };
    function prepare(surface, size) {
      const ratio = window.devicePixelRatio || 1, width = surface.clientWidth || 900;
      surface.style.height = `${size}px`;
      surface.width = Math.round(width * ratio);
      surface.height = Math.round(size * ratio);
      const pen = surface.getContext("2d");
      pen.setTransform(ratio, 0, 0, ratio, 0, 0);
      pen.clearRect(0, 0, width, size);
      return [pen, width];
    }
    function draw() {
      const ink = colours(), [pen, width] = prepare(canvas, height), room = width - left - 8, span = view[1] - view[0];
      const px = (at) => left + ((at - view[0]) / span) * room;
      pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
      pen.textBaseline = "middle";
      data.lanes.forEach((lane, k) => {
        const y = k * (tall + gap) + 2;
        pen.fillStyle = ink.soft;
        pen.textAlign = "right";
        pen.fillText(lane.label, left - 10, y + tall / 2);
        pen.textAlign = "center";
        for (let i = first(lane, view[0]); i < lane.t.length && lane.t[i] <= view[1]; i += 1) {
          const phase = data.phases[lane.p[i]], from = Math.max(left, px(lane.t[i])), to = Math.min(width - 8, px(lane.t[i] + lane.d[i]));
          const size = to - from, idle = phase === "receive" || phase === "sync" || phase === "room";
          pen.fillStyle = ink[phase] || ink.faint;
          pen.fillRect(from, idle ? y + tall / 2 - 5 : y, Math.max(size - (size > 3 ? 0.8 : 0), 0.4), idle ? 10 : tall);
          const names = { forward: "F", loss: "L", backward: "B", optimizer: "U", send: "S", evaluate: "E", data: "D", checkpoint: "C" };
          const text = names[phase] && `${names[phase]}${lane.b[i] < 0 ? "" : lane.b[i]}${data.parts ? `.${lane.m[i]}` : ""}`;
          if (text && size > 9 + 7 * text.length) {
            pen.fillStyle = phase === "loss" || phase === "data" ? "#14181c" : ink.paper;
            pen.fillText(text, (from + to) / 2, y + tall / 2 + 0.5);
          }
        }
      });
      const seen = data.arrows.filter((arrow) => arrow[3] >= view[0] && arrow[2] <= view[1]);
      if (seen.length <= 400) {
        pen.strokeStyle = pen.fillStyle = ink.ink;
        pen.lineWidth = 1;
        for (const [source, target, sent, taken] of seen) {
          const down = target > source, y0 = source * (tall + gap) + 2 + (down ? tall : 0), y1 = target * (tall + gap) + 2 + (down ? 0 : tall);
          const x0 = px(sent), x1 = px(taken);
          if (x0 < left || x1 > width) continue;
          pen.globalAlpha = 0.6;
          pen.beginPath();
          pen.moveTo(x0, y0);
          pen.bezierCurveTo(x0, y0 + (y1 - y0) * 0.6, x1, y0 + (y1 - y0) * 0.4, x1, y1);
          pen.stroke();
          pen.beginPath();
          pen.moveTo(x1, y1);
          pen.lineTo(x1 - 2.6, y1 + (down ? -5 : 5));
          pen.lineTo(x1 + 2.6, y1 + (down ? -5 : 5));
          pen.fill();
          pen.globalAlpha = 1;
        }
      }
      pen.fillStyle = ink.soft;
      pen.textAlign = "center";
      const unit = span < 2000 ? "ms" : "s", factor = unit === "s" ? 1000 : 1, low = (view[0] + 1000 * data.begin) / factor;
      const marks = ticks(low, low + span / factor, Math.max(2, room / 110)), step = marks.length > 1 ? marks[1] - marks[0] : 1;
      const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
      for (const mark of marks) {
        const x = px(mark * factor - 1000 * data.begin);
        if (x > left + 8 && x < width - 26) pen.fillText(`${mark.toFixed(digits)} ${unit}`, x, height - axis / 2 + 2);
      }
      if (document.activeElement !== place) place.value = ((view[0] / 1000) + data.begin).toFixed(3);
      overview(ink);
    }
    function overview(ink) {
      const [pen, width] = prepare(map, 20), room = width - left - 8;
      const columns = Math.max(1, Math.floor(room)), busy = new Float32Array(columns);
      for (const lane of data.lanes) {
        for (let i = 0; i < lane.t.length; i += 1) {
          const phase = data.phases[lane.p[i]];
          if (phase === "receive" || phase === "sync" || phase === "room") continue;
          const a = (lane.t[i] / end) * columns, b = ((lane.t[i] + lane.d[i]) / end) * columns;
          for (let c = Math.floor(a); c <= Math.min(columns - 1, Math.floor(b)); c += 1) busy[c] += Math.min(b, c + 1) - Math.max(a, c);
        }
      }
      pen.fillStyle = ink.grid;
      pen.fillRect(left, 2, room, 16);
      pen.fillStyle = ink.forward;
      for (let c = 0; c < columns; c += 1) {
        pen.globalAlpha = 0.65 * Math.min(1, busy[c] / data.lanes.length);
        pen.fillRect(left + c, 2, 1, 16);
      }
      pen.globalAlpha = 1;
      pen.strokeStyle = ink.ink;
      pen.lineWidth = 1.5;
      pen.strokeRect(left + (view[0] / end) * room, 1, Math.max(4, ((view[1] - view[0]) / end) * room), 18);
      pen.fillStyle = ink.soft;
      pen.font = "12px system-ui, 'DejaVu Sans', sans-serif";
      pen.textAlign = "right";
      pen.textBaseline = "middle";
      pen.fillText("whole", left - 10, 10);
    }
    const tip = tipOf(figure);
    let held = null;
    canvas.addEventListener("pointerdown", (event) => { held = [event.clientX, view[0]]; canvas.setPointerCapture(event.pointerId); tip.hide(); });
    canvas.addEventListener("pointerup", () => { held = null; });
    canvas.addEventListener("pointerleave", () => tip.hide());
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect(), room = box.width - left - 8, span = view[1] - view[0];
      if (held) { look(held[1] - ((event.clientX - held[0]) / room) * span, span); return; }
      const lane = data.lanes[Math.floor((event.clientY - box.top) / (tall + gap))], at = view[0] + ((event.clientX - box.left - left) / room) * span;
      const i = lane && at >= view[0] ? first(lane, at) : -1;
      if (!lane || i < 0 || i >= lane.t.length || lane.t[i] > at) { tip.hide(); return; }
      const phase = data.phases[lane.p[i]], block = lane.b[i] < 0 ? "" : ` of block ${lane.b[i]}`;
      const text = `${SAID[phase] || phase}${block}\nstep ${lane.s[i]}${data.parts ? `, micro-batch ${lane.m[i]}` : ""}\n${seconds(lane.d[i] / 1000)}, from ${(lane.t[i] / 1000 + data.begin).toFixed(4)} s`;
      const outer = figure.getBoundingClientRect();
      tip.show(text, event.clientX - outer.left, event.clientY - outer.top);
    });
    canvas.addEventListener("dblclick", (event) => { const box = canvas.getBoundingClientRect(); zoom(0.4, Math.max(0, (event.clientX - box.left - left) / (box.width - left - 8))); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      zoom(event.deltaY > 0 ? 1.25 : 0.8, Math.max(0, Math.min(1, (event.clientX - box.left - left) / (box.width - left - 8))));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const act = { "+": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), Home: () => look(0, end) }[event.key];
      if (act) { event.preventDefault(); act(); }
    });
    map.addEventListener("pointerdown", (event) => {
      const box = map.getBoundingClientRect(), size = view[1] - view[0];
      look((((event.clientX - box.left - left) / (box.width - left - 8)) * end) - size / 2, size);
    });
    const there = PHASES.filter((phase) => data.lanes.some((lane) => lane.p.includes(data.phases.indexOf(phase))));
    figure.append(legend(there.map((phase) => SAID[phase] || phase), (k) => swatch(there[k])));
    new ResizeObserver(() => requestAnimationFrame(draw)).observe(figure);
    window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    for (const [name, printing] of [["beforeprint", true], ["afterprint", false]]) {
      window.addEventListener(name, () => { document.documentElement.classList.toggle("printing", printing); draw(); });
    }
    view = data.view || [0, end];
    return figure;
  }

  return { h, lines, strips, meter, table, figures, confusion, timeline, number, percent, bytes, seconds, grouped };
})();
