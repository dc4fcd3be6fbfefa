"use strict";
/* The live page: asks /status every second and draws what it says, and the course of it since the page was opened. It can only look. */
(() => {
  const { h, lines, strips, meter, table, figures, number, percent, bytes, seconds, grouped } = Charts;
  const EVERY_MS = 1000, KEPT = 600;
  const page = document.querySelector("main");
  const speeds = [], losses = new Map(), shares = new Map(), counted = new Map();
  let before = null, missed = 0, generation = null;

  const trimmed = (points) => { while (points.length > KEPT) points.splice(0, points.length, ...points.filter((_, k) => k % 2)); return points; };
  const first = (points) => points.reduce((least, point) => Math.min(least, point[0]), Infinity);
  const list = (map, name) => map.get(name) || map.set(name, []).get(name);

  function note(status) {
    if (status.generation !== generation) { generation = status.generation; speeds.length = 0; for (const map of [losses, shares, counted]) map.clear(); }
    const at = status.seconds;
    if (at === null) return;
    for (const worker of status.workers) {
      for (const [block, loss] of Object.entries(worker.losses)) {
        const points = list(losses, Number(block));
        if (Number.isFinite(loss) && (!points.length || points[points.length - 1][0] < worker.step)) trimmed(points).push([worker.step, loss]);
      }
    }
    /* Counters grow by whole items: an interval without news is joined with the next one. */
    const then = counted.get("samples");
    if (!then || status.samples > then[1]) {
      if (then && at > then[0]) trimmed(speeds).push([at, (status.samples - then[1]) / (at - then[0])]);
      counted.set("samples", [at, status.samples]);
    }
    for (const worker of status.workers) {
      const now = [worker.busy, worker.waiting, worker.blocked], last = counted.get(worker.name);
      const grown = last ? now.map((value, k) => Math.max(0, value - last[k])) : null;
      if (grown && !grown.some((value) => value > 0)) continue;
      counted.set(worker.name, now);
      if (grown) trimmed(list(shares, worker.name)).push([at, ...grown]);
    }
    before = status;
  }

  function stages(status) {
    return table([["stage", "left"], ["host", "left"], ["phase", "left"], ["step", ""], ["busy / blocked / waiting", "wrap"], ["queue", ""], ["sent", ""], ["peak memory", ""], ["loss of each block", "left"]],
      status.workers.map((worker) => {
        const recent = (shares.get(worker.name) || []).slice(-5), sum = (k) => recent.reduce((total, point) => total + point[k], 0);
        const parts = recent.length ? [sum(1), sum(2), sum(3)] : [worker.busy, worker.waiting, worker.blocked];
        return [worker.name, worker.host || "–", worker.phase ? `${worker.phase}${worker.still > 5 ? `, for ${seconds(worker.still)}` : ""}` : "not joined", worker.step === null ? "–" : grouped(worker.step), meter(...parts), String(worker.queue), bytes(worker.bytes_sent), bytes(worker.peak_memory),
          Object.entries(worker.losses).map(([block, loss]) => `${block}: ${number(loss)}`).join("  ") || "–"];
      }));
  }

  function draw(status) {
    const state = status.unready && status.state !== "over" ? status.unready : status.state;
    const latest = status.metrics.test || {};
    const splits = [...new Set(status.accuracies.flatMap((row) => Object.keys(row)))].filter((key) => key !== "epoch");
    const restarts = Object.values(status.restarts).reduce((a, b) => a + b, 0);
    const strip = [...shares].filter(([, points]) => points.length).map(([name, points]) => ({ label: `stage ${name}`, points }));
    const from = Math.min(...strip.map((row) => row.points[0][0]));
    document.title = `${percent(status.steps ? status.step / status.steps : 0, 0)} ${status.method}`;
    const parts = [
      h("h1", {}, `${status.method}, ${status.state}`),
      h("p", { class: "soft" }, `epoch ${Math.min(status.epoch + 1, status.epochs)} of ${status.epochs} · version ${status.version} `, h("span", { class: `state${status.unready && status.state === "running" ? " bad" : ""}` }, state)),
      h("div", { class: "progress" }, h("span", { style: { width: `${status.steps ? (100 * status.step) / status.steps : 0}%` } })),
      figures([
        ["step", status.steps ? `${grouped(status.step)} of ${grouped(status.steps)}` : "–", "step"],
        ["test accuracy", percent(latest.accuracy), "accuracy"],
        ["samples a second", number(status.samples_per_second), "samples_per_second"],
        ["since the start", seconds(status.seconds), "seconds"],
        ["left", seconds(status.seconds_left), "seconds_left"],
        ["learning rate", number(status.learning_rate), "learning_rate"],
        ["checkpoints", status.checkpoint_failures ? `${status.checkpoints}, ${status.checkpoint_failures} failed` : String(status.checkpoints), "checkpoints"],
        ["restarts", String(restarts), "restarts"],
      ]),
      h("h2", {}, "Stages"), stages(status),
    ];
    if (strip.length) parts.push(h("h2", {}, "Time of the stages"), h("p", { class: "note" }, "Since this page was opened."), strips(strip, { from: Math.max(0, from - 1), x: "seconds since the start" }));
    parts.push(h("div", { class: "pair", style: { marginTop: "2rem" } },
      lines(splits.map((split) => ({ name: split, points: status.accuracies.filter((row) => row[split] !== undefined).map((row) => [row.epoch + 1, row[split]]) })), { title: "Accuracy", x: "epochs done", percent: true, from: 0, empty: "No epoch has been evaluated yet." }),
      lines([...losses].sort((a, b) => a[0] - b[0]).map(([block, points]) => ({ name: `block ${block}`, points, dots: false })), { title: "Training loss of each block", x: "step", from: first([...losses.values()].flat()), empty: "No step is done yet." }),
      lines([{ name: "samples a second", points: speeds, dots: false }], { title: "Samples a second", x: "seconds since the start", low: 0, from: first(speeds), empty: "No step is done yet." })));
    parts.push(h("footer", {}, "From ", h("a", { href: "status" }, "/status"), " every second; the same for Prometheus at ", h("a", { href: "metrics" }, "/metrics"), "."));
    if (!page.querySelector("figure:hover")) page.replaceChildren(...parts);  // not under somebody who is reading a value
  }

  function gone() {
    missed += 1;
    if (missed !== 3) return;
    const text = before ? "The coordinator does not answer any more: the run has ended, or its machine is gone. What is below was the last of it." : "The coordinator does not answer.";
    page.prepend(h("p", { class: "state bad", role: "status" }, text));
  }

  async function ask() {
    const answer = await fetch("status", { cache: "no-store" }).catch(() => null);
    const status = answer && answer.ok ? await answer.json().catch(() => null) : null;
    if (status) {
      missed = 0;
      note(status);
      draw(status);
    } else gone();
    setTimeout(ask, EVERY_MS);
  }
  ask();
})();
