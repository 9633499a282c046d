"use strict";

// The page of a run. `view` is the run as the server last told it; everything on the page is drawn from it. All text goes through
// textContent, so that nothing of a run can become markup.
(() => {
  // Tables show at most this many rows; a run can have thousands of workers.
  const MAX_ROWS = 200;
  // Wait before a stream that the server refused is asked for again, in milliseconds.
  const REOPEN_MS = 3000;
  // Weight of a new value in the smoothed curve.
  const SMOOTHING = 0.1;
  // Room around a chart for its labels, in pixels.
  const MARGIN = { top: 8, right: 12, bottom: 36, left: 58 };
  const NAMESPACE = "http://www.w3.org/2000/svg";
  const END_STATES = ["stopped", "finished", "failed"];

  const element = (id) => document.getElementById(id);
  const pressed = (id) => element(id).getAttribute("aria-pressed") === "true";

  let view = null;
  let stream = null;
  let drawing = false;
  // Steps leave the tables as they are.
  let tablesAreOld = false;
  let shownState = "";

  // ---- numbers in words

  const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

  function fixed(value, digits) {
    return known(value) ? value.toFixed(digits) : "–";
  }

  function compact(value) {
    if (!known(value)) return "–";
    for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(value) >= size) return `${shortest(value / size)}${letter}`;
    }
    return shortest(value);
  }

  function shortest(value) {
    return Math.abs(value) >= 10 || value === 0 ? String(Math.round(value)) : String(Number(value.toPrecision(2)));
  }

  function clock(seconds) {
    if (!known(seconds)) return "–";
    const whole = Math.max(0, Math.round(seconds));
    const two = (number) => String(number).padStart(2, "0");
    const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
    return hours > 0 ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
  }

  function timeOfDay(seconds) {
    return new Date(seconds * 1000).toLocaleTimeString();
  }

  function orDash(value) {
    return value === null || value === undefined || value === "" ? "–" : String(value);
  }

  function count(number, noun) {
    return `${number} ${noun}${number === 1 ? "" : "s"}`;
  }

  // ---- text and tables

  // Unchanged text is left alone, so that a reader's selection and a screen reader's place stay.
  function say(id, text) {
    const target = element(id);
    if (target.textContent !== text) target.textContent = text;
  }

  function show(id, visible) {
    element(id).hidden = !visible;
  }

  // Each row is a list of cells: text, or { text, state } or { text, words: true }. The first cell is the row's header.
  function fillTable(id, caption, rows) {
    say(`${id}-caption`, rows.length > MAX_ROWS ? `${caption}; the first ${MAX_ROWS} are shown` : caption);
    const body = element(id).tBodies[0];
    const shown = rows.slice(0, MAX_ROWS);
    while (body.rows.length > shown.length) body.deleteRow(-1);
    shown.forEach((cells, index) => fillRow(body.rows[index] ?? body.insertRow(), cells));
  }

  function fillRow(row, cells) {
    cells.forEach((cell, index) => {
      let target = row.cells[index];
      if (!target) {
        target = document.createElement(index === 0 ? "th" : "td");
        if (index === 0) target.scope = "row";
        row.append(target);
      }
      const { text, state, words } = typeof cell === "object" ? cell : { text: cell };
      if (target.textContent !== text) target.textContent = text;
      if (state && target.dataset.state !== state) target.dataset.state = state;
      if (words) target.className = "words";
    });
  }

  // ---- the parts of the page

  function drawHead() {
    const progress = view.progress;
    say("name", view.name || "Cloze");
    if (shownState !== view.state) {
      shownState = view.state;
      element("state").dataset.state = view.state;
      say("state", view.state);
    }
    const training = view.workers.filter((worker) => worker.state === "training").length;
    const trains = `${training} of ${count(view.workers.length, "worker")} ${training === 1 ? "trains" : "train"}`;
    say("summary", `${trains}; ${count(view.failures.length, "failure")}; last event at ${timeOfDay(view.updated)}`);
    show("failure", view.failure !== null);
    if (view.failure) {
      const { what, place, expected, found, cause, hint } = view.failure;
      const parts = [["where", place], ["expected", expected], ["found", found], ["cause", cause], ["hint", hint]];
      say("failure", [what, ...parts.filter(([, value]) => value).map(([name, value]) => `${name}: ${value}`)].join("\n"));
    }
    document.title = `${progress.step}/${progress.steps} · ${view.state} · ${view.name} · Cloze`;
  }

  function drawNumbers() {
    const progress = view.progress;
    const share = progress.steps > 0 ? progress.step / progress.steps : 0;
    element("bar").value = share;
    say("bar-text", `${progress.step} of ${progress.steps} steps, ${Math.floor(share * 100)} %`);
    say("loss", fixed(progress.loss, 4));
    say("smoothed", fixed(progress.smoothed_loss, 4));
    say("eta", END_STATES.includes(view.state) ? "–" : clock(progress.eta_s));
    say("tokens", `${compact(progress.mean_tokens_per_s)} (last ${compact(progress.tokens_per_s)})`);
    say("speed", compact(progress.examples_per_s));
    say("rate", known(progress.learning_rate) ? progress.learning_rate.toExponential(1) : "–");
    say("norm", fixed(progress.gradient_norm, 3));
    say("data", `${progress.examples} of ${progress.examples_in_all} examples`);
    say("generation", view.generation > 0 ? `${view.generation}, ${count(view.members.length, "rank")}` : "–");
    say("source", orDash(view.source));
  }

  function drawTables() {
    const workers = [...view.workers];
    if (workers.length > MAX_ROWS) workers.sort((a, b) => (a.state === "training") - (b.state === "training") || a.slot - b.slot);
    fillTable("workers", count(view.workers.length, "worker"), workers.map((worker) => [
      String(worker.slot), { text: worker.state, state: worker.state }, orDash(worker.rank), orDash(worker.host),
      orDash(worker.process_id), String(worker.restarts), { text: orDash(worker.last_word), words: true },
    ]));
    const failures = view.failures.length > 0 ? `${count(view.failures.length, "failure")}, newest first` : "None so far";
    fillTable("failures", failures, [...view.failures].reverse().map((failure) => [
      timeOfDay(failure.time), failure.class.replaceAll("_", " "), orDash(failure.worker), orDash(failure.host), String(failure.step),
      failure.decision ?? "not dealt with yet", known(failure.recovered_s) ? `${failure.recovered_s.toFixed(2)} s` : "–",
      orDash(failure.steps_lost), orDash(failure.source), { text: [failure.reason, failure.exit].filter(Boolean).join("; "), words: true },
    ]));
    const saves = view.checkpoints.length > 0 ? `The last ${view.checkpoints.length}, newest first` : "None so far";
    fillTable("checkpoints", saves, [...view.checkpoints].reverse().map((saved) => [
      String(saved.step), timeOfDay(saved.time), `${compact(saved.bytes)}B`, `${saved.seconds.toFixed(2)} s`, `${saved.blocked_s.toFixed(2)} s`,
      { text: saved.url, words: true },
    ]));
    show("warnings-section", view.warnings.length > 0);
    const items = [...view.warnings].reverse().map((warning) => {
      const item = document.createElement("li");
      item.textContent = `${timeOfDay(warning.time)}: ${warning.message}`;
      return item;
    });
    element("warnings").replaceChildren(...items);
  }

  // ---- charts

  function drawCharts() {
    const scale = { log: pressed("log"), smooth: pressed("smooth") };
    const fits = ([, value]) => known(value) && (!scale.log || value > 0);
    const points = (name) => view.curve.points.map((point) => [point.step, point[name]]).filter(fits);
    drawChart("loss", points("loss"), { ...scale, zero: false, unit: "loss", digits: 4 });
    drawChart("speed", points("tokens_per_s"), { ...scale, zero: !scale.log, unit: "tokens/s", digits: 0 });
  }

  function smoothed(points) {
    let mean = null;
    return points.map(([step, value]) => {
      mean = mean === null ? value : mean + SMOOTHING * (value - mean);
      return [step, mean];
    });
  }

  function drawChart(name, points, options) {
    const svg = element(`${name}-chart`);
    svg.dataset.points = String(points.length);
    svg.dataset.newest = points.length > 0 ? String(points[points.length - 1][0]) : "0";
    svg.dataset.scale = options.log ? "log" : "linear";
    svg.dataset.smoothing = options.smooth ? "on" : "off";
    const [width, height] = [svg.clientWidth || 320, svg.clientHeight || 240];
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    say(`${name}-text`, inWords(points, options));
    if (points.length === 0) {
      svg.replaceChildren(label(width / 2, height / 2, "no steps yet", "middle"));
      return;
    }
    const axes = makeAxes(points, { width, height }, options);
    const at = ([step, value]) => `${axes.x(step).toFixed(1)} ${axes.y(value).toFixed(1)}`;
    const line = (values) => `M${values.map(at).join("L")}`;
    const parts = drawAxes(axes, { width, height }, options);
    parts.push(shape("path", { class: options.smooth ? "raw behind" : "raw", d: line(points) }));
    if (options.smooth) parts.push(shape("path", { class: "smooth", d: line(smoothed(points)) }));
    const newest = (options.smooth ? smoothed(points) : points)[points.length - 1];
    parts.push(shape("circle", { class: "newest", cx: axes.x(newest[0]), cy: axes.y(newest[1]), r: 3.5 }));
    svg.replaceChildren(...parts);
  }

  function inWords(points, { unit, digits }) {
    if (points.length === 0) return "No steps yet.";
    const values = points.map(([, value]) => value);
    const [first, last] = [points[0], points[points.length - 1]];
    const low = values.reduce((least, value) => Math.min(least, value));
    const high = values.reduce((most, value) => Math.max(most, value));
    const text = (value) => value.toFixed(digits);
    return `From ${text(first[1])} ${unit} at step ${first[0]} to ${text(last[1])} at step ${last[0]}; lowest ${text(low)}, highest ${text(high)}.`;
  }

  function makeAxes(points, { width, height }, { log, zero }) {
    const steps = [points[0][0], points[points.length - 1][0]];
    if (steps[0] === steps[1]) steps[1] = steps[0] + 1;
    const values = points.map(([, value]) => value);
    let low = values.reduce((least, value) => Math.min(least, value), zero ? 0 : Infinity);
    let high = values.reduce((most, value) => Math.max(most, value), -Infinity);
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - Math.abs(low) / 2 - 0.5, high + Math.abs(high) / 2 + 0.5];
    const place = log ? Math.log10 : (value) => value;
    const [bottom, top] = [place(low), place(high)];
    return {
      xTicks: linearTicks(steps[0], steps[1], Math.max(2, Math.floor(width / 110))).filter(Number.isInteger),
      yTicks: log ? logTicks(low, high) : linearTicks(low, high, 5),
      x: (step) => MARGIN.left + ((step - steps[0]) / (steps[1] - steps[0])) * (width - MARGIN.left - MARGIN.right),
      y: (value) => height - MARGIN.bottom - ((place(value) - bottom) / (top - bottom)) * (height - MARGIN.top - MARGIN.bottom),
    };
  }

  // Round numbers between two ends, about as many as wanted.
  function linearTicks(low, high, wanted) {
    const rough = (high - low) / wanted;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
    const ticks = [];
    for (let index = Math.ceil(low / step); index * step <= high; index += 1) ticks.push(Number((index * step).toPrecision(12)));
    return ticks;
  }

  // 1, 2 and 5 of each power of ten; only the powers where there would be too many, and round numbers where there would be one.
  function logTicks(low, high) {
    const all = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power += 1) {
      for (const factor of [1, 2, 5]) all.push(Number((factor * 10 ** power).toPrecision(12)));
    }
    const inside = all.filter((tick) => tick >= low && tick <= high);
    if (inside.length < 2) return linearTicks(low, high, 4).filter((tick) => tick > 0);
    return inside.length > 7 ? inside.filter((tick) => Number.isInteger(Math.round(Math.log10(tick) * 1e6) / 1e6)) : inside;
  }

  function drawAxes(axes, { width, height }, { unit, log }) {
    const parts = [];
    const bottom = height - MARGIN.bottom;
    for (const tick of axes.yTicks) {
      const y = axes.y(tick);
      parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }));
      parts.push(label(MARGIN.left - 6, y + 4, tickText(tick), "end"));
    }
    for (const tick of axes.xTicks) {
      const x = axes.x(tick);
      parts.push(shape("line", { class: "grid", x1: x, x2: x, y1: bottom, y2: bottom + 4 }));
      parts.push(label(x, bottom + 17, tickText(tick), "middle"));
    }
    parts.push(label((MARGIN.left + width - MARGIN.right) / 2, height - 3, "step", "middle"));
    const title = label(0, 0, log ? `${unit} (log)` : unit, "middle");
    title.setAttribute("transform", `translate(11 ${(MARGIN.top + bottom) / 2}) rotate(-90)`);
    parts.push(title);
    return parts;
  }

  // Ticks keep their digits: 1200 and 1250 are different ones.
  function tickText(tick) {
    for (const [size, letter] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (Math.abs(tick) >= size) return `${Number((tick / size).toPrecision(6))}${letter}`;
    }
    return String(tick);
  }

  function shape(name, attributes) {
    const made = document.createElementNS(NAMESPACE, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
    return made;
  }

  function label(x, y, text, anchor) {
    const made = shape("text", { x, y, "text-anchor": anchor });
    made.textContent = text;
    return made;
  }

  // ---- data

  function draw() {
    drawing = false;
    if (!view) return;
    say("recipe", orDash(view.recipe_hash));
    drawHead();
    drawNumbers();
    if (tablesAreOld) drawTables();
    tablesAreOld = false;
    drawCharts();
    showOrders();
  }

  // At most one drawing for each frame of the screen, however fast the events come.
  function drawSoon() {
    if (drawing) return;
    drawing = true;
    requestAnimationFrame(draw);
  }

  function takeStep(update) {
    if (!view) return;
    const { after, points, ...rest } = update;
    Object.assign(view, rest);
    view.curve.points = view.curve.points.filter((point) => point.step <= after).concat(points);
  }

  function connect() {
    stream = new EventSource("/api/events");
    stream.addEventListener("open", () => show("connection", false));
    stream.addEventListener("view", (event) => {
      view = JSON.parse(event.data);
      tablesAreOld = true;
      drawSoon();
    });
    stream.addEventListener("step", (event) => {
      takeStep(JSON.parse(event.data));
      drawSoon();
    });
    stream.addEventListener("error", lostConnection);
  }

  function lostConnection() {
    show("connection", true);
    if (view && END_STATES.includes(view.state)) {
      stream.close();
      say("connection", "The run has ended. This page shows its last state.");
      return;
    }
    say("connection", "The connection to the run is lost. Reconnecting…");
    // A browser gives up by itself where the server answered with an error.
    if (stream.readyState === EventSource.CLOSED) setTimeout(connect, REOPEN_MS);
  }

  // ---- orders

  function showOrders() {
    const ended = view !== null && END_STATES.includes(view.state);
    const ready = element("token").value !== "" && !ended;
    element("save").disabled = !ready;
    element("stop").disabled = !ready;
    if (!ready) show("confirm", false);
  }

  async function order(name, done) {
    say("answer", "Asking…");
    try {
      const answer = await fetch(`/api/${name}`, { method: "POST", headers: { Authorization: `Bearer ${element("token").value}` } });
      const body = await answer.json();
      say("answer", answer.ok ? done : `Refused: ${body.error}.`);
    } catch (error) {
      say("answer", `The order did not arrive: ${error.message}.`);
    }
  }

  function askToStop(asks) {
    show("confirm", asks);
    element(asks ? "confirm-stop" : "stop").focus();
  }

  function toggle(id) {
    element(id).setAttribute("aria-pressed", String(!pressed(id)));
    drawSoon();
  }

  for (const id of ["log", "smooth"]) element(id).addEventListener("click", () => toggle(id));
  element("token").addEventListener("input", showOrders);
  element("save").addEventListener("click", () => order("save", "A checkpoint will be saved at the next step."));
  element("stop").addEventListener("click", () => askToStop(true));
  element("confirm-cancel").addEventListener("click", () => askToStop(false));
  element("confirm-stop").addEventListener("click", () => {
    askToStop(false);
    order("stop", "The run saves its state and stops.");
  });
  element("confirm").addEventListener("keydown", (event) => {
    if (event.key === "Escape") askToStop(false);
  });
  new ResizeObserver(drawSoon).observe(element("main"));
  connect();
})();
