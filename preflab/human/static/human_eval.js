"use strict";
/* The page shows one pair at a time. A control with a keyboard shortcut names its key in aria-keyshortcuts; the key
   acts as a click on the control. `votes` has one entry per item, in page order and in the exported format. */

const byId = (id) => document.getElementById(id);
const { format, study, items } = JSON.parse(byId("data").textContent);
const SCREENS = ["start", "pair", "finish"];
const MARKS = ["left_acceptable", "right_acceptable"];

let votes = [];
let annotator = "";
let at = 0; // index of the pair on screen, or of the last one shown
let screen = "start";
let since = null; // start of the current reading time; null while no pair is visible
let unexported = false;
let pointed = false; // whether the focus was set by mouse or touch

// ---- storage

/* The browser may block storage or run out of it. The page then shows a warning and keeps working. */
const storage = {
  works: true,
  try(use, votesSaved = false) {
    try {
      const value = use(localStorage);
      // Only saved votes clear the warning: a small setting may fit where the votes do not.
      this.works ||= votesSaved;
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
      return null; // damaged entry: treated as missing
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

function save() {
  clock();
  storage.write(votes.filter((vote) => vote.ms || touched(vote)), study, annotator);
}

/* After every change: save at once, update the screen, announce to screen readers. */
function changed(message) {
  unexported = true;
  save();
  render();
  announce(message);
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
  changed(reason ? "Skip saved" : "Skip removed");
  document.querySelector("[data-do=next]").focus({ preventScroll: true });
}

/* Selecting a mark again removes it. */
function mark(name, value) {
  votes[at][name] = votes[at][name] === value ? null : value;
  changed(votes[at][name] === null ? "Mark removed" : "Saved");
}

/* Add the time since the last call to the visible pair. Hidden tabs and other screens do not count. */
function clock() {
  const now = performance.now();
  if (since !== null) votes[at].ms += Math.round(now - since);
  since = screen === "pair" && !document.hidden ? now : null;
}

// ---- export

/* Replace lone surrogates: UTF-8, which the checksum uses, cannot encode them. */
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
  save();
  const given = votes.filter(touched).map((vote) => ({ ...vote, comment: wellFormed(vote.comment.trim()) }));
  const exported_utc = new Date().toISOString();
  const checksum = crc32(JSON.stringify([study, annotator, given]));
  const content = { format, study, annotator, items: items.length, exported_utc, votes: given, checksum };
  return JSON.stringify(content, null, 1);
}

function handedOver(message) {
  unexported = false;
  announce(message);
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

/* Set the status line. With `shown` false it is for screen readers only, since the heading shows the same. */
function announce(message, shown = true) {
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
  save(); // the time so far belongs to the previous pair
  at = index;
  for (const part of ["prompt", "left", "right"]) byId(part).innerHTML = items[at][part];
  byId("comment").value = votes[at].comment;
  byId("position").textContent = `Pair ${at + 1} of ${items.length}`;
  document.querySelector("#pair [data-do=back]").disabled = at === 0;
  show("pair");
  makeScrollable();
  focusOn("position");
  announce(byId("position").textContent, false);
}

function showFinish() {
  const left = votes.filter(open).length;
  byId("finish-title").textContent = left ? "Some pairs are still open" : "All pairs are done";
  byId("resume").hidden = !left;
  show("finish");
  save();
  focusOn("finish-title");
  announce(`${left} of ${items.length} open`, false);
}

function resume() {
  const first = votes.findIndex(open);
  if (first < 0) showFinish();
  else showPair(first);
}

/* Update controls and counts from the votes. */
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

/* Blocks that scroll sideways must be reachable by keyboard. */
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

/* Whether the focused element handles this key itself. */
function native({ key, target }) {
  if (key !== "Enter" && !key.startsWith("Arrow")) return false;
  // A clicked control keeps the focus, but Enter and arrows must then move between pairs instead of changing it.
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
document.addEventListener("visibilitychange", () => annotator && save());
addEventListener("pagehide", () => annotator && save());

addEventListener("storage", (event) => {
  // The same annotator in a second tab: show the newest votes in both.
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
  "This browser blocks storage. Your votes are kept only until this tab closes: export them before you leave.";
byId("count").textContent = items.length === 1 ? "1 pair" : `${items.length} pairs`;
byId("cut-note").hidden = !items.some(({ left, right }) => (left + right).includes('<p class="cut">'));
byId("name").value = storage.read("annotator") ?? "";
byId("shortcuts").checked = storage.read("shortcuts") ?? true;
useShortcuts();
byId("start").hidden = false;
