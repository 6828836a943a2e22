"use strict";
/* One pair is on the page at a time. Every control that a key works names the key in aria-keyshortcuts, and the key
   does what a click on the control does. `votes` has an entry per item, in page order, in the form that is exported. */

const byId = (id) => document.getElementById(id);
const { format, study, items } = JSON.parse(byId("data").textContent);
const SCREENS = ["start", "pair", "finish"];
const MARKS = ["left_acceptable", "right_acceptable"];

let votes = [];
let annotator = "";
let at = 0; // the pair on screen, or the last one that was
let screen = "start";
let since = null; // when the running stretch of reading time began; null while no pair is in view
let unexported = false;
let pointed = false; // whether the focus came by pointer

// ---- storage

/* The browser may forbid or fill up its storage; then the page says so and works on. */
const storage = {
  works: true,
  try(use, mends = false) {
    try {
      const value = use(localStorage);
      // Only votes that were kept say that votes are kept: a setting finds room where they do not.
      this.works ||= mends;
      return value;
    } catch {
      this.works = false;
      return null;
    } finally {
      byId("warning").hidden = this.works;
    }
  },
  read(...key) {
    const text = this.try((local) => local.getItem(JSON.stringify([format, ...key])));
    try {
      return JSON.parse(text);
    } catch {
      return null; // damaged by another hand: as if it were not there
    }
  },
  write(value, ...key) {
    const votes = key.length > 1;
    this.try((local) => local.setItem(JSON.stringify([format, ...key]), JSON.stringify(value)), votes);
  },
};

function blank(id) {
  return { id, choice: null, left_acceptable: null, right_acceptable: null, skip: null, comment: "", ms: 0 };
}

function load() {
  const saved = new Map((storage.read(study, annotator) ?? []).map((vote) => [vote.id, vote]));
  votes = items.map(({ id }) => ({ ...blank(id), ...saved.get(id) }));
}

function keep() {
  clock();
  storage.write(votes.filter((vote) => vote.ms || touched(vote)), study, annotator);
}

/* After every change: kept at once, shown, and said to whoever listens. */
function changed(message) {
  unexported = true;
  keep();
  render();
  say(message);
}

// ---- votes

const judged = (vote) => vote.choice !== null;
const open = (vote) => vote.choice === null && vote.skip === null;
const touched = (vote) => !open(vote) || vote.comment.trim() !== "" || MARKS.some((mark) => vote[mark] !== null);

function choose(choice) {
  Object.assign(votes[at], { choice, skip: null });
  changed("Saved");
}

function skip(reason) {
  if (reason) Object.assign(votes[at], { choice: null, skip: reason });
  else votes[at].skip = null;
  byId("reasons").close();
  changed(reason ? "Skip saved" : "Not skipped");
  document.querySelector("[data-do=next]").focus({ preventScroll: true });
}

/* A mark chosen again is taken back. */
function mark(name, value) {
  votes[at][name] = votes[at][name] === value ? null : value;
  changed(votes[at][name] === null ? "Mark removed" : "Saved");
}

/* Adds the time since the last call to the pair in view; hidden tabs and other screens do not count. */
function clock() {
  const now = performance.now();
  if (since !== null) votes[at].ms += Math.round(now - since);
  since = screen === "pair" && !document.hidden ? now : null;
}

// ---- export

/* UTF-8 cannot hold half a surrogate pair, and the checksum is of UTF-8. */
const wellFormed = (text) => new TextDecoder("utf-8", { ignoreBOM: true }).decode(new TextEncoder().encode(text));

function crc32(text) {
  let crc = -1;
  for (const byte of new TextEncoder().encode(text)) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (0xedb88320 & -(crc & 1));
  }
  return (~crc >>> 0).toString(16).padStart(8, "0");
}

function exported() {
  keep();
  const given = votes.filter(touched).map((vote) => ({ ...vote, comment: wellFormed(vote.comment.trim()) }));
  const exported_utc = new Date().toISOString();
  const checksum = crc32(JSON.stringify([study, annotator, given]));
  const content = { format, study, annotator, items: items.length, exported_utc, votes: given, checksum };
  return JSON.stringify(content, null, 1);
}

function handedOver(message) {
  unexported = false;
  say(message);
}

function download() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
  link.download = `votes-${annotator.replace(/[^\p{L}\p{M}\p{N}._-]+/gu, "-")}.json`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  handedOver(`Exported ${link.download}`);
}

async function copy() {
  const text = exported();
  try {
    await navigator.clipboard.writeText(text);
    handedOver("Votes copied");
  } catch {
    byId("export-text").value = text;
    byId("copying").showModal();
    byId("export-text").select();
  }
}

// ---- screens

/* What the page's heading shows is said to screen readers only. */
function say(message, shown = true) {
  if (byId("status").textContent !== message) byId("status").textContent = message;
  byId("status").classList.toggle("unseen", !shown);
}

function show(name) {
  screen = name;
  clock();
  for (const each of SCREENS) byId(each).hidden = each !== name;
  byId("progress").hidden = byId("tools").hidden = name === "start";
  render();
}

function focusOn(heading) {
  byId(heading).focus({ preventScroll: true });
  scrollTo(0, 0);
}

function showPair(index) {
  keep(); // with the time up to here, which belongs to the pair that leaves
  at = index;
  for (const part of ["prompt", "left", "right"]) byId(part).innerHTML = items[at][part];
  byId("comment").value = votes[at].comment;
  byId("position").textContent = `Pair ${at + 1} of ${items.length}`;
  document.querySelector("#pair [data-do=back]").disabled = at === 0;
  show("pair");
  makeScrollable();
  focusOn("position");
  say(byId("position").textContent, false);
}

function showFinish() {
  const left = votes.filter(open).length;
  byId("finish-title").textContent = left ? "The end, with some pairs open" : "All pairs are done";
  byId("resume").hidden = !left;
  show("finish");
  keep();
  focusOn("finish-title");
  say(`${left} of ${items.length} open`, false);
}

function resume() {
  const first = votes.findIndex(open);
  if (first < 0) showFinish();
  else showPair(first);
}

/* Controls and counts, as the votes have them. */
function render() {
  const vote = votes[at];
  if (!vote) return;
  for (const name of ["choice", ...MARKS]) {
    for (const radio of document.getElementsByName(name)) radio.checked = radio.value === String(vote[name]);
  }
  const reason = vote.skip && document.querySelector(`[data-skip="${CSS.escape(vote.skip)}"] span`);
  byId("reason").textContent = reason ? `Skipped: ${reason.textContent}` : "";
  byId("skipped").textContent = reason ? "Skipped…" : "Skip…";
  byId("unskip").hidden = vote.skip === null;
  const counts = { judged: votes.filter(judged).length, open: votes.filter(open).length };
  counts.skipped = items.length - counts.judged - counts.open;
  for (const name of ["judged", "skipped", "open"]) byId(`${name}-count`).textContent = counts[name];
  byId("bar").max = items.length;
  byId("bar").value = items.length - counts.open;
  const skipped = counts.skipped ? `, ${counts.skipped} skipped` : "";
  byId("judged").textContent = `${counts.judged} of ${items.length} judged${skipped}`;
}

/* What scrolls sideways must be reachable by keyboard. */
function makeScrollable() {
  for (const block of document.querySelectorAll(".text pre, .text table")) {
    if (block.scrollWidth > block.clientWidth) block.tabIndex = 0;
  }
}

// ---- controls

const actions = {
  download,
  copy,
  resume,
  help: () => byId("help").showModal(),
  skip: () => byId("reasons").showModal(),
  close: (button) => button.closest("dialog").close(),
  back: () => showPair(screen === "finish" ? at : Math.max(0, at - 1)),
  next: () => (at + 1 < items.length ? showPair(at + 1) : showFinish()),
};

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.do) actions[button.dataset.do](button);
  else if (button?.dataset.skip !== undefined) skip(button.dataset.skip);
  else if (MARKS.includes(event.target.name)) mark(event.target.name, event.target.value === "true");
});

document.addEventListener("change", (event) => {
  if (event.target.name === "choice") choose(event.target.value);
});

byId("comment").addEventListener("input", () => {
  votes[at].comment = byId("comment").value;
  changed("Comment saved");
});

byId("who").addEventListener("submit", (event) => {
  event.preventDefault();
  annotator = wellFormed(byId("name").value).normalize("NFC").replace(/\s+/g, " ").trim();
  if (!annotator) return;
  storage.write(annotator, "annotator");
  load();
  resume();
});

byId("shortcuts").addEventListener("change", useShortcuts);

function useShortcuts() {
  document.body.classList.toggle("no-keys", !byId("shortcuts").checked);
  storage.write(byId("shortcuts").checked, "shortcuts");
}

/* Whether the focused element has a use of its own for this key. */
function native({ key, target }) {
  if (key !== "Enter" && !key.startsWith("Arrow")) return false;
  // What was only clicked still has the focus: there Enter and the arrows move between pairs and change nothing.
  if (pointed) return false;
  return target.matches(key === "Enter" ? "button, a, [type=checkbox]" : "[type=radio], pre, table");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Tab") pointed = false;
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || event.isComposing) return;
  if (event.target.matches("textarea, [type=text]")) {
    if (event.key === "Escape" && event.target.id === "comment") byId("position").focus({ preventScroll: true });
    return;
  }
  if (!byId("shortcuts").checked || native(event)) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const scope = document.querySelector("dialog[open]") ?? document;
  const control = [...scope.querySelectorAll("[aria-keyshortcuts]")].find(
    (each) => each.getAttribute("aria-keyshortcuts").split(" ").includes(key) && each.getClientRects().length,
  );
  if (!control) return;
  event.preventDefault();
  if (control.matches("textarea")) control.focus();
  else control.click();
});

document.addEventListener("pointerdown", () => (pointed = true));
document.addEventListener("visibilitychange", () => annotator && keep());
addEventListener("pagehide", () => annotator && keep());

addEventListener("storage", (event) => {
  // The same annotator in a second tab: both show the newest votes.
  if (!annotator || event.key !== JSON.stringify([format, study, annotator])) return;
  load();
  byId("comment").value = votes[at].comment;
  render();
});

addEventListener("beforeunload", (event) => {
  if (unexported && !storage.works) event.preventDefault();
});

// ---- start

byId("warning").textContent =
  "This browser does not let the page save. Your votes live only until this tab closes: export them before you leave.";
byId("count").textContent = items.length === 1 ? "1 pair" : `${items.length} pairs`;
byId("name").value = storage.read("annotator") ?? "";
byId("shortcuts").checked = storage.read("shortcuts") ?? true;
useShortcuts();
byId("start").hidden = false;
