// The voices: the list, listening, deleting, and adding one from a recording.
import { request } from "./api.js";
import { recordWith } from "./recorder.js";

const $ = (id) => document.getElementById(id);
const path = (name) => `v1/audio/voices/${encodeURIComponent(name)}`;
const label = (voice) => (voice.built_in ? `Speaker ${voice.name}` : voice.name);

let audio = null; // the recording: a Blob

function button(text, name, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.setAttribute("aria-label", `${text}: ${name}`);
  made.addEventListener("click", act);
  return made;
}

function note(text, isError = false) {
  $("voice-note").textContent = text;
  $("voice-note").classList.toggle("error", isError);
}

/** Gets the voices and shows them in the list and in the choice of a voice. */
export async function refreshVoices(listen) {
  const { data } = await (await request("v1/audio/voices")).json();
  const chosen = $("voice").value;
  $("voice").replaceChildren(...data.map((voice) => new Option(label(voice), voice.name)));
  if (data.some((voice) => voice.name === chosen)) $("voice").value = chosen;
  const items = data.map((voice) => {
    const item = document.createElement("li");
    const name = document.createElement("span");
    name.textContent = label(voice) + (voice.built_in ? "" : `, ${voice.duration_s.toFixed(1)} s`);
    item.append(name, button("Listen", label(voice), () => listen(`${path(voice.name)}/sample`)));
    if (!voice.built_in) item.append(button("Delete", voice.name, () => remove(voice.name, listen)));
    return item;
  });
  $("voice-list").replaceChildren(...items);
}

async function remove(name, listen) {
  if (!confirm(`Delete the voice ${name}?`)) return;
  try {
    await request(path(name), { method: "DELETE" });
    note(`${name} is deleted.`);
  } catch (error) {
    note(error.message, true);
  }
  await refreshVoices(listen);
}

function take(file) {
  audio = file;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
}

async function add(listen) {
  if (!audio) return note("Record something first, or choose a file.", true);
  const form = new FormData();
  form.append("name", $("name").value.trim());
  form.append("audio", audio, audio.name ?? "recording.wav");
  form.append("transcript", $("transcript").value.trim());
  note("The server encodes the recording …");
  try {
    const voice = await (await request("v1/audio/voices", { method: "POST", form })).json();
    $("new-voice").reset();
    $("preview").hidden = true;
    audio = null;
    await refreshVoices(listen);
    $("voice").value = voice.name;
    note(`${voice.name} is added, and chosen under Speak.`);
  } catch (error) {
    note(error.message, true);
  }
}

/** Wires the form of a new voice; `listen` plays the sample at a path. */
export function setUpVoices(listen) {
  const drop = $("drop");
  recordWith($("record"), {
    take(recording) {
      take(recording);
      note("Recorded. Listen to it below, and write what it says.");
    },
    fail: (error) => note(`No recording: ${error.message}`, true),
  });
  $("file").addEventListener("change", () => $("file").files[0] && take($("file").files[0]));
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    const [file] = event.dataTransfer.files;
    if (file) take(file);
    if (file) note(`${file.name} is taken.`);
  });
  $("new-voice").addEventListener("submit", (event) => {
    event.preventDefault();
    add(listen);
  });
}
