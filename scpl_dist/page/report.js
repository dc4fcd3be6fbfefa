"use strict";
/* Draws report.html from the data in the page: one run, or several side by side. What was not recorded is left out, or said. */
(() => {
  const { h, lines, strips, meter, table, figures, confusion, timeline, number, percent, bytes, seconds, grouped } = Charts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const page = document.querySelector("main");
  const section = (title, note, ...content) => page.append(h("section", {}, h("h2", {}, title), note ? h("p", { class: "note" }, note) : null, content));
  const marksOf = (run, axis) => run.marks.filter((mark) => mark[axis] !== null).map((mark) => ({ x: mark[axis], text: `${mark.kind}: ${mark.text}` }));
  const seen = (run) => run.marks.filter((mark) => mark.kind !== "evaluation");
  const both = (title, y, series, options) => [["step", "steps"], ["seconds", "seconds since the start"]].map(([axis, name]) =>
    lines(series(axis), { title: `${title} against ${axis === "step" ? "steps" : "time"}`, x: name, ...options, marks: options.marks ? options.marks(axis) : [] }));

  function evaluations(run, value, axis) {
    const splits = [...new Set(run.evaluations.map((row) => row.split))];
    return splits.map((split) => ({ name: split, points: run.evaluations.filter((row) => row.split === split && row[value] !== null && row[value] !== undefined && row[axis] !== null).map((row) => [row[axis], row[value]]) }));
  }
  const losses = (run, axis) => run.losses.map((block) => ({ name: `block ${block.block}`, dots: false, points: block.points.map((point) => [point[axis === "step" ? 0 : 1], point[2]]) }));

  function numbers(run) {
    const result = run.result;
    if (!result) return figures([["steps so far", grouped(run.steps), "steps"], ["epochs evaluated", String(new Set(run.evaluations.map((row) => row.epoch)).size), "epochs"]]);
    return figures([
      ["test accuracy, last epoch", percent(result.accuracy_last), "accuracy_last"],
      [`test accuracy, best epoch${result.best_epoch === null || result.best_epoch === undefined ? "" : ` (${result.best_epoch + 1})`}`, percent(result.accuracy_best), "accuracy_best"],
      ["samples a second", number(result.samples_per_second), "samples_per_second"],
      ["wall-clock", seconds(result.wall_seconds), "wall_seconds"],
      ["steps", grouped(result.steps), "steps"],
      ["stages", String(result.stages), "stages"],
    ]);
  }

  function stages(run) {
    const blocks = new Map((run.result ? run.result.per_stage : []).flatMap((stage) => Object.entries(stage.block_seconds || {})).map(([block, time]) => [Number(block), time]));
    if (run.blocks.length) {
      const timed = blocks.size > 0, all = [...blocks.values()].reduce((a, b) => a + b, 0) || 1;
      section("Model", "Parameters of the block itself and with the heads that train it; seconds are those of training, forward to update, over the whole run.",
        table([["block", ""], ["stage", ""], ["layers", "left"], ["output of a sample", "left"], ["parameters", ""], ["with heads", ""], ...(timed ? [["seconds", ""], ["share", ""]] : [])],
          [...run.blocks.map((one) => [String(one.block), String(one.stage), one.kind, one.output.map((shape) => shape.join(" × ")).join(", "), grouped(one.parameters), grouped(one.parameters + one.head_parameters),
            ...(timed ? [number(blocks.get(one.block)), percent((blocks.get(one.block) || 0) / all, 0)] : [])]),
          ["all", "", "", "", grouped(run.blocks.reduce((a, b) => a + b.parameters, 0)), grouped(run.blocks.reduce((a, b) => a + b.parameters + b.head_parameters, 0)), ...(timed ? [number(all), ""] : [])]]));
    }
  }

  function workers(run) {
    if (!run.result) return;
    const sent = run.links.length ? table([["from", "left"], ["to", "left"], ["sent", ""], ["a step", ""]], run.links.map((link) => [`stage ${link.from}`, `stage ${link.to}`, bytes(link.bytes), bytes(link.bytes / Math.max(1, run.result.steps))])) : null;
    section("Stages", "Busy is everything but waiting for input and being held back by a neighbour without room.",
      table([["stage", "left"], ["busy / blocked / waiting", "wrap"], ["busy", ""], ["waiting", ""], ["blocked", ""], ["sent", ""], ["received", ""], ["peak memory", ""]],
        run.result.per_stage.map((stage, k) => [run.labels[k], meter(stage.busy_seconds, stage.waiting_seconds, stage.blocked_seconds), seconds(stage.busy_seconds), seconds(stage.waiting_seconds), seconds(stage.blocked_seconds), bytes(stage.bytes_sent), bytes(stage.bytes_received), bytes(stage.peak_memory_bytes)])),
      sent ? h("div", { style: { marginTop: "1.4rem", maxWidth: "34rem" } }, h("h3", {}, "Bytes on each link"), sent) : null);
  }

  const usageOf = (run) => run.labels.map((label, k) => ({ label: `stage ${label}`, points: run.usage.map(([at, all]) => [at, ...all[k].slice(0, 3)]) }));
  function memory(run) {
    return lines(run.labels.map((label, k) => ({ name: `stage ${label}`, dots: false, points: run.usage.map(([at, all]) => [at, all[k][4] / 1e6]) })), { title: "Peak memory so far, in megabytes", x: "seconds since the start", low: 0, value: (mega) => `${number(mega)} MB` });
  }
  function traffic(run) {
    const points = (k) => run.usage.map(([at, all]) => [at, all[k][3] / 1e6]);
    return lines(run.labels.map((label, k) => ({ name: `stage ${label}`, dots: false, points: points(k) })).filter((one) => one.points.some((point) => point[1])), { title: "Megabytes a second sent by each stage", x: "seconds since the start", low: 0, legend: true });
  }

  function single(run) {
    page.append(numbers(run));
    stages(run);
    const marks = (axis) => marksOf({ marks: seen(run) }, axis);
    const dotted = seen(run).length ? " Dotted lines mark checkpoints, restarts and warnings; the list is below." : "";
    section("Accuracy", `After each epoch.${dotted}`, h("div", { class: "pair" }, both("Accuracy", "", (axis) => evaluations(run, "accuracy", axis), { percent: true, marks, from: 0 })));
    section("Loss", "Of the evaluations: cross-entropy of the answers. Of training: all terms of each block's own loss, or of the last block where there is one loss; the mean of neighbouring steps where there are many.",
      h("div", { class: "pair" }, both("Evaluation loss", "", (axis) => evaluations(run, "loss", axis), { marks, from: 0 }), both("Training loss of each block", "", (axis) => losses(run, axis), { marks, from: 0 })));
    workers(run);
    if (run.usage.length > 1) {
      section("Time of the stages", "Shares of each interval. The stage next to full sets the pace; those before it are blocked, those after it wait.",
        strips(usageOf(run), { marks: marks("seconds") }), h("div", { class: "pair" }, traffic(run), memory(run)));
    }
    section("Timeline", run.timeline.note, run.timeline.lanes.length ? timeline(run.timeline) : null);
    if (run.confusion) section("Confusion", null, confusion(run.confusion.matrix, `Rows are labels, columns answers; ${run.confusion.split} part, epoch ${run.confusion.epoch + 1}. The darker, the larger the share of the label's samples.`));
    else section("Confusion", 'Not recorded: train with -o \'task.metrics=["confusion"]\'.');
    if (run.marks.length) {
      section("What happened", null, h("ul", { class: "warnings" }, seen(run).slice(0, 200).map((mark) => h("li", {}, h("time", {}, mark.seconds === null ? "" : seconds(Math.max(0, mark.seconds))), h("b", {}, mark.kind), ` ${mark.text}`))),
        seen(run).length > 200 ? h("p", { class: "note" }, `… and ${seen(run).length - 200} more in metrics.jsonl`) : null);
    }
    section("Settings that differ from the defaults", run.settings.length ? null : "None.", run.settings.length ? table([["key", "left"], ["here", "wrap"], ["default", "left"], ["", "wrap"]], run.settings.map(([key, here, usual, meaning]) => [h("code", {}, key), h("code", {}, here), h("code", {}, usual), h("span", { class: "soft" }, meaning)])) : null);
  }

  function several(runs) {
    const named = (value) => runs.map((run) => ({ name: run.name, points: value(run) }));
    if (data.table) section("Table", data.note, table(data.table.heads.map((text, k) => [text, k ? "" : "left"]), data.table.rows));
    const accuracy = (run, axis) => (evaluations(run, "accuracy", axis).find((one) => one.name === "test") || { points: [] }).points;
    section("Test accuracy", "After each epoch.", h("div", { class: "pair" }, both("Accuracy", "", (axis) => named((run) => accuracy(run, axis)), { percent: true, from: 0 })));
    const loss = (run, axis) => (evaluations(run, "loss", axis).find((one) => one.name === "test") || { points: [] }).points;
    section("Test loss", null, h("div", { class: "pair" }, both("Loss", "", (axis) => named((run) => loss(run, axis)), { from: 0 })));
    section("Time of the stages", "Busy, blocked by a neighbour without room, and waiting for input: shares of the whole run.",
      table([["run", "left"], ["stage", "left"], ["busy / blocked / waiting", "wrap"], ["busy", ""], ["waiting", ""], ["blocked", ""], ["sent", ""], ["peak memory", ""]],
        runs.filter((run) => run.result).flatMap((run) => run.result.per_stage.map((stage, k) => [k ? "" : run.name, run.labels[k], meter(stage.busy_seconds, stage.waiting_seconds, stage.blocked_seconds), seconds(stage.busy_seconds), seconds(stage.waiting_seconds), seconds(stage.blocked_seconds), bytes(stage.bytes_sent), bytes(stage.peak_memory_bytes)]))));
    section("Training loss of each block", null, h("div", { class: "side" }, runs.map((run) => lines(losses(run, "step"), { title: run.name, x: "steps", from: 0 }))));
    const drawn = runs.filter((run) => run.timeline.lanes.length);
    const views = drawn.map((run) => run.timeline.view).filter((view) => view), span = Math.max(...views.map((view) => view[1] - view[0]));
    for (const view of views) view[1] = view[0] + span;
    if (drawn.length) section("Timelines", "The same span of time for all.", drawn.map((run) => h("div", {}, h("h3", { style: { marginTop: "1.2rem" } }, run.name), timeline(run.timeline))));
    const shown = runs.filter((run) => run.confusion);
    if (shown.length) section("Confusion", "Rows are labels, columns answers.", h("div", { class: "side" }, shown.map((run) => h("div", {}, h("h3", {}, run.name), confusion(run.confusion.matrix, `${run.confusion.split} part, epoch ${run.confusion.epoch + 1}`)))));
    const keys = [...new Set(runs.flatMap((run) => run.settings.map((row) => row[0])))];
    const of = (run, key) => { const row = run.settings.find((one) => one[0] === key); return row ? h("code", {}, row[1]) : h("span", { class: "soft" }, "default"); };
    section("Settings that differ from the defaults", keys.length ? null : "None.", keys.length ? table([["key", "left"], ...runs.map((run) => [run.name, "left"])], keys.map((key) => [h("code", {}, key), ...runs.map((run) => of(run, key))])) : null);
  }

  page.append(h("h1", {}, data.title), h("p", { class: "soft" }, data.subtitle, " ", data.state ? h("span", { class: `state${data.bad ? " bad" : ""}` }, data.state) : null));
  if (data.runs.length === 1 && !data.table) single(data.runs[0]);
  else several(data.runs);
  page.append(h("footer", {}, data.footer));
})();
