// The page: connects the views with the player and the server.
import { base, getKey, request, watchServer } from "./api.js";
import * as conversation from "./conversation.js";
import { Player, RATE } from "./player.js";
import { recordWith } from "./recorder.js";
import { askForKey, chosenSettings, showDefaults } from "./settings.js";
import { snippets } from "./snippets.js";
import { speak } from "./speech.js";
import { refreshVoices, setUpVoices } from "./voices.js";
import { wavFile } from "./wav.js";
import { Waveform } from "./waveform.js";

const $ = (id) => document.getElementById(id);

export const player = new Player(); // tests read its figures
for (const gesture of ["pointerdown", "keydown"]) {
  document.addEventListener(gesture, () => player.unlock().catch(() => {}), { once: true });
}
const wave = new Waveform($("wave"));
let current = null; // what plays: {stop}

const SILENT_MS = 2000; // after this without sound the page says so
const seconds = (s) => `${s.toFixed(1)} s`;
const ENDINGS = {
  done: "Done.",
  stopped: "Stopped.",
  cut: "The speech was cut: the connection to the server broke.",
};

function note(text, isError = false) {
  $("note").textContent = text;
  $("note").classList.toggle("error", isError);
}

function showFigures({ firstMs, madeMs, seconds: length }) {
  $("first").textContent = firstMs === null ? "–" : `${Math.round(firstMs)} ms`;
  $("factor").textContent = length ? (madeMs / 1000 / length).toFixed(2) : "–";
  $("length").textContent = length ? seconds(length) : "–";
}

player.onprogress = ({ played, underruns }) => {
  wave.progress(played);
  $("gaps").textContent = underruns;
};

function begun(own) {
  note("Speaking …");
  setTimeout(() => {
    if (current !== own || player.isRunning) return;
    note("The browser plays no sound. Has this machine a loudspeaker?", true);
  }, SILENT_MS);
}

/** Plays the speech of a request, in place of what plays. Returns how it ended, null if refused. */
async function play(path, options, stop) {
  current?.abort.abort();
  const own = { abort: new AbortController() };
  own.stop = stop ?? (() => own.abort.abort());
  current = own;
  $("stop").disabled = false;
  $("save").hidden = true;
  $("used-seed").textContent = options.json?.seed ?? "–";
  wave.clear();
  showFigures({ firstMs: null, madeMs: 0, seconds: 0 });
  $("gaps").textContent = "–";
  note("Waiting for the first sound …");
  const onSamples = (samples, speech) => {
    if (speech.pieces.length === 1) begun(own);
    if (current === own) wave.push(samples), showFigures(speech);
  };
  try {
    const speech = await speak(player, path, options, { signal: own.abort.signal, onSamples });
    if (current !== own) return "stopped"; // something else plays now
    if (speech.ending === "cut") look();
    note(ENDINGS[speech.ending], speech.ending === "cut");
    $("wave").setAttribute("aria-label", `Waveform: ${seconds(speech.seconds)} of speech`);
    offerDownload(speech, options.json);
    return speech.ending;
  } catch (error) {
    if (current === own) note(error.message, true);
    if (error.status === 0) look();
    if (error.status === 401) askForKey();
    return null;
  } finally {
    if (current === own) {
      current = null;
      $("stop").disabled = true;
    }
  }
}

let remake = null; // the request that makes the same speech again, in any format

function link(blob, format) {
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(blob);
  $("download").download = `speech.${format}`;
}

function offerDownload({ pieces, note: origin, ending }, json) {
  if (!pieces.length) return;
  // A turn would be spoken twice, and speech that was stopped differs.
  const isWhole = json && !json.conversation && ending === "done";
  remake = isWhole ? { ...json, streaming: false } : null;
  $("format").hidden = !remake;
  $("format").value = "wav";
  link(wavFile(pieces, RATE, origin), "wav");
  $("save").hidden = false;
}

$("format").addEventListener("change", async () => {
  const format = $("format").value;
  const wanted = remake;
  const json = { ...wanted, format };
  $("download").removeAttribute("href"); // until the file is there
  note(`The server makes the ${$("format").selectedOptions[0].text} file …`);
  try {
    const file = await (await request("generate", { method: "POST", json })).blob();
    if ($("format").value !== format || wanted !== remake) return;
    link(file, format);
    note("The file is ready.");
  } catch (error) {
    note(error.message, true);
  }
});

const voiceFields = (voice) => (/^\d+$/.test(voice) ? { speaker: Number(voice) } : { voice });
const speaker = () => Number(document.querySelector("[name=speaker]:checked").value);
const forms = {
  speak: () => ({ text: $("text").value, ...voiceFields($("voice").value || "0") }),
  talk: () => ({
    text: $("turn").value,
    speaker: speaker(),
    conversation: conversation.conversationId(),
  }),
};
const body = (view) => ({ ...forms[view](), streaming: true, ...chosenSettings() });
const post = (view) => ({ method: "POST", json: body(view) });

async function say() {
  const said = post("talk");
  conversation.addPending(said.json.speaker, said.json.text);
  let interruption = null;
  const stop = () => {
    const own = current;
    interruption ??= conversation.interrupt(player.heardMs);
    interruption.catch(() => own.abort.abort());
    player.stop();
  };
  const ending = await play("generate", said, stop);
  if (ending === "done") {
    $("turn").value = "";
    document.querySelector(`[name=speaker][value="${1 - said.json.speaker}"]`).checked = true;
  }
  const heard = await interruption?.catch(() => null);
  if (heard) note(`Interrupted after ${seconds(heard.heard_s)}.`);
  await conversation.refreshTurns().catch(() => {});
}

function onSubmit(name, act) {
  const form = $(`${name}-form`);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    act();
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
}

/** A seed of our own, with which the same speech can be made again. */
const anySeed = () => crypto.getRandomValues(new Uint32Array(1))[0];

function speakText() {
  const { method, json } = post("speak");
  return play("generate", { method, json: { seed: anySeed(), ...json } });
}

onSubmit("speak", speakText);
onSubmit("talk", say);
$("stop").addEventListener("click", () => current?.stop());
document.addEventListener("keydown", (event) => event.key === "Escape" && current?.stop());
recordWith($("record-turn"), {
  begin() {
    if (!$("turn").reportValidity()) return false;
    current?.stop();
    note("Recording …");
    return true;
  },
  async take(recording) {
    note("The server encodes the recording …");
    await conversation.addRecorded(speaker(), $("turn").value, recording);
    $("turn").value = "";
    document.querySelector("[name=speaker]:not(:checked)").checked = true;
    note("Your turn is added.");
  },
  fail: (error) => note(`No recording: ${error.message}`, true),
});
$("forget").addEventListener("click", () => {
  current?.abort.abort();
  conversation.forget();
});

const tabs = [...document.querySelectorAll("[role=tab]")];
let view = "speak";

function choose(tab) {
  for (const other of tabs) {
    other.setAttribute("aria-selected", String(other === tab));
    other.tabIndex = other === tab ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = other !== tab;
  }
  view = tab.getAttribute("aria-controls");
  $("code").hidden = !(view in forms);
}

tabs.forEach((tab, i) => {
  tab.addEventListener("click", () => choose(tab));
  tab.addEventListener("keydown", ({ key }) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[key];
    if (!step) return;
    const next = tabs.at((i + step) % tabs.length);
    choose(next);
    next.focus();
  });
});

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  getSelection().selectAllChildren($("snippet")); // without HTTPS there is no clipboard object
  document.execCommand("copy");
}

for (const button of document.querySelectorAll("[data-copy]")) {
  button.addEventListener("click", async () => {
    const url = new URL("generate", base).href;
    $("snippet").textContent = snippets[button.dataset.copy](url, body(view), getKey() !== "");
    await copy($("snippet").textContent).then(
      () => ($("copied").textContent = "Copied."),
      () => ($("copied").textContent = "Copy it from below."),
    );
  });
}

const listen = (path) => play(path, {});
const STATES = {
  ready: "The server is ready.",
  away: "The server does not answer. Trying again …",
};
let state = null;
const look = watchServer(async (now) => {
  $("server").dataset.state = now in STATES ? now : "away";
  const text = STATES[now] ?? `The server cannot serve: ${now}.`;
  if ($("server").textContent !== text) $("server").textContent = text;
  const returned = now === "ready" && state !== "ready";
  state = now;
  if (!returned) return;
  request("health").then(async (answer) => showDefaults((await answer.json()).defaults ?? {}), () => {});
  await refreshVoices(listen).catch((error) => error.status === 401 && note(error.message, true));
});
$("key").addEventListener("change", () => refreshVoices(listen).catch(() => {}));
setUpVoices(listen);
conversation.restoreTurns();
