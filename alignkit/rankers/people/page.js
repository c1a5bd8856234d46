"use strict";
// A click or key this soon after a new pair has come was meant for the pair before: half of a double click.
const SETTLE_MS = 400;
const SMALL = 256; // pixels of width up to which a video is enlarged by whole numbers, so that its pixels stay squares
const NARROW = 620; // pixels of room up to which videos may stand above each other
const KEYS = {
  ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", " ": "tie", s: "skip", u: "undo", Backspace: "undo", p: "play",
};
const STORED = "alignkit.rater";

const at = (id) => document.getElementById(id);
const videos = [at("left"), at("right")];
const still = matchMedia("(prefers-reduced-motion: reduce)");
const token = document.querySelector("meta[name=token]").content;

let rater = recall();
let state = null; // what the server said last
let busy = false; // a vote is on its way
let since = 0; // when the pair came on the screen, in ms
let loaded = null; // of which pair both videos can be played
let wanted = !still.matches; // whether videos play; those who ask for less motion start them

// --- talking to the server ---

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "content-type": "application/json", "x-token": token },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Is “alignkit rank serve” still running? Your last answer was not stored.");
  }
  const found = await answer.json().catch(() => ({ error: "The server gave no answer that can be read." }));
  if (!answer.ok) throw new Error(found.error);
  return found;
}

async function change(path, body) {
  if (busy) return;
  busy = true;
  try {
    show(await ask(path, body));
  } catch (error) {
    complain(error.message);
  } finally {
    busy = false;
  }
}

// --- what is on the screen ---

function show(next) {
  const same = state && state.pair && next.pair && state.pair.key === next.pair.key;
  state = next;
  complain("");
  at("bar").max = state.total;
  at("bar").value = state.done;
  for (const button of document.querySelectorAll("[data-do=undo]")) button.disabled = !state.last;
  if (!state.pair) return finish();
  at("count").textContent = `${state.done + 1} of ${state.total}`;
  at("prompt").textContent = state.pair.prompt;
  at("prompt").classList.toggle("long", state.pair.prompt.length > 120);
  at("who").textContent = rater;
  reveal("compare");
  at("announce").textContent = `Pair ${state.done + 1} of ${state.total}. ${state.pair.prompt}`;
  if (!same) bring(state.pair.key);
}

function finish() {
  clear();
  const voted = state.done - state.skipped;
  at("thanks").textContent = `, ${rater}`;
  at("tally").textContent =
    `${voted} ${voted === 1 ? "vote" : "votes"} on ${state.total} pairs` + (state.skipped ? `, ${state.skipped} skipped.` : ".");
  at("again").hidden = !state.skipped;
  reveal("finished");
  at("announce").textContent = `That was all. ${at("tally").textContent}`;
  since = performance.now();
}

function welcome() {
  clear();
  state = null;
  complain("");
  reveal("welcome");
  at("name").value = rater;
  at("name").focus();
}

function reveal(id) {
  for (const part of document.querySelectorAll("main[id]")) part.hidden = part.id !== id;
}

function complain(text) {
  at("problem").textContent = text;
  at("problem").hidden = !text;
}

// --- two videos in step ---

function bring(key) {
  loaded = null;
  since = performance.now();
  wanted ||= !still.matches;
  at("stage").classList.remove("shown");
  for (const video of videos) {
    video.pause();
    video.src = `video/${key}/${video.id}?rater=${encodeURIComponent(rater)}`;
    video.load();
  }
}

function clear() {
  loaded = null;
  for (const video of videos) {
    video.pause();
    if (video.hasAttribute("src")) {
      video.removeAttribute("src");
      video.load();
    }
  }
}

function whenPlayable() {
  if (loaded || !state || !state.pair || videos.some((video) => video.readyState < HTMLMediaElement.HAVE_FUTURE_DATA)) return;
  loaded = state.pair.key;
  since = performance.now();
  fit();
  at("stage").classList.add("shown");
  wanted ? fromTheStart() : sayWhetherPlaying();
}

async function fromTheStart() {
  const key = loaded;
  await Promise.all(videos.map(rewind));
  if (key === loaded) play();
}

function rewind(video) {
  video.playbackRate = 1;
  if (video.currentTime === 0) return null;
  return new Promise((done) => {
    video.addEventListener("seeked", done, { once: true });
    video.currentTime = 0;
  });
}

function play() {
  wanted = true;
  // One that has ended would start again alone.
  for (const video of videos) if (!video.ended) video.play().catch(() => {});
  sayWhetherPlaying();
}

function pause() {
  wanted = false;
  for (const video of videos) video.pause();
  sayWhetherPlaying();
}

function sayWhetherPlaying() {
  at("play").textContent = wanted ? "Pause" : "Play";
}

function keepInStep() {
  if (!loaded || videos.some((video) => video.paused || video.ended)) return;
  const [first, second] = videos;
  const gap = first.currentTime - second.currentTime; // seconds
  const [ahead, behind] = gap > 0 ? [first, second] : [second, first];
  behind.playbackRate = 1;
  if (Math.abs(gap) > 0.5) ahead.currentTime = behind.currentTime;
  // Made up for within about a second, too slowly to be seen.
  else ahead.playbackRate = Math.abs(gap) > 0.02 ? 1 - Math.min(Math.abs(gap), 0.4) : 1;
}

// Side by side, or on a narrow window above each other where that shows them larger.
function fit() {
  if (!videos[0].videoWidth || at("compare").hidden) return;
  const gap = parseFloat(getComputedStyle(at("stage")).gap);
  const wide = at("stage").clientWidth;
  const around = at("above").offsetHeight + at("below").offsetHeight + 4 * gap; // with what is left free between them
  const high = Math.max(document.documentElement.clientHeight - around, 200);
  const beside = scaleOf(videos[0], (wide - gap) / 2, high);
  const above = scaleOf(videos[0], wide, (high - gap) / 2);
  const stacked = wide <= NARROW && above > beside;
  at("compare").classList.toggle("stacked", stacked);
  for (const video of videos) {
    const scale = stacked ? scaleOf(video, wide, (high - gap) / 2) : scaleOf(video, (wide - gap) / 2, high);
    video.classList.toggle("pixels", video.videoWidth <= SMALL);
    video.style.width = `${video.videoWidth * scale}px`;
    video.style.height = `${video.videoHeight * scale}px`;
  }
  const shown = stacked ? wide : videos[0].offsetWidth + gap + videos[1].offsetWidth;
  at("answers").style.maxWidth = `${Math.max(shown, 640)}px`;
}

function scaleOf(video, width, height) {
  const scale = Math.min(width / video.videoWidth, height / video.videoHeight);
  const squares = Math.floor(scale * devicePixelRatio) / devicePixelRatio;
  return video.videoWidth <= SMALL && squares > 0 ? squares : scale;
}

// --- what people do ---

function act(what) {
  if (what === "rater") return welcome();
  if (what === "play") return wanted ? pause() : play();
  if (!state || busy || performance.now() - since < SETTLE_MS) return;
  if (what === "undo") {
    if (state.last) change("undo", { rater, pair: state.last });
  } else if (what === "again") {
    change("again", { rater });
  } else if (state.pair) {
    if (what !== "skip" && loaded !== state.pair.key) return complain("The videos are not there yet. Wait, or skip this pair.");
    change("vote", { rater, pair: state.pair.key, answer: what });
  }
}

for (const button of document.querySelectorAll("[data-do]")) {
  button.addEventListener("click", (event) => {
    // A button that keeps the focus after a click would take the space key, which is a tie.
    if (event.detail > 0) button.blur();
    if (event.detail < 2) act(button.dataset.do);
  });
}

addEventListener("keydown", (event) => {
  const what = KEYS[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  const pressed = event.target instanceof HTMLButtonElement && event.key === " ";
  if (!what || !state || pressed || scrolls(event) || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  if (!event.repeat) act(what);
});

// The keys of a tie scroll a description that is too long to be shown whole and has the focus.
function scrolls(event) {
  const { target, key } = event;
  return target.id === "prompt" && (key === "ArrowDown" || key === " ") && target.scrollHeight > target.clientHeight;
}

at("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  rater = at("name").value.trim().replace(/\s+/g, " ");
  if (!rater) return;
  keep(rater);
  change(`next?rater=${encodeURIComponent(rater)}`);
});

for (const video of videos) {
  video.addEventListener("canplay", whenPlayable);
  video.addEventListener("ended", () => {
    if (loaded && wanted && videos.every((one) => one.ended)) fromTheStart();
  });
  video.addEventListener("error", () => {
    if (video.hasAttribute("src")) complain("A video of this pair cannot be played. Skip it, and tell who runs the server.");
  });
}

addEventListener("resize", fit);
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && loaded && wanted) fromTheStart();
});
setInterval(keepInStep, 100);

function recall() {
  try {
    return localStorage.getItem(STORED) || "";
  } catch {
    return ""; // a browser that stores nothing asks for the name each time
  }
}

function keep(name) {
  try {
    localStorage.setItem(STORED, name);
  } catch {
    // as above
  }
}

if (rater) change(`next?rater=${encodeURIComponent(rater)}`).then(() => state || welcome());
else welcome();
