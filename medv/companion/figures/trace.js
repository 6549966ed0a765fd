// Plays a trace: frame k is the canvas after k forwards. Words are set as text, never as markup.
(() => {
  const { length, events, fixed } = JSON.parse(document.getElementById("data").textContent);
  const [play, back, next, slider, speed, status, canvas, timeline] =
    ["play", "back", "next", "slider", "speed", "status", "canvas", "timeline"].map((id) => document.getElementById(id));
  const forwards = events.length ? events[events.length - 1][0] + 1 : 0;
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const percent = (share) => `${Math.round(100 * share)}%`;
  let frame = 0, timer = null;

  // Each cell is as wide as its widest word from the start, so that nothing moves while it plays.
  const widest = Array(length).fill("");
  for (const [, position, , word] of events) if (word.length > widest[position].length) widest[position] = word;
  for (const [position, word] of fixed) widest[position] = word;
  const cells = widest.map((word) => {
    const cell = document.createElement("span"), size = document.createElement("span"), text = document.createElement("span");
    size.className = "size";
    size.setAttribute("aria-hidden", "true");
    size.textContent = word.trim() || word;
    cell.append(size, text);
    canvas.append(cell);
    return { cell, text };
  });

  const steps = Array.from({ length: forwards }, () => ({ wrote: 0, sure: 0, took: 0 }));
  for (const [step, , wrote, , sure] of events) {
    if (wrote) { steps[step].wrote += 1; steps[step].sure += sure; } else steps[step].took += 1;
  }
  const most = Math.max(1, ...steps.map((step) => step.wrote));
  const bars = steps.map((step) => {
    const bar = document.createElement("i");
    bar.style.height = percent(step.wrote / most);
    bar.style.setProperty("--sure", percent(step.wrote ? step.sure / step.wrote : 0));
    bar.classList.toggle("took", step.took > 0);
    timeline.append(bar);
    return bar;
  });

  function show(wanted) {
    frame = Math.min(Math.max(wanted, 0), forwards);
    const places = Array.from({ length }, () => ({ word: "", sure: 0, taken: 0, step: -1, lost: false }));
    for (const [position, word] of fixed) Object.assign(places[position], { word, sure: 1, step: -2, open: false, fixed: true });
    let written = 0;
    for (const [step, position, wrote, word, sure] of events) {
      if (step >= frame) break;
      const place = places[position];
      place.lost = !wrote && step === frame - 1;
      if (!wrote) place.taken += 1;
      written += wrote ? 1 : -1;
      Object.assign(place, { word: wrote || place.lost ? word : "", sure, step, open: !wrote });
    }
    places.forEach(({ word, sure, taken, step, lost, open = true, fixed = false }, i) => {
      const { cell, text } = cells[i];
      text.textContent = word.trim() || word;
      cell.className = "cell";
      for (const [name, on] of Object.entries({
        open, lost, fixed, never: !widest[i], word: widest[i].startsWith(" "),
        fresh: !open && step === frame - 1, again: !open && taken > 0,
      })) cell.classList.toggle(name, on);
      cell.style.setProperty("--sure", percent(sure));
      const history = taken ? `, taken back ${taken} time${taken > 1 ? "s" : ""}` : "";
      cell.title = `position ${i}: ` +
        (fixed ? "given" : open ? `masked${history}` : `written by forward ${step + 1}, confidence ${sure.toFixed(3)}${history}`);
    });
    bars.forEach((bar, i) => bar.classList.toggle("done", i < frame));
    const taken = places.reduce((sum, place) => sum + place.taken, 0);
    const said = `forward ${frame} of ${forwards}: ${written} of ${length} positions written` +
      (taken ? `, ${taken} taken back so far` : "");
    status.textContent = said;
    slider.value = frame;
    slider.setAttribute("aria-valuetext", said);
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    status.setAttribute("aria-live", "polite");
  }
  function start() {
    if (frame >= forwards) show(0);
    play.textContent = "Pause";
    status.setAttribute("aria-live", "off"); // a running animation is not read out
    timer = setInterval(() => { if (frame < forwards) show(frame + 1); if (frame >= forwards) pause(); }, 1000 / speed.value);
  }
  const toggle = () => (timer ? pause() : start());
  const step = (by) => { pause(); show(frame + by); };

  slider.max = forwards;
  slider.addEventListener("input", () => { pause(); show(Number(slider.value)); });
  play.addEventListener("click", toggle);
  back.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  speed.addEventListener("change", () => { if (timer) { pause(); start(); } });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("button, select, summary, input")) return; // these have keys of their own
    const act = { " ": toggle, ArrowLeft: () => step(-1), ArrowRight: () => step(1), Home: () => step(-forwards), End: () => step(forwards) };
    if (act[event.key]) { event.preventDefault(); act[event.key](); }
  });

  if (still) show(forwards); else { show(0); start(); }
})();
